"""Llama-, Mistral- and Qwen-shaped MIDI language models over MidiTok's REMI to SAGE-Music, exactly.

    python -m conversion.convert_llama SOURCE OUTPUT

SOURCE is a folder of Transformers: `config.json` of a `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` or
`Qwen3ForCausalLM`, its weights, and MidiTok's tokenizer file (`tokenizer.json` as MidiTok saves it, or `miditok.json`).
OUTPUT is a SAGE-Music checkpoint with one attribute (`kv_routing="none"`), which computes the same logits; the grammar
that keeps music valid, bars and the rest of this package come on top.

`--attributes head` or `token` goes on to attribute-specialized key-value heads by pooling, which is the beginning
of `conversion.uptrain` and *not* exact: such a model must be trained on before it is of use.

What a SAGE-Music cannot say is refused: attention in a sliding window (use `--context` to keep to the length at which
the window hides nothing), rotary positions on a part of the channels, quantised weights.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sage_music import SageMusicConfig, SageMusicForCausalLM, SageMusicTokenizer
from sage_studio.checkpoints.provenance import carry

from .weights import ConversionError, check_output, load_into, load_state, new_folder, read_json, remap, run_command

LAYER, ATTENTION, MLP = "model.layers.{i}.", "model.layers.{i}.self_attn.", "model.layers.{i}.mlp."


def _joined(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Key rows, then value rows, of the one attribute: (1, 2 * h * d, ...)."""
    return torch.cat((key, value))[None]


