"""The training command on a real folder with the real Trainer: it learns, resumes and leaves a model that plays."""

import json

import pytest
from conftest import band

from notekit.compose import generate_piece, load
from notekit.train import main, split_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("midi")
    for seed in range(6):
        name = "validation" if seed == 5 else "train"
        (root / name).mkdir(exist_ok=True)
        band(bars=6, seed=seed).dump_midi(root / name / f"{seed}.mid")
    (root / "train" / "broken.mid").write_bytes(b"not midi")
    return root


SMALL = ["--hidden-size", "40", "--intermediate-size", "64", "--layers", "1", "--heads", "5", "--block-size", "128"]
SMALL += ["--batch-size", "4", "--warmup", "2", "--learning-rate", "0.01", "--context", "256"]


@pytest.mark.filterwarnings("ignore:left out")
def test_it_learns_resumes_and_plays(folder, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["--data", str(folder), "--out", str(out), "--eval-every", "10", *SMALL]
    assert main([*command, "--steps", "10"]) == 0
    first = json.loads((out / "report.json").read_text())
    assert main([*command, "--steps", "30"]) == 0
    second = json.loads((out / "report.json").read_text())
    assert (first["steps"], second["steps"]) == (10, 30)
    history = json.loads((out / "checkpoint-30" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "eval_nats_per_note" in row] == [10, 20, 30]  # it went on, not anew
    assert second["eval_nats_per_note"] < first["eval_nats_per_note"] - 1
    assert main([*command[:3], str(tmp_path / "again"), "--init-from", str(out / "best"), "--steps", "0", *SMALL]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["eval_nats_per_note"] == pytest.approx(second["eval_nats_per_note"], rel=1e-4)
    model, tokenizer = load(out / "best")
    assert model.config.use_cache
    assert generate_piece(model, tokenizer, bars=2, seed=0).bars == 2


def test_a_folder_without_splits_is_split_by_name(tmp_path):
    for index in range(60):
        (tmp_path / f"{index}.mid").write_bytes(b"")
    splits = split_files([str(tmp_path)], None, None)
    assert len(splits["train"]) + len(splits["validation"]) == 60 and not splits["test"]
    assert 1 <= len(splits["validation"]) <= 15
    assert splits == split_files([str(tmp_path)], None, None)


def test_licences_filter_files(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("a", "b"):
        (tmp_path / "train" / f"{name}.mid").write_bytes(b"")
    (tmp_path / "metadata.csv").write_text("path,licence\ntrain/a.mid,MIT\ntrain/b.mid,GPL-3.0\n")
    splits = split_files([str(tmp_path)], str(tmp_path / "metadata.csv"), ["MIT"])
    assert [path.name for path in splits["train"]] == ["a.mid"]


def test_wrong_data_and_checkpoints_end_with_two(folder, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    for argv, word in (
        (["--data", str(tmp_path)], str(tmp_path)),
        (["--data", str(tmp_path / "absent")], "absent"),
        (["--data", str(folder), "--init-from", str(tmp_path / "none")], "none"),
        (["--data", str(folder), "--heads", "7", "--hidden-size", "40"], "head_dim"),
    ):
        assert main([*argv, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("train: error:") and word in error
