"""A set of pieces against another: the thirteen features by which PerceiverS is judged, and their KLD and OA.

`set_features` describes a piece, `compare_sets` compares the features of two sets of pieces, by the statistics of
`metrics.densities`. PerceiverS (arXiv 2411.08307) took its features from Yang & Lerch's mgeval and added four
over 64 segments of equal duration; its words differ from mgeval's code, so features have two definitions, by `mode`:

| feature | shape | unit | `corrected` | `mgeval` |
|---|---|---|---|---|
| PC | () | pitch classes; pitches | different pitch classes | different pitches that sound in the roll |
| NC | () | pitches; notes | different notes, that is pitches | notes, drums too |
| PCH | (12,) | share | velocity times duration of every pitch class | the same by frames of the roll |
| PCTM | (12, 12) | share; pairs | each row divided by its sum | pairs of notes, raw |
| PR | () | semitones | highest less lowest pitch | the same of pitches that sound in the roll |
| PI | () | semitones | mean step between notes in order, chord tones included | the same, drums too |
| IOI | () | seconds | mean step between onsets in order, zeros of chords included | the same |
| NLH | (12,) | share | notes of each of 12 lengths | the same, drums too |
| NLTM | (12, 12) | share; pairs | each row divided by its sum | consecutive notes by their lengths, raw, drums too |
| PC/seg | (64,) | as PC | different pitch classes begun in the segment | different pitches begun in it, drums too |
| NC/seg | (64,) | as NC | different pitches begun in the segment | notes begun in it, drums too |
| PCH/seg | (64, 12) | share | PCH of what sounds in the segment | the same by frames |
| IOI/seg | (64,) | seconds | IOI of the onsets in the segment | the same |

*Corrected* follows PerceiverS' words ("distinct pitch classes", "distinct notes (pitch and octave combinations)",
"probabilities of transitioning"), leaves drums out wherever pitch or length is meant, and divides the music, from its
first onset to its last note's end. *mgeval* follows mgeval's code on a roll of 100 frames a second, from second 0.

Note lengths are the nearest (the first of two as near, to 0.01 part) of 96, 48, 24, 12, 6, 72, 36, 18, 9, 32, 16 and 8
of the 96 parts of a bar: whole to sixteenth, the four dotted ones, three triplets. Notes in order: by onset, then
pitch. A pair of PCTM is a note and another of the same track that begins less than 50 ms from the first one's end.

Every feature is finite for all music. Where mgeval divides by zero: histograms and rows without notes are zeros, PR and
PI without notes (PI: without two) are 0, IOI without two onsets is the length of the piece or segment, which the next
onset is at least away (0 without notes).

Known differences of mode `mgeval` from mgeval: it reads one track here and another there, we all of them (PCTM within
each track, as pretty_midi); it orders a chord as the file does; it ends a note at the first note-off of its pitch; its
note lengths take the last meter before a note, ours one bar for the piece; it has no segments of equal duration but
bars; current pretty_midi lengthens rolls by the sustain pedal, we never do. Times of a file are what `music.midi`
reads, in single precision, so that in mode `mgeval` a gap of exactly 50 ms falls on either side; `corrected` counts
whole milliseconds.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from symusic import Score

from sage_studio.music.notes import check_notes, end_s

from .densities import MODES, Densities, densities, distances, divergence

FEATURES = ("PC", "NC", "PCH", "PCTM", "PR", "PI", "IOI", "NLH", "NLTM", "PC/seg", "NC/seg", "PCH/seg", "IOI/seg")
SEGMENTS = 64
FRAMES_PER_SECOND = 100  # of mgeval's piano roll
LENGTHS = np.array([96, 48, 24, 12, 6, 72, 36, 18, 9, 32, 16, 8], dtype=np.float64)  # in 1/96 of a bar
NEAR_MS = 50

# Of these the entropy says something; their mean is 1/12 or a number of notes.
HISTOGRAMS, MATRICES = ("PCH", "NLH", "PCH/seg"), ("PCTM", "NLTM")


class Comparison(NamedTuple):
    """One feature of two sets. Means and (population) standard deviations are over pieces, of `feature_summary`."""

    kld: float  # nats, of intra from inter distances
    oa: float  # 0-1
    reference_mean: float
    reference_std: float
    generated_mean: float
    generated_std: float
    constant: bool  # intra or inter distances are all equal; see sage_studio.metrics.densities.divergence
    n: int  # reference pieces compared
    n_generated: int  # generated pieces compared


def bar_seconds(score: Score) -> float:
    """Seconds of a bar by the meter and tempo a score begins with (unsaid: 4/4, 120 quarter notes a minute)."""
    meters = [(m.numerator, m.denominator) for m in score.time_signatures if m.time <= 0]
    tempos = [tempo.mspq for tempo in score.tempos if tempo.time <= 0]
    numerator, denominator = meters[-1] if meters else (4, 4)
    return 4 * numerator / denominator * (tempos[-1] if tempos else 500_000) / 1e6


def set_features(notes: np.ndarray, mode: str = "corrected", bar_s: float = 2.0) -> dict[str, np.ndarray]:
    """The features of a piece that `compare_sets` compares; definitions, shapes and units: the module's docstring.

    Args:
        notes: note array (`sage_studio.music.notes`); may be empty.
        mode: `"corrected"` or `"mgeval"`. Compare features of one mode only: their shapes do not tell them apart.
        bar_s: seconds of a bar, for NLH and NLTM: `bar_seconds` of a score; 2.0 for a performance, which has no bars
            (mgeval assumes 4/4, and performances are written at 120 quarter notes a minute).

    Returns:
        Float64 arrays by the names in `FEATURES`.

    Raises:
        ValueError: an unknown mode; `bar_s` is not a positive number; a note out of range (as `check_notes`).
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    if not (np.isfinite(bar_s) and bar_s > 0):
        raise ValueError(f"bar_s is {bar_s}; a bar lasts a positive number of seconds.")
    notes = check_notes(notes)
    notes = notes[np.lexsort((notes["pitch"], notes["onset_s"]))]
    mgeval = mode == "mgeval"
    pitched = notes[notes["program"] >= 0]
    counted = notes if mgeval else pitched
    start = 0.0 if mgeval or not len(notes) else float(notes["onset_s"][0])
    span = end_s(notes) - start if len(notes) else 0.0
    edges = np.linspace(start, start + span, SEGMENTS + 1)
    pitch, loudness = pitched["pitch"].astype(np.int64), pitched["velocity"].astype(np.float64)
    on, off = pitched["onset_s"], pitched["onset_s"] + pitched["duration_s"]
    if mgeval:
        on, off = np.trunc(on * FRAMES_PER_SECOND), np.trunc(off * FRAMES_PER_SECOND)
        edges = edges * FRAMES_PER_SECOND
    sounding = pitch[off > on] if mgeval else pitch
    lengths = _length_classes(counted["duration_s"], bar_s)
    transitions = _pitch_class_transitions(pitched, mgeval)
    length_pairs = _pairs(lengths[:-1], lengths[1:])

    segment = _segments(counted["onset_s"], start, span)
    onsets, names = notes["onset_s"], counted["pitch"].astype(np.int64)
    features = {
        "PC": len(np.unique(sounding if mgeval else pitch % 12)),
        "NC": len(notes) if mgeval else len(np.unique(pitch)),
        "PCH": _shares(np.bincount(pitch % 12, loudness * (off - on), 12)),
        "PCTM": transitions if mgeval else _shares(transitions),
        "PR": np.ptp(sounding) if len(sounding) else 0,
        "PI": np.abs(np.diff(names)).mean() if len(names) > 1 else 0,
        "IOI": (onsets[-1] - onsets[0]) / (len(onsets) - 1) if len(onsets) > 1 else span,
        "NLH": _shares(np.bincount(lengths, minlength=12)),
        "NLTM": length_pairs if mgeval else _shares(length_pairs),
        "PC/seg": _distinct(segment, names if mgeval else names % 12),
        "NC/seg": np.bincount(segment, minlength=SEGMENTS) if mgeval else _distinct(segment, names),
        "PCH/seg": _shares(_sounding_by_segment(pitch % 12, loudness, on, off, edges)),
        "IOI/seg": _segment_iois(onsets, _segments(onsets, start, span), span / SEGMENTS),
    }
    return {name: np.asarray(features[name], dtype=np.float64) for name in FEATURES}


