"""The benchmarks run, on sizes that take a moment: what they report, and what happens where a rival is missing."""

import itertools
import json
import os
import sys

import pytest
import torch
from conftest import band, tiny_config, tiny_model

import sage_music
from sage_studio.bench import decoding as bench
from sage_studio.bench import perceivers as bench_perceivers
from sage_studio.bench import tables as bench_report
from sage_studio.bench.perceivers import PERCEIVERS, PERCEIVERS_ONE, RIVAL
from sage_studio.cli import main

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
    assert "pip install perceiver-ar-pytorch==" in text and f"| {RIVAL} |" not in text
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


SMALL = {"tokens": 8, "rounds": 2}


@pytest.fixture(scope="module", autouse=True)
def small_buffer():
    """Streaming half a gigabyte in every round would be most of these tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STREAM_BYTES", 8 << 20)
        yield


@pytest.fixture(scope="module")
def result(tokenizer) -> dict:
    model = tiny_model(tokenizer)
    keys = ["full", "gqa", "mqa", "ours", "bf16", "draft"]
    return bench.compare(model, tokenizer, [64, 32], **SMALL, batches=[2, 1], models=keys)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_model_is_measured_at_every_context_and_batch(result):
    rows = result["rows"]
    keys = ["full", "gqa", "mqa", "ours", "bf16"]
    assert [(row["context"], row["batch"], row["key"]) for row in rows] == [
        (context, batch, key) for context in (32, 64) for batch in (1, 2) for key in keys
    ]
    assert [row["model"] for row in rows[:3]] == ["Llama, full heads", "Llama, GQA (4 heads)", "Llama, MQA"]
    for row in rows:
        assert row["rounds"] == 2 and row["tokens_per_pass"] == 1
        assert 0 < row["ms_per_note_p50"] <= row["ms_per_note_p95"] <= row["ms_per_note_p99"]
        # The first note waits for the prompt, and for the tokens that it has more than one.
        assert row["first_note_ms"] > 1000 * row["batch"] * row["context"] / row["prefill_tokens_per_second"]
    assert any("draft head" in remark for remark in result["remarks"])
    assert "from nothing" in result["prompts"]["batch 1"] and "ahead" in result["prompts"]["larger batches"]
    assert result["bandwidth"]["products_gb_s"] > 0 and result["bandwidth"]["stream_gb_s"] > 0


def test_ratios_are_those_of_their_parts(result):
    rows = {(row["context"], row["batch"], row["key"]): row for row in result["rows"]}
    for (context, batch, key), row in rows.items():
        full, mqa = rows[context, batch, "full"], rows[context, batch, "mqa"]
        close = {"rel": 2e-3}
        speed = row["tokens_per_second"]
        assert row["speed_ratio"] == pytest.approx(speed / full["tokens_per_second"], **close)
        assert row["mqa_speed_ratio"] == pytest.approx(speed / mqa["tokens_per_second"], **close)
        cache = full["cache_bytes_per_token"]
        assert row["cache_ratio"] == pytest.approx(cache / row["cache_bytes_per_token"], **close)
        assert row["cache_padded_ratio"] == pytest.approx(cache / row["cache_padded_bytes_per_token"], **close)
        assert row["notes_per_second"] == pytest.approx(speed / row["tokens_per_note"], **close)
        if key == "bf16":
            assert "roofline_products" not in row
            continue
        for name in ("products", "stream"):
            seconds = row["step_bytes"] / 1e9 / result["bandwidth"][f"{name}_gb_s"]
            assert row[f"roofline_{name}"] == pytest.approx(1000 * seconds / row["ms_per_token"], **close)


def test_cache_bytes_are_those_of_the_heads(result, tokenizer):
    rows = {(row["batch"], row["key"]): row for row in result["rows"] if row["context"] == 64}
    head = 2 * 8 * 2 * 4  # keys and values, channels, layers, bytes
    for batch in (1, 2):
        note = round(rows[batch, "full"]["tokens_per_note"])
        new = note * (1 + -(-8 // note))  # the first note, and as many as 8 tokens take
        tokens = 64 + new - 1  # the last one is not yet stored
        assert [rows[batch, key]["cache_bytes_per_token"] for key in ("full", "gqa", "mqa")] == [
            16 * head,
            4 * head,
            head,
        ]
        ours = rows[batch, "ours"]
        assert ours["cache_bytes_per_token"] == pytest.approx(head * (tokens + 4) / tokens, rel=1e-3)  # BOS is in all
        assert rows[batch, "bf16"]["cache_bytes_per_token"] == pytest.approx(
            ours["cache_bytes_per_token"] / 2, rel=1e-3
        )
        assert ours["cache_bytes_per_token"] < ours["cache_padded_bytes_per_token"]
        assert ours["cache_padded_bytes_per_token"] <= ours["cache_allocated_bytes_per_token"]
        expected = bench.weight_bytes_per_step(tiny_model(tokenizer), batch) + ours["cache_bytes_per_token"] * batch * (
            64 + 7.5
        )
        assert ours["step_bytes"] == pytest.approx(expected, rel=1e-3)


def test_weights_that_a_step_reads(tokenizer):
    model = tiny_model(tokenizer, tie_word_embeddings=True)
    vocabulary = model.config.vocab_size
    # Per layer: queries and output, one attribute's keys and values, three of the MLP, two norms; then the last norm.
    layer = 2 * 64 * 128 + 64 * 16 + 3 * 64 * 96 + 2 * 64
    rest = 64 + vocabulary * 64
    assert bench.weight_bytes_per_step(model) == 4 * (2 * layer + rest + 64)
    # Three rows: up to three attributes' keys and values, three rows of the embedding. Seven: all five.
    assert bench.weight_bytes_per_step(model, 3) == 4 * (2 * (layer + 2 * 64 * 16) + rest + 3 * 64)
    assert bench.weight_bytes_per_step(model, 7) == 4 * (2 * (layer + 4 * 64 * 16) + rest + 7 * 64)
    # Untied, the output layer is read whole and the embedding is not; drafting heads are no part of a plain step.
    apart = tiny_model(tokenizer, tie_word_embeddings=False)
    assert bench.weight_bytes_per_step(apart) == bench.weight_bytes_per_step(model)
    drafting = tiny_model(tokenizer, num_mtp_layers=2)
    assert drafting.num_parameters() > model.num_parameters()
    assert bench.weight_bytes_per_step(drafting) == bench.weight_bytes_per_step(model)
    llama = bench.stock_llama(model.config, 16)
    assert bench.weight_bytes_per_step(llama) == 4 * (llama.num_parameters() + 64)


def test_times_become_columns():
    # Prompt pass at 1 s with a token, then passes of 1, 3 and 2 tokens.
    cache = {"used": 10.0, "padded": 12.0, "allocated": 16.0}
    run = bench.Run([(1.0, 1), (1.2, 1), (1.8, 3), (2.0, 2)], cache)
    assert run.prefill_s == 1.0 and run.tokens_per_second == pytest.approx(6.0) and run.tokens_per_pass == 2.0
    assert run.token_seconds() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.1, 0.1])
    assert run.note_arrivals(2) == [1.2, 1.8, 2.0] and run.note_arrivals(3) == [1.8, 2.0]
    slow = bench.Run([(2 * at, count) for at, count in run.passes], cache)
    found = bench.summary([run, slow, slow], context=50, batch=4, tokens_per_note=2.25)
    assert found["tokens_per_second"] == pytest.approx(4 * 3.0) and found["notes_per_second"] == pytest.approx(
        12 / 2.25
    )
    assert found["ms_per_token"] == pytest.approx(200) and found["first_note_ms"] == pytest.approx(2400)
    assert found["ms_per_note_p50"] == pytest.approx(500) and found["ms_per_note_p99"] == pytest.approx(1200)
    assert found["prefill_tokens_per_second"] == pytest.approx(4 * 50 / 2.0)
    assert found["cache_bytes_per_token"] == 10 and found["cache_allocated_bytes_per_token"] == 16


def test_a_generation_is_timed_token_by_token(tokenizer):
    model = tiny_model(tokenizer)
    ids = bench.music_like_ids(tokenizer, 20, batch=3)
    run = bench.timed(model, ids, 6)
    assert [count for _, count in run.passes] == [1] * 6
    times = [at for at, _ in run.passes]
    assert times == sorted(times) and times[0] > 0
    assert len(bench.token_seconds(model, ids[:1], 6)) == 6


def test_rows_of_a_batch_differ_in_attribute(tokenizer):
    attributes = torch.tensor(tiny_config(tokenizer).token_attribute_ids)
    ids = bench.music_like_ids(tokenizer, 100, batch=5)
    assert ids.shape == (5, 100) and (ids[1, 1:-1] == ids[0, 2:]).all()
    of = attributes[ids[:, 1:]]
    assert all(len(of[:, column].unique()) > 2 for column in range(99))


def test_prompts_are_music_of_the_checkpoint_even_beyond_its_context(tokenizer):
    from sage_studio.checkpoints import load

    model, own = load()
    model.config.max_position_embeddings = 320
    ids = bench.written_ids(model, own, 400)
    assert ids.shape == (1, 400) and torch.equal(ids, bench.written_ids(model, own, 400))
    assert own.decode_midi(ids[0]).note_num() > 50
    assert ids[0].unique().numel() > 30 and own.eos_token_id not in ids


def test_shape_medium_has_random_weights_and_no_drafting_heads(tokenizer, monkeypatch):
    shape = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "head_dim": 8,
        "intermediate_size": 64,
    }
    monkeypatch.setattr(bench, "MEDIUM", shape)
    model = tiny_model(tokenizer, num_mtp_layers=2)
    keys = ["gqa", "ours", "draft"]
    found = bench.compare(model, tokenizer, [32], **SMALL, batches=[1], models=keys, shape="medium")
    assert [row["key"] for row in found["rows"]] == ["gqa", "ours"]
    assert (found["shape"]["hidden_size"], found["shape"]["layers"], found["shape"]["name"]) == (48, 3, "medium")
    assert found["rows"][1]["cache_bytes_per_token"] < 1.2 * 3 * 2 * 8 * 4  # one head in each of the three layers
    assert "speed_ratio" not in found["rows"][0] and "written" not in found["prompts"]["batch 1"]
    assert any("draft head" in remark for remark in found["remarks"])
    assert "| 32 | SAGE-Music | 1 |" in bench_report.table(found)


def test_the_real_medium_shape_and_its_grouped_rival(tokenizer):
    with torch.device("meta"):
        ours = bench.shaped(tiny_model(tokenizer), "medium", 8192)
    config = ours.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.head_dim, config.intermediate_size, config.max_position_embeddings) == (64, 2048, 8192)
    assert sum(config.query_heads_per_attribute) == 12
    assert [bench.grouped_heads(heads) for heads in (10, 12, 16, 7, 2, 1)] == [2, 4, 4, 1, 1, 1]


def test_drafting_is_measured_greedy_and_sampled_at_batch_one(tokenizer, monkeypatch):
    whole, asked = bench.timed, []
    monkeypatch.setattr(bench, "timed", lambda *a, **options: asked.append(options) or whole(*a, **options))
    model = tiny_model(tokenizer, num_mtp_layers=2)
    found = bench.compare(model, tokenizer, [32], **SMALL, batches=[1, 2], models=["full", "ours", "draft"])
    rows = {(row["batch"], row["key"]): row for row in found["rows"]}
    assert set(rows) == {(1, "full"), (1, "ours"), (1, "draft"), (2, "full"), (2, "ours")}
    assert any("batch 2" in remark and "one sequence" in remark for remark in found["remarks"])
    draft = rows[1, "draft"]
    assert draft["tokens_per_pass"] >= 1 and draft["sampled_tokens_per_pass"] >= 1
    base = rows[1, "full"]["tokens_per_second"]
    assert draft["sampled_speed_ratio"] == pytest.approx(draft["sampled_tokens_per_second"] / base, rel=2e-3)
    assert rows[1, "ours"]["sampled_tokens_per_pass"] == 1  # what the sampled draft is to be held against
    assert "sampled_tokens_per_second" not in rows[1, "full"] and "sampled_tokens_per_second" not in rows[2, "ours"]
    assert draft["cache_bytes_per_token"] == pytest.approx(rows[1, "ours"]["cache_bytes_per_token"], rel=0.05)
    for options in ({"use_mtp": True}, {"do_sample": True}, {"use_mtp": True, "do_sample": True}):
        assert asked.count(options) >= 2  # rounds
    assert "| 32 | SAGE-Music + draft | 1 |" in bench_report.table(found)


def test_int8_and_compiled_rows_are_what_they_say(tokenizer):
    model = tiny_model(tokenizer, num_mtp_layers=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    keys = ["ours", "compiled", "int8", "int8-compiled-draft"]
    rivals = {rival.key: rival for rival in bench.rivals_of(bench.shaped(model, "small", 64), keys, [])}
    assert list(rivals) == keys
    assert bench.stored_bytes(rivals["int8"].model) < bench.stored_bytes(rivals["ours"].model)
    assert rivals["compiled"].model is rivals["ours"].model and "compile_config" in rivals["compiled"].options
    assert rivals["int8-compiled-draft"].options.keys() == {"use_mtp", "compile_config"}
    found = bench.compare(model, tokenizer, [32], **SMALL, batches=[1], models=["ours", "int8"])
    assert [row["key"] for row in found["rows"]] == ["ours", "int8"]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_what_int8_refuses_is_left_out_with_a_remark(tokenizer):
    remarks = []
    model = tiny_model(tokenizer).to(torch.float64)
    assert [r.key for r in bench.rivals_of(model, ["ours", "int8"], remarks)] == ["ours"]
    assert len(remarks) == 1 and "SAGE-Music int8 is left out" in remarks[0] and "float32" in remarks[0]


def test_a_cache_that_would_not_fit_is_left_out_with_a_remark(tokenizer, monkeypatch):
    # Full heads: 16 heads * 2 layers * 2 * 8 channels * 4 bytes * 2 rows * (64 + 15) tokens = 323,584 bytes.
    monkeypatch.setattr(bench, "free_bytes", lambda device: 2 * 323_583)
    model = tiny_model(tokenizer)
    found = bench.compare(model, tokenizer, [64], **SMALL, batches=[1, 2], models=["full", "mqa"])
    assert [(row["batch"], row["key"]) for row in found["rows"]] == [(1, "full"), (1, "mqa"), (2, "mqa")]
    assert any("full heads is left out at context 64, batch 2" in remark for remark in found["remarks"])
    assert "speed_ratio" not in found["rows"][-1] and found["rows"][-1]["mqa_speed_ratio"] == 1
    assert "full heads is left out" in bench_report.table(found)


def test_what_takes_minutes_is_measured_once(tokenizer, monkeypatch):
    monkeypatch.setattr(bench, "SLOW_S", 0.0)
    found = bench.compare(tiny_model(tokenizer), tokenizer, [32], **SMALL, batches=[2], models=["mqa"])
    assert found["rows"][0]["rounds"] == 1 and any("measured once" in remark for remark in found["remarks"])


def test_contexts_beyond_the_checkpoints_own_are_said(tokenizer):
    model = tiny_model(tokenizer, max_position_embeddings=512)
    for context, said in ((512, False), (528, True)):
        found = bench.compare(model, tokenizer, [context], **SMALL, batches=[1], models=["mqa"])
        assert any("over 512" in remark for remark in found["remarks"]) == said
        assert "larger batches" not in found["prompts"]


def test_peak_memory_is_what_the_work_adds():
    cpu = torch.device("cpu")
    size = 64 << 20
    rise = bench.peak_rise(cpu, lambda: torch.ones(size // 4).sum())
    if rise is None:
        pytest.skip("this system does not tell a process its peak anew")
    assert 0.9 * size < rise < 2 * size
    assert bench.peak_rise(cpu, lambda: None) < size / 4
    assert bench.free_bytes(cpu) > size


def test_the_rival_in_training_has_as_many_parameters(tokenizer):
    tiny = tiny_model(tokenizer)
    with torch.device("meta"):
        shapes = [bench.shaped(tiny, "medium", 1024)]
        shapes.append(sage_music.SageMusicForCausalLM(sage_music.SageMusicConfig(**tokenizer.config_fields())))
    for ours in [tiny, *shapes]:
        with torch.device(ours.device):
            rival = bench.equal_llama(ours)
        assert rival.num_parameters() == pytest.approx(ours.num_parameters(), rel=0.01)
        assert rival.config.num_key_value_heads == ours.config.num_attention_heads
        assert rival.config.hidden_size == ours.config.hidden_size


def test_training_is_compared(tokenizer):
    model = tiny_model(tokenizer, num_mtp_layers=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = bench.compare_training(model, tokenizer, [32, 64], 1, batches=[2])
    rows = found["training"]
    assert [(row["context"], row["model"]) for row in rows] == [
        (context, name) for context in (32, 64) for name in ("Llama, full heads", "SAGE-Music")
    ]
    for llama, ours in (rows[:2], rows[2:]):
        assert llama["time_ratio"] == 1 and llama["parameters"] == pytest.approx(ours["parameters"], rel=0.01)
        assert ours["time_ratio"] == pytest.approx(ours["training_step_s"] / llama["training_step_s"], rel=2e-3)
    assert rows[1]["parameters"] < model.num_parameters()  # without the drafting heads
    assert "| 64 | SAGE-Music | 2 |" in bench_report.table(json.loads(json.dumps(found)))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    with pytest.raises(ValueError, match="no rows to draw"):
        bench_report.figure(found, "never.png")


def test_a_result_is_drawn_again_from_its_file(result, tmp_path, capsys):
    saved, picture = tmp_path / "result.json", tmp_path / "deep" / "figure.png"
    saved.write_text(json.dumps(result))
    assert bench_report.load_result(saved) == result
    assert main(["bench", "--from", str(saved), "--figure", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "| 64 | SAGE-Music | 2 |" in text and f"wrote {picture}" in text and "GB/s" in text
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_what_is_no_result_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    for text in ("", "[1]", '{"rows": []}', '{"machine": {}, "shape": {}, "rows": [{"context": 1}]}'):
        path.write_text(text)
        assert main(["bench", "--from", str(path)]) == 2
        assert "other.json" in capsys.readouterr().err
    assert main(["bench", "--from", str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_labels_keep_apart_and_stay_near():
    placed = bench_report._apart({"a": 0.5, "b": 0.51, "c": 0.1, "d": 0.99, "e": 1.0})
    heights = sorted(placed.values())
    gap = bench_report.GAP - 1e-9
    assert all(later - before >= gap for before, later in itertools.pairwise(heights))
    assert min(bench_report._apart({"a": 0.02, "b": 0.03, "c": 0.03}).values()) > 0.019  # none below the axis
    assert sorted(placed, key=placed.get) == ["c", "a", "b", "d", "e"] and placed["c"] == 0.1 and heights[-1] <= 1


def test_the_command_prints_a_table_or_json(checkpoint, tmp_path, capsys):
    arguments = ["bench", "--model", str(checkpoint), "--contexts", "32", "--tokens", "4", "--rounds", "1"]
    chosen = ["--batch", "1", "--models", "full", "ours"]
    prompt = tmp_path / "prompt.mid"
    band(bars=2).dump_midi(prompt)
    assert main([*arguments, *chosen, "--prompt", str(prompt), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in found["rows"]] == ["full", "ours"]
    assert found["prompts"]["batch 1"] == "written by the checkpoint after prompt.mid"
    assert main([*arguments, *chosen]) == 0
    assert "| 32 | SAGE-Music | 1 |" in capsys.readouterr().out
    assert main([*arguments[:-4], "--training", "--batch", "1"]) == 0
    assert "| 32 | SAGE-Music | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--models", "full", "fastest"], "fastest"),
        (["--contexts", "8"], "16 or more"),
        (["--training", "--tokens", "4"], "--tokens"),
        (["--training", "--figure", "x.png"], "--training"),
        (["--prompt", "absent.mid"], "absent.mid"),
        (["--model", "perceivers", "--shape", "medium"], "--shape is an option of SAGE-Music"),
        (["--model", "perceivers", "--from", "x.json"], "--from is an option of SAGE-Music"),
    ],
)
def test_wrong_arguments_end_with_two_and_say_what(checkpoint, capsys, wrong, said):
    model = [] if "--model" in wrong else ["--model", str(checkpoint)]
    assert main(["bench", *model, *wrong]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_device_that_is_not_there_or_not_measured_right_is_refused(tokenizer):
    wrong = ["meta"] if torch.cuda.is_available() else ["meta", "cuda"]
    for measure in (bench.compare, bench.compare_training):
        for device in wrong:
            with pytest.raises(ValueError, match=f"device '?{device}"):
                measure(tiny_model(tokenizer), tokenizer, [32], device=device)


def test_a_missing_matplotlib_is_said_before_anything_is_measured(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(bench, "compare", lambda *args, **options: pytest.fail("measured"))
    assert main(["bench", "--model", str(checkpoint), "--figure", "x.png"]) == 2
    assert "pip install 'matplotlib>=" in capsys.readouterr().err
