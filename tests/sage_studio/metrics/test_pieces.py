"""What describes one piece: golden values by hand, brute force, other packages, every kind of input."""

import math
import time

import numpy as np
import pytest
from conftest import DATA, band, needs_data
from symusic import Note, Score, Tempo, TimeSignature, Track

from sage_studio.metrics import (
    describe_piece,
    groove_consistency,
    pitch_class_entropy,
    repeated_ngrams,
    repeated_notes_by_segment,
    repeated_notes_per_second,
    scale_consistency,
    steady_grid,
    valid_notes,
)
from sage_studio.music.midi import notes_from_score, read_notes
from sage_studio.music.notes import NOTE_DTYPE, note_array

pytestmark = pytest.mark.filterwarnings("error")


def melody(*pitches: int, step: float = 1.0, program: int = 0) -> np.ndarray:
    """A note every `step` seconds, as long as that."""
    return note_array((index * step, step, pitch, 80, program, 0) for index, pitch in enumerate(pitches))


def random_notes(count: int, pitches: int = 128, seed: int = 0, seconds: float = 600.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    notes = np.zeros(count, dtype=NOTE_DTYPE)
    notes["onset_s"], notes["duration_s"] = np.sort(rng.uniform(0, seconds, count)), rng.uniform(0, 2, count)
    notes["pitch"], notes["velocity"] = rng.integers(0, pitches, count), rng.integers(1, 128, count)
    return notes


def test_pitch_class_entropy_by_hand():
    # C twice, in two octaves, E and G: shares 1/2, 1/4, 1/4: 1/2 * 1 + 2 * 1/4 * 2 = 1.5 bits.
    assert pitch_class_entropy(melody(60, 72, 64, 67)) == pytest.approx(1.5, abs=1e-12)
    assert pitch_class_entropy(melody(*range(60, 72))) == pytest.approx(math.log2(12), abs=1e-12)
    assert pitch_class_entropy(melody(60, 48)) == 0


def test_scale_consistency_by_hand():
    # C D E F G A B and C sharp: C major holds 7 of 8, and no scale all.
    assert scale_consistency(melody(60, 62, 64, 65, 67, 69, 71, 61)) == 7 / 8
    # Natural minor on C: C D Eb F G Ab Bb, the notes of E flat major.
    assert scale_consistency(melody(60, 62, 63, 65, 67, 68, 70)) == 1
    assert scale_consistency(melody(*range(60, 72))) == 7 / 12
    for key in range(12):
        assert scale_consistency(melody(*(key + degree for degree in (60, 62, 64, 65, 67, 69, 71)))) == 1


def test_groove_consistency_by_hand():
    # Bars of 2 s: onsets on sixteenths {0, 4}, {0, 8}, none. Neighbours differ in 2 and in 2 of 16.
    notes = note_array((time, 0.1, 60, 80, 0, 0) for time in (0, 0.5, 2, 3))
    assert groove_consistency(notes, steady_grid(0, 3)) == 1 - (2 + 2) / 32
    # Drums count, and two notes at one time are one onset: the second bar's 8th sixteenth now also has a kick.
    assert (
        groove_consistency(np.append(notes, note_array([(1.0, 0.1, 36, 80, -1, 0)])), steady_grid(0, 3)) == 1 - 3 / 32
    )
    assert groove_consistency(np.append(notes, notes[:1]), steady_grid(0, 3)) == 1 - 4 / 32
    assert groove_consistency(notes, steady_grid(0, 1)) == 1


def test_repeated_ngrams_by_hand():
    # Trigrams of A B C A B C A: ABC, BCA, CAB, and again ABC, BCA: 2 of 5.
    assert repeated_ngrams(melody(57, 59, 60, 57, 59, 60, 57), n=3) == 2 / 5
    # A loop of eight notes, ten times: 73 n-grams of eight, of which eight are new.
    assert repeated_ngrams(melody(*range(60, 68), *list(range(60, 68)) * 9)) == 65 / 73
    assert repeated_ngrams(melody(60, 60, 60), n=2) == 1 / 2  # an n-gram may overlap the one it repeats
    assert repeated_ngrams(melody(60, 60, 60), n=1) == 2 / 3
    assert repeated_ngrams(melody(*[60] * 7)) == 0  # fewer than eight notes
    assert repeated_ngrams(melody(60, 64, 61, 0), n=2) == 0
    assert repeated_ngrams(melody(60, 72, 60, 72), n=2) == 1 / 3  # octaves are other pitches: only 60 72 comes twice


def test_notes_of_a_chord_are_taken_from_low_to_high_whatever_their_track():
    chords = [(0, 1, 60, 80, 0, 0), (0, 1, 64, 80, 0, 1), (1, 1, 64, 80, 0, 0), (1, 1, 60, 80, 0, 1)]
    assert repeated_ngrams(note_array(chords), n=2) == 1 / 3  # 60 64, 64 60, 60 64
    drums = [(time, 0.1, 38, 80, -1, 2) for time in (0, 0.5, 1)]
    assert repeated_ngrams(note_array(chords + drums), n=2) == 1 / 3


def test_repetition_equals_brute_force():
    for seed in range(6):
        notes = random_notes(300, pitches=3, seed=seed)
        pitches, onsets = notes["pitch"].tolist(), notes["onset_s"]
        span = (onsets + notes["duration_s"]).max() - onsets[0]
        for n in (1, 2, 3, 5, 11):
            grams = [tuple(pitches[k : k + n]) for k in range(len(pitches) - n + 1)]
            assert repeated_ngrams(notes, n) == pytest.approx(1 - len(set(grams)) / len(grams), abs=1e-12)
            for within in (5.0, np.inf):
                repeated = set()
                for k, gram in enumerate(grams):
                    if any(gram == grams[j] and onsets[k] - onsets[j] <= within for j in range(k)):
                        repeated.update(range(k, k + n))
                expected = len(repeated) / span
                assert repeated_notes_per_second(notes, n, within) == pytest.approx(expected, rel=1e-12)


def test_repeated_notes_per_second_by_hand():
    # Notes at 0, 1, ..., 6 s, to 7 s. ABC begins again at 3, BCA at 4: the notes 3, 4, 5, 6 are repeated.
    notes = melody(57, 59, 60, 57, 59, 60, 57)
    assert repeated_notes_per_second(notes, n=3) == 4 / 7
    assert repeated_notes_per_second(notes, n=3, within_s=3) == 4 / 7
    assert repeated_notes_per_second(notes, n=3, within_s=2.9) == 0
    assert repeated_notes_by_segment(notes, n=3, segments=7).tolist() == [0, 0, 0, 1, 1, 1, 1]
    # Twice as slow: half as many a second. Later: as many.
    assert repeated_notes_per_second(melody(57, 59, 60, 57, 59, 60, 57, step=2), n=3) == 2 / 7
    notes["onset_s"] += 100
    assert repeated_notes_per_second(notes, n=3) == pytest.approx(4 / 7)
    assert repeated_notes_by_segment(notes, n=3, segments=7).tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_a_loop_at_the_end_shows_where_it_is():
    rng = np.random.default_rng(0)
    notes = melody(
        *rng.integers(21, 109, 480), *list(rng.integers(21, 109, 8)) * 20, step=0.1
    )  # 48 s, then 16 s of loop
    curve = repeated_notes_by_segment(notes, within_s=5.0)
    assert curve.shape == (64,)
    assert curve[:48].sum() == 0 and curve[50:] == pytest.approx(np.full(14, 10.0))  # 10 notes a second, all repeated
    assert curve.mean() == pytest.approx(repeated_notes_per_second(notes, within_s=5.0))


def test_describe_piece():
    described = describe_piece(melody(*[57, 59, 60, 57] * 5), steady_grid(0, 10))
    # 20 notes of 1 s, two a bar on sixteenths 0 and 8, in every bar alike. 13 n-grams of eight, four new: 9 repeat,
    # from the note 4 to the last: 16 notes in 20 s. Pitch classes A 10, B 5, C 5 of 20: 1.5 bits.
    assert described == {
        "notes": 20,
        "music_s": 20,
        "valid_notes": 1,
        "pitch_class_entropy": 1.5,
        "scale_consistency": 1,
        "groove_consistency": 1,
        "repeated_ngrams": 9 / 13,
        "repeated_notes_per_second": 16 / 20,
    }


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda notes: repeated_ngrams(notes, n=0), "n is 0"),
        (lambda notes: repeated_notes_per_second(notes, n=-1), "n is -1"),
        (lambda notes: repeated_notes_per_second(notes, within_s=-1.0), "within_s is -1"),
        (lambda notes: repeated_notes_by_segment(notes, within_s=math.nan), "within_s is nan"),
        (lambda notes: repeated_notes_by_segment(notes, segments=0), "segments is 0"),
        (lambda notes: groove_consistency(notes, np.arange(5)), r"grid has shape \(5,\)"),
    ],
)
def test_bad_arguments_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make(melody(60, 62))


