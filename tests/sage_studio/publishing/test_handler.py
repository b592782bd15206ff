"""The inference endpoint: an exported repository behind a real HTTP server, under load and under attack."""

import ast
import base64
import importlib.util
import io
import json
import random
import struct
import sys
import threading
import time
import warnings
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import band
from serve import post, request_for, running

from sage_studio.checkpoints import load
from sage_studio.errors import InvalidMidiError
from sage_studio.generation.bars import continue_score
from sage_studio.generation.seconds import continue_performance
from sage_studio.music.midi import read_notes, read_score
from sage_studio.publishing.export import export

pytestmark = pytest.mark.xdist_group("handler")  # one export and one server for all

HANDLER = Path(__file__).resolve().parents[3] / "src" / "sage_studio" / "publishing" / "handler.py"
END = b"\0\xff\x2f\0"
NOTE = b"\0\x90\x3c\x40\x60\x80\x3c\0"  # middle C for 96 ticks


def midi_file(*tracks: bytes, division: int = 96) -> bytes:
    chunks = b"".join(b"MTrk" + struct.pack(">I", len(track)) + track for track in tracks)
    return b"MThd" + struct.pack(">IHHH", 6, 1, len(tracks), division) + chunks


def prompt(seed: int, bars: int = 1) -> bytes:
    """The bass of a band: what continues it is thin too, and soon written."""
    score = band(bars=bars, seed=seed)
    score.tracks = type(score.tracks)([score.tracks[1]])
    return score.dumps_midi()


def overfull() -> bytes:
    """A small file that every reader takes: one bar of 900 notes, more than the context of the model."""
    begins, ends = b"", b""
    for i in range(900):
        begins += bytes([0, 0x90 | i % 9, i * 7 % 128, 80])
        begins += bytes([1, 0xB0, 1, 1]) if i % 9 == 8 else b""
        ends += bytes([0 if i else 96, 0x80 | i % 9, i * 7 % 128, 0])
    return midi_file(begins + ends + END)


def answers_at_once(handler, monkeypatch, bodies, write=None):
    """Answers to requests that all wait, in this order, before one is taken; and what was generated at once, by seed.

    Args:
        write: `write(forward, inputs, futures)` in place of the pipeline's `forward(inputs)`.
    """
    begun, go_on, batches, futures, forward = threading.Event(), threading.Event(), [], [], handler.pipe.forward

    def held(inputs):
        if not begun.is_set():
            begun.set()
            assert go_on.wait(60)
            return forward(inputs)
        batches.append([plan.seed for plan in inputs["plans"]])
        return write(forward, inputs, futures) if write else forward(inputs)

    with monkeypatch.context() as patch, ThreadPoolExecutor(len(bodies) + 1) as pool:
        patch.setattr(handler.pipe, "forward", held)
        first = pool.submit(handler, request_for(prompt(0), bars=1, prompt_bars=1, temperature=0.5))
        assert begun.wait(60)
        for body in bodies:
            futures.append(pool.submit(handler, body))
            while len(handler._waiting) < len(futures) and not futures[-1].done():
                time.sleep(0.001)
        go_on.set()
        answers = [future.result(120) for future in futures]
        assert "error" not in first.result()
    return answers, batches


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("repositories")
    return {name: export(name, folder / name, samples=False) for name in ("sage-music", "perceivers")}


@pytest.fixture(scope="module")
def address(repositories):
    """A server of SAGE-Music in a process that cannot import our packages."""
    with running(repositories["sage-music"], OMP_NUM_THREADS="1") as address:
        yield address


