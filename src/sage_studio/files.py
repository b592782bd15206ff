"""Files: written whole or not at all, the MIDI files of a folder, a seed for each, and journals of what is done."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
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


def changes(before: dict, now: dict) -> str:
    """What differs between two settings, as in `seed 0 (now 1), bars None (now 4)`; empty where nothing does."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} {before.get(name)} (now {now.get(name)})" for name in names)


class Journal:
    """What is done of a work, a record each, so that a run that was killed goes on with the rest.

    Records are JSON lines, in one file a process, which is only appended to: a line that a kill cut off is passed over.

    Args:
        folder: keeps the journal, and what the records are about.
        settings: what all records depend on, kept too; None where each says it itself.
        lines: this process' file in `folder`. Records are those of all `.jsonl` files beside it.
        named: the file of the settings.

    Raises:
        ValueError: the folder keeps results of other settings, which the message names, or no settings can be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: dict | None = None,
        lines: str = "results.jsonl",
        named: str = "settings.json",
    ):
        self.folder, self.lines = Path(folder), Path(folder) / lines
        if settings is None:
            return
        path = self.folder / named
        if not path.exists():  # and then read all the same: another process may have written it
            write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
        try:
            before = json.loads(path.read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{path}: does not hold the settings of such a run. Choose another folder.")
        changed = changes(before, json.loads(json.dumps(settings)))
        if changed:
            raise ValueError(
                f"{folder} keeps results of other settings: {changed}. Choose another folder, or delete it; with the "
                "same settings it is gone on with."
            )

    def add(self, record: dict) -> None:
        """Keep a record."""
        self.lines.parent.mkdir(parents=True, exist_ok=True)
        with open(self.lines, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line that a killed run began
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")

    def records(self) -> Iterator[dict]:
        """The records of all processes; of what one has done twice, the later one last."""
        for path in sorted(self.lines.parent.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                yield record