def test_notes_that_cannot_be_played_as_written():
    """Of seven notes three: one without length, two that strike the key a note holds, one of them a long one."""
    notes = note_array(
        [
            (0, 4, 60, 80, 0, 0),
            (1, 1, 60, 80, 0, 0),  # under the first
            (3, 1, 60, 80, 0, 0),  # under it still, though the one before has ended
            (4, 1, 60, 80, 0, 0),  # touches it
            (1, 1, 60, 80, 0, 1),  # another track
            (1, 1, 60, 80, 5, 0),  # another program
            (6, 0, 61, 80, 0, 0),  # no length
        ]
    )
    assert valid_notes(notes) == pytest.approx(4 / 7)
    assert valid_notes(notes[::-1]) == pytest.approx(4 / 7)
    late = notes.copy()
    late["onset_s"] += 3e5
    assert valid_notes(late) == pytest.approx(4 / 7)
    assert valid_notes(notes[:0]) == 1.0


NOTHING_TO_OBJECT = {
    "valid_notes": 1,
    "pitch_class_entropy": 0,
    "scale_consistency": 1,
    "groove_consistency": 1,
    "repeated_ngrams": 0,
}


def test_empty_and_drums_only_have_the_documented_values():
    grid = steady_grid(0, 4)
    nothing = {"notes": 0, "music_s": 0, "repeated_notes_per_second": 0, **NOTHING_TO_OBJECT}
    assert describe_piece(note_array(), grid) == nothing
    # A beat every second, for 8 s: neither pitch nor repeated pitches, but groove (here the same in every bar).
    drums = describe_piece(melody(*[36] * 8, program=-1), grid)
    assert drums == {"notes": 8, "music_s": 8, "repeated_notes_per_second": 0, **NOTHING_TO_OBJECT}
    assert not repeated_notes_by_segment(note_array()).any()