WEIGHTS = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    LAYER + "input_layernorm.weight": LAYER + "input_layernorm.weight",
    LAYER + "post_attention_layernorm.weight": LAYER + "post_attention_layernorm.weight",
    ATTENTION + "q_proj.weight": ATTENTION + "q_proj.weight",
    ATTENTION + "kv_weight": ((ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"), _joined),
    ATTENTION + "o_proj.weight": ATTENTION + "o_proj.weight",
    MLP + "gate_proj.weight": MLP + "gate_proj.weight",
    MLP + "up_proj.weight": MLP + "up_proj.weight",
    MLP + "down_proj.weight": MLP + "down_proj.weight",
}
# What a model has besides, by the field of `SageMusicConfig` that says so.
OPTIONAL_WEIGHTS = {
    "attention_bias": {
        ATTENTION + "q_proj.bias": ATTENTION + "q_proj.bias",
        ATTENTION + "kv_bias": ((ATTENTION + "k_proj.bias", ATTENTION + "v_proj.bias"), _joined),
    },
    "attention_output_bias": {ATTENTION + "o_proj.bias": ATTENTION + "o_proj.bias"},
    "mlp_bias": {MLP + f"{name}_proj.bias": MLP + f"{name}_proj.bias" for name in ("gate", "up", "down")},
    "qk_norm": {ATTENTION + f"{name}_norm.weight": ATTENTION + f"{name}_norm.weight" for name in "qk"},
}
HEAD = "lm_head.weight"
# Tables that older versions of Transformers saved.
IGNORED = ("*.rotary_emb.inv_freq", "*.self_attn.masked_bias", "*.self_attn.bias")

# By model_type, the optional weights that its config says (True, False) or a field of it names.
KINDS = {
    "llama": {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias", "qk_norm": True},
}
# Fields that both configs have under one name.
SHARED_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"),
    "initializer_range",
)
# What a generation config keeps: how to sample. Ids are the tokenizer's, and lengths the music's.
SAMPLING = ("temperature", "top_p", "top_k")
CARRIED = ("do_sample", "repetition_penalty", *SAMPLING)

TOKENIZER_FILES = ("miditok.json", "tokenizer.json", "tokenizer.conf")
# How key-value heads become fewer.
POOLINGS = ("mean", "projection")
# Embeddings are padded to a multiple of at most so many rows; a larger difference is another vocabulary.
MOST_PADDING = 256


def convert(
    source,
    output=None,
    tokenizer=None,
    context: int | None = None,
) -> tuple[SageMusicForCausalLM, SageMusicTokenizer]:
    """Model, in evaluation mode and the weights' own dtype, and tokenizer of a Llama-shaped folder.

    Rows of the embedding beyond the vocabulary are cut off, with a warning. The special ids are the tokenizer's.

    Args:
        output: an empty or a new folder to save both in.
        tokenizer: MidiTok's file; by default one of `TOKENIZER_FILES` in the folder.
        context: a shorter `max_position_embeddings`, in tokens; needed where a sliding window would begin to hide.

    Raises:
        ConversionError: a folder of another kind, a model or a vocabulary that SAGE-Music cannot say, weights that do
            not fit, or an output folder that is not empty.
    """
    source = Path(source)
    if output is not None:
        check_output(output)
    stock = read_config(source)
    music = read_tokenizer(source, tokenizer)
    fields = music.config_fields()
    config = config_of(stock, fields, source, context)
    _warn_of_ids(stock, fields, source)

    weight_map = dict(WEIGHTS)
    for name, weights in OPTIONAL_WEIGHTS.items():
        weight_map |= weights if getattr(config, name) else {}
    if not config.tie_word_embeddings:
        weight_map[HEAD] = HEAD
    ignored = (*IGNORED, HEAD) if config.tie_word_embeddings else IGNORED
    tensors = remap(load_state(source), weight_map, {"i": config.num_hidden_layers}, ignored)
    for name in ("model.embed_tokens.weight", HEAD):
        if name in tensors:
            tensors[name] = _cut(tensors[name], config.vocab_size, name, source)

    model = SageMusicForCausalLM(config).to(tensors["model.norm.weight"].dtype).eval()
    load_into(model, tensors)
    model.generation_config.update(**_sampling_of(source))
    if output is not None:
        save(output, model, music, source)
    return model, music


def save(output, model: SageMusicForCausalLM, tokenizer: SageMusicTokenizer, source: Path) -> None:
    """Write a checkpoint folder, new or empty, whole or not at all, with the license and notice of its `source`."""
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        carry(source, folder, "convert_llama")


def read_config(source: Path) -> PreTrainedConfig:
    """The config of a folder of one of `KINDS`, by Transformers' own class: Python beside it is never run.

    Raises:
        ConversionError: there is none, or one of another kind, or it contradicts itself.
    """
    fields = read_json(source / "config.json")
    if not fields:
        raise ConversionError(f"{source}: no config.json: give a folder that Transformers saved.")
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConversionError(f"{source}: a model of the type {kind!r}; this converter reads {', '.join(KINDS)}.")
    try:
        return CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:  # whatever the fields of a stranger's config raise
        raise ConversionError(f"{source}: its config cannot be read: {' '.join(str(error).split())}") from error


def _sampling_of(source: Path) -> dict:
    """Of `CARRIED` what the folder's generation config says; without do_sample, values of sampling mean nothing."""
    file = source / "generation_config.json"
    carried = {name: value for name, value in read_json(file).items() if name in CARRIED and value is not None}
    idle = [name for name in SAMPLING if name in carried and not carried.get("do_sample")]
    if idle:
        warnings.warn(f"{file}: {', '.join(idle)} without do_sample: left out", stacklevel=3)
    return {name: value for name, value in carried.items() if name not in idle}


def read_tokenizer(source: Path, file=None) -> SageMusicTokenizer:
    """The tokenizer of MidiTok's file, or of the one in the folder `source`.

    Raises:
        ConversionError: there is none, or it is not a REMI that `SageMusicTokenizer` reads.
    """
    files = [Path(file)] if file is not None else [source / name for name in TOKENIZER_FILES]
    seen = []
    for path in files:
        if not path.is_file():
            continue
        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("tokenization")
        except (ValueError, AttributeError):
            kind = None
        if kind == "REMI":
            try:
                return SageMusicTokenizer(vocab_file=str(path))
            except Exception as error:  # MidiTok raises many kinds on files that it did not write
                raise ConversionError(f"{path}: {' '.join(str(error).split())}") from error
        seen.append(f"{path.name} is {f'of the tokenization {kind}' if kind else 'not of MidiTok'}")
    reason = "; ".join(seen) or f"none of {', '.join(path.name for path in files)} is there"
    raise ConversionError(f"{source}: no MidiTok REMI vocabulary ({reason}): name its file with --tokenizer.")


def config_of(stock: PreTrainedConfig, fields: dict, source, context: int | None = None) -> SageMusicConfig:
    """The config of a stock one over the vocabulary of `fields` (`SageMusicTokenizer.config_fields()`).

    Raises:
        ConversionError: SAGE-Music cannot say it.
    """
    if getattr(stock, "quantization_config", None):
        raise ConversionError(f"{source}: quantised weights: convert the model that they were made of.")
    rope = dict(stock.rope_parameters or {})
    if rope.get("rope_type", "default") not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ConversionError(f"{source}: rotary positions of the unknown type {rope['rope_type']!r}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConversionError(
            f"{source}: only {rope['partial_rotary_factor']} of a head's channels are rotated; SAGE-Music rotates all."
        )
    if rope.get("original_max_position_embeddings") and rope.get("factor") is None:
        # Transformers takes the ratio of the two lengths then, which must stay as it is in a shorter context.
        rope["factor"] = stock.max_position_embeddings / rope["original_max_position_embeddings"]
    if stock.hidden_act not in ACT2FN:
        raise ConversionError(f"{source}: the unknown activation {stock.hidden_act!r}.")
    window = getattr(stock, "sliding_window", None)
    if stock.model_type != "mistral" and "sliding_attention" not in (getattr(stock, "layer_types", None) or ()):
        window = None
    length = stock.max_position_embeddings if context is None else context
    if not 1 < length <= stock.max_position_embeddings:
        raise ConversionError(
            f"{source}: a context of {length} tokens; the model's own is {stock.max_position_embeddings}."
        )
    if window is not None and length > window:
        raise ConversionError(
            f"{source}: attention sees a sliding window of {window} of {length} tokens, which SAGE-Music does not do. "
            f"Up to {window} tokens the window hides nothing: --context {window} converts exactly for that length."
        )
    options = {name: getattr(stock, name) for name in SHARED_FIELDS}
    options |= {"max_position_embeddings": length, "rope_parameters": rope}
    for name, said in KINDS[stock.model_type].items():
        options[name] = bool(getattr(stock, said)) if isinstance(said, str) else said
    head_dim = getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
    dropout = float(stock.attention_dropout or 0.0)
    try:
        return SageMusicConfig(
            **fields,
            **options,
            kv_routing="none",
            head_dim=head_dim,
            attention_dropout=dropout,
        )
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"{source}: {' '.join(str(error).split())}") from error


