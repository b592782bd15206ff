"""The bundled checkpoint: small enough, loads, writes valid music faster than it plays, and knows music from noise."""

import pytest
import torch
from test_generation_sage_music import assert_nothing_dropped

from sage_music import PRETRAINED
from sage_studio import example
from sage_studio.checkpoints import load


@pytest.fixture(scope="module")
def loaded():
    return load()


def test_it_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in PRETRAINED.iterdir()}
    weights = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    others = ("config.json", "generation_config.json", "model.safetensors.index.json", "miditok.json")
    assert {*weights, *others} <= set(files)
    assert files[weights[0]] <= 24e6 and files[weights[1]] <= 1.6e6  # the model, and its draft head


def test_two_hundred_samples_are_valid(loaded):
    model, tokenizer = loaded
    torch.manual_seed(0)
    start = torch.full((100, 1), tokenizer.bos_token_id)
    notes = 0
    for _ in range(2):
        for row in model.generate(start, do_sample=True, max_new_tokens=120, top_k=0).tolist():
            assert_nothing_dropped(tokenizer, row)
            notes += tokenizer.decode_midi(row).note_num()
    assert notes > 200 * 15


def test_real_music_is_likelier_than_the_same_notes_shuffled(loaded):
    """Four bars of a tune in harmony against the same pitches in another order."""
    model, tokenizer = loaded
    for name in ("ode_to_joy", "greensleeves", "saints"):
        ids = torch.tensor([tokenizer.midi_to_ids(example(name))])
        pitch = torch.tensor([t.startswith("Pitch_") for t in tokenizer.convert_ids_to_tokens(ids[0].tolist())])
        shuffled = ids.clone()
        order = torch.randperm(int(pitch.sum()), generator=torch.Generator().manual_seed(0))
        shuffled[0, pitch] = ids[0, pitch][order]
        with torch.no_grad():
            assert model(ids, labels=ids).loss < model(shuffled, labels=shuffled).loss - 0.1