INPUTS = {
    "one": melody(60),
    "no length": note_array([(1.5, 0, 60, 80, 0, 0)] * 20),
    "nearly no length": note_array([(0, 5e-324, 60, 80, 0, 0)] * 20),
    "random": random_notes(500),
    "one pitch": random_notes(2000, pitches=1),
    "late": note_array([(1e9, 1, 60, 80, 0, 0)] * 9),
    "100,000": random_notes(100_000),
}


@pytest.mark.parametrize("name", list(INPUTS))
def test_defined_for_every_input_and_fast(name):
    notes = INPUTS[name]
    grid = steady_grid(0, 500)
    start = time.process_time()
    described = describe_piece(notes, grid)
    curve = repeated_notes_by_segment(notes)
    assert time.process_time() - start < 1
    assert all(map(math.isfinite, described.values())) and np.isfinite(curve).all() and curve.min() >= 0
    assert 0 <= described["pitch_class_entropy"] <= math.log2(12)
    assert 0 <= described["valid_notes"] <= 1
    assert 7 / 12 <= described["scale_consistency"] <= 1
    assert 0 <= described["groove_consistency"] <= 1
    assert 0 <= described["repeated_ngrams"] < 1
    assert curve.mean() == pytest.approx(described["repeated_notes_per_second"])


def assert_tonality_agrees(path) -> None:
    harmony = pytest.importorskip("smg_metrics.harmony")
    notes = read_notes(path)
    assert pitch_class_entropy(notes) == pytest.approx(harmony.pitch_class_entropy(path), abs=1e-9), path
    assert scale_consistency(notes) == pytest.approx(harmony.scale_consistency(path), abs=1e-9), path


@pytest.mark.filterwarnings("ignore")  # other packages' own
def test_tonality_agrees_with_smg_metrics(tmp_path):
    for seed in range(3):
        band(8, seed=seed).dump_midi(tmp_path / "band.mid")
        assert_tonality_agrees(tmp_path / "band.mid")


@pytest.mark.data
@needs_data()
@pytest.mark.filterwarnings("ignore")
def test_tonality_of_real_music_agrees_with_smg_metrics():
    for path in sorted((DATA / "multitrack" / "test").glob("**/*.mid"))[::40]:
        assert_tonality_agrees(path)


