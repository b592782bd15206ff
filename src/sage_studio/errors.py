"""Errors that more than one room raises or catches; each message says what to do."""


class InvalidMidiError(ValueError):
    """A file that cannot be read as music. `str()` names the file and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")


class MissingExtraError(RuntimeError):
    """An optional dependency is absent; the message says what to install."""


class CheckpointError(ValueError):
    """A checkpoint that does not load whole; the message names the folder and what is wrong."""


__all__ = ["CheckpointError", "InvalidMidiError", "MissingExtraError"]
