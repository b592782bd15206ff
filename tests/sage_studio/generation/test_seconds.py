"""Performances by seconds, from a small checkpoint of random weights: right length, prompt kept, nothing hanging."""

import random
from collections import Counter

import pytest
import torch
from conftest import band, tiny_perceivers
from symusic import ControlChange, Note, PitchBend, Score, Tempo, Track

from perceivers import PerceiverSTokenizer
from sage_studio.checkpoints import load
from sage_studio.errors import InvalidMidiError
from sage_studio.generation.seconds import (
    PerformanceStreamer,
    continue_performance,
    generate_performance,
    plan_continuation,
    plan_performance,
)

SHAPE = {"num_hidden_layers": 1, "num_latents": 32, "max_position_embeddings": 256, "cross_scales": [None, 64]}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perceivers")
    tiny_perceivers(**SHAPE).save_pretrained(folder)
    PerceiverSTokenizer().save_pretrained(folder)
    return load(folder)


def piano(seconds: float = 12.0, seed: int = 0) -> Score:
    """A piano piece with onsets and ends at any millisecond, and a sustain pedal."""
    rng = random.Random(seed)
    score = Score(500)  # at 120 quarter notes a minute, a tick is 1 ms
    score.tempos.append(Tempo(0, 120))
    score.tracks.append(Track(program=0))
    for _ in range(int(6 * seconds)):
        length = rng.randint(20, 1500)
        time = rng.randint(0, int(1000 * seconds) - length - 1)
        score.tracks[0].notes.append(Note(time, length, rng.randint(30, 90), rng.randint(1, 127)))
    for index in range(int(seconds / 2)):
        score.tracks[0].controls.extend(
            [ControlChange(2000 * index, 64, 127), ControlChange(2000 * index + 900, 64, 0)]
        )
    return score


def notes_of(score: Score) -> list[tuple]:
    """Every note as (onset in ms, end in ms, pitch, velocity), sorted."""
    assert len(score.tracks) == 1 and score.ticks_per_quarter == 500
    return sorted((note.time, note.end, note.pitch, note.velocity) for note in score.tracks[0].notes)


def assert_whole(performance) -> None:
    """Every key is struck when silent, ended once, and no note drops out in decoding."""
    sounding, struck = set(), 0
    for token in performance.ids:
        if token < 128:
            assert token not in sounding
            sounding.add(token)
            struck += 1
        elif token < 256:
            sounding.remove(token - 128)
    assert not sounding
    notes = notes_of(performance.score)
    assert len(notes) == struck
    end = round(1000 * (performance.prompt_end_s + performance.music_s))
    assert max((note[1] for note in notes), default=0) <= end


# ---- from nothing


@pytest.mark.parametrize("seconds", [0.07, 3.0, 12.345])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 1.5, "top_p": 1.0}], ids=str)
def test_a_piece_lasts_as_long_as_asked(loaded, seconds, options):
    performance = generate_performance(*loaded, music_s=seconds, seed=0, **options)
    assert -1e-9 <= performance.music_s - seconds < 0.01
    assert_whole(performance)
    assert performance.prompt_end_s == 0 and performance.remarks == []
    assert performance.ids[0] == 390 and performance.ids[-1] == 388
    assert performance.tokens == len(performance.ids) - 1
    assert performance.notes == performance.score.note_num()
    assert performance.notes or seconds < 1 or options.get("temperature") == 0  # random weights may like silence best


def test_a_piece_lasts_a_minute_by_default(loaded):
    assert generate_performance(*loaded, seed=1).music_s == 60


@pytest.mark.parametrize("tokens", [1, 2, 30, 600])  # 600: more than the context
def test_a_piece_of_so_many_tokens(loaded, tokens):
    for seed in range(3):
        performance = generate_performance(*loaded, music_s=None, max_tokens=tokens, seed=seed)
        assert_whole(performance)
        if performance.tokens < tokens:
            assert performance.ids[-1] == 388
            assert performance.remarks == [
                f"the model ended the piece after {performance.tokens} tokens, {performance.music_s:.2f} s"
            ]
        else:
            assert performance.tokens == tokens and performance.remarks == []


