"""PerceiverS' piano performances, counted in seconds: from nothing and continuations, of any length.

from sage_studio.checkpoints import load
from sage_studio.generation.seconds import continue_performance
model, tokenizer = load("perceivers")
performance = continue_performance(model, tokenizer, "prompt.mid", prompt_s=20, music_s=60, seed=0)
performance.score.dump_midi("continuation.mid")
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from symusic import Score
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizer, StoppingCriteriaList

from perceivers.generation_perceivers import DurationLogitsProcessor, NoteDurationLogitsProcessor
from perceivers.modeling_perceivers import PerceiverSForCausalLM
from perceivers.tokenization_perceivers import PerceiverSTokenizer
from sage_studio.defaults import MAX_NOTE_S, MUSIC_S, PROMPT_S
from sage_studio.errors import InvalidMidiError
from sage_studio.music.midi import Prompt, heard_warnings, read_prompt

from .result import Piece, Plan, Progress, unheard
from .sampling import Deadline
from .stream import Streamer, decode_threads

# Room for the seconds to end a piece, not the tokens: twice what dense piano takes, and a few chords.
TOKENS_PER_SECOND, SPARE_TOKENS = 240, 256
DEFAULT_VELOCITY = 64  # of notes before the first velocity, as the tokenizer has it


def continue_performance(model, tokenizer, prompt, *lengths, **options) -> Piece:
    """Continue the beginning of a MIDI file: what `plan_continuation` plans of the same arguments, written."""
    return plan_continuation(model, tokenizer, prompt, *lengths, **options).write()


def generate_performance(model, tokenizer, *lengths, **options) -> Piece:
    """A performance from nothing: what `plan_performance` plans of the same arguments, written."""
    return plan_performance(model, tokenizer, *lengths, **options).write()


def plan_continuation(
    model: PerceiverSForCausalLM,
    tokenizer: PerceiverSTokenizer,
    prompt: "str | os.PathLike | bytes | Score | Prompt",
    prompt_s: float = PROMPT_S,
    music_s: float | None = MUSIC_S,
    max_tokens: int | None = None,
    **options,
) -> "SecondsPlan":
    """A continuation of the first `prompt_s` seconds of a MIDI file by `music_s` seconds, read and checked, unwritten.

    What the prompt does before the cut stays as it is (on the tokens' grid of 10 ms); notes that sound there are ended
    by the model, at the cut or later. A prompt that ends before the cut is continued from its end.

    Args:
        prompt: path, bytes, score, or what `read_prompt` made of one; its instruments are played as one piano, without
            the drums.
        options: `temperature`, `top_p`, `seed`, `max_note_s`, `progress`, `time_limit`; these, `music_s` and
            `max_tokens` (both of the new music) as for `plan_performance`.

    Raises:
        InvalidMidiError: the prompt cannot be read, or holds nothing for a piano.
        ValueError: as `plan_performance`; or `max_tokens` cannot end the notes that sound at the cut.
    """
    if not 0 < prompt_s < math.inf:
        raise ValueError(f"prompt_s {prompt_s} must be a positive number of seconds.")
    prompt = read_prompt(prompt)
    with heard_warnings() as heard:
        try:
            whole = tokenizer.midi_to_ids(prompt.score)
        except ValueError as error:
            raise InvalidMidiError(prompt.name, str(error).removeprefix("<score>: ")) from error
    remarks = [*unheard(prompt.score, pedal_is_kept=True), *sorted({*prompt.remarks, *heard})]
    clock = Clock(tokenizer)
    # The small amount: 0.07 / 0.01 is 7.000000000000001, which is 7 steps, not 8.
    cut = math.ceil(prompt_s / clock.step_s - 1e-6)
    ids = clock.before(whole, cut)
    now = start = clock.steps(ids)
    if len(ids) == len(whole):
        remarks.append(f"the prompt lasts {clock.seconds(now):.2f} s, not {prompt_s:g}: all of it is used")
    else:
        start = cut
        if not any(map(clock.is_note_on, ids)):
            remarks.append(f"the prompt is silent for its first {prompt_s:g} s")
        ids += [clock.longest] * ((start - now - 1) // clock.longest_steps)  # as the tokenizer writes a long rest
    context = model.config.max_position_embeddings
    if len(ids) > context:
        left = clock.seconds(clock.steps(ids[-context:]))
        remarks.append(f"the prompt is longer than the context of {context:,} tokens: its last {left:.0f} s are heard")
    return SecondsPlan(
        model=model,
        tokenizer=tokenizer,
        ids=ids,
        remarks=remarks,
        start=start,
        music_s=music_s,
        max_tokens=max_tokens,
        **options,
    )


def plan_performance(
    model: PerceiverSForCausalLM,
    tokenizer: PerceiverSTokenizer,
    music_s: float | None = MUSIC_S,
    max_tokens: int | None = None,
    **options,
) -> "SecondsPlan":
    """A performance from nothing, checked, not yet written.

    Args:
        music_s: playing time in seconds, met to 10 ms: no note sounds on after it. `None` lets the model end the piece,
            or `max_tokens`, which must then be given.
        max_tokens: tokens to write at most; notes that sound by then are ended.
        temperature, top_p: sampling, the checkpoint's own by default; `temperature=0` takes the likeliest token.
        seed: same seed, same piece.
        max_note_s: a note that has sounded for so many seconds is ended; `None` leaves that to the model.
        progress: called as `progress(seconds_done, notes)` whenever the music's clock moves.
        time_limit: seconds of wall time after which the generation ends, within one token; the piece then ends where it
            is, with the notes that sound there, and a remark says so.

    Raises:
        ValueError: an option outside its range, naming it; neither length given; or, for a model with learned absolute
            positions, more tokens than it has positions.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    own = {"start": 0, "remarks": [], "music_s": music_s, "max_tokens": max_tokens}
    return SecondsPlan(model=model, tokenizer=tokenizer, ids=ids, **own, **options)


@dataclass(kw_only=True)
class SecondsPlan(Plan):
    """A plan of music that is counted in seconds; see `Plan` for the other attributes.

    Attributes:
        music_s, max_tokens: length of the new music, as for `plan_performance`.
        start: steps of 10 ms into the piece at which the new music begins, at the end of `ids` or up to 1 s later.
        max_note_s: as for `plan_performance`.
        wait: steps from the end of `ids` to `start`.
        budget: tokens to write at most.

    Raises:
        ValueError: an option outside its range, naming it.
    """

    music_s: float | None
    max_tokens: int | None
    start: int = 0
    max_note_s: float | None = MAX_NOTE_S
    wait: int = field(init=False)
    budget: int = field(init=False)

    def __post_init__(self):
        ids, music_s, max_tokens = self.ids, self.music_s, self.max_tokens
        if not ids:
            raise ValueError("this vocabulary has no BOS to begin a piece with: continue a prompt that is not silent.")
        if music_s is None and max_tokens is None:
            raise ValueError("give music_s or max_tokens: one of them must end the piece.")
        if music_s is not None and not 0 < music_s < math.inf:
            raise ValueError(f"music_s {music_s} must be a positive number of seconds.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens} must be positive.")
        super().__post_init__()
        clock = Clock(self.tokenizer)
        self.wait = self.start - clock.steps(ids)
        self.budget = _budget(self.model.config, len(ids), clock.sounding(ids), self.wait > 0, music_s, max_tokens)
        self.processors()  # raises what is wrong with the lengths

    def processors(self) -> LogitsProcessorList:
        """What holds the piece to its length and its notes to theirs."""
        clock, processors = Clock(self.tokenizer), LogitsProcessorList()
        if self.music_s is not None:
            processors.append(DurationLogitsProcessor(self.model.config, clock.seconds(self.start) + self.music_s))
        if self.max_note_s is not None:
            processors.append(NoteDurationLogitsProcessor(self.model.config, self.max_note_s))
        if self.wait:
            processors.append(_FirstShift(len(self.ids), clock.shift(self.wait), clock.longest))
        return processors

    def streamer(self) -> "PerformanceStreamer":
        return PerformanceStreamer(self.tokenizer, decode_threads(self.model))

    def piece(self, ids: list[int], bars: None, elapsed_s: float, remarks: list[str]) -> Piece:
        """The music of `ids`, written in `elapsed_s`."""
        clock, new = Clock(self.tokenizer), ids[len(self.ids) :]
        return Piece(
            score=self.tokenizer.decode_midi(ids),
            ids=ids,
            prompt_end_s=clock.seconds(self.start),
            music_s=self.written_s(ids),
            elapsed_s=elapsed_s,
            bars=None,
            tokens=len(new),
            notes=sum(map(clock.is_note_on, new)),
            remarks=remarks,
        )

    def written_s(self, ids: list[int]) -> float:
        """Playing time of the new music in all `ids`."""
        clock = Clock(self.tokenizer)
        return max(clock.seconds(clock.steps(ids) - self.start), 0.0)

    def _generate(self, streamer: Streamer | None, remarks: list[str]) -> tuple[list[int], None]:
        deadline = None if self.time_limit is None else Deadline(self.time_limit)
        output = self.model.generate(
            torch.tensor([self.ids], device=self.model.device),
            attention_mask=torch.ones(1, len(self.ids), dtype=torch.long, device=self.model.device),
            max_new_tokens=self.budget,
            max_time=math.inf,  # what a checkpoint says would make the music depend on the machine
            logits_processor=self.processors(),
            stopping_criteria=StoppingCriteriaList(self.stops(streamer, deadline)),
            streamer=None if streamer is None and self.progress is None else Progress(self._advance(), streamer),
            **self.sampling,
        )[0].tolist()
        remarks += self.early_end(output, deadline, streamer)
        return output, None

    def _advance(self) -> Callable[[int], None]:
        """What tells `progress` of new tokens."""
        clock, steps, notes = Clock(self.tokenizer), -self.wait, 0

        def advance(token: int) -> None:
            nonlocal steps, notes
            notes += clock.is_note_on(token)
            moved = clock.steps_of(token)
            if moved and self.progress is not None:
                steps += moved
                self.progress(clock.seconds(steps), notes)

        return advance

    def early_end(self, ids: list[int], deadline: Deadline | None, streamer: Streamer | None = None) -> list[str]:
        """What ended the music of all `ids`, where that was not its length."""
        new, music_s = len(ids) - len(self.ids), self.written_s(ids)
        is_short = self.music_s is not None and music_s < self.music_s - Clock(self.tokenizer).step_s / 2
        has_ended = ids[-1] in _ends(self.model.config)
        if self.is_cancelled(streamer) and new < self.budget and not has_ended:
            return [f"cancelled after {music_s:.2f} s"]
        if deadline is not None and deadline.has_passed and new < self.budget and not has_ended:
            return [f"the time limit of {self.time_limit:g} s ended the piece after {music_s:.2f} s"]
        if is_short:
            return [f"the limit of {self.budget:,} new tokens ended the piece after {music_s:.2f} s"]
        if self.music_s is None and new < self.budget:
            return [f"the model ended the piece after {new:,} tokens, {music_s:.2f} s"]
        return []


def _ends(config) -> list[int]:
    """The ids that end a piece."""
    eos = config.eos_token_id
    return list(eos) if isinstance(eos, list | tuple) else [eos]


def _budget(config, prompt: int, sounding: int, waits: bool, music_s: float | None, max_tokens: int | None) -> int:
    """New tokens to write at most, after checking that they can end what sounds and that the model has positions."""
    needed = sounding + waits
    budget = max_tokens
    if budget is None:
        budget = math.ceil(music_s * TOKENS_PER_SECOND) + SPARE_TOKENS
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


class Clock:
    """What events mean in time, from the tokenizer's grammar; times in steps of 10 ms."""

    def __init__(self, tokenizer):
        grammar = tokenizer.config_fields()["grammar"]
        (self.first_on, self.end_on), (self.first_off, self.end_off) = grammar["note_on"], grammar["note_off"]
        self.first_shift, self.end_shift = grammar["time_shift"]
        self.first_velocity, self.end_velocity = grammar["velocity"]
        self.step_s = grammar["step_s"]
        self.longest, self.longest_steps = self.end_shift - 1, self.end_shift - self.first_shift

    def shift(self, steps: int) -> int:
        """The id of a time_shift of `steps`."""
        return self.first_shift + steps - 1

    def steps_of(self, token: int) -> int:
        return token - self.first_shift + 1 if self.first_shift <= token < self.end_shift else 0

    def steps(self, ids: Iterable[int]) -> int:
        return sum(map(self.steps_of, ids))

    def before(self, ids: list[int], end: int) -> list[int]:
        """`ids` as the tokenizer would have written them, had nothing happened from the step `end` on."""
        now, kept = 0, 0
        for index, token in enumerate(ids, 1):
            now += self.steps_of(token)
            if now >= end:
                break
            if not (self.first_shift <= token < self.end_velocity):  # those only lead to an event
                kept = index
        return ids[:kept]

    def seconds(self, steps: int) -> float:
        return round(steps * self.step_s, 2)  # 7 * 0.01 is 0.07, not 0.07000000000000001

    def is_note_on(self, token: int) -> bool:
        return self.first_on <= token < self.end_on

    def is_note_off(self, token: int) -> bool:
        return self.first_off <= token < self.end_off

    def sounding(self, ids: Iterable[int]) -> int:
        """How many notes have begun and not ended."""
        keys = set()
        for token in ids:
            if self.is_note_on(token):
                keys.add(token - self.first_on)
            elif self.is_note_off(token):
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


class PerformanceStreamer(Streamer):
    """`Streamer` of PerceiverS: the notes that `tokenizer.decode_midi` finds, each as soon as its key is released.

    Notes that still sound when the generation ends come then. Those that begin in the prompt are not handed out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, decode_threads: int | None = None):
        super().__init__(decode_threads)
        self._clock, self._tokenizer = Clock(tokenizer), tokenizer
        self._now, self._velocity, self._is_new = 0, DEFAULT_VELOCITY, False
        # By key: where a note began, its velocity, where it ended (None: it sounds), whether it is new. One that ended
        # where it began waits for the clock to move: the same key struck again there takes its place.
        self._notes: dict[int, tuple[int, int, int | None, bool]] = {}

    def take_prompt(self, ids: list[int]) -> None:
        for token in ids:
            self.take(token)
        self._is_new = True

    def take(self, token: int) -> None:
        clock = self._clock
        if moved := clock.steps_of(token):
            for key in [key for key, (_, _, end, _) in self._notes.items() if end is not None]:
                self._release(key)
            self._now += moved
        elif clock.first_velocity <= token < clock.end_velocity:
            value = 4 * (token - clock.first_velocity) + self._tokenizer.velocity_offset + 1
            self._velocity = min(max(value, 1), 127)
        elif clock.is_note_on(token):
            key = token - clock.first_on
            if key in self._notes and self._notes[key][0] != self._now:
                self._release(key)
            self._notes[key] = self._now, self._velocity, None, self._is_new
        elif clock.is_note_off(token) and (key := token - clock.first_off) in self._notes:
            onset, velocity, _, is_new = self._notes[key]
            if onset == self._now:
                self._notes[key] = onset, velocity, onset, is_new
            else:
                self._release(key)

    def take_end(self) -> None:
        for key in list(self._notes):
            self._release(key)

    def _release(self, key: int) -> None:
        """The note on `key` is over: at the latest now, and after 10 ms at the earliest."""
        onset, velocity, end, is_new = self._notes.pop(key)
        if is_new:
            steps = max((self._now if end is None else end) - onset, 1)
            self.hand_out(
                program=0,
                pitch=key,
                velocity=velocity,
                bar=None,
                onset=None,
                duration=None,
                onset_s=self._clock.seconds(onset),
                duration_s=self._clock.seconds(steps),
            )
