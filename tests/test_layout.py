"""The import rules that keep Hub files loadable alone and sage_studio's plain modules free of torch."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SRC = Path(__file__).resolve().parents[1] / "src"
HUB = sorted(path for family in ("sage_music", "perceivers") for path in (SRC / family).glob(f"*_{family}.py"))
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


PLAIN = (
    "errors",
    "files",
    "defaults",
    "reports",
    "music.midi",
    "music.render",
    "corpus",
    "corpus.command",
    "metrics",
    "evaluate",
    "experiments",
)


@pytest.mark.parametrize("module", PLAIN)
def test_plain_modules_import_no_torch(module):
    code = f"import sys, sage_studio.{module}; assert 'torch' not in sys.modules"
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
