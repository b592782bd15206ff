"""Augmented ids are what the tokenizer makes of music so changed, and the grammar accepts them."""

import pickle
import random
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import DATA, band, notes_of, tiny_config
from symusic import Note, Score, Tempo, TimeSignature, Track

from sage_music import MidiGrammarLogitsProcessor, SageMusicTokenizer
from sage_music.augmentation import SageMusicAugmentation

BIN = 8 ** (1 / 63)  # ratio of successive tempo bins: 64 from 30 to 240


class Draws:
    """In place of a Generator: numbers that were chosen. The middle one, 0.5, changes nothing; instruments play on."""

    def __init__(self, transpose=0.5, tempo=0.5, velocity=0.5):
        self.first = np.array([transpose, tempo, velocity])

    def random(self, size: int) -> np.ndarray:
        return self.first if size == 3 else np.ones(size)


@pytest.fixture(scope="module", params=[True, False], ids=["on-change", "every-note"])
def tokenizer(request) -> SageMusicTokenizer:
    return SageMusicTokenizer(program_changes=request.param)


def orchestra(seed: int, bars: int = 12) -> Score:
    """Five instruments that enter and leave, one of them on two tracks; meters and tempos that change, on their bins.

    The last change, of tempo or (odd seeds) of meter, comes after the last note of most instruments.
    """
    rng = random.Random(seed)
    score = Score(480)
    for bar, meter in ((0, (4, 4)), (4, (3, 4)), (8, (6, 8))):
        score.time_signatures.append(TimeSignature(1920 * min(bar, 4) + 1440 * max(bar - 4, 0), *meter))
    end = 4 * 1920 + (bars - 4) * 1440
    for at in (0, 1800, 3 * 1920, 6 * 1920, end - 1440)[: 3 if seed % 2 else 5]:
        score.tempos.append(Tempo(at, 30 * BIN ** rng.randrange(64)))
    for program, is_drum in ((0, False), (0, False), (33, False), (40, False), (73, False), (0, True)):
        track = Track(program=program, is_drum=is_drum)
        begin, stop = sorted(rng.sample(range(0, end, 240), 2))
        for onset in range(begin, stop, 240):
            for pitch in rng.sample(range(40, 80), rng.randrange(3)):
                track.notes.append(Note(onset, rng.choice([120, 240, 720]), pitch, rng.randint(1, 127)))
        track.notes.append(Note(begin, 240, 60, 80))
        score.tracks.append(track)
    return score


def encode(tokenizer, score: Score) -> np.ndarray:
    return np.array([*tokenizer.midi_to_ids(score), tokenizer.eos_token_id], dtype=np.uint16)


def programs(tokenizer, ids) -> set[int]:
    return {int(token.split("_")[1]) for token in tokenizer.base_tokens(ids) if token.startswith("Program_")}


def only(score: Score, kept: set[int]) -> Score:
    score = score.copy()
    score.tracks = type(score.tracks)([t for t in score.tracks if (-1 if t.is_drum else t.program) in kept])
    return score


def crops(tokenizer, ids: np.ndarray, length: int = 300):
    """Crops at every third bar line, cut off in the middle of whatever is there, and the last one with its EOS."""
    lines = np.flatnonzero(ids == tokenizer.get_vocab()["Bar_None"])
    return [tokenizer.crop_ids(ids[: line + length + int(line) % 7], int(line)) for line in lines[::3]]


def assert_grammar(grammar: MidiGrammarLogitsProcessor, ids: np.ndarray):
    """Every token is one that the grammar allows after those before it."""
    row = torch.from_numpy(ids.astype(np.int64))[None]
    wrong = [t for t in range(1, len(ids)) if not grammar.allowed(row[:, :t])[0, row[0, t]]]
    assert not wrong, wrong


# ---- silent instruments


