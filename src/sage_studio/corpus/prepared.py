"""Folders of MIDI files to a corpus: every readable file's ids by split, what was skipped, and how fast it went."""

import csv
import io
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sage_studio.errors import MissingExtraError, install_hint
from sage_studio.files import SPLITS, midi_files, write_atomic

from .encoding import SIZE_LIMIT, MidiTokenizer
from .splits import FileFacts, check_held_out, deal, group_files, leaks, read_metadata
from .store import TokenStore, encode_corpus
from .workers import TIME_LIMIT

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

COLUMNS = ("path", "input_ids", "tokens", "notes", "group")
CACHE = "sage-music-tokens"  # below the cache of `datasets`


@dataclass
class Corpus:
    """Token ids of MIDI files by split.

    Attributes:
        splits: `train`, `validation` and `test`, of which some may be empty: rows `path` (below the folder, or below
            what several folders share), `input_ids` (`BOS ... EOS`), `tokens` and `notes` (their numbers) and `group`
            (files that are the same music or composition have one). Memory-mapped from the cache.
        skipped: path and reason of every file that could not be read.
        report: numbers of `files` (all that were found), `skipped`, `copies` (files of the same bytes as another one),
            `groups`, `notes`, `tokens` and files `from_cache`; `elapsed_s`, `files_per_second`, `notes_per_second`;
            `splits`, each with files, groups, notes and tokens; `licences` and their files, where the metadata tell;
            `leaks`, the held-out files (`path`, `split`) whose group is also trained on, because they were given so.
    """

    splits: "dict[str, datasets.Dataset]"
    skipped: list[tuple[str, str]] = field(default_factory=list)
    report: dict = field(default_factory=dict)

    def write_skipped(self, path: str | os.PathLike) -> Path:
        """Write the skipped files as a CSV with the columns `file` and `reason`."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("file", "reason"))
        table.writerows(self.skipped)
        return write_atomic(path, text.getvalue().encode())


@dataclass
class Files:
    """Files, and for each its name in the corpus and what is said of it; its split is empty where nothing gives one."""

    paths: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    facts: list[FileFacts] = field(default_factory=list)


def prepare_corpus(
    folders: Sequence[str | os.PathLike],
    tokenizer: MidiTokenizer,
    cache: str | os.PathLike | None = None,
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    size_limit: int = SIZE_LIMIT,
    metadata: str | os.PathLike | None = None,
    licences: Sequence[str] | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Corpus:
    """Encode all MIDI files below `folders`, in parallel and cached, and split them without leakage.

    A file's split is the metadata's, else that of the subfolder (`train`, `validation`, `test`) it is in; other files
    are dealt to train and validation by groups (`corpus.splits.deal`). Memory holds the paths and hashes of all
    files and the ids of a few; of files that are copies byte for byte, also the ids of the copies.

    Args:
        cache: folder that keeps the ids, by the contents of the files (default: below the cache of `datasets`).
        workers: processes; None for one a core.
        time_limit: seconds for one file, which is skipped if it takes longer.
        size_limit: bytes of a file, which is skipped unread if it has more.
        metadata: a CSV as `read_metadata` reads it. Files it does not name are used too, unless `licences` are given.
        licences: use only files of these licences, by the metadata's column `licence`.
        held_out: share of the files that are validation, of those without a split.
        seed: of which groups those are.
        progress: called with how many more files are done, as tqdm's `update`.

    Raises:
        FileNotFoundError: a folder without MIDI files.
        ValueError: no file can be used, a wrong argument, or all files are one piece.
        OSError: the cache cannot be written.
        MissingExtraError: `datasets` is not installed.
    """
    started = time.perf_counter()
    check_held_out(held_out)
    files = collect(folders, metadata, licences)
    cache = default_cache() if cache is None else Path(cache)
    store = TokenStore(cache, tokenizer)
    before = store.keys()
    keys, reasons = encode_corpus(files.paths, tokenizer, cache, workers, time_limit, size_limit, progress)
    skipped = [(name, reasons[path]) for name, path in zip(files.names, files.paths, strict=True) if path in reasons]
    used = [index for index, key in enumerate(keys) if key is not None]
    if not used:
        raise ValueError(f"none of the {len(keys):,} files can be used; the first: {skipped[0][0]}: {skipped[0][1]}")
    keys, names, facts = ([part[index] for index in used] for part in (keys, files.names, files.facts))

    stored = store.dataset(list(dict.fromkeys(keys))).data
    rows = _rows_of(keys, stored)
    notes = stored["notes"].to_numpy()[rows].astype(np.int64)
    tokens = _lengths(stored["input_ids"])[rows]
    music = stored["fingerprint"].take(rows).to_pylist()
    groups = group_files(music, [fact.composition for fact in facts])
    split_of = np.array(deal(groups, [fact.split for fact in facts], held_out, seed))
    leaked = leaks(groups, split_of)
    if leaked:
        told = ", ".join(f"{count:,} of {name}" for name, count in Counter(split_of[leaked].tolist()).items())
        warnings.warn(
            f"{told} are the same music or composition as files of train, in the splits given: results on them will "
            "look better than they are. The report's 'leaks' lists them.",
            stacklevel=2,
        )
    rows, whole = _joined(rows, stored, {"path": names, "tokens": tokens.astype(np.int32), "group": groups})
    members = {name: np.nonzero(split_of == name)[0] for name in SPLITS}
    elapsed_s = time.perf_counter() - started
    report = {
        "files": len(files.paths),
        "skipped": len(skipped),
        "copies": len(keys) - len(set(keys)),
        "groups": len(set(groups)),
        "notes": int(notes.sum()),
        "tokens": int(tokens.sum()),
        "from_cache": sum(key in before for key in keys),
        "elapsed_s": round(elapsed_s, 2),
        "files_per_second": round(len(files.paths) / elapsed_s, 1),
        "notes_per_second": round(float(notes.sum()) / elapsed_s, 1),
        "splits": {
            name: {
                "files": len(chosen),
                "groups": len({groups[index] for index in chosen}),
                "notes": int(notes[chosen].sum()),
                "tokens": int(tokens[chosen].sum()),
            }
            for name, chosen in members.items()
        },
        "licences": dict(Counter(fact.licence for fact in facts if fact.licence).most_common()),
        "leaks": [{"path": names[index], "split": str(split_of[index])} for index in leaked],
    }
    return Corpus({name: whole.select(rows[chosen]) for name, chosen in members.items()}, skipped, report)


def default_cache() -> Path:
    """The folder of the token cache where none is given: in that of `datasets`, which `HF_HOME` moves.

    Raises:
        MissingExtraError: `datasets` is not installed.
    """
    try:
        from datasets import config
    except ImportError as error:
        raise MissingExtraError(f"a corpus needs datasets: {install_hint('datasets')}.") from error
    return Path(config.HF_DATASETS_CACHE) / CACHE


def collect(
    folders: Sequence[str | os.PathLike], metadata: str | os.PathLike | None, licences: Sequence[str] | None
) -> Files:
    """The files that are asked for, each once, with the splits that metadata and subfolders give them.

    Arguments and errors are those of `prepare_corpus`.
    """
    if licences is not None and metadata is None:
        raise ValueError("licences are told by metadata: give --metadata, a CSV with the columns path and licence.")
    known = {} if metadata is None else read_metadata(metadata)
    roots = [os.path.realpath(folder) for folder in folders]
    base = os.path.commonpath(roots) if roots else ""
    files, seen, named = Files(), set(), 0
    for folder, root in zip(folders, roots, strict=True):
        for path in midi_files(folder):
            parts = path.relative_to(folder).parts
            place = os.path.join(root, *parts)
            if place in seen:
                continue
            if len(roots) > 1:
                seen.add(place)
            fact = known.get(place)
            named += fact is not None
            if licences is not None and (fact is None or fact.licence not in licences):
                continue
            fact = fact or _NOTHING
            if not fact.split and len(parts) > 1 and parts[0] in SPLITS:
                fact = fact._replace(split=parts[0])
            files.paths.append(path)
            name = place.removeprefix(base).lstrip(os.sep).replace(os.sep, "/")
            files.names.append(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
            files.facts.append(fact)
    if metadata is not None and not named:
        raise ValueError(f"{metadata}: names none of the files; its paths count from the folder the CSV is in.")
    if not files.paths:
        there = ", ".join(sorted({fact.licence for fact in known.values()})) or "no licence"
        raise ValueError(f"{metadata}: no file has a licence of {', '.join(licences or [])}; there are: {there}.")
    return files


_NOTHING = FileFacts()


def _rows_of(keys: Sequence[str], stored) -> np.ndarray:
    """The row of each SHA-256 in a table of the store."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.index_in(pa.array(keys, pa.string()), value_set=stored["sha256"]).to_numpy().astype(np.int64)


