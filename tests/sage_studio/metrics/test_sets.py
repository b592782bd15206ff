import math
from itertools import pairwise

import numpy as np
import pytest
from conftest import DATA, band, needs_data
from symusic import Score, Tempo, TimeSignature

from sage_studio.metrics.sets import (
    FEATURES,
    Comparison,
    bar_seconds,
    compare_sets,
    feature_densities,
    feature_summary,
    set_features,
)
from sage_studio.music.midi import notes_from_score, read_notes
from sage_studio.music.notes import note_array

pytestmark = pytest.mark.filterwarnings("error")

MODES = ("corrected", "mgeval")
SHAPES = {"PCH": (12,), "NLH": (12,), "PCTM": (12, 12), "NLTM": (12, 12), "PCH/seg": (64, 12)}
SHAPES |= {"PC/seg": (64,), "NC/seg": (64,), "IOI/seg": (64,)}

# Four seconds, so that a segment is 1/16 s and 6.25 frames of the roll; a bar is 2 s, so that 1/96 of it is 1/48 s.
PIECE = note_array(
    [
        # onset, duration, pitch, velocity, program, track; segment, 1/96 of a bar
        (0.0, 0.5, 60, 100, 0, 0),  # A: C4, segment 0, 24: quarter, class 2
        (0.5, 0.5, 64, 50, 0, 0),  # B: E4, segment 8, 24: class 2
        (1.0, 0.25, 67, 80, 0, 0),  # D: G4, segment 16, 12: class 3
        (1.0, 1.0, 72, 100, 0, 0),  # C: C5, segment 16, 48: class 1
        (1.5, 0.1, 36, 127, -1, 1),  # drum, segment 24, 4.8: class 4 (6)
        (3.0, 1.0, 48, 40, 0, 0),  # F: C3, segment 48, 48: class 1
        (3.03125, 0.004, 84, 10, 0, 0),  # E: C6, segment 48, 0.19: class 4; frames 303 to 303, so not in the roll
    ]
)


def matrix(entries: dict[tuple[int, int], float]) -> np.ndarray:
    result = np.zeros((12, 12))
    for where, value in entries.items():
        result[where] = value
    return result


def row(entries: dict[int, float], length: int = 12) -> np.ndarray:
    result = np.zeros(length)
    for where, value in entries.items():
        result[where] = value
    return result


# Note lengths are whole ticks, as in a file, 1/96 of a bar of 2 s is 21 of them, and 50 ms are 50.4: no test of PCTM is
# decided by rounding.
TICKS = 1008


def pianist(seed: int, n: int = 60, lowest: int = 40, highest: int = 80) -> np.ndarray:
    """Onsets on no grid: chords, rests, short notes and repeated pitches."""
    rng = np.random.default_rng(seed)
    onset = np.cumsum(rng.choice([0.0, 0.04, 0.3], n) * rng.uniform(0.5, 1.5, n))
    # Every fourth note ends about where the next begins, which PCTM counts.
    length = np.where(np.arange(n) % 4 == 0, np.diff(onset, append=onset[-1] + 1), rng.uniform(0.003, 1.2, n))
    pitch, velocity = rng.integers(lowest, highest, n), rng.integers(1, 128, n)
    length = np.maximum(np.round(length * TICKS), 1) / TICKS
    return note_array(zip(onset, length, pitch, velocity, [0] * n, [0] * n, strict=True))


def test_scalars_by_hand():
    corrected, mgeval = (set_features(PIECE, mode) for mode in MODES)
    assert corrected["PC"] == 3  # C, E, G
    assert mgeval["PC"] == 5  # 60, 64, 67, 72, 48; 84 is too short for the roll
    assert corrected["NC"] == 6  # those and 84
    assert mgeval["NC"] == 7  # notes, with the drum
    assert corrected["PR"] == 36  # 84 - 48
    assert mgeval["PR"] == 24  # 72 - 48
    # In order 60 64 67 72 (36) 48 84: 4 + 3 + 5 + 24 + 36 = 72 over 5, with the drum 4 + 3 + 5 + 36 + 12 + 36 = 96
    # over 6.
    assert corrected["PI"] == pytest.approx(14.4)
    assert mgeval["PI"] == pytest.approx(16)
    # Seven onsets from 0 to 3.03125, two of them together.
    assert corrected["IOI"] == mgeval["IOI"] == pytest.approx(3.03125 / 6)


