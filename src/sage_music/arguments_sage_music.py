"""What Transformers hands to a forward pass, version by version: the cache's name, and the arguments there are.

Its functions are the same in both families: a Hub file cannot import from another family's.
"""

import re
import warnings
from dataclasses import fields
from importlib import metadata

from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

# What the test suite passes with (`make test-versions`); pyproject.toml and exported requirements say the same.
TESTED_VERSIONS = ("transformers>=5.23,<5.25", "torch>=2.9.1,<2.16")
# The name of the cache in `generate()`, in a model's outputs and in the library's own functions.
CACHE_NAMES = NEW, OLD = "cache", "past_key_values"  # from 5.24 on, and before
CACHE_NAME = NEW if any(field.name == NEW for field in fields(CausalLMOutputWithPast)) else OLD

# Arguments that callers pass to any model. Decorators and the loss read them, which is why a forward pass names them
# here and not in its signature.
PASSED_THROUGH = frozenset(
    (
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "debug_io",
        "debug_io_dir",
        "prune_layers",
        "num_items_in_batch",
        "shift_labels",
        "ignore_index",
        # Of collators that pack sequences; `position_ids` say the same, and all attention implementations read those.
        "seq_idx",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    )
)
# Of those, what tells where packed sequences begin.
PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# The same where attention runs by Transformers' interface, and an engine's in its place.
PASSED_TO_ATTENTION = PASSED_THROUGH | {"is_causal", "kernel_options", "attention_instances"}
# The same in continuous batching.
PASSED_WITH_PAGES = PASSED_TO_ATTENTION | {
    "block_table",
    "read_index",
    "write_index",
    "logits_indices",
    "logits_processor_args",
}


def check_arguments(model, given: dict, known: frozenset[str]) -> None:
    """
    Args:
        model: whose forward pass was called.
        given: its `**kwargs`.
        known: the names it takes there.

    Raises:
        TypeError: another name, which would be swallowed: whoever gave it expects something of it.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {unknown[0]!r}.")


def one_cache(cache, past_key_values):
    """The cache of a forward pass, under whichever of its two names it came, or `None`.

    Raises:
        ValueError: two caches, or something that is none.
    """
    if cache is None or cache is past_key_values:
        cache = past_key_values
    elif past_key_values is not None:
        raise ValueError("cache and past_key_values are two names for one cache: give one of them.")
    if cache is not None and not isinstance(cache, Cache) and not is_paged(cache):
        raise ValueError(f"the cache is a {type(cache).__name__}, not a Cache of Transformers.")
    return cache


def rename_cache(model_kwargs: dict) -> None:
    """Give the cache among the arguments of `generate()` the name that the installed Transformers looks for."""
    caches = [model_kwargs.pop(name, None) for name in CACHE_NAMES]
    if any(cache is not None for cache in caches):
        model_kwargs[CACHE_NAME] = one_cache(*caches)


def is_paged(cache) -> bool:
    """Whether this is continuous batching's cache, which holds pages of many requests and is no `Cache`."""
    return cache is not None and not isinstance(cache, Cache) and hasattr(cache, "cache_allocators")


def check_flex_attention(config, device) -> None:
    """
    Raises:
        ValueError: `flex_attention` on a CPU, whose compiled kernel is wrong at some lengths (PyTorch 2.13; seen for
            heads of 8 and 16 channels without AVX-512), from call to call another way and without an error.
    """
    if config._attn_implementation == "flex_attention" and device.type == "cpu":
        raise ValueError(
            "attn_implementation='flex_attention' is refused on the CPU, where PyTorch's kernel gives wrong numbers at "
            "some lengths: use 'sdpa', which is faster there, too."
        )


def warn_untested(versions: tuple[str, ...] = TESTED_VERSIONS) -> None:
    """Warn, in one sentence, of an installed package that lies outside of the tested versions (`name>=A,<B`)."""
    for requirement in versions:
        name, least, end = re.fullmatch(r"(\w+)>=([\d.]+),<([\d.]+)", requirement).groups()
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        # By the release alone: 5.25.0.dev0 is no 5.24.
        release = re.match(r"[\d.]*\d", found or "")
        if release is None or not _numbers(least) <= _numbers(release[0]) < _numbers(end):
            warnings.warn(
                f"this model was tested with {requirement}, and {name} {found} is installed: check its results against "
                f"a tested version (pip install '{requirement}').",
                stacklevel=2,
            )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


__all__ = [
    "CACHE_NAME",
    "PACKING",
    "PASSED_THROUGH",
    "PASSED_TO_ATTENTION",
    "PASSED_WITH_PAGES",
    "TESTED_VERSIONS",
    "check_arguments",
    "check_flex_attention",
    "is_paged",
    "one_cache",
    "rename_cache",
    "warn_untested",
]
