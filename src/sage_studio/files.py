"""Files: written whole or not at all, and the MIDI files of a folder."""

import csv
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


def split_files(folders: list[str], metadata: str | None, licences: list[str] | None) -> dict[str, list[Path]]:
    """Files of all folders by split; `metadata` (columns `path`, `licence`) keeps some licences only."""
    allowed = None
    if metadata is not None:
        with open(metadata, newline="", encoding="utf-8") as file:
            root = Path(metadata).parent
            allowed = {(root / row["path"]).resolve() for row in csv.DictReader(file) if row["licence"] in licences}
    splits: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for folder in folders:
        for path in midi_files(folder):
            if allowed is not None and path.resolve() not in allowed:
                continue
            parts = path.relative_to(folder).parts
            if parts[0] in splits:
                name = parts[0]
            else:
                name = "validation" if hashlib.sha1(path.name.encode()).digest()[0] % 10 == 0 else "train"
            splits[name].append(path)
    return splits


__all__ = ["MIDI_SUFFIXES", "SPLITS", "midi_files", "split_files", "write_atomic"]
