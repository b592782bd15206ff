"""Weights keep the license of all that they were made from, and a damaged file beside them is named."""

import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import tiny_perceivers
from hub_server import LoopbackHub, Repository
from huggingface_hub import ModelCard, constants, hf_hub_download

from conversion.perceiver_ar import save
from perceivers import PerceiverSTokenizer
from sage_studio.checkpoints.provenance import ProvenanceError, carry, license_of, notice_of
from sage_studio.cli import main
from sage_studio.publishing.cards import read_report
from sage_studio.publishing.export import ExportError, export
from sage_studio.train.callbacks import keep_origin, tell_origin
from sage_studio.train.resuming import check_run

NC = "cc-by-nc-sa-4.0"
BASE = "someone/piano"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of an untrained checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_perceivers().save_pretrained(folder)
    PerceiverSTokenizer().save_pretrained(folder)
    return folder


def trained(tiny, folder, model, **report):
    """A run's folder as `sage-music train` leaves it; the path of its `best/`."""
    shutil.copytree(tiny, folder / "best")
    (folder / "run.json").write_text(json.dumps({"model": str(model)}))
    if report:
        (folder / "report.json").write_text(json.dumps(report))
    return folder / "best"


def card_of(license: str, path):
    path.write_text(f"---\nlicense: {license}\n---\n")
    return path


def test_weights_keep_their_license(tiny, tmp_path):
    """Their own, and that of what they were made from, however many runs ago; by an option and by a card."""
    mit = card_of("mit", tmp_path / "mit.md")
    older = export("perceivers", tmp_path / "older", samples=False)
    first = trained(tiny, tmp_path / "first", "perceivers")
    second = trained(tiny, tmp_path / "second", first)
    for checkpoint in ("perceivers", older, first, second):
        with pytest.raises(ExportError, match=r"license mit: the weights of .* are cc-by-nc-sa-4.0 \(so says .*\.md\)"):
            export(checkpoint, tmp_path / "out", card=mit, samples=False)
    with pytest.raises(ExportError, match="license mit: the weights of perceivers-6m"):
        export(second, tmp_path / "out", license="mit", samples=False)
    assert not (tmp_path / "out").exists()
    folder = export(second, tmp_path / "out", samples=False)
    assert ModelCard.load(folder / "README.md").data.license == "cc-by-nc-sa-4.0"
    assert "ASAP" in (folder / "NOTICE.md").read_text()


def test_runs_that_name_each_other_come_to_an_end(tiny, tmp_path):
    first = trained(tiny, tmp_path / "first", tmp_path / "second" / "best")
    trained(tiny, tmp_path / "second", first)
    with pytest.raises(ExportError, match="license of these weights is not known"):
        export(first, tmp_path / "out", samples=False)
    export(first, tmp_path / "out", license="mit", samples=False)


