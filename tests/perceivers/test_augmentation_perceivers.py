"""Augmented performances are what the tokenizer makes of music so changed; segments keep their notes and targets."""

import pickle
import random
import time
import warnings

import numpy as np
import pytest
from conftest import DATA
from symusic import Note, Score, Tempo, Track

from perceivers import PerceiverSTokenizer
from perceivers.augmentation import PerceiverSAugmentation
from sage_studio.music.notes import NOTE_DTYPE


class Draws:
    """In place of a Generator: numbers that were chosen; 0.5 changes nothing."""

    def __init__(self, transpose=0.5, tempo=0.5, velocity=0.5):
        self.all = np.array([transpose, tempo, velocity])

    def random(self, size: int) -> np.ndarray:
        return self.all[:size]


@pytest.fixture(scope="module", params=["on_change", "after_note_off", "every_note"])
def tokenizer(request) -> PerceiverSTokenizer:
    return PerceiverSTokenizer(velocity_emission=request.param)


def performance(seed: int, notes: int = 300) -> Score:
    """A tick is a millisecond: chords not quite together, runs, keys struck again at once, rests of some seconds."""
    rng = random.Random(seed)
    score = Score(500)
    score.tempos.append(Tempo(0, 120))
    track = Track(program=0)
    now, until = rng.choice([0, 40, 2500]), {}
    while len(track.notes) < notes:
        for pitch in rng.sample(range(30, 100), rng.randint(1, 4)):
            onset = max(now + rng.randrange(4) * 10, until.get(pitch, 0))
            until[pitch] = onset + rng.choice([10, 30, 110, 480, 2100])
            track.notes.append(Note(onset, until[pitch] - onset, pitch, min(max(int(rng.gauss(70, 25)), 1), 127)))
        now += rng.choice([10, 20, 90, 130, 500, 1000, 3700])
    score.tracks.append(track)
    return score


def encode(tokenizer, source) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = tokenizer.midi_to_ids(source)
    return np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16)


def notes_of(tokenizer, ids) -> np.ndarray:
    """Rows of onset, end (steps), pitch, velocity of the decoded notes, by onset, then pitch."""
    notes = tokenizer.decode_midi(ids).tracks[0].notes.numpy()
    rows = np.stack([notes["time"], notes["time"] + notes["duration"], notes["pitch"], notes["velocity"]], 1)
    rows = rows.astype(np.int64) // [10, 10, 1, 1]
    return rows[np.lexsort((rows[:, 2], rows[:, 0]))]


def changed(rows: np.ndarray, factor: float = 1, semitones: int = 0, bins: int = 0) -> np.ndarray:
    """A note array of `notes_of` rows, so many times as fast, moved and louder: what to encode for comparison."""
    notes = np.zeros(len(rows), NOTE_DTYPE)
    notes["onset_s"] = rows[:, 0] / factor / 100
    notes["duration_s"] = rows[:, 1] / factor / 100 - notes["onset_s"]
    notes["pitch"] = rows[:, 2] + semitones
    notes["velocity"] = np.clip(rows[:, 3] + 4 * bins, 1, 127)
    return notes


def counts(ids: np.ndarray) -> list[int]:
    """Note_ons, note_offs and special tokens."""
    return [int(((ids >= low) & (ids < high)).sum()) for low, high in ((0, 128), (128, 256), (388, 391))]


