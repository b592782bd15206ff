"""Model and tokenizer of a checkpoint, of either family, checked tensor by tensor.

from notekit.checkpoint import load
model, tokenizer = load("perceivers")
"""

import os

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.utils import logging

import perceivers
import sage_music
from perceivers import PerceiverSForCausalLM, PerceiverSTokenizer
from sage_music import SageMusicForCausalLM, SageMusicTokenizer

# The bundled checkpoints by their short names, the default first.
BUNDLED = {"sage-music": sage_music.PRETRAINED, "perceivers": perceivers.PRETRAINED}

# The classes of a checkpoint by its config's model_type.
CLASSES = {
    "sage_music": (SageMusicForCausalLM, SageMusicTokenizer),
    "perceivers": (PerceiverSForCausalLM, PerceiverSTokenizer),
}


class CheckpointError(ValueError):
    """A checkpoint that does not load whole; the message names the folder and what is wrong."""


def load(checkpoint: str | os.PathLike | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizer]:
    """Model (in evaluation mode) and tokenizer of a checkpoint; which family's, its config says.

    Args:
        checkpoint: `"sage-music"` (the default) or `"perceivers"`, which are bundled; a folder; or a Hub name. For a
            folder of one of those two names write `./perceivers`.

    Raises:
        CheckpointError: no such checkpoint, one of another model, a missing or misshapen tensor, or a config that
            contradicts itself.
    """
    name = os.fspath(checkpoint) if checkpoint is not None else next(iter(BUNDLED))
    if name in BUNDLED:
        if not BUNDLED[name].is_dir():
            raise CheckpointError(f"{name}: the bundled checkpoint is not installed ({BUNDLED[name]} is missing).")
        name = str(BUNDLED[name])
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise CheckpointError(f"{name}: no such folder.")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if model_type is None:
            raise CheckpointError(f"{name}: no checkpoint (it has no config.json that names a model_type).")
        if model_type not in CLASSES:
            raise CheckpointError(
                f"{name}: a checkpoint of the model type {model_type!r}, not one of {', '.join(map(repr, CLASSES))}."
            )
        model_class, tokenizer_class = CLASSES[model_type]
        config = model_class.config_class.from_pretrained(name)
        tokenizer = tokenizer_class.from_pretrained(name)
        # Misshapen tensors are let through here to be named below.
        model, info = model_class.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except CheckpointError:
        raise
    except Exception as error:  # Transformers, safetensors and the Hub raise a dozen kinds; all mean the same here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{name}: this checkpoint cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = ", ".join(
                sorted(" ".join(map(str, key)) if isinstance(key, tuple) else key for key in info[kind])[:3]
            )
            raise CheckpointError(f"{name}: the weights have {kind.replace('_', ' ')}: {names}.")
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens but the model {config.vocab_size}."
        )
    return model.eval(), tokenizer
