"""Pieces by bars, from the bundled checkpoint: right length, prompt kept, seeds, long pieces, wrong input."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import band, notes_of
from symusic import ControlChange, Note, Score, Tempo, Track

from sage_studio.checkpoints import load
from sage_studio.errors import InvalidMidiError
from sage_studio.generation.bars import Row, continue_score, generate_piece, plan_continuation, plan_piece
from sage_studio.generation.bars_batch import write_together
from sage_studio.music.midi import bar_ticks, heard_warnings


@pytest.fixture(scope="module")
def loaded():
    return load()


def bars_in(score: Score) -> np.ndarray:
    """Bar index of every note."""
    lines = bar_ticks(score)
    return np.array([np.searchsorted(lines, n.time, side="right") - 1 for t in score.tracks for n in t.notes])


def test_a_continuation_keeps_the_prompt_and_stops_at_the_bar(loaded):
    prompt = band(bars=8, seed=1, qpm=101)
    piece = continue_score(*loaded, prompt, prompt_bars=4, bars=3, seed=0)
    assert piece.bars == 3 and piece.tokens > piece.notes
    end = 4 * 4 * 48
    assert [n for n in notes_of(piece.score) if n[1] < end] == [n for n in notes_of(prompt) if n[1] < end]
    bars = bars_in(piece.score)
    assert bars.max() <= 6 and (bars >= 4).sum() == piece.notes > 0
    assert abs(piece.score.tempos[0].qpm - 101) < 0.01  # exact, not the token's nearest tempo
    assert piece.prompt_end_s == pytest.approx(16 * 60 / 101, abs=0.01)


def test_a_continuation_keeps_instruments_meter_and_tempo_unless_free(loaded):
    prompt = band(bars=4, seed=3)
    kept = continue_score(*loaded, prompt, bars=6, seed=1)
    assert {program for program, _, _ in notes_of(kept.score)} <= {0, 33, -1}
    assert len(kept.score.time_signatures) == len(kept.score.tempos) == 1
    strings = continue_score(*loaded, prompt, bars=2, seed=1, programs=[48])
    lines = bar_ticks(strings.score)
    assert {t.program for t in strings.score.tracks for n in t.notes if n.time >= lines[4]} == {48}
    free = continue_score(*loaded, prompt, bars=6, seed=1, temperature=1.5, top_p=1.0, free=True)
    assert {program for program, _, _ in notes_of(free.score)} - {0, 33, -1}


def test_a_silent_prompt_without_a_tempo(loaded):
    """Four empty bars before the music, no tempo in the file: nothing to keep, nothing to trip over."""
    score = Score(480)
    score.tracks.append(Track(program=24))
    score.tracks[0].notes.append(Note(8 * 1920, 480, 60, 80))
    piece = continue_score(*loaded, score, bars=2, seed=0)
    assert piece.bars == 2 and piece.score.tempos[0].qpm == 120


def test_no_note_is_doubled(loaded):
    piece = generate_piece(*loaded, bars=6, seed=3, temperature=1.3, top_p=1.0)
    notes = notes_of(piece.score)
    assert len(notes) == len(set(notes)) > 20


def test_the_same_seed_gives_the_same_piece(loaded):
    pieces = [generate_piece(*loaded, bars=2, seed=seed) for seed in (7, 7, 8)]
    assert pieces[0].ids == pieces[1].ids != pieces[2].ids


def test_tempo_programs_and_meter_are_held(loaded):
    piece = generate_piece(*loaded, bars=4, seed=1, tempo=133, programs=[0, 33, -1], time_signature="3/4")
    assert [round(tempo.qpm, 3) for tempo in piece.score.tempos] == [133]
    assert {p for p, _, _ in notes_of(piece.score)} <= {0, 33, -1}
    assert (piece.score.time_signatures[0].numerator, piece.score.time_signatures[0].denominator) == (3, 4)


def test_a_piece_longer_than_the_context_goes_on(loaded):
    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    model.config.max_position_embeddings = 512
    try:
        piece = continue_score(model, tokenizer, band(bars=4, seed=2), prompt_bars=4, bars=24, seed=0)
    finally:
        model.config.max_position_embeddings = context
    assert piece.bars == 24 and len(piece.ids) > 512


def test_a_long_piece_keeps_its_only_instrument(loaded):
    """Program tokens on change: a window cut from a solo must still know the instrument named once, long before."""
    model, tokenizer = loaded
    score = Score(480)
    score.tracks.append(Track(program=73))
    score.tracks[0].notes.extend([Note(240 * i, 240, 72 + i % 7, 80) for i in range(8 * 60)])
    plan = plan_continuation(model, tokenizer, score, prompt_bars=60, bars=2, seed=0, programs=[73])
    piece = plan.write()
    assert {program for program, _, _ in notes_of(piece.score)} == {73}
    assert any("longer than the context" in remark for remark in piece.remarks)
    assert plan.prompt_bars == 60 and piece.bars == 2


def test_one_overfull_bar_is_refused(loaded):
    score = Score(480)
    for program in range(0, 120, 3):
        score.tracks.append(Track(program=program))
        score.tracks[-1].notes.extend([Note(40 * i, 40, 60 + i % 12, 80) for i in range(48)])
    with pytest.raises(ValueError, match="single bar"):  # before anything is written
        plan_continuation(*loaded, score, prompt_bars=4, bars=1)


def test_a_plan_can_be_cancelled_alone_and_in_a_batch(loaded):
    plans = [plan_continuation(*loaded, band(bars=2, seed=1), prompt_bars=2, bars=2, seed=seed) for seed in (0, 1)]
    whole = plans[1].write()
    plans[0].cancel()
    ended, other = write_together(plans)
    assert (ended.bars, ended.ids) == (0, plans[0].ids) and ended.remarks[-1] == "cancelled before it began"
    assert other.ids == whole.ids and other.remarks == []
    assert plans[0].write().remarks[-1] == "cancelled before it began"


def test_a_batch_that_is_cancelled_does_not_wait_for_its_turn(loaded):
    plans = [plan_continuation(*loaded, band(bars=2, seed=1), prompt_bars=2, bars=2, seed=seed) for seed in (0, 1)]
    with plan_piece(*loaded, bars=500, seed=0).stream() as busy:
        notes = iter(busy)  # kept: dropped, it would cancel the stream
        next(notes)
        with ThreadPoolExecutor(1) as thread:
            batch = thread.submit(write_together, plans)
            for plan in plans:
                plan.cancel()
            pieces = batch.result(timeout=20)
    assert [piece.bars for piece in pieces] == [0, 0] and "before it began" in pieces[1].remarks[-1]


def test_a_piece_from_nothing_has_no_prompt(loaded):
    for option in ({"prompt_bars": 4}, {"prompt_notes": 4}, {"remarks": ["x"]}):
        with pytest.raises(TypeError, match=next(iter(option))):
            generate_piece(*loaded, bars=1, **option)


def test_a_bar_that_outgrows_the_context_ends_the_piece(loaded):
    """What the model has written is kept, where it is alone and where it is in a batch."""
    plan = plan_continuation(*loaded, band(bars=1), prompt_bars=1, bars=4)
    row, tokenizer = Row(plan, []), loaded[1]
    note = ["Position_0", "Program_0", "Pitch_60", "Velocity_63", "Duration_1.0.12"]
    row.take(tokenizer.convert_tokens_to_ids(["Bar_None", "TimeSig_4/4", *note * 390]))
    assert not row.goes_on and row.kept == 2
    assert row.remarks == ["stopped at bar 3: it grew longer than the context"]


def test_progress_counts_bars_and_notes(loaded):
    calls = []
    piece = generate_piece(*loaded, bars=3, seed=2, progress=lambda bars, notes: calls.append((bars, notes)))
    assert [bars for bars, _ in calls][-1] == 3
    assert calls == sorted(calls) and calls[-1][1] == piece.notes


def test_a_time_limit_ends_a_piece_with_a_whole_bar(loaded):
    piece = continue_score(*loaded, band(bars=4, seed=1), bars=200, seed=0, time_limit=1.0)
    assert piece.bars < 200 and piece.elapsed_s < 10
    assert piece.remarks == [f"the time limit of 1 s ended the piece after {piece.bars} of 200 bars"]
    assert bars_in(piece.score).max() < 4 + piece.bars
    whole = continue_score(*loaded, band(bars=4, seed=1), bars=piece.bars + 1, seed=0, time_limit=60)
    assert whole.remarks == [] and whole.ids[: len(piece.ids)] == piece.ids[: len(whole.ids)]


def test_what_tokens_cannot_hold_is_said(loaded):
    prompt = band(bars=4)
    prompt.tracks[0].controls.append(ControlChange(0, 7, 90))
    prompt.tracks.append(Track(program=0))
    prompt.tracks[-1].notes.append(Note(0, 480, 50, 80))
    remarks = " ".join(continue_score(*loaded, prompt, bars=1, seed=0).remarks)
    assert "1 controller events" in remarks and "merged" in remarks


def test_remarks_are_of_one_thread_and_warnings_of_others_go_their_way():
    with pytest.warns(UserWarning, match="of another's"), heard_warnings() as remarks:
        other = threading.Thread(target=warnings.warn, args=("secret.mid: a remark of another's",))
        other.start()
        other.join()
        for _ in range(2):
            warnings.warn("<score>: a remark", stacklevel=1)
    assert remarks == ["a remark"]


def test_three_hundred_tracks_are_a_prompt(loaded):
    score = Score(480)
    for index in range(300):
        score.tracks.append(Track(program=index % 128))
        if index % 10 == 0:
            score.tracks[-1].notes.append(Note(480 * (index % 16), 480, 60, 80))
    piece = continue_score(*loaded, score.dumps_midi(), prompt_bars=4, bars=1, seed=0)
    assert piece.score.note_num() - piece.notes == 30


def test_a_two_hour_file_is_a_prompt_like_any_other(loaded):
    score = Score(480)
    score.tempos.append(Tempo(0, 120))
    score.tracks.append(Track(program=0))
    score.tracks[0].notes.extend([Note(480 * i, 480, 60 + i % 24, 80) for i in range(14400)])
    assert score.to("second").end() == pytest.approx(7200, abs=1)
    assert continue_score(*loaded, score.dumps_midi(), prompt_bars=4, bars=1, seed=0).bars == 1


def test_an_unreadable_prompt_is_named(loaded, tmp_path):
    (tmp_path / "x.mid").write_bytes(b"no")
    with pytest.raises(InvalidMidiError, match=r"x\.mid"):
        continue_score(*loaded, tmp_path / "x.mid")


def test_sampling_is_the_checkpoint_s_own_unless_told(loaded):
    model, _ = loaded
    own = (model.generation_config.temperature, model.generation_config.top_p)
    told = generate_piece(*loaded, bars=2, seed=3, temperature=own[0], top_p=own[1])
    assert generate_piece(*loaded, bars=2, seed=3).ids == told.ids
    model.generation_config.temperature = 1e-6  # as good as the likeliest token
    try:
        cold = generate_piece(*loaded, bars=2, seed=3)
    finally:
        model.generation_config.temperature = own[0]
    assert cold.ids == generate_piece(*loaded, bars=2, temperature=0).ids != told.ids


def test_temperatures_and_top_p_may_be_whole_numbers(loaded):
    pieces = [generate_piece(*loaded, bars=1, seed=3, temperature=t, top_p=p).ids for t, p in ((2, 1), (2.0, 1.0))]
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 20},
        {"logits_processor": []},
        {"stopping_criteria": []},
        {"streamer": None},
        {"return_dict_in_generate": True},
        {"num_return_sequences": 2},
        {"num_beams": 2},
        {"suppress_tokens": [5]},
    ],
    ids=str,
)
def test_generate_options_do_not_collide_with_the_piece_s_own(loaded, options):
    with pytest.raises(ValueError, match=f"generate_options cannot hold {next(iter(options))}"):
        generate_piece(*loaded, bars=1, generate_options=options)


def test_a_prompt_has_a_bar(loaded):
    with pytest.raises(ValueError, match="prompt_bars 0"):
        continue_score(*loaded, band(bars=1), prompt_bars=0)


@pytest.mark.parametrize(
    "options",
    [
        {"time_limit": 0},
        {"bars": 0},
        {"temperature": -1},
        {"temperature": 1e-300},
        {"temperature": 1e300},
        {"top_p": 0},
        {"programs": [200]},
        {"tempo": 5},
        {"time_signature": "4"},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(loaded, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        generate_piece(*loaded, **{"bars": 1, **options})
