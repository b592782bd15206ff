"""Causal checkpoints of krasserm's perceiver-io (symbolic audio, text) to PerceiverS.

    python -m conversion.convert_perceiver_io perceiver-ar-sam-giant-midi/ OUTPUT

SOURCE is the folder of a Hub checkpoint (`model_type` perceiver-ar-symbolic-audio-model or
perceiver-ar-causal-language-model, whose `config.json` has all sizes), or a file of weights, also a Lightning `.ckpt`
without other objects in it. Of a lone file the sizes come from the tensors, and what no tensor tells from the options:
their defaults are those of `krasserm/perceiver-ar-sam-giant-midi`.

What is peculiar: keys of the latents come from the query stream (its norm, not the context's), rotary positions turn
neighbouring channels, by default in the first self-attention layer alone, and only the cross-attention's output matrix
has a bias. Versions before 0.8 are of another layout and end in an error.

Source: https://github.com/krasserm/perceiver-io (Apache-2.0).
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from perceivers import PerceiverSForCausalLM, PerceiverSTokenizer

from .perceiver_ar import build, no_bias, read_config, report, save, size, stack, tokenizer_for
from .weights import (
    ConversionError,
    check_output,
    count,
    halves_from_pairs,
    load_state,
    remap,
    run_command,
    strip_prefix,
)

CROSS, LAYER = "cross_attention", "self_attention.{i}"
WEIGHTS = {
    "model.embed_tokens.weight": "input_adapter.txt_embedding.weight",
    "model.cross_layers.0.q_norm.weight": f"{CROSS}.0.module.q_norm.weight",
    "model.cross_layers.0.q_norm.bias": f"{CROSS}.0.module.q_norm.bias",
    "model.cross_layers.0.kv_norm.weight": f"{CROSS}.0.module.kv_norm.weight",
    "model.cross_layers.0.kv_norm.bias": f"{CROSS}.0.module.kv_norm.bias",
    "model.cross_layers.0.attention.q_proj.weight": f"{CROSS}.0.module.attention.q_proj.weight",
    "model.cross_layers.0.attention.kv_proj.weight": (
        (f"{CROSS}.0.module.attention.k_proj.weight", f"{CROSS}.0.module.attention.v_proj.weight"),
        stack,
    ),
    "model.cross_layers.0.attention.o_proj.weight": f"{CROSS}.0.module.attention.o_proj.weight",
    "model.cross_layers.0.attention.o_proj.bias": f"{CROSS}.0.module.attention.o_proj.bias",
    "model.cross_layers.0.mlp_norm.weight": f"{CROSS}.1.module.0.weight",
    "model.cross_layers.0.mlp_norm.bias": f"{CROSS}.1.module.0.bias",
    "model.cross_layers.0.mlp.up_proj.weight": f"{CROSS}.1.module.1.weight",
    "model.cross_layers.0.mlp.down_proj.weight": f"{CROSS}.1.module.3.weight",
    "model.layers.{i}.input_norm.weight": f"{LAYER}.0.module.norm.weight",
    "model.layers.{i}.input_norm.bias": f"{LAYER}.0.module.norm.bias",
    "model.layers.{i}.self_attn.qkv_proj.weight": (
        tuple(f"{LAYER}.0.module.attention.{name}_proj.weight" for name in "qkv"),
        stack,
    ),
    "model.layers.{i}.self_attn.o_proj.weight": f"{LAYER}.0.module.attention.o_proj.weight",
    "model.layers.{i}.self_attn.o_proj.bias": (f"{LAYER}.0.module.attention.o_proj.weight", no_bias),
    "model.layers.{i}.mlp_norm.weight": f"{LAYER}.1.module.0.weight",
    "model.layers.{i}.mlp_norm.bias": f"{LAYER}.1.module.0.bias",
    "model.layers.{i}.mlp.up_proj.weight": f"{LAYER}.1.module.1.weight",
    "model.layers.{i}.mlp.down_proj.weight": f"{LAYER}.1.module.3.weight",
}
# What a checkpoint has or has not.
POSITIONS = {"model.embed_positions.weight": "input_adapter.pos_embedding.weight"}
OUTPUT_NORM = {"model.norm.weight": "out_norm.weight", "model.norm.bias": "out_norm.bias"}
OUTPUT_BIAS = {"lm_head.bias": "output_adapter.bias"}
FREQUENCIES = "input_adapter.frq_pos_encoding.inv_freq"

DEFAULTS = {"num_heads": 8, "max_seq_len": 6144, "max_latents": 2048, "num_self_attention_rotary_layers": 1}


def convert(
    source,
    output=None,
    *,
    heads: int | None = None,
    context: int | None = None,
    latents: int | None = None,
    rotary_layers: int | None = None,
    events: bool = True,
) -> tuple[PerceiverSForCausalLM, PerceiverSTokenizer | None]:
    """Model and tokenizer (`None` of text, or of another encoding) of a perceiver-io checkpoint.

    Args:
        source: a checkpoint folder, or a file of weights.
        output: folder to write, which must be empty or new.
        heads, context, latents, rotary_layers: attention heads, tokens of context, latents at most, and self-attention
            layers that rotate (-1: all). Default: what `config.json` says, then the tensors, then `DEFAULTS`.
        events: whether 389 to 391 ids are performance events.

    Raises:
        ConversionError: another layout, naming the keys; or options that the tensors contradict.
    """
    if output is not None:
        check_output(output)
    state = strip_prefix(load_state(source), "backend_model.", "model.")
    said = _sizes_of(read_config(source))
    given = {
        "num_heads": heads,
        "max_seq_len": context,
        "max_latents": latents,
        "num_self_attention_rotary_layers": rotary_layers,
    }
    sizes = {**said, **{name: value for name, value in given.items() if value is not None}}
    layers = count(state, f"{LAYER}.0.module.norm.weight")
    weight_map = dict(WEIGHTS)
    for optional in (POSITIONS, OUTPUT_NORM, OUTPUT_BIAS):
        if set(optional.values()) & state.keys():
            weight_map |= optional
    remap(state, weight_map, {"i": layers}, ignored=[FREQUENCIES])  # names first: shapes are read below
    fields = _fields(state, sizes, layers)
    rotated = int(fields["head_dim"] * fields["rope_parameters"]["partial_rotary_factor"] + 1e-6)
    for name in state:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = halves_from_pairs(state[name], fields["num_attention_heads"], rotated)
    tensors = remap(state, weight_map, {"i": layers}, ignored=[FREQUENCIES])
    tokenizer = tokenizer_for(fields["vocab_size"], events)
    model = build(fields, tensors, tokenizer)
    if output is not None:
        save(output, model, tokenizer, source, "convert_perceiver_io")
    return model, tokenizer


def _sizes_of(config: Mapping) -> dict[str, int]:
    """What a Hub checkpoint's config says of the sizes that `DEFAULTS` names."""
    said = config.get("model_config") or {}
    if not isinstance(said, Mapping):
        raise ConversionError("config.json: model_config is no set of fields.")
    sizes = {name: said[name] for name in DEFAULTS if said.get(name) is not None}
    wrong = [f"{name} {value!r}" for name, value in sizes.items() if type(value) is not int]
    if wrong:
        raise ConversionError(f"config.json: not whole numbers: {', '.join(wrong)}.")
    return sizes


