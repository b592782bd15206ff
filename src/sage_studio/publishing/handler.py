"""An inference endpoint: MIDI in JSON, its continuation in JSON. Lies in the model's repository; needs nothing of ours.

Hugging Face's inference toolkit makes `EndpointHandler(folder)` once and calls it with the body of every request:

    {"inputs": "<base64 of a MIDI file>", "parameters": {"bars": 8, "temperature": 0.9, "seed": 1}}

Parameters are the options of the repository's `midi-continuation` pipeline: `temperature`, `top_p`, `seed`, `audio`,
`sample_rate` of every model; `prompt_bars`, `bars`, `free`, `programs`, `generate_options` of SAGE-Music;
`prompt_s`, `music_s`, `max_tokens`, `max_note_s` of PerceiverS. The answer is

    {"midi": "<base64>", "notes": [{"onset_s", "duration_s", "pitch", "velocity", "program", "track"}, ...],
     "prompt_end_s": 8.0, "new_notes": 57, "elapsed_s": 1.2, "remarks": [...], "seed": 1}

and with `"audio": true` also `"audio"`, base64 of a 16-bit stereo WAV. `seed` gives the same music again; without one
a request gets its own. `"music_s": null` leaves the end to `max_tokens`, within the server's limit of seconds. What
goes wrong is an answer too, never an exception:

    {"error": {"type": "invalid_midi", "message": "damaged or truncated MIDI (...)."}}

| type | what to do |
|---|---|
| `invalid_request` | mend the request: a key, an option or its value is wrong, or does not fit the prompt |
| `invalid_midi` | send another file: this one cannot be read as music |
| `too_large` | send less, or ask for less: a limit below is exceeded |
| `busy` | come back later: too many requests are waiting |
| `unavailable` | ask without audio: this server has no SoundFont |
| `internal` | nothing: the fault is the server's, and in its log |

Each limit of `Limits` can be set by an environment variable: `max_bytes` by `SAGE_MUSIC_MAX_BYTES`. While one batch is
generated, for `time_limit` at most, others wait; the oldest is next, and with it what can be decoded together: with
SAGE-Music requests of one temperature, one top_p and about as many bars (1, 2, 3-4, 5-8, 9-16 ...), with PerceiverS
seeds for one prompt. Those of a batch are answered when the last of them has ended.

Each has random numbers of its own, so that nobody's music depends on who else asks, but for the rounding of sums, and
for `time_limit`: a batch is slower than one request, so that a piece may be cut (a remark says so) that alone would
just have been finished. `SAGE_MUSIC_BATCH=1`: neither.
"""

import base64
import binascii
import inspect
import io
import logging
import os
import re
import secrets
import threading
import time
import wave
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from transformers import pipeline

logger = logging.getLogger(__name__)

SOUND = ("audio", "sample_rate")
COMMON = ("temperature", "top_p", "seed", *SOUND)

# Of generate()'s own options, those that a stranger may set: none changes what is checked here, or takes memory.
GENERATE_OPTIONS = ("use_mtp", "num_assistant_tokens")

# Seconds that a batch waits for company: who was answered and asks again at once is in the next one, not the one after.
GATHER = 0.02

# Whole numbers that every JSON reader gets right.
MAX_SEED = 2**53 - 1


