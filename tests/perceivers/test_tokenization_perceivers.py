"""Performances to tokens and back: ids by hand, the pedal, the clock, every option, real recordings."""

import random
import warnings

import numpy as np
import pytest
import torch
from conftest import DATA, needs_data
from symusic import ControlChange, Note, Score, Tempo, Track

from perceivers.tokenization_perceivers import PerceiverSTokenizer
from sage_studio.music.midi import read_notes, score_from_notes, tick_to_seconds
from sage_studio.music.notes import NOTE_DTYPE, note_array

OTHER = {"velocity_offset": 0, "end_token": False, "bos": False}


@pytest.fixture(scope="module")
def tokenizer() -> PerceiverSTokenizer:
    return PerceiverSTokenizer()


def piano(notes, pedal=()) -> Score:
    """`(onset ms, end ms, pitch, velocity)` and `(ms, CC64 value)` as a score of one tick a millisecond."""
    score = Score(500)
    score.tempos.append(Tempo(0, 120))
    track = Track(program=0)
    track.notes.extend([Note(on, off - on, pitch, velocity) for on, off, pitch, velocity in notes])
    track.controls.extend([ControlChange(time, 64, value) for time, value in pedal])
    score.tracks.append(track)
    return score


def heard(score: Score) -> list[tuple[int, int, int, int]]:
    """Every note of a decoded score as `piano` takes it, sorted."""
    assert len(score.tracks) == 1 and score.ticks_per_quarter == 500 and score.tempos[0].qpm == 120
    return sorted((n.time, n.time + n.duration, n.pitch, n.velocity) for n in score.tracks[0].notes)


def through(tokenizer, score: Score) -> list[tuple[int, int, int]]:
    """Onset, end and pitch of the notes of a score after encoding and decoding."""
    return [note[:3] for note in heard(tokenizer.decode_midi(tokenizer.midi_to_ids(score)))]


