"""The `midi-continuation` pipeline of Transformers, registered on import.

import sage_studio.pipelines
from transformers import pipeline
pipe = pipeline("midi-continuation", model="FOLDER")
result = pipe("prompt.mid", bars=16, seed=0)        # seconds=60 for PerceiverS
open("continuation.mid", "wb").write(result["midi"])

FOLDER is one that training wrote, or `sage_music.PRETRAINED`. A complete Hub repository and its folder bring a pipeline
of their own, which Transformers takes by name only with `trust_remote_code=True`. To use the installed code with one of
them, or an adapter, load it first:

from sage_studio.checkpoints import load
model, tokenizer = load("EXPORTED FOLDER")
pipe = pipeline("midi-continuation", model=model, tokenizer=tokenizer)
"""

from transformers import AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY

from .bars import SageMusicContinuationPipeline
from .continuation import ContinuationPipeline
from .seconds import PerceiverSContinuationPipeline

FAMILIES = {family.model_type: family for family in (SageMusicContinuationPipeline, PerceiverSContinuationPipeline)}


class MidiContinuationPipeline:
    """The `midi-continuation` pipeline of whichever family the model is of: its class is that family's.

    Raises:
        ValueError: a model of neither family.
    """

    # What `pipeline()` loads is asked of the class before there is a model.
    _load_tokenizer, _load_processor = ContinuationPipeline._load_tokenizer, ContinuationPipeline._load_processor
    _load_image_processor = ContinuationPipeline._load_image_processor
    _load_video_processor = ContinuationPipeline._load_video_processor
    _load_feature_extractor = ContinuationPipeline._load_feature_extractor

    def __new__(cls, model, *args, **kwargs) -> ContinuationPipeline:
        if model.config.model_type not in FAMILIES:
            raise ValueError(
                f"midi-continuation takes a model of the type {' or '.join(FAMILIES)}, not {model.config.model_type!r}."
            )
        return FAMILIES[model.config.model_type](model, *args, **kwargs)


PIPELINE_REGISTRY.register_pipeline(
    "midi-continuation", pipeline_class=MidiContinuationPipeline, pt_model=AutoModelForCausalLM, type="text"
)

__all__ = ["MidiContinuationPipeline", "PerceiverSContinuationPipeline", "SageMusicContinuationPipeline"]
