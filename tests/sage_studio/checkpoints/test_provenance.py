"""What weights were made from is known from what lies beside them, wherever they are copied to."""

import json

import pytest

from sage_studio.checkpoints.loading import BUNDLED
from sage_studio.checkpoints.provenance import (
    OutOfReachError,
    ProvenanceError,
    ancestors,
    front_matter,
    keeps_license,
    licensed,
    look,
    read_record,
    record_of,
    stated_license,
    write_record,
)


def folder_of(path, license=None, **files):
    """A folder with a card and other files."""
    path.mkdir(parents=True)
    if license is not None:
        (path / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: mit\n---\n# A model",
        "\ufeff---\nlicense: mit\n---\n",
        "\n\n---\r\nlicense: mit\r\n---\r\n",
        "---  \rlicense: mit\r---",
    ],
)
def test_a_card_states_its_license(tmp_path, text):
    """With a byte order mark, empty lines before it, or any ends of lines."""
    (tmp_path / "README.md").write_bytes(text.encode())
    assert stated_license(tmp_path / "README.md") == "mit"
    assert front_matter("# A model\n---\nlicense: mit\n---\n", "x") is None


def test_every_ancestor_is_told_and_no_folder(tmp_path):
    """A run from an adapter of a bundled checkpoint, whose folder has a card: two licenses and the bundled notice."""
    adapter = folder_of(tmp_path / "adapter", "cc-by-4.0", adapter_config={"base_model_name_or_path": "perceivers"})
    run = folder_of(tmp_path / "run", run={"model": "gone", "model_folder": str(adapter)})
    best = folder_of(run / "best")
    rows, notice = record_of(str(best))
    names = [{"name": None, "license": None}, {"name": None, "license": "cc-by-4.0"}]
    assert rows == [*names, {"name": "perceivers", "license": "cc-by-nc-sa-4.0"}]
    assert notice == BUNDLED["perceivers"] / "NOTICE.md"
    # Copied elsewhere, its own file says the same, and what is made of that says it again.
    copy = folder_of(tmp_path / "elsewhere")
    write_record(copy, rows, notice)
    assert (copy / "NOTICE.md").read_bytes() == notice.read_bytes()
    assert str(tmp_path) not in (copy / "provenance.json").read_text()
    assert record_of(str(copy))[0] == rows
    assert [row.license for row in ancestors(str(copy))] == [None, None, "cc-by-4.0", "cc-by-nc-sa-4.0"]
    assert [row.name for row in ancestors("perceivers")] == ["perceivers"]


def test_what_a_record_tells_is_not_asked_of_the_hub(tmp_path):
    """The folder in between is of before there were records, and names the same base; the Hub is out of reach."""
    older = folder_of(tmp_path / "older" / "best")
    (older.parent / "run.json").write_text(json.dumps({"model": "user/base"}))
    best = folder_of(tmp_path / "run" / "best")
    (best.parent / "run.json").write_text(json.dumps({"model": str(older)}))
    write_record(best, [{"name": None, "license": None}, {"name": "user/base", "license": "gpl-3.0"}], None)
    found = list(ancestors(str(best)))
    assert not any(row.unseen for row in found) and [row.license for row in found if row.license] == ["gpl-3.0"]


def test_what_is_out_of_reach_is_said_and_recorded_without_its_place(tmp_path):
    lost = str(tmp_path / "lost")
    for name, told in ((lost, None), ("user/base", "user/base")):
        best = folder_of(tmp_path / name.replace("/", "_") / "best")
        (best.parent / "run.json").write_text(json.dumps({"model": name}))
        with pytest.raises(OutOfReachError, match="no such folder"):
            look(name, "README.md")
        itself, base = ancestors(str(best))
        assert itself.unseen is None and "no such folder" in base.unseen
        rows, _ = record_of(str(best))
        assert rows[1:] == [{"name": told, "license": None, "seen": False}]
        copy = folder_of(tmp_path / f"copy of {best.parent.name}")
        write_record(copy, rows, None)
        assert [row.unseen is None for row in ancestors(str(copy))].count(False) == 1


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"made_from": [1]}', '{"made_from": [{"name": 1}]}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(ProvenanceError, match=r"provenance\.json: .*mend it, or put it away"):
        read_record(str(tmp_path))


def test_folders_that_name_each_other_come_to_an_end(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        folder_of(tmp_path / name, adapter_config={"base_model_name_or_path": str(tmp_path / other)})
    assert [row.place for row in ancestors(str(tmp_path / "a"))] == [str(tmp_path / name) for name in "ab"]


def test_a_bundled_checkpoint_that_is_not_installed_is_known_from_the_record_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(BUNDLED, "perceivers", tmp_path / "gone")
    write_record(folder_of(tmp_path / "told"), [{"name": "perceivers", "license": "cc-by-nc-sa-4.0"}], None)
    assert [(row.name, row.license) for row in licensed(str(tmp_path / "told"))] == [("perceivers", "cc-by-nc-sa-4.0")]
    write_record(folder_of(tmp_path / "untold"), [{"name": "perceivers", "license": None}], None)
    adapter = folder_of(tmp_path / "adapter", adapter_config={"base_model_name_or_path": "perceivers"})
    for folder in (tmp_path / "untold", adapter):
        with pytest.raises(ProvenanceError, match="its license could not be looked at"):
            list(licensed(str(folder)))
        assert record_of(str(folder))[0][1:] == [{"name": "perceivers", "license": None, "seen": False}]


@pytest.mark.parametrize(
    ("base", "chosen", "allowed"),
    [
        *((name, "mit", False) for name in ("cc-by-sa-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0")),
        *((name, "mit", False) for name in ("gpl", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "eupl-1.2", "osl-3.0", "odbl")),
        *((name, "mit", False) for name in ("cc-by-nd-4.0", "openrail++", "llama3.2", "gemma")),
        # Licenses that say no more than that they are others, of research, or of the file; and what is none at all.
        *((name, "mit", False) for name in ("other", "unknown", "intel-research", "apple-amlr", "h-research")),
        *((name, "mit", False) for name in ("grok2-community", "mpl-2.0", "ms-pl", "my own")),
        *((name, name, True) for name in ("cc-by-nc-sa-4.0", "agpl-3.0", "cc-by-nc-4.0", "other")),
        *((name, "cc-by-nc-4.0", True) for name in ("mit", "apache-2.0", "cc-by-4.0", "cc0-1.0", "bsl-1.0")),
    ],
)
def test_licenses_that_derivatives_keep(base, chosen, allowed):
    assert keeps_license(base, chosen) == allowed
