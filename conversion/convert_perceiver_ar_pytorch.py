"""Checkpoints of lucidrains' perceiver-ar-pytorch, as public music models use it, to PerceiverS.

    python -m conversion.convert_perceiver_ar_pytorch model.pth OUTPUT --prefix 1024

SOURCE is a file of weights (`.pth`, `.pt`, `.safetensors`), bare, under `state_dict`, or with the prefixes of wrappers
(`module.net.` and the like). The tensors tell all sizes but two: the width of a head (`--head-dim`, 64 as in the
package's default) and how many tokens come before the latents (`--prefix`, the package's `cross_attn_seq_len`).

390 ids are taken for the performance events of feizc's models, 389 and 391 for those of perceiver-io and of this
package (`--no-events` where that is wrong); other vocabularies, such as the 2,145 ids of asigalov61's models, are
encodings with programs of their own, and the model alone is written.

What is peculiar: positions are learned and rotary at once, so that the model ends at its context length; keys of the
latents come from the query stream; only the cross-attention's output matrix has a bias; no norm before the head.

Source: https://github.com/lucidrains/perceiver-ar-pytorch (MIT), version 0.0.10.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from perceivers import PerceiverSForCausalLM, PerceiverSTokenizer

from .perceiver_ar import build, no_bias, report, save, size, tokenizer_for
from .weights import ConversionError, check_output, count, load_state, remap, run_command, strip_prefix

CROSS, LAYER = "perceive_layers.{c}", "layers.{i}"
WEIGHTS = {
    "model.embed_tokens.weight": "token_emb.weight",
    "model.embed_positions.weight": "pos_emb.weight",
    "model.cross_layers.{c}.q_norm.weight": f"{CROSS}.0.norm.weight",
    "model.cross_layers.{c}.q_norm.bias": f"{CROSS}.0.norm.bias",
    "model.cross_layers.{c}.kv_norm.weight": f"{CROSS}.0.context_norm.weight",
    "model.cross_layers.{c}.kv_norm.bias": f"{CROSS}.0.context_norm.bias",
    "model.cross_layers.{c}.attention.q_proj.weight": f"{CROSS}.0.to_q.weight",
    "model.cross_layers.{c}.attention.kv_proj.weight": f"{CROSS}.0.to_kv.weight",
    "model.cross_layers.{c}.attention.o_proj.weight": f"{CROSS}.0.to_out.weight",
    "model.cross_layers.{c}.attention.o_proj.bias": f"{CROSS}.0.to_out.bias",
    "model.cross_layers.{c}.mlp_norm.weight": f"{CROSS}.1.0.weight",
    "model.cross_layers.{c}.mlp_norm.bias": f"{CROSS}.1.0.bias",
    "model.cross_layers.{c}.mlp.up_proj.weight": f"{CROSS}.1.1.weight",
    "model.cross_layers.{c}.mlp.down_proj.weight": f"{CROSS}.1.4.weight",
    "model.layers.{i}.input_norm.weight": f"{LAYER}.0.norm.weight",
    "model.layers.{i}.input_norm.bias": f"{LAYER}.0.norm.bias",
    "model.layers.{i}.self_attn.qkv_proj.weight": f"{LAYER}.0.to_qkv.weight",
    "model.layers.{i}.self_attn.o_proj.weight": f"{LAYER}.0.to_out.weight",
    "model.layers.{i}.self_attn.o_proj.bias": (f"{LAYER}.0.to_out.weight", no_bias),
    "model.layers.{i}.mlp_norm.weight": f"{LAYER}.1.0.weight",
    "model.layers.{i}.mlp_norm.bias": f"{LAYER}.1.0.bias",
    "model.layers.{i}.mlp.up_proj.weight": f"{LAYER}.1.1.weight",
    "model.layers.{i}.mlp.down_proj.weight": f"{LAYER}.1.4.weight",
    "lm_head.weight": "to_logits.weight",
}
FREQUENCIES = "rotary_pos_emb.inv_freq"
WRAPPERS = ("module.net.", "net.", "module.", "model.")
HEAD_DIM = 64
# Context length -> prefix, of the public music models: feizc's, asigalov61's.
PREFIXES = {2048: 1024, 6144: 4096}


def convert(
    source, output=None, *, head_dim: int = HEAD_DIM, prefix: int | None = None, events: bool = True
) -> tuple[PerceiverSForCausalLM, PerceiverSTokenizer | None]:
    """Model and tokenizer (`None` of another encoding) of a perceiver-ar-pytorch checkpoint.

    Args:
        source: a file of weights.
        output: folder to write, which must be empty or new.
        head_dim: channels of a head, which no tensor tells.
        prefix: tokens of the context before the latents; default: those of the public models of 2,048 and 6,144.
        events: whether 389 to 391 ids are performance events.

    Raises:
        ConversionError: another layout, naming the keys; options that the tensors contradict; or `prefix` left out of a
            model with another context.
    """
    if output is not None:
        check_output(output)
    state = strip_prefix(load_state(source), *WRAPPERS)
    layers = {"c": count(state, f"{CROSS}.0.norm.weight"), "i": count(state, f"{LAYER}.0.norm.weight")}
    if not all(layers.values()):  # the map would then ask for none of these keys
        layers = {name: max(number, 1) for name, number in layers.items()}
    tensors = remap(state, WEIGHTS, layers, ignored=[FREQUENCIES])
    fields = _fields(state, layers, head_dim, prefix)
    tokenizer = tokenizer_for(fields["vocab_size"], events)
    model = build(fields, tensors, tokenizer)
    if output is not None:
        save(output, model, tokenizer, source, "convert_perceiver_ar_pytorch")
    return model, tokenizer


def _fields(state: Mapping[str, Tensor], layers: Mapping[str, int], head_dim: int, prefix: int | None) -> dict:
    vocabulary, width = size(state, "token_emb.weight")
    inner = size(state, "perceive_layers.0.0.to_q.weight")[0]
    context = size(state, "pos_emb.weight")[0]
    prefix = PREFIXES.get(context) if prefix is None else prefix
    if prefix is None:
        raise ConversionError(
            f"a context of {context} tokens: say with prefix (--prefix) how many of them come before the latents; "
            "cross_attn_seq_len was its name where the model was made."
        )
    if not 0 < prefix < context:
        raise ConversionError(f"a prefix of {prefix} tokens does not lie within the context of {context}.")
    if head_dim < 1 or inner % head_dim:
        raise ConversionError(f"heads of {head_dim} channels do not divide the attention's {inner}: say --head-dim.")
    rotated = max(32, head_dim // 2)
    if FREQUENCIES in state:
        expected = 10000.0 ** -(torch.arange(0, rotated, 2) / rotated)
        given = state[FREQUENCIES].float()
        if size(state, FREQUENCIES, dims=1) != expected.shape or not torch.allclose(given, expected, rtol=1e-3):
            raise ConversionError(
                f"{FREQUENCIES} holds {len(given)} frequencies that are not those of {rotated} rotated channels, as "
                f"heads of {head_dim} have: say --head-dim."
            )
    if rotated > head_dim:
        raise ConversionError(f"heads of {head_dim} channels are narrower than the {rotated} that are rotated.")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": size(state, "perceive_layers.0.1.1.weight")[0],
        "num_hidden_layers": layers["i"],
        "num_attention_heads": inner // head_dim,
        "head_dim": head_dim,
        "num_latents": context - prefix,
        "max_position_embeddings": context,
        "cross_scales": [None] * layers["c"],
        "cross_kv_source": "stream",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": rotated / head_dim,
        },
        "absolute_positions": True,
        "norm_type": "layer",
        "norm_eps": 1e-5,
        "hidden_act": "gelu",
        "attention_output_bias": True,
        "final_norm": False,
        "tie_word_embeddings": False,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_perceiver_ar_pytorch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="file of weights")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM, help="channels of a head (default: %(default)s)")
    known = ", ".join(f"{prefix} of {context}" for context, prefix in PREFIXES.items())
    parser.add_argument("--prefix", type=int, help=f"tokens of the context before the latents (default: {known})")
    parser.add_argument("--no-events", action="store_true", help="the ids are no performance events: no tokenizer")
    args = parser.parse_args(argv)

    def command() -> None:
        model, tokenizer = convert(
            args.source, args.output, head_dim=args.head_dim, prefix=args.prefix, events=not args.no_events
        )
        report(args.output, model, tokenizer)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