# ---- whole pieces: the ids of the changed music


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tempo, draw", [(0.1, 0.01), (0.1, 0.99), (0.37, 0.9), (1, 0.03), (1, 0.7)])
def test_ids_are_those_of_the_changed_music(tokenizer, seed, tempo, draw):
    ids = encode(tokenizer, performance(seed))
    augment = PerceiverSAugmentation(tokenizer, transpose=5, tempo=tempo, velocity=40)
    out = augment(ids, Draws(0.999, draw, 0.2 * (seed % 4)))
    rows = notes_of(tokenizer, ids)
    semitones = min(5, 108 - rows[:, 2].max())
    factor, bins = (1 + tempo) ** (2 * draw - 1), int(0.2 * (seed % 4) * 21) - 10
    target = changed(rows, factor, semitones, bins)
    apart = len(np.unique(np.stack([np.rint(target["onset_s"] * 100), target["pitch"]]), axis=1).T)
    if apart == len(rows):  # else the tokenizer would make one note of two, where a key is struck again at once
        assert out.tolist() == encode(tokenizer, target).tolist()
    again = notes_of(tokenizer, out)
    assert len(again) == len(rows) and tokenizer.midi_to_ids(tokenizer.decode_midi(out)) == out[:-1].tolist()
    # Times as wanted, whatever came before: what moves a step or two is a key struck again at once.
    error = np.sort(again[:, 0]) - np.sort(target["onset_s"] * 100)
    assert np.abs(error).max() <= 2 and (np.abs(error) <= 0.5 + 1e-6).mean() > 0.95


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="development data is not beside the checkout")
def test_real_performances(tokenizer):
    augment = PerceiverSAugmentation(tokenizer, transpose=6, tempo=0.2, velocity=20)
    for k, path in enumerate(sorted((DATA / "piano" / "test").glob("*.mid"))[::20]):
        ids = encode(tokenizer, path)
        draws = np.random.default_rng(k).random(3)
        out = augment(ids, np.random.default_rng(k))
        rows = notes_of(tokenizer, ids)
        low, high = rows[:, 2].min(), rows[:, 2].max()
        down, up = min(6, max(0, low - 21)), min(6, max(0, 108 - high))
        wanted = changed(
            rows, 1.2 ** (2 * draws[1] - 1), int(draws[0] * (down + up + 1)) - down, int(draws[2] * 11) - 5
        )
        assert out.tolist() == encode(tokenizer, wanted).tolist(), path.name


def test_a_small_piece_by_hand():
    """A second and a half of silence at 1.1 times the tempo; velocities clipped to one bin are said once."""
    tokenizer = PerceiverSTokenizer()
    ids = [390, 355, 305, 385, 60, 386, 64, 265, 188, 192, 388]
    augment = PerceiverSAugmentation(tokenizer, transpose=0, tempo=0.1, velocity=20)
    faster = augment(np.array(ids), Draws(tempo=1.0))
    assert faster.tolist() == [390, 355, 291, 385, 60, 386, 64, 264, 188, 192, 388]  # 136.4 steps, then to 145.5
    louder = augment(np.array(ids), Draws(velocity=0.999))
    assert louder.tolist() == [390, 355, 305, 387, 60, 64, 265, 188, 192, 388]


def test_errors_do_not_add_up():
    """A thousand gaps of 10 steps at 1.06 times the tempo: each is 9.43 steps, all of them 9,434."""
    tokenizer = PerceiverSTokenizer()
    ids = np.array([390, 371, *[60, 260, 188, 260] * 1000])
    out = PerceiverSAugmentation(tokenizer, transpose=0, tempo=0.06)(ids, Draws(tempo=1.0))
    onsets = notes_of(tokenizer, out)[:, 0]
    assert np.abs(onsets - np.arange(1000) * 10 / 1.06).max() <= 0.5


def test_a_key_struck_again_at_once_is_still_struck_twice():
    """At twice the tempo three notes of 10 ms would fall into two steps; each keeps a step."""
    tokenizer = PerceiverSTokenizer()
    ids = encode(tokenizer, changed(np.array([[0, 1, 60, 80], [1, 2, 60, 80], [2, 3, 60, 80], [40, 50, 60, 80]])))
    out = PerceiverSAugmentation(tokenizer, transpose=0, tempo=1)(ids, Draws(tempo=1.0))
    assert notes_of(tokenizer, out)[:, :2].tolist() == [[0, 1], [1, 2], [2, 3], [20, 25]]


# ---- ranges


