"""Around the models: music, checkpoints, generation, corpora, training, evaluation, publishing, the command line."""

from sage_studio.defaults import BARS, MAX_NOTE_SECONDS, PROMPT_BARS, PROMPT_SECONDS, SECONDS, TEMPERATURE, TOP_P

__all__ = ["BARS", "MAX_NOTE_SECONDS", "PROMPT_BARS", "PROMPT_SECONDS", "SECONDS", "TEMPERATURE", "TOP_P"]
