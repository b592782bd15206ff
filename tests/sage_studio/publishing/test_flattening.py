"""Modules made flat import each other as siblings, and are refused where Transformers could not load them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from sage_studio.publishing.flattening import PROVIDED, FlatteningError, flatten

MODULES = {
    "family/__init__.py": "NAME = 1\n",
    "family/modeling_family.py": "class Model:\n    weight = 3\n",
    "family/data.py": "",
    "other/__init__.py": "",
    "kit/__init__.py": "BARS = 16\n",
    "kit/defaults.py": "BARS = 16\n",
    "kit/midi.py": '"""Reads."""\n\nfrom .defaults import BARS  # how many\n\n\ndef bars():\n    return BARS\n',
    "kit/unused.py": "import os\n",
    "kit/pipes/__init__.py": "",
    "kit/pipes/base.py": (
        "from kit.midi import (\n    bars,\n)\n\n\ndef later():\n    from family.modeling_family import Model\n\n"
        "    return bars() * Model.weight\n"
    ),
    "kit/pipes/bars.py": (
        '"""Pipes.\n\nfrom kit.midi import bars\n"""\n\nimport json\n\nfrom .base import later as soon\n\n'
        "try:\n    import absent\nexcept ImportError:\n    absent = None\n\n"
        "print(json.dumps(soon()))\n"
    ),
}


@pytest.fixture
def source(tmp_path):
    for name, text in MODULES.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "src"


def test_flat_files_run_as_siblings(source, tmp_path):
    files = flatten(["kit.pipes.bars"], "family", source)
    assert list(files) == ["kit_defaults.py", "kit_midi.py", "kit_pipes_bars.py", "kit_pipes_base.py"]
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "__init__.py").touch()
    (flat / "modeling_family.py").write_text((source / "family/modeling_family.py").read_text())
    for name, text in files.items():
        (flat / name).write_text(text)
    run = subprocess.run(
        [sys.executable, "-c", "import flat.kit_pipes_bars"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("48\n", "")


def test_only_import_lines_change_and_a_header_says_where_from(source):
    files = flatten(["kit.pipes.bars"], "family", source)
    header, *lines = files["kit_midi.py"].splitlines()
    assert header.startswith("# kit.midi of sage-music ") and str(source) not in header
    before = MODULES["kit/midi.py"].splitlines()
    changed = [(old, new) for old, new in zip(before, lines, strict=True) if old != new]
    assert changed == [("from .defaults import BARS  # how many", "from .kit_defaults import BARS  # how many")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import kit.midi", "write `from kit.midi import NAME`"),
        ("import family", "cannot travel"),
        ("from . import midi", "is `from .module import NAME`"),
        ("from ..kit import midi", "is `from .module import NAME`"),
        ("from kit import BARS", "names a package"),
        ("from kit.pipes import base", "names a package"),
        ("from family import NAME", r"import from a Hub file \(\*_family.py\)"),
        ("from family.data import x", "import from a Hub file"),
        ("from other.modeling_other import x", "only family travels"),
        ("from .nowhere import x", "names no module"),
        ("import datasets", "datasets is not what a repository can count on"),
        ("if True: from .midi import bars", "begins its line"),
        ("from .midi \\\n    import bars", "begins its line"),
        ('"""For example\nfrom .midi import bars\n"""', "read this text as an import"),
        ("DATA = __file__", "another place"),
    ],
)
def test_what_cannot_travel_is_refused_by_file_and_line(source, line, reason):
    (source / "kit/wrong.py").write_text(f"import os\n{line}\n")
    with pytest.raises(FlatteningError, match=rf"^wrong.py, line [23]: .*{reason}"):
        flatten(["kit.wrong"], "family", source)


def test_two_modules_of_one_flat_name_are_refused(source):
    (source / "kit/pipes_base.py").write_text("")
    (source / "kit/wrong.py").write_text("from .pipes_base import x\nfrom kit.pipes.base import y\n")
    with pytest.raises(FlatteningError, match=r"becomes kit_pipes_base\.py, as kit\.pipes"):
        flatten(["kit.wrong"], "family", source)


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        (["sage_studio.pipelines.continuation", "sage_studio.generation.bars_batch"], "sage_music"),
        (["sage_studio.pipelines.continuation", "sage_studio.generation.seconds_batch"], "perceivers"),
    ],
)
def test_the_pipelines_travel(modules, family):
    """What an export holds keeps the rule of Hub files: it imports what a model's repository has."""
    files = flatten(modules, family)
    hub = {path.name for path in (Path(__file__).resolve().parents[3] / "src" / family).glob(f"*_{family}.py")}
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in hub | set(files), (name, node.module)
            elif isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in PROVIDED | {"matplotlib"}, (name, node.module)
    assert not {"sage_studio_cli.py", "sage_studio_checkpoints_loading.py", "sage_studio_evaluate.py"} & set(files)
    assert "sage_studio_music_midi.py" in files
