"""Which files are the same music, and which split each file goes to.

Two files belong to one *group* if their music has the same fingerprint (so copies, saved again or transposed, stay
together) or if the metadata name the same composition. A group is never divided: what is held out was not trained on.
Groups are dealt by a hash of their own key, so that a file added later moves no other group.
"""

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from symusic import Score

from sage_studio.files import SPLITS

# Below so many notes a piece is told by its whole content: unrelated pieces of so few look alike.
FEW_NOTES = 8
# Of each sum that describes the rhythm in `fingerprint`: turns per semitone, turns per quarter note. The periods lie
# between 3 and 14 quarter notes, far above a tick, and no bar is a multiple of them.
WAVES = np.array([[0.38197, 0.07071], [0.23607, 0.17321], [0.41421, 0.22361], [0.14590, 0.33166]])


def fingerprint(score: Score) -> str:
    """A hash of the music (32 characters) that copies of it share: saved again in another resolution, at another tempo,
    with other velocities, durations, instruments, track order or names, or transposed (drums stay as they are).

    It hashes (1) how many notes there are of each pitch above the lowest melodic one, and of each drum, and (2) for
    four waves w the magnitude of `sum over notes of exp(2 pi i (w_pitch * pitch + w_time * onset in quarters))`,
    rounded to steps of N^(3/4) / 16 for N notes. Onsets rounded one by one to a grid are no use: in a performance
    some lie at the edge between two grid points, and another resolution moves those. A magnitude over all notes hardly
    changes, nor does it depend on where the piece begins. Measured on 5,556 files, of which a sample was saved again
    at 480, 220 and 96 ticks a quarter: 99 to 100 % of the scores kept their fingerprint, 99, 99 and 97 % of the piano
    performances, 100, 98 and 95 % of the drum performances (of onsets rounded to 1/48 quarter 31 % at most of the
    performances did), and no two files of different music shared one.

    Pieces of less than 8 notes are hashed as they are: onset and duration (in 1/48 quarter), pitch and program.
    """
    pitches, onsets, durations, programs = [], [], [], []
    for track in score.tracks:
        notes = track.notes.numpy()
        pitches.append(notes["pitch"].astype(np.int64))
        onsets.append(notes["time"] / score.ticks_per_quarter)
        durations.append(notes["duration"] / score.ticks_per_quarter)
        programs.append(np.full(len(notes["pitch"]), -1 if track.is_drum else track.program))
    digest = hashlib.sha256()
    count = sum(map(len, pitches))
    if count == 0:
        return digest.hexdigest()[:32]
    pitch, onset, program = np.concatenate(pitches), np.concatenate(onsets), np.concatenate(programs)
    if count < FEW_NOTES:
        grid = np.round(48 * np.stack([onset - onset.min(), np.concatenate(durations)])).astype(np.int64)
        digest.update(repr(sorted(zip(*grid.tolist(), pitch.tolist(), program.tolist(), strict=True))).encode())
        return digest.hexdigest()[:32]
    drum = program < 0
    pitch = np.where(drum, pitch + 128, pitch - pitch[~drum].min(initial=127))
    digest.update(np.bincount(pitch, minlength=256).astype("<i8").tobytes())
    turns = WAVES[:, :1] * pitch + WAVES[:, 1:] * onset  # (4, notes)
    waves = np.abs(np.exp(2j * np.pi * turns).sum(axis=1))
    digest.update(np.round(16 * waves / count**0.75).astype("<i8").tobytes())
    return digest.hexdigest()[:32]


class FileFacts(NamedTuple):
    """What the metadata say of one file; empty: nothing."""

    licence: str = ""
    composition: str = ""
    split: str = ""


