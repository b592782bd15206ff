"""An export is the checkpoint, tensor by tensor, with all that a Hub repository needs, written whole or not at all."""

import json
import shutil
import stat
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_perceivers
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

import perceivers
import sage_music
from perceivers import PerceiverSTokenizer
from sage_studio.checkpoints import load
from sage_studio.checkpoints.provenance import ProvenanceError
from sage_studio.cli import main
from sage_studio.errors import CheckpointError, MissingExtraError, install_hint
from sage_studio.music.midi import read_notes
from sage_studio.publishing import export as exporting
from sage_studio.publishing.cards import LOADED, CardError
from sage_studio.publishing.export import ExportError, export, is_export
from sage_studio.train.arguments import ModelArguments
from sage_studio.train.parts import start

ROOT = Path(__file__).resolve().parents[3]
PRETRAINED = {"sage-music": sage_music.PRETRAINED, "perceivers": perceivers.PRETRAINED}


def tensors(folder) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {name: export(name, folder / name, repo_id=f"user/{name}") for name in PRETRAINED}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """Folders of an untrained checkpoint of each family."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, model, tok in (
        ("sage", tiny_model(tokenizer), tokenizer),
        ("perceivers", tiny_perceivers(), PerceiverSTokenizer()),
    ):
        model.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", list(PRETRAINED))
def test_every_tensor_is_as_it_was(exports, name):
    before, after = tensors(PRETRAINED[name]), tensors(exports[name])
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype and torch.equal(value, after[key]), key
    with safe_open(exports[name] / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", list(PRETRAINED))
def test_it_is_a_whole_repository(exports, name):
    folder, family = exports[name], name.replace("-", "_")
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for reference in [*config["auto_map"].values(), settings["auto_map"]["AutoTokenizer"][0]]:
        module, _, name_of_class = reference.partition(".")
        assert f"class {name_of_class}(" in (folder / f"{module}.py").read_text()
    impl = config["custom_pipelines"]["midi-continuation"]["impl"]
    assert f"class {impl.split('.')[1]}(" in (folder / f"{impl.split('.')[0]}.py").read_text()
    needed = ("handler.py", "requirements.txt", "LICENSE", "generation_config.json", f"configuration_{family}.py")
    for file in (*needed, "samples/prompt.mid", "samples/continuation.wav", "samples/continuation.png"):
        assert (folder / file).stat().st_size > 0, file
    assert (folder / "NOTICE.md").is_file() == (family == "perceivers")
    requirements = (folder / "requirements.txt").read_text()
    # Of the same versions as the package, and as the models themselves say.
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert requirements.splitlines()[: len(dependencies)] == dependencies and "pretty_midi" in requirements
    assert any(line.startswith("transformers>=") and ",<" in line for line in dependencies)
    assert len(read_notes(folder / "samples/continuation.mid")) > len(read_notes(folder / "samples/prompt.mid")) / 2
    card = (folder / "README.md").read_text()
    assert ModelCard(card).data.license == {"sage_music": "apache-2.0", "perceivers": "cc-by-nc-sa-4.0"}[family]
    assert "USER/NAME" not in card


@pytest.mark.parametrize("name", list(PRETRAINED))
def test_it_says_nothing_of_this_machine(exports, name):
    for path in exports[name].rglob("*"):
        if path.suffix in (".json", ".md", ".py", ".txt"):
            text = path.read_text()
            for private in (str(exports[name].parent), str(sage_music.PRETRAINED.parents[3]), "is_local"):
                assert private not in text, path.name
        if path.is_file():
            assert path.stat().st_mode & stat.S_IROTH, path.name


@pytest.mark.parametrize("name", list(PRETRAINED))
def test_it_is_still_a_checkpoint_of_ours(exports, name):
    (model, tokenizer), (before, _) = load(exports[name]), load(name)
    ids = torch.tensor([list(range(5, 40))])
    assert torch.equal(model(ids).logits, before(ids).logits)
    _, further = start(ModelArguments(model=str(exports[name])))
    assert further.config.model_type == model.config.model_type
    assert tokenizer.vocab_size == model.config.vocab_size


def test_large_weights_are_sharded(tmp_path):
    folder = export("perceivers", tmp_path / "out", max_shard_size="9MB", samples=False)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) == 3 and shards[0] == "model-00001-of-00003.safetensors"
    assert (folder / "model.safetensors.index.json").is_file()
    before, after = tensors(perceivers.PRETRAINED), tensors(folder)
    assert all(torch.equal(before[key], after[key]) for key in before)
    load(folder)


def test_an_adapter_is_merged(tmp_path):
    pytest.importorskip("peft")
    from sage_studio.checkpoints.lora import add_lora

    model, _ = load("perceivers")
    adapted = add_lora(model, rank=2)
    torch.manual_seed(0)
    for key, weight in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.02)
    ids = torch.tensor([list(range(5, 40))])
    expected = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    folder = export(tmp_path / "adapter", tmp_path / "out", samples=False)
    assert not (folder / "adapter_config.json").exists()
    torch.testing.assert_close(load(folder)[0](ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(load("perceivers")[0](ids).logits, load(folder)[0](ids).logits)
    # Weights made from ours keep their licence, and the notice that says why.
    assert ModelCard.load(folder / "README.md").data.license == "cc-by-nc-sa-4.0"
    assert "ASAP" in (folder / "NOTICE.md").read_text()
    with pytest.raises(ExportError, match=r"license mit.*are cc-by-nc-sa-4.0 .*keeps that license"):
        export(tmp_path / "adapter", tmp_path / "other", license="mit", samples=False)
    assert not (tmp_path / "other").exists()
    export(tmp_path / "adapter", tmp_path / "other", license="mit", confirm_license=True, samples=False)
    assert "ASAP" in (tmp_path / "other" / "NOTICE.md").read_text()


def test_the_card_of_a_trained_checkpoint_says_what_training_left(tmp_path, tokenizer, capsys):
    run = tmp_path / "run"
    model = tiny_model(tokenizer)
    model.save_pretrained(run / "best")
    tokenizer.save_pretrained(run / "best")
    corpus = {"splits": {"train": {"pieces": 3, "notes": 100, "tokens": 400}}}
    report = {"corpus": corpus, "parameters": 7, "eval_nats_per_note": 5.5, "steps": 12}
    (run / "report.json").write_text(json.dumps(report))
    (run / "run.json").write_text(json.dumps({"model": "sage-music"}))
    folder = export(run / "best", tmp_path / "out", datasets=["user/corpus"], repo_id="user/mine", samples=False)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.datasets == ["user/corpus"] and card.data.base_model is None
    assert card.data.eval_results[0].metric_value == 5.5
    assert "`sage-music-6m`" in card.text and 'model="user/mine"' in card.text and "samples/" not in card.text
    # Begun from a published model, or in a folder that is no longer there: neither is known without the network.
    for name in ("user/base", "run1/best", str(tmp_path / "lost")):
        (run / "run.json").write_text(json.dumps({"model": name}))
        for license in (None, "mit"):
            with pytest.raises(ProvenanceError, match=r"license could not be looked at .*--confirm-license"):
                export(run / "best", tmp_path / "out", license=license, samples=False)
        capsys.readouterr()
        arguments = [str(run / "best"), str(tmp_path / "out"), "--license", "mit", "--confirm-license", "--no-samples"]
        assert main(["export", *arguments]) == 0
        assert f"note: {name}, which these weights were made from, is no folder here" in capsys.readouterr().err
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model is None and name not in card.content
    export(run / "best", folder, license="mit", confirm_license=True, base_model="user/base", samples=False)
    assert ModelCard.load(folder / "README.md").data.base_model == "user/base" and not capsys.readouterr().err
    # An export's own card is taken again, with the name that it gets now, and not half changed.
    for number, name in enumerate(("user/again", "user/again-2")):
        folder = export(folder, tmp_path / f"again{number}", repo_id=name, samples=False)
        assert LOADED.findall((folder / "README.md").read_text()) == [name]
    with pytest.raises(ExportError, match="datasets is for a card that is made"):
        export(folder, tmp_path / "again", datasets=["user/corpus"], samples=False)


@pytest.mark.parametrize("family", ["sage", "perceivers"])
def test_a_license_must_be_said_where_none_is_known(tiny, tmp_path, family):
    with pytest.raises(ExportError, match="license of these weights is not known: give --license"):
        export(tiny / family, tmp_path / "out", samples=False)
    with pytest.raises(CardError, match="license: 'free' is no license"):
        export(tiny / family, tmp_path / "out", license="free", samples=False)
    assert list(tmp_path.iterdir()) == []
    assert is_export(export(tiny / family, tmp_path / "out", license="mit", samples=False))


def test_only_an_older_export_is_replaced(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty, and not an export"):
        export(tiny / "sage", out, license="mit", samples=False)
    (out / "thesis.txt").unlink()
    export(tiny / "sage", out, license="mit", max_shard_size="100KB", samples=False)
    assert len(list(out.glob("*.safetensors"))) > 1
    export(tiny / "perceivers", out, license="mit", samples=False)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(out.glob("*_sage_music.py")) and json.loads((out / "config.json").read_text())
    for name in ("__pycache__", ".cache/huggingface"):  # as Python and a download leave them
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "some.file").write_text("")
    export(tiny / "perceivers", out, license="mit", samples=False)
    assert not (out / "__pycache__").exists()
    for name in ("samples/mine.mid", "adapter_model.safetensors", "train_sage_music.py"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        with pytest.raises(ExportError, match=rf"other things in it \({name}\)"):
            export(tiny / "sage", out, license="mit", samples=False)
        (out / name).unlink()
    (out / ".git").mkdir()
    with pytest.raises(ExportError, match=r"other things in it \(\.git\)"):
        export(tiny / "sage", out, license="mit", samples=False)
    with pytest.raises(ExportError, match="is a file"):
        export(tiny / "sage", out / "README.md", license="mit", samples=False)


def test_what_was_changed_in_an_export_is_not_lost(tiny, tmp_path, capsys):
    out = export(tiny / "sage", tmp_path / "out", license="mit", samples=False)
    card, weights = (out / "README.md").read_text(), (out / "model.safetensors").read_bytes()
    mine = card.replace("## Limits", "## My own section\n\nwords\n\n## Limits")

    def again(*more):
        code = main(["export", str(tiny / "sage"), str(out), "--no-samples", *(more or ("--license", "mit"))])
        return code, capsys.readouterr().err

    (out / "README.md").write_text(mine)
    (out / "NOTICE.md").write_text("mine")
    code, error = again()
    assert code == 2 and "NOTICE.md, README.md: changed since it was exported" in error and "--replace" in error
    assert (out / "README.md").read_text() == mine and (out / "NOTICE.md").read_text() == "mine"
    (out / "NOTICE.md").unlink()
    # A card that is kept is not lost, by name or by an export that is exported once more.
    assert again("--card", str(out / "README.md")) == (0, "") and (out / "README.md").read_text() == mine
    (out / "README.md").write_text(card + "\nmore\n")
    export(out, out, samples=False)
    assert (out / "README.md").read_text() == card + "\nmore\n" and (out / "model.safetensors").read_bytes() == weights
    code, error = again()
    assert code == 2 and " README.md: changed since it was exported" in error
    # Nor weights, nor an export whose record is gone, as a download's is.
    (out / "model.safetensors").write_bytes(weights[:-1] + b"!")
    code, error = again("--card", str(out / "README.md"))
    assert code == 2 and " model.safetensors: changed since it was exported" in error
    shutil.rmtree(out / ".cache")
    code, error = again()
    assert code == 2 and "no record of the export is left" in error
    assert again("--replace", "--license", "mit") == (0, "")
    assert (out / "README.md").read_text() == card and (out / "model.safetensors").read_bytes() == weights
    shutil.rmtree(out / ".cache")
    assert again() == (0, "")  # nothing is lost by the same again


def test_the_folder_that_it_runs_in_is_not_replaced(tiny, tmp_path, monkeypatch, capsys):
    """A shell that stands in it would stand in a folder that is gone."""
    (tmp_path / "out").mkdir()
    for place, output in (("out", "."), ("out", str(tmp_path / "out")), ("out/samples", "..")):
        if place == "out/samples":
            export(tiny / "sage", tmp_path / "out", license="mit", samples=False)
            (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        assert main(["export", str(tiny / "sage"), output, "--license", "mit", "--no-samples"]) == 2
        assert "the folder that this runs in" in capsys.readouterr().err
        monkeypatch.chdir(tmp_path)


def test_the_weights_own_license_text_travels(tiny, tmp_path):
    """The code's stands beside it under another name; through a second export and a training, too."""
    source = shutil.copytree(tiny / "sage", tmp_path / "source")
    (source / "LICENSE.txt").write_text("My own CC BY")
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    run = tmp_path / "run"
    shutil.copytree(tiny / "sage", run / "best")
    (run / "run.json").write_text(json.dumps({"model": str(source)}))
    folder = export(source, tmp_path / "out", samples=False)
    code = export(tiny / "sage", tmp_path / "plain", license="mit", samples=False) / "LICENSE"
    assert "Apache License" in code.read_text()
    for found in (
        folder,
        export(folder, tmp_path / "again", samples=False),
        export(run / "best", tmp_path / "tuned", samples=False),
    ):
        assert (found / "LICENSE").read_text() == "My own CC BY"
        assert (found / "LICENSE-CODE").read_text() == code.read_text()
    other = export(run / "best", tmp_path / "other", license="cc-by-sa-4.0", samples=False)
    assert (other / "LICENSE").read_text() == code.read_text() and not (other / "LICENSE-CODE").exists()


