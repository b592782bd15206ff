"""The training command on a real folder with the real Trainer: it learns, resumes and leaves a model that plays."""

import json

import pytest
import torch
from conftest import band

from notekit.checkpoint import load
from notekit.compose import generate_piece
from notekit.train import main, sum_of_nats
from perceivers import PerceiverSForCausalLM, PerceiverSTokenizer
from perceivers.segmentation import SequentialDataset


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
    """Pieces several times longer than the small context below."""
    root = tmp_path_factory.mktemp("long")
    for seed, name in enumerate(("train", "train", "validation")):
        (root / name).mkdir(exist_ok=True)
        band(bars=24, seed=seed).dump_midi(root / name / f"{seed}.mid")
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


@pytest.mark.filterwarnings("ignore:left out")
def test_a_draft_head_is_trained_on_a_checkpoint_that_stays_as_it_is(folder, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "drafting"
    assert main(["--data", str(folder), "--out", str(base), "--eval-every", "60", *SMALL, "--steps", "60"]) == 0
    command = ["--data", str(folder), "--out", str(out), "--eval-every", "40", *SMALL[-8:], "--draft-tokens", "2"]
    capsys.readouterr()
    assert main([*command, "--steps", "20"]) == 2
    assert "--init-from" in capsys.readouterr().err.splitlines()[-1]
    assert main([*command, "--init-from", str(base / "best"), "--steps", "40", "--block-size", "128"]) == 0
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
@pytest.mark.parametrize("options", [[], ["--segmentation", "baseline"], ["--position-uniform", "--transpose", "0"]])
def test_perceivers_trains_and_its_best_goes_on(long_folder, tmp_path, options, capsys):
    out = tmp_path / "run"
    shape = ["--hidden-size", "32", "--intermediate-size", "48", "--layers", "1", "--heads", "2"]
    shape += ["--num-latents", "64", "--context", "256", "--cross-scales", "none", "96"]
    steps = ["--eval-every", "3", "--batch-size", "2", "--warmup", "1", "--gradient-accumulation", "2"]
    command = ["--data", str(long_folder), "--out", str(out), *steps, *options]
    assert main([*command, "--family", "perceivers", *shape, "--steps", "3", "--gradient-checkpointing"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["steps"], report["num_latents"], report["context"]) == (3, 64, 256)
    assert (report["layers"], report["cross_scales"]) == (1, [None, 96])
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
    again = [*command[:3], str(tmp_path / "again"), "--init-from", str(out / "best"), "--steps", "0"]
    assert main([*again, "--context", "128"]) == 0
    second = json.loads((tmp_path / "again" / "report.json").read_text())
    assert (second["family"], second["context"], second["hidden_size"]) == ("perceivers", 128, 32)
    assert second["parameters"] == report["parameters"]
    assert main([*again, "--family", "sage-music"]) == 2
    assert "perceivers checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_an_option_of_the_other_family_is_refused(folder, tmp_path, capsys):
    for argv, word in (
        (["--num-latents", "64"], "--num-latents is not an option of the family sage-music"),
        (["--position-uniform"], "--position-uniform is not"),
        (["--family", "perceivers", "--kv-routing", "none"], "--kv-routing is not an option of the family perceivers"),
    ):
        assert main(["--data", str(folder), "--out", str(tmp_path), *argv]) == 2
        assert word in capsys.readouterr().err


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