def test_a_piece_that_the_model_ends(loaded):
    model, tokenizer = loaded
    model.generation_config.sequence_bias = [[[388], 8.0]]
    try:
        performance = generate_performance(model, tokenizer, music_s=None, max_tokens=4000, seed=0)
    finally:
        model.generation_config.sequence_bias = None
    assert performance.ids[-1] == 388 and performance.tokens < 4000
    assert performance.remarks[0].startswith(f"the model ended the piece after {performance.tokens:,} tokens")


def test_tokens_may_run_out_before_the_seconds(loaded):
    performance = generate_performance(*loaded, music_s=60, max_tokens=100, seed=0)
    assert performance.tokens == 100 and performance.music_s < 60
    assert_whole(performance)
    assert performance.remarks == [f"the limit of 100 new tokens ended the piece after {performance.music_s:.2f} s"]
    enough = generate_performance(*loaded, music_s=2, max_tokens=3000, seed=0)
    assert enough.music_s == 2 and enough.remarks == []


def test_a_time_limit_ends_a_piece_where_it_is(loaded):
    performance = continue_performance(*loaded, piano(), prompt_s=3, music_s=5000, seed=0, time_limit=1.0)
    assert performance.elapsed_s < 6 and 0 < performance.music_s < 5000
    assert performance.remarks == [f"the time limit of 1 s ended the piece after {performance.music_s:.2f} s"]
    assert performance.score.note_num() > performance.notes > 0


def test_the_same_seed_gives_the_same_piece(loaded):
    state = torch.random.get_rng_state()
    pieces = [generate_performance(*loaded, music_s=3, seed=seed) for seed in (7, 7, 8)]
    assert pieces[0].ids == pieces[1].ids != pieces[2].ids
    assert torch.equal(torch.random.get_rng_state(), state)
    likeliest = [generate_performance(*loaded, music_s=3, seed=seed, temperature=0).ids for seed in (7, 8)]
    assert likeliest[0] == likeliest[1]


def test_sampling_is_the_checkpoint_s_own_unless_told(loaded):
    model, _ = loaded
    told = generate_performance(*loaded, music_s=3, seed=0, temperature=0.5, top_p=0.8)
    model.generation_config.update(temperature=0.5, top_p=0.8)
    try:
        assert generate_performance(*loaded, music_s=3, seed=0).ids == told.ids
        assert generate_performance(*loaded, music_s=3, seed=0, temperature=1.0, top_p=1.0).ids != told.ids
    finally:
        model.generation_config.update(temperature=None, top_p=None)


def test_temperatures_may_be_whole_numbers(loaded):
    pieces = [generate_performance(*loaded, music_s=1, seed=3, temperature=number).ids for number in (2, 2.0)]
    assert pieces[0] == pieces[1]


def test_progress_follows_the_clock_and_counts_notes(loaded):
    calls = []
    report = lambda seconds, notes: calls.append((seconds, notes))  # noqa: E731
    performance = generate_performance(*loaded, music_s=5, seed=2, progress=report)
    assert calls == sorted(calls) and calls[-1] == (5.0, performance.notes)
    calls.clear()
    performance = continue_performance(*loaded, piano(), prompt_s=4.5, music_s=5, seed=2, progress=report)
    assert calls == sorted(calls) and calls[0][0] >= 0 and calls[-1] == (5.0, performance.notes)


# ---- continuations


