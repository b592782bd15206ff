"""SAGE-Music with one attribute goes out to a GGUF file: read back by `gguf`, Transformers and, if there, llama.cpp.

Without the `gguf` package only the error that says so is tested; without `llama_cpp` all but llama.cpp itself.
"""

import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import band, notes_of
from miditok import REMI
from symusic import Score
from test_convert_to_llama import varied
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conversion import convert_to_gguf
from conversion.convert_to_gguf import DTYPES, VOCABULARY, convert, main
from conversion.weights import ConversionError
from sage_music import SageMusicConfig, SageMusicTokenizer
from sage_music.generation_sage_music import MidiGrammarLogitsProcessor

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

needs_gguf = pytest.mark.skipif(convert_to_gguf.gguf is None, reason="the gguf package is not installed")
needs_llama_cpp = pytest.mark.skipif(llama_cpp is None, reason="llama-cpp-python is not installed")
SERVING = Path(__file__).parents[2] / "docs" / "serving.md"

BIASES = {"attention_bias": True, "mlp_bias": True}
THETA = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
KINDS = {
    "full heads": ("mha", {}),
    "grouped, untied": ("gqa", {"tie_word_embeddings": False, "rope_parameters": THETA}),
    "multi-query": ("mqa", {"rms_norm_eps": 1e-3}),
    "wide heads": ("gqa", {"head_dim": 12}),
    "biases": ("gqa", {**BIASES, "attention_output_bias": True}),
    "output bias": ("mqa", {"attention_output_bias": True, "head_dim": 12}),
}
# Transformers reads no scaling from a GGUF: these are for llama.cpp alone.
SCALED = {
    "linear": ("gqa", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama3": ("gqa", {"rope_parameters": LLAMA3, **BIASES}),
    "yarn": (
        "mha",
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


def saved(folder, tokenizer, routing: str = "gqa", **options):
    """A model and the folder that it is saved in."""
    model = varied(tokenizer, routing, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def value(reader, key: str):
    return reader.fields[key].contents()


def unpacked(tensor) -> np.ndarray:
    return convert_to_gguf.gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@needs_gguf
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_model(tmp_path, tokenizer, kind):
    routing, options = KINDS[kind]
    model = saved(tmp_path / "sage", tokenizer, routing, **options)
    llama = convert(tmp_path / "sage", tmp_path / "model.gguf")
    biases = {name: getattr(llama.config, name) for name in ("attention_bias", "mlp_bias")}
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **biases)
    assert type(found) is LlamaForCausalLM and found.config.rope_parameters == llama.config.rope_parameters
    ids = torch.tensor([tokenizer.midi_to_ids(band(seed=seed))[:120] for seed in (1, 2)])
    with torch.no_grad():
        expected = model(ids).logits
        assert (found.eval()(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@needs_gguf
def test_the_metadata_is_whole(tmp_path, bpe_tokenizer):
    options = {"head_dim": 12, "rms_norm_eps": 1e-4, "rope_parameters": THETA, "max_position_embeddings": 777}
    saved(tmp_path / "music", bpe_tokenizer, "gqa", **options)
    (tmp_path / "music" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    assert main([str(tmp_path / "music"), str(tmp_path / "new" / "model.gguf")]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.gguf"]
    reader = convert_to_gguf.gguf.GGUFReader(tmp_path / "new" / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "music",
        "general.license": "cc-by-4.0",
        "general.file_type": 0,
        "llama.vocab_size": bpe_tokenizer.vocab_size,
        "llama.context_length": 777,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 12,
        "llama.attention.value_length": 12,
        "llama.rope.dimension_count": 12,
        "llama.rope.freq_base": 5e5,
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-4)
    (tmp_path / "miditok.json").write_text(value(reader, VOCABULARY))
    again = SageMusicTokenizer(str(tmp_path / "miditok.json"))
    assert again.get_vocab() == bpe_tokenizer.get_vocab()
    ids = bpe_tokenizer.midi_to_ids(band())
    assert again.midi_to_ids(band()) == ids and notes_of(again.decode_midi(ids)) == notes_of(band())


@needs_gguf
def test_its_license_is_that_of_what_it_was_made_from(tmp_path, tokenizer, capsys):
    """Also where training or a conversion has written it down; and that it is out of reach is said."""
    saved(tmp_path / "music", tokenizer, "mqa")
    for number, (row, expected) in enumerate(
        (
            ({"name": "user/base", "license": "cc-by-nc-sa-4.0"}, "cc-by-nc-sa-4.0"),
            ({"name": "user/base", "license": None, "seen": False}, "mit"),
        )
    ):
        (tmp_path / "music" / "README.md").write_text("---\nlicense: mit\n---\n")
        (tmp_path / "music" / "provenance.json").write_text(json.dumps({"made_from": [row]}))
        assert main([str(tmp_path / "music"), str(tmp_path / f"{number}.gguf")]) == 0
        reader = convert_to_gguf.gguf.GGUFReader(tmp_path / f"{number}.gguf")
        assert value(reader, "general.license") == expected
        assert ("note: user/base, which" in capsys.readouterr().err) == (expected == "mit")


@needs_gguf
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_within_the_rounding_of_its_dtype(tmp_path, tokenizer, dtype):
    saved(tmp_path / "sage", tokenizer, "gqa", tie_word_embeddings=False, **BIASES)
    convert(tmp_path / "sage", tmp_path / "whole.gguf")
    convert(tmp_path / "sage", tmp_path / "model.gguf", dtype)
    whole, found = (
        {tensor.name: tensor for tensor in convert_to_gguf.gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("whole.gguf", "model.gguf")
    )
    assert whole.keys() == found.keys() and "output.weight" in found and "blk.1.attn_k.bias" in found
    for name, tensor in found.items():
        expected, values = unpacked(whole[name]), unpacked(tensor)
        if expected.ndim == 1 or dtype == "float32":
            assert np.array_equal(values, expected), name
            continue
        assert tensor.tensor_type.name == DTYPES[dtype][0], name
        if dtype == "q8_0":  # half a step of the block's scale, which is rounded to float16 itself
            blocks = np.abs(expected.reshape(-1, 32))
            bound = (blocks.max(-1, keepdims=True) * (0.5 + 127 * 2**-11) / 127 + 1e-7).repeat(32, -1)
            bound = bound.reshape(expected.shape)
        else:
            bound = np.abs(expected) * {"float16": 2**-11, "bfloat16": 2**-8}[dtype] + 2**-25
        assert (np.abs(values - expected) <= bound).all(), name
    kinds = {"float32": 4, "float16": 2, "bfloat16": 2, "q8_0": 34 / 32}
    size = sum(tensor.n_bytes for tensor in found.values() if len(tensor.shape) > 1)
    assert size == kinds[dtype] * sum(tensor.n_elements for tensor in found.values() if len(tensor.shape) > 1)


@needs_gguf
def test_q8_0_gives_nearly_the_same_logits_in_transformers(tmp_path, tokenizer):
    model = saved(tmp_path / "sage", tokenizer, "gqa", initializer_range=0.05)
    convert(tmp_path / "sage", tmp_path / "model.gguf", "q8_0")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    ids = torch.tensor([tokenizer.midi_to_ids(band())[:120]])
    with torch.no_grad():
        expected = model(ids).logits
        assert (found(ids).logits - expected).norm() <= 0.02 * expected.norm()


@needs_gguf
def test_rows_that_have_no_blocks_are_in_float16(tmp_path, tokenizer):
    saved(tmp_path / "sage", tokenizer, "mqa", hidden_size=48, intermediate_size=96)
    convert(tmp_path / "sage", tmp_path / "model.gguf", "q8_0")
    tensors = {tensor.name: tensor for tensor in convert_to_gguf.gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"  # rows of 96
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "F16"  # rows of 48


@needs_gguf
def test_scaled_rotary_positions_are_a_table_of_divisors(tmp_path, tokenizer):
    for kind, (routing, options) in SCALED.items():
        saved(tmp_path / kind, tokenizer, routing, **options)
        llama = convert(tmp_path / kind, tmp_path / f"{kind}.gguf")
        reader = convert_to_gguf.gguf.GGUFReader(tmp_path / f"{kind}.gguf")
        (divisors,) = (tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
        frequencies = 1e4 ** (-np.arange(0, 8, 2) / 8) / divisors
        np.testing.assert_allclose(frequencies, llama.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
        factor = "llama.rope.scaling.attn_factor"
        assert (factor in reader.fields) == (kind == "yarn")
        if kind == "yarn":
            assert value(reader, factor) == pytest.approx(1 + 0.1 * np.log(4.0))
        else:
            assert llama.model.rotary_emb.attention_scaling == 1


@needs_gguf
def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, tokenizer, capsys):
    output = tmp_path / "model.gguf"

    def refused(checkpoint, *options):
        capsys.readouterr()
        assert main([str(checkpoint), str(output), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "kv_routing" in refused("sage-music")
    assert "no such folder" in refused(tmp_path / "nothing")
    saved(tmp_path / "gelu", tokenizer, hidden_act="gelu")
    assert "'gelu'" in refused(tmp_path / "gelu")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    saved(tmp_path / "dynamic", tokenizer, rope_parameters=dynamic)
    assert "'dynamic'" in refused(tmp_path / "dynamic")
    model = varied(tokenizer, "gqa")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    assert "float16" in refused(tmp_path / "large", "--dtype", "float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dynamic", "gelu", "large"]  # nothing half written
    with pytest.raises(ConversionError, match="q4_0"):
        convert(tmp_path / "large", output, "q4_0")
    assert main([str(tmp_path / "large"), str(output), "--dtype", "bfloat16"]) == 0
    written = output.read_bytes()
    assert "there already" in refused(tmp_path / "large")
    assert output.read_bytes() == written


@needs_gguf
def test_a_draft_head_is_left_out_with_a_remark(tmp_path, tokenizer, capsys):
    saved(tmp_path / "sage", tokenizer, num_mtp_layers=2)
    assert main([str(tmp_path / "sage"), str(tmp_path / "model.gguf"), "--name", "Band"]) == 0
    assert value(convert_to_gguf.gguf.GGUFReader(tmp_path / "model.gguf"), "general.name") == "Band"
    assert "draft head" in capsys.readouterr().err


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert_to_gguf, "gguf", None)
    assert main(["sage-music", str(tmp_path / "model.gguf")]) == 2
    assert "pip install gguf" in capsys.readouterr().err


def llama_of(path, **options):
    """llama.cpp with a cache in float32, as ours is; its default is float16."""
    return llama_cpp.Llama(
        str(path), n_ctx=1024, verbose=False, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, **options
    )


@needs_gguf
@needs_llama_cpp
@pytest.mark.parametrize("kind", [*KINDS, *SCALED])
def test_llama_cpp_computes_the_same(tmp_path, tokenizer, kind):
    routing, options = {**KINDS, **SCALED}[kind]
    model = saved(tmp_path / "sage", tokenizer, routing, **options)
    convert(tmp_path / "sage", tmp_path / "model.gguf")
    ids = tokenizer.midi_to_ids(band(), bars=4)
    llama = llama_of(tmp_path / "model.gguf", logits_all=True)
    llama.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    difference = (torch.tensor(llama.scores[: len(ids)]) - expected).abs().max()
    print(f"{kind}: {len(ids)} tokens, logits up to {expected.abs().max():.2f}, difference {difference:.2e}")
    assert difference <= 1e-3
    model.generation_config.midi_grammar = False
    written = model.generate(torch.tensor([ids]), max_new_tokens=200, do_sample=False, eos_token_id=None)
    assert list(islice(llama.generate(ids, temp=0.0), 200)) == written[0, len(ids) :].tolist()


@needs_gguf
@needs_llama_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_llama_cpp_runs_every_dtype(tmp_path, tokenizer, dtype):
    model = saved(tmp_path / "sage", tokenizer, initializer_range=0.1)
    convert(tmp_path / "sage", tmp_path / "model.gguf", dtype)
    ids = tokenizer.midi_to_ids(band(), bars=4)
    llama = llama_of(tmp_path / "model.gguf", logits_all=True)
    llama.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    error = (torch.tensor(llama.scores[: len(ids)]) - expected).norm() / expected.norm()
    print(f"{dtype}: relative error {error:.2e}")
    assert error <= {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "q8_0": 5e-2}[dtype]


@needs_gguf
@needs_llama_cpp
@pytest.mark.parametrize("vocabulary", ["tokenizer", "bpe_tokenizer"])
def test_the_way_of_the_docs_from_midi_to_midi(tmp_path, vocabulary, request, monkeypatch):
    """The Python block of `docs/serving.md` as it stands, on random weights: only the grammar keeps order."""
    section = SERVING.read_text(encoding="utf-8").split("## llama.cpp (GGUF)\n")[1].split("\n## ")[0]
    tokenizer = request.getfixturevalue(vocabulary)
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    saved(tmp_path / "sage", tokenizer, "gqa")
    monkeypatch.chdir(tmp_path)
    convert("sage", "music.gguf", "q8_0")
    band().dump_midi("prompt.mid")
    names: dict = {}
    exec(code, names)  # our own documentation
    prompt, ids = tokenizer.midi_to_ids("prompt.mid", bars=4), names["ids"]
    assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)
    assert REMI(params=Path("miditok.json")).vocab == tokenizer.miditok.vocab
    grammar = MidiGrammarLogitsProcessor(SageMusicConfig(**tokenizer.config_fields()))
    for end in range(len(prompt), len(ids)):
        assert grammar.allowed(torch.tensor([ids[:end]]))[0, ids[end]]
    complete = sum(token.startswith("Duration") for token in tokenizer.base_tokens(ids))
    assert complete == tokenizer.decode_midi(ids).note_num() and Score("out.mid").note_num() > 0
