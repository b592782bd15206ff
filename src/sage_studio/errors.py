"""Errors that more than one room raises or catches; each message says what to do."""

import re
import shlex
from importlib import metadata


class InvalidMidiError(ValueError):
    """A file that cannot be read as music. `str()` names the file and the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")


class MissingExtraError(RuntimeError):
    """An optional dependency is absent; the message says what to install."""


class CheckpointError(ValueError):
    """A checkpoint that does not load whole; the message names the folder and what is wrong."""


def install_hint(*packages: str) -> str:
    """The command that installs packages, in the versions that sage-music asks for: it is on no index itself."""
    try:
        lines = metadata.requires("sage-music") or []
    except metadata.PackageNotFoundError:  # this travelled with a checkpoint, to where there is no sage-music
        lines = []
    ranges = dict(re.match(r"([\w.-]+) *([^; ]*)", line).groups() for line in lines)
    wanted = (name + ",".join(sorted(ranges.get(name, "").split(","), reverse=True)) for name in packages)
    return f"pip install {' '.join(map(shlex.quote, wanted))}"
