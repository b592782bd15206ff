"""The import rules: Hub files load alone, plain modules are free of torch, rooms import only from rooms below them."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imports as rooms
import pytest
import torch

from sage_studio import families

SRC = Path(__file__).resolve().parents[1] / "src"
HUB = sorted(path for family in ("sage_music", "perceivers") for path in (SRC / family).glob(f"*_{family}.py"))
OURS = {"sage_music", "perceivers", "sage_studio"}
ALLOWED = {"torch", "numpy", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", HUB, ids=lambda path: path.stem)
def test_hub_files_import_only_what_a_hub_checkpoint_has(path):
    allowed = ALLOWED | ({"symusic", "miditok"} if path.stem.startswith("tokenization") else set())
    for level, module in imports(path):
        if level:
            assert level == 1 and (path.parent / f"{module}.py").is_file(), f"from {'.' * level}{module}"
        else:
            assert module.split(".")[0] in allowed, module


# Rooms of sage_studio, lowest first: a module imports from its own room and from lines above its own.
ORDER = (
    ("errors", "files", "defaults", "families"),
    ("music", "reports"),
    ("corpus", "metrics", "checkpoints"),
    ("generation",),
    ("train", "bench", "pipelines"),
    ("evaluate",),
    ("experiments", "publishing"),
    ("cli",),
)
LINE = {room: number for number, line in enumerate(ORDER) for room in line}
# Rooms and modules that can be imported where there is no torch.
PLAIN = ("errors", "files", "defaults", "families", "reports", "music", "corpus", "metrics", "evaluate", "experiments")


def studio() -> dict[str, Path]:
    return rooms.modules(SRC / "sage_studio")


def test_rooms_import_only_from_rooms_below():
    """A line of `ORDER` may use what is on the lines before it."""
    package, known = SRC / "sage_studio", studio()
    wrong = set()
    for name, path in known.items():
        room = name.split(".")[0]
        for module, _ in rooms.imported(package, path, known):
            other = module.split(".")[0]
            if "__init__" not in (room, other) and room != other and not LINE[other] < LINE[room]:
                wrong.add(f"{name} -> {module}")
    assert wrong == set()


def test_no_two_modules_import_each_other():
    """Not by detours either, nor inside of functions."""
    package, known = SRC / "sage_studio", studio()
    graph = {name: {m for m, _ in rooms.imported(package, path, known)} - {name} for name, path in known.items()}
    rings = {" = ".join(sorted(ring)) for ring in rooms.cycles({name: to & known.keys() for name, to in graph.items()})}
    assert rings == set()


def test_no_underscore_name_leaves_its_file():
    wrong = set()
    for path in SRC.rglob("*.py"):
        tree, borrowed = ast.parse(path.read_text(encoding="utf-8")), set()
        name = path.relative_to(SRC).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] in OURS):
                borrowed |= {alias.asname or alias.name for alias in node.names}
                wrong |= {f"{name} -> {alias.name}" for alias in node.names if alias.name.startswith("_")}
        for node in ast.walk(tree):
            private = isinstance(node, ast.Attribute) and node.attr[0] == "_" and not node.attr.startswith("__")
            if private and isinstance(node.value, ast.Name) and node.value.id in borrowed:
                wrong.add(f"{name} -> {node.value.id}.{node.attr}")
    assert wrong == set()


def test_what_a_family_is_stands_in_one_file():
    """`families.py` alone compares `model_type`, or anything with a family's name."""
    names = {getattr(family, kind) for family in families.FAMILIES.values() for kind in ("model_type", "name")}
    names |= {family.checkpoint for family in families.FAMILIES.values()}

    def is_of_a_family(node: ast.expr) -> bool:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(map(is_of_a_family, node.elts))
        if isinstance(node, ast.Constant):
            return isinstance(node.value, str) and node.value in names
        return "model_type" in (getattr(node, "attr", ""), getattr(node, "id", ""))

    wrong = set()
    for name, path in studio().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare) or isinstance(node.ops[0], ast.Is | ast.IsNot):
                continue
            if any(map(is_of_a_family, (node.left, *node.comparators))):
                wrong.add(f"{name}: {ast.unparse(node)}")
    assert {text for text in wrong if not text.startswith("families: ")} == set()