@dataclass(frozen=True)
class Limits:
    """What one request may hold and ask for, and how many there may be.

    Attributes:
        max_bytes: of a MIDI file.
        max_notes, max_tracks: in it, the part that is not continued included.
        max_changes: of tempo and meter in it.
        max_quarters: its length in quarter notes.
        max_prompt_bars, max_bars: bars of prompt, new bars (SAGE-Music).
        max_prompt_s, max_music_s, max_tokens: seconds of prompt, new seconds and tokens (PerceiverS).
        max_prompt_tokens: tokens of prompt that the model hears; no time limit can interrupt their reading.
        max_audio_s: seconds of prompt and new music together, where audio is asked for.
        time_limit: seconds that one generation may take; the music then ends early, with a remark.
        max_waiting: requests being served or waiting; the next one is told that the server is busy.
        max_wait: seconds after which a request whose turn has not come is told so too.
        batch: requests decoded together at most; 1: one at a time.
    """

    max_bytes: int = 1_000_000
    max_notes: int = 20_000
    max_tracks: int = 1_000
    max_changes: int = 10_000
    max_quarters: int = 20_000
    max_prompt_bars: int = 256
    max_bars: int = 64
    max_prompt_s: float = 600.0
    max_music_s: float = 120.0
    max_tokens: int = 20_000
    max_prompt_tokens: int = 8_192
    max_audio_s: float = 240.0
    time_limit: float = 60.0
    max_waiting: int = 64
    max_wait: float = 120.0
    batch: int = 8

    @classmethod
    def from_environment(cls, **given) -> "Limits":
        """Limits by `given`, the environment's `SAGE_MUSIC_...`, the defaults, in this order.

        Raises:
            ValueError: a variable that is not a number, or a limit that is not positive; the message names it.
        """
        values = dict(given)
        for limit in fields(cls):
            variable = f"SAGE_MUSIC_{limit.name.upper()}"
            text = os.environ.get(variable)
            if limit.name not in given and text is not None:
                try:
                    values[limit.name] = type(limit.default)(text)
                except ValueError as error:
                    kind = "whole number" if isinstance(limit.default, int) else "number"
                    raise ValueError(f"{variable}={text} is not a {kind}.") from error
        limits = cls(**values)
        for limit in fields(cls):
            value = getattr(limits, limit.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"the limit {limit.name} must be positive, not {value}.")
        return limits


class RequestError(Exception):
    """A request that gets an error for an answer; `kind` is one of the types in the module's docstring."""

    kind = "invalid_request"


class InvalidMidi(RequestError):
    """A file that cannot be read as music."""

    kind = "invalid_midi"


class TooLarge(RequestError):
    """More than the server's limits allow."""

    kind = "too_large"


class Busy(RequestError):
    """More requests than the server can serve in time."""

    kind = "busy"


@dataclass(eq=False)
class Job:
    """A checked request on its way: its own prompt, seed and answer, shared with nobody.

    Attributes:
        options: of the music; `sound`: of its audio.
    """

    midi: bytes
    seed: int
    options: dict
    sound: dict
    answer: dict | None = None


