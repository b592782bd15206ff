"""Streams of notes: the notes that decoding finds, as soon as they are whole; cancelling; latency; the command."""

import gc
import json
import random
import signal
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import band, tiny_model, tiny_perceivers
from symusic import Score, Tempo, TimeSignature
from transformers import LogitsProcessor

from perceivers import PerceiverSTokenizer
from sage_music import SageMusicTokenizer
from sage_studio import example
from sage_studio.checkpoints import load
from sage_studio.cli import main
from sage_studio.errors import InvalidMidiError
from sage_studio.generation.bars import continue_score, generate_piece, plan_continuation, plan_piece
from sage_studio.generation.stream import NoteStreamer, latency_report
from sage_studio.music.midi import bar_ticks, read_score, tick_to_seconds

SAINTS = example("saints")
TPQ = 48  # of decoded scores


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture(params=["program on change", "program on every note", "bpe"])
def vocabulary(request, tokenizer, bpe_tokenizer) -> SageMusicTokenizer:
    return [SageMusicTokenizer(), tokenizer, bpe_tokenizer][request.param_index]


def changing(seed: int) -> Score:
    """Piano, bass and drums through several meters and tempos."""
    score = band(bars=10, seed=seed)
    for bar, (top, bottom) in enumerate([(3, 4), (6, 8), (5, 8), (7, 16), (4, 4)], start=1):
        score.time_signatures.append(TimeSignature(1920 * bar + 480 * (bar % 2), top, bottom))
    for tick, qpm in [(0, 90), (1440, 140), (5000, 61), (9999, 180)]:
        score.tempos.append(Tempo(tick, qpm))
    return score


def of_score(score: Score) -> Counter:
    """(program, onset tick, pitch, velocity, duration in ticks) of all notes."""
    return Counter(
        (-1 if track.is_drum else track.program, note.time, note.pitch, note.velocity, note.duration)
        for track in score.tracks
        for note in track.notes
    )


def of_stream(notes) -> Counter:
    return Counter((n.program, round(n.onset * TPQ), n.pitch, n.velocity, round(n.duration * TPQ)) for n in notes)


def new_notes(tokenizer, ids: list[int], prompt: int, bars: int | None = None) -> Counter:
    return of_score(tokenizer.decode_midi(ids, bars=bars)) - of_score(tokenizer.decode_midi(ids[:prompt], bars=bars))


def feed(streamer: NoteStreamer, ids: list[int], prompt: int, rng: random.Random | None = None) -> list:
    """What a streamer makes of `ids`, the first `prompt` given, the others in pieces of random size (or one by one)."""
    streamer.put(torch.tensor([ids[:prompt]], dtype=torch.long))
    while prompt < len(ids):
        size = 1 if rng is None else rng.randint(1, 9)
        new = torch.tensor(ids[prompt : prompt + size])
        streamer.put(new if size == 1 else new[None])  # as sampling and as assisted decoding do
        prompt += size
    streamer.end()
    return list(streamer)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "note-stream"]


class At(LogitsProcessor):
    """Calls `action` when so many new tokens are there."""

    def __init__(self, prompt: int, tokens: int, action):
        self.length, self.action = prompt + tokens, action

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            self.action()
        return scores


# ---- tokens to notes


@pytest.mark.parametrize("seed", range(3))
def test_the_notes_of_music_are_those_that_decoding_finds(vocabulary, seed):
    rng = random.Random(seed)
    ids = vocabulary.midi_to_ids(changing(seed))
    score = vocabulary.decode_midi(ids)
    assert len(score.time_signatures) > 3 and len(score.tempos) > 2 and len(score.tracks) == 3
    for prompt in (0, 1, *(rng.randrange(len(ids)) for _ in range(8)), len(ids)):  # in the middle of notes, too
        notes = feed(NoteStreamer(vocabulary), ids, prompt, rng)
        assert of_stream(notes) == new_notes(vocabulary, ids, prompt)