def test_histograms_by_hand():
    corrected, mgeval = (set_features(PIECE, mode) for mode in MODES)
    # C: 100·0.5 + 100·1 + 40·1 + 10·0.004 = 190.04, E: 50·0.5 = 25, G: 80·0.25 = 20; in all 235.04.
    assert corrected["PCH"] == pytest.approx(row({0: 190.04 / 235.04, 4: 25 / 235.04, 7: 20 / 235.04}))
    # In frames: C 5,000 + 10,000 + 4,000, E 2,500, G 2,000.
    assert mgeval["PCH"] == pytest.approx(row({0: 190 / 235, 4: 25 / 235, 7: 20 / 235}))
    assert corrected["NLH"] == pytest.approx(row({1: 2 / 6, 2: 2 / 6, 3: 1 / 6, 4: 1 / 6}))
    assert mgeval["NLH"] == pytest.approx(row({1: 2 / 7, 2: 2 / 7, 3: 1 / 7, 4: 2 / 7}))


def test_transition_matrices_by_hand():
    corrected, mgeval = (set_features(PIECE, mode) for mode in MODES)
    # A's end meets B (C to E); B's meets D and C (E to G, E to C); E's, at 3.035, follows F's onset by 35 ms (C to C).
    # The rest meets nothing, the drum at 1.5 least of all. E is 4 ms long, so that mgeval makes it its own successor.
    assert corrected["PCTM"] == pytest.approx(matrix({(0, 0): 0.5, (0, 4): 0.5, (4, 7): 0.5, (4, 0): 0.5}))
    assert mgeval["PCTM"] == pytest.approx(matrix({(0, 0): 2, (0, 4): 1, (4, 7): 1, (4, 0): 1}))
    # Lengths in order: 2 2 3 1 1 4, with the drum 2 2 3 1 4 1 4.
    rows = {(2, 2): 0.5, (2, 3): 0.5, (3, 1): 1, (1, 1): 0.5, (1, 4): 0.5}
    assert corrected["NLTM"] == pytest.approx(matrix(rows))
    assert mgeval["NLTM"] == pytest.approx(matrix({(2, 2): 1, (2, 3): 1, (3, 1): 1, (1, 4): 2, (4, 1): 1}))


def test_segments_by_hand():
    corrected, mgeval = (set_features(PIECE, mode) for mode in MODES)
    assert corrected["PC/seg"].tolist() == row({0: 1, 8: 1, 16: 2, 48: 1}, 64).tolist()
    assert corrected["NC/seg"].tolist() == row({0: 1, 8: 1, 16: 2, 48: 2}, 64).tolist()
    for name in ("PC/seg", "NC/seg"):
        assert mgeval[name].tolist() == row({0: 1, 8: 1, 16: 2, 24: 1, 48: 2}, 64).tolist()
    # One interval in segment 16, of 0 s, and one in 48; elsewhere there are not two onsets: the segment's length.
    iois = np.full(64, 1 / 16)
    iois[16], iois[48] = 0, 0.03125
    sounding = np.zeros((64, 12))
    sounding[:8, 0] = sounding[20:32, 0] = sounding[48:, 0] = 1  # A; C alone; F and E
    sounding[8:16, 4] = 1  # B
    sounding[16:20, [0, 7]] = 100 / 180, 80 / 180  # C and D
    for features in (corrected, mgeval):
        assert features["IOI/seg"] == pytest.approx(iois)
        assert features["PCH/seg"] == pytest.approx(sounding)


def test_silence_before_the_music_moves_no_corrected_segment():
    later = PIECE.copy()
    later["onset_s"] += 4
    before, after = set_features(PIECE), set_features(later)
    for name in FEATURES:
        assert after[name] == pytest.approx(before[name]), name
    # mgeval counts from second 0: all of the music is in the second half.
    notes = set_features(later, "mgeval")["NC/seg"]
    assert notes[:32].sum() == 0 and notes[32:].sum() == 7


def test_a_note_as_near_to_two_lengths_takes_the_first_and_the_bar_sets_the_scale():
    # A bar of 2 s: 1.25 s is 60 parts, between 48 and 72; 0.4375 s is 21, between 24 and 18. Of 3 s: 40 and 14 parts.
    notes = note_array([(0, 1.25, 60, 1, 0, 0), (2, 0.4375, 60, 1, 0, 0)])
    for mode in MODES:
        assert set_features(notes, mode)["NLH"].tolist() == row({1: 0.5, 2: 0.5}).tolist()
        assert set_features(notes, mode, bar_s=3)["NLH"].tolist() == row({6: 0.5, 3: 0.5}).tolist()  # 36, 12
    very_long = note_array([(0, 1e9, 60, 1, 0, 0)])
    assert set_features(very_long)["NLH"][0] == 1


