"""What `sage_studio.evaluate` stands on: which pieces, what is kept of a run, work in processes, intervals.

Conventions: a piece's key is its path below the data folders, with `/`. A record is one piece's result, a dict that is
JSON; a piece that failed has the reason in `failed`, which is None otherwise. Nothing here imports torch.
"""

import hashlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from symusic import Score

from sage_studio.errors import InvalidMidiError
from sage_studio.files import SPLITS, Journal, midi_files, seed_of
from sage_studio.metrics import bar_grid, bootstrap, bootstrap_difference
from sage_studio.metrics.continuation import sixteenths
from sage_studio.music.midi import bar_ticks, notes_from_score, read_score, write_midi

OUT, NUM = "out/evaluation", 100  # where results go, and of how many pieces


def read_quietly(source: "str | os.PathLike | bytes") -> Score:
    """`read_score` without its warnings: thousands of files would repeat them."""
    with warnings.catch_warnings(action="ignore"):
        return read_score(source)


def corpus_files(data: Sequence[str | os.PathLike], split: str | None = "test") -> dict[str, Path]:
    """MIDI files of the folders by key. Below folders named train, validation and test, only `split`'s (None: all).

    Raises:
        FileNotFoundError: a folder without MIDI files, or none in the split.
        ValueError: an unknown split.
    """
    if split not in (*SPLITS, None):
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}, all.")
    if not data:
        raise ValueError("data: give at least one folder of MIDI files.")
    files = {}
    for folder in map(Path, data):
        found = midi_files(folder)
        splits = [
            next((part for part in path.relative_to(folder).parts[:-1] if part in SPLITS), None) for path in found
        ]
        if split is not None and any(splits):
            found = [path for path, name in zip(found, splits, strict=True) if name == split]
            if not found:
                raise FileNotFoundError(f"{folder}: it has splits, but no MIDI file in {split}.")
        files.update({folder.resolve() / path.relative_to(folder): path for path in found})
    root = os.path.commonpath([Path(folder).resolve() for folder in data])
    return {Path(os.path.relpath(full, root)).as_posix(): path for full, path in sorted(files.items())}


def by_key(files: Sequence[str | os.PathLike]) -> dict[str, Path]:
    """Files by key, their path below the deepest folder that holds all of them.

    Raises:
        ValueError: no files, or one given twice.
    """
    if not files:
        raise ValueError("files: give at least one.")
    full = [Path(os.path.abspath(path)) for path in files]
    root = os.path.commonpath([path.parent for path in full])
    found = {Path(os.path.relpath(path, root)).as_posix(): path for path in full}
    if len(found) < len(full):
        raise ValueError("files: one is given twice.")
    return found


def shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """The keys in an order that depends on them and the seed, and mixes folders; of fewer keys, the same order."""
    return sorted(keys, key=lambda key: (seed_of(seed, key, "order"), key))


