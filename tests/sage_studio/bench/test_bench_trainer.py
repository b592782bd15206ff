"""Trainer beside a bare loop: both train the same, or their speeds would say nothing."""

import copy

import torch
from conftest import tiny_model

from sage_studio.bench.decoding import music_like_ids
from sage_studio.bench.trainer import _bare_seconds, _trainer_seconds, compare_trainer, table


def test_both_make_the_same_model(tokenizer):
    model = tiny_model(tokenizer)
    items = [{"input_ids": ids, "labels": ids.clone()} for ids in music_like_ids(tokenizer, 32, 12)]
    trained = []
    for measure in (_trainer_seconds, _bare_seconds):
        trained.append(copy.deepcopy(model))
        assert measure(trained[-1], items, 2, 6) > 0
    for (name, one), other in zip(trained[0].named_parameters(), trained[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name
        assert not torch.equal(one, dict(model.named_parameters())[name]), name


def test_the_result_is_a_sentence(tokenizer):
    result = compare_trainer(tiny_model(tokenizer), tokenizer, context=32, batch=2, steps=3, rounds=2)
    assert result["trainer"] > 0 and result["bare_loop"] > 0 and result["ratio"] > 0
    assert "Trainer" in table(result) and f"{result['ratio']:.3f} x" in table(result)
