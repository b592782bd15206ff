"""The bundled checkpoint: small enough, loads, writes valid music faster than it plays, and knows music from noise."""

import subprocess
import sys

import pytest
import torch

import perceivers
from perceivers import PRETRAINED, PerceiverSForCausalLM
from sage_studio import example
from sage_studio.checkpoints import load
from sage_studio.generation.seconds import generate_performance


@pytest.fixture(scope="module")
def loaded():
    return load("perceivers")


def test_it_is_small_and_complete(loaded):
    files = {path.name: path.stat().st_size for path in PRETRAINED.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) <= 24e6
    assert "NonCommercial" in (PRETRAINED / "NOTICE.md").read_text(encoding="utf-8")
    config = loaded[0].config
    assert config.max_position_embeddings == 32768 and config.num_latents == 1024 and len(config.cross_scales) == 2


def test_ten_seconds_come_faster_than_they_play(loaded):
    model, tokenizer = loaded
    assert isinstance(model, PerceiverSForCausalLM)
    performance = generate_performance(model, tokenizer, music_s=10, seed=0)
    assert performance.music_s == 10 and performance.ids[-1] == tokenizer.eos_token_id
    assert performance.elapsed_s < 10


def test_a_long_piece_is_valid_across_refills(loaded):
    model, tokenizer = loaded
    performance = generate_performance(model, tokenizer, music_s=None, max_tokens=2200, seed=1)
    texts = tokenizer.convert_ids_to_tokens(performance.ids)
    struck, ended = (sum(text.startswith(kind) for text in texts) for kind in ("NOTE_ON", "NOTE_OFF"))
    assert struck == ended == performance.score.note_num() == performance.notes > 50
    assert performance.tokens == 2200 or performance.ids[-1] == tokenizer.eos_token_id


def test_real_music_is_likelier_than_the_same_notes_shuffled(loaded):
    model, tokenizer = loaded
    for name in ("ode_to_joy", "greensleeves", "saints"):
        with pytest.warns(UserWarning, match="one piano"):
            ids = torch.tensor([tokenizer.midi_to_ids(example(name))])
        struck = ids[0] < 128
        shuffled = ids.clone()
        order = torch.randperm(int(struck.sum()), generator=torch.Generator().manual_seed(0))
        shuffled[0, struck] = ids[0, struck][order]
        with torch.no_grad():
            assert model(ids, labels=ids).loss < model(shuffled, labels=shuffled).loss - 0.1


WITHOUT = """
import sys
sys.modules["perceivers_weights"] = None
from sage_studio.cli import main
for argv in (["info", "--model", "perceivers"], ["prepare", "--data", "x", "--model", "perceivers"], ["info"]):
    print("exit code", main(argv))
"""


def test_without_its_package_one_line_says_what_it_is():
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    errors = run.stderr.splitlines()
    assert [line for line in run.stdout.splitlines() if "exit" in line] == [f"exit code {code}" for code in (2, 2, 0)]
    assert len(errors) == 2 and all("non-commercial package" in error for error in errors), errors
    assert all(word in errors[0] for word in ("sage-music-perceivers-weights", "./weights", "--model FOLDER"))


def test_without_its_package_the_folder_is_an_error_and_the_family_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "perceivers_weights", None)
    with pytest.raises(ModuleNotFoundError, match=r"separate, non-commercial package .*from_pretrained\(FOLDER\)"):
        _ = perceivers.PRETRAINED
    with pytest.raises(ModuleNotFoundError, match="sage-music-perceivers-weights"):
        from perceivers import PRETRAINED  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'PRETAINED'"):
        _ = perceivers.PRETAINED
