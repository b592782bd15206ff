"""Weight maps: every tensor is used, none is made up, and files that would run code are not loaded."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conversion.weights import (
    ConversionError,
    check_output,
    count,
    halves_from_pairs,
    load_into,
    load_state,
    new_folder,
    remap,
    run_command,
    strip_prefix,
)

STATE = {"embed": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(3)}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Command:
    """A pickle of this runs a shell command where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# ---- files


def test_a_folder_a_file_and_shards_hold_the_same(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert same(load_state(tmp_path), STATE)
    assert same(load_state(tmp_path / "model.safetensors"), STATE)
    shards = tmp_path / "shards"
    shards.mkdir()
    for index, (name, tensor) in enumerate(STATE.items()):
        save_file({name: tensor}, shards / f"model-{index}.safetensors")
    weight_map = {name: f"model-{index}.safetensors" for index, name in enumerate(STATE)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load_state(shards), STATE)
    torch.save(STATE, tmp_path / "old.bin")
    assert same(load_state(tmp_path / "old.bin"), STATE)
    np.savez(tmp_path / "arrays.npz", **{name: tensor.numpy() for name, tensor in STATE.items()})
    assert same(load_state(tmp_path / "arrays.npz"), STATE)


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model"])
def test_weights_inside_a_training_checkpoint_are_found(tmp_path, name):
    torch.save({name: STATE, "epoch": 3, "loss": 0.5}, tmp_path / "last.ckpt")
    assert same(load_state(tmp_path / "last.ckpt"), STATE)


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path):
    trace = tmp_path / "it-ran"
    torch.save({"state_dict": STATE, "hook": Command(trace)}, tmp_path / "hostile.pt")
    with pytest.raises(ConversionError, match=r"hostile\.pt.*could run any code.*safetensors"):
        load_state(tmp_path / "hostile.pt")
    with (tmp_path / "bare.pth").open("wb") as file:
        pickle.dump(Command(trace), file, protocol=2)
    with pytest.raises(ConversionError, match=r"bare\.pth"):
        load_state(tmp_path / "bare.pth")
    np.savez(tmp_path / "hostile.npz", allow_pickle=True, a=np.array([Command(trace)], dtype=object))
    with pytest.raises(ConversionError, match=r"hostile\.npz"):
        load_state(tmp_path / "hostile.npz")
    assert not trace.exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ConversionError, match=r"absent\.safetensors: no such file"):
        load_state(tmp_path / "absent.safetensors")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin.*name the file"):
        load_state(tmp_path)
    for name, content in (("cut.safetensors", b"\x10"), ("cut.bin", b"PK\x03\x04 and no more"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match=name):
            load_state(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ConversionError, match=r"none\.pt: no dict of tensors"):
        load_state(tmp_path / "none.pt")


def test_an_index_cannot_lead_out_of_its_folder_or_lie(tmp_path):
    save_file(STATE, tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embed": "../elsewhere.safetensors"}}))
    with pytest.raises(ConversionError, match="outside the folder"):
        load_state(folder)
    save_file(STATE, folder / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {"embed": "one.safetensors"}}))
    with pytest.raises(ConversionError, match=r"other tensors: head\.bias"):
        load_state(folder)
    index.write_text("[]")
    with pytest.raises(ConversionError, match="no index of shards"):
        load_state(folder)


# ---- names


LAYERED = {f"block.{i}.{name}": torch.full((2, 2), 10.0 * i + j) for i in range(3) for j, name in enumerate("qkv")}
MAP = {
    "layers.{i}.q": "block.{i}.q",
    "layers.{i}.kv": (("block.{i}.k", "block.{i}.v"), lambda k, v: torch.cat((k, v))),
}


def test_names_run_over_the_layers():
    tensors = remap(LAYERED, MAP, {"i": count(LAYERED, "block.{i}.q")})
    assert tensors.keys() == {f"layers.{i}.{name}" for i in range(3) for name in ("q", "kv")}
    assert torch.equal(tensors["layers.2.kv"], torch.cat((LAYERED["block.2.k"], LAYERED["block.2.v"])))


def test_counting_ends_at_a_gap():
    assert count(["a.0", "a.1", "a.3"], "a.{i}") == 2
    assert count(["a.0"], "b.{i}") == 0


