"""vLLM itself, where it is installed: its Transformers backend serves an exported repository, tokens in, tokens out."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import band, tiny_model
from transformers import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sage_studio.publishing.export import export

NEW = 24
DOCS = Path(__file__).resolve().parents[2] / "docs/serving.md"
needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; docs/serving.md says how these tests are run with it"
)


@pytest.fixture(scope="module")
def pieces(tokenizer) -> list[list[int]]:
    """Prompts of unequal length: two that begin alike, one longer than a chunk of a prompt, BOS alone."""
    ids = [tokenizer.midi_to_ids(band(seed=seed)) for seed in (1, 2, 3)]
    return [ids[0][:30], ids[0][:90], ids[1][:57], ids[2][:200], ids[2][:5], [1]]


@pytest.fixture
def repository(tokenizer, tmp_path):
    """Exports a tiny model of a routing; gives the model and the folder. Heads are as wide as vLLM takes them."""

    def write(routing: str, **options):
        model = tiny_model(tokenizer, routing, head_dim=32, **options)
        model.save_pretrained(tmp_path / "checkpoint")
        tokenizer.save_pretrained(tmp_path / "checkpoint")
        folder = export(tmp_path / "checkpoint", tmp_path / "repository", license="apache-2.0", samples=False)
        return model, folder

    return write


@pytest.fixture
def serve(monkeypatch):
    """Starts vLLM in processes of its own; they end with the test."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))  # GB
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    engines = []

    def start(folder, **options):
        from vllm import LLM

        options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, **options}
        engine = LLM(
            str(folder), model_impl="transformers", skip_tokenizer_init=True, trust_remote_code=True, **options
        )
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()


def answers(engine, prompts: list[list[int]], **options) -> list:
    """What greedy vLLM answers to prompts (token ids), all at once."""
    from vllm import SamplingParams

    sampling = {"temperature": 0, "max_tokens": NEW, "stop_token_ids": [2], "detokenize": False, **options}
    prompts = [{"prompt_token_ids": ids} for ids in prompts]
    return [output.outputs[0] for output in engine.generate(prompts, SamplingParams(**sampling), use_tqdm=False)]


def alone(model, prompts: list[list[int]], grammar: bool = False) -> list[list[int]]:
    """What greedy `generate()` gives each prompt; vLLM by itself knows no grammar."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=2, pad_token_id=0, midi_grammar=grammar, use_cache=False
    )
    return [model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist() for ids in prompts]


@needs_vllm
@pytest.mark.parametrize(
    ("routing", "model_options", "options"),
    [
        ("token", {}, {}),
        ("token-gqa", {}, {"max_num_batched_tokens": 64, "max_num_seqs": 16, "enable_prefix_caching": False}),
        ("token-gqa", {"qk_norm": True, "attention_bias": True, "mlp_bias": True, "num_mtp_layers": 2}, {}),
        ("gqa", {}, {"max_num_batched_tokens": 64, "max_num_seqs": 16}),
    ],
    ids=["token", "token-gqa-in-chunks", "norms-biases-and-a-draft-head", "gqa"],
)
def test_vllm_gives_the_tokens_of_greedy_generate(repository, serve, pieces, routing, model_options, options):
    model, folder = repository(routing, **model_options)
    engine = serve(folder, **options)
    expected = alone(model, pieces)
    assert len({tuple(new) for new in expected}) == len(pieces)
    assert [list(output.token_ids) for output in answers(engine, pieces)] == expected
    # One at a time, and by now with beginnings that the prefix cache knows.
    for ids, new in zip(pieces, expected, strict=True):
        (output,) = answers(engine, [ids], logprobs=1)
        assert list(output.token_ids) == new
        with torch.no_grad():
            logprobs = model(torch.tensor([ids + new])).logits[0].log_softmax(-1)[len(ids) - 1 : -1]
        got = [chosen[token].logprob for chosen, token in zip(output.logprobs, new, strict=True)]
        want = logprobs.gather(1, torch.tensor(new)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(got), want, atol=1e-4, rtol=0)


@needs_vllm
def test_vllm_compiles_the_model(repository, serve, pieces):
    model, folder = repository("token")
    engine = serve(folder, enforce_eager=False)
    assert [list(output.token_ids) for output in answers(engine, pieces)] == alone(model, pieces)


@needs_vllm
def test_the_grammar_of_the_docs_gives_the_tokens_of_generate(repository, serve, pieces, tmp_path, monkeypatch):
    (code,) = [block for block in DOCS.read_text().split("```python\n") if "class MidiGrammar(" in block]
    (tmp_path / "midi_grammar_vllm.py").write_text(code.split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")  # where there is Triton: it has logits processors of its own
    model, folder = repository("token")
    engine = serve(folder, logits_processors=["midi_grammar_vllm:MidiGrammar"])
    expected = alone(model, pieces, grammar=True)
    assert expected != alone(model, pieces)
    assert [list(output.token_ids) for output in answers(engine, pieces)] == expected


@needs_vllm
def test_vllm_says_why_it_cannot_serve_head_routing(repository, serve, capfd):
    _, folder = repository("head")
    with pytest.raises(Exception, match="Engine core initialization failed"):
        serve(folder)
    assert "kv_routing='head' runs with attn_implementation" in "".join(capfd.readouterr())


def test_head_routing_is_refused_before_weights_are_read(tokenizer, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "engine", lambda *args, **kwargs: None)
    model = tiny_model(tokenizer, "head").model
    model.config._attn_implementation = "engine"
    with pytest.raises(ValueError, match=r"kv_routing='head' runs with.*not 'engine'.*kv_routing='token'"):
        type(model)(model.config)