def feature_summary(name: str, value: np.ndarray) -> float:
    """One number for a piece's feature, to put in a table: the scalar itself (PC, NC, PR, PI, IOI); the mean over
    segments (PC/seg, NC/seg, IOI/seg); the entropy in bits of a histogram (PCH, NLH, and PCH/seg: mean over segments
    that sound) or of a whole matrix divided by its sum (PCTM, NLTM). 0 for what is empty.

    Raises:
        ValueError: an unknown feature.
    """
    if name not in FEATURES:
        raise ValueError(f"feature is {name!r}; it must be one of {', '.join(FEATURES)}.")
    if name not in HISTOGRAMS + MATRICES:
        return float(np.mean(value))
    rows = np.reshape(value, (1, -1) if name in MATRICES else (-1, 12))
    rows = _shares(rows[rows.sum(axis=1) > 0])
    entropies = -(rows * np.log2(np.where(rows > 0, rows, 1.0))).sum(axis=1)
    return max(float(entropies.mean()), 0.0) if len(entropies) else 0.0


def compare_sets(
    reference: Sequence[Mapping[str, np.ndarray]],
    generated: Sequence[Mapping[str, np.ndarray]],
    mode: str = "corrected",
    seed: int = 0,
) -> dict[str, Comparison]:
    """KLD and OA of every feature between two sets of pieces, given by their `set_features` of the same mode.

    `corrected` uses all pieces of both sets. `mgeval` uses as many of either as the smaller has: of the larger, so many
    are drawn by `seed` (mgeval: the first in the order of the file system). KLD is of the reference's inner distances
    from the distances between the sets.

    How to read it: both numbers depend on the number of pieces, through Scott's bandwidth: compare numbers of equal n.
    A set against itself has a KLD of up to about 2/n and an OA down to 1 - 3/n, for 1/n of the distances are then 0
    (mode `mgeval`: a lower OA, by the tails it leaves out). KLD hangs on the tails: a reference with several
    performances of one composition has small inner distances that no other music has, and with it a KLD (of PCH/seg
    above all) of 1 and more where OA is above 0.9. OA is the steadier of the two.

    Returns:
        A `Comparison` by the names in `FEATURES`; for features with constant distances (`constant`) KLD and OA may be
        NaN, see `sage_studio.metrics.densities.divergence`.

    Raises:
        ValueError: fewer than two reference pieces or no generated one (mode `mgeval`: than two of either), a piece
            without a feature, or an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    if mode == "mgeval":
        smaller = min(len(reference), len(generated))
        reference, generated = _draw(reference, smaller, seed), _draw(generated, smaller, seed)
    result = {}
    for name in FEATURES:
        intra, inter = distances(_stack("reference", reference, name), _stack("generated", generated, name))
        kld, oa, constant = divergence(intra, inter, mode)
        summaries = [[feature_summary(name, piece[name]) for piece in pieces] for pieces in (reference, generated)]
        moments = [float(moment(numbers)) for numbers in summaries for moment in (np.mean, np.std)]
        result[name] = Comparison(kld, oa, *moments, constant, len(reference), len(generated))
    return result


def feature_densities(
    reference: Sequence[Mapping[str, np.ndarray]], generated: Sequence[Mapping[str, np.ndarray]], feature: str
) -> Densities:
    """Densities of one feature's distances within the reference and between the sets, to plot; raises as
    `compare_sets`."""
    return densities(*distances(_stack("reference", reference, feature), _stack("generated", generated, feature)))


def _draw(pieces: Sequence, count: int, seed: int) -> Sequence:
    """`count` of the pieces, in their order; all where there are no more."""
    if len(pieces) <= count:
        return pieces
    return [pieces[index] for index in np.sort(np.random.default_rng(seed).choice(len(pieces), count, replace=False))]


def _stack(argument: str, pieces: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """One feature of all pieces: (n, ...)."""
    for index, piece in enumerate(pieces):
        if name not in piece:
            raise ValueError(f"{argument}[{index}] has no feature {name!r}; make it with set_features.")
    return np.array([piece[name] for piece in pieces], dtype=np.float64)


def _shares(counts: np.ndarray) -> np.ndarray:
    """`counts` (..., k) divided by their sum over the last axis; zeros stay zeros."""
    total = counts.sum(axis=-1, keepdims=True)
    return counts / np.where(total > 0, total, 1.0)


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How often each pair of classes occurs: (12, 12)."""
    return np.bincount(12 * first + second, minlength=144).reshape(12, 12).astype(np.float64)


