"""Attention: implementations agree, gradients are exact, routing means what it says, and packed pieces stay apart."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import ROUTINGS, band, tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torch_flex_attn_available

from sage_music import attention_sage_music
from sage_music.attention_sage_music import HIDDEN, CompactAttention, compact_attention

# Tokens of the pieces of two packed rows: blocks begin inside pieces and at their edges; one piece is BOS alone.
ROWS = ((130, 20, 60, 1, 49), (64, 64, 132))


@pytest.fixture(scope="session")
def packed(tokenizer):
    """Arguments of a batch of two rows, (2, 260) each, and where its pieces are, as (row, slice)."""
    pieces, where, seed = [], [], 0
    for row, sizes in enumerate(ROWS):
        begin = 0
        for size in sizes:
            seed += 1
            pieces.append(tokenizer.midi_to_ids(band(seed=seed))[:size])
            where.append((row, slice(begin, begin + size)))
            begin += size
    ids, positions = (torch.zeros(2, sum(ROWS[0]), dtype=torch.int64) for _ in range(2))
    for piece, (row, part) in zip(pieces, where, strict=True):
        ids[row, part], positions[row, part] = torch.tensor(piece), torch.arange(len(piece))
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}, where


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_sage_music, "PACKED_BLOCK", 32)


def test_eager_equals_sdpa(model, prompts):
    with torch.no_grad():
        expected = model(prompts).logits
        model.set_attn_implementation("eager")
        got = model(prompts).logits
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not is_torch_flex_attn_available(), reason="this PyTorch has no flex_attention")
@pytest.mark.parametrize("length", [17, 40, 88, 104, 120])
def test_flex_attention_equals_sdpa(model, prompts, uncompiled_flex, length):
    with torch.no_grad():
        expected = model(prompts[:, :length]).logits
        model.set_attn_implementation("flex_attention")
        got = model(prompts[:, :length]).logits
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


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


def biased(tokenizer, routing: str, **options):
    """With all biases, and norms of queries and keys, none of them at its beginning."""
    switches = ("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm")
    model = tiny_model(tokenizer, routing, **dict.fromkeys(switches, True), **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                weight.add_(torch.randn_like(weight) * 0.5)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_biases_and_norms_are_the_same_cached_and_uncached(tokenizer, prompts, routing, implementation):
    model = biased(tokenizer, routing).double()
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(prompts)
    if implementation == "sdpa":  # eager's softmax is float32, in which a padded row of a float64 mask is undefined
        mask[1, :9] = 0
    with torch.no_grad():
        whole = model(prompts, attention_mask=mask).logits
        cache, parts, start = None, [], 0
        for size in (60, 25, *[1] * 10, 4, 21):  # many tokens, few of them, and one
            seen = mask[:, : start + size]
            piece = model(prompts[:, start : start + size], attention_mask=seen, past_key_values=cache, use_cache=True)
            cache, start = piece.past_key_values, start + size
            parts.append(piece.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)


def test_an_attribute_has_its_own_bias_and_shares_the_norm(tokenizer, prompts):
    model = biased(tokenizer, "token")
    attention, seen = model.model.layers[0].self_attn, {}
    attention.register_forward_pre_hook(lambda module, args: seen.update(states=args[0], plan=args[1]))
    with torch.no_grad():
        model(prompts)
        states, ids = seen["states"], seen["plan"].attribute_ids
        weight, bias = attention.kv_weight[ids], attention.kv_bias[ids]  # (B, T, 2 * d, hidden), (B, T, 2 * d)
        key, value = ((weight @ states[..., None])[..., 0] + bias).chunk(2, dim=-1)
        key = key / (key.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.k_norm.weight
        found = attention.project_kv(states, seen["plan"])
    torch.testing.assert_close(found.flatten(2), torch.cat((key, value), dim=-1), atol=1e-4, rtol=1e-4)
    assert ids.unique().numel() > 3


def test_biases_and_norms_train_under_autocast(tokenizer, prompts):
    model = biased(tokenizer, "head", initializer_range=0.02).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(prompts, labels=prompts).loss.backward()
    silent = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert silent == []


def test_flash_attention_is_refused_for_head_routing(tokenizer, prompts):
    model = tiny_model(tokenizer, "head")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        model(prompts, use_cache=False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_packed_pieces_get_what_they_get_alone(tokenizer, packed, routing, implementation, small_blocks):
    batch, where = packed
    items = int((batch["labels"] != -100).sum())
    logits, grads = [], []
    for alone in (True, False):
        model = tiny_model(tokenizer, routing, initializer_range=0.1).train()
        model.set_attn_implementation(implementation)
        if alone:
            outputs = [model(batch["input_ids"][None, row, part], labels=batch["labels"][None, row, part],
                             num_items_in_batch=items) for row, part in where]  # fmt: skip
            # The loss of BOS alone is of no tokens at all.
            sum(out.loss for out in outputs if out.logits.shape[1] > 1).backward()
            logits.append(torch.cat([out.logits[0] for out in outputs]))
        else:
            out = model(**batch, num_items_in_batch=items)
            out.loss.backward()
            logits.append(torch.cat([out.logits[row, part] for row, part in where]))
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("routing", ["head", "head-uneven", "token", "mqa"])
def test_no_piece_hears_another(model_of, packed, routing, implementation):
    """The gradient of a piece's logits by what other pieces of its row are made of is zero: not small, zero."""
    batch, where = packed
    model = model_of(routing, implementation)
    embeds = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
    codes = None if model.model.token_codes is None else model.model.token_codes[batch["input_ids"]]
    logits = model(inputs_embeds=embeds, attribute_ids=codes, position_ids=batch["position_ids"]).logits
    for row, part in where:
        (grad,) = torch.autograd.grad(logits[row, part].square().sum(), embeds, retain_graph=True)
        heard = grad.abs().sum(-1) > 0
        assert heard[row, part].all()
        assert heard.sum() == part.stop - part.start


