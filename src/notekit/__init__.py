"""notekit: what surrounds the models and both families share: notes, MIDI, pictures, audio, training, command line."""

from .defaults import BARS, MAX_NOTE_SECONDS, PROMPT_BARS, PROMPT_SECONDS, SECONDS, TEMPERATURE, TOP_P

__all__ = ["BARS", "MAX_NOTE_SECONDS", "PROMPT_BARS", "PROMPT_SECONDS", "SECONDS", "TEMPERATURE", "TOP_P"]