def random_ids(seed: int, steps: int = 300) -> list[int]:
    """Canonical ids without BOS, drawn move by move: note_offs upwards, then note_ons upwards, then time."""
    rng = random.Random(seed)
    ids, sounding, bin_now = [], set(), None
    for step in range(steps):
        last = step == steps - 1
        offs = [p for p in sorted(sounding) if last or rng.random() < 0.4]
        ons = [] if last else sorted(p for p in rng.sample(range(128), 4) if p not in sounding or p in offs)
        ids += [128 + p for p in offs]
        sounding -= set(offs)
        for pitch in ons:
            bin = rng.choice([bin_now or 0, rng.randrange(32)])
            ids += [356 + bin] * (bin != bin_now) + [pitch]
            bin_now = bin
        sounding |= set(ons)
        gap = rng.choice([1, 7, 99, 100, 101, 200, 345])
        if (offs or ons) and not last:
            ids += [355] * (gap // 100) + [255 + gap % 100] * (gap % 100 > 0)
    return ids


# ---- ids by hand

GOLDEN = piano(
    [(0, 500, 60, 64), (500, 600, 64, 64), (500, 550, 67, 100), (2610, 2620, 60, 99)], [(300, 127), (1000, 0)]
)
GOLDEN_IDS = [
    *(390, 371, 60),  # BOS; bin (64 - 1) // 4 = 15; middle C, held by the pedal from 0.3 s to 1 s
    *(305, 64, 380, 67),  # 0.5 s later a third: E of the same bin, G of bin (100 - 1) // 4 = 24
    *(305, 188, 192, 195),  # 0.5 s later the pedal rises and ends all three
    *(355, 316, 60),  # 1.61 s later: a full second, 61 steps; 99 is of bin 24 as well
    *(256, 188),
]


def test_a_small_piece_has_the_ids_written_by_hand(tokenizer):
    assert tokenizer.midi_to_ids(GOLDEN) == GOLDEN_IDS
    assert tokenizer.midi_to_ids(GOLDEN, add_special_tokens=False) == GOLDEN_IDS[1:]
    assert heard(tokenizer.decode_midi(GOLDEN_IDS)) == [
        (0, 1000, 60, 62),
        (500, 1000, 64, 62),
        (500, 1000, 67, 98),
        (2610, 2620, 60, 98),
    ]
    assert tokenizer.decode(GOLDEN_IDS[:6]) == "BOS VELOCITY_15 NOTE_ON_60 TIME_SHIFT_500 NOTE_ON_64 VELOCITY_24"


def test_without_the_pedal_durations_are_as_written():
    tokenizer = PerceiverSTokenizer(fold_pedal=False)
    expected = [390, 371, 60, 305, 188, 64, 380, 67, 260, 195, 260, 192, 355, 355, 256, 60, 256, 188]
    assert tokenizer.midi_to_ids(GOLDEN) == expected


def test_the_other_vocabularies_ids():
    """388 ids of events, then only PAD; or token_end and PAD; velocities in bins of v // 4."""
    closed = PerceiverSTokenizer(**OTHER)
    assert (closed.vocab_size, closed.eos_token_id, closed.pad_token_id, closed.bos_token_id) == (389, None, 388, None)
    assert closed.midi_to_ids(GOLDEN)[:5] == [372, 60, 305, 64, 381]
    without_bos = PerceiverSTokenizer(bos=False)
    assert (without_bos.vocab_size, without_bos.eos_token_id, without_bos.pad_token_id) == (390, 388, 389)
    assert without_bos.midi_to_ids(GOLDEN) == GOLDEN_IDS[1:]


def test_velocity_emission():
    notes = [(0, 100, 60, 64), (0, 200, 64, 64), (100, 300, 65, 64), (150, 300, 67, 64), (150, 300, 69, 80)]
    ids = {kind: PerceiverSTokenizer(velocity_emission=kind).midi_to_ids(piano(notes)) for kind in
           ("on_change", "after_note_off", "every_note")}  # fmt: skip
    end = [260, 192, 265, 193, 195, 197]
    assert ids["on_change"] == [390, 371, 60, 64, 265, 188, 65, 260, 67, 375, 69, *end]
    assert ids["after_note_off"] == [390, 371, 60, 64, 265, 188, 371, 65, 260, 67, 375, 69, *end]
    assert ids["every_note"] == [390, 371, 60, 371, 64, 265, 188, 371, 65, 260, 371, 67, 375, 69, *end]


@pytest.mark.parametrize("offset", [0, 1])
def test_velocities_come_back_in_their_bin(offset):
    tokenizer = PerceiverSTokenizer(velocity_offset=offset)
    score = piano([(20 * v, 20 * v + 10, 60, v) for v in range(1, 128)])
    again = np.array([note[3] for note in heard(tokenizer.decode_midi(tokenizer.midi_to_ids(score)))])
    bins = (np.arange(1, 128) - offset) // 4
    assert again.tolist() == (4 * bins + offset + 1).tolist()
    assert ((again - offset) // 4 == bins).all()


# ---- the pedal, and one key per pitch


@pytest.mark.parametrize(
    "notes, pedal, expected",
    [
        pytest.param([(0, 100, 60)], [(50, 64), (400, 63)], [(0, 400, 60)], id="to the pedal's rise"),
        pytest.param([(0, 100, 60)], [(50, 63), (400, 0)], [(0, 100, 60)], id="63 is up"),
        pytest.param([(0, 100, 60)], [(50, 127), (80, 0)], [(0, 100, 60)], id="up again before the key is"),
        pytest.param([(0, 100, 60)], [(150, 127), (400, 0)], [(0, 100, 60)], id="down too late"),
        pytest.param([(0, 100, 60)], [(50, 127), (90, 70), (300, 10), (400, 0)], [(0, 300, 60)], id="half pedals"),
        pytest.param(
            [(0, 100, 60), (200, 250, 60)], [(50, 127), (400, 0)], [(0, 200, 60), (200, 400, 60)], id="struck again"
        ),
        pytest.param([(0, 100, 60), (0, 900, 48)], [(50, 127)], [(0, 900, 48), (0, 900, 60)], id="never rises"),
        pytest.param(
            [(0, 100, 60), (500, 510, 62)],
            [(50, 127), (300, 0), (505, 127), (700, 0)],
            [(0, 300, 60), (500, 700, 62)],
            id="twice",
        ),
        pytest.param([(0, 500, 60)], [(50, 127), (500, 0)], [(0, 500, 60)], id="both rise together"),
        pytest.param([(0, 100, 60)], [(100, 127), (400, 0)], [(0, 400, 60)], id="down as the key rises"),
    ],
)
def test_the_pedal_is_folded_in(tokenizer, notes, pedal, expected):
    assert through(tokenizer, piano([(*note, 80) for note in notes], pedal)) == expected


def test_a_pedal_holds_its_own_track(tokenizer):
    score = piano([(0, 100, 72, 80)])
    score.tracks.append(piano([(0, 100, 60, 80)], [(50, 127), (400, 0)]).tracks[0])
    with pytest.warns(UserWarning, match="2 tracks"):
        assert through(tokenizer, score) == [(0, 100, 72), (0, 400, 60)]


def test_the_pedal_follows_tempo_changes(tokenizer):
    score = piano([(0, 100, 60, 80)], [(50, 127), (1000, 0)])
    score.tempos.append(Tempo(500, 60))
    assert through(tokenizer, score) == [(0, 1500, 60)]


def test_a_key_struck_again_ends_the_earlier_note(tokenizer):
    assert through(tokenizer, piano([(0, 900, 60, 80), (300, 500, 60, 80)])) == [(0, 300, 60), (300, 500, 60)]


def test_short_notes_last_one_step(tokenizer):
    assert through(tokenizer, piano([(0, 0, 60, 80), (100, 103, 62, 80)])) == [(0, 10, 60), (100, 110, 62)]


def test_a_key_struck_twice_in_a_step_is_one_note(tokenizer):
    score = piano([(100, 200, 60, 40), (103, 400, 60, 90), (500, 600, 62, 80)])
    with pytest.warns(UserWarning, match=r"<score>.*: 1$"):
        ids = tokenizer.midi_to_ids(score)
    assert heard(tokenizer.decode_midi(ids)) == [(100, 400, 60, 90), (500, 600, 62, 78)]


# ---- the clock


def chain(count: int = 2000, step_ms: int = 13) -> Score:
    return piano([(step_ms * k, step_ms * (k + 1), 40 + k % 40, 80) for k in range(count)])


def test_absolute_rounding_does_not_drift_and_delta_does():
    worst = {}
    for kind in ("absolute", "delta"):
        tokenizer = PerceiverSTokenizer(time_rounding=kind)
        notes = heard(tokenizer.decode_midi(tokenizer.midi_to_ids(chain())))
        assert len(notes) == 2000
        worst[kind] = max(abs(note[0] - 13 * k) for k, note in enumerate(notes))
    assert worst["absolute"] <= 5
    assert worst["delta"] == 3 * 1999  # 13 ms rounds to 10


def test_onsets_after_half_an_hour_of_tempo_changes_are_right(tokenizer):
    rng = random.Random(0)
    score = Score(480)
    score.tempos.extend([Tempo(480 * k, rng.uniform(40, 200)) for k in range(4000)])
    score.tracks.append(Track(program=0))
    score.tracks[0].notes.extend([Note(480 * k + 111, 200, 40 + k % 40, 80) for k in range(4000)])
    onsets = np.array([note[0] for note in heard(tokenizer.decode_midi(tokenizer.midi_to_ids(score)))])
    truth = 1000 * tick_to_seconds(score, 480 * np.arange(4000) + 111)
    assert truth[-1] > 30 * 60 * 1000
    assert np.abs(onsets - truth).max() < 5.01


def test_leading_silence_is_kept(tokenizer):
    assert tokenizer.midi_to_ids(piano([(2500, 2600, 60, 80)]))[:4] == [390, 355, 355, 305]


def test_seconds_cut_a_piece_and_leave_what_sounds(tokenizer):
    notes = [(0, 100, 60, 80), (300, 900, 62, 80), (500, 700, 64, 80)]
    assert tokenizer.midi_to_ids(piano(notes), seconds=0.5) == [390, 375, 60, 265, 188, 275, 62]
    assert tokenizer.midi_to_ids(piano(notes), seconds=0.501)[-2:] == [275, 64]
    assert tokenizer.midi_to_ids(piano(notes), seconds=99) == tokenizer.midi_to_ids(piano(notes))
    assert tokenizer.midi_to_ids(piano(notes[1:]), seconds=0.1) == [390]
    at = piano([(70, 80, 60, 80)])  # 0.07 * 100 is 7.000000000000001
    assert tokenizer.midi_to_ids(at, seconds=0.07) == [390]


# ---- round trips


@pytest.mark.parametrize("seed", range(5))
def test_canonical_ids_come_back(tokenizer, seed):
    ids = random_ids(seed)
    assert len(ids) > 500
    assert tokenizer.midi_to_ids(tokenizer.decode_midi(ids), add_special_tokens=False) == ids
    through_a_file = tokenizer.decode_midi(ids).dumps_midi()
    assert tokenizer.midi_to_ids(through_a_file, add_special_tokens=False) == ids


def test_any_ids_decode(tokenizer):
    ids = torch.randint(0, tokenizer.vocab_size, (20_000,), generator=torch.Generator().manual_seed(0))
    notes = heard(tokenizer.decode_midi(ids))
    assert len(notes) > 1000 and all(end - onset >= 10 for onset, end, _, _ in notes)
    assert through(tokenizer, tokenizer.decode_midi(ids)) == [note[:3] for note in notes]
    assert tokenizer.decode_midi([]).note_num() == 0
    assert tokenizer.decode_midi([390, 389, 388]).note_num() == 0


def test_how_odd_ids_decode(tokenizer):
    def decoded(*ids):
        return heard(tokenizer.decode_midi(ids))

    assert decoded(60, 265, 188) == [(0, 100, 60, 64)]  # no velocity yet: 64
    assert decoded(188, 265, 60, 265, 188) == [(100, 200, 60, 64)]  # a note_off of a silent key
    assert decoded(60, 265) == [(0, 100, 60, 64)] and decoded(60) == [(0, 10, 60, 64)]  # still sounding at the end
    assert decoded(60, 265, 60, 265, 188) == [(0, 100, 60, 64), (100, 200, 60, 64)]  # struck again
    assert decoded(60, 188, 265) == [(0, 10, 60, 64)]  # no length
    assert decoded(60, 356, 60, 265, 188) == [(0, 100, 60, 2)]  # twice in one step


def test_all_sources_give_the_same_ids(tokenizer, tmp_path):
    path = tmp_path / "golden.mid"
    GOLDEN.dump_midi(path)
    for source in (path, str(path), path.read_bytes(), GOLDEN, GOLDEN.to("second"), GOLDEN.to("quarter")):
        assert tokenizer.midi_to_ids(source) == GOLDEN_IDS
    held = [(0, 1, 60, 64, 0, 0), (0.5, 0.5, 64, 64, 0, 0), (0.5, 0.5, 67, 100, 0, 0), (2.61, 0.01, 60, 99, 0, 0)]
    notes = note_array(held)
    assert tokenizer.midi_to_ids(notes) == GOLDEN_IDS
    assert tokenizer.midi_to_ids(notes[["onset_s", "duration_s", "pitch", "velocity", "program"]]) == GOLDEN_IDS


def test_ids_are_taken_as_list_array_or_tensor(tokenizer):
    expected = heard(tokenizer.decode_midi(GOLDEN_IDS))
    for ids in (tuple(GOLDEN_IDS), np.array(GOLDEN_IDS), np.array(GOLDEN_IDS, np.uint16), torch.tensor(GOLDEN_IDS)):
        assert heard(tokenizer.decode_midi(ids)) == expected


def test_transposition(tokenizer):
    ids = tokenizer.transpose_ids(np.array(GOLDEN_IDS), -5)
    assert heard(tokenizer.decode_midi(ids)) == [
        (on, off, pitch - 5, velocity) for on, off, pitch, velocity in heard(tokenizer.decode_midi(GOLDEN_IDS))
    ]
    assert tokenizer.midi_to_ids(tokenizer.decode_midi(ids)) == ids.tolist()
    for semitones in (61, -61):
        with pytest.raises(ValueError, match="range"):
            tokenizer.transpose_ids(GOLDEN_IDS, semitones)


def test_miditok_hears_the_same(tokenizer):
    """MidiTok counts beats: at 60 beats a minute and 100 positions a beat, its MIDILike has this grid."""
    from miditok import MIDILike, TokenizerConfig

    rng = np.random.default_rng(0)
    notes = np.zeros(600, dtype=NOTE_DTYPE)
    notes["onset_s"] = np.sort(rng.uniform(0, 120, 600))
    notes["pitch"], notes["velocity"] = 30 + np.arange(600) % 60, rng.integers(1, 128, 600)
    notes["duration_s"] = rng.uniform(0.02, 2.0, 600)
    # A note of MidiTok's ends with the key's first note_off: no key may be struck while it sounds.
    gap = np.minimum(notes["onset_s"][60:] - notes["onset_s"][:-60] - 0.02, notes["duration_s"][:-60])
    notes["duration_s"][:-60] = np.maximum(gap, 0.02)
    retimed = score_from_notes(notes, qpm=60, ticks_per_quarter=100)
    config = TokenizerConfig(pitch_range=(0, 127), beat_res={(0, 10): 100}, num_velocities=32, special_tokens=["PAD"])
    miditok = MIDILike(config)
    peer = miditok.decode(miditok.encode(retimed)).resample(100)
    theirs = sorted((10 * n.time, 10 * n.end, n.pitch, n.velocity) for n in peer.tracks[0].notes)
    ours = heard(tokenizer.decode_midi(tokenizer.midi_to_ids(notes)))
    assert [n[:3] for n in ours] == [n[:3] for n in theirs] and len(ours) == 600
    assert max(abs(a[3] - b[3]) for a, b in zip(ours, theirs, strict=True)) <= 6  # two grids of 32 bins


# ---- as a Transformers tokenizer


def test_text_round_trip(tokenizer):
    text = "BOS VELOCITY_31 NOTE_ON_0 TIME_SHIFT_10 TIME_SHIFT_1000 NOTE_OFF_0 token_end PAD"
    ids = tokenizer(text)["input_ids"]
    assert ids == [390, 387, 0, 256, 355, 128, 388, 389]
    assert tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="TIME_SHIFT_15"):
        tokenizer("TIME_SHIFT_15")


def test_a_batch_is_padded_on_the_left(tokenizer):
    batch = tokenizer.pad({"input_ids": [[390, 371, 60], [390, 371, 60, 305, 188]]}, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [389, 389, 390, 371, 60]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1] * 5]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fold_pedal": False, "time_rounding": "delta", "velocity_emission": "after_note_off", **OTHER},
        {"velocity_emission": "every_note", "bos": False},
        {"end_token": False},
    ],
)
def test_saved_and_loaded_it_gives_identical_ids(options, tmp_path):
    chosen = PerceiverSTokenizer(**options)
    chosen.save_pretrained(tmp_path)
    again = PerceiverSTokenizer.from_pretrained(tmp_path)
    assert again.config_fields() == chosen.config_fields() and again.get_vocab() == chosen.get_vocab()
    assert len(again) == again.vocab_size == len(set(again.get_vocab().values()))
    assert again.padding_side == "left"
    for score in (GOLDEN, chain(50)):
        assert again.midi_to_ids(score) == chosen.midi_to_ids(score)