def test_families_imports_only_the_standard_library():
    found = {module.split(".")[0] for level, module in imports(SRC / "sage_studio" / "families.py") if not level}
    assert found <= set(sys.stdlib_module_names)
    assert not any(level for level, _ in imports(SRC / "sage_studio" / "families.py"))


@pytest.mark.parametrize("room", PLAIN)
def test_plain_rooms_import_no_torch(room):
    """No module of music, corpus or metrics; elsewhere only what is imported with the room itself."""
    whole = room in ("music", "corpus", "metrics")
    names = [name for name in studio() if name == room or (whole and name.startswith(f"{room}."))]
    code = f"import sys{''.join(f', sage_studio.{name}' for name in names)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def source(path: str, name: str) -> str:
    """The source of a top-level function or class; a class's own name is left out of it."""
    text = (SRC / path).read_text(encoding="utf-8")
    (found,) = [node for node in ast.parse(text).body if getattr(node, "name", "") == name]
    return ast.get_source_segment(text, found).replace(f"class {name}", "class")


@pytest.mark.parametrize(
    "twins",
    [
        [
            ("sage_studio/music/midi.py", "midi_damage"),
            ("sage_music/tokenization_sage_music.py", "midi_damage"),
            ("perceivers/tokenization_perceivers.py", "midi_damage"),
        ],
        [
            ("sage_music/modeling_sage_music.py", "SageMusicRMSNorm"),
            ("perceivers/layers_perceivers.py", "PerceiverSRMSNorm"),
        ],
        [("sage_music/cache_sage_music.py", "GrowingLayer"), ("perceivers/cache_perceivers.py", "GrowingLayer")],
        *(
            [(f"{family}/arguments_{family}.py", name) for family in ("sage_music", "perceivers")]
            for name in (
                "check_arguments",
                "one_cache",
                "rename_cache",
                "check_flex_attention",
                "is_paged",
                "warn_untested",
            )
        ),
    ],
    ids=lambda twins: twins[0][1],
)
def test_twins_are_equal(twins):
    """A Hub file cannot import another family or sage_studio: what both need is written twice, and must stay equal."""
    first, *others = [source(*twin) for twin in twins]
    assert all(other == first for other in others)


def test_nothing_imports_the_command_line():
    for path in SRC.rglob("*.py"):
        for level, module in imports(path):
            assert not module.endswith("cli") and not (level and module == "cli"), path


FAMILIES = {
    "sage_music": ("SageMusic", "BOS_None Bar_None TimeSig_4/4", {"num_attention_heads": 5, "intermediate_size": 32}),
    "perceivers": ("PerceiverS", "BOS", {"num_attention_heads": 4, "num_latents": 8, "max_position_embeddings": 64}),
}
REMOTE = """
import sys
for name in ("sage_music", "perceivers", "sage_studio"):
    sys.modules[name] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
AutoModel.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
out = model.generate(torch.tensor([tokenizer(text)["input_ids"]]), max_new_tokens=40, do_sample=True)
print(type(model).__module__.split(".")[0], tokenizer.decode_midi(out[0]).note_num() >= 0, model.config.hidden_size)
"""


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hub_files_load_without_the_package(tmp_path, family):
    """A checkpoint folder with its code loads by trust_remote_code where none of our packages is installed."""
    prefix, text, shape = FAMILIES[family]
    package = importlib.import_module(family)
    config_class, model_class, tokenizer_class = (
        getattr(package, prefix + part) for part in ("Config", "ForCausalLM", "Tokenizer")
    )
    tokenizer = tokenizer_class()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8, **shape}
    config = config_class(**tokenizer.config_fields(), **shape)
    config.auto_map = {
        "AutoConfig": f"configuration_{family}.{prefix}Config",
        "AutoModel": f"modeling_{family}.{prefix}Model",
        "AutoModelForCausalLM": f"modeling_{family}.{prefix}ForCausalLM",
    }
    torch.manual_seed(0)
    checkpoint = tmp_path / "checkpoint"
    model_class(config).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    settings = checkpoint / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content["auto_map"] = {"AutoTokenizer": [f"tokenization_{family}.{prefix}Tokenizer", None]}
    settings.write_text(json.dumps(content))
    for path in HUB:
        if path.parent.name == family:
            shutil.copy(path, checkpoint)
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, str(checkpoint), text],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["transformers_modules", "True", "32"]