@pytest.mark.filterwarnings("ignore")
def test_where_muspy_and_smg_metrics_have_no_value_ours_is_defined(tmp_path):
    harmony = pytest.importorskip("smg_metrics.harmony")
    score = Score(480)
    score.tracks.append(Track(is_drum=True))
    score.tracks[0].notes.append(Note(0, 480, 38, 80))
    score.dump_midi(tmp_path / "drums.mid")
    assert math.isnan(harmony.pitch_class_entropy(tmp_path / "drums.mid"))
    assert math.isnan(harmony.scale_consistency(tmp_path / "drums.mid"))


@pytest.mark.filterwarnings("ignore")
def test_groove_agrees_with_muspy_at_its_resolution_and_differs_from_smg_metrics_as_documented(tmp_path):
    rhythm = pytest.importorskip("smg_metrics.rhythm")
    muspy = pytest.importorskip("muspy")
    rng = np.random.default_rng(0)
    for bars in (2, 5, 9):
        onsets = sorted(rng.choice(16 * bars, 7 * bars, replace=False).tolist())
        onsets[-1] = 16 * bars - 2  # the last note ends in the last bar, not on its line: one more bar for MusPy
        found = {}
        for resolution in (4, 480):  # ticks a quarter note: 16 and 1,920 positions a bar
            score = Score(resolution)
            score.tempos.append(Tempo(0, 120))
            score.time_signatures.append(TimeSignature(0, 4, 4))
            score.tracks.append(Track())
            sixteenth = resolution // 4
            for onset in sorted(set(onsets)):
                score.tracks[0].notes.append(Note(onset * sixteenth, sixteenth, 60, 80))
            path = tmp_path / f"{bars}-{resolution}.mid"
            score.dump_midi(path)
            found[resolution] = muspy.groove_consistency(muspy.read_midi(path), 4 * resolution)
        ours = groove_consistency(notes_from_score(score), steady_grid(0, bars))
        assert ours == pytest.approx(found[4], abs=1e-9)
        # The same music in a finer file: as many differences among 120 times as many positions.
        assert 1 - found[480] == pytest.approx((1 - ours) / 120, abs=1e-9)
        # All pairs of bars, on 64 positions of which 16 can hold an onset here.
        mask = np.zeros(16 * bars)
        mask[onsets] = 1
        mask = mask.reshape(bars, 16)
        differences = [np.mean(mask[i] != mask[j]) for i in range(bars) for j in range(i + 1, bars)]
        theirs = rhythm.grooving_pattern_similarity(path)
        assert 1 - theirs == pytest.approx(np.mean(differences) / 4, abs=1e-9)
        if bars == 2:  # one pair, and it is of neighbours
            assert 1 - ours == pytest.approx(4 * (1 - theirs), abs=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_ngrams_agree_with_smg_metrics_within_an_octave(tmp_path):
    rhythm = pytest.importorskip("smg_metrics.rhythm")
    rng = np.random.default_rng(0)
    for low, high, same in ((60, 64, True), (48, 76, False)):
        score = Score(480)
        score.tracks.append(Track())
        for step, pitch in enumerate(rng.integers(low, high, 400).tolist()):
            score.tracks[0].notes.append(Note(step * 120, 120, pitch, 80))
        score.dump_midi(tmp_path / "melody.mid")
        theirs = 1 - rhythm.ngram_diversity(tmp_path / "melody.mid", n=4)
        ours = repeated_ngrams(notes_from_score(score), n=4)
        # Beyond an octave theirs, of pitch classes, finds more repeats.
        assert ours == pytest.approx(theirs, abs=1e-9) if same else ours < theirs


@pytest.mark.data
@needs_data()
def test_human_performances_repeat_little_and_loops_much():
    for path in sorted((DATA / "piano" / "test").glob("**/*.mid"))[::30]:
        notes = read_notes(path)
        looped = np.concatenate([notes[:50]] * 20)
        looped["onset_s"] += np.repeat(np.arange(20), 50) * (notes["onset_s"][50] - notes["onset_s"][0])
        assert repeated_ngrams(notes) < 0.4 < 0.9 < repeated_ngrams(looped), path
        assert repeated_notes_per_second(notes) < repeated_notes_per_second(looped), path