def test_config_fields(tokenizer):
    assert tokenizer.config_fields() == {
        "vocab_size": 391,
        "pad_token_id": 389,
        "bos_token_id": 390,
        "eos_token_id": 388,
        "grammar": {
            "note_on": [0, 128],
            "note_off": [128, 256],
            "time_shift": [256, 356],
            "velocity": [356, 388],
            "step_s": 0.01,
        },
    }


# ---- what is said, what is refused


def with_program(score: Score, program: int, drum: bool = False) -> Score:
    score.tracks[0].program, score.tracks[0].is_drum = program, drum
    return score


def test_instruments_become_one_piano_and_say_so(tokenizer):
    score = piano([(0, 100, 60, 80)])
    score.tracks.append(with_program(piano([(0, 100, 64, 80)]), 40).tracks[0])
    with pytest.warns(UserWarning, match="2 instruments are played as one piano") as caught:
        assert through(tokenizer, score) == [(0, 100, 60), (0, 100, 64)]
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="program 40, is played as a piano"):
        tokenizer.midi_to_ids(with_program(piano([(0, 100, 60, 80)]), 40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.midi_to_ids(with_program(piano([(0, 100, 60, 80)]), 4))


def test_drums_are_left_out_and_said(tokenizer):
    score = piano([(0, 100, 60, 80)])
    score.tracks.append(with_program(piano([(0, 100, 36, 80)]), 0, drum=True).tracks[0])
    with pytest.warns(UserWarning, match="1 drum notes are left out") as caught:
        assert through(tokenizer, score) == [(0, 100, 60)]
    assert len(caught) == 1
    with pytest.raises(ValueError, match="drums"):
        tokenizer.midi_to_ids(with_program(piano([(0, 100, 36, 80)]), 0, drum=True))
    notes = note_array([(0.0, 0.5, 60, 100, 0, 0), (0.5, 0.25, 36, 90, -1, 1)])
    with pytest.warns(UserWarning, match="drum"):
        assert tokenizer.midi_to_ids(notes) == [390, 380, 60, 305, 188]


def test_an_impossible_tempo_is_ignored_and_said(tokenizer):
    score = piano([(0, 100, 60, 80), (600, 700, 62, 80)])
    data = bytearray(score.dumps_midi())
    at = data.index(b"\xff\x51\x03") + 3
    data[at : at + 3] = b"\0\0\0"
    with pytest.warns(UserWarning, match="tempo of 0"):
        assert through(tokenizer, bytes(data)) == [(0, 100, 60), (600, 700, 62)]


JUNK = {
    "empty": b"",
    "text": b"hello world, this is no MIDI file at all",
    "header": b"MThd\0\0\0\6\0\1\0\0\1\xe0",
    "cut": GOLDEN.dumps_midi()[:-7],
    "frames": GOLDEN.dumps_midi()[:12] + b"\xe7\x28" + GOLDEN.dumps_midi()[14:],
    "silent": piano([]).dumps_midi(),
    "drums": with_program(piano([(0, 100, 36, 80)]), 0, drum=True).dumps_midi(),
    "endless": piano([(0, 100, 60, 80), (10**8, 10**8 + 100, 60, 80)]).dumps_midi(),
}


@pytest.mark.parametrize("kind", list(JUNK))
def test_unreadable_music_names_the_file(tokenizer, tmp_path, kind):
    path = tmp_path / f"{kind}.mid"
    path.write_bytes(JUNK[kind])
    with pytest.raises(ValueError, match=rf"{kind}\.mid"):
        tokenizer.midi_to_ids(path)
    with pytest.raises(ValueError, match="<bytes>"):
        tokenizer.midi_to_ids(JUNK[kind])


def test_wrong_inputs_are_named(tokenizer):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mid"):
        tokenizer.midi_to_ids("nowhere.mid")
    with pytest.raises(ValueError, match="int"):
        tokenizer.midi_to_ids(5)
    for ids in ([1, 391], [-1]):
        with pytest.raises(ValueError, match=str(ids[-1])):
            tokenizer.decode_midi(ids)
    for batch in ([[1, 3]], torch.zeros(2, 3, dtype=torch.long), torch.tensor(3)):
        with pytest.raises(ValueError, match="one sequence"):
            tokenizer.decode_midi(batch)
    with pytest.raises(ValueError, match="whole numbers"):
        tokenizer.decode_midi([0.5])
    with pytest.raises(ValueError, match="velocity"):
        tokenizer.midi_to_ids(np.zeros(3, dtype=[("pitch", "i2")]))
    for field, value in (("onset_s", -1.0), ("onset_s", np.nan), ("duration_s", np.inf), ("pitch", 128)):
        notes = note_array([(0.0, 0.5, 60, 100, 0, 0)])
        notes[field] = value
        with pytest.raises(ValueError, match="<array>"):
            tokenizer.midi_to_ids(notes)
    for option in ({"time_rounding": "relative"}, {"velocity_emission": "never"}, {"velocity_offset": 2}):
        with pytest.raises(ValueError, match=next(iter(option))):
            PerceiverSTokenizer(**option)


# ---- real recordings


def struck(notes: np.ndarray) -> np.ndarray:
    """Notes by pitch and onset, each ended where its key is struck again."""
    notes = notes[np.lexsort((notes["onset_s"], notes["pitch"]))].copy()
    until = np.where(notes["pitch"][1:] == notes["pitch"][:-1], np.diff(notes["onset_s"]), np.inf)
    notes["duration_s"][:-1] = np.minimum(notes["duration_s"][:-1], until)
    return notes


@pytest.mark.data
@needs_data()
def test_every_note_of_the_test_split_survives(capsys):
    """Onset and end within the 10 ms grid, velocities within their bins, no note lost but merged doubles."""
    tokenizer, lengths = PerceiverSTokenizer(fold_pedal=False), []
    onset, duration, velocity, total, merged = [], [], [], 0, 0
    files = sorted((DATA / "piano" / "test").glob("*.mid"))
    for path in files:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ids = tokenizer.midi_to_ids(path)
        doubled = sum(int(str(w.message).split(": ")[-1]) for w in caught if "struck twice" in str(w.message))
        truth, again = struck(read_notes(path)), struck(read_notes(tokenizer.decode_midi(ids).dumps_midi()))
        assert len(again) == len(truth) - doubled, path.name
        assert tokenizer.midi_to_ids(tokenizer.decode_midi(ids)) == ids
        total, merged, lengths = total + len(truth), merged + doubled, [*lengths, len(ids)]
        if doubled:  # of a merged pair, the one that is left is compared with each
            keys = again["pitch"] * 1e6 + again["onset_s"]
            at = np.searchsorted(keys, truth["pitch"] * 1e6 + truth["onset_s"]).clip(1, len(again) - 1)
            wanted = truth["pitch"] * 1e6 + truth["onset_s"]
            again = again[np.where(np.abs(keys[at - 1] - wanted) <= np.abs(keys[at] - wanted), at - 1, at)]
        assert (again["pitch"] == truth["pitch"]).all()
        onset.append(np.abs(again["onset_s"] - truth["onset_s"]))
        duration.append(np.abs(again["duration_s"] - truth["duration_s"]))
        velocity.append(np.abs(again["velocity"] - truth["velocity"]))
    onset, duration, velocity = np.concatenate(onset), np.concatenate(duration), np.concatenate(velocity)
    with capsys.disabled():
        print(
            f"\nround trip of {len(files)} files, {total:,} notes, {sum(lengths):,} tokens: {merged} doubles merged; "
            f"onset error mean {1e3 * onset.mean():.2f} ms, max {1e3 * onset.max():.2f} ms; duration error mean "
            f"{1e3 * duration.mean():.2f} ms, {np.mean(duration > 0.0101):.5%} above 10 ms; velocity error mean "
            f"{velocity.mean():.2f}, {np.mean(velocity > 2):.5%} above 2"
        )
    assert np.mean(onset > 0.0101) < 1e-3 and np.mean(duration > 0.0101) < 1e-3 and np.mean(velocity > 2) < 1e-3
