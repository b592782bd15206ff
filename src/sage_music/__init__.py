"""SAGE-Music: low-latency multi-track MIDI language models for Transformers."""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache_sage_music import SageMusicCache
from .configuration_sage_music import SageMusicConfig
from .drafting_sage_music import DraftCandidateGenerator, SageMusicDraftHead
from .generation_sage_music import (
    BarCountCriteria,
    MidiGrammarLogitsProcessor,
    MinBarsLogitsProcessor,
    NoDoubledNotesLogitsProcessor,
    RunningState,
)
from .modeling_sage_music import SageMusicForCausalLM, SageMusicModel, SageMusicPreTrainedModel
from .quantization_sage_music import quantize_int8
from .tokenization_sage_music import SageMusicTokenizer

PRETRAINED = Path(__file__).parent / "pretrained" / "sage-music-6m"
"""Folder of the bundled checkpoint, for `from_pretrained`."""

AutoConfig.register("sage_music", SageMusicConfig, exist_ok=True)
AutoModel.register(SageMusicConfig, SageMusicModel, exist_ok=True)
AutoModelForCausalLM.register(SageMusicConfig, SageMusicForCausalLM, exist_ok=True)
AutoTokenizer.register(SageMusicConfig, SageMusicTokenizer, exist_ok=True)

# Trainer's label smoothing shifts the labels of causal models it knows by name, and silently not those of others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["sage_music"] = "SageMusicForCausalLM"

__all__ = [
    "PRETRAINED",
    "BarCountCriteria",
    "DraftCandidateGenerator",
    "MidiGrammarLogitsProcessor",
    "MinBarsLogitsProcessor",
    "NoDoubledNotesLogitsProcessor",
    "RunningState",
    "SageMusicCache",
    "SageMusicConfig",
    "SageMusicDraftHead",
    "SageMusicForCausalLM",
    "SageMusicModel",
    "SageMusicPreTrainedModel",
    "SageMusicTokenizer",
    "quantize_int8",
]
