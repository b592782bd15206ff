"""Numbers that describe one piece by itself: validity, tonality, groove, repetition.

Conventions: notes are note arrays (`music.notes`), in seconds; grids are those of `metrics.continuation`.
Every number is finite for every input: where MusPy returns NaN (no pitched notes, fewer than two bars) the value here
is the one that says "nothing to object to", as each docstring states, and `describe_piece` gives the count of notes
beside it. None of these numbers is good when high or low: compare a set's mean with that of human music.
"""

import numpy as np

from sage_studio.music.notes import end_s

from .continuation import groove_counts

MAJOR = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1])  # scale degrees from C
SEGMENTS = 64  # as PerceiverS' features per segment
INSTANT_S = 1e-6  # music that is no longer than this has no length to divide by
TOUCH_S = 1e-3  # notes that overlap by no more than this only touch: symusic counts seconds in single precision


def valid_notes(notes: np.ndarray) -> float:
    """Share of the notes that an instrument can play as written: 0 to 1; 1 without notes.

    A note is not valid where it has no length, or strikes a key (track, program, pitch) that an earlier note still
    holds: a MIDI channel has one key a pitch, and the first note-off ends both. Drums count too. The definition is
    ours; human files are not all at 1 either (voices that share a staff double notes).
    """
    if not len(notes):
        return 1.0
    _, key = np.unique(notes[["track", "program", "pitch"]], return_inverse=True)
    order = np.lexsort((notes["onset_s"], key))
    key, onset = key[order], notes["onset_s"][order] - notes["onset_s"].min()
    end = onset + notes["duration_s"][order]
    # The latest end of any earlier note of the key: each key's times lie after all of the one before.
    apart = key * (end.max() + 1.0)
    held = np.maximum.accumulate(end + apart)[:-1] - apart[1:]
    struck = np.zeros(len(notes), dtype=bool)
    struck[1:] = (key[1:] == key[:-1]) & (onset[1:] < held - TOUCH_S)
    return 1.0 - float((struck | (notes["duration_s"][order] <= 0)).mean())


def pitch_class_entropy(notes: np.ndarray) -> float:
    """Entropy of the pitch classes, `-sum p log2 p`, in bits: 0 (one pitch class) to log2(12) = 3.58. No drums.

    Notes count once each, however long. Source: Wu & Yang, ISMIR 2020, over whole pieces as MusPy does. Without pitched
    notes: 0 (MusPy: NaN).
    """
    counts = _pitch_classes(notes)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return max(float(-(shares * np.log2(shares)).sum()), 0.0)  # never -0.0


def scale_consistency(notes: np.ndarray) -> float:
    """Share of the notes that lie in the major or natural minor scale that fits best: 7/12 (all alike) to 1. No drums.

    The 24 scales are 12 different sets of pitch classes. Source: Mogren 2016, as MusPy. Without pitched notes: 1
    (MusPy: NaN).
    """
    counts = _pitch_classes(notes)
    if not counts.any():
        return 1.0
    return float(max(counts @ np.roll(MAJOR, root) for root in range(12)) / counts.sum())


def groove_consistency(notes: np.ndarray, grid: np.ndarray) -> float:
    """How much the onsets of neighbouring bars agree: 1 less the share of sixteenths where one has some; in [0, 1].

    `1 - mean_i mean_k [G_i[k] != G_(i+1)[k]]`, `G` the `(bars, 16)` onset mask of `grid`, drums included. Silence
    agrees with silence, so that sparse music scores high: one note in one of two bars gives 15/16. One bar: 1 (MusPy:
    NaN).

    Known differences: MusPy's has as many positions as the file has ticks in a bar, which raises the score of the same
    music with the resolution of its file, and one constant meter; at 16 ticks a bar both are equal, when the grid spans
    the bars from 0 to the one the last note ends in. Jazz Transformer (`grooving_pattern_similarity` of smg-metrics)
    compares all pairs of bars on 64 positions, without drums.

    Raises:
        ValueError: `grid` is none; see `sage_studio.metrics.continuation.check_grid`.
    """
    onsets = groove_counts(notes, grid) > 0
    if len(onsets) < 2:
        return 1.0
    return 1.0 - float((onsets[:-1] != onsets[1:]).mean())


def repeated_ngrams(notes: np.ndarray, n: int = 8) -> float:
    """Share of the piece's pitch n-grams that occurred earlier in it: 0 (none) to nearly 1 (a loop).

    An n-gram is the pitches of `n` consecutive notes, drums left out, in order of onset and, at the same onset, from
    low to high; instruments and rhythm are not looked at, and n-grams may overlap. `1 - distinct / all`. Fewer than `n`
    notes: 0.

    Known differences: `ngram_diversity` of smg-metrics is `distinct / all` over pitch *classes*, and orders the notes
    of a chord as the file does. In a performance chords are not struck at once, so that the order within one varies,
    and with it most literal repeats of chords are lost: compare performances with performances.

    Raises:
        ValueError: `n` is not positive.
    """
    previous = _previous_occurrence(_in_order(notes)["pitch"], n)
    return float((previous >= 0).mean()) if len(previous) else 0.0


