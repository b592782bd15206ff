"""Model and tokenizer of a checkpoint or of an adapter, of either family, checked tensor by tensor.

from sage_studio.checkpoints import load
model, tokenizer = load("perceivers")
"""

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.utils import cached_file, find_adapter_config_file, logging

from sage_studio.errors import CheckpointError, MissingExtraError, install_hint
from sage_studio.families import FAMILIES, bundled, family_of

# The folders of the bundled checkpoints by their short names, the default first; not each need be installed.
BUNDLED = {family.checkpoint: family.pretrained for family in FAMILIES.values()}


def load(checkpoint: str | os.PathLike | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """Model (in evaluation mode) and tokenizer of a checkpoint; which family's, its config says.

    Of an adapter, such as `checkpoints.lora.add_lora` makes, the base model is loaded by the name in the adapter's
    config, which is any that this function takes, and the adapter merged into it. The tokenizer is the adapter's, where
    it has one, otherwise the base model's. An adapter in the folder of a whole model is merged into that model.

    Args:
        checkpoint: `"sage-music"` (the default) or `"perceivers"`, which are bundled; a folder; or a Hub name. For a
            folder of one of those two names write `./perceivers`.

    Raises:
        CheckpointError: no such checkpoint, one of another model, a missing or misshapen tensor, a config that
            contradicts itself, no tokenizer, or an adapter whose base model is not to be found or is another one.
        MissingExtraError: it is an adapter, and PEFT is not installed.
    """
    return _load(os.fspath(checkpoint) if checkpoint is not None else next(iter(BUNDLED)), ())


def source_of(checkpoint: str) -> str:
    """The folder of a bundled checkpoint by its short name; any other name as it is.

    Raises:
        CheckpointError: it is not installed.
    """
    if checkpoint not in BUNDLED:
        return checkpoint
    if not BUNDLED[checkpoint].is_dir():
        raise CheckpointError(bundled(checkpoint).absence)
    return str(BUNDLED[checkpoint])


def _load(name: str, adapters: tuple[str, ...]) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """As `load`; `adapters` are those that this is to be the base model of."""
    name = source_of(name)
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise CheckpointError(f"{name}: no such folder.")
    with _errors_of(name):
        adapter = find_adapter_config_file(name)
    if adapter is None:
        return _load_whole(name)
    # A folder with both is a whole model with an adapter of it, whatever base the adapter names: so says Transformers.
    if os.path.isfile(os.path.join(name, "config.json")):
        return _merged(name, name, lambda: _load_whole(name, with_adapter=True))
    return _load_adapter(name, Path(adapter), adapters)


def _load_whole(name: str, with_adapter: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """A model that is no adapter; one that is in the same folder is left out."""
    # Transformers would put the adapter into the model, and check its keys alone. It looks for it in this subfolder.
    apart = {"adapter_kwargs": {"subfolder": "no adapter"}} if with_adapter else {}
    with _errors_of(name):
        model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if model_type is None:
            raise CheckpointError(f"{name}: no checkpoint (it has no config.json that names a model_type).")
        try:
            model_class, tokenizer_class = family_of(model_type).classes
        except ValueError as error:
            raise CheckpointError(f"{name}: a checkpoint of {error}") from error
        config = model_class.config_class.from_pretrained(name)
        # Without its files Transformers makes one of default settings, which need not be the model's.
        files = ("tokenizer_config.json", *tokenizer_class.vocab_files_names.values())
        if not any(_has(name, file) for file in files):
            raise CheckpointError(
                f"{name}: no tokenizer ({files[0]} is missing): save the one that the model was trained with beside it."
            )
        tokenizer = tokenizer_class.from_pretrained(name)
        # Misshapen tensors are let through here to be named below.
        model, info = model_class.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **apart
        )
    _check_keys(name, {kind: info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")})
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens but the model {config.vocab_size}."
        )
    return model.eval(), tokenizer


def _load_adapter(name: str, file: Path, above: tuple[str, ...]) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """An adapter's base model with the adapter merged into it; `file` is its config, `above` what is based on it."""
    with _errors_of(name):
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    remedy = f"Set base_model_name_or_path in {file} to the base model: {', '.join(BUNDLED)}, a folder or a Hub name."
    if not base or base in (name, *above):
        raise CheckpointError(f"{name}: an adapter that names {'itself as its' if base else 'no'} base model. {remedy}")

    def load_base():
        try:
            return _load(base, (name, *above))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: an adapter whose base model does not load: {error} {remedy}") from error

    return _merged(name, base, load_base)


def _merged(
    name: str, base: str, load_base: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizer]]
) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """A base model with the adapter of the folder or Hub name `name` merged into it; `base` is its name."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError(f"{name}: an adapter; it needs PEFT: {install_hint('peft')}.") from error
    from .lora import merge_lora

    model, tokenizer = load_base()
    with _errors_of(name):
        adapted = PeftModel(model, PeftConfig.from_pretrained(name))
        weights = load_peft_weights(name, device=str(model.device))
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        kinds = {
            "missing_keys": expected.keys() - weights.keys(),
            "unexpected_keys": weights.keys() - expected.keys(),
            "mismatched_keys": [
                key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape
            ],
        }
        _check_keys(f"{name} (an adapter of {base})", kinds)
        set_peft_model_state_dict(adapted, weights)
        model = merge_lora(adapted)
        # An adapter of this model is one of it with the adapter, not of the bare base.
        model.name_or_path = model.config.name_or_path = name
        if _has(name, "tokenizer_config.json"):
            own = type(tokenizer).from_pretrained(name)
            if own.get_vocab() != tokenizer.get_vocab():
                raise CheckpointError(f"{name}: the adapter's tokenizer has another vocabulary than that of {base}.")
            tokenizer = own
    return model.eval(), tokenizer


def _has(name: str, file: str) -> bool:
    """Whether a folder or a repository on the Hub has a file."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None


@contextmanager
def _errors_of(name: str):
    """Transformers is silent inside, and whatever goes wrong a `CheckpointError`."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # Transformers, safetensors and the Hub raise a dozen kinds; all mean the same here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{name}: this checkpoint cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_keys(name: str, kinds: dict) -> None:
    """Refuse weights that lack a tensor, have one too many, or one of another shape."""
    for kind, keys in kinds.items():
        if keys:
            names = ", ".join(sorted(" ".join(map(str, key)) if isinstance(key, tuple) else key for key in keys)[:3])
            raise CheckpointError(f"{name}: the weights have {kind.replace('_', ' ')}: {names}.")