@pytest.fixture
def model_of(tokenizer, small_blocks):
    def make(routing, implementation):
        model = tiny_model(tokenizer, routing)
        model.set_attn_implementation(implementation)
        return model

    return make


def test_other_music_beside_it_changes_no_bit_of_a_piece(model_of, packed):
    batch, where = packed
    row, part = where[1]
    pitches = torch.tensor(model_of("head", "sdpa").config.token_attribute_ids)[batch["input_ids"]] == 2
    pitches[row, part] = False
    changed = torch.where(pitches, batch["input_ids"] + 1, batch["input_ids"])
    for routing in ("head", "token"):
        model = model_of(routing, "sdpa")
        with torch.no_grad():
            before, after = (
                model(ids, position_ids=batch["position_ids"]).logits for ids in (batch["input_ids"], changed)
            )
        assert torch.equal(after[row, part], before[row, part])
        assert not torch.equal(after[row, : part.start], before[row, : part.start])


@pytest.mark.skipif(not is_torch_flex_attn_available(), reason="this PyTorch has no flex_attention")
def test_packed_rows_under_flex_attention(tokenizer, packed, uncompiled_flex):
    ids, positions = (packed[0][name][1:, :128] for name in ("input_ids", "position_ids"))
    model = tiny_model(tokenizer, "head", head_dim=16, num_hidden_layers=1).double()
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        model.set_attn_implementation("flex_attention")
        got = model(ids, position_ids=positions).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_flash_attention_is_told_where_packed_pieces_begin(tokenizer, packed, monkeypatch):
    """FlashAttention takes no mask; a stand-in on the CPU reads the arguments that it takes instead."""

    def varlen(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None and kwargs["max_length_q"] == max(map(max, ROWS))
        query, key, value = (states.transpose(1, 2).flatten(0, 1).transpose(0, 1) for states in (query, key, value))
        bounds = kwargs["cu_seq_lens_k"].tolist()
        parts = [
            F.scaled_dot_product_attention(*(s[None, :, a:b] for s in (query, key, value)), is_causal=True,
                                           scale=scaling, enable_gqa=True)[0]
            for a, b in itertools.pairwise(bounds)
        ]  # fmt: skip
        return torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (2, -1)), None

    batch, _ = packed
    model = tiny_model(tokenizer, "token")
    with torch.no_grad():
        expected = model(**batch).logits
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen)
        model.config._attn_implementation = "flash_attention_2"
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_packed_rows_make_no_cache_and_take_no_mask(tokenizer, packed):
    batch, _ = packed
    ids, positions = batch["input_ids"], batch["position_ids"]
    for routing in ("head", "token"):
        model = tiny_model(tokenizer, routing)
        with torch.no_grad():
            assert model(ids, position_ids=positions, use_cache=True).past_key_values is None
            plain = model(ids, use_cache=True)
            counted = model(ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=True)
            assert counted.past_key_values.get_seq_length() == ids.shape[1]
            assert torch.equal(counted.logits, plain.logits)
            with pytest.raises(ValueError, match="without attention_mask"):
                model(ids, position_ids=positions, attention_mask=torch.ones_like(ids))
            # Padding on the left, with positions as generate() counts them, is no second sequence.
            mask = torch.ones_like(ids)
            mask[1, :9] = 0
            counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
            padded = [model(ids, attention_mask=mask, position_ids=p).logits[1, 9:] for p in (counted, None)]
            torch.testing.assert_close(*padded)