def test_so_are_those_of_any_tokens(vocabulary):
    """Not music at all: notes cut short, Positions before Bars, meters inside bars, special tokens anywhere."""
    rng, found = random.Random(0), 0
    kinds: dict[str, list[int]] = {}
    for index in range(vocabulary.vocab_size):
        if base := vocabulary.base_tokens([index]):
            kinds.setdefault(base[0].split("_")[0], []).append(index)
    for _ in range(150):
        ids = [rng.choice(kinds[rng.choice(list(kinds))]) for _ in range(60)]
        for _ in range(6):  # some whole notes among them
            place = rng.randrange(len(ids))
            ids[place:place] = [rng.choice(kinds[kind]) for kind in ("Pitch", "Velocity", "Duration") if kind in kinds]
        ids[rng.randrange(60)] = rng.choice(vocabulary.all_special_ids)
        prompt, bars = rng.randrange(40), rng.choice([None, None, 0, 2, 5])
        notes = feed(NoteStreamer(vocabulary, bars=bars), ids, prompt, rng)
        assert of_stream(notes) == new_notes(vocabulary, ids, prompt, bars)
        found += len(notes)
    assert found > 100


def test_a_note_is_there_with_its_last_token(vocabulary):
    ids = vocabulary.midi_to_ids(changing(1))[:90]
    for length in range(2, len(ids)):
        assert of_stream(feed(NoteStreamer(vocabulary), ids[:length], 1)) == of_score(
            vocabulary.decode_midi(ids[:length])
        )


def test_bars_and_seconds_are_the_score_s(vocabulary):
    ids = vocabulary.midi_to_ids(changing(2))
    score = vocabulary.decode_midi(ids)
    lines = bar_ticks(score)
    notes = feed(NoteStreamer(vocabulary), ids, 40)
    onsets = np.array([round(note.onset * TPQ) for note in notes])
    assert [note.bar for note in notes] == np.searchsorted(lines, onsets, side="right").tolist()
    assert [note.onset_s for note in notes] == pytest.approx(tick_to_seconds(score, onsets).tolist(), abs=1e-5)
    last = notes[-1]  # no tempo change after it
    end = tick_to_seconds(score, np.array([onsets[-1] + round(last.duration * TPQ)]))[0]
    assert last.onset_s + last.duration_s == pytest.approx(end, abs=1e-5)
    assert [note.elapsed_s for note in notes] == sorted(note.elapsed_s for note in notes)


def test_one_sequence_and_one_generation(tokenizer):
    with pytest.raises(ValueError, match="batch size 1"):
        NoteStreamer(tokenizer).put(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="bars -1"):
        NoteStreamer(tokenizer, bars=-1)
    streamer = NoteStreamer(tokenizer)
    assert feed(streamer, tokenizer.midi_to_ids(band(bars=1)), 1) and list(streamer) == []
    with pytest.raises(ValueError, match="make a new one"):
        streamer.put(torch.tensor([[1]]))


# ---- in generate()


@pytest.mark.parametrize(
    "options",
    [{"do_sample": True}, {"do_sample": False, "prompt_lookup_num_tokens": 4}],
    ids=["sampled", "assisted"],
)
def test_generation_by_the_checkpoint(loaded, options):
    model, tokenizer = loaded
    prompt = tokenizer.midi_to_ids(SAINTS, bars=2)
    streamer = NoteStreamer(tokenizer)
    future = streamer.start(model.generate, torch.tensor([prompt]), max_new_tokens=120, **options)
    notes = list(streamer)
    ids = future.result()[0].tolist()
    assert of_stream(notes) == new_notes(tokenizer, ids, len(prompt)) and len(notes) > 15
    assert 0 < notes[0].elapsed_s < notes[-1].elapsed_s


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_plain_generate_takes_the_streamer(kind, tokenizer, bpe_tokenizer):
    vocabulary = {"plain": tokenizer, "bpe": bpe_tokenizer}[kind]
    model = tiny_model(vocabulary, "head")
    prompt = vocabulary.midi_to_ids(band(seed=5))[:50]
    torch.manual_seed(1)
    streamer = NoteStreamer(vocabulary)
    out = model.generate(
        torch.tensor([prompt]),
        do_sample=True,
        max_new_tokens=200,
        min_new_tokens=200,
        streamer=streamer,
        stopping_criteria=streamer.stopping_criteria,
    )
    notes = list(streamer)
    assert of_stream(notes) == new_notes(vocabulary, out[0].tolist(), len(prompt)) and len(notes) > 20


