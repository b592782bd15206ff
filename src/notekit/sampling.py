"""What generation in both families has in common: the result, the options of sampling, the seed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from symusic import Score


@dataclass(kw_only=True)
class Generated:
    """Generated music.

    Attributes:
        score: prompt (where there was one) and new music together.
        ids: its token ids.
        notes: new notes.
        seconds: wall time of the generation.
        remarks: what was changed or left out on the way, in sentences for the user.
    """

    score: Score
    ids: list[int]
    notes: int
    seconds: float
    remarks: list[str] = field(default_factory=list)

    @property
    def notes_per_second(self) -> float:
        return self.notes / self.seconds if self.seconds else 0.0


def sampling_options(temperature: float | None, top_p: float | None) -> dict:
    """Options of `generate()`; `None` leaves one to the checkpoint's `generation_config`, 0 takes the likeliest token.

    Raises:
        ValueError: an option outside its range, naming it.
    """
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature} must be 0 or a positive number.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must lie in 0..1, without the 0.")
    if temperature == 0:
        return {"do_sample": False}
    given = {"temperature": temperature, "top_p": top_p}
    return {"do_sample": True, "top_k": 0} | {name: value for name, value in given.items() if value is not None}


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """The same seed gives the same music; the caller's random state comes back unchanged."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []  # manual_seed seeds them too
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield
