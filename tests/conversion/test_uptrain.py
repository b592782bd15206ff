"""Uptraining: pooled heads, the number of steps, a run of the stock trainer, and the table of the study."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import band, tiny_model

from conversion import uptraining_study
from conversion.convert_llama import pool_heads
from conversion.convert_to_llama import llama_of
from conversion.uptrain import main, pool, read_source, steps_of
from conversion.weights import ConversionError
from sage_music import SageMusicTokenizer
from sage_studio.checkpoints import load
from sage_studio.checkpoints.provenance import licensed, notice_of


@pytest.fixture(scope="module")
def original(tokenizer, tmp_path_factory):
    """A folder of a tiny model with eight full heads."""
    folder = tmp_path_factory.mktemp("original")
    model = tiny_model(tokenizer, "mha", num_attention_heads=8, num_key_value_heads=8, initializer_range=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """A folder of MIDI files, train/ and validation/ below it."""
    folder = tmp_path_factory.mktemp("music")
    for split, seeds in (("train", range(6)), ("validation", (7, 8))):
        (folder / split).mkdir()
        for seed in seeds:
            band(seed=seed).dump_midi(folder / split / f"{seed}.mid")
    return folder


def biased(tokenizer, routing: str, **options):
    """A model whose biases and norms are not at their beginnings."""
    model = tiny_model(tokenizer, routing, attention_bias=True, initializer_range=0.1, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                weight.add_(torch.randn_like(weight) * 0.3)
    return model.double()


@pytest.mark.parametrize("pooling", ["mean", "projection"])
@pytest.mark.parametrize("routing", ["mha", "gqa"])
def test_as_many_heads_as_before_change_nothing(tokenizer, prompts, routing, pooling):
    model = biased(tokenizer, routing)
    same = pool_heads(model, "none", model.config.num_key_value_heads, pooling)
    with torch.no_grad():
        torch.testing.assert_close(same(prompts).logits, model(prompts).logits, atol=1e-6, rtol=1e-6)


def disguised(shared, wide):
    """`wide`, of as many key-value heads as query heads, made to compute what `shared`, with one, does.

    Each head turns the shared key by an angle of its own a pair of channels, its query likewise, and mixes the values
    by a matrix that its output undoes.
    """
    heads, width = 4, 8
    generator = torch.Generator().manual_seed(0)
    state = shared.state_dict()
    for name in [name for name in state if name.endswith(("kv_weight", "kv_bias"))]:
        path, kind = name.rsplit(".kv_", 1)
        (key, value), query = state[name][0].chunk(2), state[f"{path}.q_proj.{kind}"].unflatten(0, (heads, width))
        generator.manual_seed(0)
        keys, values, queries = [], [], []
        for head in range(heads):
            angle = torch.rand(width // 2, generator=generator, dtype=torch.float64) * 6
            turn = torch.cat(
                (
                    torch.cat((angle.cos().diag(), -angle.sin().diag()), 1),
                    torch.cat((angle.sin().diag(), angle.cos().diag()), 1),
                )
            )
            mix = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
            keys.append(turn @ key)
            queries.append(turn @ query[head])
            values.append(mix @ value)
            if kind == "weight":
                columns = slice(head * width, (head + 1) * width)
                state[f"{path}.o_proj.weight"][:, columns] = state[f"{path}.o_proj.weight"][:, columns] @ mix.T
        state[name], state[f"{path}.q_proj.{kind}"] = torch.cat(keys + values)[None], torch.cat(queries)
    wide.load_state_dict(state)
    return wide


def test_projection_finds_what_heads_have_in_common(tokenizer, prompts):
    shared = biased(tokenizer, "mqa", num_attention_heads=4)
    with torch.no_grad():
        expected = shared(prompts).logits.clone()
        wide = disguised(shared, biased(tokenizer, "mha", num_attention_heads=4, num_key_value_heads=4))
        close = {"atol": 1e-6, "rtol": 1e-6}
        torch.testing.assert_close(wide(prompts).logits, expected, **close)
        for routing in ("none", "token"):
            torch.testing.assert_close(pool_heads(wide, routing, 1, "projection")(prompts).logits, expected, **close)
        assert (pool_heads(wide, "none")(prompts).logits - expected).abs().max() > 0.1  # the mean does not


def test_a_run_from_a_llama_to_routed_heads(tokenizer, original, music, tmp_path, capsys):
    llama = tmp_path / "llama"
    llama_of(load(original)[0]).save_pretrained(llama)
    tokenizer.save_vocabulary(llama)
    run = tmp_path / "run"
    argv = [str(llama), str(run), "--routing", "head", "--pooling", "projection", "--data", str(music)]
    argv += ["--original-tokens", "20000", "--fraction", "0.05", "--block_size", "128", "--learning_rate", "3e-3"]
    argv += ["--per_device_train_batch_size", "2", "--sample_steps", "0", "--save_only_model", "true"]
    assert main(argv) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 4 and report["eval_nats_per_note"] < report["nats_per_note_before"]
    model, music_tokenizer = load(run / "best")
    assert model.config.kv_routing == "head" and model.config.num_key_value_heads == 1
    before = load(run / "pooled")[0].model.layers[0].self_attn.kv_weight
    assert (before == before[:1]).all()
    after = model.model.layers[0].self_attn.kv_weight
    assert not torch.allclose(after[0], after[2])  # attributes have become different
    assert music_tokenizer.get_vocab() == tokenizer.get_vocab()
    written = (run / "pooled" / "model.safetensors").stat().st_mtime_ns
    assert main(argv) == 0 and "finished" in capsys.readouterr().err
    # From other heads it is another run: neither gone on with nor written over, whatever is trained for how long.
    heads = [str(original), *argv[1:]]  # the same weights under another name
    assert main(heads) == 0 and "finished" in capsys.readouterr().err
    for place, value in ((3, "token"), (5, "mean")):
        assert main([*argv[:place], value, *argv[place + 1 :], "--fraction", "0.1"]) == 2
        assert f"(now {value})" in capsys.readouterr().err
    torch.manual_seed(1)
    other = tiny_model(tokenizer, "mha", num_attention_heads=8, num_key_value_heads=8, initializer_range=0.06)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert main([str(tmp_path / "other"), *argv[1:], "--fraction", "0.1"]) == 2
    assert "began from another model (weights" in capsys.readouterr().err
    assert (run / "pooled" / "model.safetensors").stat().st_mtime_ns == written
    assert json.loads((run / "report.json").read_text()) == report


def test_the_license_of_the_original_is_that_of_the_result(original, tmp_path):
    """The chain of folders ends at `pooled`, which nothing but its own files leads on from."""
    source = shutil.copytree(original, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n")
    (source / "NOTICE.md").write_text("Not for money.")
    folder = pool(source, tmp_path / "run", "token")
    shutil.copytree(folder, tmp_path / "run" / "best")
    for name in ("README.md", "NOTICE.md", "provenance.json"):
        (tmp_path / "run" / "best" / name).unlink()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"model": str(folder)}))
    shutil.rmtree(source)
    assert [found.license for found in licensed(str(tmp_path / "run" / "best"))] == ["cc-by-nc-sa-4.0"] * 2
    assert notice_of(str(tmp_path / "run" / "best")).read_text() == "Not for money."


def test_a_pooled_model_that_was_not_written_to_its_end_is_written_anew(original, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SageMusicTokenizer, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            pool(original, tmp_path, "head")
    assert load(pool(original, tmp_path, "token"))[0].config.kv_routing == "token"


def test_steps_and_wrong_arguments(original, music, tmp_path, capsys):
    assert steps_of(0.05, 8_192_000, 2048) == 200
    assert steps_of(0.05, 8_192_001, 2048) == 201
    for fraction, tokens in ((0, 10), (0.1, 0), (float("nan"), 10)):
        with pytest.raises(ConversionError, match="above 0"):
            steps_of(fraction, tokens, 2048)
    with pytest.raises(ConversionError, match="only SAGE-Music"):
        read_source("perceivers")
    for argv, message in (
        ([str(original), "--data", str(music)], "--original-tokens"),
        ([str(original), "--original-tokens", "1e5", "--max_steps", "9"], "--max_steps"),
        (["sage-music", "--original-tokens", "1e5", "--data", str(music)], "already"),
        ([str(original), "--original-tokens", "1e5", "--kv-heads", "3", "--data", str(music)], "divisor"),
        ([str(tmp_path / "none"), "--original-tokens", "1e5"], "no such folder"),
    ):
        assert main([argv[0], str(tmp_path / "run"), *argv[1:]]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_the_study_pairs_pieces_and_draws_seeds(monkeypatch):
    """By hand: 2 pieces of 10 notes; the original needs 2 nats a note on one and 4 on the other."""
    arms = {uptraining_study.CONTROL: ("none", None, "mean"), "arm": ("token", 1, "mean")}
    monkeypatch.setattr(uptraining_study, "ARMS", arms)

    def records(*nats):
        return [{"piece": f"p{i}", "failed": None, "nats": n, "notes": 10} for i, n in enumerate(nats)]

    pieces = {"original": records(20, 40), "arm 0% 0": records(40, 80)}
    pieces |= {"arm 1% 0": records(26, 46), "arm 1% 1": records(26, 46)}
    pieces |= {"arm 5% 0": records(20, 40), "arm 5% 1": records(26, 46)}
    control = {"0% 0": (20, 40), "1% 0": (26, 46), "1% 1": (26, 46), "5% 0": (20, 30), "5% 1": (20, 30)}
    pieces |= {f"{uptraining_study.CONTROL} {name}": records(*nats) for name, nats in control.items()}
    rows = uptraining_study.summary(pieces, seeds=2)["rows"]
    assert rows["arm 1%"]["control"] == pytest.approx({"mean": 0, "low": 0, "high": 0})
    # 2.5 nats a note for the control; 3 and 3.6 for the arm's seeds.
    assert rows["arm 5%"]["control"]["mean"] == pytest.approx(32)
    assert rows["original"]["mean"] == pytest.approx(3) and rows["arm 0%"]["seeds"] == 1
    assert rows["arm 0%"]["difference"]["mean"] == pytest.approx(100)
    constant = rows["arm 1%"]["difference"]  # 0.6 nats on every piece and seed: nothing to draw
    assert constant == pytest.approx({"mean": 20, "low": 20, "high": 20})
    assert rows["arm 5%"]["difference"] == pytest.approx({"mean": 10, "low": 0, "high": 20})
    table = uptraining_study.interval(np.array([[1.0, 3.0]]))
    assert (table["mean"], table["low"], table["high"]) == (2, 1, 3)
