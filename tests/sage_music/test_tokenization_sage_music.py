"""MIDI to tokens and back: every note on the stated grid, every source, every vocabulary, saved and loaded."""

import warnings

import numpy as np
import pytest
import torch
from conftest import DATA, band, notes_of
from symusic import Note, Score, Tempo, TimeSignature, Track

from sage_music import MidiGrammarLogitsProcessor, SageMusicConfig, SageMusicTokenizer
from sage_music.generation_sage_music import NoDoubledNotesLogitsProcessor


def test_all_sources_give_the_same_ids(tokenizer, tmp_path):
    score = band()
    path = tmp_path / "band.mid"
    score.dump_midi(path)
    expected = tokenizer.midi_to_ids(path)
    assert tokenizer.midi_to_ids(str(path)) == expected
    assert tokenizer.midi_to_ids(path.read_bytes()) == expected
    assert tokenizer.midi_to_ids(score) == expected


def test_note_arrays_are_read_in_seconds(tokenizer):
    from sage_studio.music.notes import note_array

    notes = note_array([(0.0, 0.5, 60, 100, 0, 0), (0.5, 0.25, 36, 90, -1, 1), (1.0, 1.0, 43, 80, 33, 2)])
    score = tokenizer.decode_midi(tokenizer.midi_to_ids(notes))
    assert notes_of(score) == [(-1, 48, 36), (0, 0, 60), (33, 96, 43)]


@pytest.mark.parametrize("kind", ["plain", "bpe", "on-change"])
def test_a_round_trip_keeps_every_note(tokenizer, bpe_tokenizer, kind):
    chosen = {"plain": tokenizer, "bpe": bpe_tokenizer, "on-change": SageMusicTokenizer()}[kind]
    score = band(seed=3, qpm=93)
    ids = chosen.midi_to_ids(score)
    again = chosen.decode_midi(ids)
    assert notes_of(again) == notes_of(score)
    assert abs(again.tempos[0].qpm / 93 - 1) < 0.017  # the stated tempo grid: 64 logarithmic steps over 30-240
    assert chosen.midi_to_ids(again) == ids
    if kind == "bpe":
        assert len(ids) < 0.9 * len(tokenizer.midi_to_ids(score))


def test_text_round_trip(tokenizer):
    text = "BOS_None Bar_None TimeSig_4/4 Position_0 Program_0 Pitch_60 Velocity_79 Duration_1.0.12"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.midi_to_ids(band(bars=1))).startswith("BOS_None Bar_None TimeSig_4/4 Position_")
    with pytest.raises(ValueError, match="Pitch_128"):
        tokenizer("Pitch_128")


def test_a_batch_is_padded_on_the_left(tokenizer):
    ids = [tokenizer.midi_to_ids(band(bars=bars)) for bars in (1, 2)]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    short = len(ids[1]) - len(ids[0])
    assert batch["input_ids"][0, :short].tolist() == [tokenizer.pad_token_id] * short
    assert batch["attention_mask"][0].tolist() == [0] * short + [1] * len(ids[0])


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_saved_and_loaded_it_gives_identical_ids(tokenizer, bpe_tokenizer, tmp_path, kind):
    chosen = {"plain": tokenizer, "bpe": bpe_tokenizer}[kind]
    chosen.save_pretrained(tmp_path)
    again = SageMusicTokenizer.from_pretrained(tmp_path)
    assert again.midi_to_ids(band(seed=5)) == chosen.midi_to_ids(band(seed=5))
    assert again.config_fields() == chosen.config_fields()
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (0, 1, 2)
    assert again.track_programs == chosen.track_programs


def test_options_survive_saving(tmp_path):
    chosen = SageMusicTokenizer(beat_resolution=8, program_changes=True, track_programs={"LEAD": 80})
    chosen.save_pretrained(tmp_path)
    again = SageMusicTokenizer.from_pretrained(tmp_path)
    assert again.miditok.config.max_num_pos_per_beat == 8
    assert again.miditok.config.program_changes and again.track_programs == {"LEAD": 80}


def pop_song() -> Score:
    """Three tracks of program 0, named as in POP909."""
    score = Score(480)
    score.tempos.append(Tempo(0, 90))
    for name, pitch in (("MELODY", 72), ("BRIDGE", 67), ("PIANO", 48)):
        track = Track(name=name, program=0)
        track.notes.append(Note(0, 480, pitch, 80))
        score.tracks.append(track)
    return score


def test_pop909s_three_tracks_stay_apart(tokenizer):
    score = tokenizer.decode_midi(tokenizer.midi_to_ids(pop_song()))
    assert notes_of(score) == [(0, 0, 48), (25, 0, 67), (73, 0, 72)]


