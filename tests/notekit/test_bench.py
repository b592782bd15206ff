"""The benchmarks run, on sizes that take a moment: what they report, and what happens where the rival is missing."""

import json
import os
import sys

import pytest

from notekit import bench_perceivers
from notekit.bench_perceivers import PERCEIVERS, PERCEIVERS_ONE, RIVAL
from notekit.cli import main

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The measured shape shrunk: the width is no part of what is tested."""
    whole = bench_perceivers.config_for
    monkeypatch.setattr(
        bench_perceivers, "config_for", lambda context, **options: whole(context, **{**TINY, **options})
    )


def test_perceivers_against_the_rival():
    pytest.importorskip("perceiver_ar_pytorch")
    result = bench_perceivers.compare([64, 128], tokens=4, rounds=1)
    rows = result["rows"]
    assert [(row["context"], row["model"]) for row in rows] == [
        (context, name) for context in (64, 128) for name in (RIVAL, PERCEIVERS_ONE, PERCEIVERS)
    ]
    for row in rows:
        assert row["training_step_s"] > 0 and row["ms_per_token"] > 0 and row["latents"] == row["context"] // 4
        if row["model"] != RIVAL:
            assert row["training_ratio"] > 0 and row["decoding_ratio"] > 0
            assert row["uncached_ms_per_token"] > 0 and row["step_ms"] > 0 and row["refill_ms"] > 0
    assert "remark" not in result
    assert f"| 64 | 16 | 1 | {RIVAL} |" in bench_perceivers.table(result)
    json.dumps(result)


def test_without_the_rival_its_row_is_left_out_with_a_remark(monkeypatch):
    monkeypatch.setitem(sys.modules, "perceiver_ar_pytorch", None)  # as if it were not installed
    result = bench_perceivers.compare([64, 128], tokens=4, rounds=2)
    assert [row["model"] for row in result["rows"]] == [PERCEIVERS_ONE, PERCEIVERS] * 2
    assert not any("decoding_ratio" in row for row in result["rows"])
    text = bench_perceivers.table(result)
    assert "pip install perceiver-ar-pytorch" in text and f"| {RIVAL} |" not in text
    grown = result["growth"]
    assert [row["context"] for row in grown] == [64, 128] and grown[1]["growth"] > 0
    assert [row["first_cross_layer_bytes"] for row in grown] == [64 * 2 * 64 * 4, 128 * 2 * 64 * 4]


def test_the_rival_has_the_same_shape():
    pytest.importorskip("perceiver_ar_pytorch")
    config = bench_perceivers.config_for(64, cross_scales=[None])
    rival, ours = bench_perceivers.stock_perceiver_ar(config), bench_perceivers.PerceiverSForCausalLM(config)
    matrices = [
        sorted(
            tuple(weight.shape) for name, weight in model.named_parameters() if "layers" in name and weight.ndim == 2
        )
        for model in (rival, ours)
    ]
    # Its cross layer projects queries apart from keys and values, as ours does: the same matrices, of the same sizes.
    assert matrices[0] == matrices[1]


def test_decoding_is_counted_in_whole_turns_with_one_refill_each():
    config = bench_perceivers.config_for(64)
    assert bench_perceivers.turn_of(config) == 9  # 16 latents, a full window starts anew with 8
    assert [bench_perceivers.whole_turns(config, 64, tokens) for tokens in (1, 9, 10, 1000)] == [9, 9, 18, 45]
    assert bench_perceivers.amortised(config, step=1.0, refill=10.0) == 2.0


def test_a_refill_is_found_again_in_the_cache():
    config = bench_perceivers.config_for(64)
    model = bench_perceivers.PerceiverSForCausalLM(config).eval()
    cache, ids = bench_perceivers.PerceiverSCache(config), bench_perceivers.random_ids(config, 64)
    model(ids[:, :60], past_key_values=cache)
    assert bench_perceivers.refill_seconds(model, cache, ids) > 0
    assert cache.get_seq_length() == 53 and cache.window == cache.window_start(52) > cache.window_start(51)


def test_paper_size_and_training_memory_report_the_peak():
    found = bench_perceivers.paper_size((64, 128), tokens=4, **TINY)["paper_size"]
    assert [row["context"] for row in found["decoding"]] == [64, 128]
    assert found["forward_s"] > 0 and found["ratio"] > 0 and 0.05 < found["peak_gb"] < 50
    trained = bench_perceivers.training_memory(max_position_embeddings=64, num_latents=16, **TINY)
    assert trained["training_memory"]["training_step_s"] > 0
    assert "peak memory" in bench_perceivers.table(trained)


def test_a_fresh_process_is_one_and_its_death_is_told():
    assert bench_perceivers.in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(OSError, match="memory ran out"):
        bench_perceivers.in_fresh_process(os.abort)


def test_a_context_too_short_is_refused():
    with pytest.raises(ValueError, match="16 or more"):
        bench_perceivers.compare([8], tokens=4, rounds=1)


def test_on_the_command_line(capsys):
    arguments = ["bench", "--model", "perceivers", "--contexts", "64", "--tokens", "4", "--rounds", "1"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"][-1]["model"] == PERCEIVERS and result["rows"][-1]["context"] == 64
    assert main(arguments) == 0
    assert "| 64 | 16 | 1 | PerceiverS |" in capsys.readouterr().out
    assert main(["bench", "--memory"]) == 2
    assert "--model perceivers" in capsys.readouterr().err