def read_metadata(source: str | os.PathLike) -> dict[str, FileFacts]:
    """Facts by absolute path, from a CSV with the column `path` (relative to the CSV) and any of `licence`,
    `composition_key` or `composition`, and `split`.

    Raises:
        ValueError: the CSV is missing or not text, has no column `path`, or names a split that there is none of.
    """
    root = os.path.realpath(Path(source).parent)
    facts = {}
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if "path" not in columns:
                raise ValueError(f"{source}: no column 'path' in it (its first line: {', '.join(columns)[:200]}).")
            composition = "composition_key" if "composition_key" in columns else "composition"
            for row in reader:
                if not row["path"]:
                    continue
                one = FileFacts(row.get("licence") or "", row.get(composition) or "", row.get("split") or "")
                if one.split and one.split not in SPLITS:
                    raise ValueError(
                        f"{source}, line {reader.line_num}: split {one.split!r} is not one of {', '.join(SPLITS)}."
                    )
                facts[os.path.normpath(os.path.join(root, row["path"]))] = one
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{source}: cannot be read as a CSV file ({getattr(error, 'strerror', error)}).") from error
    return facts


def group_files(fingerprints: Iterable[str], compositions: Iterable[str]) -> list[str]:
    """The group of each file, 16 hexadecimal digits: files linked by a fingerprint or a composition ("": none).

    The digits are a hash of the composition (the first by name, where a group has several) or of the fingerprint.
    """
    files = list(zip(fingerprints, compositions, strict=True))
    parent: dict[str, str] = {}  # compositions by name, each towards the first name of its group

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    composed: dict[str, str] = {}  # a composition of each fingerprint that has any
    for fingerprint_, composition in files:
        if composition:
            parent.setdefault(composition, composition)
            other = root(composed.setdefault(fingerprint_, composition))
            first, last = sorted((root(composition), other))
            parent[last] = first
    keys = [f"composition {root(composed[one])}" if one in composed else f"music {one}" for one, _ in files]
    names = {key: hashlib.sha256(key.encode()).hexdigest()[:16] for key in set(keys)}
    return [names[key] for key in keys]


def deal(groups: Sequence[str], given: Sequence[str], held_out: float = 0.1, seed: int = 0) -> list[str]:
    """The split of each file, from its group and the split it was given ("": none).

    Given splits are kept. A file without one follows its group where that has one, a held-out one first. All other
    groups are dealt whole to `train` and `validation` by a hash of the seed and the group, so that about `held_out` of
    the files are validation. A group of more than half of all files is trained on. Where no group happened to be
    dealt to validation (or none to train), the one whose hash was nearest is.

    Raises:
        ValueError: `held_out` is not in [0, 1), or there is only one group and nothing else to validate on.
    """
    check_held_out(held_out)
    of_group: dict[str, str] = {}
    for group, split in zip(groups, given, strict=True):
        if split and SPLITS.index(split) > SPLITS.index(of_group.get(group, "train")):
            of_group[group] = split
        elif split:
            of_group.setdefault(group, split)
    sizes = Counter(group for group in groups if group not in of_group)
    chance = {group: _fraction(f"{seed} {group}") for group in sizes}
    limit = (sum(sizes.values()) + sum(split == "train" for split in given)) / 2
    small = [group for group, size in sizes.items() if size <= limit]
    chosen = {group for group in small if chance[group] < held_out}
    if sizes and held_out and not chosen and "validation" not in given:
        if not small:
            raise ValueError(
                f"all {sum(sizes.values())} files are copies or transpositions of one piece, or one composition: none "
                "can be held out to validate on. Add other music, put the files to validate on into a folder named "
                "validation, or hold out nothing (--held-out 0)."
            )
        chosen = {min(small, key=chance.__getitem__)}
    if len(chosen) == len(sizes) > 1 and "train" not in given:
        chosen.remove(max(chosen, key=chance.__getitem__))
    of_group.update((group, "validation" if group in chosen else "train") for group in sizes)
    return [split or of_group[group] for group, split in zip(groups, given, strict=True)]


def check_held_out(held_out: float) -> None:
    """Raises ValueError where `held_out` is no share of files that leaves some to train on."""
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of the files, from 0 to below 1, not {held_out}.")


def leaks(groups: Sequence[str], splits: Sequence[str]) -> list[int]:
    """Indices of the held-out files whose group is also trained on."""
    trained = {group for group, split in zip(groups, splits, strict=True) if split == "train"}
    return [index for index, group in enumerate(groups) if splits[index] != "train" and group in trained]


def _fraction(text: str) -> float:
    """A number in [0, 1) that is as good as random, the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56
