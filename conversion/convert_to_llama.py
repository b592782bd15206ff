"""SAGE-Music with one attribute to a stock `LlamaForCausalLM`, exactly.

    python -m conversion.convert_to_llama CHECKPOINT OUTPUT

OUTPUT loads with Transformers alone, `AutoModelForCausalLM.from_pretrained(OUTPUT)`, and computes the same logits;
`miditok.REMI(params=OUTPUT + "/miditok.json")` is its vocabulary. Left behind are the grammar that keeps sequences
valid, which is a logits processor of this package, and a draft head.

What has attribute-specialized key-value heads (`kv_routing` "head" or "token", the bundled checkpoint among them) is no
Llama: a token's keys and values depend on its attribute, for which Llama has one matrix.

GGUF: `conversion.convert_to_gguf` writes this Llama as one file for llama.cpp. llama.cpp's own `convert_hf_to_gguf.py`
ends with an error on OUTPUT: it wants a text tokenizer, and a vocabulary of music has none.
"""

import argparse
import sys
import warnings

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from sage_music import SageMusicConfig, SageMusicForCausalLM, SageMusicTokenizer
from sage_studio.checkpoints import load
from sage_studio.checkpoints.provenance import carry

from .convert_llama import ATTENTION, HEAD, OPTIONAL_WEIGHTS, SHARED_FIELDS, WEIGHTS
from .weights import ConversionError, check_output, load_into, new_folder, remap, run_command

KV = ATTENTION + "kv_weight"


def _half(index: int):
    """Function from (1, 2 * h * d, ...) to its keys (0) or values (1), (h * d, ...)."""
    return lambda joined: joined[0].chunk(2)[index].clone()


LLAMA_WEIGHTS = {name: source for name, source in WEIGHTS.items() if name != KV} | {
    ATTENTION + "k_proj.weight": (ATTENTION + "kv_weight", _half(0)),
    ATTENTION + "v_proj.weight": (ATTENTION + "kv_weight", _half(1)),
}
# Llama has its attention's biases all or none: those that are missing here are zeros there.
LLAMA_ATTENTION_BIAS = {
    ATTENTION + "q_proj.bias": ATTENTION + "q_proj.bias",
    ATTENTION + "k_proj.bias": (ATTENTION + "kv_bias", _half(0)),
    ATTENTION + "v_proj.bias": (ATTENTION + "kv_bias", _half(1)),
}
NO_ATTENTION_BIAS = {
    f"{ATTENTION}{name}_proj.bias": (f"{ATTENTION}{name}_proj.weight", lambda weight: weight.new_zeros(len(weight)))
    for name in "qo"
} | {f"{ATTENTION}{name}_proj.bias": (KV, lambda joined: joined.new_zeros(joined.shape[1] // 2)) for name in "kv"}


def convert(checkpoint, output=None) -> LlamaForCausalLM:
    """The Llama of a checkpoint with one attribute, in evaluation mode.

    Args:
        checkpoint: what `sage_studio.checkpoints.load` takes.
        output: an empty or a new folder to save it in, with its generation config, MidiTok's `miditok.json`, and the
            license and notice of the checkpoint.

    Raises:
        ConversionError: several attributes, norms of queries and keys, a width that is no multiple of the heads, or an
            output folder that is not empty.
        sage_studio.checkpoints.CheckpointError: the checkpoint does not load.
    """
    if output is not None:
        check_output(output)
    llama, tokenizer = load_llama(checkpoint)
    if output is not None:
        with new_folder(output) as folder:
            llama.save_pretrained(folder)
            tokenizer.save_vocabulary(folder)
            carry(checkpoint, folder, "convert_to_llama")
    return llama


def load_llama(checkpoint) -> tuple[LlamaForCausalLM, SageMusicTokenizer]:
    """The Llama of a checkpoint and its tokenizer; a draft head is left out with a warning. Raises as `convert`."""
    model, tokenizer = load(checkpoint)
    if not isinstance(model, SageMusicForCausalLM):
        raise ConversionError(f"{checkpoint}: a {type(model).__name__} is no Llama.")
    if model.draft is not None:
        warnings.warn("the draft head is left out: a Llama has none", stacklevel=3)
    return llama_of(model, checkpoint), tokenizer


def llama_of(model: SageMusicForCausalLM, name="the model") -> LlamaForCausalLM:
    """The same model as a Llama, with its generation options. Raises `ConversionError` as `convert`."""
    ours = model.config
    config = _config_of(ours, name)
    weight_map = dict(LLAMA_WEIGHTS)
    if config.attention_bias:
        weight_map |= NO_ATTENTION_BIAS
        weight_map |= LLAMA_ATTENTION_BIAS if ours.attention_bias else {}
        weight_map |= OPTIONAL_WEIGHTS["attention_output_bias"] if ours.attention_output_bias else {}
    if ours.mlp_bias:
        weight_map |= OPTIONAL_WEIGHTS["mlp_bias"]
    if not ours.tie_word_embeddings:
        weight_map[HEAD] = HEAD
    ignored = ("draft.*", HEAD) if ours.tie_word_embeddings else ("draft.*",)
    tensors = remap(model.state_dict(), weight_map, {"i": ours.num_hidden_layers}, ignored)
    llama = LlamaForCausalLM(config).to(model.dtype).eval()
    load_into(llama, tensors)
    known = GenerationConfig().to_dict()
    carried = {key: value for key, value in model.generation_config.to_diff_dict().items() if key in known}
    llama.generation_config = GenerationConfig(**carried)
    return llama


def _config_of(ours: SageMusicConfig, name) -> LlamaConfig:
    if ours.num_attributes > 1:
        raise ConversionError(
            f"{name}: kv_routing {ours.kv_routing!r} with {ours.num_attributes} attributes: a token's keys and values "
            "depend on its attribute, and a Llama has one matrix for all. Only kv_routing 'none' converts."
        )
    if ours.kv_routing == "head":
        raise ConversionError(f"{name}: kv_routing 'head' is no Llama's attention. Only kv_routing 'none' converts.")
    if ours.qk_norm:
        raise ConversionError(f"{name}: it norms queries and keys (qk_norm), which a Llama does not.")
    fields = {field: getattr(ours, field) for field in (*SHARED_FIELDS, "vocab_size", "head_dim", "mlp_bias")}
    fields |= {field: getattr(ours, field) for field in ("pad_token_id", "bos_token_id", "eos_token_id")}
    try:
        return LlamaConfig(
            **fields,
            attention_bias=ours.attention_bias or ours.attention_output_bias,
            attention_dropout=ours.attention_dropout,
        )
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"{name}: {' '.join(str(error).split())}") from error


def main(argv=None) -> int:
    """The command; returns its exit code: 0, or 2 where the checkpoint or an argument is wrong."""
    parser = argparse.ArgumentParser(prog="python -m conversion.convert_to_llama", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="SAGE-Music checkpoint with kv_routing 'none': a folder or a Hub name")
    parser.add_argument("output", help="folder of the LlamaForCausalLM, new or empty")
    options = parser.parse_args(argv)

    def command():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            llama = convert(options.checkpoint, options.output)
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)
        print(f"{options.output}: LlamaForCausalLM, {llama.num_parameters():,} parameters")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
