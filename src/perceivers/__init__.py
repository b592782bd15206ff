"""PerceiverS: expressive piano performance over a long context, Transformers-native."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache_perceivers import PerceiverSCache
from .configuration_perceivers import PerceiverSConfig
from .generation_perceivers import (
    DurationLogitsProcessor,
    NoteDurationLogitsProcessor,
    PerformanceGrammarLogitsProcessor,
)
from .modeling_perceivers import PerceiverSForCausalLM, PerceiverSModel, PerceiverSPreTrainedModel
from .segmentation import SegmentCollator, SegmentDataset, SegmentStream, SequentialDataset
from .tokenization_perceivers import PerceiverSTokenizer

AutoConfig.register("perceivers", PerceiverSConfig, exist_ok=True)
AutoModel.register(PerceiverSConfig, PerceiverSModel, exist_ok=True)
AutoModelForCausalLM.register(PerceiverSConfig, PerceiverSForCausalLM, exist_ok=True)
AutoTokenizer.register(PerceiverSConfig, PerceiverSTokenizer, exist_ok=True)

# Trainer's label smoothing shifts the labels of causal models it knows by name, and silently not those of others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["perceivers"] = "PerceiverSForCausalLM"


def __getattr__(name: str):
    """`PRETRAINED`: folder of the bundled checkpoint, for `from_pretrained`.

    Raises:
        ModuleNotFoundError: its weights are a package of their own, which is not installed.
    """
    if name != "PRETRAINED":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sage_studio.families import PERCEIVERS

    if not PERCEIVERS.pretrained.is_dir():
        raise ModuleNotFoundError(PERCEIVERS.absence, name="perceivers_weights")
    return PERCEIVERS.pretrained


__all__ = [
    "DurationLogitsProcessor",
    "NoteDurationLogitsProcessor",
    "PerceiverSCache",
    "PerceiverSConfig",
    "PerceiverSForCausalLM",
    "PerceiverSModel",
    "PerceiverSPreTrainedModel",
    "PerceiverSTokenizer",
    "PerformanceGrammarLogitsProcessor",
    "SegmentCollator",
    "SegmentDataset",
    "SegmentStream",
    "SequentialDataset",
]
