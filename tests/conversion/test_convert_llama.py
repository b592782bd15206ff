"""Llama-, Mistral- and Qwen-shaped models over MidiTok's REMI become SAGE-Music with the same logits."""

import json

import pytest
import torch
from conftest import band, tiny_model
from miditok import REMI, TokenizerConfig
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conversion.convert_llama import convert, main, pool_heads
from conversion.weights import ConversionError
from sage_music import SageMusicTokenizer
from sage_studio.checkpoints import load

CLASSES = {
    LlamaConfig: LlamaForCausalLM,
    MistralConfig: MistralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large weights: a slip then changes the likeliest token, not only the last digits.
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
    "factor": 4.0,
}
KINDS = {
    "llama": (LlamaConfig, {}),
    "llama biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama head_dim": (LlamaConfig, {"head_dim": 12, "num_key_value_heads": 8, "rope_parameters": LLAMA3}),
    "llama gelu": (LlamaConfig, {"hidden_act": "gelu", "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "llama yarn": (LlamaConfig, {"rope_parameters": YARN}),
    "llama dynamic": (LlamaConfig, {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "llama longrope": (LlamaConfig, {"rope_parameters": LONG}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral in its window": (MistralConfig, {"sliding_window": 256}),
    "qwen2": (Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
}


@pytest.fixture(scope="module")
def vocabulary() -> REMI:
    """REMI as a tutorial of MidiTok sets it up: one piano, no meters, special tokens in an order of its own."""
    return REMI(
        TokenizerConfig(
            pitch_range=(21, 109),
            num_velocities=24,
            special_tokens=["PAD", "MASK", "BOS", "EOS"],
            use_tempos=True,
            use_time_signatures=False,
        )
    )


def stock(folder, vocabulary, config_class=LlamaConfig, padded: int = 0, seed: int = 0, **options):
    """A random stock model over `vocabulary` in `folder`, as its author would have saved it; biases are not zero."""
    ids = {f"{name}_token_id": vocabulary[f"{name.upper()}_None"] for name in ("pad", "bos", "eos")}
    torch.manual_seed(seed)
    config = config_class(**{**SHAPE, **ids, "vocab_size": len(vocabulary) + padded, **options})
    model = CLASSES[config_class](config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                weight.add_(torch.randn_like(weight) * 0.3)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.8, top_k=12, **ids)
    model.save_pretrained(folder)
    vocabulary.save(folder / "tokenizer.json")
    return model


# What a shorter context leaves as it is. Of some, Transformers derives the factor from the two lengths.
SHORTENED = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": DYNAMIC,
    "yarn": YARN,
    "yarn without a factor": YARN | {"factor": None},
    "llama3": LLAMA3,
    "longrope": LONG,
    "longrope without a factor": {name: value for name, value in LONG.items() if name != "factor"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_whole_and_cached(tmp_path, vocabulary, kind):
    config_class, options = KINDS[kind]
    original = stock(tmp_path / "stock", vocabulary, config_class, **options)
    convert(tmp_path / "stock", tmp_path / "sage")
    model, tokenizer = load(tmp_path / "sage")

    ids = torch.randint(4, len(vocabulary), (2, 100), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = original(ids, attention_mask=mask, position_ids=positions).logits
        found = model(ids, attention_mask=mask).logits
        assert (found - expected)[mask.bool()].abs().max() <= 1e-5 * expected.abs().max()
        # 60 tokens at once, then one at a time, both from their own caches.
        caches = [None, None]
        for start, end in [(0, 60), *((n, n + 1) for n in range(60, 100))]:
            rows = []
            for index, network in enumerate((original, model)):
                output = network(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=caches[index],
                    use_cache=True,
                )
                caches[index] = output.past_key_values
                rows.append(output.logits[:, -1])
            assert (rows[1] - rows[0]).abs().max() <= 1e-5 * rows[0].abs().max(), end
    options = {"max_new_tokens": 60, "do_sample": False, "min_new_tokens": 60}
    prompt = ids[:1, :20]
    model.generation_config.midi_grammar = False
    written = model.generate(prompt, **options)
    assert torch.equal(written, original.generate(prompt, **options))
    assert model.generation_config.top_k == 12 and model.generation_config.temperature == 0.8
    assert tokenizer.get_vocab() == vocabulary.vocab


@pytest.mark.parametrize("context", [48, 128])
@pytest.mark.parametrize("rope", SHORTENED)
def test_the_same_logits_in_a_shorter_context(tmp_path, vocabulary, rope, context):
    original = stock(tmp_path / "stock", vocabulary, rope_parameters=SHORTENED[rope])
    model, _ = convert(tmp_path / "stock", tmp_path / "sage", context=context)
    assert model.config.max_position_embeddings == context
    saved = load(tmp_path / "sage")[0]
    ids = torch.randint(4, len(vocabulary), (1, context))
    with torch.no_grad():
        for length in (20, context):
            expected = original(ids[:, :length]).logits
            for found in (model, saved):
                assert (found(ids[:, :length]).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_music_through_a_piano_vocabulary(tmp_path, vocabulary):
    """What a converted model writes under the grammar decodes to MIDI with no note dropped."""
    stock(tmp_path / "stock", vocabulary)
    model, tokenizer = convert(tmp_path / "stock")
    with pytest.warns(UserWarning, match="64 drum notes are left out"):
        ids = tokenizer.midi_to_ids(band())
    assert [tokenizer.convert_ids_to_tokens(i).split("_")[0] for i in ids[:5]] == [
        *("BOS", "Bar", "Position", "Tempo", "Pitch")
    ]
    assert tokenizer.decode_midi(ids).note_num() == 9 * 8
    torch.manual_seed(0)
    written = model.generate(torch.tensor([ids[:60]]), max_new_tokens=240, do_sample=True)[0].tolist()
    tokens = tokenizer.base_tokens(written)
    while tokens[-1].split("_")[0] in ("Pitch", "PitchDrum", "Velocity"):  # a note cut off by the length
        tokens.pop()
    pitches = sum(token.startswith("Pitch") for token in tokens)
    assert pitches > 40 and tokenizer.decode_midi(written).note_num() == pitches
    assert "MASK_None" not in tokens


def test_shards_padding_and_half_precision(tmp_path, vocabulary):
    original = stock(tmp_path / "padded", vocabulary, padded=-len(vocabulary) % 64).bfloat16()
    original.save_pretrained(tmp_path / "padded", max_shard_size="40KB")
    (tmp_path / "padded" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="left out"):
        model, _ = convert(tmp_path / "padded")
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(vocabulary)
    ids = torch.randint(4, len(vocabulary), (1, 50))
    with torch.no_grad():
        expected = original.float()(ids).logits[..., : len(vocabulary)]
        assert (model.float()(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def refused(folder, match: str, **options):
    with pytest.raises(ConversionError, match=match):
        convert(folder, **options)


def test_what_cannot_be_said_is_refused(tmp_path, vocabulary, capsys):
    stock(tmp_path / "window", vocabulary, MistralConfig, sliding_window=64)
    refused(tmp_path / "window", "--context 64")
    assert convert(tmp_path / "window", context=64)[0].config.max_position_embeddings == 64
    qwen = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    stock(tmp_path / "layers", vocabulary, Qwen2Config, **qwen)
    refused(tmp_path / "layers", "--context 64")

    folder = tmp_path / "plain"
    stock(folder, vocabulary)
    (folder / "model.safetensors").rename(folder / "kept")
    refused(folder, "model.safetensors")
    (folder / "kept").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for change, match in (
        ({"model_type": "gpt2"}, "gpt2"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "unknown"),
        ({"attention_bias": True}, "missing"),
        ({"intermediate_size": 100}, "of another shape"),
        ({"hidden_act": "nope"}, "unknown activation 'nope'"),
        ({"model_type": ["llama"]}, r"\['llama'\]"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(folder, match)
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: not readable as JSON")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    refused(folder, "not of MidiTok")
    REMI(TokenizerConfig(use_programs=True, num_velocities=8)).save(folder / "tokenizer.json")
    refused(folder, "another vocabulary")
    REMI(TokenizerConfig(use_chords=True, use_programs=True)).save(folder / "tokenizer.json")
    refused(folder, "Chord")
    refused(tmp_path, "config.json")

    assert main([str(folder), str(tmp_path / "out")]) == 2
    assert "Chord" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["llama", "stranger"])
def test_python_beside_a_config_is_never_run(tmp_path, vocabulary, monkeypatch, model_type):
    """Nor is anyone asked: a `y` from a pipe would answer."""
    folder, trace = tmp_path / "stock", tmp_path / "it-ran"
    stock(folder, vocabulary)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "configuration_stranger.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig\nPath({str(trace)!r}).touch()\n\n\n"
        f"class StrangerConfig(LlamaConfig):\n    model_type = {model_type!r}\n"
    )
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": model_type, "auto_map": {"AutoConfig": "configuration_stranger.StrangerConfig"}}
    (folder / "config.json").write_text(json.dumps(fields))
    if model_type == "llama":
        convert(folder)
    else:
        refused(folder, "type 'stranger'")
    assert not trace.exists()


def test_how_to_sample_is_carried(tmp_path, vocabulary, capsys):
    """Not ids and lengths, and no values that mean nothing: with those, Transformers would not save the model."""
    folder = tmp_path / "stock"
    stock(folder, vocabulary)
    file = folder / "generation_config.json"
    others = {"forced_eos_token_id": 99, "suppress_tokens": [5], "max_length": 20, "eos_token_id": 99}
    file.write_text(json.dumps(others | {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "top_k": None}))
    assert main([str(folder), str(tmp_path / "greedy")]) == 0
    assert "temperature, top_p without do_sample: left out" in capsys.readouterr().err
    file.write_text(json.dumps(others | {"do_sample": True, "temperature": 0.9, "repetition_penalty": 1.1}))
    convert(folder, tmp_path / "sampled")
    for name, said in (
        ("greedy", (False, None, None, None)),
        ("sampled", (True, 0.9, None, 1.1)),
    ):
        model, tokenizer = load(tmp_path / name)
        kept = model.generation_config
        assert (kept.do_sample, kept.temperature, kept.top_p, kept.repetition_penalty) == said
        assert kept.forced_eos_token_id is kept.suppress_tokens is None and kept.max_length != 20
        assert kept.eos_token_id == tokenizer.eos_token_id
    file.write_text("[1]")
    refused(folder, "generation_config.json: no set of fields")


def test_a_folder_that_cannot_be_written_whole_is_not_written(tmp_path, vocabulary, monkeypatch, capsys):
    stock(tmp_path / "stock", vocabulary)

    def disk_full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(SageMusicTokenizer, "save_pretrained", disk_full)
    assert main([str(tmp_path / "stock"), str(tmp_path / "sage")]) == 2
    assert "no space left" in capsys.readouterr().err
    with pytest.raises(OSError, match="no space left"):
        convert(tmp_path / "stock", tmp_path / "sage")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_pooled_heads_begin_as_grouped_query_attention(tmp_path, vocabulary):
    """A attributes with equal projections compute what grouped-query attention with the pool does, cached too."""
    stock(tmp_path / "stock", vocabulary, Qwen3Config, num_key_value_heads=4, head_dim=8, attention_bias=True)
    model, _ = convert(tmp_path / "stock")
    pooled, grouped = (pool_heads(model, routing, kv_heads=2).double() for routing in ("token", "none"))
    first, second = (layer.self_attn.kv_weight for layer in (model.model.layers[0], grouped.model.layers[0]))
    mean = first[0].view(2, 2, 2, 8, 64).double().mean(2)  # keys and values of heads 0 and 1, 2 and 3
    torch.testing.assert_close(second[0].view(2, 2, 8, 64), mean, rtol=0, atol=1e-6)
    ids = torch.randint(4, len(vocabulary), (2, 80))
    with torch.no_grad():
        torch.testing.assert_close(pooled(ids).logits, grouped(ids).logits, rtol=1e-9, atol=1e-9)
    options = {"max_new_tokens": 40, "do_sample": False}
    assert torch.equal(pooled.generate(ids, **options), grouped.generate(ids, **options))
    with pytest.raises(ConversionError, match="divisor"):
        pool_heads(model, "token", kv_heads=3)
    with pytest.raises(ConversionError, match="already"):
        pool_heads(pooled, "head")


def test_the_command_pools_for_attributes(tmp_path, vocabulary, capsys):
    stock(tmp_path / "stock", vocabulary, Qwen2Config)
    assert main([str(tmp_path / "stock"), str(tmp_path / "sage"), "--attributes", "head"]) == 0
    model, tokenizer = load(tmp_path / "sage")
    assert model.config.kv_routing == "head" and model.config.num_key_value_heads == 1
    assert "uptrain" in capsys.readouterr().err
    assert isinstance(tokenizer, SageMusicTokenizer)
    assert main([str(tmp_path / "stock"), str(tmp_path / "sage")]) == 2


def test_one_attribute_already(tokenizer):
    with pytest.raises(ConversionError, match="already"):
        pool_heads(tiny_model(tokenizer, "head"), "token")


def test_adapters_merge_beside_biases_and_norms(tmp_path, vocabulary):
    pytest.importorskip("peft")
    from sage_studio.checkpoints.lora import add_lora, merge_lora

    stock(tmp_path / "stock", vocabulary, Qwen3Config, head_dim=8, attention_bias=True)
    model, _ = convert(tmp_path / "stock")
    adapted = add_lora(pool_heads(model, "token"), rank=2)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
        ids = torch.randint(4, len(vocabulary), (1, 40))
        expected = adapted.eval()(ids).logits
        merged = merge_lora(adapted)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, pool_heads(model, "token")(ids).logits, atol=0.1)
