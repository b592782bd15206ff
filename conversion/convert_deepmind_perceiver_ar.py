"""Checkpoints of DeepMind's Perceiver AR (google-research/perceiver-ar) to PerceiverS.

    python -m conversion.convert_deepmind_perceiver_ar params.npz OUTPUT --context 4096

**Their `checkpoint.dill` is a pickle: loading it runs whatever code is in it.** It is loaded only with
`--trust-pickle`, and needs jax and dm-haiku to be installed (and `dill`, if it was made with it). The safe way is to
write the parameters as plain arrays where the checkpoint was made, or on a machine that holds nothing else:

    import dill, numpy as np
    params = dill.load(open("checkpoint.dill", "rb"))["params"]
    np.savez("params.npz", **{f"{module}/{name}": np.asarray(array, "float32")
                              for module, arrays in params.items() for name, array in arrays.items()})

Read are models with rotary positions (`position_encoding_type="rotary"`) and one cross-attention layer, as the music
models have. What the parameters do not tell comes from the options, whose defaults are those of the experiment's
config: 16 heads, half of a head rotated, wavelengths up to the context length, 1,024 latents, squared ReLU. The
vocabulary is the training data's, with 0 for padding: the model alone is written.

What is peculiar: the latents start from a linear map of the embeddings, keys come from the embeddings, every matrix has
a bias, rotary positions turn neighbouring channels with wavelengths from 1 to the largest, both included.

Source: https://github.com/google-research/perceiver-ar (Apache-2.0).
"""

import argparse
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perceivers import PerceiverSForCausalLM

from .perceiver_ar import build, report, save, size, stack
from .weights import ConversionError, check_output, count, halves_from_pairs, load_state, remap, run_command

ROOT = "perceiver_ar/~"
CROSS, LAYER = f"{ROOT}/cross_attention_0", f"{ROOT}/self_attention_{{i}}"
# Names of haiku, in which matrices are (inputs, outputs): `_matrices` turns them, and numbers the first of a kind too.
WEIGHTS = {
    "model.embed_tokens.weight": f"{ROOT}/embed/embeddings",
    "model.latent_proj.weight": f"{ROOT}/linear/w",
    "model.latent_proj.bias": f"{ROOT}/linear/b",
    "model.cross_layers.0.q_norm.weight": f"{CROSS}/layer_norm/scale",
    "model.cross_layers.0.q_norm.bias": f"{CROSS}/layer_norm/offset",
    "model.cross_layers.0.kv_norm.weight": f"{CROSS}/layer_norm_1/scale",
    "model.cross_layers.0.kv_norm.bias": f"{CROSS}/layer_norm_1/offset",
    "model.cross_layers.0.attention.q_proj.weight": f"{CROSS}/attention/linear/w",
    "model.cross_layers.0.attention.q_proj.bias": f"{CROSS}/attention/linear/b",
    "model.cross_layers.0.attention.kv_proj.weight": (
        (f"{CROSS}/attention/linear_1/w", f"{CROSS}/attention/linear_2/w"),
        stack,
    ),
    "model.cross_layers.0.attention.kv_proj.bias": (
        (f"{CROSS}/attention/linear_1/b", f"{CROSS}/attention/linear_2/b"),
        stack,
    ),
    "model.cross_layers.0.attention.o_proj.weight": f"{CROSS}/attention/linear_3/w",
    "model.cross_layers.0.attention.o_proj.bias": f"{CROSS}/attention/linear_3/b",
    "model.cross_layers.0.mlp_norm.weight": f"{CROSS}/layer_norm_2/scale",
    "model.cross_layers.0.mlp_norm.bias": f"{CROSS}/layer_norm_2/offset",
    "model.cross_layers.0.mlp.up_proj.weight": f"{CROSS}/dense/linear/w",
    "model.cross_layers.0.mlp.up_proj.bias": f"{CROSS}/dense/linear/b",
    "model.cross_layers.0.mlp.down_proj.weight": f"{CROSS}/dense/linear_1/w",
    "model.cross_layers.0.mlp.down_proj.bias": f"{CROSS}/dense/linear_1/b",
    "model.layers.{i}.input_norm.weight": f"{LAYER}/layer_norm/scale",
    "model.layers.{i}.input_norm.bias": f"{LAYER}/layer_norm/offset",
    "model.layers.{i}.self_attn.qkv_proj.weight": (
        tuple(f"{LAYER}/attention/{name}/w" for name in ("linear", "linear_1", "linear_2")),
        stack,
    ),
    "model.layers.{i}.self_attn.qkv_proj.bias": (
        tuple(f"{LAYER}/attention/{name}/b" for name in ("linear", "linear_1", "linear_2")),
        stack,
    ),
    "model.layers.{i}.self_attn.o_proj.weight": f"{LAYER}/attention/linear_3/w",
    "model.layers.{i}.self_attn.o_proj.bias": f"{LAYER}/attention/linear_3/b",
    "model.layers.{i}.mlp_norm.weight": f"{LAYER}/layer_norm_1/scale",
    "model.layers.{i}.mlp_norm.bias": f"{LAYER}/layer_norm_1/offset",
    "model.layers.{i}.mlp.up_proj.weight": f"{LAYER}/dense/linear/w",
    "model.layers.{i}.mlp.up_proj.bias": f"{LAYER}/dense/linear/b",
    "model.layers.{i}.mlp.down_proj.weight": f"{LAYER}/dense/linear_1/w",
    "model.layers.{i}.mlp.down_proj.bias": f"{LAYER}/dense/linear_1/b",
    "model.norm.weight": "perceiver_ar/layer_norm/scale",
    "model.norm.bias": "perceiver_ar/layer_norm/offset",
    "lm_head.weight": f"{ROOT}/logits/w",
    "lm_head.bias": f"{ROOT}/logits/b",
}
ACTIVATIONS = {"sq_relu": "relu2", "relu": "relu", "gelu": "gelu_pytorch_tanh", "silu": "silu"}
HEADS, LATENTS, ROTATED = 16, 1024, 0.5


