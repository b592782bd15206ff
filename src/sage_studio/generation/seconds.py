"""Piano performances from a checkpoint: unprompted pieces and continuations, counted in seconds, of any length.

from sage_studio.checkpoints import load
from sage_studio.generation.seconds import continue_performance
model, tokenizer = load("perceivers")
performance = continue_performance(model, tokenizer, "prompt.mid", prompt_seconds=20, seconds=60, seed=0)
performance.score.dump_midi("continuation.mid")
"""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from symusic import Score
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from perceivers.generation_perceivers import DurationLogitsProcessor, NoteDurationLogitsProcessor
from perceivers.modeling_perceivers import PerceiverSForCausalLM
from perceivers.tokenization_perceivers import PerceiverSTokenizer
from sage_studio.defaults import MAX_NOTE_SECONDS, PROMPT_SECONDS, SECONDS
from sage_studio.errors import InvalidMidiError
from sage_studio.music.midi import read_score

from .sampling import TURN, Deadline, Generated, heard_warnings, sampling_options, seeded

# Room for the seconds to end a piece, not the tokens: twice what dense piano takes, and a few chords.
TOKENS_PER_SECOND, SPARE_TOKENS = 240, 256
SUSTAIN = 64  # the one controller that tokens hold, in the durations


@dataclass(kw_only=True)
class Performance(Generated):
    """A generated performance, counted in seconds.

    Attributes:
        prompt_seconds: where the new music begins; 0 without a prompt.
        music_seconds: playing time of the new music.
        tokens: new tokens.
    """

    prompt_seconds: float
    music_seconds: float
    tokens: int


def continue_performance(
    model: PerceiverSForCausalLM,
    tokenizer: PerceiverSTokenizer,
    prompt: "str | os.PathLike | bytes | Score",
    prompt_seconds: float = PROMPT_SECONDS,
    seconds: float | None = SECONDS,
    max_tokens: int | None = None,
    **options,
) -> Performance:
    """Continue the first `prompt_seconds` seconds of a MIDI file by `seconds` seconds.

    What the prompt does before the cut stays as it is (on the tokens' grid of 10 ms); notes that sound there are ended
    by the model, at the cut or later. A prompt that ends before the cut is continued from its end.

    Args:
        prompt: path, bytes or score; its instruments are played as one piano, without the drums.
        options: `temperature`, `top_p`, `seed`, `max_note_seconds`, `progress`, `time_limit`; these, `seconds` and
            `max_tokens` (both of the new music) as for `generate_performance`.

    Raises:
        InvalidMidiError: the prompt cannot be read, or holds nothing for a piano.
        ValueError: as `generate_performance`; or `max_tokens` cannot end the notes that sound at the cut.
    """
    return plan_continuation(model, tokenizer, prompt, prompt_seconds, seconds, max_tokens, **options).write()


