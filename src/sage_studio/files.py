"""Files: written whole or not at all, the MIDI files of a folder, and a seed for each."""

import hashlib
import os
import tempfile
from pathlib import Path

MIDI_SUFFIXES = (".mid", ".midi")
SPLITS = ("train", "validation", "test")


def write_atomic(path: str | os.PathLike, data: bytes) -> Path:
    """Write a file whole or not at all; the folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def midi_files(folder: str | Path) -> list[Path]:
    """All MIDI files under `folder`, sorted; links to folders inside it are not followed.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in MIDI_SUFFIXES
    )
    if not files:
        raise FileNotFoundError(f"{folder}: no .mid or .midi file in it.")
    return files


def seed_of(seed: int, *names: str) -> int:
    """A seed below 2^32 for what has these names (as a file has its path), whatever else there is."""
    text = "/".join([str(seed), *names])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:4], "big")


__all__ = ["MIDI_SUFFIXES", "SPLITS", "midi_files", "seed_of", "write_atomic"]