def convert(
    source,
    output=None,
    *,
    context: int,
    heads: int = HEADS,
    latents: int | None = None,
    rotated: float = ROTATED,
    max_wavelength: int | None = None,
    activation: str = "sq_relu",
    trust_pickle: bool = False,
) -> PerceiverSForCausalLM:
    """The model of a Perceiver AR checkpoint. Options are named as in its config, where that is given in brackets.

    Args:
        source: `.npz` (or `.safetensors`) of arrays named `module/name`, or, with `trust_pickle`, a `checkpoint.dill`.
        output: folder to write, which must be empty or new.
        context: tokens of context (max_context_length).
        heads: of cross-attention and of self-attention (num_cross_attend_heads, num_transformer_heads: equal ones).
        latents: N (z_index_dim); default 1,024, or the context where that is shorter.
        rotated: share of a head's channels that is rotated (fraction_to_rotate).
        max_wavelength: of the rotary positions; default the context.
        activation: of the MLPs (activation_name): sq_relu, relu, gelu or silu.
        trust_pickle: load a pickle, running the code in it.

    Raises:
        ConversionError: a pickle without `trust_pickle`; another layout (learned or sinusoidal positions, more
            cross-attention layers), naming the keys; or options that the parameters contradict.
    """
    if output is not None:
        check_output(output)
    if activation not in ACTIVATIONS:
        raise ConversionError(f"activation {activation!r}: one of {', '.join(ACTIVATIONS)} is known.")
    if not 0 < rotated <= 1:
        raise ConversionError(f"rotated ({rotated}) is a share of a head's channels: above 0, up to 1.")
    wavelength = context if max_wavelength is None else max_wavelength
    if wavelength < context:
        raise ConversionError(f"max_wavelength ({wavelength}) is shorter than the context ({context}).")
    state = _numbered(load_parameters(source, trust_pickle))
    layers = max(count(state, f"{LAYER}/layer_norm/scale"), 1)
    remap(state, WEIGHTS, {"i": layers})  # names first: shapes are read below
    vocabulary, width = size(state, f"{ROOT}/embed/embeddings")
    inner = size(state, f"{CROSS}/attention/linear/w")[1]
    if heads < 1 or inner % heads:
        raise ConversionError(f"{heads} heads do not divide the attention's {inner} channels: say --heads.")
    head_dim = inner // heads
    channels = int(head_dim * rotated / 2) * 2
    if channels < 2:
        raise ConversionError(f"rotated ({rotated}) of a head's {head_dim} channels is less than a pair of them.")
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": size(state, f"{CROSS}/dense/linear/w")[1],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_latents": min(LATENTS, context) if latents is None else latents,
        "max_position_embeddings": context,
        "cross_scales": [None],
        "latent_projection": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(wavelength),
            "partial_rotary_factor": channels / head_dim,
        },
        "rope_endpoint": True,
        "position_offset": 1,
        "norm_type": "layer",
        "norm_eps": 1e-5,
        "hidden_act": ACTIVATIONS[activation],
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    model = build(fields, remap(_matrices(state, heads, channels), WEIGHTS, {"i": layers}))
    if output is not None:
        save(output, model, None, source, "convert_deepmind_perceiver_ar")
    return model


