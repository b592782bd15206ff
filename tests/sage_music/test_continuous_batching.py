"""Serving by others: Transformers' continuous batching, and what an engine with its own attention and cache needs."""

import ast
import inspect
import textwrap
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from conftest import band, tiny_model, tiny_perceivers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sage_music.attention_sage_music import SageMusicAttention
from sage_music.batching_sage_music import RequestGrammarProcessor
from sage_music.generation_sage_music import MidiGrammarLogitsProcessor

NEW = 24


@pytest.fixture(scope="module")
def pieces(tokenizer) -> list[list[int]]:
    """Prompts of unequal length, the last the same as the first."""
    ids = [tokenizer.midi_to_ids(band(seed=seed)) for seed in (1, 2, 3)]
    return [ids[0][:30], ids[1][:57], ids[2][:5], ids[0][:30]]


def greedy(model, **options) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=model.config.eos_token_id, pad_token_id=0, **options
    )


def paged(**options) -> ContinuousBatchingConfig:
    """A small cache: sized by hand, or it takes most of the machine's memory. A long prompt comes in parts."""
    return ContinuousBatchingConfig(**{"page_size": 32, "num_blocks": 12, "max_batch_tokens": 40, **options})


def batched(model, prompts, config, **options) -> list[list[int]]:
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=paged(**options))
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()]


