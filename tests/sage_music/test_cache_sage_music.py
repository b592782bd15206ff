"""Cached equals uncached, however the tokens arrive and whatever is done to the cache; and the cache is small."""

import pytest
import torch
from conftest import ROUTINGS, tiny_model

from sage_music import SageMusicCache

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def feed(model, ids, sizes, cache=None, mask=None):
    """Logits of `ids` fed in pieces of the given sizes."""
    cache = SageMusicCache(model.config) if cache is None else cache
    parts, start = [], cache.get_seq_length()
    offset = start
    with torch.no_grad():
        for size in sizes:
            part = ids[:, start - offset : start - offset + size]
            seen = None if mask is None else mask[:, : start + size]
            parts.append(model(part, attention_mask=seen, past_key_values=cache, use_cache=True).logits)
            start += size
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize("sizes", [[1] * 120, [50, 1, 1, 30, 38], [119, 1], [1, 119]], ids=lambda s: f"{len(s)}-parts")
def test_token_by_token_and_chunked(model, prompts, sizes):
    with torch.no_grad():
        expected = model(prompts).logits
    got, cache = feed(model, prompts, sizes)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert cache.get_seq_length() == 120


@pytest.mark.parametrize("sizes", [[1] * 120, [40, 1, 79]], ids=["tokens", "chunks"])
def test_rows_padded_by_different_amounts(model, prompts, sizes):
    ids, mask = prompts.clone(), torch.ones_like(prompts)
    ids[1, 25:] = prompts[1, :-25].clone()
    ids[1, :25], mask[1, :25] = 0, 0
    got, _ = feed(model, ids, sizes, mask=mask)
    with torch.no_grad():
        expected = model(prompts).logits
    torch.testing.assert_close(got[0], expected[0], **CLOSE)
    torch.testing.assert_close(got[1, 25:], expected[1, :-25], **CLOSE)


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_single_precision_stays_within_1e_4(tokenizer, prompts, routing):
    model = tiny_model(tokenizer, routing, initializer_range=0.1)
    with torch.no_grad():
        expected = model(prompts).logits
    got, _ = feed(model, prompts, [60] + [1] * 60)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_crop_forgets(model, prompts):
    with torch.no_grad():
        expected = model(prompts).logits
    _, cache = feed(model, prompts, [100])
    feed(model, prompts.flip(0)[:, :15], [1] * 15, cache)  # wrong tokens, to be taken back
    cache.crop(-40)
    assert cache.get_seq_length() == 75
    got, _ = feed(model, prompts[:, 75:], [20, 1, 24], cache)
    torch.testing.assert_close(got, expected[:, 75:], **CLOSE)


def test_reorder_repeat_and_select(model, prompts):
    with torch.no_grad():
        expected = model(prompts).logits
    _, cache = feed(model, prompts, [80])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    got, _ = feed(model, prompts.flip(0)[:, 80:], [1, 39], cache)
    torch.testing.assert_close(got, expected.flip(0)[:, 80:], **CLOSE)


def test_reset_starts_anew(model, prompts):
    _, cache = feed(model, prompts, [60, 1])
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        expected = model(prompts).logits
    got, _ = feed(model, prompts, [70, 50], cache)
    torch.testing.assert_close(got, expected, **CLOSE)


def test_a_head_cache_stores_only_each_tokens_own_attribute(tokenizer, prompts):
    model = tiny_model(tokenizer, "head")
    _, cache = feed(model, prompts, [120])
    attribute = torch.tensor(model.config.token_attribute_ids)[prompts]
    expected = torch.stack([(attribute == group).sum(1) for group in range(5)], dim=1)
    expected[:, 1:] += 1  # BOS belongs to structure and is read by all
    assert cache.lengths.tolist() == expected.tolist()
    assert cache.layers[0].keys.shape == (2, 5, int(expected.max()), 8)


def test_a_decode_step_writes_in_place(tokenizer, prompts):
    model = tiny_model(tokenizer, "head")
    _, cache = feed(model, prompts, [100, 1])
    address = cache.layers[0].keys.data_ptr()
    feed(model, prompts[:, 101:], [1] * 10, cache)
    assert cache.layers[0].keys.data_ptr() == address
