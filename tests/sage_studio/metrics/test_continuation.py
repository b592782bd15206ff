"""NMSI: golden values worked out by hand, what must not change it, what must lower it."""

import math
import time

import numpy as np
import pytest
from conftest import DATA, band, needs_data
from symusic import Note, Score, Tempo, TimeSignature, Track

from sage_studio.metrics import bar_grid, nmsi, self_similarity_matrix, steady_grid
from sage_studio.metrics.continuation import chroma_counts, groove_counts, sixteenths
from sage_studio.music.midi import notes_from_score, read_score
from sage_studio.music.notes import NOTE_DTYPE, note_array

pytestmark = pytest.mark.filterwarnings("error")

PARTS = ("chroma", "groove", "self_similarity", "note_density")
C, C_SHARP, E, G = 60, 61, 64, 67


def on_sixteenths(*notes: tuple) -> np.ndarray:
    """Notes given as (sixteenth, pitch) or (sixteenth, pitch, program), on `steady_grid(0, ...)`: 0.125 s each."""
    return note_array((note[0] / 8, 0.1, note[1], 80, note[2] if len(note) > 2 else 0, 0) for note in notes)


E_NOTE = on_sixteenths((0, E))


def random_notes(count: int, seconds: float, seed: int = 0, drums: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    notes = np.zeros(count, dtype=NOTE_DTYPE)
    notes["onset_s"], notes["duration_s"] = np.sort(rng.uniform(0, seconds, count)), rng.uniform(0, 2, count)
    notes["pitch"], notes["velocity"] = rng.integers(0, 128, count), rng.integers(1, 128, count)
    notes["program"] = -1 if drums else rng.integers(-1, 128, count)
    return notes


def test_bar_grid_follows_meters_and_tempos():
    score = Score(480)
    score.time_signatures.extend([TimeSignature(0, 3, 4), TimeSignature(2880, 4, 4)])
    score.tempos.extend([Tempo(0, 120), Tempo(3840, 60)])
    score.tracks.append(Track())
    score.tracks[0].notes.append(Note(0, 4800, 60, 80))
    # Bar 1, 3/4 at 120: from tick 1,440 = 1.5 s, 90 ticks = 0.09375 s a sixteenth. Bar 2, 4/4 from tick 2,880 = 3 s:
    # eight sixteenths of 120 ticks = 0.125 s to tick 3,840 = 4 s, then eight at 60 = 0.25 s, to 6 s.
    expected = [1.5 + 0.09375 * k for k in range(16)] + [3 + 0.125 * k for k in range(8)]
    expected += [4 + 0.25 * k for k in range(9)]
    np.testing.assert_allclose(bar_grid(score, 1, 2), expected, atol=1e-12)
    # After the score's end: bar 3 begins at 6 s, and bars of 4/4 at 60 last 4 s: bar 10 from 34 s.
    np.testing.assert_allclose(bar_grid(score, 10, 1), 34 + 0.25 * np.arange(17), atol=1e-12)


def test_a_bar_that_a_new_meter_cuts_short_ends_there():
    score = Score(480)
    score.time_signatures.extend([TimeSignature(0, 4, 4), TimeSignature(480, 4, 4)])  # an upbeat of a quarter note
    score.tracks.append(Track())
    score.tracks[0].notes.append(Note(0, 2400, 60, 80))
    grid = bar_grid(score, 0, 2)  # 120 quarter notes a minute by default: 0.5 s, then 2 s
    np.testing.assert_allclose(grid[[0, 8, 16, 32]], [0, 0.25, 0.5, 2.5], atol=1e-12)


def test_steady_grid():
    np.testing.assert_allclose(steady_grid(1.5, 2), 1.5 + 0.125 * np.arange(33))
    np.testing.assert_allclose(steady_grid(0, 1, bar_s=4.0), 0.25 * np.arange(17))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bar_grid(band(2), -1, 4), "first_bar is -1"),
        (lambda: bar_grid(band(2), 0, 0), "bars is 0"),
        (lambda: steady_grid(0, 0), "bars=0"),
        (lambda: steady_grid(0, 1, bar_s=0), "bar_s=0"),
        (lambda: steady_grid(math.nan, 1), "start_s=nan"),
        (lambda: nmsi(E_NOTE, E_NOTE, steady_grid(0, 2), steady_grid(0, 3)), "2 bars and reference_grid 3"),
        (lambda: nmsi(E_NOTE, E_NOTE, np.arange(16), steady_grid(0, 1)), r"generated_grid has shape \(16,\)"),
        (lambda: nmsi(E_NOTE, E_NOTE, steady_grid(0, 1), [0.0]), r"reference_grid has shape \(1,\)"),
        (
            lambda: nmsi(E_NOTE, E_NOTE, steady_grid(0, 1), steady_grid(0, 1)[::-1]),
            "reference_grid must be finite, incr",
        ),
        (lambda: sixteenths(E_NOTE, np.full(17, math.nan)), "grid must be finite"),
    ],
)
def test_what_is_no_grid_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_an_onset_belongs_to_the_nearest_sixteenth():
    grid = steady_grid(1.0, 1)  # 1, 1.125, ..., 2.875; the bar ends at 3
    for onset, expected in [
        (0.93, -1),  # 0.07 early: nearer to the bar before
        (0.94, 0),
        (1.0, 0),
        (1.06, 0),
        (1.0625, 1),  # half-way: the later
        (1.06249, 1),  # half-way but for single precision
        (1.19, 2),
        (2.93, 15),
        (2.9375, -1),  # half-way to the bar line: the next bar's
        (3.5, -1),
    ]:
        assert sixteenths(note_array([(onset, 0.1, C, 80, 0, 0)]), grid)[0] == expected, onset


