"""SAGE-Music with one attribute to a GGUF file, for llama.cpp and what is built on it.

    pip install gguf
    python -m conversion.convert_to_gguf CHECKPOINT OUTPUT.gguf --dtype q8_0

The file holds the Llama of `conversion.convert_to_llama`, so only `kv_routing="none"` converts. In float32 llama.cpp
computes the same logits up to rounding, where its cache is float32 too (`type_k=0, type_v=0` in llama-cpp-python; the
default is float16). Matrices are stored in `--dtype`, norms and biases always in float32.

llama.cpp gets no text vocabulary (tokenizer model "none"): token ids go in and come out (`eval`, `generate`), and what
asks it for text (`detokenize`, a call of the model) ends the process. MidiTok's vocabulary is the metadata key
`sage_music.miditok`, the whole of `miditok.json` as one string, because a GGUF is handed on as a single file, and ids
are worth nothing without the vocabulary that they count. It comes out again with llama-cpp-python or with `gguf`:

    Path("miditok.json").write_text(Llama("OUTPUT.gguf").metadata["sage_music.miditok"])
    Path("miditok.json").write_text(GGUFReader("OUTPUT.gguf").fields["sage_music.miditok"].contents())

and `SageMusicTokenizer("miditok.json")`, or MidiTok's `REMI(params="miditok.json")` without this package, turns MIDI
into ids and back. `docs/serving.md` goes the whole way, with the grammar that keeps sequences valid.

Transformers reads the file too (`from_pretrained(folder, gguf_file=...)`), but no biases or scaled rotary positions,
of which a GGUF's metadata does not tell it.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sage_studio.checkpoints.provenance import license_of
from sage_studio.errors import install_hint

from .convert_to_llama import HEAD, load_llama
from .weights import ConversionError, run_command

try:
    import gguf
except ImportError:  # not a dependency of this package
    gguf = None

VOCABULARY = "sage_music.miditok"
# By the name of a dtype, gguf's type of a matrix and of the whole file.
DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
# Rotary positions whose frequencies depend on the length of the sequence: llama.cpp has one table for all.
CHANGING = ("dynamic", "longrope")


def convert(checkpoint, output, dtype: str = "float32", name: str | None = None) -> LlamaForCausalLM:
    """Write a checkpoint with one attribute as one GGUF file, whole or not at all; returns the Llama that is in it.

    Args:
        checkpoint: what `sage_studio.checkpoints.load` takes.
        output: the file, which must not exist.
        dtype: of the matrices, one of `DTYPES`. "q8_0" has a scale for each 32 channels of a row; matrices whose rows
            are no multiple of that long are stored in float16.
        name: the model's name in the metadata; by default the last part of the checkpoint's.

    Raises:
        ConversionError: the `gguf` package is missing, `output` exists, a model that is no Llama or that llama.cpp's
            Llama cannot be (see `convert_to_llama.convert`; another activation than SiLU, rotary positions that change
            with the length), or weights that float16 does not hold.
        sage_studio.checkpoints.CheckpointError: the checkpoint does not load.
        sage_studio.checkpoints.provenance.ProvenanceError: its card is damaged.
    """
    if gguf is None:
        raise ConversionError(f"the gguf package is missing: {install_hint('gguf')}")
    if dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    output = Path(output).resolve()
    if output.exists():
        raise ConversionError(f"{output}: it is there already: name another file.")
    llama, tokenizer = load_llama(checkpoint)
    _check(llama.config, checkpoint)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        (vocabulary,) = tokenizer.save_vocabulary(scratch)
        file = Path(scratch, output.name)
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        _describe(writer, llama.config, checkpoint, dtype, name)
        _add_rotary(writer, llama.config)
        writer.add_string(VOCABULARY, Path(vocabulary).read_text(encoding="utf-8"))
        for key, array, kind in _tensors(llama, dtype):
            writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file.rename(output)
    return llama


def _check(config: LlamaConfig, checkpoint) -> None:
    """Refuse a Llama that is none of llama.cpp's."""
    if config.hidden_act not in ("silu", "swish"):
        raise ConversionError(f"{checkpoint}: hidden_act {config.hidden_act!r}: llama.cpp's Llama has SiLU alone.")
    kind = config.rope_parameters["rope_type"]
    if kind in CHANGING:
        raise ConversionError(
            f"{checkpoint}: rotary positions of the type {kind!r} change with the sequence's length, and llama.cpp's "
            "Llama has one table for all lengths."
        )