@pytest.mark.parametrize("seed", range(12))
def test_without_instruments_ids_are_those_of_the_score_without_them(tokenizer, seed):
    score = orchestra(seed)
    ids = encode(tokenizer, score)
    augment = SageMusicAugmentation(tokenizer, transpose=0, track_dropout=0.5)
    seen = set()
    for k in range(10):
        out = augment(ids, np.random.default_rng(k))
        kept = programs(tokenizer, out)
        seen.add(frozenset(kept))
        assert out.tolist() == encode(tokenizer, only(score, kept)).tolist()
    assert len(seen) > 3


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="development data is not beside the checkout")
def test_real_music_without_instruments(tokenizer):
    augment = SageMusicAugmentation(tokenizer, transpose=0, track_dropout=0.5)
    fewer = 0
    for path in sorted((DATA / "multitrack" / "test").glob("*.mid"))[::25]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = tokenizer._prepare(Score(path))  # programs by track name told apart first
            ids = encode(tokenizer, score)
            out = augment(ids, np.random.default_rng(1))
            kept = programs(tokenizer, out)
            fewer += kept < programs(tokenizer, ids)
            assert out.tolist() == encode(tokenizer, only(score, kept)).tolist(), path.name
    assert fewer >= 5


def test_one_instrument_stays_and_each_falls_silent_as_often_as_asked(tokenizer):
    ids = encode(tokenizer, band())
    always = SageMusicAugmentation(tokenizer, transpose=0, track_dropout=0.999)
    left = [programs(tokenizer, always(ids, np.random.default_rng(k))) for k in range(300)]
    counts = [sum(kept == {program} for kept in left) for program in (0, 33, -1)]
    assert sum(counts) == 300 and min(counts) > 70
    some = SageMusicAugmentation(tokenizer, transpose=0, track_dropout=0.2)
    left = [programs(tokenizer, some(ids, np.random.default_rng(k))) for k in range(1000)]
    assert all(abs(sum(p not in kept for kept in left) / 1000 - 0.2) < 0.05 for p in (0, 33, -1))


