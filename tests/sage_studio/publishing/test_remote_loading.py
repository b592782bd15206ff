"""A repository on a Hub is the checkpoint, in a process that has none of our packages: logits, ids and music."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import band, tiny_model
from hub_server import LoopbackHub
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM

from sage_studio.checkpoints import load
from sage_studio.generation.bars import continue_score
from sage_studio.generation.seconds import continue_performance
from sage_studio.publishing.cards import without_samples
from sage_studio.publishing.export import export
from sage_studio.publishing.push import push

TOKEN = "hf_of_someone"
BUNDLED = ("sage-music", "perceivers")
# Short music, so that the test is.
OPTIONS = {"sage-music": {"prompt_bars": 2, "bars": 2}, "perceivers": {"prompt_s": 2, "music_s": 2}}

BLOCKED = """
import sys
for name in ("sage_music", "perceivers", "sage_studio", "conversion"):
    sys.modules[name] = None
import json, os
import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
trust = {"trust_remote_code": True}
"""

EVERYTHING = """
name, prompt, out, options = sys.argv[1:]
options = json.loads(options)
config = AutoConfig.from_pretrained(name, **trust)
tokenizer = AutoTokenizer.from_pretrained(name, **trust)
model = AutoModelForCausalLM.from_pretrained(name, **trust)
hidden = AutoModel.from_pretrained(name, **trust)(torch.tensor([[1, 5, 9]])).last_hidden_state
ids = torch.tensor([tokenizer.midi_to_ids(prompt)[:60]])
found = {"logits": model(ids).logits.detach().numpy(), "ids": ids.numpy()}
found["greedy"] = model.generate(ids, do_sample=False, max_new_tokens=40).numpy()
torch.manual_seed(0)
found["sampled"] = model.generate(ids, do_sample=True, max_new_tokens=40).numpy()
np.savez(out, **found)
pipe = pipeline("midi-continuation", model=name, device="cpu", **trust)
result = pipe(prompt, seed=3, **options)
with open(f"{out}.mid", "wb") as file:
    file.write(result["midi"])
modules = {type(part).__module__.split(".")[0] for part in (config, tokenizer, model, pipe)}
print(json.dumps([sorted(modules), config.model_type, hidden.shape[-1], result["new_notes"]]))
"""


@pytest.fixture(scope="module")
def hub():
    """A Hub with both bundled checkpoints, and this process talks to it too."""
    with LoopbackHub() as server, pytest.MonkeyPatch.context() as patch:
        server.add_user("someone", TOKEN)
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in BUNDLED:
            push(name, f"someone/{name}", token=TOKEN, samples=False)
        yield server


def elsewhere(hub, tmp_path, code: str, *arguments, token: str | None = None) -> str:
    """What a process prints that has no package of ours, an empty cache and the loopback Hub."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": token} if token else {}
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize("name", BUNDLED)
def test_a_published_checkpoint_is_the_local_one(hub, tmp_path, name):
    prompt, out = tmp_path / "prompt.mid", tmp_path / "found"
    band(bars=6, seed=1).dump_midi(prompt)
    printed = elsewhere(hub, tmp_path, EVERYTHING, f"someone/{name}", prompt, out, json.dumps(OPTIONS[name]))
    modules, model_type, width, new_notes = json.loads(printed)
    model, tokenizer = load(name)
    assert modules == ["transformers_modules"] and model_type == model.config.model_type
    assert width == model.config.hidden_size
    ids = torch.tensor([tokenizer.midi_to_ids(prompt)[:60]])
    found = np.load(f"{out}.npz")
    assert np.array_equal(found["ids"], ids.numpy())
    np.testing.assert_allclose(found["logits"], model(ids).logits.detach().numpy(), rtol=0, atol=1e-6)
    assert np.array_equal(found["greedy"], model.generate(ids, do_sample=False, max_new_tokens=40).numpy())
    torch.manual_seed(0)
    assert np.array_equal(found["sampled"], model.generate(ids, do_sample=True, max_new_tokens=40).numpy())
    go_on = continue_score if name == "sage-music" else continue_performance
    music = go_on(model, tokenizer, prompt, seed=3, **OPTIONS[name])
    assert Path(f"{out}.mid").read_bytes() == music.score.dumps_midi() and new_notes == music.notes


REVISIONS = """
name, first, second, out = sys.argv[1:]
ids = torch.tensor([[1, 5, 9, 30]])
def logits(**options):
    model = AutoModelForCausalLM.from_pretrained(name, **trust, **options)
    code = type(model).__module__.split(".")[-2]
    return model(ids).logits.detach().numpy(), code
found, codes = {}, {}
for key, options in {
    "main": {},
    "second": {"revision": second},
    "first": {"revision": first},
    "branch": {"revision": "stable"},
    "mixed": {"revision": second, "code_revision": first},
}.items():
    found[key], codes[key] = logits(**options)
np.savez(out, **found)
marks = {}
for key, options in {"first": {"revision": first}, "second": {}}.items():
    pipe = pipeline("midi-continuation", model=name, device="cpu", **trust, **options)
    marks[key] = hasattr(sys.modules[type(pipe).__module__], "SECOND")
print(json.dumps([codes, marks]))
"""