def test_a_track_name_alone_moves_nothing(tokenizer):
    """A lone melody keeps its program: names count only where tracks would be merged."""
    score = pop_song()
    score.tracks.pop(1)
    score.tracks[1].program = 4
    assert {p for p, _, _ in notes_of(tokenizer.decode_midi(tokenizer.midi_to_ids(score)))} == {0, 4}


def test_cut_time_keeps_its_sixteenths(tokenizer):
    """2/2 becomes 4/4: with a half note as the beat, twelve positions could not hold sixteenths."""
    score = Score(480)
    score.time_signatures.append(TimeSignature(0, 2, 2))
    track = Track(program=0)
    track.notes.extend([Note(120 * i, 120, 60 + i, 80) for i in range(16)])
    score.tracks.append(track)
    assert notes_of(tokenizer.decode_midi(tokenizer.midi_to_ids(score))) == notes_of(score)


def test_a_meter_without_a_token_is_said(tokenizer):
    score = band(bars=2)
    score.time_signatures.append(TimeSignature(1920, 13, 8))
    with pytest.warns(UserWarning, match="13/8"):
        ids = tokenizer.midi_to_ids(score)
    assert tokenizer.decode_midi(ids).note_num() == score.note_num()


def test_bars_cut_at_bar_lines(tokenizer):
    ids = tokenizer.midi_to_ids(band(bars=6), bars=2)
    score = tokenizer.decode_midi(ids)
    assert max(note.time for track in score.tracks for note in track.notes) < 2 * 4 * score.ticks_per_quarter
    assert notes_of(tokenizer.decode_midi(tokenizer.midi_to_ids(band(bars=6)), bars=2)) == notes_of(score)


def test_transposition_moves_melodies_not_drums(tokenizer):
    ids = np.array(tokenizer.midi_to_ids(band()))
    before, after = (notes_of(tokenizer.decode_midi(x)) for x in (ids, tokenizer.transpose_ids(ids, 3)))
    assert after == sorted((p, t, pitch + 3 * (p >= 0)) for p, t, pitch in before)
    with pytest.raises(ValueError, match="range"):
        tokenizer.transpose_ids(ids, 80)


@pytest.mark.parametrize("junk", [b"", b"hello world, this is no MIDI file at all", b"MThd\0\0\0\6\0\1\0\0\1\xe0"])
def test_unreadable_music_names_the_file(tokenizer, tmp_path, junk):
    path = tmp_path / "junk.mid"
    path.write_bytes(junk)
    with pytest.raises(ValueError, match=r"junk\.mid"):
        tokenizer.midi_to_ids(path)


def test_wrong_inputs_are_named(tokenizer):
    with pytest.raises(ValueError, match="int"):
        tokenizer.midi_to_ids(5)
    with pytest.raises(ValueError, match="5000"):
        tokenizer.decode_midi([1, 5000])
    with pytest.raises(ValueError, match="one sequence"):
        tokenizer.decode_midi([[1, 3]])
    with pytest.raises(ValueError, match="velocity"):
        tokenizer.midi_to_ids(np.zeros(3, dtype=[("pitch", "i2")]))


def smaller(folder, **options) -> SageMusicTokenizer:
    """A tokenizer of MidiTok's file with these options."""
    from miditok import REMI, TokenizerConfig

    REMI(TokenizerConfig(**options)).save(folder / "remi.json")
    return SageMusicTokenizer(vocab_file=str(folder / "remi.json"))


@pytest.mark.parametrize(
    "options, missing",
    [
        ({"use_programs": True, "one_token_stream_for_programs": False}, "one_token_stream_for_programs"),
        ({"use_programs": True, "use_pitchdrum_tokens": False}, "use_pitchdrum_tokens"),
        ({"use_programs": True, "use_note_duration_programs": [0, 1]}, "Duration"),
        ({"use_velocities": False}, "use_velocities"),
        ({"use_rests": True}, "Rest"),
        ({"use_chords": True}, "Chord"),
        ({"use_bar_end_tokens": True}, "Bar_End"),
        ({"special_tokens": ["PAD", "BOS"]}, "EOS"),
    ],
)
def test_another_miditok_vocabulary_is_refused(tmp_path, options, missing):
    with pytest.raises(ValueError, match=missing):
        smaller(tmp_path, **options)