def test_silent_bars_stay_in_a_crop_that_goes_on(tokenizer):
    """Only before EOS are the bars after the last note left out: in a crop that is cut off the music goes on."""
    score = Score(480)
    score.tempos.append(Tempo(0, 120))
    for program, beats in ((0, 4), (40, 16)):
        score.tracks.append(Track(program=program))
        score.tracks[-1].notes.extend([Note(480 * beat, 480, 60, 80) for beat in range(beats)])
    ids = encode(tokenizer, score)
    augment = SageMusicAugmentation(tokenizer, transpose=0, track_dropout=0.6)
    seed = next(s for s in range(99) if programs(tokenizer, augment(ids, np.random.default_rng(s))) == {0})
    ended, cut = (augment(x, np.random.default_rng(seed)) for x in (ids, ids[:-1]))
    assert tokenizer.base_tokens(ended).count("Bar_None") == 1 and ended[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(cut.tolist()).endswith(" ".join(["Bar_None TimeSig_4/4"] * 3))


# ---- pitch, tempo, velocity


@pytest.mark.parametrize("draw, shift", [(0.0, -6), (0.999, 6), (0.6, 1)])
def test_transposition_is_that_of_the_score(tokenizer, draw, shift):
    score = orchestra(3)
    out = SageMusicAugmentation(tokenizer)(encode(tokenizer, score), Draws(transpose=draw))
    for track in score.tracks:
        if not track.is_drum:
            for note in track.notes:
                note.pitch += shift
    assert out.tolist() == encode(tokenizer, score).tolist()


def test_transposition_stays_in_range_and_is_even(tokenizer):
    """A crop with pitches 2 below the highest goes up by 2 at most; all shifts it may have are as likely."""
    score = Score(480)
    for is_drum, pitches in ((False, (125, 100)), (True, (127, 0))):
        score.tracks.append(Track(program=0, is_drum=is_drum))
        score.tracks[-1].notes.extend([Note(480 * i, 480, pitch, 80) for i, pitch in enumerate(pitches)])
    ids = encode(tokenizer, score)
    augment = SageMusicAugmentation(tokenizer, transpose=6)
    shifts = []
    for k in range(900):
        notes = notes_of(tokenizer.decode_midi(augment(ids, np.random.default_rng(k))))
        assert [pitch for program, _, pitch in notes if program < 0] == [127, 0]
        melodic = [pitch for program, _, pitch in notes if program == 0]
        assert melodic[0] - melodic[1] == 25
        shifts.append(melodic[0] - 125)
    values, counts = np.unique(shifts, return_counts=True)
    assert values.tolist() == list(range(-6, 3)) and counts.min() > 60


@pytest.mark.parametrize("bins", [-20, -3, 1, 5, 30])
@pytest.mark.parametrize("seed", range(3))
def test_tempo_is_that_of_the_score(tokenizer, seed, bins):
    """By whole bins, and beyond the range: what is a change no longer, and its Position, is gone."""
    score = orchestra(seed)
    factor = BIN ** abs(bins)
    augment = SageMusicAugmentation(tokenizer, transpose=0, tempo=min(factor - 1, 1))
    ids = encode(tokenizer, score)
    # For factors beyond 2 the log-uniform draw leaves its range.
    reach = np.log(factor) / np.log1p(augment.tempo)
    out = augment(ids, Draws(tempo=0.5 + np.sign(bins) * reach / 2))
    for tempo in score.tempos:
        tempo.qpm = min(max(tempo.qpm * BIN**bins, 30), 240)
    assert out.tolist() == encode(tokenizer, score).tolist()


def test_tempo_is_log_uniform_within_its_range(tokenizer):
    ids = encode(tokenizer, band(bars=1, qpm=100))
    augment = SageMusicAugmentation(tokenizer, transpose=0, tempo=0.2)
    scores = [tokenizer.decode_midi(augment(ids, np.random.default_rng(k))) for k in range(500)]
    tempos = np.log([score.tempos[0].qpm for score in scores]) - np.log(tokenizer.decode_midi(ids).tempos[0].qpm)
    assert abs(np.median(tempos)) < 0.05 and np.abs(tempos).max() <= np.log(1.2) + np.log(BIN) / 2
    assert 0.08 < tempos.std() < 0.13  # of an even spread over +-log 1.2: 0.105


@pytest.mark.parametrize("bins", [-31, -4, 1, 9])
def test_velocity_is_that_of_the_score(tokenizer, bins):
    score = orchestra(5)
    augment = SageMusicAugmentation(tokenizer, transpose=0, velocity=4 * abs(bins))
    out = augment(encode(tokenizer, score), Draws(velocity=0.0 if bins < 0 else 0.999))
    for track in score.tracks:
        for note in track.notes:
            note.velocity = min(max(note.velocity + 4 * bins, 1), 127)
    assert out.tolist() == encode(tokenizer, score).tolist()
    assert min(note.velocity for track in tokenizer.decode_midi(out).tracks for note in track.notes) > 0


# ---- all at once


def test_a_thousand_crops_keep_the_grammar_and_every_note_of_what_plays(tokenizer):
    augment = SageMusicAugmentation(tokenizer, transpose=6, tempo=0.15, velocity=20, track_dropout=0.3)
    grammar = MidiGrammarLogitsProcessor(tiny_config(tokenizer))
    items = [crop for seed in range(12) for crop in crops(tokenizer, encode(tokenizer, orchestra(seed)))]
    shorter = 0
    for k in range(1000):
        ids = items[k % len(items)]
        out = augment(ids, np.random.default_rng((0, 1, k)))
        before, after = (notes_of(tokenizer.decode_midi(x)) for x in (ids, out))
        playing = {program for program, _, _ in after}
        assert playing or not before
        before = [note for note in before if note[0] in playing]
        assert [note[:2] for note in before] == [note[:2] for note in after]
        shifts = {new[2] - old[2] for old, new in zip(before, after, strict=True) if old[0] >= 0}
        assert len(shifts) <= 1 and all(new == old for old, new in zip(before, after, strict=True) if old[0] < 0)
        assert out.dtype == ids.dtype and len(out) <= len(ids) and out[0] == tokenizer.bos_token_id
        shorter += len(out) < len(ids)
        if k % 10 == 0:
            assert_grammar(grammar, out)
    assert 500 < shorter < 900


def test_turning_one_change_off_leaves_the_others(tokenizer):
    ids = encode(tokenizer, band())
    options = {"transpose": 6, "tempo": 0.2, "velocity": 30, "track_dropout": 0.4}
    kinds = {"transpose": "Pitch_", "tempo": "Tempo_", "velocity": "Velocity_", "track_dropout": "Program_"}

    def heard(k, **options):
        tokens = tokenizer.base_tokens(SageMusicAugmentation(tokenizer, **options)(ids, np.random.default_rng(k)))
        return {name: [t for t in tokens if t.startswith(kind)] for name, kind in kinds.items()}

    for k in range(5):
        everything = heard(k, **options)
        for off in ("transpose", "tempo", "velocity"):
            rest = heard(k, **{**options, off: 0})
            assert all(rest[name] == everything[name] for name in kinds if name != off)


def test_it_is_a_pure_function_of_ids_and_generator(tokenizer):
    ids = encode(tokenizer, orchestra(1))
    augment = SageMusicAugmentation(tokenizer, tempo=0.1, velocity=8, track_dropout=0.2)
    assert "track_dropout=0.2" in repr(augment) and len(repr(augment)) < 120
    again = pickle.loads(pickle.dumps(augment))
    given = ids.copy()
    first, second = (f(ids, np.random.default_rng((1, 2, 3))) for f in (augment, again))
    assert again == augment and first.tolist() == second.tolist() and ids.tolist() == given.tolist()
    assert first.tolist() != augment(ids, np.random.default_rng((1, 2, 4))).tolist()
    assert len(pickle.dumps(augment)) < 20_000


def test_all_off_nothing_changes(tokenizer, bpe_tokenizer):
    rng = np.random.default_rng(0)
    for chosen in (tokenizer, bpe_tokenizer):
        ids = encode(chosen, band())
        assert SageMusicAugmentation(chosen, transpose=0)(ids, rng) is ids


@pytest.mark.parametrize(
    "options, message",
    [
        ({"transpose": 25}, "transpose must be a whole number from 0 to 24, not 25"),
        ({"transpose": 2.5}, "transpose"),
        ({"transpose": -1}, "transpose"),
        ({"tempo": 1.5}, "tempo must be from 0 to 1"),
        ({"tempo": float("nan")}, "tempo"),
        ({"velocity": 128}, "velocity"),
        ({"velocity": 3}, "less than one bin"),
        ({"track_dropout": 1}, "track_dropout"),
    ],
)
def test_wrong_arguments_are_named(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        SageMusicAugmentation(tokenizer, **options)


@pytest.mark.parametrize("name", ["transpose", "tempo", "velocity", "track_dropout"])
def test_bpe_is_refused(bpe_tokenizer, name):
    options = {"transpose": 0, name: {"transpose": 3, "velocity": 8}.get(name, 0.5)}
    with pytest.raises(ValueError, match=f"^{name} must be 0 under a BPE vocabulary"):
        SageMusicAugmentation(bpe_tokenizer, **options)


def test_time_for_1024_tokens(tokenizer, capsys):
    ids = encode(tokenizer, band(bars=40))[:1024]
    augment = SageMusicAugmentation(tokenizer, tempo=0.1, velocity=12, track_dropout=0.2)
    times = []
    for k in range(200):
        rng = np.random.default_rng(k)
        start = time.perf_counter()
        augment(ids, rng)
        times.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"\naugmenting 1,024 tokens: {1e3 * np.median(times):.3f} ms")