class EndpointHandler:
    """Answers requests for continuations, from any number of threads.

    Args:
        path: the repository's folder; by default the one this file lies in.
        limits: in place of the environment's, by name: `max_bars=16`.

    Raises:
        ValueError: a limit, here or in the environment, that is none.
    """

    def __init__(self, path: str | os.PathLike = "", **limits):
        self.limits = Limits.from_environment(**limits)
        folder = os.fspath(path) or str(Path(__file__).resolve().parent)
        self.pipe = pipeline("midi-continuation", model=folder, trust_remote_code=True)
        self.family = self.pipe.family
        self.options = (*self.family.options, *COMMON)
        parameters = inspect.signature(self.pipe.plan).parameters
        self.defaults = {name: parameters[name].default for name in (self.family.prompt_length, self.family.length)}
        self._inside = threading.BoundedSemaphore(self.limits.max_waiting)
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Job] = deque()
        self._worker: threading.Thread | None = None

    def __call__(self, data: dict) -> dict:
        """The answer to one request, in JSON's types. Raises nothing."""
        if not self._inside.acquire(blocking=False):
            return _error("busy", f"{self.limits.max_waiting} requests are waiting already: try again later.")
        try:
            return self._wait(self._read(data))
        except Exception as error:
            return self._failure(error)
        finally:
            self._inside.release()

    # ---- reading a request

    def _read(self, data) -> Job:
        if not isinstance(data, dict):
            raise RequestError('the body must be an object: {"inputs": ..., "parameters": {...}}.')
        unknown = [name for name in data if name not in ("inputs", "parameters")]
        if unknown:
            raise RequestError(f"unknown key {_quoted(unknown[0])}: inputs and parameters are known.")
        parameters = data.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise RequestError("parameters must be an object of options.")
        options = self._check_options(parameters or {})
        sound = {name: options.pop(name) for name in SOUND if name in options}
        seed = options.pop("seed", None)
        midi = _decode_midi(data.get("inputs"), self.limits.max_bytes)
        survey_midi(midi, self.limits)
        return Job(midi, secrets.randbelow(MAX_SEED + 1) if seed is None else seed, options, sound)

    def _check_options(self, given: dict) -> dict:
        """The options of a request, each of the right type and within the limits."""
        options = {}
        for name, value in given.items():
            if name not in self.options:
                known = ", ".join(self.options)
                raise RequestError(f"{_quoted(name)} is no parameter of {self.family.name}; these are: {known}.")
            if value is not None:  # null: as if it were not there, but for the two below
                options[name] = _checked(name, value, self.limits)
            elif name == "max_note_s":
                options[name] = None
        # Lengths where a request names none: the pipeline's own, unless the server allows less.
        for name, default in self.defaults.items():
            most = getattr(self.limits, f"max_{name}")
            if self.family.options[name].nullable and name in given and given[name] is None:
                if "max_tokens" not in options:
                    raise RequestError(f"{name} is null: give max_tokens, one of them must end the piece.")
                default = most
            options.setdefault(name, min(default, most))
        return options

    # ---- generating, one batch at a time

    def _wait(self, job: Job) -> dict:
        """The answer to `job`, from the one thread that generates; it lives for as long as somebody waits."""
        with self._changed:
            if self._worker is None or not self._worker.is_alive():
                worker = threading.Thread(target=self._work, daemon=True)
                worker.start()
                self._worker = worker
            self._waiting.append(job)
            if not self._changed.wait_for(lambda: job not in self._waiting, self.limits.max_wait):
                self._waiting.remove(job)
                raise Busy(f"the request waited {self.limits.max_wait:g} s for its turn: try again later.")
            self._changed.wait_for(lambda: job.answer is not None)
        return job.answer

    def _work(self) -> None:
        while batch := self._take():
            try:
                self._generate(batch)
            finally:
                for job in batch:
                    if job.answer is None:
                        self._tell(job, _error("internal", "the request was not finished."))

    def _take(self) -> list[Job]:
        """The oldest waiting job and those that can be decoded with it, out of the queue; none: the thread may end."""
        time.sleep(GATHER)
        with self._changed:
            if not self._waiting:
                self._worker = None
                return []
            key = self._key(self._waiting[0])
            batch = [job for job in self._waiting if self._key(job) == key][: self.limits.batch]
            for job in batch:
                self._waiting.remove(job)
            self._changed.notify_all()
            return batch

    def _key(self, job: Job):
        """Jobs of equal keys are decoded together."""
        if not self.family.counts_bars:
            return job.midi, job.options  # prompts of other lengths would only wait for each other
        if "generate_options" in job.options:
            return id(job)
        # All wait for the longest: 1, 2, 3-4, 5-8, 9-16 ... bars.
        return job.options.get("temperature"), job.options.get("top_p"), (job.options["bars"] - 1).bit_length()

    def _generate(self, batch: list[Job]) -> None:
        """Give every job of the batch its answer.

        Prompts are read here, one after the other, and not in each request's thread: reading takes the process's time.
        """
        plans = {}
        for job in batch:
            try:
                plans[job] = self._plan(job)
            except Exception as error:
                self._tell(job, self._failure(error))
        if plans:
            self._write(plans)

    def _plan(self, job: Job):
        """What is to be written for a job."""
        limits = self.limits
        (plan,) = self.pipe.preprocess(job.midi, seed=job.seed, time_limit=limits.time_limit, **job.options)["plans"]
        heard = min(len(plan.ids), self.pipe.model.config.max_position_embeddings)
        if heard > limits.max_prompt_tokens:
            raise TooLarge(f"the prompt has {heard:,} tokens, {limits.max_prompt_tokens:,} at most: shorten it.")
        if not self.family.counts_bars:  # where a request names none, seconds have room for many
            plan.budget = min(plan.budget, limits.max_tokens)
        return plan

    def _write(self, plans: dict) -> None:
        """Generate what is planned and answer each job; where they fail together, one by one."""
        try:
            music, failure = self.pipe.forward({"plans": list(plans.values())}), None
        except Exception as error:  # let go before the next attempt: it holds what was in memory
            music, failure = {}, self._failure(error)
        if failure and len(plans) > 1:
            end = time.monotonic() + self.limits.time_limit  # for all of them
            for left, (job, plan) in zip(range(len(plans), 0, -1), plans.items(), strict=True):
                plan.time_limit = max(round((end - time.monotonic()) / left, 1), 0.1)
                self._write({job: plan})
            return
        for index, job in enumerate(plans):
            try:
                answer = failure or self._answer(job, {name: [values[index]] for name, values in music.items()})
            except Exception as error:
                answer = self._failure(error)
            self._tell(job, answer)

    def _tell(self, job: Job, answer: dict) -> None:
        with self._changed:
            job.answer = answer
            self._changed.notify_all()

    def _answer(self, job: Job, music: dict) -> dict:
        """What the pipeline wrote for a job, in JSON's types."""
        result = self.pipe.postprocess(music)
        notes = result["notes"]
        end_s = float((notes["onset_s"] + notes["duration_s"]).max(initial=0.0))
        columns = [
            [round(value, 6) for value in column] if name.endswith("_s") else column
            for name, column in ((name, notes[name].tolist()) for name in notes.dtype.names)
        ]
        answer = {
            "midi": base64.b64encode(result["midi"]).decode("ascii"),
            "notes": [dict(zip(notes.dtype.names, row, strict=True)) for row in zip(*columns, strict=True)],
            "prompt_end_s": round(float(result["prompt_end_s"]), 6),
            "new_notes": int(result["new_notes"]),
            "elapsed_s": float(result["elapsed_s"]),
            "remarks": [str(remark).removeprefix("<bytes>: ") for remark in result["remarks"]],
            "seed": job.seed,
        }
        if job.sound.get("audio"):
            if end_s > self.limits.max_audio_s:
                most = f"audio may last {self.limits.max_audio_s:g} s"
                raise TooLarge(f"{most}, and this music lasts {end_s:.0f} s: ask for less, or without audio.")
            result = self.pipe.postprocess(music, **job.sound)
            answer["audio"] = base64.b64encode(_wav(result["audio"], result["sampling_rate"])).decode("ascii")
        return answer

    def _failure(self, error: Exception) -> dict:
        """The answer for an error: its own words where they are about the request, and no path."""
        if isinstance(error, RequestError):
            return _error(error.kind, str(error))
        name = type(error).__name__  # the pipeline's own errors are of a module that cannot be imported here
        message = str(error).removeprefix("<bytes>: ")
        if name == "MissingExtraError":
            return _error("unavailable", "this server has no SoundFont to play audio with: ask without audio.")
        if isinstance(error, ValueError) and not re.search(r"[/\\]\w[^\s/\\]*[/\\]\w", message):
            return _error("invalid_midi" if name == "InvalidMidiError" else "invalid_request", message)
        logger.error("a request failed", exc_info=error)
        return _error("internal", "the request failed; the server's log says why.")


