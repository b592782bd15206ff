"""What a message tells to install can be installed."""

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from sage_studio.errors import install_hint

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]


def test_a_hint_has_the_ranges_of_the_project_and_not_its_name():
    wanted = [Requirement(line) for line in PROJECT["optional-dependencies"]["train"]]
    command = install_hint(*(one.name for one in wanted))
    assert command == f"pip install {' '.join(repr(line) for line in PROJECT['optional-dependencies']['train'])}"
    assert install_hint("gguf") == "pip install gguf"


def test_code_that_travelled_names_the_package_alone(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert install_hint("matplotlib", "peft") == "pip install matplotlib peft"


def test_no_message_installs_what_is_on_no_index():
    """Nor does one run the scripts, which no wheel has."""
    for path in (Path(__file__).resolve().parents[2] / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pip install 'sage-music" not in text and "pip install sage-music" not in text, path