@pytest.fixture(scope="module")
def module():
    """`handler.py`, loaded from its file."""
    spec = importlib.util.spec_from_file_location("handler_under_test", HANDLER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def handler(module, repositories):
    """One in this process, with narrow limits."""
    return module.EndpointHandler(repositories["sage-music"], max_bars=24, max_waiting=6, max_audio_s=30)


# What is wrong with a request: body or parameters, the type of the answer, words in it.
WRONG_PARAMETERS = [
    ({"bar": 4}, "invalid_request", "'bar' is no parameter of SAGE-Music"),
    ({"music_s": 4}, "invalid_request", "these are: prompt_bars, bars"),
    ({"time_limit": 1e9}, "invalid_request", "'time_limit'"),
    ({"x" * 5000: 1}, "invalid_request", "xxx..."),
    ({"bars": True}, "invalid_request", "bars must be a whole number from 1 to 64"),
    ({"bars": 4.0}, "invalid_request", "bars"),
    ({"bars": "4"}, "invalid_request", "bars"),
    ({"bars": [4]}, "invalid_request", "bars"),
    ({"bars": {"a": 4}}, "invalid_request", "bars"),
    ({"bars": 0}, "invalid_request", "bars"),
    ({"bars": -(10**400)}, "invalid_request", "bars"),
    ({"bars": 10**400}, "too_large", "bars may be 64 at most"),
    ({"prompt_bars": 10**6}, "too_large", "prompt_bars"),
    ({"temperature": float("nan")}, "invalid_request", "temperature"),
    ({"temperature": float("inf")}, "invalid_request", "temperature"),
    ({"temperature": 1e-300}, "invalid_request", "temperature"),
    ({"temperature": 1e300}, "too_large", "temperature"),
    ({"temperature": -1}, "invalid_request", "temperature"),
    ({"top_p": 0}, "invalid_request", "top_p"),
    ({"top_p": 10**400}, "too_large", "top_p"),
    ({"seed": -1}, "invalid_request", "seed"),
    ({"seed": 2**64}, "too_large", "seed"),
    ({"free": 1}, "invalid_request", "free must be true or false"),
    ({"audio": "yes"}, "invalid_request", "audio"),
    ({"audio": True, "sample_rate": 1}, "invalid_request", "sample_rate"),
    ({"audio": True, "sample_rate": 10**9}, "too_large", "sample_rate"),
    ({"programs": []}, "invalid_request", "programs"),
    ({"programs": [128]}, "invalid_request", "programs"),
    ({"programs": [True]}, "invalid_request", "programs"),
    ({"programs": [0] * 10_000}, "invalid_request", "programs"),
    ({"programs": 0}, "invalid_request", "programs"),
    ({"generate_options": {"max_new_tokens": 10**9}}, "invalid_request", "generate_options"),
    ({"generate_options": {"use_mtp": "yes"}}, "invalid_request", "use_mtp"),
    ({"generate_options": {"num_assistant_tokens": 99}}, "too_large", "num_assistant_tokens"),
    ({"generate_options": []}, "invalid_request", "generate_options"),
]
WRONG_BODIES = [
    (b"", "invalid_request", "not JSON"),
    (b"\xff\xfe{", "invalid_request", "not JSON"),
    (b"[" * 200_000, "invalid_request", "not JSON"),
    (b'{"inputs": "' + b"1" * 3_000_000 + b'"}', "too_large", "bytes at most"),
    (b"[]", "invalid_request", "must be an object"),
    (b"null", "invalid_request", "must be an object"),
    (b"{}", "invalid_request", "inputs is missing"),
    (b'{"inputs": null}', "invalid_request", "inputs is missing"),
    (b'{"inputs": 5}', "invalid_request", "base64"),
    (b'{"inputs": ["TVRoZA=="]}', "invalid_request", "base64"),
    (b'{"inputs": "not base64!"}', "invalid_request", "not base64"),
    (b'{"inputs": "TVRoZ"}', "invalid_request", "not base64"),
    ('{"inputs": "MThdé"}'.encode(), "invalid_request", "not base64"),
    (b'{"inputs": ""}', "invalid_midi", "empty"),
    (b'{"inputs": "/etc/passwd"}', "invalid_request", "not base64"),
    (b'{"inputs": "UklGRg==", "parameters": [1]}', "invalid_request", "parameters must be an object"),
    (b'{"inputs": "UklGRg==", "parameter": {}}', "invalid_request", "unknown key 'parameter'"),
]
WRONG_MIDI = {
    "wav": (b"RIFF....WAVEfmt ", "invalid_midi", "not a MIDI file"),
    "header only": (b"MThd", "invalid_midi", "header"),
    "truncated": (midi_file(NOTE + END)[:-6], "invalid_midi", "truncated"),
    "track missing": (midi_file(NOTE + END)[:14], "invalid_midi", "fewer tracks"),
    "event cut off": (midi_file(NOTE + b"\0\x90\x3c"), "invalid_midi", "ends inside an event"),
    "no status": (midi_file(b"\0\x3c\x40" + END), "invalid_midi", "event"),
    "smpte": (midi_file(NOTE + END, division=0xE728), "invalid_midi", "SMPTE"),
    "no division": (midi_file(NOTE + END, division=0), "invalid_midi", "0 ticks"),
    "no notes": (midi_file(END), "invalid_midi", "no notes"),
    # The reader's own table ends at note 127 of channel 16: this would write beyond it.
    "note 128": (midi_file(b"\0\x9f\xbc\x40\x60\x8f\xbc\0" + END), "invalid_midi", "lacks its data"),
    "escape": (midi_file(b"\0\xf7\x40" + NOTE * 20 + END), "invalid_midi", "0xf7"),
    "meter of 2**-255": (midi_file(b"\0\xff\x58\4\1\xff\x18\x08" + NOTE + END), "invalid_midi", "meter"),
    "meter of 0": (midi_file(b"\0\xff\x58\4\0\2\x18\x08" + NOTE + END), "invalid_midi", "meter"),
    "long number": (midi_file(b"\xff\xff\xff\xff\x7f" + NOTE[1:] + END), "invalid_midi", "four bytes"),
    "ticks overflow": (midi_file((b"\xff\xff\xff\x7f" + NOTE[1:]) * 20 + END, division=32767), "too_large", "quarter"),
    "empty bars": (midi_file(b"\0\xff\x58\4\1\4\x18\x08\x83\xff\x7f" + NOTE[1:] + END, division=1), "too_large", "qua"),
    "notes": (midi_file(NOTE + b"\0\x90\x3c\x40" + b"\0\x3c\0\0\x3c\x40" * 120_000 + END), "too_large", "20,000 notes"),
    "open notes": (midi_file(b"\0\x90\x3c\x40" + b"\0\x3c\x40" * 240_000 + END), "too_large", "20,000 notes"),
    "tempos": (midi_file(NOTE + b"\1\xff\x51\3\7\xa1\x20" * 100_000 + END), "too_large", "changes of tempo"),
    "meters": (midi_file(NOTE + b"\1\xff\x58\4\4\2\x18\x08" * 90_000 + END), "too_large", "changes of tempo"),
    "tracks": (midi_file(NOTE + END, *[END] * 60_000), "too_large", "1,000 tracks"),
    "bytes": (midi_file(b"\0\xff\x03\xbd\x84\x40" + b"x" * 1_000_000 + NOTE + END), "too_large", "1,000,000 bytes"),
}


def malformed() -> list[tuple[bytes | dict, str, str]]:
    """Every kind of malformed request."""
    good = prompt(0)
    return [
        *((request_for(good, **parameters), kind, words) for parameters, kind, words in WRONG_PARAMETERS),
        *WRONG_BODIES,
        *((request_for(data), kind, words) for data, kind, words in WRONG_MIDI.values()),
    ]


def test_fifty_at_once_get_their_own_music_while_others_send_rubbish(address):
    """Each answer is the music that its prompt and its seed give where nobody else asks."""
    prompts = [prompt(seed) for seed in range(10)]
    asked = [
        (prompts[seed % 10], {"seed": 1000 + seed, "prompt_bars": 1, "bars": 1 + seed % 10 // 9}) for seed in range(50)
    ]
    rubbish = random.Random(0).sample(malformed(), 10)
    at_once = threading.Barrier(60)

    def send(body):
        at_once.wait()
        return post(address, body)

    with ThreadPoolExecutor(60) as pool:
        wrong = [pool.submit(send, body) for body, _, _ in rubbish]
        sent = [pool.submit(send, request_for(midi, **parameters)) for midi, parameters in asked]
        answers = [future.result() for future in sent]
        for future, (_, kind, _) in zip(wrong, rubbish, strict=True):
            assert future.result()[1]["error"]["type"] == kind
    model, tokenizer = load()
    for (status, answer), (midi, parameters) in zip(answers, asked, strict=True):
        assert status == 200, answer
        alone = continue_score(model, tokenizer, midi, **parameters).score.dumps_midi()
        assert base64.b64decode(answer["midi"]) == alone
        assert answer["seed"] == parameters["seed"]
    assert len({answer["midi"] for _, answer in answers}) == 50


def test_an_answer_is_whole(address):
    body = request_for(prompt(3, bars=4), prompt_bars=2, bars=2, seed=5, temperature=0.8, top_p=0.9, programs=[33])
    status, answer = post(address, body)
    assert status == 200
    data = base64.b64decode(answer["midi"])
    expected = read_notes(data)
    assert [(n["pitch"], n["velocity"], n["program"], n["track"]) for n in answer["notes"]] == [
        tuple(note) for note in expected[["pitch", "velocity", "program", "track"]].tolist()
    ]
    np.testing.assert_allclose([note["onset_s"] for note in answer["notes"]], expected["onset_s"], atol=1e-6)
    assert answer["prompt_end_s"] == 4.0  # two bars of 4/4 at 120
    new = [note for note in answer["notes"] if note["onset_s"] >= 4.0]
    assert answer["new_notes"] == len(new) > 0
    assert {note["program"] for note in new} == {33}
    assert answer["elapsed_s"] > 0
    assert isinstance(answer["remarks"], list)
    assert post(address, body)[1]["midi"] == answer["midi"]


def test_without_a_seed_every_request_has_its_own(address):
    body = {"inputs": "\n".join(request_for(prompt(1))["inputs"]), "parameters": {"bars": 1, "prompt_bars": None}}
    first, second = (post(address, body)[1] for _ in range(2))
    assert first["midi"] != second["midi"]
    body["parameters"]["seed"] = first["seed"]
    assert post(address, body)[1]["midi"] == first["midi"]


def test_what_is_malformed_is_said_and_harms_nothing(address):
    for body, kind, words in malformed():
        status, answer = post(address, body)
        assert (answer["error"]["type"], status) == (kind, 413 if kind == "too_large" else 400), answer
        assert words in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 300
    assert post(address, request_for(prompt(0), bars=1))[0] == 200


def test_what_passes_the_survey_holds_no_more_than_was_counted(module):
    """Mutated files: none of them crashes the reader behind the survey or has more notes than it saw."""
    rng = random.Random(0)
    seeds = [prompt(0), midi_file(b"\0\xff\x58\4\3\2\x18\x08" + NOTE * 4 + END, (b"\0\xff\x51\3\7\xa1\x20" + NOTE) * 4)]
    limits, read = module.Limits(), 0
    for _ in range(3000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(14, len(data))] = rng.choice(
                [0, 0x7F, 0x80, 0x90, 0x9F, 0xF0, 0xF7, 0xFF, 0x2F, 0x51, 0x58]
            )
        try:
            module.survey_midi(bytes(data), limits)
        except module.RequestError:
            continue
        read += 1
        try:
            with warnings.catch_warnings(action="ignore"):
                score = read_score(bytes(data))
        except InvalidMidiError:
            continue
        with pytest.raises(module.RequestError, match="notes"):
            module.survey_midi(bytes(data), module.Limits(max_notes=score.note_num() - 1))
        assert score.end() <= limits.max_quarters * score.ticks_per_quarter
    assert read > 300


# ---- in this process: what needs other limits


def test_too_many_are_told_to_come_back(handler):
    """Six at a time: the others hear so at once, and none of the six is lost."""
    bodies = [request_for(prompt(0), bars=2, seed=seed, prompt_bars=1) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(handler, bodies))
    busy = [answer for answer in answers if "error" in answer]
    assert {answer["error"]["type"] for answer in busy} <= {"busy"}
    assert 1 <= len(busy) <= 6
    assert all(answer["new_notes"] for answer in answers if "error" not in answer)
    assert "new_notes" in handler(bodies[0])


def test_music_ends_at_the_time_limit_with_a_remark(handler, monkeypatch):
    monkeypatch.setattr(handler, "limits", type(handler.limits)(time_limit=0.2))
    answer = handler(request_for(prompt(0, bars=4), bars=64, seed=0))
    assert len(read_notes(base64.b64decode(answer["midi"]))) == len(answer["notes"])
    assert any("time" in remark for remark in answer["remarks"]), answer["remarks"]


def test_who_waited_too_long_is_told_so(handler, monkeypatch):
    """At once, and not when the music before theirs is done."""
    late = request_for(prompt(0), bars=1, prompt_bars=1, seed=1)
    monkeypatch.setattr(handler, "limits", type(handler.limits)(max_wait=1))
    begun, go_on, forward = threading.Event(), threading.Event(), handler.pipe.forward

    def held(inputs):
        begun.set()
        assert go_on.wait(60)
        return forward(inputs)

    monkeypatch.setattr(handler.pipe, "forward", held)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(handler, late)
        assert begun.wait(60)
        try:
            answer = pool.submit(handler, late).result(30)
        finally:
            go_on.set()
        assert answer["error"]["type"] == "busy"
        assert "waited 1 s" in answer["error"]["message"]
        assert first.result()["new_notes"]  # it has waited longer than that, but not for its turn
    assert not handler._waiting
    assert handler(late)["midi"] == first.result()["midi"]


def test_a_short_piece_does_not_wait_for_the_end_of_long_ones(handler, monkeypatch):
    monkeypatch.setattr(handler, "limits", type(handler.limits)(time_limit=0.5))
    lengths = [17, 1, 24, 2, 1]  # the seeds are their places
    bodies = [request_for(prompt(0), bars=bars, prompt_bars=1, seed=seed) for seed, bars in enumerate(lengths)]
    answers, batches = answers_at_once(handler, monkeypatch, bodies)
    assert batches == [[0, 2], [1, 4], [3]]  # the oldest first, and who asks for about as much
    assert all("error" not in answer for answer in answers)


def test_sound_comes_as_a_wav_of_its_length(handler):
    answer = handler(request_for(prompt(2), bars=1, seed=0, audio=True, sample_rate=22050))
    with wave.open(io.BytesIO(base64.b64decode(answer["audio"]))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 22050)
        seconds = file.getnframes() / 22050
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    end = max(note["onset_s"] + note["duration_s"] for note in answer["notes"])
    assert end <= seconds < end + 10
    assert np.abs(sound).max() > 10_000
    assert "audio" not in handler(request_for(prompt(2), bars=1, seed=0, audio=False))


def test_sound_of_a_slow_prompt_is_refused_not_rendered(handler):
    """One quarter note of 16.8 s: four bars are minutes of sound."""
    slow = midi_file(b"\0\xff\x51\3\xff\xff\xff" + NOTE * 16 + END)
    answer = handler(request_for(slow, bars=4, seed=0, audio=True))
    assert answer["error"]["type"] == "too_large"
    assert "audio" in answer["error"]["message"]
    assert "notes" in handler(request_for(slow, bars=1, seed=0))


def test_a_prompt_that_fails_in_a_batch_takes_no_other_with_it(handler, monkeypatch):
    """The pipeline refuses one of them; and words about the server's insides stay inside."""
    bodies = [request_for(prompt(seed), bars=1, prompt_bars=1, seed=seed) for seed in range(4)]
    alone = [handler(body)["midi"] for body in bodies]
    poison = request_for(overfull(), bars=1, prompt_bars=1, seed=9)
    (wrong, *right), batches = answers_at_once(handler, monkeypatch, [poison, *bodies])
    assert wrong["error"]["type"] == "invalid_request"
    assert "single bar" in wrong["error"]["message"]
    assert [answer["midi"] for answer in right] == alone
    assert batches == [[0, 1, 2, 3]]  # and they are still written at once
    whole = handler.pipe.preprocess

    def fails(message):
        def preprocess(midi, **options):
            if b"poison" in midi:
                raise ValueError(message)
            return whole(midi, **options)

        return preprocess

    poison = request_for(midi_file(b"\0\xff\x03\6poison" + NOTE + END), bars=1, prompt_bars=1)
    for message, kind in (("<bytes>: too odd.", "invalid_request"), ("cannot open /srv/model/x.bin", "internal")):
        monkeypatch.setattr(handler.pipe, "preprocess", fails(message))
        with ThreadPoolExecutor(5) as pool:
            wrong, *right = pool.map(handler, [poison, *bodies])
        assert wrong["error"]["type"] == kind
        assert "/srv" not in json.dumps(wrong)
        assert [answer["midi"] for answer in right] == alone


def test_a_batch_that_fails_is_written_one_by_one(handler, monkeypatch):
    """As with too little memory for all. Who has had their turn need not wait for it again, nor for all others."""
    bodies = [request_for(prompt(seed), bars=1, prompt_bars=1, seed=seed) for seed in range(4)]
    alone = [handler(body)["midi"] for body in bodies]
    monkeypatch.setattr(handler, "limits", type(handler.limits)(max_wait=3, time_limit=40))
    limits = []

    def write(forward, inputs, futures):
        (plan, *others) = inputs["plans"]
        if others:
            time.sleep(3.5)
            raise RuntimeError("too little memory")
        limits.append(plan.time_limit)
        if plan.seed:
            futures[plan.seed - 1].result(30)  # who is done has been told
        if plan.seed == 2:
            raise RuntimeError("still too little memory")
        return forward(inputs)

    answers, batches = answers_at_once(handler, monkeypatch, bodies, write)
    assert batches == [[0, 1, 2, 3], [0], [1], [2], [3]]
    assert answers.pop(2)["error"]["type"] == "internal"
    assert [answer["midi"] for answer in answers] == [midi for seed, midi in enumerate(alone) if seed != 2]
    assert limits[0] <= 10 and sum(limits) <= 4 * 40  # one time limit for all of them
    assert limits == sorted(limits)  # what one has not used is the others'


def test_a_temperature_may_be_a_whole_number(handler):
    """Alone, as `generate_options` are, and in a batch."""
    for options in ({}, {"generate_options": {"use_mtp": False}}):
        answers = [handler(request_for(prompt(0), bars=1, seed=1, temperature=t, **options)) for t in (2, 2.0)]
        assert answers[0]["midi"] == answers[1]["midi"]


def test_who_asks_at_the_same_time_is_in_one_batch(module, handler, monkeypatch):
    """From the first one on: it waits a little for others."""
    forward, batches = handler.pipe.forward, []
    while handler._worker is not None:  # it may be about to take what comes
        time.sleep(0.01)
    monkeypatch.setattr(module, "GATHER", 1.0)
    monkeypatch.setattr(handler.pipe, "forward", lambda inputs: batches.append(len(inputs["plans"])) or forward(inputs))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(handler, [request_for(prompt(0), bars=1, prompt_bars=1, seed=s) for s in range(4)]))
    assert batches == [4]
    assert len({answer["midi"] for answer in answers}) == 4


def test_what_a_request_leaves_out_is_within_the_limits_of_bars(handler, monkeypatch):
    monkeypatch.setattr(handler, "limits", type(handler.limits)(max_prompt_bars=2, max_bars=1))
    answer = handler(request_for(prompt(0, bars=4), seed=0))
    assert answer["prompt_end_s"] == 4.0  # two bars at 120
    assert max(note["onset_s"] for note in answer["notes"]) < 6.0


def test_limits_come_from_the_environment_and_are_checked(module, monkeypatch):
    monkeypatch.setenv("SAGE_MUSIC_MAX_BARS", "8")
    monkeypatch.setenv("SAGE_MUSIC_TIME_LIMIT", "2.5")
    limits = module.Limits.from_environment(max_bytes=5)
    assert (limits.max_bars, limits.time_limit, limits.max_bytes) == (8, 2.5, 5)
    for text, words in (("many", "not a whole number"), ("0", "positive"), ("-3", "positive")):
        monkeypatch.setenv("SAGE_MUSIC_MAX_BARS", text)
        with pytest.raises(ValueError, match=words):
            module.Limits.from_environment()


def test_the_handler_stands_alone_and_agrees_with_the_package(module):
    """It imports nothing of ours, and the lengths it takes where none is asked for are the package's."""
    imported = set()
    for node in ast.walk(ast.parse(HANDLER.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported <= {"numpy", "torch", "transformers"} | set(sys.stdlib_module_names)
    documented = module.Limits.__doc__
    assert all(limit.name in documented for limit in fields(module.Limits))


# ---- the other family


def test_what_a_request_leaves_out_is_within_the_limits_of_seconds(module, repositories):
    handler = module.EndpointHandler(repositories["perceivers"], max_prompt_s=1.5, max_music_s=1.0)
    for options in ({}, {"music_s": None, "max_tokens": 1500, "max_note_s": 0.02, "temperature": 10}):
        answer = handler(request_for(prompt(0, bars=4), seed=0, **options))
        assert answer["prompt_end_s"] == 1.5
        assert 1.5 < max(note["onset_s"] + note["duration_s"] for note in answer["notes"]) < 2.52
    handler = module.EndpointHandler(repositories["perceivers"], max_tokens=40)
    remarks = handler(request_for(prompt(0), seed=0, prompt_s=1.5))["remarks"]
    assert any("limit of 40 new tokens" in remark for remark in remarks), remarks


def test_performances_of_several_at_once_are_their_own(repositories):
    asked = [(prompt(seed), {"seed": seed, "prompt_s": 2.0, "music_s": 1.0}) for seed in range(6)]
    with running(repositories["perceivers"], OMP_NUM_THREADS="1") as address:
        with ThreadPoolExecutor(8) as pool:
            sent = [pool.submit(post, address, request_for(midi, **parameters)) for midi, parameters in asked]
            wrong = [
                pool.submit(post, address, request_for(prompt(0), **parameters))
                for parameters in ({"bars": 4}, {"music_s": None}, {"music_s": 10**6})
            ]
            # Notes of 10 ms, one after the other: more to read than can be done in a time that is nobody's limit.
            dense = midi_file(b"\0\x90\x3c\x40" + b"\2\x3c\0\0\x3c\x40" * 4000 + b"\0\x3c\0" + END)
            wrong.append(pool.submit(post, address, request_for(dense, prompt_s=600)))
            answers = [future.result() for future in sent]
            messages = [future.result()[1]["error"]["message"] for future in wrong]
    assert "'bars' is no parameter of PerceiverS" in messages[0]
    assert "give max_tokens" in messages[1]
    assert "music_s may be 120.0 at most" in messages[2]
    assert "tokens, 8,192 at most" in messages[3]
    model, tokenizer = load("perceivers")
    for (status, answer), (midi, parameters) in zip(answers, asked, strict=True):
        assert status == 200, answer
        alone = continue_performance(model, tokenizer, midi, **parameters).score.dumps_midi()
        assert base64.b64decode(answer["midi"]) == alone
        assert answer["prompt_end_s"] <= 2.0