def _length_classes(duration_s: np.ndarray, bar_s: float) -> np.ndarray:
    """Index into `LENGTHS` of the nearest length of each note: (n,)."""
    # Two decimals, 0.2 ms of a bar of 2 s: lengths from a score's grid are halfway between two as often as they say so.
    units = np.round(np.minimum(duration_s / bar_s, 2.0) * 96, 2)
    return np.abs(units[:, None] - LENGTHS).argmin(axis=1)


def _pitch_class_transitions(pitched: np.ndarray, mgeval: bool) -> np.ndarray:
    """(12, 12) counts of ordered pairs of a track's notes, the second's onset less than 50 ms from the first's end.

    `mgeval` counts a note shorter than 50 ms as its own successor, where its track has another note, as pretty_midi.
    """
    counts = np.zeros((12, 12))
    near = NEAR_MS / 1000 if mgeval else NEAR_MS
    for track in np.unique(pitched["track"]):
        notes = pitched[pitched["track"] == track]  # still in order of onset
        if len(notes) < 2:
            continue
        starts, ends = notes["onset_s"], notes["onset_s"] + notes["duration_s"]
        if not mgeval:
            starts, ends = np.round(starts * 1000), np.round(ends * 1000)
        classes = notes["pitch"].astype(np.int64) % 12
        # heard[i, c]: notes of class c among the first i; a window of onsets is then a difference of two rows.
        heard = np.zeros((len(notes) + 1, 12))
        heard[np.arange(1, len(notes) + 1), classes] = 1
        np.cumsum(heard, axis=0, out=heard)
        low, high = np.searchsorted(starts, ends - near, "right"), np.searchsorted(starts, ends + near, "left")
        successors = heard[high] - heard[low]
        for target in range(12):
            counts[:, target] += np.bincount(classes, successors[:, target], 12)
        if not mgeval:
            counts -= np.diag(np.bincount(classes[ends - starts < near], minlength=12))
    return counts


