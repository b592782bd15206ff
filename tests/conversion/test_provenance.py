"""Weights keep the license of all that they were made from, and a damaged file beside them is named."""

import json
import shutil

import pytest
from conftest import tiny_perceivers
from huggingface_hub import ModelCard

from conversion.export_hub import export, main
from conversion.provenance import ExportError
from notekit.train.resuming import check_run
from perceivers import PerceiverSTokenizer


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
        assert main([str(best), str(tmp_path / "out"), "--no-samples", *said]) == 2
        error = capsys.readouterr().err
        assert (
            error.startswith("export_hub: error: ")
            and path.name in error
            and "mend it, or put it away" in error.lower()
        )
    with pytest.raises(ExportError):
        export(best, tmp_path / "out", license="apache-2.0", samples=False)
    assert not (tmp_path / "out").exists()