# ---- MIDI, before anything reads it


def survey_midi(data: bytes, limits: Limits) -> None:
    """Walk through a MIDI file and count what costs time later, before a reader or a tokenizer sees it.

    The walk is stricter than readers are, so that what they find in the file is what was counted here.

    Raises:
        RequestError: `invalid_midi` for what is no MIDI file, `too_large` for more than the limits allow.
    """
    if not data.startswith(b"MThd"):
        raise InvalidMidi("not a MIDI file (it does not begin with 'MThd').")
    if len(data) < 14 or data[4:8] != b"\0\0\0\6":
        raise InvalidMidi("damaged or truncated MIDI (its header is not six bytes long).")
    division = int.from_bytes(data[12:14], "big")
    if division & 0x8000:
        raise InvalidMidi("times are SMPTE frames, not beats: export it with ticks per quarter note.")
    if division == 0:
        raise InvalidMidi("its header gives 0 ticks per quarter note.")
    budget = _Budget(limits, limits.max_quarters * division)
    position, declared = 14, int.from_bytes(data[10:12], "big")
    while position + 8 <= len(data) and budget.tracks < declared:  # what follows the last track is nobody's music
        end = position + 8 + int.from_bytes(data[position + 4 : position + 8], "big")
        if end > len(data):
            raise InvalidMidi("damaged or truncated MIDI (a chunk is longer than the file).")
        if data[position : position + 4] == b"MTrk":
            budget.spend("tracks")
            try:
                _survey_track(data[position + 8 : end], budget)
            except IndexError as error:
                raise InvalidMidi("damaged MIDI (a track ends inside an event).") from error
        position = end
    if budget.tracks < declared:
        raise InvalidMidi("damaged or truncated MIDI (it has fewer tracks than its header says).")
    if not budget.notes:
        raise InvalidMidi("it holds no notes.")


