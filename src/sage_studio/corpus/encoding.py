"""MIDI files to token ids: one file to one record."""

import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import stat
import warnings
from typing import Protocol, TypedDict

import numpy as np

from sage_studio.music.midi import read_score

from .splits import fingerprint

# To be raised by a change to a tokenizer or to `encode_file` that makes other ids of the same files.
TOKENS_VERSION = 1
SIZE_LIMIT = 10_000_000  # bytes; music has a hundredth of it
REASON_LENGTH = 200  # characters


class MidiTokenizer(Protocol):
    """What encoding asks of a tokenizer; both families' tokenizers have it."""

    vocab_size: int
    eos_token_id: int | None

    def get_vocab(self) -> dict[str, int]: ...

    def midi_to_ids(self, source) -> list[int]: ...


class Record(TypedDict):
    """What is known of a file by its contents. Of one with an `error` there is no more than `sha256`."""

    sha256: str  # of the bytes, hexadecimal; empty where the file could not be read
    input_ids: np.ndarray  # (T,) `BOS ... EOS`, of type `ids_dtype(tokenizer)`
    notes: int  # in the file
    fingerprint: str  # of the music: `sage_studio.corpus.splits.fingerprint`
    error: str  # why there are no ids: one line, without the file's name
    limit: float  # seconds: the time limit under which it took too long, or ended its process; 0 for other errors


def ids_dtype(tokenizer: MidiTokenizer) -> np.dtype:
    """The type of kept ids: uint16, or uint32 for a vocabulary above 65,535."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 65_535 else np.uint32)


def tokenizer_key(tokenizer: MidiTokenizer) -> str:
    """64 hexadecimal digits, the same for tokenizers that make the same ids of the same files.

    It covers the class's name, the vocabulary, the options, MidiTok's configuration where there is one, the versions
    of MidiTok and symusic, and `TOKENS_VERSION`. A tokenizer that was saved and loaded keeps its key.
    """
    known = inspect.signature(type(tokenizer).__init__).parameters
    # Its own options only: loading adds folders and the like, which change no ids.
    options = {
        name: value
        for name, value in getattr(tokenizer, "init_kwargs", {}).items()
        if name in known and name != "vocab_file"
    }
    # A vocabulary file brings its configuration with it, and tells nothing of it in the options or the vocabulary.
    miditok = getattr(tokenizer, "miditok", None)
    config = None if miditok is None else miditok.config.to_dict(serialize=True)
    versions = [importlib.metadata.version(name) for name in ("miditok", "symusic")]
    content = [type(tokenizer).__name__, tokenizer.get_vocab(), options, config, versions, TOKENS_VERSION]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def read_within(path: str | os.PathLike, size_limit: int) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: it cannot be opened or has more than `size_limit` bytes; the message leaves the path out.
    """
    try:
        # Opening a pipe would wait for somebody to write to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            if status.st_size <= size_limit:
                return file.read()
    except OSError as error:
        raise ValueError(f"cannot be opened ({error.strerror})") from error
    raise ValueError(f"it has {status.st_size:,} bytes, more than the limit of {size_limit:,}")


def encode_file(source: str | os.PathLike | bytes, tokenizer: MidiTokenizer, size_limit: int = SIZE_LIMIT) -> Record:
    """The record of a MIDI file, given as a path or as bytes; what is wrong with it is the record's `error`.

    Raises:
        MemoryError: reading it takes more memory than there is.
    """
    key = ""
    try:
        data = source if isinstance(source, bytes) else read_within(source, size_limit)
        key = hashlib.sha256(data).hexdigest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = read_score(data)
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids = np.array([*tokenizer.midi_to_ids(score), *end], dtype=ids_dtype(tokenizer))
            music = fingerprint(score)
    except MemoryError:
        raise
    except Exception as error:  # an IndexError deep in a reader is no less this file's fault than a ValueError
        return failed_record(key, tokenizer, one_line(error))
    return Record(sha256=key, input_ids=ids, notes=score.note_num(), fingerprint=music, error="", limit=0.0)


def failed_record(sha256: str, tokenizer: MidiTokenizer, error: str, limit: float = 0.0) -> Record:
    """The record of a file without ids."""
    none = np.zeros(0, ids_dtype(tokenizer))
    return Record(sha256=sha256, input_ids=none, notes=0, fingerprint="", error=error, limit=limit)


def one_line(error: Exception) -> str:
    """An exception as a short reason, without the name of what was read."""
    text = re.sub(r"\A<(bytes|score|array)>: ", "", " ".join(str(error).split())).removesuffix(".")
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= REASON_LENGTH else f"{text[: REASON_LENGTH - 3]}..."
