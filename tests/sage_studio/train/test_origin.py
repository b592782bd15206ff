"""A run knows what it began from, and goes on knowing when that is out of reach."""

import json
import shutil
from types import SimpleNamespace

from sage_studio.train.callbacks import OriginCallback, keep_origin, tell_origin


def base_of(path, license="cc-by-nc-sa-4.0"):
    path.mkdir()
    (path / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    (path / "NOTICE.md").write_text("Not for money.")
    return path


def kept(folder):
    return json.loads((folder / "provenance.json").read_text())["made_from"]


def test_license_and_notice_of_the_base_are_kept_in_every_folder_of_weights(tmp_path):
    run = tmp_path / "run"
    base = base_of(tmp_path / "base")
    keep_origin(str(base), run, resumes=False)
    assert kept(run) == [{"name": None, "license": "cc-by-nc-sa-4.0"}]
    assert str(tmp_path) not in (run / "provenance.json").read_text()
    for name in ("best", "checkpoint-2"):
        (run / name).mkdir()
    tell_origin(run, run / "best")
    for step, first in ((2, True), (3, True), (2, False)):  # of no checkpoint, and not of this process
        state = SimpleNamespace(global_step=step, is_world_process_zero=first)
        OriginCallback(run).on_save(None, state, None)
    for name in ("best", "checkpoint-2"):
        assert kept(run / name) == kept(run) and (run / name / "NOTICE.md").read_text() == "Not for money."
    assert not (run / "checkpoint-3").exists()


def test_a_run_that_goes_on_keeps_what_it_knows(tmp_path, capsys):
    run, base = tmp_path / "run", base_of(tmp_path / "base")
    keep_origin(str(base), run, resumes=False)
    before = kept(run)
    shutil.rmtree(base)
    keep_origin(str(base), run, resumes=True)
    assert kept(run) == before and not capsys.readouterr().err
    # Another run in the same folder is of another base; what is out of reach is looked at again.
    keep_origin(str(base), run, resumes=False)
    assert kept(run) == [{"name": None, "license": None, "seen": False}] and not (run / "NOTICE.md").exists()
    assert "could not be looked at" in capsys.readouterr().err
    base_of(base, "mit")
    keep_origin(str(base), run, resumes=True)
    assert kept(run) == [{"name": None, "license": "mit"}]
    keep_origin("shape.json", run, resumes=False)
    assert kept(run) == []


def test_a_damaged_card_does_not_end_a_training(tmp_path, capsys):
    run, base = tmp_path / "run", base_of(tmp_path / "base", "[mit")
    run.mkdir()
    keep_origin(str(base), run, resumes=False)
    assert "README.md" in capsys.readouterr().err and not (run / "provenance.json").exists()