def plan_continuation(
    model: PerceiverSForCausalLM,
    tokenizer: PerceiverSTokenizer,
    prompt: "str | os.PathLike | bytes | Score",
    prompt_seconds: float = PROMPT_SECONDS,
    seconds: float | None = SECONDS,
    max_tokens: int | None = None,
    **options,
) -> "Plan":
    """What `continue_performance` is about to write: everything is read and checked, and no token generated yet.

    Arguments and errors are those of `continue_performance`.
    """
    if not 0 < prompt_seconds < math.inf:
        raise ValueError(f"prompt_seconds {prompt_seconds} must be a positive number.")
    is_file = isinstance(prompt, str | os.PathLike)
    with heard_warnings() as heard:
        score = read_score(prompt) if is_file or isinstance(prompt, bytes) else prompt
        try:
            ids, whole = (tokenizer.midi_to_ids(score, seconds=cut) for cut in (prompt_seconds, None))
        except ValueError as error:
            name = os.fspath(prompt) if is_file else "<bytes>" if isinstance(prompt, bytes) else "<score>"
            raise InvalidMidiError(name, str(error).removeprefix("<score>: ")) from error
    remarks = _unheard(score) + heard
    clock = _Clock(tokenizer)
    now = start = clock.steps(ids)
    if len(ids) == len(whole):
        remarks.append(f"the prompt lasts {clock.seconds(now):.2f} s, not {prompt_seconds:g}: all of it is used")
    else:
        # The small amount: 0.07 / 0.01 is 7.000000000000001, which is 7 steps, not 8.
        start = math.ceil(prompt_seconds / clock.step_s - 1e-6)
        if not any(map(clock.is_note_on, ids)):
            remarks.append(f"the prompt is silent for its first {prompt_seconds:g} s")
        ids += [clock.longest] * ((start - now - 1) // clock.longest_steps)  # as the tokenizer writes a long rest
    context = model.config.max_position_embeddings
    if len(ids) > context:
        heard = clock.seconds(clock.steps(ids[-context:]))
        remarks.append(f"the prompt is longer than the context of {context:,} tokens: its last {heard:.0f} s are heard")
    return Plan(model, tokenizer, ids, start, seconds, max_tokens, remarks, **options)


def generate_performance(
    model: PerceiverSForCausalLM,
    tokenizer: PerceiverSTokenizer,
    seconds: float | None = SECONDS,
    max_tokens: int | None = None,
    **options,
) -> Performance:
    """A performance from nothing.

    Args:
        seconds: playing time, met to 10 ms: no note sounds on after it. `None` lets the model end the piece, or
            `max_tokens`, which must then be given.
        max_tokens: tokens to write at most; notes that sound by then are ended.
        temperature, top_p: sampling, the checkpoint's own by default; `temperature=0` takes the likeliest token.
        seed: same seed, same piece.
        max_note_seconds: a note that has sounded for so long is ended; `None` leaves that to the model.
        progress: called as `progress(seconds_done, notes)` whenever the music's clock moves.
        time_limit: seconds of wall time after which the generation ends, within one token; the piece then ends where it
            is, with the notes that sound there, and a remark says so.

    Raises:
        ValueError: an option outside its range, naming it; neither length given; or, for a model with learned absolute
            positions, more tokens than it has positions.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Plan(model, tokenizer, ids, 0, seconds, max_tokens, [], **options).write()


@dataclass
class Plan:
    """A performance to be written: its beginning, its length and the rules it keeps. `write()` writes it.

    Attributes:
        ids: token ids to go on after.
        start: steps of 10 ms into the piece at which the new music begins, at the end of `ids` or up to 1 s later.
        seconds, max_tokens: length of the new music, as for `generate_performance`.
        remarks: what was changed or left out so far.
        temperature, top_p, seed, max_note_seconds, progress, time_limit: as for `generate_performance`.
        wait: steps from the end of `ids` to `start`.
        budget: tokens to write at most.

    Raises:
        ValueError: an option outside its range, naming it.
    """

    model: PerceiverSForCausalLM
    tokenizer: PerceiverSTokenizer
    ids: list[int]
    start: int
    seconds: float | None
    max_tokens: int | None
    remarks: list[str]
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_note_seconds: float | None = MAX_NOTE_SECONDS
    progress: Callable[[float, int], None] | None = None
    time_limit: float | None = None
    sampling: dict = field(init=False)
    wait: int = field(init=False)
    budget: int = field(init=False)

    def __post_init__(self):
        ids, seconds, max_tokens = self.ids, self.seconds, self.max_tokens
        if not ids:
            raise ValueError("this vocabulary has no BOS to begin a piece with: continue a prompt that is not silent.")
        if seconds is None and max_tokens is None:
            raise ValueError("give seconds or max_tokens: one of them must end the piece.")
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"seconds {seconds} must be a positive number.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens} must be positive.")
        if self.time_limit is not None:
            Deadline(self.time_limit)  # checked before anything waits for it
        self.sampling = sampling_options(self.temperature, self.top_p)
        clock = _Clock(self.tokenizer)
        self.wait = self.start - clock.steps(ids)
        self.budget = _budget(self.model.config, len(ids), clock.sounding(ids), self.wait > 0, seconds, max_tokens)
        self.processors()  # raises what is wrong with the lengths

    def processors(self) -> LogitsProcessorList:
        """What holds the piece to its length and its notes to theirs."""
        clock, processors = _Clock(self.tokenizer), LogitsProcessorList()
        if self.seconds is not None:
            processors.append(DurationLogitsProcessor(self.model.config, clock.seconds(self.start) + self.seconds))
        if self.max_note_seconds is not None:
            processors.append(NoteDurationLogitsProcessor(self.model.config, self.max_note_seconds))
        if self.wait:
            processors.append(_FirstShift(len(self.ids), clock.shift(self.wait), clock.longest))
        return processors

    def write(self) -> Performance:
        """Generate the music; waits for its turn, as `sage_studio.generation.bars` does."""
        ids, clock = self.ids, _Clock(self.tokenizer)
        with TURN:
            begin = time.perf_counter()
            deadline = None if self.time_limit is None else Deadline(self.time_limit)
            with seeded(self.seed):
                output = self.model.generate(
                    torch.tensor([ids], device=self.model.device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                    max_new_tokens=self.budget,
                    max_time=math.inf,  # what a checkpoint says would make the music depend on the machine
                    logits_processor=self.processors(),
                    stopping_criteria=StoppingCriteriaList([] if deadline is None else [deadline]),
                    streamer=None if self.progress is None else _Progress(clock, self.progress, -self.wait),
                    **self.sampling,
                )[0].tolist()
            return self.performance(output, time.perf_counter() - begin, deadline)

    def performance(self, output: list[int], wall_seconds: float, deadline: Deadline | None) -> Performance:
        """The performance of all ids, written in `wall_seconds`."""
        clock, remarks, seconds = _Clock(self.tokenizer), list(self.remarks), self.seconds
        new = output[len(self.ids) :]
        music_seconds = max(clock.seconds(clock.steps(output) - self.start), 0.0)
        short = seconds is not None and music_seconds < seconds - clock.step_s / 2
        ended = output[-1] in _ends(self.model.config)
        if deadline is not None and deadline.has_passed and len(new) < self.budget and not ended:
            remarks.append(f"the time limit of {self.time_limit:g} s ended the piece after {music_seconds:.2f} s")
        elif short:
            remarks.append(f"the limit of {self.budget:,} new tokens ended the piece after {music_seconds:.2f} s")
        elif seconds is None and len(new) < self.budget:
            remarks.append(f"the model ended the piece after {len(new):,} tokens, {music_seconds:.2f} s")
        return Performance(
            score=self.tokenizer.decode_midi(output),
            ids=output,
            prompt_seconds=clock.seconds(self.start),
            notes=sum(map(clock.is_note_on, new)),
            seconds=wall_seconds,
            music_seconds=music_seconds,
            tokens=len(new),
            remarks=remarks,
        )


def _ends(config) -> list[int]:
    """The ids that end a piece."""
    eos = config.eos_token_id
    return list(eos) if isinstance(eos, list | tuple) else [eos]


def _budget(config, prompt: int, sounding: int, waits: bool, seconds: float | None, max_tokens: int | None) -> int:
    """New tokens to write at most, after checking that they can end what sounds and that the model has positions."""
    needed = sounding + waits
    budget = max_tokens
    if budget is None:
        budget = math.ceil(seconds * TOKENS_PER_SECOND) + SPARE_TOKENS
    if config.absolute_positions:
        room = config.max_position_embeddings - prompt
        if room < max(needed, 1) or (max_tokens is not None and max_tokens > room):
            raise ValueError(
                f"this model has {config.max_position_embeddings:,} learned positions and cannot go on past them: "
                f"{prompt:,} tokens of prompt leave {max(room, 0):,}. Take a shorter prompt, or fewer max_tokens."
            )
        budget = min(budget, room)
    if budget < needed:
        raise ValueError(f"max_tokens {max_tokens} cannot end the {sounding} notes that sound where the prompt is cut.")
    return budget


class _Clock:
    """What events mean in time, from the tokenizer's grammar; times in steps of 10 ms."""

    def __init__(self, tokenizer):
        grammar = tokenizer.config_fields()["grammar"]
        (self.first_on, self.end_on), (self.first_off, self.end_off) = grammar["note_on"], grammar["note_off"]
        self.first_shift, self.end_shift = grammar["time_shift"]
        self.step_s = grammar["step_s"]
        self.longest, self.longest_steps = self.end_shift - 1, self.end_shift - self.first_shift

    def shift(self, steps: int) -> int:
        """The id of a time_shift of `steps`."""
        return self.first_shift + steps - 1

    def steps_of(self, token: int) -> int:
        return token - self.first_shift + 1 if self.first_shift <= token < self.end_shift else 0

    def steps(self, ids: Iterable[int]) -> int:
        return sum(map(self.steps_of, ids))

    def seconds(self, steps: int) -> float:
        return round(steps * self.step_s, 2)  # 7 * 0.01 is 0.07, not 0.07000000000000001

    def is_note_on(self, token: int) -> bool:
        return self.first_on <= token < self.end_on

    def sounding(self, ids: Iterable[int]) -> int:
        """How many notes have begun and not ended."""
        keys = set()
        for token in ids:
            if self.is_note_on(token):
                keys.add(token - self.first_on)
            elif self.first_off <= token < self.end_off:
                keys.discard(token - self.first_off)
        return len(keys)


class _FirstShift(LogitsProcessor):
    """Makes the first token after a prompt of `length` a time_shift from the id `shortest` to the id `longest`.

    The prompt is known up to its cut, so nothing happens before it. One more time_shift in the prompt would say so too,
    but then something would always happen exactly at the cut.
    """

    def __init__(self, length: int, shortest: int, longest: int):
        self.length, self.shortest, self.longest = length, shortest, longest

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] > self.length:
            return scores
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, self.shortest : self.longest + 1] = True
        return scores.masked_fill(~allowed, -torch.inf)


class _Progress(BaseStreamer):
    """Follows the clock and counts notes as tokens come; a token is final when it arrives."""

    def __init__(self, clock: _Clock, report: Callable[[float, int], None], steps: int):
        self.clock, self.report, self.steps = clock, report, steps
        self.notes, self.prompt_seen = 0, False

    def put(self, value):
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.notes += self.clock.is_note_on(token)
            moved = self.clock.steps_of(token)
            if moved:
                self.steps += moved
                self.report(self.clock.seconds(self.steps), self.notes)

    def end(self):
        pass


def _unheard(score: Score) -> list[str]:
    """What a score holds that tokens do not."""
    lost = {
        "controller": sum(int((track.controls.numpy()["number"] != SUSTAIN).sum()) for track in score.tracks),
        "pitch bend": sum(len(track.pitch_bends) for track in score.tracks),
    }
    return [
        f"{count} {name} events of the prompt have no token and are left out" for name, count in lost.items() if count
    ]