def test_what_generation_raises_reaches_the_listener(tokenizer):
    model, ids = tiny_model(tokenizer), torch.tensor([tokenizer.midi_to_ids(band(seed=5))[:50]])

    def fail():
        raise RuntimeError("out of strings")

    streamer, notes = NoteStreamer(tokenizer), []
    processor = [At(50, 40, fail)]
    future = streamer.start(model.generate, ids, max_new_tokens=99, do_sample=True, logits_processor=processor)
    with pytest.raises(RuntimeError, match="out of strings"):
        notes.extend(streamer)  # what was written before
    assert isinstance(future.exception(), RuntimeError) and list(streamer) == []
    early = NoteStreamer(tokenizer)  # an error before the first token
    early.start(model.generate, ids.repeat(2, 1), max_new_tokens=9)
    with pytest.raises(ValueError, match="batch size 1"):
        list(early)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "assisted"])
def test_cancelled_it_stops_within_a_token(tokenizer, options):
    model, ids = tiny_model(tokenizer), torch.tensor([tokenizer.midi_to_ids(band(seed=5))[:50]])
    streamer = NoteStreamer(tokenizer)
    out = model.generate(
        ids,
        max_new_tokens=300,
        min_new_tokens=300,
        streamer=streamer,
        stopping_criteria=streamer.stopping_criteria,
        logits_processor=[At(50, 60, streamer.cancel)],
        **options,
    )
    # Assisted, the token may have been a guess, of up to three, that was not kept.
    assert 61 - options.get("prompt_lookup_num_tokens", 0) <= out.shape[1] - 50 <= 61 + 3 * bool(options)
    assert of_stream(streamer) == new_notes(tokenizer, out[0].tolist(), 50)


def test_leaving_the_loop_cancels(tokenizer):
    model, ids = tiny_model(tokenizer), torch.tensor([tokenizer.midi_to_ids(band(seed=5))[:50]])
    streamer = NoteStreamer(tokenizer)
    future = streamer.start(model.generate, ids, max_new_tokens=100_000, min_new_tokens=100_000)
    for _ in streamer:
        break
    assert streamer.cancelled and future.result(timeout=20).shape[1] < 100_000


# ---- whole compositions