def _segments(onset_s: np.ndarray, start: float, span: float) -> np.ndarray:
    """Segment of each onset, 0-63: (n,)."""
    if span <= 0:
        return np.zeros(len(onset_s), dtype=np.int64)
    return np.minimum((onset_s - start) / span * SEGMENTS, SEGMENTS - 1).astype(np.int64)


def _distinct(segment: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Different names (0-127) in each segment: (64,)."""
    return np.bincount(np.unique(128 * segment + names) // 128, minlength=SEGMENTS)


def _sounding_by_segment(
    classes: np.ndarray, loudness: np.ndarray, on: np.ndarray, off: np.ndarray, edges: np.ndarray
) -> np.ndarray:
    """Loudness times time of each pitch class within each segment: (64, 12); a note counts where it sounds."""
    histogram = np.zeros((SEGMENTS, 12))
    for index, (left, right) in enumerate(pairwise(edges)):
        time = np.clip(np.minimum(off, right) - np.maximum(on, left), 0, None)
        histogram[index] = np.bincount(classes, loudness * time, 12)
    return histogram


def _segment_iois(onset_s: np.ndarray, segment: np.ndarray, segment_s: float) -> np.ndarray:
    """IOI of each segment in seconds, `segment_s` where it has fewer than two onsets: (64,). Onsets are in order."""
    counts = np.bincount(segment, minlength=SEGMENTS)
    last = np.cumsum(counts) - 1
    several = counts > 1
    iois = np.full(SEGMENTS, segment_s)
    iois[several] = (onset_s[last[several]] - onset_s[(last - counts + 1)[several]]) / (counts[several] - 1)
    return iois