def load_parameters(path, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Parameters by their names `module/name`, as `convert` reads them; a pickle only with `trust_pickle`.

    Raises:
        ConversionError: no such file, a pickle that is not to be trusted, or one without parameters.
    """
    path = Path(path)
    if path.is_dir() and (path / "checkpoint.dill").is_file():
        path = path / "checkpoint.dill"
    if path.suffix in (".npz", ".safetensors"):
        return load_state(path)
    if not path.is_file():
        raise ConversionError(f"{path}: no such file.")
    if not trust_pickle:
        raise ConversionError(
            f"{path}: a pickle: loading it runs whatever code is in it, so it is not loaded. If you trust where it "
            "comes from, pass --trust-pickle (trust_pickle=True); or write its arrays to an .npz where it was made."
        )
    try:
        import dill as unpickler
    except ImportError:
        unpickler = pickle
    try:
        with path.open("rb") as file:
            content = unpickler.load(file)
    except ImportError as error:
        raise ConversionError(f"{path}: its objects need what is not installed: {error}.") from error
    except Exception as error:  # a pickle raises whatever the classes in it raise
        raise ConversionError(f"{path}: cannot be unpickled: {error}") from error
    parameters = content.get("params", content) if isinstance(content, Mapping) else None
    if not isinstance(parameters, Mapping) or not all(isinstance(part, Mapping) for part in parameters.values()):
        raise ConversionError(f"{path}: no parameters of haiku modules are in it, nor under 'params'.")
    return {
        f"{module}/{name}": torch.from_numpy(np.array(array, dtype=np.float32))
        for module, arrays in parameters.items()
        for name, array in arrays.items()
    }


def _numbered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`self_attention`, `self_attention_1` ... as `self_attention_0`, `self_attention_1` ...; cross-attention too."""
    numbered = {}
    for name, tensor in state.items():
        for kind in ("cross_attention", "self_attention"):
            name = name.replace(f"{ROOT}/{kind}/", f"{ROOT}/{kind}_0/")
        numbered[name] = tensor
    return numbered


def _matrices(state: Mapping[str, Tensor], heads: int, rotated: int) -> dict[str, Tensor]:
    """Matrices as (outputs, inputs), and queries' and keys' rows in the order of rotary positions by halves."""
    turned = {}
    for name, tensor in state.items():
        tensor = tensor.T if name.endswith("/w") else tensor
        if "/attention/linear/" in name or "/attention/linear_1/" in name:
            tensor = halves_from_pairs(tensor, heads, rotated)
        turned[name] = tensor
    return turned


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_deepmind_perceiver_ar", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="parameters as .npz, or checkpoint.dill with --trust-pickle")
    add("output", type=Path, metavar="OUTPUT", help="folder to write")
    add("--context", type=int, required=True, help="tokens of context (max_context_length)")
    add("--heads", type=int, default=HEADS, help="attention heads (default: %(default)s)")
    add("--latents", type=int, help=f"latents (z_index_dim; default: {LATENTS})")
    add("--rotated", type=float, default=ROTATED, help="rotated share of a head (default: %(default)s)")
    add("--max-wavelength", type=int, help="of the rotary positions (default: the context)")
    add("--activation", choices=tuple(ACTIVATIONS), default="sq_relu", help="of the MLPs (default: %(default)s)")
    add("--trust-pickle", action="store_true", help="load a pickle, which runs whatever code is in it")
    args = parser.parse_args(argv)

    def command() -> None:
        options = {name: value for name, value in vars(args).items() if name not in ("source", "output")}
        report(args.output, convert(args.source, args.output, **options))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