class _Budget:
    """What was found so far, refused as soon as it is too much."""

    def __init__(self, limits: Limits, last_tick: int):
        self.limits, self.last_tick = limits, last_tick
        self.notes = self.tracks = self.changes = 0

    def spend(self, what: str) -> None:
        found = getattr(self, what) + 1
        setattr(self, what, found)
        most = getattr(self.limits, f"max_{what}")
        if found > most:
            words = {"changes": "changes of tempo and meter"}.get(what, what)
            raise TooLarge(f"the MIDI file has more than {most:,} {words}: send what is to be continued.")


def _survey_track(track: bytes, budget: _Budget) -> None:
    """Walk through the events of one track. Raises `RequestError`, or `IndexError` where an event is cut off."""
    position = now = status = 0
    while position < len(track):
        delta, position = _variable(track, position)
        now += delta
        if now > budget.last_tick:
            raise TooLarge(f"the MIDI file is longer than {budget.limits.max_quarters:,} quarter notes.")
        byte = track[position]
        if byte >= 0x80:
            position += 1
            if byte < 0xF0:
                status = byte
        else:
            byte = status
            if not status:
                raise InvalidMidi("damaged MIDI (data where an event should begin).")
        if byte < 0xF0:  # a channel's event, of one data byte (program, pressure) or two
            size = 1 if 0xC0 <= byte < 0xE0 else 2
            if track[position] | track[position + size - 1] > 0x7F:
                raise InvalidMidi("damaged MIDI (an event lacks its data).")
            if 0x90 <= byte < 0xA0 and track[position + 1]:
                budget.spend("notes")
            position += size
        elif byte == 0xFF:
            kind = track[position]
            size, position = _variable(track, position + 1)
            body = track[position : position + size]
            position += size
            if kind == 0x2F:
                return
            _check_meta(kind, body, budget)
        elif byte == 0xF0:
            size, position = _variable(track, position)
            position += size
        else:
            raise InvalidMidi(f"damaged MIDI (an event of the type {byte:#x}, which readers do not know).")
    if position > len(track):
        raise IndexError