def test_the_base_of_a_run_is_found_from_another_folder(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "here" / "base")
    card_of("cc-by-sa-4.0", tmp_path / "here" / "base" / "README.md")
    best = trained(tiny, tmp_path / "run", "base")
    monkeypatch.chdir(tmp_path / "here")
    check_run(tmp_path / "run", {"model": "base"}, resumes=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=r"license mit: .*cc-by-sa-4\.0"):
        export(best, tmp_path / "out", license="mit", samples=False)
    card = ModelCard.load(export(best, tmp_path / "out", samples=False) / "README.md")
    assert card.data.license == "cc-by-sa-4.0" and card.data.base_model is None and str(tmp_path) not in card.content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("best/provenance.json", "[1]"),
        ("best/provenance.json", '{"made_from": [{"name": ["perceivers"]}]}'),
        ("run.json", "[1]"),
        ("run.json", '{"model": "perc'),
        ("run.json", '{"model": ["perceivers"]}'),
        ("report.json", "[1]"),
        ("report.json", '{"parameters": 7, "st'),
        ("report.json", '{"steps": 12}'),
        ("report.json", '{"parameters": "many"}'),
        ("report.json", '{"parameters": 7, "corpus": []}'),
        ("report.json", '{"parameters": 7, "corpus": {"splits": {"train": 3}}}'),
        ("report.json", '{"parameters": 7, "eval_nats_per_note": [5.5]}'),
        ("report.json", '{"parameters": NaN}'),
        ("base/README.md", "---\nlicense: [mit\n---\n"),
        ("base/README.md", "---\nlicense: [mit]\n---\n"),
        ("base/README.md", "---\n- mit\n---\n"),
        ("base/README.md", b"---\nlicense: mit\n---\nSchubert, F\xfcr Klavier"),
    ],
)
def test_a_damaged_file_beside_a_checkpoint_is_named(tiny, tmp_path, capsys, name, content):
    run = tmp_path / "run"
    best = trained(tiny, run, run / "base", parameters=7)
    shutil.copytree(tiny, run / "base")
    path = run / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for said in ([], ["--license", "apache-2.0"]):
        if not said and name == "report.json":
            continue  # what is amiss first is the license
        assert main(["export", str(best), str(tmp_path / "out"), "--no-samples", *said]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sage-music: error: ") and path.name in error and "put" in error and "away" in error
    with pytest.raises(ProvenanceError):
        export(best, tmp_path / "out", license="apache-2.0", samples=False)
    assert not (tmp_path / "out").exists()


def test_a_diverged_training_is_named_with_the_way_out(tiny, tmp_path):
    best = trained(tiny, tmp_path / "run", "perceivers", parameters=7, steps=3, eval_nats_per_note=float("nan"))
    with pytest.raises(ProvenanceError, match=r"report\.json: eval_nats_per_note is not finite.*put the file away"):
        export(best, tmp_path / "out", samples=False)
    (tmp_path / "run" / "report.json").unlink()
    export(best, tmp_path / "out", samples=False)


def test_figures_are_those_of_the_weights(tiny, tmp_path):
    """A checkpoint on the way has seen fewer steps than `best/`, from which the report is."""
    best = trained(tiny, tmp_path / "run", "perceivers", parameters=7, steps=300, eval_nats_per_note=5.5)
    for name in ("checkpoint-100", "mine"):
        shutil.copytree(best, tmp_path / "run" / name)
        assert read_report(str(tmp_path / "run" / name)) is None
    assert read_report(str(best))["steps"] == 300
    card = ModelCard.load(export(tmp_path / "run" / "checkpoint-100", tmp_path / "out", samples=False) / "README.md")
    assert card.data.eval_results is None and "300 steps" not in card.text and card.data.license == NC


def test_a_byte_order_mark_hides_no_license(tiny, tmp_path):
    best = trained(tiny, tmp_path / "run", tmp_path / "base")
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(f"\ufeff---\nlicense: {NC}\n---\n".encode())
    with pytest.raises(ExportError, match=f"license mit: .*{NC}"):
        export(best, tmp_path / "out", license="mit", samples=False)


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    """A Hub with a model whose license and notice derivatives keep, an empty cache, and a token that may read it."""
    with LoopbackHub() as server:
        server.add_user("someone", "hf_someone")
        repository = Repository(BASE)
        card = f"---\nlicense: {NC}\n---\n".encode()
        repository.commit("main", {"config.json": b"{}", "README.md": card, "NOTICE.md": b"Not for money."}, "first")
        server.repositories["models", BASE] = repository
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def out_of_reach(hub, how: str, monkeypatch) -> None:
    """From now on the Hub does not show its model."""
    if how == "private":
        hub.repository(BASE).private = True
    elif how == "gated":
        hub.repository(BASE).gated = True
    elif how == "down":
        address = "http://127.0.0.1:9"  # nobody answers there
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's attempts
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("how", ["private", "gated", "down", "offline"])
def test_a_license_out_of_reach_is_none_that_allows_all(tiny, tmp_path, hub, monkeypatch, how):
    """Where loading the base left its config in the cache, and the card alone, but not both card and notice."""
    best = trained(tiny, tmp_path / "run", BASE)
    hf_hub_download(BASE, "config.json")
    if how == "offline":
        hf_hub_download(BASE, "README.md")
    out_of_reach(hub, how, monkeypatch)
    for options in ({}, {"license": "mit"}, {"license": "mit", "base_model": BASE}):
        with pytest.raises(ProvenanceError, match=f"^{BASE}, which .* could not be looked at .*--confirm-license"):
            export(best, tmp_path / "out", samples=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["private", "down", "offline"])
def test_training_keeps_what_the_hub_said(tiny, tmp_path, hub, monkeypatch, how):
    best = trained(tiny, tmp_path / "run", BASE)
    with pytest.raises(ExportError, match=f"weights of {BASE} are {NC}"):
        export(best, tmp_path / "out", license="mit", samples=False)
    shutil.rmtree(tmp_path / "cache")
    keep_origin(BASE, tmp_path / "run", resumes=False)
    tell_origin(tmp_path / "run", best)
    shutil.rmtree(tmp_path / "cache")
    out_of_reach(hub, how, monkeypatch)
    copy = shutil.copytree(best, tmp_path / "copy")
    for checkpoint in (best, copy):
        with pytest.raises(ExportError, match=rf"weights of {BASE} are {NC} \(so says .*provenance\.json\)"):
            export(checkpoint, tmp_path / "out", license="mit", samples=False)
        folder = export(checkpoint, tmp_path / "out", samples=False)
        assert ModelCard.load(folder / "README.md").data.license == NC
        assert (folder / "NOTICE.md").read_text() == "Not for money."
        assert not (folder / "provenance.json").exists()
        for path in filter(Path.is_file, folder.rglob("*")):
            assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_best_keeps_its_license_where_it_is_copied_to(tiny, tmp_path):
    """What a run began from is told by the folder above it, which does not come along."""
    best = trained(tiny, tmp_path / "run", "perceivers")
    keep_origin("perceivers", tmp_path / "run", resumes=False)
    tell_origin(tmp_path / "run", best)
    copy = shutil.copytree(best, tmp_path / "mine")
    assert notice_of(str(copy)) == copy / "NOTICE.md"
    (copy / "NOTICE.md").unlink()  # then it is that of the bundled one
    with pytest.raises(ExportError, match=f"weights of perceivers-6m are {NC}"):
        export(copy, tmp_path / "out", license="mit", samples=False)
    folder = export(copy, tmp_path / "out", samples=False)
    card = ModelCard.load(folder / "README.md")
    assert (
        card.data.license == NC and "weights of `perceivers-6m`" in card.text and "ASAP" in notice_of(copy).read_text()
    )
    assert "ASAP" in (folder / "NOTICE.md").read_text()


def test_a_conversion_carries_license_and_notice(tmp_path):
    """Of a folder, of a file in one; and of what the folder was made from, which may say more than its own card."""
    source = tmp_path / "source"
    source.mkdir()
    text = "---\nlicense: other\nlicense_name: my-nc\nlicense_link: https://example.org/nc\n---\n# Mine\n"
    (source / "README.md").write_text(text)
    (source / "NOTICE.md").write_text("Not for money.")
    (source / "model.pt").write_bytes(b"")
    for number, given in enumerate((source, source / "model.pt")):
        folder = tmp_path / f"out{number}"
        save(folder, tiny_perceivers(), PerceiverSTokenizer(), given, "convert_perceiver_io")
        data = ModelCard.load(folder / "README.md").data
        assert (data.license, data.license_name, data.license_link) == ("other", "my-nc", "https://example.org/nc")
        assert (folder / "NOTICE.md").read_text() == "Not for money."
        for name in ("README.md", "provenance.json"):
            assert str(tmp_path) not in (folder / name).read_text()
        with pytest.raises(ExportError, match=r"are other .*keeps that license"):
            export(folder, tmp_path / "hub", license="mit", samples=False)
    card_of("mit", folder / "README.md")  # by mistake
    with pytest.raises(ExportError, match=r"are other \(so says .*provenance\.json"):
        export(folder, tmp_path / "hub", license="mit", samples=False)
    assert license_of(str(folder)) == ("other", folder / "provenance.json")
    (tmp_path / "bare").mkdir()
    (tmp_path / "new").mkdir()
    carry(tmp_path / "bare", tmp_path / "new", "convert_llama")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["provenance.json"]


def test_a_conversion_says_that_a_license_is_out_of_reach(tmp_path, capsys):
    """And what is made of it later asks again."""
    (tmp_path / "new").mkdir()
    with pytest.warns(UserWarning, match="user/llama: its license could not be looked at"):
        carry("user/llama", tmp_path / "new", "convert_to_llama")
    assert json.loads((tmp_path / "new" / "provenance.json").read_text())["made_from"] == [
        {"name": "user/llama", "license": None, "seen": False}
    ]
    with pytest.warns(UserWarning, match="user/llama, which these weights were made from"):
        assert license_of(str(tmp_path / "new")) is None
