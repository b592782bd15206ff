"""The exported Space, run where this package is not installed."""

import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

import sage_music
from sage_studio.cli import main
from sage_studio.publishing.space import SPACE, SpaceError, export

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("space") / "out")


def fetch(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).read().decode()


def test_it_has_all_that_a_space_needs(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"app.py", "README.md", "requirements.txt", "LICENSE", "NOTICE.md", "style.css", "page.js"} <= names
    packed = {wheel.name.split("-")[0]: zipfile.ZipFile(wheel).namelist() for wheel in exported.glob("*.whl")}
    assert set(packed) == {"sage_music", "sage_music_perceivers_weights"}
    for path in ("sage_studio/generation/stream.py", "sage_studio/examples/saints.mid", "sage_music/pretrained"):
        assert any(name.startswith(path) for name in packed["sage_music"]), path
    assert sum(name.endswith(".safetensors") for names in packed.values() for name in names) >= 3
    assert not any("__pycache__" in name or name.startswith("tests") for names in packed.values() for name in names)
    lines = (exported / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch") for line in lines) and any(line.startswith("pretty_midi") for line in lines)
    assert "symusic==0.5.9" in lines and not any("pytest" in line or "extra ==" in line for line in lines)


def test_its_card_is_valid_and_names_the_installed_gradio(exported):
    data = SpaceCard.load(exported / "README.md").data
    assert data.sdk == "gradio" and data.app_file == "app.py" and data.title and data.license
    assert len(data.to_dict()["short_description"]) <= 60  # the Hub's limit
    pinned = re.search(r"^gradio==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert data.sdk_version == pinned[1]
    assert (data.license, data.license_name) == ("other", "apache-2.0-and-cc-by-nc-sa-4.0")


def test_it_runs_where_the_package_is_not_installed(exported, tmp_path):
    """From its wheel, and with a model that is named in it (a folder here, as the network is not there)."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    model = f"SAGE-Music, a band ({sage_music.PRETRAINED})"
    (exported / "models.json").write_text(json.dumps([str(sage_music.PRETRAINED)]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    (tmp_path / "files").mkdir()
    # Without `site` an editable install of this package is not found, but everything else is.
    process = subprocess.Popen(
        [sys.executable, "-S", str(exported / "app.py")],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": sysconfig.get_path("purelib"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(tmp_path / "files"),
            "TMPDIR": str(tmp_path),
        },
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        config = None
        for _ in range(1500):  # some minutes, on a machine that is busy with other things
            assert process.poll() is None, log.read_text()
            try:
                config = json.loads(fetch(f"{url}config"))
                break
            except OSError:
                time.sleep(0.2)
        assert config is not None, f"the Space did not start: {log.read_text()}"
        unpacked = list(tmp_path.glob("sage-music-package-*/sage_studio/generation/stream.py"))
        assert len(unpacked) == 1, "it runs from its wheel"
        start = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "start")
        event = next(d["id"] for d in config["dependencies"] if [start, "click"] in d["targets"])
        inputs = ["Saints", None, model, 4, 1, 10, 20, [], 0.9, 0.95, "1"]
        body = {"data": inputs, "fn_index": event, "session_hash": "test", "trigger_id": start}
        fetch(f"{url}gradio_api/queue/join", body)
        assert "saints-continued.mid" in fetch(f"{url}gradio_api/queue/data?session_hash=test"), log.read_text()
    finally:
        process.terminate()
        process.wait(30)
    assert not list(tmp_path.glob("sage-music-package-*")) and not list((tmp_path / "files").iterdir())


def test_other_models_are_named_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sage_studio.publishing.space.build_wheel", lambda name, packages, folder: make_wheel(folder))
    folder = export(tmp_path / "out", ["user/band", "user/piano"])
    assert json.loads((folder / "models.json").read_text()) == ["user/band", "user/piano"]
    data = SpaceCard.load(folder / "README.md").data
    assert data.models == ["user/band", "user/piano"]
    assert data.license == "apache-2.0" and not (folder / "NOTICE.md").exists()  # their licences are in their cards
    # Exported again, without: the older export goes, a clone's history stays.
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    export(folder)
    assert not (folder / "models.json").exists() and (folder / ".git" / "HEAD").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def make_wheel(folder):
    wheel = folder / "sage_music-0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sage_music-0.0.dist-info/METADATA", "Name: sage-music\nVersion: 0.0\nRequires-Dist: numpy\n")
    return wheel


@pytest.mark.parametrize("name", ["band", "user/band/more", "../up", "user/ba nd", "https://example.org/band"])
def test_a_model_needs_a_name_on_the_hub(tmp_path, name, capsys):
    with pytest.raises(SpaceError, match="not a name on the Hub"):
        export(tmp_path / "out", [name])
    assert main(["space", str(tmp_path / "out"), "--model", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sage-music: error:") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SpaceError, match=r"thesis\.tex"):
        export(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(SpaceError, match="is a file"):
        export(tmp_path / "thesis.tex")


def test_the_folder_that_it_runs_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "__pycache__").mkdir()
    for place, output in ((tmp_path, "."), (tmp_path / "__pycache__", tmp_path)):
        monkeypatch.chdir(place)
        with pytest.raises(SpaceError, match="the folder that this runs in"):
            export(output)


def test_the_source_of_the_space_is_whole():
    """What the app reads beside itself travels with it."""
    app = (SPACE / "app.py").read_text()
    for name in re.findall(r'HERE / "([\w.]+)"', app):
        assert name == "models.json" or (SPACE / name).is_file(), name