@pytest.mark.parametrize("free", [False, True])
def test_a_stream_is_the_continuation(loaded, free):
    prompt = band(bars=8, seed=1, qpm=101)
    prompt.tempos.append(Tempo(2000, 133.3))
    options = {"prompt_bars": 4, "bars": 3, "seed": 5, "free": free}
    options |= {"temperature": 1.3, "top_p": 1.0} if free else {}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with plan_continuation(*loaded, prompt, **options).stream() as stream:
        notes = list(stream)
    same = continue_score(*loaded, prompt, **options)
    assert stream.piece.ids == same.ids and stream.piece.score == same.score
    assert len(notes) == same.notes and all(note.bar in (5, 6, 7) for note in notes)
    assert of_stream(notes) == of_score(same.score) - of_score(loaded[1].decode_midi(same.ids, bars=4))
    onsets = tick_to_seconds(same.score, np.array([round(note.onset * TPQ) for note in notes]))
    assert [note.onset_s for note in notes] == pytest.approx(onsets.tolist(), abs=1e-5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_goes_on_beyond_the_context(loaded):
    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    model.config.max_position_embeddings = 256
    try:
        with plan_continuation(model, tokenizer, SAINTS, prompt_bars=2, bars=8, seed=0).stream() as stream:
            notes = list(stream)
        piece = continue_score(model, tokenizer, SAINTS, prompt_bars=2, bars=8, seed=0)
    finally:
        model.config.max_position_embeddings = context
    assert len(piece.ids) > 300 and stream.piece.ids == piece.ids
    prompt = tokenizer.midi_to_ids(SAINTS, bars=2)
    assert of_stream(notes) == new_notes(tokenizer, piece.ids, len(prompt), bars=10)


def test_a_stream_from_nothing(loaded):
    options = {"bars": 2, "seed": 3, "tempo": 133, "programs": [0, -1]}
    with plan_piece(*loaded, **options).stream() as stream:
        notes = list(stream)
    assert stream.piece.ids == generate_piece(*loaded, **options).ids
    assert of_stream(notes) == of_score(stream.piece.score)
    assert notes[-1].onset_s == pytest.approx(notes[-1].onset * 60 / 133, abs=1e-4)


def test_streams_at_once_are_as_they_are_alone(loaded):
    streams = [plan_continuation(*loaded, SAINTS, bars=1, seed=seed).stream() for seed in (1, 2)]
    meanwhile = continue_score(*loaded, SAINTS, bars=1, seed=3)
    alone = [continue_score(*loaded, SAINTS, bars=1, seed=seed) for seed in (1, 2, 3)]
    assert [piece.ids for piece in alone] == [*(stream.piece.ids for stream in streams), meanwhile.ids]


def test_a_cancelled_stream_leaves_what_there_is(loaded):
    with plan_continuation(*loaded, SAINTS, bars=200, seed=0).stream() as stream:
        waiting = plan_continuation(*loaded, SAINTS, bars=200, seed=0).stream()
        notes = []
        for note in stream:
            notes.append(note)
            if len(notes) == 10:
                waiting.cancel()
                stream.cancel()
    piece = stream.piece
    assert 10 <= len(notes) == piece.notes < 200 and piece.bars == notes[-1].bar - 4 < 200
    assert of_stream(notes) == new_notes(loaded[1], piece.ids, len(loaded[1].midi_to_ids(SAINTS, bars=4)))
    assert "cancelled in bar" in piece.remarks[-1]
    assert list(waiting) == [] and (waiting.piece.bars, waiting.piece.notes) == (0, 0)
    assert "before it began" in waiting.piece.remarks[-1]


def test_a_dropped_stream_cancels_itself(loaded):
    stream = plan_continuation(*loaded, SAINTS, bars=500, seed=0).stream()
    for _ in stream:
        break
    assert stream.piece.bars < 500
    never_listened_to = plan_continuation(*loaded, SAINTS, bars=500, seed=0).stream()
    (thread,) = running()
    del never_listened_to
    gc.collect()
    thread.join(timeout=20)
    assert not running()


def test_wrong_input_is_refused_at_once(loaded, tmp_path):
    (tmp_path / "x.mid").write_bytes(b"no")
    with pytest.raises(InvalidMidiError, match=r"x\.mid"):
        plan_continuation(*loaded, tmp_path / "x.mid").stream()
    with pytest.raises(ValueError, match="bars 0"):
        plan_continuation(*loaded, SAINTS, bars=0).stream()
    with pytest.raises(ValueError, match="temperature"):
        plan_piece(*loaded, temperature=-1).stream()
    assert not running()


# ---- latency


def test_latency_report():
    onsets, walls = [4.0, 4.0, 4.5, 5.5], [0.2, 0.21, 1.0, 1.05]
    report = latency_report(onsets, walls)
    assert report["notes"] == 4 and report["first_note_ms"] == 200
    # Gaps 10, 790, 50 ms.
    assert report["note_to_note_ms"] == {"p50": 50, "p95": 716, "p99": 775.2, "max": 790}
    # At 1x due 0, 0, 0.5, 1.5 s after the first note; they came 0, 0.01, 0.8, 0.85 s after it.
    normal, double = report["deadlines"]
    assert normal == {"speed": 1.0, "missed": 2, "share": 0.5, "head_start_ms": 300}
    assert double == {"speed": 2.0, "missed": 3, "share": 0.75, "head_start_ms": 550}
    later = [wall - 0.2 for wall in walls]
    started = latency_report([-0.3, *[onset - 4 for onset in onsets]], [0, *later])["deadlines"][0]
    assert started["missed"] == 0  # what a head start of 300 ms does
    alone = latency_report([1.0], [0.5], speeds=[3])
    assert alone["note_to_note_ms"]["max"] is None and alone["deadlines"][0]["missed"] == 0
    assert latency_report([], [])["first_note_ms"] is None
    with pytest.raises(ValueError, match="equally long"):
        latency_report([1.0], [])
    with pytest.raises(ValueError, match="speeds"):
        latency_report([], [], speeds=[0])


# ---- the command


def test_the_command_prints_json_lines(capsys, tmp_path):
    argv = ["stream", str(SAINTS), "--bars", "2", "--seed", "4", "--out", str(tmp_path / "a.mid"), "--json"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    *notes, summary = map(json.loads, captured.out.splitlines())
    assert captured.err == "" and len(notes) == summary["notes"] == summary["latency"]["notes"] > 5
    assert list(notes[0])[:3] == ["program", "pitch", "velocity"] and summary["bars"] == 2
    assert summary["latency"]["first_note_ms"] == pytest.approx(1e3 * notes[0]["elapsed_s"], abs=0.01)
    main(["continue", str(SAINTS), "--bars", "2", "--seed", "4", "--out", str(tmp_path / "b.mid")])
    assert (tmp_path / "a.mid").read_bytes() == (tmp_path / "b.mid").read_bytes()


def test_the_command_prints_lines_and_a_report(capsys, tmp_path):
    out = tmp_path / "deep" / "x.mid"
    assert main(["stream", "--bars", "1", "--tempo", "100", "--seed", "3", "--report", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    header, *lines = captured.out.splitlines()
    assert header.split()[:2] == ["bar", "onset"] and len(lines) == read_score(out).note_num() > 0
    assert f"wrote {out}" in captured.err and "first note after" in captured.err and "played at 2x" in captured.err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--free"], "--free"),
        (["--prompt-bars", "2"], "--prompt-bars"),
        ([str(SAINTS), "--tempo", "100"], "--tempo"),
        ([str(SAINTS), "--top-p", "7"], "top_p"),
        (["absent.mid"], "absent.mid"),
    ],
    ids=str,
)
def test_the_command_refuses_what_does_not_go_together(capsys, argv, named):
    assert main(["stream", *argv]) == 2
    captured = capsys.readouterr()
    assert named in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" or "--top-p" in argv  # the header


def test_the_command_refuses_perceivers(capsys, tmp_path):
    tiny_perceivers(num_hidden_layers=1).save_pretrained(tmp_path)
    PerceiverSTokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["stream", "--model", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "SAGE-Music checkpoint" in captured.err and captured.err.count("\n") == 1


@pytest.fixture
def process():
    command = [sys.executable, "-m", "sage_studio.cli", "stream", str(SAINTS), "--bars", "900", "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background may have had interrupts ignored; a user at a terminal has not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert json.loads(process.stdout.readline())["bar"] == 5  # nothing but notes, as they come
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def test_a_reader_that_leaves_ends_the_command(process):
    process.stdout.close()
    assert process.wait(timeout=20) == 0 and process.stderr.read() == ""


def test_an_interrupt_ends_the_command(process):
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130 and process.stderr.read() == ""


def test_the_end_of_the_program_ends_a_stream():
    code = (
        "from sage_studio.checkpoints import load; from sage_studio.generation.bars import plan_piece\n"
        "stream = plan_piece(*load(), bars=90_000, seed=1).stream(); notes = iter(stream); print(next(notes).pitch)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and run.stderr == "" and int(run.stdout) >= 0
