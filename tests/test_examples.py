"""The example prompts are what their script writes."""

import importlib.util
from pathlib import Path

import pytest

from sage_studio import EXAMPLES, example

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "make_prompts.py"


def test_the_script_writes_the_committed_files(tmp_path):
    spec = importlib.util.spec_from_file_location("make_prompts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER = tmp_path
    assert module.main() == 0
    written = sorted(tmp_path.glob("*.mid"))
    assert [path.name for path in written] == sorted(path.name for path in EXAMPLES.glob("*.mid"))
    for path in written:
        assert path.read_bytes() == (EXAMPLES / path.name).read_bytes()


def test_an_example_is_found_by_its_name():
    assert example("saints") == EXAMPLES / "saints.mid" and example("saints").is_file()
    with pytest.raises(ValueError, match="'sinners': no such example; there are greensleeves, ode_to_joy, saints"):
        example("sinners")