def _describe(writer, config: LlamaConfig, checkpoint, dtype: str, name: str | None) -> None:
    """Write the metadata: what the file is, the model's shape, the special ids."""
    origin = os.fspath(checkpoint)
    writer.add_type("model")
    writer.add_name(name or Path(origin).resolve().name)
    known = license_of(origin)
    if known is not None:
        writer.add_license(known[0])
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    writer.add_tokenizer_model("none")
    eos = config.eos_token_id
    ids = {"bos": config.bos_token_id, "eos": eos[0] if isinstance(eos, list) else eos, "pad": config.pad_token_id}
    for kind, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)


def _tensors(llama: LlamaForCausalLM, dtype: str) -> Iterator[tuple[str, np.ndarray, "gguf.GGMLQuantizationType"]]:
    """Of each weight its name in a GGUF, its values in float32, and the type that it is to be stored in."""
    config = llama.config
    chosen = gguf.GGMLQuantizationType[DTYPES[dtype][0]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, weight in llama.state_dict().items():
        if key == HEAD and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings where there is no head
        layer = key.split(".")[-2]
        if layer in heads:
            weight = _pairs_from_halves(weight, heads[layer])
        array, kind = weight.float().numpy(), chosen
        if array.ndim < 2:  # llama.cpp adds and multiplies rows in float32 only
            kind = gguf.GGMLQuantizationType.F32
        elif array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16
        if kind == gguf.GGMLQuantizationType.F16 and np.abs(array).max() > np.finfo(np.float16).max:
            raise ConversionError(f"{key}: it holds values that float16 does not: choose bfloat16 or float32.")
        yield names.get_name(key, try_suffixes=(".weight", ".bias")), array, kind


def _pairs_from_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Query or key rows for rotary positions that turn neighbours (2i, 2i + 1), from rows for channels (i, i + d/2).

    Args:
        weight: (heads * d, inputs), or a bias (heads * d,).
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_rotary(writer, config: LlamaConfig) -> None:
    """Write base and scaling of the rotary positions.

    Whatever the kind of scaling, it is one divisor for each frequency (the tensor `rope_freqs`, which llama.cpp's own
    converter has for Llama 3) and one factor for the rotated channels (YaRN's).
    """
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    # Not the model's own table, which is rounded where the model is in half precision.
    scaled = LlamaRotaryEmbedding(config)
    plain, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    if not torch.equal(plain, scaled.inv_freq):
        writer.add_tensor("rope_freqs.weight", (plain / scaled.inv_freq).numpy())
    if scaled.attention_scaling != 1:
        writer.add_rope_scaling_attn_factors(scaled.attention_scaling)


def main(argv=None) -> int:
    """The command; returns its exit code: 0, or 2 where the checkpoint or an argument is wrong."""
    parser = argparse.ArgumentParser(prog="python -m conversion.convert_to_gguf", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="SAGE-Music checkpoint with kv_routing 'none': a folder or a Hub name")
    parser.add_argument("output", help="the GGUF file, which must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the matrices (default: %(default)s)")
    parser.add_argument("--name", help="of the model, in the metadata (default: that of the checkpoint's folder)")
    options = parser.parse_args(argv)

    def command():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            llama = convert(options.checkpoint, options.output, options.dtype, options.name)
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)
        size = Path(options.output).stat().st_size / 1e6
        print(f"{options.output}: Llama, {llama.num_parameters():,} parameters, {options.dtype}, {size:.1f} MB")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