def test_grids_of_consecutive_bars_share_out_every_onset():
    notes = random_notes(2000, 32.0)
    notes = notes[(notes["onset_s"] > 0.1) & (notes["onset_s"] < 31.9)]
    counted = sum(groove_counts(notes, steady_grid(4.0 * k, 2)).sum() for k in range(8))
    assert counted == len(notes)


def test_half_way_notes_go_one_way_whatever_single_precision_does_to_them():
    score = Score(480)
    score.tempos.append(Tempo(0, 97.3))
    score.tracks.append(Track())
    for step in range(200 * 16):  # 200 bars, a note a thirty-second after every sixteenth
        score.tracks[0].notes.append(Note(step * 120 + 60, 30, C, 80))
    found = sixteenths(notes_from_score(score), bar_grid(score, 0, 200))
    assert found.tolist() == [*range(1, 3200), -1]


def test_all_parts_by_hand():
    reference = on_sixteenths((0, C), (4, E), (8, G), (16, C))
    generated = on_sixteenths((0, C), (0, E), (4, C))
    parts = nmsi(generated, reference, steady_grid(0, 2), steady_grid(0, 2))
    # Half bars: {2 C, E} against {C, E} 3 / sqrt(5 * 2); none against {G} 0; none against {C} 0; none against none 1.
    assert parts["chroma"] == pytest.approx((3 / math.sqrt(10) + 1) / 4, abs=1e-12)
    # Bars: 2 and 1 onsets on sixteenths 0 and 4 against 1, 1, 1 on 0, 4, 8: 3 / sqrt(5 * 3); none against one: 0.
    assert parts["groove"] == pytest.approx(3 / math.sqrt(15) / 2, abs=1e-12)
    # Bars: 3 against 3, 0 against 1.
    assert parts["note_density"] == pytest.approx(0.5, abs=1e-12)
    # 16 eighths of a bar. Generated: u0 {C, E}, u2 {C}. Reference: u0 {C}, u2 {E}, u4 {G}, u8 {C}. The others, 12, are
    # empty in both and agree among themselves. Differences: (u0, u2) 1/sqrt(2) against 0; (u0, u8) 0 against 1; (u4,
    # u8) both empty, 1, against 0; u4 and u8 with each of the 12: 1 against 0. Twice the sum, of 256 pairs.
    assert parts["self_similarity"] == pytest.approx(1 - 2 * (1 / math.sqrt(2) + 1 + 1 + 24) / 256, abs=1e-12)
    assert parts["nmsi"] == pytest.approx(25 * sum(parts[part] for part in PARTS), abs=1e-12)
    assert list(parts) == ["nmsi", *PARTS]


def test_self_similarity_matrix_by_hand():
    matrix = self_similarity_matrix(on_sixteenths((0, C), (1, E), (2, C + 12), (14, G)), steady_grid(0, 1))
    assert matrix.shape == (8, 8)
    # u0 {C, E}, u1 {C}, u7 {G}, the other five empty.
    expected = np.zeros((8, 8))
    expected[2:7, 2:7] = 1
    expected[[0, 1, 7], [0, 1, 7]] = 1
    expected[0, 1] = expected[1, 0] = 1 / math.sqrt(2)
    np.testing.assert_allclose(matrix, expected, atol=1e-12)


def test_self_similarity_of_many_bars_is_that_of_the_whole_matrices():
    grid = steady_grid(0, 70)  # 560 eighths
    notes, other = random_notes(900, 140, 1), random_notes(900, 140, 2)
    whole = 1 - np.abs(self_similarity_matrix(notes, grid) - self_similarity_matrix(other, grid)).mean()
    assert nmsi(notes, other, grid, grid)["self_similarity"] == pytest.approx(whole, abs=1e-12)


