"""The decode step computes what the modules compute, and steps aside where somebody listens to a module."""

import copy
import shutil

import pytest
import torch
from conftest import tiny_model
from torch import nn
from transformers import CompileConfig

from sage_music import SageMusicCache, decoding_sage_music
from sage_music.decoding_sage_music import DecodeStep

ROUTED = ["head", "head-uneven"]


def logits_of(model, ids, sizes, step, mask=None):
    """Logits of everything after the first piece, piece by piece on one cache."""
    cache, start, parts = SageMusicCache(model.config), 0, []
    for size in sizes:
        seen = None if mask is None else mask[:, : start + size]
        with torch.no_grad():
            piece = model(ids[:, start : start + size], attention_mask=seen, past_key_values=cache, use_cache=True)
        parts.append(piece.logits)
        cache.step = step
        start += size
    return torch.cat(parts[1:], dim=1), cache


@pytest.mark.parametrize("routing", ROUTED)
@pytest.mark.parametrize("sizes", [[60] + [1] * 30, [50, 4, 1, 16, 2]], ids=["tokens", "pieces"])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_step_equals_the_modules(tokenizer, prompts, routing, sizes, rows):
    model = tiny_model(tokenizer, routing).double()
    ids, mask = prompts[-rows:].clone(), torch.ones_like(prompts[-rows:])
    ids[-1, :9], mask[-1, :9] = 0, 0  # padded on the left
    expected, plain = logits_of(model, ids, sizes, None, mask)
    got, cache = logits_of(model, ids, sizes, DecodeStep(model.model), mask)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    assert cache.get_seq_length() == plain.get_seq_length() and torch.equal(cache.lengths, plain.lengths)


@pytest.mark.parametrize("routing", ROUTED)
def test_the_step_knows_biases_and_norms_of_queries_and_keys(tokenizer, prompts, routing):
    switches = ("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm")
    model = tiny_model(tokenizer, routing, **dict.fromkeys(switches, True))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                weight.add_(torch.randn_like(weight) * 0.3)
    model.double()
    for sizes in ([60] + [1] * 30, [50, 4, 1, 16, 2]):
        expected, _ = logits_of(model, prompts, sizes, None)
        got, _ = logits_of(model, prompts, sizes, DecodeStep(model.model))
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_single_precision_differs_by_rounding_alone(tokenizer, prompts):
    model = tiny_model(tokenizer, "head", initializer_range=0.1)
    expected, _ = logits_of(model, prompts[:1], [60] + [1] * 30, None)
    got, _ = logits_of(model, prompts[:1], [60] + [1] * 30, DecodeStep(model.model))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_generate_decodes_by_the_step(tokenizer, prompts, monkeypatch):
    model, lengths = tiny_model(tokenizer, "head"), []
    whole = DecodeStep.__call__
    monkeypatch.setattr(
        DecodeStep, "__call__", lambda self, ids, *rest: lengths.append(ids.shape[1]) or whole(self, ids, *rest)
    )
    model.generate(prompts, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert lengths == [1] * 5  # the first token comes from the prefill
    lengths.clear()
    model.generate(prompts[:1], do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=4)
    assert 1 < max(lengths) <= 5


def test_hooks_and_requested_outputs_are_served(tokenizer, prompts):
    model = tiny_model(tokenizer, "head")
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = model.generate(prompts[:1], **options)
    outputs = model.generate(prompts[:1], **options, output_hidden_states=True, return_dict_in_generate=True)
    assert torch.equal(outputs.sequences, expected)
    assert len(outputs.hidden_states) == 5 and len(outputs.hidden_states[1]) == 3  # embedding and two layers
    seen = {"layer": 0, "linear": 0}

    def listener(name):
        def count(*_):
            seen[name] += 1

        return count

    with_linear = model.model.layers[0].mlp.up_proj.register_forward_hook(listener("linear"))
    assert torch.equal(model.generate(prompts[:1], **options), expected)
    with_linear.remove()
    with_layer = model.model.layers[1].register_forward_pre_hook(listener("layer"))
    assert torch.equal(model.generate(prompts[:1], **options), expected)
    with_layer.remove()
    assert seen == {"layer": 5, "linear": 5}


@pytest.mark.parametrize("name", ["model.layers.1", "model.layers.0.mlp.down_proj", "model.norm"])
def test_a_forward_put_on_a_module_is_run(tokenizer, prompts, name):
    model = tiny_model(tokenizer, "head")
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    expected = model.generate(prompts[:1], **options)
    module, calls = model.get_submodule(name), []
    whole = module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs)
    assert torch.equal(model.generate(prompts[:1], **options), expected) and len(calls) == 6