def choose_prompts(
    data: Sequence[str | os.PathLike],
    num: int = 100,
    prompt_bars: int = 4,
    bars: int = 16,
    seed: int = 0,
    split: str | None = "test",
) -> tuple[dict[str, Path], dict[str, str]]:
    """The first `num` pieces, in an order drawn by `seed`, that have `prompt_bars + bars` bars: files by key.

    And, by key, why each piece that came up and could not be used was passed over. Fewer than `num` come back where the
    folders hold fewer.

    Raises:
        FileNotFoundError, ValueError: as `corpus_files`; or not two pieces can be used.
    """
    for name, value in (("num", num), ("prompt_bars", prompt_bars), ("bars", bars)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be positive.")
    files = corpus_files(data, split)
    chosen, skipped = usable({key: files[key] for key in shuffled(files, seed)}, num, prompt_bars, bars)
    if len(chosen) < 2:
        shown = "; ".join(f"{key}: {why}" for key, why in list(skipped.items())[:3])
        folders = ", ".join(map(str, data))
        raise ValueError(
            f"{folders}: {len(chosen)} of {len(files)} pieces can be used, and it takes two ({shown}). "
            "Take more pieces, or fewer bars."
        )
    return chosen, skipped


def usable(files: Mapping[str, Path], num: int, prompt_bars: int, bars: int) -> tuple[dict[str, Path], dict[str, str]]:
    """The first `num` files that can be prompts, and why those that came up before the last of them cannot."""
    chosen, skipped = {}, {}
    for key, path in files.items():
        why = unusable(path, prompt_bars, bars)
        if why:
            skipped[key] = why
        else:
            chosen[key] = path
        if len(chosen) == num:
            break
    return chosen, skipped


def reason(error: Exception, path: str | os.PathLike) -> str:
    """Why a file could not be read, without its name."""
    return f"unreadable: {str(error).removeprefix(f'{os.fspath(path)}: ')}"


def digests(files: Mapping[str, Path]) -> dict[str, str]:
    """By key, a digest of each file's bytes."""
    return {key: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for key, path in files.items()}


def unusable(path: str | os.PathLike, prompt_bars: int, bars: int) -> str | None:
    """Why a piece cannot be a prompt with its true continuation, or None."""
    try:
        score = read_quietly(path)
    except InvalidMidiError as error:
        return reason(error, path)
    meters: dict[int, set] = {}
    for meter in score.time_signatures:
        meters.setdefault(meter.time, set()).add((meter.numerator, meter.denominator))
    if any(len(at_once) > 1 for at_once in meters.values()):
        return "it states two meters at once: readers disagree on its bars"
    last = max(int(track.notes.numpy()["time"].max()) for track in score.tracks if len(track.notes))
    present = int((bar_ticks(score) <= last).sum())  # a last note that rings on makes no bar
    if present < prompt_bars + bars:
        return f"too short: {present} of {prompt_bars + bars} bars"
    notes = notes_from_score(score)
    for start, count, name in ((0, prompt_bars, "prompt"), (prompt_bars, bars, "true continuation")):
        if (sixteenths(notes, bar_grid(score, start, count)) < 0).all():
            return f"its {name} is silent"
    return None


def cut_prompt(score: Score, prompt_bars: int) -> Score:
    """The first bars of a score as a score of its own; notes that begin there keep their lengths."""
    return score.clip(0, int(bar_ticks(score, prompt_bars + 1)[prompt_bars]), clip_end=False)


def cut_notes(notes: np.ndarray, cut_s: float | None) -> np.ndarray:
    """The notes that begin before `cut_s`, ended there; all of them where it is None."""
    if cut_s is None:
        return notes
    notes = notes[notes["onset_s"] < cut_s].copy()
    notes["duration_s"] = np.minimum(notes["duration_s"], cut_s - notes["onset_s"])
    return notes


def finish(
    kept: Journal | None,
    items: Mapping[str, tuple],
    work: Callable[..., dict],
    workers: int | None,
    label: str,
    sources: Mapping[str, str] | None = None,
) -> list[dict]:
    """A record of every item, in their order: the kept one, or `work(*arguments)`, kept as soon as it is there.

    `sources` are `digests` of what the records are about: one about a file that has changed since is made again, as is
    one whose `midi` is no longer in the folder. Failures are kept too: delete their lines to try them again.
    """
    records = {}
    for record in [] if kept is None else kept.records():
        key, midi = record["piece"], record.get("midi")
        if key in items and not (midi and not (kept.folder / midi).is_file()):
            records[key] = record
    if sources is not None:
        records = {key: record for key, record in records.items() if record.get("source") == sources[key]}
    missing = {key: arguments for key, arguments in items.items() if key not in records}
    for key, record in each(work, missing, workers, label, len(records)):
        records[key] = record if sources is None else record | {"source": sources[key]}
        if kept is not None:
            kept.add(records[key])
    return [records[key] for key in items]


def each(
    work: Callable, items: Mapping[str, tuple], workers: int | None, label: str, done: int = 0
) -> Iterator[tuple[str, object]]:
    """`(key, work(*arguments))` of every item as it is finished, in `workers` processes of one thread each.

    One worker works in this process, on one thread too: the same numbers come out, to the bit. Processes are spawned,
    so `work` and its arguments are pickled, and a script that calls this needs `if __name__ == "__main__"`.

    Args:
        workers: None: as many as there are CPUs.

    Raises:
        ValueError: `workers` is not positive.
        ChildProcessError: a process died.
    """
    from tqdm import tqdm

    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be positive.")
    bar = tqdm(
        desc=label, total=done + len(items), initial=done, unit="piece", leave=False, disable=not sys.stderr.isatty()
    )
    with bar, _one_thread():
        if min(workers, len(items)) <= 1:
            for key, arguments in items.items():
                yield key, work(*arguments)
                bar.update()
            return
        pool = ProcessPoolExecutor(min(workers, len(items)), get_context("spawn"))
        try:
            keys = {pool.submit(work, *arguments): key for key, arguments in items.items()}
            for future in as_completed(keys):
                yield keys[future], future.result()
                bar.update()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process died, perhaps for want of memory. Run again, with fewer workers: what is finished "
                "is kept."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for this process's torch, where it is loaded, and for processes that start meanwhile."""
    torch, before = sys.modules.get("torch"), os.environ.get("OMP_NUM_THREADS")
    threads = torch.get_num_threads() if torch is not None else 0
    os.environ["OMP_NUM_THREADS"] = "1"
    if threads:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        if threads:
            torch.set_num_threads(threads)


def write_kept(write: Callable, arguments: tuple, folder: str | None, record: dict) -> Score:
    """What `write(*arguments)` makes; with a folder, as a reader finds it in the file that is kept there.

    Puts `new_notes`, `elapsed_s`, `remarks` and `midi` into the record.
    """
    record |= {"new_notes": 0, "elapsed_s": 0.0, "remarks": [], "midi": None}
    begin = time.perf_counter()
    made = write(*arguments)
    record["elapsed_s"] = round(getattr(made, "elapsed_s", time.perf_counter() - begin), 3)
    record["new_notes"], record["remarks"] = getattr(made, "notes", 0), getattr(made, "remarks", [])
    score = getattr(made, "score", made)
    if folder is not None:
        name = f"midi/{Path(record['piece']).with_suffix('.mid').as_posix()}"
        path = write_midi(Path(folder) / name, score)
        record["midi"] = name
        score = read_quietly(path)
    return score


def failure(error: Exception) -> str:
    """The reason in a record: the kind of error and its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def failures(records: Mapping[str, Sequence[dict]]) -> dict[str, str]:
    """Why pieces failed, by row and piece."""
    return {
        f"{label}: {r['piece']}": r["failed"] for label, of_label in records.items() for r in of_label if r["failed"]
    }


def interval(values: Sequence[float]) -> dict | None:
    """`bootstrap` as JSON: mean, low, high, n; None for no values."""
    return bootstrap(np.array(values, dtype=np.float64))._asdict() if len(values) else None


def differences(values: Mapping[str, Mapping[str, float]], systems: Sequence[str]) -> list[dict]:
    """Paired differences of each system to every other row, over the pieces that both have: `a`, `b` and the interval.

    `values` are numbers by row and piece.
    """
    found = []
    for index, a in enumerate(systems):
        for b in [label for label in values if label not in systems[: index + 1]]:
            common = [piece for piece in values[a] if piece in values[b]]
            if common:
                pair = [np.array([values[label][piece] for piece in common]) for label in (a, b)]
                found.append({"a": a, "b": b, **bootstrap_difference(*pair, paired=True)._asdict()})
    return found
