"""What every converted Perceiver AR must do, whichever implementation it comes from."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion.weights import ConversionError
from perceivers import PerceiverSCache

TOLERANCE = {"atol": 1e-5, "rtol": 0}


def recorded(path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The ids of a fixture, and the logits that the other implementation gave, by their names."""
    with np.load(path) as arrays:
        logits = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "ids"}
        return torch.from_numpy(arrays["ids"]).long(), logits


def assert_cached_equals_full(model, ids: torch.Tensor) -> None:
    """Token by token, the cache gives what a full pass with the same latents gives, across refills."""
    model = model.double()
    cache, refills = PerceiverSCache(model.config), set()
    with torch.no_grad():
        for stop in range(1, ids.shape[1] + 1):
            step = model(ids[:, stop - 1 : stop], past_key_values=cache).logits[:, -1]
            window = cache.window_start(stop - 1)
            context = slice(cache.context_start(window), stop)
            full = model(ids[:, context], num_latents=stop - window).logits[:, -1]
            torch.testing.assert_close(step, full, atol=1e-5, rtol=1e-5)
            refills.add(window)
    assert len(refills) > 1
    model.float()


def assert_every_key_counts(convert, file, tmp_path, optional=(), of_any_length=()) -> None:
    """Without any one of its tensors, with one more, or with one of another shape, a checkpoint is refused."""
    state = load_file(file)
    changed = tmp_path / "changed.safetensors"
    for name in state.keys() - set(optional):
        save_file({key: value for key, value in state.items() if key != name}, changed)
        with pytest.raises(ConversionError):
            convert(changed)
    save_file(state | {"some.more.weight": torch.zeros(2)}, changed)
    with pytest.raises(ConversionError, match=r"unknown: some\.more\.weight"):
        convert(changed)
    for name in state.keys() - {*optional, *of_any_length}:
        save_file(state | {name: torch.cat((state[name], state[name][:1]))}, changed)
        with pytest.raises(ConversionError):
            convert(changed)