def test_pitch_classes_meet_within_a_track_and_less_than_50_ms_apart():
    # Times in single precision, as from a file. A gap of exactly 50 ms is too wide, however its ends are rounded.
    def gaps(gap):
        starts = [float(np.float32(start)) for i in range(50) for start in (i * 3.37, i * 3.37 + 0.3 + gap)]
        return note_array(
            [(start, float(np.float32(0.3)), 60 + 4 * (i % 2), 1, 0, 0) for i, start in enumerate(starts)]
        )

    assert not set_features(gaps(0.05))["PCTM"].any()
    assert set_features(gaps(0.049))["PCTM"].tolist() == matrix({(0, 4): 1}).tolist()
    assert set_features(gaps(0.049), "mgeval")["PCTM"].tolist() == matrix({(0, 4): 50}).tolist()
    assert set_features(gaps(-0.049))["PCTM"].tolist() == matrix({(0, 4): 1}).tolist()
    assert not set_features(gaps(-0.05))["PCTM"].any()
    apart = [(0, 0.5, 60, 1, 0, 0), (0.5, 0.5, 64, 1, 40, 1)]
    for mode in MODES:
        assert not set_features(note_array(apart), mode)["PCTM"].any()


def test_transposition():
    low = pianist(0)
    high = low.copy()
    high["pitch"] += 5
    before, after = set_features(low), set_features(high)
    for name in set(FEATURES) - {"PCH", "PCTM", "PCH/seg"}:
        assert after[name] == pytest.approx(before[name]), name
    assert after["PCH"] == pytest.approx(np.roll(before["PCH"], 5))
    assert after["PCTM"] == pytest.approx(np.roll(before["PCTM"], (5, 5), (0, 1)))
    assert after["PCH/seg"] == pytest.approx(np.roll(before["PCH/seg"], 5, axis=1))
    assert not np.allclose(after["PCH"], before["PCH"])


def test_time_stretch():
    fast = pianist(1)
    slow = fast.copy()
    slow["onset_s"] *= 2
    slow["duration_s"] *= 2
    before, after = set_features(fast), set_features(slow, bar_s=4.0)
    for name in ("IOI", "IOI/seg"):
        assert after[name] == pytest.approx(2 * before[name]), name
    # 50 ms are 50 ms at any tempo: PCTM is the only other feature that may change.
    for name in set(FEATURES) - {"IOI", "IOI/seg", "PCTM"}:
        assert after[name] == pytest.approx(before[name]), name
    assert not np.allclose(set_features(slow)["NLH"], before["NLH"])