def _fields(state: Mapping[str, Tensor], sizes: Mapping, layers: int) -> dict:
    """The config's fields, from the tensors' shapes and from `sizes`, perceiver-io's own names for what they leave."""
    vocabulary, width = size(state, "input_adapter.txt_embedding.weight")
    absolute = "input_adapter.pos_embedding.weight" in state
    # With learned positions half of a head is rotated, without them all of it.
    parts = 2 if absolute else 1
    heads = sizes.get("num_heads")
    if FREQUENCIES in state:
        rotated = 2 * size(state, FREQUENCIES, dims=1)[0]
        expected = 10000.0 ** -(torch.arange(0, rotated, 2) / rotated)
        if not torch.allclose(state[FREQUENCIES].float(), expected, rtol=1e-3):
            raise ConversionError(f"{FREQUENCIES}: other rotary frequencies than 10000 ** -(2 i / {rotated}).")
        heads = width // max(parts * rotated, 1) if heads is None else heads
    else:
        heads = DEFAULTS["num_heads"] if heads is None else heads
        rotated = width // max(heads, 1) // parts
    if heads < 1 or width % heads or width // heads // parts != rotated:
        raise ConversionError(
            f"{heads} heads: the model is {width} wide and rotates {rotated} channels of a head, "
            f"so that it has {width // max(parts * rotated, 1)}."
        )
    context = sizes.get("max_seq_len", DEFAULTS["max_seq_len"])
    if absolute:
        rows = size(state, "input_adapter.pos_embedding.weight")[0]
        if sizes.get("max_seq_len", rows) != rows:
            raise ConversionError(f"a context of {context} tokens: the model has learned {rows} positions.")
        context = rows
    latents = sizes.get("max_latents", min(DEFAULTS["max_latents"], context))
    rotary = sizes.get("num_self_attention_rotary_layers", DEFAULTS["num_self_attention_rotary_layers"])
    if not -1 <= rotary <= layers:
        raise ConversionError(
            f"{rotary} rotary layers: the model has {layers}: say --rotary-layers, 0..{layers} of them, or -1: all."
        )
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": size(state, f"{CROSS}.1.module.1.weight")[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": width // heads,
        "num_latents": latents,
        "max_position_embeddings": context,
        "cross_scales": [None],
        "cross_kv_source": "stream",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": rotated / (width // heads),
        },
        "num_rotary_layers": None if rotary == -1 else rotary,
        "absolute_positions": absolute,
        "norm_type": "layer",
        "norm_eps": 1e-5,
        "hidden_act": "gelu",
        "attention_output_bias": True,
        "final_norm": "out_norm.weight" in state,
        "lm_head_bias": "output_adapter.bias" in state,
        "tie_word_embeddings": True,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_perceiver_io", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint folder, or file of weights")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    default = "(default: config.json, the tensors, or {})"
    parser.add_argument("--heads", type=int, help=f"attention heads {default.format(DEFAULTS['num_heads'])}")
    parser.add_argument("--context", type=int, help=f"tokens of context {default.format(DEFAULTS['max_seq_len'])}")
    parser.add_argument("--latents", type=int, help=f"latents {default.format(DEFAULTS['max_latents'])}")
    parser.add_argument(
        "--rotary-layers",
        type=int,
        help=f"self-attention layers that rotate, -1: all "
        f"{default.format(DEFAULTS['num_self_attention_rotary_layers'])}",
    )
    parser.add_argument("--no-events", action="store_true", help="the ids are no performance events: no tokenizer")
    args = parser.parse_args(argv)

    def command() -> None:
        model, tokenizer = convert(
            args.source,
            args.output,
            heads=args.heads,
            context=args.context,
            latents=args.latents,
            rotary_layers=args.rotary_layers,
            events=not args.no_events,
        )
        report(args.output, model, tokenizer)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