class Adapted(nn.Module):
    """A linear layer in a wrapper, as adapters do it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.shift = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, states):
        return self.base_layer(states) + self.shift(states)


def test_replaced_modules_and_changed_weights_count(tokenizer, prompts):
    model = tiny_model(tokenizer, "head", initializer_range=0.1)
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    step = None
    for change in ("replaced", "scaled in place", "scaled behind the version counter", "exchanged"):
        weight = model.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():
            if change == "scaled in place":
                weight.mul_(2)
            elif change == "scaled behind the version counter":
                weight.data.mul_(2)
            elif change == "exchanged":
                weight.data = weight.data / 3
        old, step = step, DecodeStep.of(model.model, step, None)
        assert (step is old) == (old is not None)
        expected, _ = logits_of(model, prompts, [60] + [1] * 8, None)
        got, _ = logits_of(model, prompts, [60] + [1] * 8, step)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("small", [0, 2**19])
@pytest.mark.parametrize("sizes", [[60] + [1] * 30, [50, 4, 1, 16, 2]], ids=["tokens", "pieces"])
def test_both_ways_to_multiply(tokenizer, prompts, monkeypatch, small, sizes):
    monkeypatch.setattr(decoding_sage_music, "SMALL_WEIGHT", small)
    model = tiny_model(tokenizer, "head", initializer_range=0.1)
    expected, _ = logits_of(model, prompts[:1], sizes, None)
    got, _ = logits_of(model, prompts[:1], sizes, DecodeStep(model.model))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_a_model_that_changed_between_two_calls_decodes_as_it_is_now(tokenizer, prompts):
    model = tiny_model(tokenizer, "head")
    options = {"do_sample": False, "max_new_tokens": 8}
    model.generate(prompts[:1], **options)
    model.double()
    expected = model.generate(prompts[:1], **options, use_cache=False)
    assert torch.equal(model.generate(prompts[:1], **options), expected)
    model.model.layers[0].mlp.down_proj = nn.Linear(96, 64, bias=True).double()
    expected = model.generate(prompts[:1], **options, use_cache=False)
    assert torch.equal(model.generate(prompts[:1], **options), expected)
    heard = []
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: heard.append(1))
    assert torch.equal(model.generate(prompts[:1], **options), expected) and len(heard) >= 8


def test_decoding_leaves_the_weights_alone(tokenizer, prompts):
    model = tiny_model(tokenizer, "head")
    before = {name: (value.data_ptr(), value.stride(), value.clone()) for name, value in model.named_parameters()}
    model.generate(prompts[:1], max_new_tokens=5)
    for name, value in model.named_parameters():
        address, stride, copied = before[name]
        assert (value.data_ptr(), value.stride()) == (address, stride) and torch.equal(value, copied)


def test_compiled_once_for_all_lengths(tokenizer, prompts):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    model = tiny_model(tokenizer, "head")
    options = {"do_sample": False, "eos_token_id": None}
    compiled = {**options, "compile_config": CompileConfig(fullgraph=True, options={"cpp_wrapper": False})}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length, new in ((30, 100), (100, 60), (5, 20)):
        prompt = prompts[:1, :length]
        expected = model.generate(prompt, **options, max_new_tokens=new)
        assert torch.equal(model.generate(prompt, **compiled, max_new_tokens=new), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    drafted = model.generate(prompts[:1, :40], **compiled, max_new_tokens=60, prompt_lookup_num_tokens=4)
    assert torch.equal(drafted, model.generate(prompts[:1, :40], **options, max_new_tokens=60))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # several tokens at a time are not compiled
    assert not copy.deepcopy(model)._decode_step and model._decode_step


def test_where_nothing_can_be_compiled_decoding_goes_on_and_says_so(tokenizer, prompts):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    model = tiny_model(tokenizer, "head")
    options = {"do_sample": False, "max_new_tokens": 10}
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="uncompiled.*no compiler here"):
        got = model.generate(prompts[:1], **options, compile_config=CompileConfig(backend=broken))
    assert torch.equal(got, model.generate(prompts[:1], **options))
