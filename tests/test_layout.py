"""The import rules that keep Hub files loadable alone and notekit's plain modules free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
HUB = sorted(SRC.glob("*/*_sage_music.py"))
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


@pytest.mark.parametrize("module", ["notes", "midi", "render"])
def test_plain_modules_import_no_torch(module):
    code = f"import sys, notekit.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_twin_in_the_tokenizer_is_the_same():
    """A Hub file cannot import notekit: what both need is written twice, and must stay equal."""
    sources = []
    for path in (SRC / "notekit" / "midi.py", SRC / "sage_music" / "tokenization_sage_music.py"):
        text = path.read_text(encoding="utf-8")
        found = [n for n in ast.parse(text).body if getattr(n, "name", "") == "is_truncated"]
        sources.append(ast.get_source_segment(text, found[0]))
    assert sources[0] == sources[1]


def test_nothing_imports_the_command_line():
    for path in SRC.rglob("*.py"):
        for level, module in imports(path):
            assert not module.endswith("cli") and not (level and module == "cli"), path


def test_hub_files_load_without_the_package(tmp_path):
    """A checkpoint folder with its code loads by trust_remote_code where none of our packages is installed."""
    code = """
import sys
for name in ("sage_music", "notekit"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = torch.tensor([tokenizer("BOS_None Bar_None TimeSig_4/4")["input_ids"]])
torch.manual_seed(0)
out = model.generate(ids, max_new_tokens=40, do_sample=True)
print(type(model).__module__.split(".")[0], tokenizer.decode_midi(out[0]).note_num() >= 0, model.config.kv_routing)
"""
    import shutil

    import torch

    from sage_music import SageMusicConfig, SageMusicForCausalLM, SageMusicTokenizer

    tokenizer = SageMusicTokenizer()
    fields = tokenizer.config_fields()
    config = SageMusicConfig(
        **fields, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=5, head_dim=8
    )
    config.auto_map = {
        "AutoConfig": "configuration_sage_music.SageMusicConfig",
        "AutoModel": "modeling_sage_music.SageMusicModel",
        "AutoModelForCausalLM": "modeling_sage_music.SageMusicForCausalLM",
    }
    torch.manual_seed(0)
    SageMusicForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    settings = tmp_path / "checkpoint" / "tokenizer_config.json"
    import json

    content = json.loads(settings.read_text())
    content["auto_map"] = {"AutoTokenizer": ["tokenization_sage_music.SageMusicTokenizer", None]}
    settings.write_text(json.dumps(content))
    for path in HUB:
        shutil.copy(path, tmp_path / "checkpoint")
    import os

    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "checkpoint")], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["transformers_modules", "True", "head"]
