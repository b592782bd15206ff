"""What generation in both families has in common: the options of sampling, seeds, turns, what ends it early."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, TemperatureLogitsWarper, TopPLogitsWarper

# One generation at a time: torch has one CPU random state for all threads, and a seed must give its music in each. A
# model's decode step, too, has buffers for one generation.
TURN = threading.RLock()

# Beyond these, scores overflow or all become equal, and the tokens that rules forbid are no longer the least likely.
TEMPERATURES = (0.01, 100.0)

# What a plan itself says to `generate()`, or what would end or return its music otherwise than a plan expects.
PLANNED = (
    *("inputs", "input_ids", "inputs_embeds", "attention_mask", "generation_config", "logits_processor"),
    *("stopping_criteria", "streamer", "suppress_tokens", "max_new_tokens", "max_length", "max_time", "stop_strings"),
    *("eos_token_id", "pad_token_id", "return_dict_in_generate"),
)
ONE_ROW = ("num_beams", "num_return_sequences")  # more than 1 of them is more than one piece

# Options of sampling besides temperature, top-k and top-p, and the value that turns each off (`None` does too).
OTHER_WARPERS = {"min_p": 0.0, "top_h": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def sampling_options(temperature: float | None, top_p: float | None) -> dict:
    """Options of `generate()`; `None` leaves one to the checkpoint's `generation_config`, 0 takes the likeliest token.

    Raises:
        ValueError: an option outside its range, naming it.
    """
    low, high = TEMPERATURES
    if temperature is not None and not (temperature == 0 or low <= temperature <= high):
        raise ValueError(f"temperature {temperature} must be 0, or from {low:g} to {high:g}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must lie in 0..1, without the 0.")
    if temperature == 0:
        return {"do_sample": False}
    given = {"temperature": temperature, "top_p": top_p}  # `generate()` takes no whole numbers for them
    return {"do_sample": True, "top_k": 0} | {name: float(value) for name, value in given.items() if value is not None}


def check_generate_options(options: dict | None) -> None:
    """Check a user's further options of `generate()`.

    Raises:
        ValueError: one that would collide with what the plan of a piece says itself, naming it.
    """
    options = options or {}
    taken = [name for name in PLANNED if name in options]
    taken += [name for name in ONE_ROW if options.get(name) not in (None, 1)]
    if taken:
        raise ValueError(f"generate_options cannot hold {', '.join(taken)}: a piece has its own, or needs it as it is.")


@contextmanager
def turn(is_cancelled: Callable[[], bool]) -> Iterator[bool]:
    """Wait for all other generations to end; False when this one was cancelled before that."""
    while not (mine := TURN.acquire(timeout=0.1)) and not is_cancelled():
        pass
    try:
        yield mine and not is_cancelled()
    finally:
        if mine:
            TURN.release()


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """The same seed gives the same music; the caller's random state comes back unchanged."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # manual_seed seeds them too
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is no such device.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name}: {str(error).splitlines()[0]}") from error


class Deadline(StoppingCriteria):
    """Ends a generation within one token after `seconds` of wall time, counted from when this was made.

    Attributes:
        has_passed: whether it has ended one.

    Raises:
        ValueError: seconds is not positive.
    """

    def __init__(self, seconds: float):
        if not seconds > 0:
            raise ValueError(f"time_limit {seconds} must be a positive number of seconds.")
        self.end, self.has_passed = time.perf_counter() + seconds, False

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        self.has_passed = self.has_passed or time.perf_counter() >= self.end
        return torch.full((len(input_ids),), self.has_passed, device=input_ids.device)


class Cancelled(StoppingCriteria):
    """Ends a generation within one token when somebody asks for it, or when the program's main thread has ended.

    Args:
        asks: whether to end, for each row, or once for all rows.
    """

    def __init__(self, asks: Sequence[Callable[[], bool]]):
        self.asks = asks

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        over = not threading.main_thread().is_alive()
        flags = torch.tensor([over or ask() for ask in self.asks], device=input_ids.device)
        return flags.expand(len(input_ids)) if len(flags) == 1 else flags


class RowSampler(LogitsProcessor):
    """Draws each row's next token with that row's own random generator, so that a row does not hear its neighbours.

    The last processor of `generate(do_sample=False)`: of every row it leaves one token. A row draws what
    `generate(do_sample=True)` would draw for it alone, were it seeded as the row's generator is: `torch.multinomial`
    takes the largest of the probabilities, each divided by a number from an exponential distribution.

    Args:
        generators: one a row, on the model's device.
        limits: tokens that each row may have; a row draws no more, so that its generator can go on later where it is.
        options: `temperature` and `top_p`.
    """

    def __init__(self, generators: Sequence[torch.Generator], limits: Sequence[int], options: dict):
        self.generators, self.limits, self.drawn, self.warpers = generators, limits, 0, []
        if options["temperature"] != 1.0:
            self.warpers.append(TemperatureLogitsWarper(float(options["temperature"])))
        if options["top_p"] < 1.0:
            self.warpers.append(TopPLogitsWarper(options["top_p"]))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        probabilities = scores.softmax(-1)  # (B, V)
        noise = torch.ones_like(probabilities)
        for row, (limit, generator) in enumerate(zip(self.limits, self.generators, strict=True)):
            if self.drawn < limit:
                noise[row].exponential_(generator=generator)
        self.drawn += 1
        chosen = (probabilities / noise).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def samples_by_row(config: GenerationConfig) -> bool:
    """Whether `RowSampler` can do what this config asks of `generate()`: no beams, drafts or other ways of sampling.

    And no row writes padding but after its end, which the grammar sees to.
    """
    others = any(getattr(config, name, None) not in (None, off) for name, off in OTHER_WARPERS.items())
    drafts = any(getattr(config, name, None) for name in ("use_mtp", "prompt_lookup_num_tokens", "penalty_alpha"))
    return getattr(config, "midi_grammar", True) and not (others or drafts or (config.num_beams or 1) > 1)


def row_sampler(
    config: GenerationConfig, sampling: dict, generators: Sequence[torch.Generator], limits: Sequence[int]
) -> list[LogitsProcessor]:
    """The last processors of `generate(do_sample=False)` that make it `generate(**sampling)`, row by row.

    Args:
        sampling: from `sampling_options`. For the likeliest token no processor is needed.
    """
    if not sampling["do_sample"]:
        return []
    options = {name: sampling.get(name, getattr(config, name)) for name in ("temperature", "top_p")}
    options = {name: 1.0 if value is None else value for name, value in options.items()}
    return [RowSampler(generators, limits, options)]


def row_generators(seeds: Sequence[int | None], device: torch.device) -> list[torch.Generator]:
    """A random generator for each seed; one for `None` is seeded at random."""
    generators = [torch.Generator(device) for _ in seeds]
    for generator, seed in zip(generators, seeds, strict=True):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
    return generators


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) of token ids of different lengths, as `generate()` takes them."""
    width = max(map(len, rows))
    lead = [width - len(row) for row in rows]
    ids = [[pad_token_id] * pads + list(row) for pads, row in zip(lead, rows, strict=True)]
    mask = [[0] * pads + [1] * len(row) for pads, row in zip(lead, rows, strict=True)]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def without_padding(new: Sequence[int], pad_token_id: int) -> list[int]:
    """New tokens of one row up to where it ended."""
    return list(new[: new.index(pad_token_id)] if pad_token_id in new else new)
