"""Attention: implementations agree, gradients are exact, and routing means what it says."""

import pytest
import torch
from conftest import tiny_model
from transformers.utils import is_torch_flex_attn_available

from sage_music.attention_sage_music import HIDDEN, CompactAttention, compact_attention


def test_eager_equals_sdpa(model, prompts):
    with torch.no_grad():
        expected = model(prompts).logits
        model.set_attn_implementation("eager")
        got = model(prompts).logits
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not is_torch_flex_attn_available(), reason="this PyTorch has no flex_attention")
def test_flex_attention_equals_sdpa(tokenizer, prompts, fixed_shapes):
    model = tiny_model(tokenizer, "head", head_dim=16)
    with torch.no_grad():
        expected = model(prompts).logits
        model.set_attn_implementation("flex_attention")
        got = model(prompts).logits
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("routing", ["head", "head-uneven"])
def test_fused_compact_attention_has_the_reference_gradients(tokenizer, routing):
    ids = torch.randint(3, tokenizer.vocab_size, (2, 700), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = tokenizer.bos_token_id
    grads = {}
    for implementation in ("sdpa", "eager"):
        model = tiny_model(tokenizer, routing, initializer_range=0.1).train()
        model.set_attn_implementation(implementation)
        model(ids, labels=ids).loss.backward()
        grads[implementation] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in grads["eager"].items():
        torch.testing.assert_close(grads["sdpa"][name], expected, atol=1e-5, rtol=1e-3, msg=name)


def test_fused_and_plain_compact_attention_agree():
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = [random(2, 6, 9, 8), random(2, 6, 5, 8), random(2, 6, 5, 8), random(2, 6, 9, 8), random(2, 6, 9, 8)]
    own = torch.rand(2, 6, 9, generator=generator) < 0.5
    visible = torch.rand(2, 6, 9, 5, generator=generator) < 0.6
    visible[:, :, 0], own[:, :, 0] = False, True  # a query that reads nothing but itself
    visible[..., 0] |= ~own
    bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, HIDDEN)
    outputs, grads = [], []
    for attention in (CompactAttention.apply, compact_attention):
        outputs.append(attention(*inputs, own, bias, 0.3))
        grads.append(torch.autograd.grad(outputs[-1].square().sum(), inputs))
    # The plain one takes its softmax in float32.
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_head_routing_reads_its_own_attribute_bos_and_itself(tokenizer):
    """Attention weights of every head group, against the rule of the paper's attribute-grouped heads."""
    model = tiny_model(tokenizer, "head", num_hidden_layers=1)
    model.set_attn_implementation("eager")
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(
        ["BOS_None", "Bar_None", "TimeSig_4/4", "Position_0", "Program_0", "Pitch_60", "Velocity_79", "Duration_1.0.12",
         "Program_33", "Pitch_40", "Velocity_63", "Duration_0.6.12", "Position_12", "Program_0", "Pitch_64"]
    )])  # fmt: skip
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[0][0]  # (H, T, T)
    attribute = torch.tensor(model.config.token_attribute_ids)[ids[0]]
    first = 0
    for group, size in enumerate(model.config.query_heads_per_attribute):
        read = weights[first : first + size].amax(0) > 0
        for query in range(ids.shape[1]):
            expected = [k for k in range(query + 1) if attribute[k] == group or k == 0 or k == query]
            assert read[query].nonzero().flatten().tolist() == expected
        first += size


def test_token_routing_projects_each_token_by_its_attribute(tokenizer, prompts):
    """With all attributes' projections made equal, token routing is plain multi-query attention."""
    routed, plain = tiny_model(tokenizer, "token"), tiny_model(tokenizer, "mqa")
    state = plain.state_dict()
    state = {k: v.expand(5, -1, -1).clone() if k.endswith("kv_weight") else v for k, v in state.items()}
    routed.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(routed(prompts).logits, plain(prompts).logits, atol=1e-4, rtol=1e-4)
        routed.model.layers[0].self_attn.kv_weight[2] += 1.0  # pitch tokens only
        assert not torch.allclose(routed(prompts).logits[:, 10:], plain(prompts).logits[:, 10:], atol=1e-2)


def test_flash_attention_is_refused_for_head_routing(tokenizer, prompts):
    model = tiny_model(tokenizer, "head")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        model(prompts, use_cache=False)