def test_transposition_stays_on_the_piano_and_is_even():
    tokenizer = PerceiverSTokenizer()
    ids = encode(tokenizer, changed(np.array([[0, 9, 23, 80], [0, 9, 90, 80]])))
    augment = PerceiverSAugmentation(tokenizer, transpose=6)
    shifts = [int(augment(ids, np.random.default_rng(k))[2]) - 23 for k in range(900)]
    values, found = np.unique(shifts, return_counts=True)
    assert values.tolist() == list(range(-2, 7)) and found.min() > 60
    # A note_off whose note began before the segment counts as well; what is off the piano moves no farther out.
    generators = [np.random.default_rng(k) for k in range(99)]
    assert {int(augment(np.array([128 + 108, 60]), rng)[1]) for rng in generators} == set(range(54, 61))
    assert {int(augment(np.array([110, 128 + 110]), rng)[0]) for rng in generators} == set(range(104, 111))


def test_tempo_is_log_uniform_and_velocity_even():
    tokenizer = PerceiverSTokenizer()
    ids = encode(tokenizer, changed(np.array([[0, 10_000, 60, 80]])))
    augment = PerceiverSAugmentation(tokenizer, transpose=0, tempo=0.25, velocity=11)
    rows = np.concatenate([notes_of(tokenizer, augment(ids, np.random.default_rng(k))) for k in range(900)])
    tempos = np.log(10_000 / rows[:, 1]) / np.log(1.25)
    assert np.abs(tempos).max() <= 1.001 and abs(tempos.mean()) < 0.06 and abs(tempos.std() - 3**-0.5) < 0.03
    values, found = np.unique(rows[:, 3], return_counts=True)
    assert values.tolist() == [70, 74, 78, 82, 86] and found.min() > 130


# ---- segments


@pytest.mark.parametrize("seed", range(5))
def test_a_segment_goes_as_the_piece_goes(tokenizer, seed):
    """Cut anywhere, a segment is the beginning of the augmented piece: its last tokens are right as labels too."""
    ids = encode(tokenizer, performance(seed, notes=60))
    for tempo, draw in ((0.2, 0.0), (1, 0.3), (0, 0.5)):
        augment = PerceiverSAugmentation(tokenizer, transpose=0, tempo=tempo, velocity=60)
        draws = Draws(tempo=draw, velocity=0.2 * seed)
        whole = augment(ids, draws)
        for end in range(2, len(ids) + 1):
            part = augment(ids[:end], draws)
            if len(part) == end and part.tolist() == ids[:end].tolist():
                continue  # a silence of which nothing else would be sure to be left
            assert part.tolist() == whole[: len(part)].tolist(), (tempo, end)
    # Faster: but for the order of what falls together with the unseen.
    augment = PerceiverSAugmentation(tokenizer, transpose=0, tempo=0.1)
    whole = augment(ids, Draws(tempo=1.0))
    parts = [augment(ids[:end], Draws(tempo=1.0)) for end in range(2, len(ids) + 1)]
    assert sum(part.tolist() != whole[: len(part)].tolist() for part in parts) < 0.2 * len(parts)


def test_a_silence_cut_off_keeps_only_what_is_sure():
    tokenizer = PerceiverSTokenizer()
    augment = PerceiverSAugmentation(tokenizer, transpose=0, tempo=0.1)
    faster, slower = Draws(tempo=1.0), Draws(tempo=0.0)
    assert augment(np.array([371, 60, 355, 355]), faster).tolist() == [371, 60, 355]  # 181.8 steps or more
    assert augment(np.array([371, 60, 355, 355]), slower).tolist() == [371, 60, 355, 355]  # 220 or more
    assert augment(np.array([371, 60, 355, 300]), faster).tolist() == [371, 60, 355, 287]  # exactly 131.8
    assert augment(np.array([390, 355]), faster).tolist() == [390, 355]  # two tokens stay two


