"""What the wheels hold, and that publishing needs nothing else: it works where there is no checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sage_studio.families import PERCEIVERS
from sage_studio.publishing.distribution import NAME, PACKAGES, license_text, requirements, version
from sage_studio.publishing.space import build_wheel

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheels of this checkout: that of the code, and that of the weights of PerceiverS."""
    folder = tmp_path_factory.mktemp("wheels")
    weights = PERCEIVERS.pretrained.parents[1]
    return [build_wheel(NAME, PACKAGES, folder), build_wheel(PERCEIVERS.distribution, weights, folder)]


def metadata_of(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode("utf-8"))


def test_what_is_read_of_the_installation_is_what_the_project_says():
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["audio"]]
    assert requirements("audio") == wanted and all(Requirement(line) for line in wanted)
    assert version() == PROJECT["version"]
    assert license_text() == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_code_is_free_to_use_and_has_all_that_commands_read(wheels):
    names = zipfile.ZipFile(wheels[0]).namelist()
    assert metadata_of(wheels[0])["License-Expression"] == "Apache-2.0"
    for name in (
        *(f"sage_studio/examples/{path.name}" for path in (PACKAGES / "sage_studio" / "examples").glob("*.mid")),
        *(f"sage_studio/publishing/space_app/{name}" for name in ("app.py", "README.md", "style.css", "page.js")),
        "sage_studio/publishing/templates/card.md",
        "sage_studio/publishing/handler.py",
        "sage_music/pretrained/sage-music-6m/README.md",
    ):
        assert name in names, name
    assert not [name for name in names if "perceivers" in name and not name.endswith(".py")]


def test_the_weights_of_perceivers_are_not(wheels):
    names = zipfile.ZipFile(wheels[1]).namelist()
    assert metadata_of(wheels[1])["License-Expression"] == "CC-BY-NC-SA-4.0"
    for name in ("README.md", "NOTICE.md", "model.safetensors", "config.json"):
        assert f"perceivers_weights/perceivers-6m/{name}" in names, name


def installed(wheels, folder: Path, argv: list[str]) -> subprocess.CompletedProcess:
    """`sage-music` where the wheels are installed, and nothing of the checkout is; run in another folder."""
    site, elsewhere = folder / "site", folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    if not site.is_dir():
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(site)
    # Without `site` an editable install of this package is not found, but everything else is.
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    run = [sys.executable, "-S", "-m", "sage_studio.cli", *argv]
    return subprocess.run(
        run, cwd=elsewhere, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def test_publishing_works_from_wheels(wheels, tmp_path):
    push = ["push", "perceivers", "user/piano", "--dry-run", "out/piano", "--no-samples", "--json"]
    run = installed(wheels, tmp_path, push)
    assert run.returncode == 0, run.stderr
    folder, files = tmp_path / "elsewhere" / "out" / "piano", json.loads(run.stdout)["files"]
    assert {"README.md", "NOTICE.md", "LICENSE", "handler.py", "modeling_perceivers.py", "requirements.txt"} <= set(
        files
    )
    assert 'model="user/piano"' in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == license_text()
    # An export is written again as it would be sent under another name.
    again = ["push", "out/piano", "user/other", "--dry-run", "out/other"]
    assert installed(wheels, tmp_path, again).returncode == 0
    other = folder.with_name("other")
    assert 'model="user/other"' in (other / "README.md").read_text() and (other / "model.safetensors").is_file()
    run = installed(wheels, tmp_path, ["space", "out/space"])
    assert run.returncode == 0, run.stderr
    for wheel in wheels:
        made = zipfile.ZipFile(folder.with_name("space") / wheel.name)
        before = zipfile.ZipFile(wheel)
        assert set(made.namelist()) == set(before.namelist()) and made.testzip() is None
        assert all(made.read(name) == before.read(name) for name in made.namelist() if not name.endswith("/RECORD"))


def test_without_the_weights_all_else_works(wheels, tmp_path):
    run = installed(wheels[:1], tmp_path, ["push", "perceivers", "user/piano", "--dry-run", "out"])
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and PERCEIVERS.distribution in run.stderr
    run = installed(wheels[:1], tmp_path, ["space", "out/space"])
    assert run.returncode == 0, run.stderr
    space = tmp_path / "elsewhere" / "out" / "space"
    assert [path.name for path in space.glob("*.whl")] == [wheels[0].name] and not (space / "NOTICE.md").exists()
    assert "\nlicense: apache-2.0\n" in (space / "README.md").read_text()