def mgeval_by_loops(notes: np.ndarray) -> dict:
    """mgeval's features of one instrument without drums, as its code finds them: note by note, frame by frame."""
    end_s = max(note["onset_s"] + note["duration_s"] for note in notes)
    roll = np.zeros((128, int(100 * end_s)))
    for note in notes:
        roll[note["pitch"], int(note["onset_s"] * 100) : int((note["onset_s"] + note["duration_s"]) * 100)] += note[
            "velocity"
        ]
    used = [pitch for pitch in range(128) if roll[pitch].sum() > 0]
    histogram = np.zeros(12)
    for pitch in range(128):
        histogram[pitch % 12] += roll[pitch].sum()
    transitions, lengths = np.zeros((12, 12)), []
    for first in notes:
        for second in notes:
            if abs(first["onset_s"] + first["duration_s"] - second["onset_s"]) < 0.05:
                transitions[first["pitch"] % 12, second["pitch"] % 12] += 1
        parts = [96, 48, 24, 12, 6, 72, 36, 18, 9, 32, 16, 8]
        away = [abs(round(first["duration_s"] * TICKS) - 2 * TICKS // 96 * part) for part in parts]
        lengths.append(away.index(min(away)))
    length_pairs = np.zeros((12, 12))
    for a, b in pairwise(lengths):
        length_pairs[a, b] += 1
    pitches = [int(note["pitch"]) for note in sorted(notes, key=lambda note: (note["onset_s"], note["pitch"]))]
    onsets = sorted(note["onset_s"] for note in notes)
    return {
        "PC": len(used),
        "NC": len(notes),
        "PCH": histogram / histogram.sum(),
        "PCTM": transitions,
        "PR": max(used) - min(used),
        "PI": np.mean([abs(a - b) for a, b in pairwise(pitches)]),
        "IOI": np.mean([b - a for a, b in pairwise(onsets)]),
        "NLH": np.array([lengths.count(i) for i in range(12)]) / len(lengths),
        "NLTM": length_pairs,
    }


@pytest.mark.parametrize("seed", range(4))
def test_mgeval_features_equal_its_loops(seed):
    notes = pianist(seed, n=150)
    features = set_features(notes, "mgeval")
    expected = mgeval_by_loops(notes)
    assert expected["PCTM"].sum() > 20 and (expected["NLH"] > 0).sum() > 6  # the piece has something to compare
    for name, value in expected.items():
        assert features[name] == pytest.approx(value, rel=1e-9), name


def test_mgeval_comparison_equals_its_procedure():
    """Distances, densities and both numbers of mgeval over a small set, from its features on."""
    stats, integrate = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.integrate")
    sets = (
        [pianist(seed, n=40 + 5 * seed) for seed in range(6)],
        [pianist(seed, n=50 + seed, lowest=30, highest=100) for seed in range(10, 16)],
    )
    ours = compare_sets(*([set_features(notes, "mgeval") for notes in pieces] for pieces in sets), mode="mgeval")
    reference, generated = ([mgeval_by_loops(notes) for notes in pieces] for pieces in sets)
    for name in reference[0]:
        intra = [np.linalg.norm(a[name] - b[name]) for a in reference for b in reference if a is not b]
        inter = [np.linalg.norm(a[name] - b[name]) for a in reference for b in generated]
        p, q = stats.gaussian_kde(intra), stats.gaussian_kde(inter)
        grids = [np.linspace(min(values), max(values), 1000) for values in (intra, inter)]
        assert ours[name].kld == pytest.approx(stats.entropy(p(grids[0]), q(grids[1])), rel=1e-9), name
        ends = min(intra + inter), max(intra + inter)
        overlap = integrate.quad(lambda x, p=p, q=q: min(p(x)[0], q(x)[0]), *ends, limit=400, epsabs=1e-6)[0]
        assert ours[name].oa == pytest.approx(overlap, abs=1e-4), name


def test_a_tiny_comparison_by_hand():
    def chord(pitches):
        return set_features(note_array([(0.0, 1.0, pitch, 64, 0, 0) for pitch in pitches]))

    # Ranges 12, 24 and 36 against 24 and 24. Inner distances 12 24 12 12 24 12; between the sets 12 12 0 0 12 12.
    reference = [chord((60, 60 + wide)) for wide in (12, 24, 36)]
    generated = [chord((50, 74)), chord((40, 64))]
    found = compare_sets(reference, generated)
    assert list(found) == list(FEATURES) and all(isinstance(value, Comparison) for value in found.values())
    # Scott: both lists have sample variance 4·16 + 2·64 = 192 over 5 = 38.4; times 6^(-1/5): width 4.33.
    width = math.sqrt(38.4) * 6**-0.2
    x = np.linspace(-50, 80, 20_001)
    bells = {
        centre: np.exp(-(((x - centre) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi)) for centre in (0, 12, 24)
    }
    p, q = (4 * bells[12] + 2 * bells[24]) / 6, (4 * bells[12] + 2 * bells[0]) / 6
    assert found["PR"].kld == pytest.approx(np.trapezoid(p * np.log(p / q), x), rel=1e-4)
    assert found["PR"].oa == pytest.approx(np.trapezoid(np.minimum(p, q), x), rel=1e-4)
    # Means 24 and 24; deviations sqrt((144 + 0 + 144) / 3) and 0.
    assert found["PR"][2:] == pytest.approx((24, math.sqrt(96), 24, 0, False, 3, 2))
    # All have two notes at one onset, C and C or D and D or E and E: NC and IOI are constant and equal.
    assert found["NC"] == (0, 1, 2, 0, 2, 0, True, 3, 2)
    assert found["IOI"][:2] == (0, 1)
    # The histograms of the reference are equal, all others as far off as can be: nothing in common.
    assert math.isnan(found["PCH"].kld) and found["PCH"].oa == 0 and found["PCH"].constant
    grid, intra, inter = feature_densities(reference, generated, "PR")
    assert intra == pytest.approx(np.interp(grid, x, p), abs=1e-4)
    assert inter == pytest.approx(np.interp(grid, x, q), abs=1e-4)


def test_summaries():
    corrected, mgeval = (set_features(PIECE, mode) for mode in MODES)
    assert feature_summary("PI", corrected["PI"]) == pytest.approx(14.4)
    assert feature_summary("NC/seg", corrected["NC/seg"]) == 6 / 64
    # Sixths 2, 2, 1, 1: 2/3 log2 3 + 1/3 log2 6.
    assert feature_summary("NLH", corrected["NLH"]) == pytest.approx(2 / 3 * math.log2(3) + 1 / 3 * math.log2(6))
    # Four entries of 1/4; as counts 2, 1, 1, 1: 2/5 log2(5/2) + 3/5 log2 5.
    assert feature_summary("PCTM", corrected["PCTM"]) == pytest.approx(2)
    assert feature_summary("PCTM", mgeval["PCTM"]) == pytest.approx(0.4 * math.log2(2.5) + 0.6 * math.log2(5))
    # 48 segments sound (32 to 47 do not); four of them, with shares 5/9 and 4/9, have any entropy.
    bits = -(5 / 9 * math.log2(5 / 9) + 4 / 9 * math.log2(4 / 9))
    assert feature_summary("PCH/seg", corrected["PCH/seg"]) == pytest.approx(4 * bits / 48)
    with pytest.raises(ValueError, match="feature is 'XY'; it must be one of PC, NC"):
        feature_summary("XY", corrected["PC"])


def test_sets_of_unequal_size():
    reference = [set_features(pianist(seed)) for seed in range(7)]
    generated = [set_features(pianist(seed)) for seed in range(20, 24)]
    found = compare_sets(reference, generated)["PI"]
    assert (found.n, found.n_generated) == (7, 4)
    assert found.reference_mean == pytest.approx(np.mean([piece["PI"] for piece in reference]))
    drawn = compare_sets(reference, generated, "mgeval", seed=1)["PI"]
    assert (drawn.n, drawn.n_generated) == (4, 4)
    assert compare_sets(reference, generated, "mgeval", seed=1)["PI"] == drawn
    assert compare_sets(reference, generated, "mgeval", seed=2)["PI"] != drawn
    # Of equal sets nothing is drawn: the seed is without effect.
    assert (
        compare_sets(reference, reference, "mgeval", 1)["PI"] == compare_sets(reference, reference, "mgeval", 2)["PI"]
    )


def test_more_of_the_same_is_nearer_than_other_music():
    one, two = ([set_features(pianist(seed + start)) for seed in range(80)] for start in (0, 100))
    other = [set_features(pianist(seed, lowest=20, highest=108)) for seed in range(200, 280)]
    itself, alike, unlike = (compare_sets(one, pieces) for pieces in (one, two, other))
    # 1/80 of the inter distances are a piece's from itself, 0, where the reference has hardly any.
    assert all(value.kld < 0.02 and value.oa > 0.95 for value in itself.values())
    for name in ("NC", "PR", "PI"):
        assert alike[name].oa > 0.8 > 0.6 > unlike[name].oa, name
        assert alike[name].kld < unlike[name].kld


STRANGE = {
    "empty": note_array(),
    "one note": note_array([(1.5, 0.5, 60, 64, 0, 0)]),
    "one note without length": note_array([(0.0, 0.0, 60, 64, 0, 0)]),
    "notes without length": note_array([(i / 8, 0.0, 60 + i, 64, 0, 0) for i in range(9)]),
    "all at once": note_array([(2.0, 0.0, 60 + i, 64, i % 3, i % 3) for i in range(9)]),
    "drums": note_array([(i / 8, 0.1, 35 + i, 64, -1, 0) for i in range(9)]),
    "one drum": note_array([(0.0, 0.0, 35, 64, -1, 0)]),
    "a moment": note_array([(0.0, 5e-324, 35, 64, 0, 0)] * 2),
    "an age": note_array([(0.0, 1e-3, 127, 1, 0, 0), (1e12, 1e12, 0, 127, 0, 0)]),
    "band": notes_from_score(band(bars=4)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", list(STRANGE))
def test_features_of_any_music_are_finite(kind, mode):
    features = set_features(STRANGE[kind], mode)
    assert list(features) == list(FEATURES)
    for name, value in features.items():
        assert value.shape == SHAPES.get(name, ()) and value.dtype == np.float64, name
        assert np.isfinite(value).all() and (value >= 0).all(), name
        assert np.isfinite(feature_summary(name, value))
    for name in ("PCH", "NLH", "PCH/seg"):
        sums = features[name].sum(axis=-1)
        assert (np.isclose(sums, 1) | (sums == 0)).all(), name


def test_what_is_undefined_is_as_documented():
    for mode in MODES:
        empty, one = (set_features(STRANGE[kind], mode) for kind in ("empty", "one note"))
        assert not any(value.any() for value in empty.values())
        assert (one["PR"], one["PI"], one["PC"], one["NC"]) == (0, 0, 1, 1)
        # The piece lasts half a second; mgeval counts from second 0.
        length = 0.5 if mode == "corrected" else 2.0
        assert one["IOI"] == length and one["IOI/seg"] == pytest.approx(np.full(64, length / 64))
    drums = set_features(STRANGE["drums"])
    assert not any(drums[name].any() for name in set(FEATURES) - {"IOI", "IOI/seg"})
    assert drums["IOI"] == 1 / 8


@pytest.mark.parametrize("mode", MODES)
def test_sets_of_strange_music_compare(mode):
    pieces = [set_features(notes, mode) for notes in STRANGE.values()]
    for reference, generated in ((pieces, pieces[::-1]), (pieces[:2], pieces[5:7]), ([pieces[0]] * 3, [pieces[5]] * 3)):
        for name, value in compare_sets(reference, generated, mode).items():
            assert value.constant or np.isfinite(value[:2]).all(), name
            assert np.isnan(value.kld) or value.kld >= 0
            assert np.isnan(value.oa) or 0 <= value.oa <= 1
            assert np.isfinite(value[2:6]).all()
            feature_densities(reference, generated, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seconds", [20, 20_000])
def test_a_hundred_thousand_notes(seconds, mode):
    rng = np.random.default_rng(0)
    notes = np.repeat(PIECE[:1], 100_000)
    notes["onset_s"] = np.sort(rng.uniform(0, seconds, len(notes)))
    notes["duration_s"], notes["pitch"] = rng.exponential(0.3, len(notes)), rng.integers(0, 128, len(notes))
    notes["track"] = rng.integers(0, 4, len(notes))
    features = set_features(notes, mode)
    assert all(np.isfinite(value).all() for value in features.values())
    if mode == "mgeval" and seconds == 20:
        # 25,000 notes a track; of 20 s, 0.1 s are within 50 ms of an end: about 4·25,000²·0.1/20, less at the end.
        assert features["PCTM"].sum() == pytest.approx(12_500_000, rel=0.03)


def test_bar_seconds():
    score = Score(480)
    assert bar_seconds(score) == 2.0
    score.tempos.append(Tempo(0, 90.0))
    score.tempos.append(Tempo(480, 200.0))
    score.time_signatures.append(TimeSignature(0, 6, 8))
    score.time_signatures.append(TimeSignature(1440, 4, 4))
    assert bar_seconds(score) == pytest.approx(2.0)  # three quarter notes of 2/3 s
    later = Score(480)
    later.time_signatures.append(TimeSignature(1920, 3, 4))
    assert bar_seconds(later) == 2.0  # 4/4 until then


def test_bad_input():
    features = set_features(PIECE)
    with pytest.raises(ValueError, match="mode is 'strict'; it must be one of corrected, mgeval"):
        set_features(PIECE, "strict")
    with pytest.raises(ValueError, match="mode is 'strict'"):
        compare_sets([features] * 2, [features], "strict")
    for bar_s in (0.0, -2.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="bar_s is"):
            set_features(PIECE, bar_s=bar_s)
    broken = PIECE.copy()
    broken["onset_s"][2] = math.nan
    with pytest.raises(ValueError, match="onset_s is nan"):
        set_features(broken)
    with pytest.raises(ValueError, match="0 reference and 1 generated pieces: distances need at least 2"):
        compare_sets([], [features])
    with pytest.raises(ValueError, match="1 reference and 1 generated"):
        compare_sets([features] * 3, [features], "mgeval")
    partial = {name: value for name, value in features.items() if name != "IOI"}
    with pytest.raises(ValueError, match=r"generated\[1\] has no feature 'IOI'; make it with set_features"):
        compare_sets([features] * 2, [features, partial])


@needs_data()
@pytest.mark.data
def test_real_performances_against_themselves():
    files = sorted((DATA / "piano" / "test").glob("*.mid"))
    pieces = [set_features(read_notes(file)) for file in files]
    found = compare_sets(pieces, pieces)
    assert found["PI"].n == len(files) > 100
    for name, value in found.items():
        assert value.oa >= 0.95 and value.kld < 0.02, name
    # Each half of them is further from the other than from itself, and still near.
    halves = compare_sets(pieces[::2], pieces[1::2])
    assert all(0.85 < halves[name].oa < 1 for name in FEATURES)
