"""`sage-music train` on a real folder with the real Trainer: it learns, resumes, samples, and its model plays."""

import csv
import json
import sys

import pytest
import torch
from conftest import band
from transformers import Trainer

from perceivers import PerceiverSForCausalLM, PerceiverSTokenizer
from perceivers.segmentation import SequentialDataset
from sage_music import SageMusicTokenizer
from sage_studio.checkpoints import load
from sage_studio.cli import main as cli
from sage_studio.errors import install_hint
from sage_studio.generation.bars import generate_piece
from sage_studio.music.midi import read_score
from sage_studio.train import command as command_module
from sage_studio.train import sum_of_nats
from sage_studio.train.command import main

SMALL = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 5}
SMALL |= {"model_type": "sage_music", "max_position_embeddings": 256}
PIANO = {"model_type": "perceivers", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
PIANO |= {"num_attention_heads": 2, "num_latents": 64, "max_position_embeddings": 256, "cross_scales": [None, 96]}
FEW = "--block_size 128 --per_device_train_batch_size 4 --warmup_steps 2 --learning_rate 0.01 --sample_steps 0".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("midi")
    for seed in range(6):
        name = "validation" if seed == 5 else "train"
        (root / name).mkdir(exist_ok=True)
        band(bars=6, seed=seed).dump_midi(root / name / f"{seed}.mid")
    (root / "train" / "broken.mid").write_bytes(b"not midi")
    return root


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """Pieces several times longer than the small context."""
    root = tmp_path_factory.mktemp("long")
    for seed, name in enumerate(("train", "train", "validation")):
        (root / name).mkdir(exist_ok=True)
        band(bars=24, seed=seed).dump_midi(root / name / f"{seed}.mid")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def config_file(folder, fields) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return str(path)


def history(checkpoint) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def test_it_learns_resumes_and_plays(folder, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["--data", str(folder), "--output", str(out), "--model", config_file(tmp_path, SMALL), *FEW]
    command += ["--eval_steps", "10"]
    assert main([*command, "--max_steps", "10"]) == 0
    first = json.loads((out / "report.json").read_text())
    assert main([*command, "--max_steps", "30"]) == 0
    second = json.loads((out / "report.json").read_text())
    assert (first["steps"], second["steps"]) == (10, 30)
    assert [row["step"] for row in history(out / "checkpoint-30") if "eval_nats_per_note" in row] == [0, 10, 20, 30]
    assert second["eval_nats_per_note"] < first["eval_nats_per_note"] - 1
    untrained = second["nats_per_note_before"]
    assert untrained == first["nats_per_note_before"] > first["eval_nats_per_note"]
    assert f"{untrained:.3f} before, {second['eval_nats_per_note']:.3f} after (-" in capsys.readouterr().out
    assert second["corpus"]["splits"]["train"]["pieces"] == 5 and second["corpus"]["skipped"] == 1
    (row,) = csv.DictReader((out / "skipped.csv").open())
    assert row["file"].endswith("broken.mid") and "not a MIDI file" in row["reason"]
    assert any((out / "runs").rglob("events.out.tfevents*"))  # TensorBoard's
    # Only evaluating, the kept weights have what the report says.
    again = ["--data", str(folder), "--output", str(tmp_path / "again"), "--model", str(out / "best"), *FEW]
    assert main([*again, "--max_steps", "0"]) == 0
    report = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert report["eval_nats_per_note"] == pytest.approx(second["eval_nats_per_note"], rel=1e-4)
    assert (out / "held_out.csv").read_text().splitlines() == ["file", "validation/5.mid"]
    model, tokenizer = load(out / "best")
    assert model.config.use_cache and not (out / "best" / "training_args.bin").exists()
    assert generate_piece(model, tokenizer, bars=2, seed=0).bars == 2


def test_samples_early_stopping_and_the_best_weights(folder, tmp_path, capsys):
    """A rate so large that the loss goes up: training ends early, and the weights kept are not the last ones."""
    out, shape = tmp_path / "run", {**SMALL, "max_position_embeddings": 2048}
    command = ["--data", str(folder), "--output", str(out), "--model", config_file(tmp_path, shape), *FEW[:-2]]
    command += "--learning_rate 0.5 --eval_steps 2 --max_steps 40 --early_stopping_patience 2".split()
    assert cli(["train", *command, "--num_samples", "1", "--sample_bars", "2"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] < 40
    rows = history(out / f"checkpoint-{report['steps']}")
    evaluations = {
        row["step"]: row["eval_nats_per_note"] for row in rows if "eval_nats_per_note" in row and row["step"]
    }
    assert report["eval_nats_per_note"] == pytest.approx(min(evaluations.values()), rel=1e-4)
    assert min(evaluations, key=evaluations.get) == report["steps"] - 4
    steps = [row["step"] for row in rows if "sample_valid_mass" in row]
    assert steps == list(range(2, report["steps"] + 1, 2))
    # Called again, the run is finished; with more patience it goes on.
    weights = (out / "best" / "model.safetensors").read_bytes()
    assert cli(["train", *command, "--num_samples", "1", "--sample_bars", "2"]) == 0
    assert "this run is finished" in capsys.readouterr().err
    assert (out / "best" / "model.safetensors").read_bytes() == weights
    assert json.loads((out / "report.json").read_text()) == report
    again = [text if text != "2" else "4" for text in command[-2:]]
    assert cli(["train", *command[:-2], *again, "--num_samples", "1", "--sample_bars", "2"]) == 0
    assert json.loads((out / "report.json").read_text())["steps"] > report["steps"]
    assert all(0 < row["sample_valid_mass"] <= 1 for row in rows if "sample_valid_mass" in row)
    for step in steps:
        assert read_score(out / "samples" / f"step-{step:06}-1.mid").note_num() >= 0
        assert (out / "samples" / f"step-{step:06}-1.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        ("--eval_steps 2", [0, 2, 4, 6]),  # the best of them is what is kept
        ("--eval_steps 2 --learning_rate 9", [0, 2, 4, 6]),  # not the last one
        ("--eval_steps 3 --load_best_model_at_end false --eval_on_start false", [3, 6]),
        ("--eval_steps 4 --load_best_model_at_end false", [0, 4, 6]),  # the last weights have no evaluation yet
        ("--eval_strategy no", [6]),
        ("--eval_steps 6 --bf16_full_eval", [0, 6, 6]),  # half precision is that of the last evaluation alone
        ("--eval_steps 3 --lora_rank 2", [0, 3, 6]),
    ],
)
def test_weights_are_evaluated_once(folder, tmp_path, monkeypatch, capsys, options, evaluated):
    steps, whole = [], Trainer.evaluate

    def evaluate(trainer, *args, **more):
        steps.append(trainer.state.global_step)
        return whole(trainer, *args, **more)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    out, config = tmp_path / "run", config_file(tmp_path, SMALL)
    data = ["--data", str(folder), *FEW]
    assert main([*data, "--output", str(out), "--model", config, "--max_steps", "6", *options.split()]) == 0
    assert steps == evaluated
    report = json.loads((out / "report.json").read_text())
    assert {"eval_loss", "eval_nats_per_note", "eval_nats_per_token", "eval_runtime"} <= report.keys()
    assert report["steps"] == 6 and report["num_input_tokens_seen"] == report["train_tokens"] == 6 * 4 * 128
    # The number is that of the weights that are kept.
    again = ["--output", str(tmp_path / "again"), "--model", str(out / "best"), "--max_steps", "0"]
    assert main([*data, *again]) == 0
    kept = json.loads((tmp_path / "again" / "evaluation.json").read_text())["eval_nats_per_note"]
    precision = 0.02 if "bf16" in options else 1e-4
    assert report["eval_nats_per_note"] == pytest.approx(kept, rel=precision)


def test_samples_leave_training_as_it_is(folder, tmp_path, capsys):
    """With and without samples on the way the weights are the same."""
    command = ["--data", str(folder), "--model", config_file(tmp_path, SMALL), *FEW[:-2], "--max_steps", "6"]
    for name, steps in (("with", "2"), ("without", "0")):
        assert main([*command, "--output", str(tmp_path / name), "--sample_steps", steps, "--sample_bars", "1"]) == 0
    states = [load(tmp_path / name / "best")[0].state_dict() for name in ("with", "without")]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_a_draft_head_is_trained_on_a_checkpoint_that_stays_as_it_is(folder, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "drafting"
    data = ["--data", str(folder), *FEW]
    config = config_file(tmp_path, SMALL)
    assert main([*data, "--output", str(base), "--model", config, "--max_steps", "60"]) == 0
    drafting = [*data, "--output", str(out), "--draft_tokens", "2", "--max_steps", "40"]
    capsys.readouterr()
    assert main([*drafting, "--model", config]) == 2
    assert "--model CHECKPOINT" in capsys.readouterr().err.splitlines()[-1]
    assert main([*drafting, "--model", str(base / "best")]) == 0
    before, (after, tokenizer) = load(base / "best")[0], load(out / "best")
    assert before.draft is None and after.config.num_mtp_layers == 2
    state = after.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.state_dict().items())
    ids = torch.tensor([tokenizer.midi_to_ids(folder / "validation" / "5.mid")[:128]])

    def loss_of_the_head(model):
        torch.manual_seed(0)
        outputs = model.model(ids)
        logits = model.lm_head(outputs.last_hidden_state)
        return float(model.draft.loss(outputs.last_hidden_state, ids, ids, logits, model).detach())

    torch.manual_seed(0)
    untrained = type(after)(after.config)
    untrained.load_state_dict(before.state_dict(), strict=False)
    assert loss_of_the_head(after) < loss_of_the_head(untrained) - 0.05
    prompt, options = ids[:, :40], {"do_sample": False, "max_new_tokens": 40}
    assert torch.equal(after.generate(prompt, **options, use_mtp=True), before.generate(prompt, **options))


def test_adapters_are_kept_alone_and_merged(folder, tmp_path, capsys):
    base = tmp_path / "base"
    data = ["--data", str(folder), *FEW]
    assert main([*data, "--output", str(base), "--model", config_file(tmp_path, SMALL), "--max_steps", "10"]) == 0
    assert json.loads((base / "best" / "provenance.json").read_text()) == {"made_from": []}  # training begun anew
    (base / "best" / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    (base / "best" / "NOTICE.md").write_text("Not for money.")
    out = tmp_path / "adapted"
    command = [*data, "--output", str(out), "--model", str(base / "best"), "--lora_rank", "4", "--max_steps", "10"]
    assert main(command) == 0
    report = json.loads((out / "report.json").read_text())
    before = json.loads((base / "report.json").read_text())
    assert report["eval_nats_per_note"] < before["eval_nats_per_note"]
    assert report["trainable_parameters"] < report["parameters"]
    assert {path.name for path in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    for name in ("best", "adapter", "checkpoint-10"):  # wherever one of them is copied to, it tells its license
        assert json.loads((out / name / "provenance.json").read_text()) == {
            "made_from": [{"name": None, "license": "cc-by-nc-sa-4.0"}]
        }
        assert (out / name / "NOTICE.md").read_text() == "Not for money."
    merged, _ = load(out / "best")
    applied, _ = load(out / "adapter")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, applied(ids).logits, atol=1e-5)
        assert not torch.allclose(merged(ids).logits, load(base / "best")[0](ids).logits, atol=1e-3)


def test_nats_of_every_shape_of_logits():
    """As many logits as labels (the last predicts nothing), or one for each of the last labels."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[1, :2] = -100
    log = logits.log_softmax(-1)
    shifted = [-sum(float(log[r, i, labels[r, i + 1]]) for i in range(4) if labels[r, i + 1] >= 0) for r in range(2)]
    assert sum_of_nats(logits, labels).tolist() == pytest.approx(shifted)
    last = [-sum(float(log[r, i, labels[r, i + 2]]) for i in range(3)) for r in range(2)]
    assert sum_of_nats(logits[:, :3], labels).tolist() == pytest.approx(last)
    # What Trainer makes of them where another process has longer rows: padding on the right, after the model.
    wider, longer = (torch.nn.functional.pad(labels, (0, k), value=-100) for k in (4, 1))
    assert sum_of_nats(logits[:, :3], wider).tolist() == pytest.approx(last)
    more = torch.nn.functional.pad(logits, (0, 0, 0, 1), value=-100)
    assert sum_of_nats(more, wider).tolist() == sum_of_nats(more, longer).tolist() == pytest.approx(shifted)


@pytest.mark.filterwarnings("ignore:.*piano", "ignore:.*drum notes", "ignore:.*struck twice")
@pytest.mark.parametrize("options", [[], ["--segmentation", "baseline"], ["--transpose", "0", "--tempo", "0.1"]])
def test_perceivers_trains_and_its_best_goes_on(long_folder, tmp_path, options, capsys):
    out = tmp_path / "run"
    steps = "--max_steps 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --sample_steps 0".split()
    command = ["--data", str(long_folder), "--output", str(out), *steps, *options]
    config = config_file(tmp_path, PIANO)
    assert main([*command, "--model", config, "--activation_checkpointing"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 3 and 0 <= report["padding"] < 1
    notes = report["eval_nats_per_note"] / report["eval_nats_per_token"]
    assert 3 < notes < 6  # note_on, note_off, most of a velocity and of two time shifts
    assert report["eval_nats_per_token"] < 6.1  # of a vocabulary of 391: log(391) is 5.97
    model = PerceiverSForCausalLM.from_pretrained(out / "best")
    tokenizer = PerceiverSTokenizer.from_pretrained(out / "best")
    assert model.config.cross_scales == [None, 96] and model.config.use_cache
    # By hand, over the segments one by one: what the report says.
    ids = torch.tensor([*tokenizer.midi_to_ids(long_folder / "validation" / "2.mid"), tokenizer.eos_token_id])
    total = 0.0
    for item in SequentialDataset([ids], 256, 64):
        with torch.no_grad():
            mean = float(model(**{name: value[None] for name, value in item.items()}).loss)
        total += mean * int((item["labels"] != -100).sum())
    assert total / (len(ids) - 1) == pytest.approx(report["eval_nats_per_token"], rel=1e-4)
    # The family is the checkpoint's, and a shorter context is no new shape of its weights.
    again = ["--data", str(long_folder), "--output", str(tmp_path / "again"), "--model", str(out / "best")]
    assert main([*again, "--max_steps", "0", "--config", "max_position_embeddings=128"]) == 0
    second = json.loads((tmp_path / "again" / "evaluation.json").read_text())
    assert second["parameters"] == report["parameters"]
    assert main([*again, "--config", "hidden_size=64"]) == 2
    assert "hidden_size: the weights" in capsys.readouterr().err.splitlines()[-1]


def test_shards_are_trained_on_whole_and_in_a_stream(folder, tmp_path, capsys):
    config, shards = config_file(tmp_path, SMALL), tmp_path / "shards"
    SageMusicTokenizer().save_pretrained(tmp_path / "tokenizer")
    prepared = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(shards)]
    assert cli(["prepare", "--data", str(folder), *prepared]) == 0
    for more in ([], ["--streaming"]):
        out = tmp_path / f"run{len(more)}"
        command = ["--data", str(shards), "--output", str(out), "--model", config, *FEW, "--max_steps", "20", *more]
        assert main(command) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["steps"] == 20 and report["eval_nats_per_note"] < 20
    capsys.readouterr()
    assert main(["--data", str(shards), "--output", str(tmp_path / "other"), "--model", "perceivers"]) == 2
    assert "Prepare" in capsys.readouterr().err.splitlines()[-1]  # tokens of another vocabulary
    assert main(["--data", str(shards), "--output", str(tmp_path / "other"), "--licences", "MIT"]) == 2
    assert "--licences" in capsys.readouterr().err.splitlines()[-1]
    assert main([*command[:-1], "--num_train_epochs", "1", "--max_steps", "-1", "--streaming"]) == 2
    assert "--max_steps" in capsys.readouterr().err.splitlines()[-1]


def test_a_stream_goes_on_where_it_was(folder, tmp_path, capsys):
    """In a later pass over the shards too: the run has seen them several times when it is stopped."""
    shards, config = tmp_path / "shards", config_file(tmp_path, SMALL)
    SageMusicTokenizer().save_pretrained(tmp_path / "tokenizer")
    prepared = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(shards)]
    assert cli(["prepare", "--data", str(folder), *prepared]) == 0
    command = ["--data", str(shards), "--streaming", "--model", config, *FEW, "--save_steps", "7"]
    command += ["--max_steps", "21", "--lr_scheduler_type", "constant"]
    for name, steps in (("through", ["21"]), ("resumed", ["14", "21"])):
        for step in steps:
            assert main([*command, "--output", str(tmp_path / name), "--max_steps", step]) == 0
    one, other = (load(tmp_path / name / "best")[0].state_dict() for name in ("through", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_wrong_is_said_in_one_line_before_training(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_module, "Trainer", None)  # nothing may come so far
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for index in range(3):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / f"{index}.mid").write_bytes(b"MThd, or so")
    config = config_file(tmp_path, SMALL)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "odd.json").write_text('{"model_type": "sage_music", "hiden_size": 3}')
    (tmp_path / "file").write_text("")
    SageMusicTokenizer(num_velocities=8).save_pretrained(tmp_path / "other")
    good, out = ["--data", str(folder), "--model", config], ["--output", str(tmp_path / "out")]
    for argv, word in (
        (["--data", str(tmp_path / "empty"), *good[2:], *out], "empty"),
        (["--data", str(tmp_path / "broken"), *good[2:], *out], "none of the 3 files can be used"),
        (["--data", str(tmp_path / "absent"), *good[2:], *out], "absent"),
        ([*good[:2], "--model", str(tmp_path / "none"), *out], "none"),
        ([*good[:2], "--model", str(folder), *out], "--data"),
        ([*good[:2], "--model", str(tmp_path / "list.json"), *out], "JSON object"),
        ([*good[:2], "--model", str(tmp_path / "odd.json"), *out], "hiden_size"),
        ([*good[:2], "--model", "sage-music", "--config", "hidden_size=8", *out], "hidden_size"),
        ([*good[:2], "--model", "sage-music", "--config", "context", *out], "FIELD=VALUE"),
        ([*good[:2], "--model", "sage-music", "--tokenizer", str(tmp_path / "other"), *out], "vocabulary"),
        ([*good, "--config", "num_attention_heads=7", *out], "head_dim"),
        ([*good, "--segmentation", "effective", *out], "--segmentation is an option of PerceiverS"),
        ([*good, "--tempo", "2", *out], "--tempo"),
        ([*good, "--label_smoothing_factor", "0.1", *out], "--label_smoothing_factor"),
        ([*good, "--train_sampling_strategy", "random", *out], "shuffle themselves"),
        ([*good, "--prediction_loss_only", *out], "--prediction_loss_only"),
        ([*good, "--metric_for_best_model", "bleu", *out], "nats_per_note"),
        ([*good, "--early_stopping_patience", "2", "--eval_strategy", "no", *out], "--early_stopping_patience"),
        ([*good, "--push_to_hub", *out], "OUTPUT/best"),
        ([*good, "--dataloader_drop_last", *out], "evaluation"),
        ([*good, "--num_samples", "0", *out], "--num_samples 0"),
        ([*good, "--streaming", *out], "prepare"),
        ([*good, "--lora_rank", "2", "--draft_tokens", "2", *out], "draft"),
        ([*good, "--eval_steps", "7", "--save_steps", "5", *out], "saving steps"),
        ([*good, "--output", str(tmp_path / "file" / "run")], "cannot be written to"),
        ([*good[:2], "--model", "perceivers", "--block_size", "64", *out], "--block_size is an option of SAGE-Music"),
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("sage-music train: error:") and word in error, error


@pytest.mark.parametrize("package", ["accelerate", "datasets"])
def test_a_missing_extra_is_said(folder, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli(["train", "--data", str(folder), "--output", str(tmp_path / "run")]) == 2
    hint = install_hint("accelerate", "datasets", "tensorboard")
    assert f"train needs {package}: {hint}" in capsys.readouterr().err and f"'{package}>=" in hint
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_not_gone_on_with(folder, tmp_path, capsys):
    command = ["--data", str(folder), "--output", str(tmp_path / "run"), "--model", config_file(tmp_path, SMALL), *FEW]
    assert main([*command, "--max_steps", "2"]) == 0
    capsys.readouterr()
    assert main([*command, "--max_steps", "4", "--transpose", "3"]) == 2
    assert "transpose 6 (now 3)" in capsys.readouterr().err.splitlines()[-1]
    assert main([*command, "--max_steps", "4", "--gradient_accumulation_steps", "2"]) == 2
    assert "rows_of_a_step 4 (now 8)" in capsys.readouterr().err.splitlines()[-1]
    # Under the same name another model; and a rate that the optimizer's state would silently overrule.
    config_file(tmp_path, {**SMALL, "num_hidden_layers": 2})
    assert main([*command, "--max_steps", "4"]) == 2
    assert "other options: config " in capsys.readouterr().err.splitlines()[-1]
    config_file(tmp_path, SMALL)
    assert main([*command, "--max_steps", "4", "--learning_rate", "1e-9"]) == 2
    assert "learning_rate 0.01 (now 1e-09)" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_is_said_and_what_is_whole_is_kept(folder, tmp_path, monkeypatch, capsys):
    command = ["--data", str(folder), "--output", str(tmp_path / "run"), "--model", config_file(tmp_path, SMALL), *FEW]
    command += ["--save_steps", "2", "--max_steps", "6"]
    save = torch.save

    def full(state, path, *args, **options):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device", str(path))
        save(state, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the disk is full" in error and "checkpoint-2 is whole" in error
    monkeypatch.setattr(torch, "save", save)
    assert main(command) == 0
    assert "checkpoint-4 was not written to its end" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 6
