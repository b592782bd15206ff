"""Folders of MIDI files to splits and token ids: what training needs of a corpus, for either family (no torch)."""

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from .midi import write_atomic

MIDI_SUFFIXES = (".mid", ".midi")


class MidiTokenizer(Protocol):
    """What `encode_files` asks of a tokenizer; both families' tokenizers have it."""

    vocab_size: int
    eos_token_id: int | None

    def get_vocab(self) -> dict[str, int]: ...

    def midi_to_ids(self, source: str | Path) -> list[int]: ...


def midi_files(folder: str | Path) -> list[Path]:
    """All MIDI files under `folder`, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in MIDI_SUFFIXES)
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
    splits: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
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


def encode_files(
    files: Iterable[str | Path], tokenizer: MidiTokenizer, cache: str | Path | None = None
) -> list[np.ndarray]:
    """Token ids `(T,)` of each file, `BOS ... EOS`; a file that cannot be read is warned about and left out.

    Without an EOS in the vocabulary, pieces end with their last event.

    Args:
        cache: a folder that keeps the ids, by the contents of the files and the tokenizer's vocabulary and options.
    """
    if cache is None:
        return _encode(files, tokenizer)
    files = list(files)
    options = {name: value for name, value in getattr(tokenizer, "init_kwargs", {}).items() if name != "vocab_file"}
    key = hashlib.sha256(json.dumps([tokenizer.get_vocab(), options], sort_keys=True, default=str).encode())
    for path in files:
        key.update(hashlib.sha256(Path(path).read_bytes()).digest())
    kept = Path(cache) / f"{key.hexdigest()[:32]}.npz"
    if kept.is_file():
        with np.load(kept) as arrays:
            return np.split(arrays["ids"], arrays["ends"][:-1]) if len(arrays["ends"]) else []
    pieces = _encode(files, tokenizer)
    data = io.BytesIO()
    np.savez_compressed(
        data, ids=np.concatenate(pieces) if pieces else np.zeros(0), ends=np.cumsum([len(piece) for piece in pieces])
    )
    write_atomic(kept, data.getvalue())
    return pieces


def _encode(files: Iterable[str | Path], tokenizer: MidiTokenizer) -> list[np.ndarray]:
    pieces, dtype = [], np.min_scalar_type(tokenizer.vocab_size)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for path in files:
        try:
            ids = tokenizer.midi_to_ids(path)
        except ValueError as error:
            warnings.warn(f"left out: {error}", stacklevel=3)
            continue
        pieces.append(np.array([*ids, *end], dtype=dtype))
    return pieces


__all__ = ["MidiTokenizer", "encode_files", "midi_files", "split_files"]
