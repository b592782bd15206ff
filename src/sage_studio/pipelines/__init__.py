"""The `midi-continuation` pipeline of Transformers, registered on import.

import sage_studio.pipelines
from transformers import pipeline
pipe = pipeline("midi-continuation", model="FOLDER")
result = pipe("prompt.mid", bars=16, seed=0)        # music_s=60 for PerceiverS
open("continuation.mid", "wb").write(result["midi"])

FOLDER is one that training wrote, or `sage_music.PRETRAINED`. A complete Hub repository and its folder bring a pipeline
of their own, which Transformers takes by name only with `trust_remote_code=True`. To use the installed code with one of
them, or an adapter, load it first:

from sage_studio.checkpoints import load
model, tokenizer = load("EXPORTED FOLDER")
pipe = pipeline("midi-continuation", model=model, tokenizer=tokenizer)
"""

from functools import cache

from transformers import AutoModelForCausalLM
from transformers.pipelines import PIPELINE_REGISTRY

from sage_studio.families import Family, family_of

from .continuation import ContinuationPipeline


@cache
def pipeline_class(family: str) -> type[ContinuationPipeline]:
    """The pipeline of a family, by its model_type."""
    found: Family = family_of(family)
    code = {name: staticmethod(found.load(name)) for name in ("plan", "together")}
    return type(f"{found.prefix}ContinuationPipeline", (ContinuationPipeline,), {"family": found, **code})


class MidiContinuationPipeline(ContinuationPipeline):
    """The `midi-continuation` pipeline of whichever family the model is of: its class is that family's.

    Raises:
        ValueError: a model of neither family.
    """

    def __new__(cls, model, *args, **kwargs) -> ContinuationPipeline:
        return pipeline_class(family_of(model).model_type)(model, *args, **kwargs)


PIPELINE_REGISTRY.register_pipeline(
    "midi-continuation", pipeline_class=MidiContinuationPipeline, pt_model=AutoModelForCausalLM, type="text"
)

__all__ = ["ContinuationPipeline", "MidiContinuationPipeline", "pipeline_class"]
