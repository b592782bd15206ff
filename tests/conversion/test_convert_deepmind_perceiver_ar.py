"""DeepMind's Perceiver AR: recorded logits of theirs, cached decoding, and pickles that are not loaded unasked."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from perceiver_checks import TOLERANCE, assert_cached_equals_full, recorded

from conversion.convert_deepmind_perceiver_ar import convert, main
from conversion.weights import ConversionError
from perceivers import PerceiverSForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
FILE = FIXTURES / "deepmind_perceiver_ar.npz"
LOGITS = FIXTURES / "deepmind_perceiver_ar_logits.npz"
SIZES = {"context": 24, "heads": 2, "latents": 8}


def arrays() -> dict[str, np.ndarray]:
    with np.load(FILE) as content:
        return dict(content)


def as_haiku_keeps_them() -> dict:
    """Modules of named arrays."""
    modules: dict[str, dict] = {}
    for name, array in arrays().items():
        modules.setdefault(name.rpartition("/")[0], {})[name.rpartition("/")[2]] = array
    return modules


def converted_from(state, tmp_path, **options):
    np.savez(tmp_path / "params.npz", **state)
    return convert(tmp_path / "params.npz", **{**SIZES, **options})


def test_logits_are_those_of_the_original():
    model = convert(FILE, **SIZES)
    ids, theirs = recorded(LOGITS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs["logits"], **TOLERANCE)
        torch.testing.assert_close(model(ids[:, :15]).logits, theirs["logits_of_15"], **TOLERANCE)


def test_cached_decoding_agrees():
    ids = recorded(LOGITS)[0]
    assert_cached_equals_full(convert(FILE, **SIZES), torch.cat((ids, ids.flip(1)), dim=1))


def test_every_key_counts(tmp_path):
    state = arrays()
    for name in state:
        with pytest.raises(ConversionError):
            converted_from({key: value for key, value in state.items() if key != name}, tmp_path)
    for name, array in state.items():
        with pytest.raises(ConversionError):
            converted_from(state | {name: np.concatenate((array, array[:1]))}, tmp_path)


@pytest.mark.parametrize(
    "name", ["perceiver_ar/~/embed_1/embeddings", "perceiver_ar/~/cross_attention_1/layer_norm/scale"]
)
def test_models_of_another_kind_are_refused_by_name(tmp_path, name):
    """Learned or sinusoidal positions, and further cross-attention layers."""
    with pytest.raises(ConversionError, match=f"unknown: {name}"):
        converted_from(arrays() | {name: np.ones(2, "float32")}, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "5 heads do not divide the attention's 24"),
        ({"rotated": 0.0}, "share of a head"),
        ({"rotated": 0.01}, "12 channels is less than a pair"),
        ({"activation": "swish"}, "one of sq_relu"),
        ({"latents": 30}, "num_latents"),
        ({"max_wavelength": 20}, r"max_wavelength \(20\) is shorter than the context \(24\)"),
        ({"context": 0}, "num_latents"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConversionError, match=message):
        convert(FILE, **{**SIZES, **options})


@pytest.mark.parametrize("options", [{"heads": 4}, {"rotated": 1.0}, {"max_wavelength": 99}, {"activation": "gelu"}])
def test_every_option_matters(options):
    """What no parameter tells changes the logits: a wrong one is not harmless."""
    ids, theirs = recorded(LOGITS)
    with torch.no_grad():
        logits = convert(FILE, **{**SIZES, **options})(ids).logits
    assert (logits - theirs["logits"]).abs().max() > 1e-2


class Command:
    """A pickle of this runs a shell command where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_is_loaded_only_when_it_is_trusted(tmp_path, capsys):
    trace, file = tmp_path / "it-ran", tmp_path / "checkpoint.dill"
    file.write_bytes(pickle.dumps({"params": as_haiku_keeps_them(), "hook": Command(trace)}))
    output = tmp_path / "converted"
    argv = [str(tmp_path), str(output), "--context", "24", "--heads", "2", "--latents", "8"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "runs whatever code is in it" in error and "--trust-pickle" in error and error.count("\n") == 1
    assert not trace.exists() and not output.exists()
    assert main([*argv, "--trust-pickle"]) == 0
    assert trace.exists()
    model = PerceiverSForCausalLM.from_pretrained(output).eval()
    ids, theirs = recorded(LOGITS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs["logits"], **TOLERANCE)
    assert model.generate(ids[:, :10], max_new_tokens=30, do_sample=False).shape == (2, 40)


def test_a_trusted_pickle_may_still_be_none(tmp_path):
    file = tmp_path / "checkpoint.dill"
    for content, message in (
        (pickle.dumps({"params": [1, 2]}), "no parameters of haiku modules"),
        (b"cjaxes\nArray\n.", "not installed"),
        (b"nothing", "cannot be unpickled"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConversionError, match=message):
            convert(file, trust_pickle=True, **SIZES)
    with pytest.raises(ConversionError, match="no such file"):
        convert(tmp_path / "absent.dill", **SIZES)