def _lengths(lists: "pa.ChunkedArray") -> np.ndarray:
    """How long the lists of a column are, from their offsets alone."""
    import pyarrow.compute as pc

    return pc.list_value_length(lists).to_numpy().astype(np.int64)


def _joined(rows: np.ndarray, stored, columns: dict) -> "tuple[np.ndarray, datasets.Dataset]":
    """One dataset of the stored ids and notes and of `columns`, which have a value for each file; and the files' rows.

    The ids stay where they are on disk, in the order of the store, which the columns are brought into. A row has room
    for one file: only for copies of a file are its ids copied.
    """
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable, concat_tables

    stored = stored.select(["input_ids", "notes"])
    copies = np.setdiff1d(np.arange(len(rows)), np.unique(rows, return_index=True)[1])
    if len(copies):
        copied = InMemoryTable(pa.Table.from_batches(stored.to_batches()).take(rows[copies]))
        rows = rows.copy()
        rows[copies] = len(stored) + np.arange(len(copies))
        stored = concat_tables([stored, copied])
    file_of = np.full(len(stored), -1)
    file_of[rows] = np.arange(len(rows))
    order = pa.array(file_of, mask=file_of < 0)
    beside = pa.table({name: pa.array(values).take(order) for name, values in columns.items()})
    whole = datasets.Dataset(concat_tables([stored, InMemoryTable(beside)], axis=1))
    return rows, whole.select_columns(list(COLUMNS))