def test_a_revision_pins_weights_and_code(hub, tmp_path, tokenizer):
    folders, models = [], [tiny_model(tokenizer, seed=seed) for seed in (1, 2)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"tiny{number}")
        tokenizer.save_pretrained(tmp_path / f"tiny{number}")
        folders.append(export(tmp_path / f"tiny{number}", tmp_path / f"out{number}", license="mit", samples=False))
    with open(folders[1] / "midi_continuation.py", "a") as file:
        file.write("SECOND = True\n")
    first = push(folders[0], "someone/tiny", token=TOKEN)
    HfApi(token=TOKEN).create_branch("someone/tiny", branch="stable")
    second = push(folders[1], "someone/tiny", token=TOKEN, exist_ok=True)
    printed = elsewhere(hub, tmp_path, REVISIONS, "someone/tiny", first, second, tmp_path / "found")
    codes, marks = json.loads(printed)
    ids = torch.tensor([[1, 5, 9, 30]])
    expected = [model(ids).logits.detach().numpy() for model in models]
    assert not np.allclose(*expected)
    found = np.load(tmp_path / "found.npz")
    for key, which in {"main": 1, "second": 1, "first": 0, "branch": 0, "mixed": 1}.items():
        np.testing.assert_allclose(found[key], expected[which], rtol=0, atol=1e-6, err_msg=key)
    assert codes == {"main": second, "second": second, "first": first, "branch": first, "mixed": first}
    assert marks == {"first": False, "second": True}


PRIVATE = """
name, token = sys.argv[1:]
errors = []
for auto in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
    try:
        auto.from_pretrained(name, **trust)
    except OSError as error:
        errors.append(str(error))
for options in ({"token": "hf_of_nobody"}, {"token": token}):
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **trust, **options)
    except OSError as error:
        errors.append(str(error))
try:
    AutoConfig.from_pretrained("someone/gated", **trust)
except OSError as error:
    errors.append(str(error))
print(json.dumps([errors, type(model).__name__]))
"""


def test_a_private_repository_needs_a_token(hub, tmp_path, tokenizer):
    tiny_model(tokenizer).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    push(tmp_path / "tiny", "someone/secret", token=TOKEN, private=True, license="mit", samples=False)
    secret = hub.repository("someone/secret")
    hub.repositories["models", "someone/gated"] = replace(secret, name="someone/gated", private=False, gated=True)
    errors, loaded = json.loads(elsewhere(hub, tmp_path, PRIVATE, "someone/secret", TOKEN))
    assert loaded == "SageMusicForCausalLM" and len(errors) == 5
    for error in errors[:3]:
        assert "someone/secret is not a local folder" in error and "private repository" in error
    assert "someone/secret" in errors[3] and "gated repo" in errors[4]


def test_an_adapter_finds_its_published_base(hub, tmp_path, tokenizer):
    """Here by `sage_studio.checkpoints.load`, elsewhere by Transformers: the base's code comes with the base."""
    pytest.importorskip("peft")
    from sage_studio.checkpoints.lora import add_lora

    tiny_model(tokenizer).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    push(tmp_path / "tiny", "someone/base", token=TOKEN, license="cc-by-sa-4.0", samples=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        model, _ = load("someone/base")
        adapted = add_lora(model, rank=2)
        torch.manual_seed(0)
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.1)
        adapted.save_pretrained(tmp_path / "adapter")
        settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "someone/base"
        ids = torch.tensor([[1, 5, 9, 30]])
        expected = adapted.eval()(ids).logits
        torch.testing.assert_close(load(tmp_path / "adapter")[0](ids).logits, expected, rtol=1e-4, atol=1e-4)
        # Its export has the weights merged; the card names the base, and keeps its licence.
        folder = export(tmp_path / "adapter", tmp_path / "merged", samples=False)
    card = (folder / "README.md").read_text()
    assert "base_model: someone/base" in card and "license: cc-by-sa-4.0" in card
    code = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **trust)
np.save(sys.argv[2], model(torch.tensor([[1, 5, 9, 30]])).logits.detach().numpy())
"""
    elsewhere(hub, tmp_path, code, tmp_path / "adapter", tmp_path / "logits.npy")
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_an_installed_package_takes_its_own_code(hub, tmp_path):
    """With the package there, a published checkpoint loads by its name, with or without `trust_remote_code`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        model, tokenizer = load("someone/perceivers")
        assert tokenizer.vocab_size == model.config.vocab_size
        for options in ({}, {"trust_remote_code": True}):
            other = AutoModelForCausalLM.from_pretrained("someone/perceivers", **options)
            assert type(other) is type(model)
        # It can be exported from there, with the card that it has there.
        folder = export("someone/perceivers", tmp_path / "out", samples=False)
    assert (folder / "README.md").read_bytes() == without_samples(
        hub.files("someone/perceivers")["README.md"].decode()
    ).encode()
    shutil.rmtree(tmp_path / "cache")