def _cut(tensor: torch.Tensor, vocab_size: int, name: str, source) -> torch.Tensor:
    rows = len(tensor)
    if rows < vocab_size or rows - vocab_size >= MOST_PADDING:
        raise ConversionError(
            f"{source}: {name} has {rows} rows, but the vocabulary {vocab_size} tokens: it is another vocabulary's."
        )
    if rows > vocab_size:
        warnings.warn(
            f"{name}: the last {rows - vocab_size} of {rows} rows, which no token of the vocabulary has, are left out",
            stacklevel=3,
        )
    return tensor[:vocab_size].clone()


def _warn_of_ids(stock: PreTrainedConfig, fields: dict, source) -> None:
    """Where the model's special ids are not the tokenizer's: some configs only have Llama's defaults."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        said = getattr(stock, name, None)
        if said is not None and said != fields[name] and said != [fields[name]]:
            message = f"{source}: {name} is {said} in its config, but {fields[name]}, the tokenizer's, is used"
            warnings.warn(message, stacklevel=3)


def pool_heads(
    model: SageMusicForCausalLM, routing: str, kv_heads: int = 1, pooling: str = "mean"
) -> SageMusicForCausalLM:
    """A model with attribute-specialized key-value heads that begin as one pool of a model's own heads.

    With `pooling="mean"` the key and value heads of each of `kv_heads` groups are averaged (as for grouped-query
    attention, Ainslie et al. 2023, arXiv 2305.13245). With `"projection"` the pool is what the heads have most in
    common, and each query head and its output are turned to read it as nearly as they read their own head: see
    `_project_heads`. Every attribute begins with the same pool. With `routing="token"` the result then computes what
    grouped-query attention with the pool does; with `"head"` its query heads see one attribute each, and it has much
    to learn. A draft head is left out: it reads states that have changed.

    Args:
        model: with `kv_routing="none"`.
        routing: `"head"`, `"token"`, or `"none"` (grouped-query attention itself: the control).
        kv_heads: key-value heads of an attribute; the model's must be a multiple.

    Raises:
        ConversionError: another kind of model, numbers of heads that do not divide, or a projection of normed keys.
    """
    old = model.config
    if old.kv_routing != "none":
        raise ConversionError(f"kv_routing is {old.kv_routing!r} already: heads are pooled of a model with 'none'.")
    if kv_heads < 1 or old.num_key_value_heads % kv_heads:
        raise ConversionError(
            f"{old.num_key_value_heads} key-value heads cannot be pooled into {kv_heads}: give a divisor."
        )
    if pooling not in POOLINGS or (pooling == "projection" and old.qk_norm):
        raise ConversionError(
            f"pooling {pooling!r}: choose from {', '.join(POOLINGS)}; of normed queries and keys (qk_norm) only 'mean'."
        )
    fields = {name: value for name, value in old.to_dict().items() if name not in ("architectures", "dtype")}
    fields |= {"kv_routing": routing, "num_key_value_heads": kv_heads, "query_heads_per_attribute": None}
    try:
        config = SageMusicConfig(**fields | {"num_mtp_layers": 0})
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(" ".join(str(error).split())) from error
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("draft."):
            continue
        if name.endswith((".kv_weight", ".kv_bias")):
            # (1, 2 * h_old * d, ...) -> (A, 2 * h * d, ...)
            heads = tensor.unflatten(1, (2, kv_heads, -1, old.head_dim))
            tensor = heads.mean(3).flatten(1, 3).expand(config.num_attributes, *[-1] * (tensor.ndim - 1))
        tensors[name] = tensor
    if config.tie_word_embeddings:
        del tensors[HEAD]
    pooled = SageMusicForCausalLM(config).to(model.dtype).eval()
    load_into(pooled, tensors)
    if pooling == "projection":
        for layer, target in zip(model.model.layers, pooled.model.layers, strict=True):
            _project_heads(layer, target.self_attn)
    pooled.generation_config = model.generation_config
    return pooled


@torch.no_grad()
def _project_heads(layer, target) -> None:
    """Set `target`, an attention with fewer key-value heads, to the nearest that it can be to the `layer`'s own.

    Both are seen from the layer's normed input, all of whose channels are taken for equally strong. A pair of channels
    that rotary positions turn together is one complex number, so that a head's score is a sum over pairs of
    `Re(a_j x  conj(b_j y)  e^(i angle))`. Of all shared `b` the leading singular vector of the stacked `|a_j| b_j`
    keeps most, and `a_j` is multiplied by what of `b_j` lies along it. Values: of all subspaces of the input that many
    channels wide, that of the leading eigenvectors of `sum_j (O_j V_j)^T (O_j V_j)` keeps most of the outputs.
    """
    own, config = layer.self_attn, target.config
    heads, width, kv_heads = config.num_attention_heads, config.head_dim, config.num_key_value_heads
    norm = layer.input_layernorm.weight.double()
    norm = torch.where(norm.abs() > 1e-6, norm, 1.0)
    if own.kv_bias is not None:  # a bias is one more input, which is always 1
        norm = torch.cat((norm, norm.new_ones(1)))

    def rows(weight, bias):
        weight = weight.double() if bias is None else torch.cat((weight.double(), bias.double()[..., None]), dim=-1)
        return (weight * norm).unflatten(0, (-1, width))

    query = rows(own.q_proj.weight, own.q_proj.bias)  # (H, d, inputs)
    shared = rows(own.kv_weight[0], None if own.kv_bias is None else own.kv_bias[0]).unflatten(0, (2, -1))
    key, value = shared.repeat_interleave(heads // shared.shape[1], dim=1)
    output = own.o_proj.weight.double().unflatten(1, (heads, width)).transpose(0, 1)  # (H, hidden, d)
    query, key = (torch.complex(*states.chunk(2, dim=1)) for states in (query, key))  # (H, d / 2, inputs)
    readers = target.fold.kv_heads if target.fold is not None else [j * kv_heads // heads for j in range(heads)]
    new_query, new_output = torch.empty_like(query), torch.empty_like(output)
    pools = []  # (2, d, inputs) a key-value head
    for kv_head in range(kv_heads):
        chosen = [j for j, reader in enumerate(readers) if reader == kv_head]
        strength = torch.linalg.vector_norm(query[chosen], dim=-1, keepdim=True)
        leading = torch.linalg.svd((strength * key[chosen]).transpose(0, 1), full_matrices=False).Vh[:, 0]
        # As large as the keys were: an optimiser's step should change both alike.
        size = key[chosen].abs().square().sum(-1).mean(0).sqrt().clamp(min=1e-12)[:, None]
        along = (key[chosen] * leading.conj()).sum(-1, keepdim=True)
        new_query[chosen] = query[chosen] * along.conj() / size
        leading = leading * size

        mixed = output[chosen] @ value[chosen]  # (J, hidden, inputs)
        basis = torch.linalg.eigh((mixed.transpose(1, 2) @ mixed).sum(0)).eigenvectors[:, -width:]
        size = value[chosen].square().sum((1, 2)).div(width).mean().sqrt().clamp(min=1e-12)
        new_output[chosen] = mixed @ basis / size
        pools.append(torch.stack((torch.cat((leading.real, leading.imag)), basis.T * size)))

    pool = torch.stack(pools, dim=1).flatten(0, 2) / norm  # (2 * h * d, inputs)
    new_query = torch.cat((new_query.real, new_query.imag), dim=1).flatten(0, 1) / norm
    if own.kv_bias is not None:
        target.q_proj.bias.copy_(new_query[:, -1])
        target.kv_bias.copy_(pool[:, -1].expand_as(target.kv_bias))
        pool, new_query = pool[:, :-1], new_query[:, :-1]
    target.q_proj.weight.copy_(new_query)
    target.kv_weight.copy_(pool.expand_as(target.kv_weight))
    target.o_proj.weight.copy_(new_output.transpose(0, 1).flatten(1, 2))


def main(argv=None) -> int:
    """The command; returns its exit code: 0, or 2 where the source or an argument is wrong."""
    parser = argparse.ArgumentParser(prog="python -m conversion.convert_llama", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of a LlamaForCausalLM, Mistral, Qwen2 or Qwen3 with MidiTok's file")
    parser.add_argument("output", help="folder of the SAGE-Music checkpoint, new or empty")
    parser.add_argument("--tokenizer", help="MidiTok's file (default: the one in SOURCE)")
    parser.add_argument("--context", type=int, help="keep to so many tokens (default: the model's own context)")
    parser.add_argument("--attributes", choices=("head", "token"), help="pool heads for this routing: needs uptraining")
    parser.add_argument("--kv-heads", type=int, default=1, help="with --attributes: heads of an attribute (default: 1)")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="with --attributes (default: mean)")
    options = parser.parse_args(argv)

    def command():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            check_output(options.output)
            model, tokenizer = convert(options.source, None, options.tokenizer, options.context)
            if options.attributes:
                model = pool_heads(model, options.attributes, options.kv_heads, options.pooling)
            save(options.output, model, tokenizer, Path(options.source))
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)
        if options.attributes:
            print("note: pooled heads are a beginning: python -m conversion.uptrain trains them.", file=sys.stderr)
        print(f"{options.output}: {model.num_parameters():,} parameters, kv_routing {model.config.kv_routing!r}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