def test_drums_count_in_groove_and_density_only():
    grid = steady_grid(0, 1)
    reference = on_sixteenths((0, C), (8, E))
    parts = nmsi(np.concatenate([reference, on_sixteenths((4, 38, -1), (12, 38, -1))]), reference, grid, grid)
    # Onsets on 0, 4, 8, 12 against 0, 8: 2 / sqrt(4 * 2); 4 onsets against 2.
    expected = {"chroma": 1, "groove": 2 / math.sqrt(8), "self_similarity": 1, "note_density": 0.5}
    assert parts == pytest.approx({"nmsi": 25 * sum(expected.values()), **expected}, abs=1e-12)


def test_silence():
    grid = steady_grid(0, 4)
    nothing = note_array()
    assert nmsi(nothing, nothing, grid, grid) == {"nmsi": 100, **dict.fromkeys(PARTS, 1)}
    # Against a piece with the same pitch class in every eighth of a bar: chroma, groove and density 0, and both
    # matrices are all ones, for silence is as like itself as C is.
    full = on_sixteenths(*((2 * k, C) for k in range(32)))
    expected = {"nmsi": 25, "chroma": 0, "groove": 0, "self_similarity": 1, "note_density": 0}
    assert nmsi(nothing, full, grid, grid) == expected
    assert nmsi(full, nothing, grid, grid) == expected


def test_identity_is_exactly_100_and_the_score_is_symmetric():
    grid = steady_grid(0, 30)
    for seed in range(20):
        notes, other = random_notes(700, 60, seed), random_notes(900, 60, seed + 100)
        assert nmsi(notes, notes.copy(), grid, grid.copy()) == {"nmsi": 100, **dict.fromkeys(PARTS, 1)}
        forward, backward = nmsi(notes, other, grid, grid), nmsi(other, notes, grid, grid)
        assert forward == backward and forward["nmsi"] < 95


def test_tempo_and_start_do_not_matter_when_the_grid_goes_with_them():
    notes, other = notes_from_score(band(8, seed=1)), notes_from_score(band(8, seed=2))
    slow = notes.copy()
    slow["onset_s"] = notes["onset_s"] * 1.37 + 5
    plain = nmsi(notes, other, steady_grid(0, 8), steady_grid(0, 8))
    assert nmsi(slow, other, steady_grid(5, 8, 2 * 1.37), steady_grid(0, 8)) == plain
    assert nmsi(slow, notes, steady_grid(5, 8, 2 * 1.37), steady_grid(0, 8))["nmsi"] == 100
    # The same music read at another tempo, by its own score's bars.
    fast = band(8, seed=1, qpm=171)
    assert nmsi(notes_from_score(fast), notes, bar_grid(fast, 0, 8), steady_grid(0, 8))["nmsi"] == 100


def test_transposition():
    grid = steady_grid(0, 8)
    notes = notes_from_score(band(8, seed=3))
    notes = notes[notes["program"] >= 0]
    octave, semitone = notes.copy(), notes.copy()
    octave["pitch"] += 12
    semitone["pitch"] += 1
    assert nmsi(octave, notes, grid, grid)["nmsi"] == 100
    np.testing.assert_array_equal(
        chroma_counts(semitone, grid, 8), np.roll(chroma_counts(notes, grid, 8), 1, axis=1)
    )  # every pitch class moves up by one, B to C
    parts = nmsi(semitone, notes, grid, grid)
    assert parts["chroma"] < 0.8
    assert [parts[part] for part in PARTS[1:]] == [1, 1, 1]


def test_what_lies_outside_the_grids_does_not_count():
    notes = on_sixteenths((16, C), (20, E), (31, G))
    around = np.concatenate([on_sixteenths((0, C_SHARP), (15, G), (32, C_SHARP), (200, C)), notes])
    grid = steady_grid(2.0, 1)
    assert nmsi(around, notes, grid, grid)["nmsi"] == 100


INPUTS = {
    "empty": note_array(),
    "one": on_sixteenths((5, C)),
    "one of no length": note_array([(0, 0, 0, 1, 0, 0)]),
    "drums": random_notes(300, 200, drums=True),
    "random": random_notes(500, 200),
    "chord": np.concatenate([on_sixteenths((3, C))] * 1000),
    "late": note_array([(1e9, 1, C, 80, 0, 0)]),
    "100,000": random_notes(100_000, 1000),
}