@pytest.mark.parametrize("cut", [0.01, 3.333, 7.5, 11.0])
def test_a_continuation_keeps_what_came_before_the_cut(loaded, cut):
    _, tokenizer = loaded
    score = piano(seed=1)
    performance = continue_performance(*loaded, score, prompt_s=cut, music_s=4, seed=0)
    assert 0 <= performance.prompt_end_s - cut < 0.01 and performance.music_s == 4
    assert_whole(performance)
    ms = round(1000 * performance.prompt_end_s)
    before = [note for note in notes_of(tokenizer.decode_midi(tokenizer.midi_to_ids(score))) if note[0] < ms]
    kept = [note for note in notes_of(performance.score) if note[0] < ms]
    # What ended before the cut is the same; what sounded there began the same, and ends at the cut or later.
    assert [note if note[1] < ms else (note[0], *note[2:]) for note in kept] == [
        note if note[1] < ms else (note[0], *note[2:]) for note in before
    ]
    assert performance.notes == len(notes_of(performance.score)) - len(kept)


def test_new_music_may_begin_at_the_cut_or_later(loaded):
    """The first event after the prompt is not forced to fall on the cut itself."""
    first = set()
    for seed in range(8):
        performance = continue_performance(*loaded, piano(), prompt_s=5.03, music_s=3, seed=seed)
        later = [time for note in notes_of(performance.score) for time in note[:2] if time >= 5030]
        first.add(min(later))
    assert len(first) > 3


def test_a_prompt_with_a_long_rest_before_the_cut(loaded):
    score = piano(2.0)
    score.tracks[0].notes.append(Note(15_000, 500, 60, 80))
    performance = continue_performance(*loaded, score, prompt_s=9.25, music_s=2, seed=0)
    assert performance.prompt_end_s == 9.25 and performance.music_s == 2
    assert_whole(performance)
    assert all(note[0] < 2000 or note[0] >= 9250 for note in notes_of(performance.score))
    assert performance.ids.count(355) >= 7  # full seconds, as the tokenizer writes them


def test_a_silent_prompt(loaded):
    score = Score(500)
    score.tracks.append(Track(program=0))
    score.tracks[0].notes.append(Note(8_000, 500, 60, 80))
    performance = continue_performance(*loaded, score, prompt_s=3, music_s=2, seed=0)
    assert performance.remarks == ["the prompt is silent for its first 3 s"]
    assert performance.prompt_end_s == 3 and min(note[0] for note in notes_of(performance.score)) >= 3000


def test_a_prompt_shorter_than_asked_is_used_whole(loaded):
    _, tokenizer = loaded
    score = piano(3.0)
    whole = tokenizer.midi_to_ids(score)
    performance = continue_performance(*loaded, score, prompt_s=20, music_s=2, seed=0)
    assert performance.ids[: len(whole)] == whole
    assert performance.remarks == [f"the prompt lasts {performance.prompt_end_s:.2f} s, not 20: all of it is used"]
    assert 2 < performance.prompt_end_s < 3 and performance.music_s == 2
    assert_whole(performance)


def test_a_prompt_longer_than_the_context_is_heard_from_its_last_part(loaded):
    performance = continue_performance(*loaded, piano(60.0), prompt_s=50, music_s=3, seed=0)
    assert len(performance.ids) - performance.tokens > 256
    assert any("longer than the context of 256 tokens: its last" in remark for remark in performance.remarks)
    assert performance.prompt_end_s == 50 and performance.music_s == 3
    assert_whole(performance)


def test_what_is_changed_is_said(loaded):
    score = band(bars=8)  # piano, bass, drums
    score.tracks[0].controls.extend([ControlChange(0, 64, 127), ControlChange(0, 67, 127), ControlChange(9, 7, 90)])
    score.tracks[0].pitch_bends.append(PitchBend(0, 100))
    performance = continue_performance(*loaded, score, prompt_s=4, music_s=1, seed=0)
    assert performance.remarks == [
        "2 controller events of the prompt have no token and are left out",
        "1 pitch bend events of the prompt have no token and are left out",
        "2 instruments are played as one piano",
        "64 drum notes are left out",
    ]
    assert {track.program for track in performance.score.tracks} == {0}