def repeated_notes_per_second(notes: np.ndarray, n: int = 8, within_s: float = np.inf) -> float:
    """Repeated notes per second of the piece, from its first onset to its last note's end.

    A note is repeated where it is part of an n-gram (as in `repeated_ngrams`) that occurred earlier; with `within_s`,
    one that last began at most so many seconds before: loops then count, and themes that come back later do not. A
    piece without length: 0.

    PerceiverS' Figures 4 and 5 show a "density of repetitive notes detected per unit time" and the paper gives no
    formula: this is ours, and its values are not comparable with the figures' axes.

    Raises:
        ValueError: `n` is not positive or `within_s` is negative.
    """
    repeated, _, seconds = _repeated(notes, n, within_s)
    return len(repeated) / seconds if seconds > INSTANT_S else 0.0


def repeated_notes_by_segment(
    notes: np.ndarray, n: int = 8, within_s: float = np.inf, segments: int = SEGMENTS
) -> np.ndarray:
    """`repeated_notes_per_second` in each of `segments` equal parts of the piece's time, to plot growth: `(segments,)`.

    A note counts in the part of its onset, whatever part the earlier n-gram is in; the mean over parts is
    `repeated_notes_per_second`. With `within_s` infinite the curve of any music rises, as ever more of it has been
    heard.

    Raises:
        ValueError: as `repeated_notes_per_second`, or `segments` is not positive.
    """
    if segments < 1:
        raise ValueError(f"segments is {segments}; it must be at least 1.")
    repeated, start, seconds = _repeated(notes, n, within_s)
    if seconds <= INSTANT_S:
        return np.zeros(segments)
    where = np.minimum(((repeated - start) / seconds * segments).astype(np.int64), segments - 1)
    return np.bincount(where, minlength=segments) / (seconds / segments)


def describe_piece(notes: np.ndarray, grid: np.ndarray) -> dict[str, float]:
    """All numbers of this module with their default options, the number of notes, and how long they last.

    Keys: `notes` (drums too), `music_s` (first onset to last end), `valid_notes`, `pitch_class_entropy`,
    `scale_consistency`, `groove_consistency` (on `grid`), `repeated_ngrams`, `repeated_notes_per_second`.
    Raises as `groove_consistency`.
    """
    return {
        "notes": float(len(notes)),
        "music_s": _span(notes)[1],
        "valid_notes": valid_notes(notes),
        "pitch_class_entropy": pitch_class_entropy(notes),
        "scale_consistency": scale_consistency(notes),
        "groove_consistency": groove_consistency(notes, grid),
        "repeated_ngrams": repeated_ngrams(notes),
        "repeated_notes_per_second": repeated_notes_per_second(notes),
    }


def _pitch_classes(notes: np.ndarray) -> np.ndarray:
    """Notes of every pitch class, drums left out: (12,)."""
    return np.bincount(notes["pitch"][notes["program"] >= 0] % 12, minlength=12)


def _in_order(notes: np.ndarray) -> np.ndarray:
    """The notes without drums, by onset, then pitch."""
    pitched = notes[notes["program"] >= 0]
    return pitched[np.lexsort((pitched["pitch"], pitched["onset_s"]))]


def _span(notes: np.ndarray) -> tuple[float, float]:
    """First onset, and seconds from it to the end of the last note; 0, 0 without notes."""
    if not len(notes):
        return 0.0, 0.0
    start = float(notes["onset_s"].min())
    return start, end_s(notes) - start


def _previous_occurrence(pitches: np.ndarray, n: int) -> np.ndarray:
    """For every n-gram of `pitches`, by the index of its first note, where the same one last began before, or -1."""
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has at least one note.")
    if len(pitches) < n:
        return np.zeros(0, dtype=np.int64)
    names = pitches.astype(np.int64)
    for size in range(
        1, n
    ):  # the name of a longer n-gram is that of a shorter one and a pitch, numbered anew: any n fits
        names = np.unique(names[:-1] * 128 + pitches[size:], return_inverse=True)[1]
    order = np.argsort(names, kind="stable")
    same = names[order[1:]] == names[order[:-1]]
    previous = np.full(len(names), -1, dtype=np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


def _repeated(notes: np.ndarray, n: int, within_s: float) -> tuple[np.ndarray, float, float]:
    """Onsets of the repeated notes, in order; the piece's first onset; its seconds."""
    if not within_s >= 0:
        raise ValueError(f"within_s is {within_s}; it is a number of seconds, 0 or more.")
    onsets = (pitched := _in_order(notes))["onset_s"]
    previous = _previous_occurrence(pitched["pitch"], n)
    again = np.flatnonzero(previous >= 0)
    again = again[onsets[again] - onsets[previous[again]] <= within_s]
    edges = np.zeros(len(pitched) + 1, dtype=np.int64)  # +1 where an n-gram begins, -1 after it ends: inside where > 0
    edges[again] += 1
    edges[again + n] -= 1
    return onsets[np.cumsum(edges[:-1]) > 0], *_span(notes)
