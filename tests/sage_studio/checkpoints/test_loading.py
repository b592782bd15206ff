"""Loading a checkpoint of either family: by folder or short name, whole or not at all."""

import json
import shutil
import sys

import pytest
import torch
from conftest import tiny_model, tiny_perceivers
from safetensors.torch import load_file, save_file

from perceivers import PerceiverSForCausalLM, PerceiverSTokenizer
from sage_music import SageMusicForCausalLM, SageMusicTokenizer
from sage_studio.checkpoints import load
from sage_studio.checkpoints import loading as checkpoint
from sage_studio.errors import CheckpointError, MissingExtraError


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> dict:
    """A small whole checkpoint of each family, by model_type."""
    saved = {}
    for name, model, its_tokenizer in (
        ("sage_music", tiny_model(tokenizer), tokenizer),
        ("perceivers", tiny_perceivers(), PerceiverSTokenizer()),
    ):
        saved[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(saved[name])
        its_tokenizer.save_pretrained(saved[name])
    return saved


@pytest.fixture(params=["sage_music", "perceivers"])
def folder(request, folders, tmp_path):
    """A copy to break."""
    return shutil.copytree(folders[request.param], tmp_path / "checkpoint")


def test_the_config_says_which_family(folders):
    for name, kinds in (
        ("sage_music", (SageMusicForCausalLM, SageMusicTokenizer)),
        ("perceivers", (PerceiverSForCausalLM, PerceiverSTokenizer)),
    ):
        model, tokenizer = load(folders[name])
        assert (type(model), type(tokenizer)) == kinds and not model.training
        tensors = load_file(folders[name] / "model.safetensors")
        state = model.state_dict()
        assert all(torch.equal(state[key], tensors[key]) for key in tensors)


def test_short_names_are_the_bundled_checkpoints(monkeypatch, folders, tmp_path):
    assert isinstance(load()[0], SageMusicForCausalLM)
    assert isinstance(load("sage-music")[0], SageMusicForCausalLM)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "perceivers").mkdir()  # a folder of that name does not come in between
    monkeypatch.setitem(checkpoint.BUNDLED, "perceivers", folders["perceivers"])
    assert isinstance(load("perceivers")[0], PerceiverSForCausalLM)
    with pytest.raises(CheckpointError, match=r"\./perceivers: no checkpoint"):
        load("./perceivers")
    monkeypatch.setitem(checkpoint.BUNDLED, "perceivers", tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"^perceivers: .* not installed: sage-music-perceivers-weights\. "):
        load("perceivers")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()}), "model.norm.weight"),
        (lambda t: t.update({"extra.weight": t["model.norm.weight"].clone()}), "unexpected"),
    ],
    ids=["missing", "misshapen", "unexpected"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(folder, change, word):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=word) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_truncated_checkpoint_is_refused(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)


def test_a_config_that_contradicts_itself_is_refused(folders, tmp_path):
    for name, field, change in (
        ("sage_music", "token_attribute_ids", lambda ids: ids[:-5]),
        ("perceivers", "num_latents", lambda latents: 1000 * latents),
    ):
        folder = shutil.copytree(folders[name], tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        config[field] = change(config[field])
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=field):
            load(folder)


def test_a_tokenizer_of_another_vocabulary_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["perceivers"], tmp_path / "checkpoint")
    PerceiverSTokenizer(bos=False).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="390 tokens but the model 391"):
        load(folder)


def test_a_checkpoint_without_its_tokenizer_is_refused(folder):
    """One of default settings would fit by its size, and mean something else by its tokens."""
    for name in ("tokenizer_config.json", "miditok.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"checkpoint: no tokenizer \(tokenizer_config.json is missing\)"):
        load(folder)


@torch.no_grad()
def test_an_adapter_in_the_folder_of_a_whole_model_is_merged_into_it(folder, monkeypatch):
    pytest.importorskip("peft")
    from sage_studio.checkpoints.lora import add_lora

    base, ids = load(folder)[0], torch.tensor([list(range(5, 40))])
    plain = base(ids).logits
    adapted = add_lora(base, rank=2).eval()
    torch.manual_seed(0)
    for key, weight in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.3)
    wanted = adapted(ids).logits
    adapted.save_pretrained(folder)
    model, tokenizer = load(folder)
    assert not any("lora" in key for key in model.state_dict()) and model.name_or_path == str(folder)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=2e-4)
    assert (wanted - plain).abs().max() > 0.1 and tokenizer.vocab_size == model.config.vocab_size
    # Both are checked, and neither is played without the other.
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing keys"):
        load(folder)
    save_file(weights | {"model.norm.weight": lost}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(folder)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="peft"):
        load(folder)


def test_no_checkpoint_and_another_model_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        load(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="llama"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model_type"):
        load(tmp_path)
