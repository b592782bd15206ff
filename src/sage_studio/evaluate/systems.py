"""What `sage_studio.evaluate` evaluates: checkpoints of either family, and folders of MIDI files as writers of music.

Conventions: a system is called as `write(path, seed)` and returns a `symusic.Score` or a
`generation.result.Piece` that holds the piece's beginning and what follows it. Torch is imported only where a
checkpoint is used.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from symusic import Score

from sage_studio.defaults import BARS, MUSIC_S, PROMPT_BARS
from sage_studio.families import Family, bundled, family_of
from sage_studio.files import MIDI_SUFFIXES, midi_files
from sage_studio.music.midi import bar_times

from .pieces import read_quietly


@dataclass(frozen=True)
class System:
    """What is evaluated: a checkpoint, or a folder of MIDI files that something else wrote.

    Attributes:
        label: its name in tables.
        source: checkpoint or folder, as given.
        family: the checkpoint's; None for a folder of MIDI files.
        fingerprint: of a checkpoint's files, so that results of other weights are not taken for its own.
    """

    label: str
    source: str
    family: Family | None
    fingerprint: str = ""

    def home(self, out: str | os.PathLike) -> Path:
        """The folder below `out` for what this system wrote: readable, and another one for another source."""
        where = str(Path(self.source).resolve()) if os.path.exists(self.source) else self.source
        readable = re.sub(r"[^\w.-]+", "-", "-".join(Path(self.source).parts[-2:])).strip("-.") or "system"
        return Path(out) / f"{readable[-60:]}-{hashlib.sha256(where.encode()).hexdigest()[:6]}"


def find_systems(
    systems: "Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike]", reserved: Sequence[str] = ()
) -> list[System]:
    """Systems as `sage_studio.evaluate` takes them, each checked: checkpoints load.

    A mapping gives the labels, but not the `reserved` ones. Otherwise a system is called by as much of the end of its
    path as tells it apart from the others.

    Raises:
        ValueError: neither a checkpoint nor a folder with MIDI files; one given twice; a checkpoint that does not load.
    """
    if isinstance(systems, Mapping):
        named = systems
    else:
        paths = [Path(system).parts or (".",) for system in systems]
        if len(set(paths)) < len(paths):
            raise ValueError("a system is given twice: its rows would be the same.")
        depth = next(
            n for n in range(1, 2 + max(map(len, paths), default=0)) if len({p[-n:] for p in paths}) == len(paths)
        )
        named = {"/".join(path[-depth:]): system for path, system in zip(paths, systems, strict=True)}
    for label in set(named) & set(reserved):
        raise ValueError(f"a system is called {label!r}, as a reference row is: give it another label.")
    return [_find_system(label, os.fspath(source)) for label, source in named.items()]


def _find_system(label: str, source: str) -> System:
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source}: a system is a checkpoint or a folder of MIDI files, not one file.")
    if folder.is_dir() and not (folder / "config.json").is_file() and bundled(source) is None:
        if not any(path.suffix.lower() in MIDI_SUFFIXES for path in folder.rglob("*")):
            raise ValueError(f"{source}: neither a checkpoint (no config.json in it) nor a folder with MIDI files.")
        return System(label, source, None)
    model, _ = loaded(source, "cpu")
    own = bundled(source)
    home = own.pretrained if own else folder
    digest = hashlib.sha256()
    for path in sorted(home.glob("*")) if home.is_dir() else []:
        if path.suffix in (".json", ".safetensors") and path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return System(label, source, family_of(model), digest.hexdigest()[:16])


@cache
def loaded(checkpoint: str, device: str):
    """Model and tokenizer of a checkpoint, loaded once a process."""
    from sage_studio.checkpoints import load

    model, tokenizer = load(checkpoint)
    return model.to(device), tokenizer


def match_files(folder: str | os.PathLike, files: Mapping[str, Path]) -> dict[str, str]:
    """Of each reference file, the one in `folder` with its key, else the only one with its stem; missing ones left out.

    A stem that several references share matches nothing: use keys, as `--write-prompts` does.
    """
    found = midi_files(folder)
    by_key = {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
    by_stem: dict[str, list[Path]] = {}
    for path in found:
        by_stem.setdefault(path.stem, []).append(path)
    stems = [path.stem for path in files.values()]
    matched = {}
    for key, path in files.items():
        same = by_stem.get(path.stem, [])
        match = by_key.get(Path(key).with_suffix("").as_posix())
        if match is None and len(same) == 1 and stems.count(path.stem) == 1:
            match = same[0]
        if match is not None:
            matched[str(path)] = str(match)
    return matched


@dataclass(frozen=True)
class CheckpointWriter:
    """Continues pieces with a checkpoint of either family, or writes them from nothing: `write(path, seed)`.

    A PerceiverS counts seconds: its prompt ends at the reference's bar line, and it writes for as long as the true bars
    last.

    Attributes:
        bars, prompt_bars: bars to write, and to keep of the piece.
        music_s, max_tokens: length of a PerceiverS' pieces from nothing.
        temperature, top_p: None: the checkpoint's own.
    """

    checkpoint: str
    bars: int = BARS
    prompt_bars: int = PROMPT_BARS
    music_s: float | None = MUSIC_S
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    device: str = "cpu"

    def __call__(self, path: str | os.PathLike | None, seed: int):
        """The written `generation.result.Piece`; `path` None begins from nothing."""
        model, tokenizer = loaded(self.checkpoint, self.device)
        options = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed}
        family, length = family_of(model), (self.prompt_bars, self.bars)
        if path is not None:
            if not family.counts_bars:
                lines = bar_times(read_quietly(path), sum(length) + 1)
                start, end = lines[[self.prompt_bars, sum(length)]].tolist()
                length = (start, end - start)
            return family.load("plan")(model, tokenizer, path, *length, **options).write()
        lengths = (self.bars,) if family.counts_bars else (self.music_s, self.max_tokens)
        return family.load("begin")(model, tokenizer, *lengths, **options).write()


@dataclass(frozen=True)
class FolderReader:
    """Continuations that something else wrote, by the reference's path: `write(path, seed)` reads, without the seed."""

    files: Mapping[str, str]

    def __call__(self, path: str | os.PathLike, seed: int) -> Score:
        if str(path) not in self.files:
            raise FileNotFoundError("no file continues this piece")
        return read_quietly(self.files[str(path)])