@pytest.mark.parametrize("name", list(INPUTS))
def test_defined_for_every_input_and_fast(name):
    grid = steady_grid(0, 500)
    start = time.process_time()
    for other in (INPUTS["empty"], INPUTS["random"]):
        for parts in (nmsi(INPUTS[name], other, grid, grid), nmsi(other, INPUTS[name], grid, grid)):
            assert 0 <= parts["nmsi"] <= 100
            assert all(0 <= parts[part] <= 1 for part in PARTS)
    assert time.process_time() - start < 4  # four scores over 500 bars; a second each


@pytest.mark.data
@needs_data()
def test_a_worse_continuation_of_real_music_scores_lower():
    rng = np.random.default_rng(0)
    scores = {"quarter": [], "half": [], "semitone": [], "shuffled": [], "another": [], "nothing": []}
    before = None
    for path in sorted((DATA / "multitrack" / "test").glob("**/*.mid"))[::12]:
        score = read_score(path)
        truth, grid = notes_from_score(score), bar_grid(score, 4, 16)
        truth = truth[truth["program"] >= 0]
        if (sixteenths(truth, grid) >= 0).sum() < 100:
            continue
        assert nmsi(truth, truth, grid, grid)["nmsi"] == 100, path
        semitone, shuffled = truth.copy(), truth.copy()
        semitone["pitch"] += np.where(truth["pitch"] < 127, 1, -1).astype(np.int16)
        shuffled["pitch"] = rng.permutation(truth["pitch"])
        drawn = rng.random(len(truth))
        worse = {"quarter": truth[drawn > 0.25], "half": truth[drawn > 0.5], "semitone": semitone}
        worse.update(shuffled=shuffled, nothing=truth[:0])
        found = {name: nmsi(notes, truth, grid, grid)["nmsi"] for name, notes in worse.items()}
        if before:
            found["another"] = nmsi(before[0], truth, before[1], grid)["nmsi"]
            assert found["another"] < found["quarter"], path
        assert 100 > found["quarter"] > found["half"] > found["nothing"], path
        before = truth, grid
        for key, value in found.items():
            scores[key].append(value)
    assert len(scores["half"]) >= 15
    means = {key: np.mean(values) for key, values in scores.items()}
    assert means["quarter"] > means["half"] > means["another"] > means["nothing"]
    assert max(means["semitone"], means["shuffled"]) < 90 and means["another"] < 60


@pytest.mark.filterwarnings("ignore")  # other packages' own
def test_agreement_with_smg_metrics_on_a_bar(tmp_path):
    """Its `sim_chr` and `sim_grv` compare whole bars, each with the most similar one: nothing of that differs from ours
    over a single bar whose halves hold the same notes, on sixteenths. Over two bars, it does."""
    similarity = pytest.importorskip("smg_metrics.similarity")

    def compared(first: list[list[tuple]], second: list[list[tuple]]):
        """Theirs and ours of two pieces; a list of (sixteenth, pitch) for every half bar."""
        paths, notes = [], []
        for name, halves in (("first.mid", first), ("second.mid", second)):
            score = Score(480)
            score.tempos.append(Tempo(0, 120))
            score.time_signatures.append(TimeSignature(0, 4, 4))
            score.tracks.append(Track())
            for index, half in enumerate(halves):
                for step, pitch in half:  # all last until the half bar ends: their last bar ends with the music
                    score.tracks[0].notes.append(Note((8 * index + step) * 120, (8 - step) * 120, pitch, 80))
            paths.append(tmp_path / name)
            score.dump_midi(paths[-1])
            notes.append(notes_from_score(score))
        grid = steady_grid(0, len(first) // 2)
        return similarity.compute_all(*paths), nmsi(*notes, grid, grid)

    a, b = [(0, C), (0, E), (3, G), (6, E)], [(0, C), (2, E), (3, E), (7, 69)]
    # {C, 2 E, G} against {C, 2 E, A}: 5 / 6.
    # Onsets 2, 1, 1 on 0, 3, 6 against 1, 1, 1, 1 on 0, 2, 3, 7: 3 / sqrt(6 * 4).
    theirs, ours = compared([a, a], [b, b])
    assert ours["chroma"] == pytest.approx(5 / 6, abs=1e-9) == theirs.sim_chr
    assert ours["groove"] == pytest.approx(3 / math.sqrt(24), abs=1e-9) == theirs.sim_grv
    # The same two bars the other way round: each finds its like, and theirs says 1.
    theirs, ours = compared([a, a, b, b], [b, b, a, a])
    assert ours["chroma"] == pytest.approx(5 / 6, abs=1e-9) and theirs.sim_chr == pytest.approx(1, abs=1e-9)
    assert ours["groove"] == pytest.approx(3 / math.sqrt(24), abs=1e-9) and theirs.sim_grv == pytest.approx(1, abs=1e-9)