def test_missing_and_unknown_names_are_said():
    state = {name: tensor for name, tensor in LAYERED.items() if name != "block.1.v"}
    with pytest.raises(ConversionError, match=r"another layout.*missing: block\.1\.v\.$"):
        remap(state, MAP, {"i": 3})
    with pytest.raises(ConversionError, match=r"unknown: rotary\.table\.$"):
        remap({**LAYERED, "rotary.table": torch.ones(1)}, MAP, {"i": 3})
    with pytest.raises(ConversionError, match=r"unknown: block\.1\.k, .* and 2 more\.$"):
        remap(LAYERED, MAP, {"i": 1})
    assert remap({**LAYERED, "rotary.table": torch.ones(1)}, MAP, {"i": 3}, ignored=["rotary.*"])


def test_a_shape_the_map_cannot_use_is_named():
    state = {**LAYERED, "block.1.v": torch.ones(2, 3)}
    with pytest.raises(ConversionError, match=r"block\.1\.v \(2, 3\).*layers\.1\.kv"):
        remap(state, MAP, {"i": 3})


def test_a_prefix_goes_where_most_names_have_it():
    assert strip_prefix({"net.a": 1, "net.b": 2, "more": 3}, "module.", "net.") == {"a": 1, "b": 2, "more": 3}
    assert strip_prefix({"net.a": 1, "b": 2}, "net.") == {"net.a": 1, "b": 2}
    with pytest.raises(ConversionError, match=r"with and without the prefix 'net\.': a\."):
        strip_prefix({"net.a": 1, "net.b": 2, "a": 3}, "net.")


def test_rotary_rows_by_hand():
    """Two heads of six channels, four of them rotated: pairs (0, 1), (2, 3) become (0, 2), (1, 3)."""
    rows = torch.arange(12.0)
    assert halves_from_pairs(rows, 2, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert torch.equal(halves_from_pairs(rows[:, None], 2, 4)[:, 0], halves_from_pairs(rows, 2, 4))


# ---- models


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 2), nn.Linear(2, 4)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.zeros(2))
        self.register_buffer("table", torch.zeros(2), persistent=False)


FULL = {"embed.weight": torch.ones(4, 2), "head.bias": torch.ones(4), "scale": torch.ones(2)}


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_tied_weights_come_once_by_either_name(name):
    model = Tied()
    load_into(model, {name if key == "embed.weight" else key: tensor for key, tensor in FULL.items()})
    assert torch.equal(model.head.weight, torch.ones(4, 2)) and torch.equal(model.scale, torch.ones(2))
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, "missing: scale"),
        ({"table": torch.ones(2)}, "unknown: table"),
        ({"head.weight": torch.ones(4, 2)}, "given twice: embed.weight and head.weight"),
        ({"head.bias": torch.ones(5)}, r"another shape: head.bias \(5,\), not \(4,\)"),
        ({"embed.weight": None}, "missing: embed.weight"),
    ],
)
def test_a_model_is_filled_whole_or_not_at_all(change, message):
    model = Tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor for name, tensor in {**FULL, **change}.items() if tensor is not None}
    with pytest.raises(ConversionError, match=message):
        load_into(model, tensors)
    assert same(model.state_dict(), before)


def test_an_output_folder_in_use_is_refused(tmp_path):
    check_output(tmp_path / "new")
    check_output(tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConversionError, match="not empty"):
        check_output(tmp_path)


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    (tmp_path / "some" / "empty").mkdir(parents=True)
    for name in ("some/empty", "deep/new"):
        output = tmp_path / name
        with pytest.raises(OSError, match="disk full"), new_folder(output) as folder:
            (folder / "config.json").write_text("{}")
            raise OSError("disk full")
        assert not output.exists() or not any(output.iterdir())
        with new_folder(output) as folder:
            (folder / "config.json").write_text("{}")
        assert [path.name for path in output.iterdir()] == ["config.json"]
        assert [path.name for path in output.parent.iterdir()] == [output.name]
        assert output.stat().st_mode == output.parent.stat().st_mode  # not for its owner alone
        with pytest.raises(ConversionError, match="not empty"), new_folder(output):
            pass


def test_commands_end_with_one_line(capsys):
    def refused():
        raise ConversionError("two\nlines")

    assert run_command(refused) == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert run_command(lambda: None) == 0