def alone(model, prompts, config) -> list[list[int]]:
    return [
        model.generate(torch.tensor([ids]), generation_config=config, use_cache=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]


@pytest.mark.parametrize("routing", ["token", "token-gqa", "mha"])
def test_a_batch_of_requests_gets_the_tokens_of_each_alone(tokenizer, pieces, routing):
    model = tiny_model(tokenizer, routing).double()
    for config in (greedy(model), greedy(model, midi_grammar=False)):
        expected = alone(model, pieces, config)
        assert batched(model, pieces, config) == expected
        assert model.config._attn_implementation == "sdpa"
    assert expected != alone(model, pieces, greedy(model))  # the grammar did something


def test_every_token_of_a_request_is_fed_once(tokenizer, pieces):
    """No token twice, none left out; what the pages hold shows in the tokens, which other tests compare."""
    model = tiny_model(tokenizer, "token").double()
    fed = []
    count = model.register_forward_pre_hook(
        lambda _, args, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    outputs = batched(model, pieces, greedy(model))
    count.remove()
    ended = [ids[-1] == model.config.eos_token_id for ids in outputs]
    assert [len(ids) == NEW or end for ids, end in zip(outputs, ended, strict=True)] == [True] * len(pieces)
    assert sum(fed) == sum(len(prompt) + len(ids) - 1 for prompt, ids in zip(pieces, outputs, strict=True))


def test_eager_attention_pages_too(tokenizer, pieces):
    model = tiny_model(tokenizer, "token").double()
    config = greedy(model)
    expected = alone(model, pieces, config)
    model.set_attn_implementation("eager")
    assert batched(model, pieces, config) == expected


def test_a_cache_too_small_for_all_requests_serves_them_one_after_the_other(tokenizer, pieces):
    model = tiny_model(tokenizer, "token").double()
    assert batched(model, pieces, greedy(model), num_blocks=4) == alone(model, pieces, greedy(model))


def test_sampled_requests_keep_the_grammar(tokenizer, pieces):
    model = tiny_model(tokenizer, "token")
    config = greedy(model)
    config.update(do_sample=True, temperature=1.5, top_p=0.95, max_new_tokens=60)
    grammar = MidiGrammarLogitsProcessor(model.config)
    for ids, new in zip(pieces, batched(model, pieces, config, seed=0), strict=True):
        assert new
        for end in range(len(ids), len(ids) + len(new)):
            sequence = torch.tensor([ids + new])
            assert grammar.allowed(sequence[:, :end])[0, sequence[0, end]]


@pytest.mark.parametrize("kind", ["tokenizer", "bpe_tokenizer"])
def test_a_request_s_number_says_what_the_grammar_reads_in_its_tokens(request, kind):
    tokenizer = request.getfixturevalue(kind)
    config = tiny_model(tokenizer, "token").config
    one, whole = RequestGrammarProcessor(config), MidiGrammarLogitsProcessor(config)
    ids = tokenizer.midi_to_ids(band(bars=3, seed=4))
    scores = torch.zeros(len(ids) + 1, config.vocab_size)
    numbers = [one.pack(ids[: end // 2], ids[end // 2 : end]) for end in range(1, len(ids) + 1)]
    got = one(scores, torch.tensor([*numbers, -1, 0, 0], dtype=torch.int32)) == 0
    expected = torch.cat([whole.allowed(torch.tensor([ids[:end]])) for end in range(1, len(ids) + 1)])
    assert torch.equal(got[:-1], expected)
    assert got[-1].all()  # a row that no request owns


def test_what_cannot_be_paged_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"kv_routing='head'.*kv_routing='token'"):
        tiny_model(tokenizer, "head").generate_batch([[1, 2]])
    with pytest.raises(ValueError, match="PerceiverS has no continuous batching"):
        tiny_perceivers().generate_batch([[1, 2]])
    model = tiny_model(tokenizer, "token")
    with pytest.raises(ValueError, match="use_async_batching"):
        model.generate_batch([[1]], continuous_batching_config=paged(use_async_batching=True))
    assert getattr(model.generation_config, "midi_grammar", True)  # as it was


@pytest.mark.parametrize("first", [True, False])
def test_a_kept_manager_is_not_used_with_the_other_grammar(tokenizer, pieces, first):
    model = tiny_model(tokenizer, "token").double()
    configs = {grammar: greedy(model, midi_grammar=grammar) for grammar in (True, False)}
    expected = {grammar: alone(model, pieces, config) for grammar, config in configs.items()}

    def kept(grammar: bool) -> list[list[int]]:
        outputs = model.generate_batch(pieces, configs[grammar], paged(), persistent_manager=True)
        return [output.generated_tokens for output in outputs.values()]

    assert kept(first) == expected[first]
    assert kept(first) == expected[first]  # the second time by the same manager
    with pytest.raises(ValueError, match=rf"midi_grammar={first}.*destroy_cached_continuous_batching_manager"):
        kept(not first)
    model.destroy_cached_continuous_batching_manager()
    assert kept(not first) == expected[not first]
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [([], "no tokens"), ([1, 99999], "id 99999"), ([-3, 1], "id -3")],
    ids=["empty", "high", "low"],
)
@pytest.mark.parametrize("grammar", [True, False])
def test_a_wrong_request_is_refused_and_ends_no_other(tokenizer, pieces, wrong, message, grammar):
    model = tiny_model(tokenizer, "token").double()
    config = greedy(model, midi_grammar=grammar)
    with pytest.raises(ValueError, match=f"prompt 1 .*{message}"):
        model.generate_batch([pieces[0], wrong], config, paged())
    with model.continuous_batching_context_manager(config, continuous_batching_config=paged()) as manager:
        name = manager.add_request(pieces[0])
        with pytest.raises(ValueError, match=f"request mine .*{message}"):
            manager.add_request(wrong, "mine")
        output = next(manager.request_id_iter(name))
    assert output.error is None and output.generated_tokens == alone(model, pieces[:1], config)[0]


@pytest.mark.filterwarnings("ignore:Passing ContinuousBatchingConfig:FutureWarning")
def test_a_cache_sized_in_the_generation_config_is_that_size(tokenizer):
    """Deprecated in Transformers; unread, the cache would take most of the machine's memory."""
    model = tiny_model(tokenizer, "token")
    manager = model.init_continuous_batching(greedy(model, continuous_batching_config=paged()))
    sizes = manager.continuous_batching_config
    assert (sizes.page_size, sizes.num_blocks, sizes.max_batch_tokens) == (32, 12, 40)
    with pytest.raises(ValueError, match="use_async_batching"):
        config = greedy(model, continuous_batching_config=paged(use_async_batching=True))
        model.init_continuous_batching(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs and FlashAttention cannot run")
def test_graphs_on_a_gpu_give_the_same_tokens(tokenizer, pieces):
    model = tiny_model(tokenizer, "token").cuda()
    expected = [
        model.generate(torch.tensor([ids]).cuda(), generation_config=greedy(model))[0, len(ids) :].tolist()
        for ids in pieces
    ]
    assert batched(model, pieces, greedy(model), use_cuda_graph=True, auto_switch_to_flash=False) == expected


# What follows stands in for vLLM, which `test_vllm.py` runs where it is installed: its Transformers backend builds
# `AutoModel` with the attention "vllm" and parameters on "meta", puts layers of its own in place of the linear ones and
# the norms, loads the weights by name, and calls the model with all requests' new tokens in one row, no mask and no
# cache of Transformers.


@dataclass
class EngineLayer:
    """One layer's attention with a cache of its own, request by request; vLLM's tensors: (tokens, heads * head_dim)."""

    kv_heads: int
    head_dim: int
    step: list[tuple[str, int]] = field(default_factory=list)  # what the row holds: request, number of tokens
    cache: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    scale: float = 0.0

    def forward(self, query, key, value):
        assert key.shape == value.shape == (query.shape[0], self.kv_heads * self.head_dim)
        outputs, begin = [], 0
        for request, count in self.step:
            part = slice(begin, begin := begin + count)
            self.cache[request].append(torch.stack((key[part], value[part])))
            keys, values = (
                states.view(1, -1, self.kv_heads, self.head_dim).transpose(1, 2)
                for states in torch.cat(self.cache[request], dim=1)
            )
            queries = query[part].view(1, count, -1, self.head_dim).transpose(1, 2)
            old = keys.shape[2] - count
            mask = torch.ones(count, keys.shape[2], dtype=torch.bool).tril(old)
            output = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=True
            )
            outputs.append(output.transpose(1, 2).reshape(count, -1))
        return torch.cat(outputs)


def engine_attention(
    module, query, key, value, attention_mask, scaling=None, attention_instances=None, past_key_values=None, **kwargs
):
    layer = attention_instances[module.layer_idx]
    assert attention_mask is None and past_key_values is None and scaling is not None and module.is_causal
    layer.scale = float(scaling)
    tokens = query.shape[-2]
    query, key, value = (states.transpose(1, 2).reshape(tokens, -1) for states in (query, key, value))
    return layer.forward(query, key, value), None


@contextmanager
def parameters_on_meta():
    """Parameters are not allocated; buffers are."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@pytest.fixture
def engine_name():
    ALL_ATTENTION_FUNCTIONS.register("vllm", engine_attention)
    yield "vllm"
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("vllm")


class EngineNorm(nn.Module):
    """A norm with the attributes of vLLM's, which are not those of `nn.RMSNorm`."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float64))
        self.variance_epsilon = eps

    def forward(self, x, residual=None):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


class Engine:
    """As much of vLLM's `TransformersForCausalLM` as can be told without vLLM."""

    def __init__(self, folder, attention: str):
        self.config = AutoConfig.from_pretrained(folder)
        self.config._attn_implementation = attention
        with parameters_on_meta():
            self.model = AutoModel.from_config(self.config, dtype=torch.float64).eval()
        assert self.model._supports_attention_backend
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    new = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                    setattr(module, name, new.double())
                elif type(child).__name__.endswith("RMSNorm"):
                    setattr(module, name, EngineNorm(len(child.weight), child.eps))
        self.load(load_file(folder / "model.safetensors"))
        kv_heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        self.layers = {i: EngineLayer(kv_heads, head_dim) for i in range(self.config.num_hidden_layers)}

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights.items():
            if any(name.startswith(known.strip("^\\.")) for known in self.model._keys_to_ignore_on_load_unexpected):
                continue
            parent, _, leaf = name.removeprefix("model.").rpartition(".")
            parameter = nn.Parameter(tensor.clone(), requires_grad=False)
            setattr(self.model.get_submodule(parent), leaf, parameter)
            assert parameters.pop(name.removeprefix("model.")).shape == tensor.shape
        assert not parameters

    @torch.no_grad()
    def step(self, requests: dict[str, list[int]]) -> torch.Tensor:
        """Logits (tokens, V) of all requests' new tokens, in one row."""
        seen = {name: sum(part.shape[1] for part in self.layers[0].cache[name]) for name in requests}
        for layer in self.layers.values():
            layer.step = [(name, len(ids)) for name, ids in requests.items()]
        outputs = self.model(
            input_ids=torch.tensor([[token for ids in requests.values() for token in ids]]),
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.tensor([[seen[name] + i for name, ids in requests.items() for i in range(len(ids))]]),
            attention_instances=self.layers,
            return_dict=False,
        )
        return outputs[0][0] @ self.model.get_input_embeddings().weight.T


@pytest.mark.parametrize("routing", ["token", "token-gqa", "gqa"])
def test_an_engine_s_attention_and_cache_give_plain_logits(tokenizer, pieces, routing, tmp_path, engine_name):
    more = {"qk_norm": True, "attention_bias": True, "mlp_bias": True} if routing == "token-gqa" else {}
    model = tiny_model(tokenizer, routing, num_mtp_layers=2, **more).double()
    model.save_pretrained(tmp_path)
    engine = Engine(tmp_path, engine_name)
    first, second, third = pieces[:3]
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0] for ids in (first, second, third)]
    # One prompt whole beside half of another; then the other half, two single tokens, and a new request.
    logits = engine.step({"a": first[:-2], "b": second[:20]})
    torch.testing.assert_close(logits, torch.cat((expected[0][:-2], expected[1][:20])), atol=1e-5, rtol=0)
    logits = engine.step({"b": second[20:], "a": first[-2:-1], "c": third})
    torch.testing.assert_close(
        logits, torch.cat((expected[1][20:], expected[0][-2:-1], expected[2])), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(engine.step({"a": first[-1:]}), expected[0][-1:], atol=1e-5, rtol=0)


def test_an_engine_decodes_what_generate_does(tokenizer, pieces, tmp_path, engine_name):
    model = tiny_model(tokenizer, "token").double()
    model.save_pretrained(tmp_path)
    engine = Engine(tmp_path, engine_name)
    names = ["a", "b", "c"]
    new = {name: [] for name in names}
    for _ in range(NEW):
        step = {name: new[name][-1:] or ids for name, ids in zip(names, pieces, strict=False)}
        ends = torch.tensor([len(ids) for ids in step.values()]).cumsum(0) - 1
        for name, token in zip(names, engine.step(step)[ends].argmax(-1).tolist(), strict=True):
            new[name].append(token)
    for name, expected in zip(names, alone(model, pieces, greedy(model, midi_grammar=False)), strict=False):
        assert new[name][: len(expected)] == expected  # an engine goes on after EOS until it is told


def test_an_engine_may_compile_the_whole_model(tokenizer, pieces, engine_name):
    """With sequences of several requests in a row, and without a break in the graph."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        heads = query.shape[1] // key.shape[1]
        return (query + key.repeat_interleave(heads, 1) * value.repeat_interleave(heads, 1)).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(engine_name, attention)
    model = tiny_model(tokenizer, "token").model
    model.set_attn_implementation(engine_name)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for parts in ([pieces[0], pieces[1]], [pieces[2], pieces[1][:9], pieces[0][:1]]):
        ids = torch.tensor([[token for part in parts for token in part]])
        positions = torch.tensor([[i for part in parts for i in range(len(part))]])
        with torch.no_grad():
            expected = model(ids, position_ids=positions, use_cache=False, return_dict=False)[0]
            got = compiled(ids, position_ids=positions, use_cache=False, return_dict=False)[0]
        torch.testing.assert_close(got, expected)


def test_head_routing_is_refused_by_an_engine_s_attention(tokenizer, engine_name):
    model = tiny_model(tokenizer, "head").model
    model.set_attn_implementation(engine_name)
    with pytest.raises(ValueError, match=r"kv_routing='head' runs with.*not 'vllm'.*kv_routing='token'"):
        model(torch.tensor([[1, 2, 3]]), position_ids=torch.arange(3)[None], use_cache=False)


def test_the_attention_module_calls_the_interface_once_in_its_forward():
    """Engines read the source of `forward` for the call, and for the scale that it passes."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(SageMusicAttention.forward)))
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
        for target in ([node.target] if isinstance(node, ast.AnnAssign) else node.targets)
    }
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) in names]
    assert len(calls) == 1
    assert ["self.scaling"] == [ast.unparse(word.value) for word in calls[0].keywords if word.arg == "scaling"]


def test_token_codes_are_made_on_the_default_device(tokenizer):
    with torch.device("meta"):
        model = tiny_model(tokenizer, "token")
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