def test_a_chord_at_the_cut_is_ended_by_as_many_tokens_as_it_takes(loaded):
    score = Score(500)
    score.tracks.append(Track(program=0))
    score.tracks[0].notes.extend([Note(500, 5000, pitch, 80) for pitch in range(40, 60)])
    performance = continue_performance(*loaded, score, prompt_s=1, music_s=None, max_tokens=21, seed=0)
    assert performance.tokens == 21 and performance.notes == 0
    assert_whole(performance)
    with pytest.raises(ValueError, match="max_tokens 20 cannot end the 20 notes"):
        continue_performance(*loaded, score, prompt_s=1, music_s=None, max_tokens=20, seed=0)


def test_prompts_come_as_path_bytes_or_score(loaded, tmp_path):
    score = piano()
    score.dump_midi(tmp_path / "a.mid")
    sources = (tmp_path / "a.mid", str(tmp_path / "a.mid"), score.dumps_midi(), score)
    pieces = [continue_performance(*loaded, source, prompt_s=3, music_s=1, seed=0) for source in sources]
    assert all(piece.ids == pieces[0].ids for piece in pieces)


# ---- what is refused


def test_unusable_prompts_are_named(loaded, tmp_path):
    (tmp_path / "x.mid").write_bytes(b"no")
    with pytest.raises(InvalidMidiError, match=r"x\.mid: not a MIDI file"):
        continue_performance(*loaded, tmp_path / "x.mid")
    drums = band(bars=1)
    drums.tracks = type(drums.tracks)([track for track in drums.tracks if track.is_drum])
    drums.dump_midi(tmp_path / "drums.mid")
    with pytest.raises(InvalidMidiError, match=r"drums\.mid: it holds no notes but drums"):
        continue_performance(*loaded, tmp_path / "drums.mid")
    with pytest.raises(InvalidMidiError, match="<bytes>: it holds no notes but drums"):
        continue_performance(*loaded, drums.dumps_midi())