def test_a_context_too_short_for_the_samples_is_said(tmp_path, tokenizer, capsys):
    tiny_model(tokenizer, max_position_embeddings=64).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    arguments = [str(tmp_path / "short"), str(tmp_path / "out"), "--license", "mit"]
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert "prompt of the samples" in error and "--no-samples leaves them out" in error
    assert main(["export", *arguments, "--no-samples"]) == 0


def test_an_adapter_beside_a_whole_model_is_merged(tiny, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from sage_studio.checkpoints.lora import add_lora

    folder = shutil.copytree(tiny / "sage", tmp_path / "both")
    adapted, ids = add_lora(load(folder)[0], rank=2).eval(), torch.tensor([list(range(5, 40))])
    torch.manual_seed(0)
    for key, weight in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(folder)
    out = export(folder, tmp_path / "out", license="mit", samples=False)
    assert (out / "config.json").is_file() and not (out / "adapter_config.json").exists()
    torch.testing.assert_close(load(out)[0](ids).logits, adapted(ids).logits, rtol=1e-4, atol=2e-4)
    # A model that Transformers would write as its adapter alone is none.
    model, tokenizer = load(tiny / "sage")
    model.load_adapter(folder)
    monkeypatch.setattr(exporting, "load", lambda name: (model, tokenizer))
    with pytest.raises(ExportError, match="no whole model"):
        export(folder, tmp_path / "other", license="mit", samples=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", ["sage", "perceivers"])
def test_no_tokenizer_is_made_up(tiny, tmp_path, family):
    folder = shutil.copytree(tiny / family, tmp_path / "bare")
    for name in ("tokenizer_config.json", "miditok.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        export(folder, tmp_path / "out", license="mit", samples=False)


def test_a_failed_export_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    out = export(tiny / "sage", tmp_path / "out", license="mit", samples=False)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_write_tokenizer", full)
    with pytest.raises(OSError, match="No space"):
        export(tiny / "perceivers", out, license="mit", samples=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_says_errors_in_one_line(tiny, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "out")
    assert main(["export", str(tiny / "sage"), out, "--license", "mit", "--no-samples"]) == 0
    assert f"wrote {out} (" in capsys.readouterr().out
    for arguments, words in (
        (["nowhere/at/all", out], "no such folder"),
        ([str(tiny / "sage"), out, "--license", "mit", "--repo-id", "mine"], "write user/name"),
        ([str(tiny / "sage"), out, "--license", "mit", "--base-model", "a/b/c"], "base_model: 'a/b/c'"),
        ([str(tiny / "sage"), out, "--card", "absent.md"], "absent.md"),
    ):
        assert main(["export", *arguments, "--no-samples"]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("sage-music: error: ") and words in captured.err
        assert captured.err.count("\n") == 1 and not captured.out

    def missing(*args, **options):
        raise MissingExtraError(f"audio needs a SoundFont: {install_hint('pretty_midi')}.")

    monkeypatch.setattr(exporting, "render_wav", missing)
    assert main(["export", str(tiny / "perceivers"), str(tmp_path / "new"), "--license", "mit"]) == 2
    message = capsys.readouterr().err
    assert "pip install" in message and "--no-samples" in message and not (tmp_path / "new").exists()


def test_a_broken_checkpoint_is_not_exported(tmp_path):
    with pytest.raises(CheckpointError):
        export(tmp_path / "absent", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_the_same_every_time(exports, tmp_path):
    """So that an upload is resumed, and nothing is committed that did not change."""
    first, second = exports["sage-music"], export("sage-music", tmp_path / "out", repo_id="user/sage-music")
    for path in first.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name
