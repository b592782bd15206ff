"""Checkpoints that were not written to their end are passed over; two runs do not mix; no room is said at once."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from transformers import Trainer, TrainingArguments

from sage_studio.train import checks
from sage_studio.train.checks import check_output
from sage_studio.train.resuming import check_run, complete, is_finished, last_complete, state_of, times_no_better


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run folder with the checkpoints of three steps."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model(tokenizer)
    ids = torch.arange(20) + 10
    items = [{"input_ids": ids, "labels": ids}] * 6
    options = {"max_steps": 3, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    Trainer(
        model, TrainingArguments(str(folder), per_device_train_batch_size=2, **options), train_dataset=items
    ).train()
    return folder


def test_the_newest_whole_checkpoint_is_found(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert last_complete(folder) == (folder / "checkpoint-3", [])
    (folder / "checkpoint-3" / "trainer_state.json").unlink()  # what Trainer writes last
    assert last_complete(folder) == (folder / "checkpoint-2", [folder / "checkpoint-3"])
    assert last_complete(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("keep", [0, 5, 0.5, -2])
def test_a_file_cut_anywhere_makes_a_checkpoint_incomplete(run, tmp_path, name, keep):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", folder)
    assert complete(folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert not complete(folder)


def test_without_weights_a_checkpoint_is_incomplete(run, tmp_path):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", folder)
    (folder / "model.safetensors").unlink()
    assert not complete(folder)


def test_the_end_of_a_run_is_known(run, tmp_path):
    """By steps, by epochs, or by early stopping; with more of them it goes on."""
    state = state_of(run / "checkpoint-3")
    assert (state["global_step"], state["epoch"]) == (3, 1.0)
    for options, finished in (
        ({"max_steps": 3}, True),
        ({"max_steps": 2}, True),
        ({"max_steps": 4}, False),
        ({"num_train_epochs": 1}, True),
        ({"num_train_epochs": 2}, False),
    ):
        assert is_finished(state, TrainingArguments(str(tmp_path), use_cpu=True, **options), None) == finished
    state["stateful_callbacks"] = {"EarlyStoppingCallback": {"attributes": {"early_stopping_patience_counter": 2}}}
    assert times_no_better(state) == 2
    longer = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=9)
    assert is_finished(state, longer, 2) and not is_finished(state, longer, 3) and not is_finished(state, longer, None)


def test_a_folder_keeps_one_run(tmp_path):
    check_run(tmp_path, {"seed": 0, "config": ["a"]}, resumes=False)
    check_run(tmp_path, {"seed": 0, "config": ["a"]}, resumes=True)
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\).*--output.*best"):
        check_run(tmp_path, {"seed": 1, "config": ["a"]}, resumes=True)
    check_run(tmp_path, {"seed": 1, "config": ["a"]}, resumes=False)  # nothing to go on from: a new run


def test_a_run_says_where_its_base_lies(tmp_path, monkeypatch):
    """For whoever reads it from another folder; an older run, or one that was moved, is gone on with all the same."""
    (tmp_path / "base").mkdir()
    (tmp_path / "perceivers").mkdir()  # the bundled one goes before it
    monkeypatch.chdir(tmp_path)
    for model, place in (("base", str(tmp_path / "base")), ("perceivers", None), ("user/base", None)):
        run = tmp_path / f"run of {model.replace('/', ' ')}"
        run.mkdir()
        check_run(run, {"model": model}, resumes=False)
        kept = json.loads((run / "run.json").read_text())
        assert kept["model"] == model and kept.get("model_folder") == place
        check_run(run, {"model": model}, resumes=True)
        (run / "run.json").write_text(json.dumps({"model": model}))
        check_run(run, {"model": model}, resumes=True)
        assert json.loads((run / "run.json").read_text()) == kept
    (tmp_path / "moved").mkdir()
    (tmp_path / "base").rename(tmp_path / "moved" / "base")
    monkeypatch.chdir(tmp_path / "moved")
    check_run(tmp_path / "run of base", {"model": "base"}, resumes=True)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        check_output(arguments(tmp_path / "file" / "run"), 10, 10)


def test_too_little_room_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000_000))
    check_output(arguments(tmp_path), 1_000_000, 1_000_000)  # 3 checkpoints of 12 MB and the best weights
    check_output(arguments(tmp_path), 6_000_000, 100_000, adapters=True)
    with pytest.raises(ValueError, match=r"50 MB are free.*need.*241 MB.*--save_total_limit"):
        check_output(arguments(tmp_path), 6_000_000, 6_000_000)


def arguments(folder):
    return TrainingArguments(str(folder), save_total_limit=2, use_cpu=True)