def _variable(track: bytes, position: int) -> tuple[int, int]:
    """A number of one to four bytes, seven bits each, and where it ends."""
    value = 0
    for _ in range(4):
        byte = track[position]
        position += 1
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, position
    raise InvalidMidi("damaged MIDI (a number of more than four bytes).")


def _check_meta(kind: int, body: bytes, budget: _Budget) -> None:
    """Tempo and meter: whole, few, and such that a bar has a length."""
    if kind == 0x51:
        budget.spend("changes")
        if len(body) != 3:
            raise InvalidMidi("damaged MIDI (a tempo that is not three bytes long).")
    elif kind == 0x58:
        budget.spend("changes")
        if len(body) < 2 or not 1 <= body[0] <= 64 or body[1] > 6:
            raise InvalidMidi("a meter in it is broken (not 1 to 64 beats of a whole to a 64th note).")


def _decode_midi(inputs, max_bytes: int) -> bytes:
    """The bytes of a MIDI file sent as base64 (or as they are, where the server hands on a binary body)."""
    if inputs is None:
        raise RequestError("inputs is missing: send a MIDI file in base64.")
    if not isinstance(inputs, str | bytes | bytearray):
        raise RequestError("inputs must be one text: a MIDI file in base64.")
    too_large = TooLarge(f"the MIDI file is larger than {max_bytes:,} bytes.")
    if len(inputs) > max_bytes * 3 // 2:  # base64 takes 4/3, and line ends
        raise too_large
    if isinstance(inputs, str):
        try:
            inputs = base64.b64decode("".join(inputs.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError("inputs is not base64.") from error
    if len(inputs) > max_bytes:
        raise too_large
    if not inputs:
        raise InvalidMidi("the file is empty.")
    return bytes(inputs)


# ---- options and answers


def _checked(name: str, value, limits: Limits):
    """The value of an option. Raises `RequestError` for one of the wrong type, `TooLarge` beyond the limits."""
    if name in ("free", "audio", "use_mtp"):
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be true or false.")
    elif name == "programs":
        if not isinstance(value, list) or not 1 <= len(value) <= 129 or not all(map(_is_program, value)):
            raise RequestError("programs must be a list of General MIDI programs, 0-127, or -1 for drums.")
    elif name == "generate_options":
        if not isinstance(value, dict) or not set(value) <= set(GENERATE_OPTIONS):
            raise RequestError(f"generate_options may hold {' and '.join(GENERATE_OPTIONS)}, no others.")
        for option, setting in value.items():
            _checked(option, setting, limits)
    else:
        low, high = {
            "prompt_bars": (1, limits.max_prompt_bars),
            "bars": (1, limits.max_bars),
            "max_tokens": (1, limits.max_tokens),
            "seed": (0, MAX_SEED),
            "sample_rate": (8_000, 48_000),
            "num_assistant_tokens": (1, 4),
            "temperature": (0.0, 10.0),
            "top_p": (0.001, 1.0),
            "prompt_s": (0.01, limits.max_prompt_s),
            "music_s": (0.01, limits.max_music_s),
            "max_note_s": (0.01, 600.0),
        }[name]
        kinds, words = (int, "a whole number") if isinstance(low, int) else (int | float, "a number")
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value < float("inf"):  # NaN neither
            raise RequestError(f"{name} must be {words} from {low:,} to {high:,}.")
        if value > high:
            raise TooLarge(f"{name} may be {high:,} at most.")
        if name == "temperature" and 0 < value < 0.01:  # scores divided by less overflow
            raise RequestError("temperature must be 0, or 0.01 or more.")
    return value


def _is_program(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= 127


def _quoted(name) -> str:
    """A stranger's word, short enough to repeat."""
    text = str(name)
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _wav(samples: np.ndarray, sample_rate: int) -> bytes:
    """A 16-bit WAV of `(channels, samples)` in -1..1."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((samples.clip(-1, 1).T * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _error(kind: str, message: str) -> dict:
    return {"error": {"type": kind, "message": message}}