@pytest.mark.parametrize(
    "options",
    [
        {"music_s": 0},
        {"music_s": float("inf")},
        {"music_s": float("nan")},
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1e-300},
        {"temperature": 1e300},
        {"top_p": 0},
        {"top_p": 1.5},
        {"prompt_s": 0},
        {"prompt_s": float("inf")},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(loaded, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        continue_performance(*loaded, piano(), **{"music_s": 1, **options})
    if "prompt_s" not in options:
        with pytest.raises(ValueError, match=next(iter(options))):
            generate_performance(*loaded, **{"music_s": 1, **options})


def test_some_length_must_be_given(loaded):
    with pytest.raises(ValueError, match="music_s or max_tokens"):
        generate_performance(*loaded, music_s=None)


def test_learned_positions_are_not_passed():
    model, tokenizer = tiny_perceivers(**SHAPE, absolute_positions=True), PerceiverSTokenizer()
    with pytest.raises(ValueError, match=r"256 learned positions .* leave 255.* fewer max_tokens"):
        generate_performance(model, tokenizer, max_tokens=256)
    with pytest.raises(ValueError, match=r"256 learned positions .* leave 0"):
        continue_performance(model, tokenizer, piano(60.0), prompt_s=50)
    full = generate_performance(model, tokenizer, music_s=None, max_tokens=255, seed=0)
    assert len(full.ids) <= 256
    assert_whole(full)
    ended = generate_performance(model, tokenizer, music_s=600, seed=0)  # as far as the positions reach
    assert len(ended.ids) == 256 and "the limit of 255 new tokens" in ended.remarks[0]
    assert_whole(ended)


def test_vocabularies_without_a_beginning_or_an_end():
    tokenizer = PerceiverSTokenizer(end_token=False, bos=False)
    model = tiny_perceivers(**SHAPE, **tokenizer.config_fields())
    with pytest.raises(ValueError, match="no BOS"):
        generate_performance(model, tokenizer, music_s=None, max_tokens=20)
    with pytest.raises(ValueError, match="no token_end"):
        continue_performance(model, tokenizer, piano(), prompt_s=2, music_s=1)
    performance = continue_performance(model, tokenizer, piano(), prompt_s=2, music_s=None, max_tokens=50)
    assert performance.tokens == 50
    assert_whole(performance)


# ---- streams


def of_stream(notes) -> Counter:
    """(onset in ms, pitch, velocity, duration in ms) of streamed notes."""
    return Counter((round(1e3 * n.onset_s), n.pitch, n.velocity, round(1e3 * n.duration_s)) for n in notes)


def of_ids(tokenizer, ids: list[int]) -> Counter:
    """The same of decoded ids; a tick is a millisecond."""
    return Counter((n.time, n.pitch, n.velocity, n.duration) for n in tokenizer.decode_midi(ids).tracks[0].notes)


def feed(tokenizer, ids: list[int], prompt: int) -> list:
    streamer = PerformanceStreamer(tokenizer)
    streamer.put(torch.tensor([ids[:prompt]], dtype=torch.long))
    for token in ids[prompt:]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return list(streamer)


def test_the_notes_of_a_stream_are_those_that_decoding_finds(loaded):
    """Of music, and of any tokens: keys released that were not held, struck while they sound or twice in one step."""
    tokenizer, rng = loaded[1], random.Random(0)
    events = [*range(60, 64), *range(188, 192), *range(256, 259), 370, 380]
    whole = tokenizer.midi_to_ids(piano())
    cases = [whole, *([390, *rng.choices(events, k=80)] for _ in range(200))]
    found = 0
    for ids in cases:
        notes = feed(tokenizer, ids, 1)
        assert of_stream(notes) == of_ids(tokenizer, ids)
        found += len(notes)
    assert found > 2000
    cut = len(whole) // 2  # what begins in the prompt is not handed out
    later = feed(tokenizer, whole, cut)
    assert 0 < len(later) < found and of_stream(later) <= of_ids(tokenizer, whole)
    assert len(later) == sum(token < 128 for token in whole[cut:])


def test_a_note_comes_when_its_key_is_released(loaded):
    tokenizer = loaded[1]
    ids = [390, 375, 60, 265, 64, 265, 188, 255 + 3]  # C, after 100 ms E, after 100 ms C ends, and time goes on
    streamer = PerformanceStreamer(tokenizer)
    streamer.put(torch.tensor([ids[:1]]))
    for token in ids[1:]:
        streamer.put(torch.tensor([token]))
    first = next(iter(streamer))
    assert (first.pitch, first.onset_s, first.duration_s, first.bar, first.onset) == (60, 0.0, 0.2, None, None)


def test_a_stream_is_the_performance(loaded):
    options = {"prompt_s": 3, "music_s": 4, "seed": 5}
    plan = plan_continuation(*loaded, piano(), **options)
    with plan.stream() as stream:
        notes = list(stream)
    same = continue_performance(*loaded, piano(), **options)
    assert stream.piece.ids == same.ids == stream.ids and stream.piece.score == same.score
    assert len(notes) == same.notes and all(note.onset_s >= 3 for note in notes)
    assert of_stream(notes) <= of_ids(loaded[1], same.ids)
    assert [note.elapsed_s for note in notes] == sorted(note.elapsed_s for note in notes)


def test_a_cancelled_performance_ends_where_it_is(loaded):
    plan = plan_performance(*loaded, music_s=600, seed=0)
    with plan.stream() as stream:
        notes = []
        for note in stream:
            notes.append(note)
            if len(notes) == 10:
                plan.cancel()
    piece = stream.piece
    assert 10 <= len(notes) == piece.notes < 400 and 0 < piece.music_s < 600
    assert piece.remarks[-1] == f"cancelled after {piece.music_s:.2f} s"
    again = plan.write()  # cancelled for good
    assert again.notes == 0 and "before it began" in again.remarks[-1]
