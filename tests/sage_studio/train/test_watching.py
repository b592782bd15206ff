"""Samples on the way: they leave training as it was, and say how well the model knows the grammar."""

import random

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_perceivers
from transformers import Trainer, TrainingArguments

from perceivers import PerceiverSTokenizer, PerformanceGrammarLogitsProcessor
from sage_music import MidiGrammarLogitsProcessor
from sage_studio.train.callbacks import SampleCallback, valid_mass


@pytest.mark.parametrize("family", ["sage_music", "perceivers"])
def test_samples_touch_no_random_state_and_no_mode(tokenizer, tmp_path, family):
    sage = family == "sage_music"
    model = tiny_model(tokenizer, max_position_embeddings=2048) if sage else tiny_perceivers()
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    callback = SampleCallback(trainer, tokenizer if sage else PerceiverSTokenizer(), tmp_path / "samples", 5, 2, 1)
    model.train()
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    found = callback.write(10)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert np.array_equal(np.random.get_state()[1], before[1]) and model.training
    assert 0 < found["sample_valid_mass"] <= 1 and found["sample_notes"] >= 0
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step-000010-{n}.{kind}" for n in (1, 2) for kind in ("mid", "png")]
    assert (tmp_path / "samples" / "step-000010-1.mid").read_bytes().startswith(b"MThd")
    assert callback.write(10) == found  # a sample's seed is its number


@pytest.mark.parametrize("family", ["sage_music", "perceivers"])
def test_a_model_that_knows_nothing_gives_valid_tokens_their_share(tokenizer, family):
    if family == "sage_music":
        model, ids = (
            tiny_model(tokenizer),
            tokenizer.convert_tokens_to_ids(
                "BOS_None Bar_None TimeSig_4/4 Position_0 Program_0 Pitch_60 Velocity_63 Duration_1.0.12".split()
            ),
        )
        processor, first = MidiGrammarLogitsProcessor(model.config), 1
    else:
        model, ids = tiny_perceivers(), [390, 370, 60, 300, 188, 388]
        processor, first = PerformanceGrammarLogitsProcessor(model.config), 1
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    shares = [
        float(processor.allowed(torch.tensor([ids[:length]]))[0].float().mean()) for length in range(first, len(ids))
    ]
    assert valid_mass(model, ids) == pytest.approx(np.mean(shares), rel=1e-5)