def test_a_thousand_segments_keep_all_notes(tokenizer):
    pieces = [encode(tokenizer, performance(seed)) for seed in range(10)]
    augment = PerceiverSAugmentation(tokenizer, transpose=6, tempo=0.2, velocity=20)
    rng, longer, shorter = random.Random(0), 0, 0
    for k in range(1000):
        piece = pieces[k % len(pieces)]
        begin = rng.choice([0, rng.randrange(len(piece) - 2)])
        ids = piece[begin : rng.choice([len(piece), rng.randrange(begin + 2, len(piece) + 1)])]
        out = augment(ids, np.random.default_rng((0, 0, k)))
        assert len(out) >= 2 and out.dtype == ids.dtype and counts(out) == counts(ids)
        before, after = notes_of(tokenizer, ids), notes_of(tokenizer, out)
        assert len(before) == len(after) and (after[:, 1] > after[:, 0]).all()
        longer, shorter = longer + (len(out) > len(ids)), shorter + (len(out) < len(ids))
        # A pitch's notes follow each other as they did, all moved by as much.
        if len(before):
            pitches, moved = (np.unique(rows[:, 2], return_counts=True) for rows in (before, after))
            assert (pitches[1] == moved[1]).all() and len(set(moved[0] - pitches[0])) == 1
    assert longer > 100 and shorter > 100


# ---- the callable


def test_turning_one_change_off_leaves_the_others():
    tokenizer = PerceiverSTokenizer()
    ids = encode(tokenizer, performance(0))
    options = {"transpose": 6, "tempo": 0.1, "velocity": 12}

    def heard(seed, **options):
        rows = notes_of(tokenizer, PerceiverSAugmentation(tokenizer, **options)(ids, np.random.default_rng(seed)))
        return {"transpose": np.sort(rows[:, 2]), "tempo": np.sort(rows[:, 1]), "velocity": np.sort(rows[:, 3])}

    for seed in range(5):
        everything = heard(seed, **options)
        for off in options:
            rest = heard(seed, **{**options, off: 0})
            assert all((rest[name] == everything[name]).all() for name in options if name != off)


def test_it_is_a_pure_function_of_ids_and_generator(tokenizer):
    ids = encode(tokenizer, performance(2))
    augment = PerceiverSAugmentation(tokenizer, tempo=0.1, velocity=8)
    assert repr(augment) == "PerceiverSAugmentation(transpose=6, tempo=0.1, velocity=8)"
    again, given = pickle.loads(pickle.dumps(augment)), ids.copy()
    first, second = (f(ids, np.random.default_rng((1, 2, 3))) for f in (augment, again))
    assert again == augment and first.tolist() == second.tolist() and ids.tolist() == given.tolist()
    assert first.tolist() != augment(ids, np.random.default_rng((1, 2, 4))).tolist()
    assert len(pickle.dumps(augment)) < 1000


def test_all_off_nothing_changes(tokenizer):
    ids, rng = encode(tokenizer, performance(1)), np.random.default_rng(0)
    assert PerceiverSAugmentation(tokenizer, transpose=0)(ids, rng) is ids
    augment = PerceiverSAugmentation(tokenizer, transpose=6, tempo=0.2, velocity=20)
    assert augment(ids, Draws()).tolist() == ids.tolist()
    only_special = np.array([tokenizer.bos_token_id, tokenizer.eos_token_id])
    assert augment(only_special, rng).tolist() == only_special.tolist()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"transpose": 25}, "transpose must be a whole number from 0 to 24, not 25"),
        ({"transpose": 0.5}, "transpose"),
        ({"tempo": -0.1}, "tempo must be from 0 to 1"),
        ({"tempo": float("nan")}, "tempo"),
        ({"velocity": 200}, "velocity"),
        ({"velocity": 3}, "less than one bin"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PerceiverSAugmentation(PerceiverSTokenizer(), **options)


def test_two_pieces_at_once_are_refused():
    with pytest.raises(ValueError, match="one piece at a time"):
        PerceiverSAugmentation(PerceiverSTokenizer())(np.array([390, 60, 388, 390, 60]), np.random.default_rng(0))


def test_time_for_8192_tokens(capsys):
    tokenizer = PerceiverSTokenizer()
    ids = encode(tokenizer, performance(0, notes=4000))[:8192]
    augment = PerceiverSAugmentation(tokenizer, tempo=0.1, velocity=12)
    times = []
    for k in range(50):
        rng = np.random.default_rng(k)
        start = time.perf_counter()
        augment(ids, rng)
        times.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f"\naugmenting 8,192 tokens: {1e3 * np.median(times):.2f} ms")
