"""Which files a folder of MIDI holds, and which split each belongs to."""

import csv
import hashlib
import os
from pathlib import Path

MIDI_SUFFIXES = (".mid", ".midi")
SPLITS = ("train", "validation", "test")


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


__all__ = ["MIDI_SUFFIXES", "SPLITS", "midi_files", "split_files"]