@pytest.mark.parametrize("meters", [True, False])
@pytest.mark.parametrize("programs", [True, False])
def test_smaller_vocabularies_of_others(tmp_path, meters, programs):
    """Without meters, programs or tempos, and with special tokens of its own, in an order of its own."""
    specials = ["PAD", "MASK", "EOS", "BOS"]
    music = smaller(tmp_path, use_time_signatures=meters, use_programs=programs, special_tokens=specials)
    assert (music.pad_token_id, music.eos_token_id, music.bos_token_id) == (0, 2, 3)
    assert len(music) == music.vocab_size == len(music.miditok.vocab)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = music.midi_to_ids(band(bars=4))
    assert bool(caught) != programs  # 32 notes of drums find no place on one piano
    decoded = music.decode_midi(ids)
    assert decoded.note_num() == 4 * (6 + 3 + 8 * programs)
    assert music.midi_to_ids(decoded) == ids
    # Every step of its own music is allowed by its own grammar, and MASK is at no step.
    grammar = MidiGrammarLogitsProcessor(SageMusicConfig(**music.config_fields()))
    for end in range(1, len(ids)):
        allowed = grammar.allowed(torch.tensor([ids[:end]]))[0]
        assert allowed[ids[end]] and not allowed[1]
    assert music.decode_midi([*ids[:60], 1, *ids[60:]]).note_num() == decoded.note_num()
    high = np.array([music.convert_tokens_to_ids("Pitch_109")])  # the highest that these have
    assert music.convert_ids_to_tokens(music.transpose_ids(high, -88).tolist()) == ["Pitch_21"]
    with pytest.raises(ValueError, match="1 semitones"):
        music.transpose_ids(high, 1)


def test_a_vocabulary_without_drums_of_its_own(tmp_path):
    """No pitch is struck twice, and one note is not taken for all there are: that would read the piece at each step."""
    music = smaller(tmp_path, use_programs=False, use_pitchdrum_tokens=False, special_tokens=["PAD", "BOS", "EOS"])
    processor = NoDoubledNotesLogitsProcessor(SageMusicConfig(**music.config_fields()))
    processor._program_before = lambda ids: pytest.fail("read back beyond the position")
    ids = music("BOS_None Bar_None Position_0 Pitch_60 Velocity_79 Duration_1.0.8")["input_ids"]
    scores = processor(torch.tensor([ids]), torch.zeros(1, music.vocab_size))
    assert torch.isinf(scores[0]).nonzero().flatten().tolist() == [music.convert_tokens_to_ids("Pitch_60")]


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="development data is not beside the checkout")
def test_every_note_of_the_test_split_survives(capsys):
    """Onsets within half a position, durations within half a step of their grid, and every note kept."""
    tokenizer = SageMusicTokenizer(program_changes=True)
    onset_errors, duration_errors, kept, total = [], [], 0, 0
    for path in sorted((DATA / "multitrack" / "test").glob("*.mid")):
        score = Score(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = tokenizer.decode_midi(tokenizer.midi_to_ids(score))
            prepared = tokenizer._prepare(score)
        for (program, drum), notes in by_instrument(prepared).items():
            other = by_instrument(again).get((program, drum), np.zeros((0, 3)))
            total += len(notes)
            kept += min(len(notes), len(other))
            if len(notes) == len(other):
                onset_errors.append(np.abs(notes[:, 1] - other[:, 1]))
                duration_errors.append(np.abs(notes[:, 2] - other[:, 2]))
    onset, duration = np.concatenate(onset_errors), np.concatenate(duration_errors)
    with capsys.disabled():
        print(
            f"\nround trip: {kept} of {total} notes kept; onset error max {onset.max():.4f}, mean {onset.mean():.5f} "
            f"quarters; duration error mean {duration.mean():.4f}, {np.mean(duration > 1 / 12):.2%} above a position"
        )
    assert kept == total
    assert onset.max() <= 1 / 12 + 1e-6


def by_instrument(score: Score) -> dict:
    """(program, drum) to rows of (pitch, onset, duration in quarters), sorted by pitch, then onset."""
    rows: dict = {}
    for track in score.tracks:
        for note in track.notes:
            row = (note.pitch, note.time / score.ticks_per_quarter, note.duration / score.ticks_per_quarter)
            rows.setdefault((track.program * (not track.is_drum), track.is_drum), []).append(row)
    return {key: np.array(sorted(value)) for key, value in rows.items()}


@pytest.mark.parametrize("changes", [False, True], ids=["every-note", "on-change"])
def test_a_crop_states_tempo_and_program_again(changes):
    tokenizer = SageMusicTokenizer(program_changes=changes)
    score = Score(480)
    score.tempos.append(Tempo(0, 77))
    score.tracks.append(Track(program=40))
    score.tracks[0].notes.extend([Note(480 * i, 480, 60, 80) for i in range(16)])
    ids = np.array(tokenizer.midi_to_ids(score))
    lines = np.flatnonzero(ids == tokenizer.get_vocab()["Bar_None"])
    whole, crop = tokenizer.decode_midi(ids), tokenizer.decode_midi(tokenizer.crop_ids(ids, int(lines[2])))
    assert notes_of(crop) == [(40, time - 2 * 192, pitch) for _, time, pitch in notes_of(whole) if time >= 2 * 192]
    assert crop.tempos[0].qpm == whole.tempos[0].qpm
    assert tokenizer.crop_ids(ids, int(lines[0])).tolist() == ids.tolist()  # nothing to state at the beginning
