"""What the converters of Perceiver AR checkpoints share: vocabularies, the model of renamed tensors, its folder."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.utils import logging

from perceivers import PerceiverSConfig, PerceiverSForCausalLM, PerceiverSTokenizer
from sage_studio.checkpoints.provenance import carry

from .weights import ConversionError, load_into, new_folder, read_json

# Performance events are 388 ids in every vocabulary here; what comes after them tells the vocabularies apart. The first
# two are written by one MIDI processor (Yang Kichang's midi-neural-processor), which rounds time differences one by
# one, bins velocities from 0, and says the velocity before every note.
PROCESSOR = {"time_rounding": "delta", "velocity_emission": "every_note", "velocity_offset": 0, "bos": False}
VOCABULARIES = {
    389: {**PROCESSOR, "end_token": False},  # PAD
    390: {**PROCESSOR, "end_token": True},  # end, PAD
    391: {},  # end, PAD, BOS: this package's own
}
REMARKS = {
    389: "389 ids: performance events and PAD; the vocabulary has no end, so a piece ends by a number of tokens",
    390: "390 ids: performance events, end and PAD",
    391: "391 ids: performance events, end, PAD and BOS, as this package's own tokenizer writes them",
}
SPELLING = (
    "times are rounded difference by difference and every note says its velocity, as the processor the model was "
    "trained with does; pedalled notes may end elsewhere than there"
)


def stack(*weights: Tensor) -> Tensor:
    """Matrices (or biases) of one input as one, in their order."""
    return torch.cat(weights)


def no_bias(weight: Tensor) -> Tensor:
    """Zeros for a matrix that has no bias where its sisters have one."""
    return weight.new_zeros(weight.shape[0])


def size(state: Mapping[str, Tensor], name: str, *, dims: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that says how large the model is.

    Raises:
        ConversionError: it has not so many dimensions.
    """
    shape = tuple(state[name].shape)
    if len(shape) != dims:
        raise ConversionError(f"{name} is of shape {shape}, not of {dims} dimensions.")
    return shape


def tokenizer_for(vocab_size: int, events: bool = True) -> PerceiverSTokenizer | None:
    """The tokenizer of performance events with so many ids, or `None`: other encodings have their own programs.

    `events=False`: a vocabulary that happens to have the size of one of ours.
    """
    if not events or vocab_size not in VOCABULARIES:
        return None
    return PerceiverSTokenizer(**VOCABULARIES[vocab_size])


def build(
    fields: Mapping, tensors: Mapping[str, Tensor], tokenizer: PerceiverSTokenizer | None = None
) -> PerceiverSForCausalLM:
    """The model with the config `fields`, in evaluation mode, filled with `tensors`; `generate()` will sample.

    Raises:
        ConversionError: sizes that contradict each other, or tensors that are not those of that config.
    """
    vocabulary = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        vocabulary = tokenizer.config_fields()
    try:
        config = PerceiverSConfig(**{**vocabulary, **fields})
    except (StrictDataclassError, ValueError) as error:
        raise ConversionError(f"these sizes make no model: {' '.join(str(error).split())}") from error
    model = PerceiverSForCausalLM(config).eval()
    load_into(model, tensors)
    # The model's own distribution; greedy decoding, Transformers' default, repeats itself.
    model.generation_config.update(do_sample=True, top_k=0)
    return model


def save(output, model: PerceiverSForCausalLM, tokenizer: PerceiverSTokenizer | None, source, converter: str) -> None:
    """Write a checkpoint folder, whole or not at all; without a tokenizer it holds the model alone.

    The license and notice beside `source` come along, in a card that names the `converter`, a module.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with new_folder(output) as folder:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            carry(source, folder, converter)
    finally:
        if bars:
            logging.enable_progress_bar()


def report(output, model: PerceiverSForCausalLM, tokenizer: PerceiverSTokenizer | None = None) -> None:
    """Say what was written: the folder on stdout, what to know about its tokens on stderr."""
    config = model.config
    print(
        f"{output}: PerceiverS of {model.num_parameters():,} parameters, {config.num_hidden_layers} layers, "
        f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_latents} latents over "
        f"{config.max_position_embeddings} tokens"
    )
    if tokenizer is None:
        text = (
            f"{config.vocab_size} ids of an encoding that is not PerceiverSTokenizer's: the model alone was written; "
            "load it with PerceiverSForCausalLM.from_pretrained and give it ids"
        )
    else:
        text = REMARKS[config.vocab_size]
        if tokenizer.time_rounding == "delta":
            text += f"; {SPELLING}"
    print(f"note: {text}.", file=sys.stderr)


def read_config(source) -> dict:
    """The `config.json` in the folder `source`, or beside the file `source`; `{}` where there is none."""
    source = Path(source)
    return read_json((source if source.is_dir() else source.parent) / "config.json")
