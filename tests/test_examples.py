"""The example prompts are what their script writes."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_script_writes_the_committed_files(tmp_path):
    spec = importlib.util.spec_from_file_location("make_prompts", EXAMPLES / "make_prompts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER = tmp_path
    assert module.main() == 0
    written = sorted(tmp_path.glob("*.mid"))
    assert [path.name for path in written] == sorted(path.name for path in EXAMPLES.glob("*.mid"))
    for path in written:
        assert path.read_bytes() == (EXAMPLES / path.name).read_bytes()
