"""The cache: every way of decoding gives the logits of full forward passes with the same latents."""

import pytest
import torch
from conftest import PERCEIVERS, tiny_perceivers

from perceivers import PerceiverSCache, PerceiverSTokenizer

STRICT = {"atol": 1e-4, "rtol": 1e-4}  # of logits of some tens: the rotary tables are float32


def reference(model, ids, cache, stop, mask=None):
    """Logits of column `stop - 1` from a full forward pass over the context and the latents of the cache's schedule."""
    window = cache.window_start(stop - 1)
    seen = slice(cache.context_start(window), stop)
    options = {}
    if mask is not None:
        options = {"attention_mask": mask[:, seen], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, seen]}
    with torch.no_grad():
        return model(ids[:, seen], num_latents=stop - window, **options).logits[:, -1]


def padded(events, short=10):
    """Rows of different lengths, the second padded on the left so that it has `short` columns less."""
    ids, mask = events.clone(), torch.ones_like(events)
    ids[1, :short], mask[1, :short] = 389, 0
    return ids, mask


def test_windows_by_hand():
    """N = 8, R = 4: a window takes in 5 tokens until it is full again, then starts 4 before the next."""
    cache = PerceiverSCache(tiny_perceivers().config, refill_length=4)
    starts = [cache.window_start(position) for position in range(20)]
    assert starts == [0] * 8 + [5] * 5 + [10] * 5 + [15] * 2
    assert cache.context_start(5) == 0 and cache.context_start(50) == 50 + 8 - 48
    every = PerceiverSCache(tiny_perceivers().config, refill_length=8)
    assert [every.window_start(position) for position in range(7, 12)] == [0, 1, 2, 3, 4]
    assert PerceiverSCache(tiny_perceivers().config).refill_length == 4


@pytest.mark.parametrize("refill", [1, 4, 8])
@pytest.mark.parametrize("prompt", [1, 8, 30])
def test_token_by_token(performer, events, refill, prompt):
    """Across refills and, where positions allow it, far past the context of 48."""
    cache = PerceiverSCache(performer.config, refill)
    with torch.no_grad():
        output = performer(events[:, :prompt], past_key_values=cache)
        for stop in range(prompt, 100):
            expected = reference(performer, events, cache, stop)
            torch.testing.assert_close(output.logits[:, -1], expected, **STRICT)
            assert cache.get_seq_length() == stop
            output = performer(events[:, stop : stop + 1], past_key_values=cache)


@pytest.mark.parametrize("kind", ["sliding", "static"])
def test_two_thousand_steps_in_single_precision(kind):
    """At least ten refills (59 here): logits to 1e-5, and never another likeliest token."""
    model = tiny_perceivers(
        kind,
        num_latents=64,
        max_position_embeddings=2048,
        cross_scales=[None, 128],
        initializer_range=0.08,
        num_hidden_layers=1,
    )
    ids = torch.randint(0, 388, (1, 2000), generator=torch.Generator().manual_seed(3))
    cache = PerceiverSCache(model.config)
    worst, mismatches = 0.0, 0
    with torch.no_grad():
        for stop in range(1, 2001):
            got = model(ids[:, stop - 1 : stop], past_key_values=cache).logits[:, -1]
            expected = reference(model, ids, cache, stop)
            worst = max(worst, (got - expected).abs().max().item())
            mismatches += int(got.argmax() != expected.argmax())
    assert mismatches == 0 and worst <= 1e-5, (mismatches, worst)
    assert cache.window_start(1999) > 1900


@pytest.mark.parametrize("kind", ["sliding", "static", "stream", "absolute"])
def test_projected_latents(events, kind):
    """Latents that start from a projection of the embeddings do so in a window that starts anew, too."""
    model = tiny_perceivers(kind, latent_projection=True).double()
    cache = PerceiverSCache(model.config)
    with torch.no_grad():
        for stop in range(1, 61):
            step = model(events[:, stop - 1 : stop], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(step, reference(model, events, cache, stop), **STRICT)


def test_rolling_the_window_instead_would_not_be_exact(events):
    """What the refill is for: states that have read dropped latents differ."""
    model = tiny_perceivers().double()
    with torch.no_grad():
        full = model(events[:, :20], num_latents=8).logits[:, -1]
        rolled = model(events[:, :20], num_latents=4).logits[:, -1]
    assert not torch.allclose(full, rolled, atol=1e-2)


@pytest.mark.parametrize("chunks", [[40, 1, 1, 7, 3, 1, 20], [3, 3, 30, 30], [1, 72]], ids=str)
def test_chunks_give_what_single_tokens_give(performer, events, chunks):
    """Of a chunk, the last tokens asked for, each in its own window."""
    cache = PerceiverSCache(performer.config)
    start = 0
    with torch.no_grad():
        for chunk in chunks:
            keep = min(chunk, 12)
            got = performer(events[:, start : start + chunk], past_key_values=cache, logits_to_keep=keep).logits
            start += chunk
            assert got.shape[1] == keep
            for back in range(keep):
                expected = reference(performer, events, cache, start - back)
                torch.testing.assert_close(got[:, -1 - back], expected, **STRICT)


@pytest.mark.parametrize("short", [3, 20, 39])
def test_left_padding(performer, events, short):
    ids, mask = padded(events, short)
    cache = PerceiverSCache(performer.config)
    with torch.no_grad():
        output = performer(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        for stop in range(40, 100):
            torch.testing.assert_close(output.logits[:, -1], reference(performer, ids, cache, stop, mask), **STRICT)
            # With and without the mask and positions that generate() passes: the cache knows the padding.
            given = {"attention_mask": mask[:, : stop + 1]} if stop % 2 else {}
            output = performer(ids[:, stop : stop + 1], past_key_values=cache, **given)


@pytest.mark.parametrize("removed", [1, 4, 7, 23, 60, 70])
def test_crop_goes_back_any_way(performer, events, removed):
    """Within a window, across refills, and to nothing."""
    cache = PerceiverSCache(performer.config)
    with torch.no_grad():
        performer(events[:, :62], past_key_values=cache)
        for stop in range(63, 71):
            performer(events[:, stop - 1 : stop], past_key_values=cache)
        cache.crop(-removed)
        left = 70 - removed
        assert cache.get_seq_length() == left
        other = events.flip(0)
        ids = torch.cat([events[:, :left], other[:, left:]], dim=1)
        for stop in range(left + 1, left + 14):
            got = performer(ids[:, stop - 1 : stop], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(got, reference(performer, ids, cache, stop), **STRICT)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(3)


@pytest.mark.parametrize("when", [6, 12, 40, 70])
def test_batch_operations(performer, events, when):
    cache = PerceiverSCache(performer.config)
    with torch.no_grad():
        performer(events[:, :when], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
        ids = events[[1, 0, 0]]
        for stop in range(when + 1, when + 15):
            got = performer(ids[:, stop - 1 : stop], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(got, reference(performer, ids, cache, stop), **STRICT)


def test_reset_forgets_everything(performer, events):
    cache = PerceiverSCache(performer.config)
    with torch.no_grad():
        performer(events[:, :40], past_key_values=cache)
        cache.reset()
        got = performer(events[:1, 50:60], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(got, reference(performer, events[:1, 50:], cache, 10), **STRICT)


def test_a_step_copies_nothing(events):
    """The buffers grow by doubling: most steps leave them where they are."""
    model = tiny_perceivers()
    cache = PerceiverSCache(model.config)
    places = set()
    with torch.no_grad():
        for step in range(140):
            model(events[:, step : step + 1], past_key_values=cache)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) <= 3


def test_bad_caches_are_refused(events):
    from transformers import DynamicCache

    model = tiny_perceivers()
    with pytest.raises(ValueError, match="PerceiverSCache"):
        model(events, past_key_values=DynamicCache(config=model.config), use_cache=True)
    from sage_music import SageMusicCache, SageMusicConfig

    with pytest.raises(ValueError, match="not with SageMusicCache"):
        model(events, past_key_values=SageMusicCache(SageMusicConfig()))
    for refill in (0, 9):
        with pytest.raises(ValueError, match=rf"refill_length \({refill}\) must lie in 1..num_latents"):
            PerceiverSCache(model.config, refill)
    for implementation in ("static", "offloaded"):
        model.generation_config.cache_implementation = implementation
        with pytest.raises(ValueError, match=f"cache_implementation='{implementation}'"):
            model.generate(events, max_new_tokens=2)
    absolute = tiny_perceivers("absolute", max_position_embeddings=48)
    cache = PerceiverSCache(absolute.config)
    with torch.no_grad(), pytest.raises(ValueError, match="max_position_embeddings"):
        absolute(events[:, :40], past_key_values=cache)
        absolute(events[:, 40:50], past_key_values=cache)


# ---- plain generate()


GREEDY = {"do_sample": False, "max_new_tokens": 50, "min_new_tokens": 50}


def prompts(events, length=24):
    ids, mask = padded(events[:, :length], 9)
    return {"input_ids": ids, "attention_mask": mask}


def free(model):
    """Any token may follow any: the prompts are random, and every step should tell models apart."""
    model.generation_config.midi_grammar = False
    return model


@pytest.mark.parametrize("kind", list(PERCEIVERS))
@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {**GREEDY, "do_sample": True, "temperature": 1.3, "top_p": 0.9},
        {**GREEDY, "num_beams": 4},
        {"do_sample": False, "max_new_tokens": 30, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    ],
    ids=["greedy", "sampling", "beams", "beams-several"],
)
def test_a_window_moved_at_every_token_equals_no_cache(events, kind, options):
    """`refill_length = num_latents` is the uncached model: `generate()` must write the same ids."""
    model = free(tiny_perceivers(kind, max_position_embeddings=256).double())
    model.generation_config.refill_length = 8
    outputs = []
    for use_cache in (False, True):
        torch.manual_seed(5)
        outputs.append(model.generate(**prompts(events), **options, use_cache=use_cache))
    assert torch.equal(*outputs)


def greedy(model, ids, steps, refill=None):
    """Greedy decoding without a cache, by full forward passes with the schedule's latents."""
    cache = PerceiverSCache(model.config, refill)
    for _ in range(steps):
        ids = torch.cat([ids, reference(model, ids, cache, ids.shape[1]).argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("kind", list(PERCEIVERS))
def test_every_mode_writes_what_full_passes_write(events, kind):
    """Greedy, in chunks, by prompt lookup, with an assistant, and going on from a cache: one and the same."""
    model = free(tiny_perceivers(kind).double())
    model.generation_config.eos_token_id = None
    ids = torch.cat([events[:1, :15], events[:1, :15]], dim=1)  # something for prompt lookup to find
    options = {"do_sample": False, "max_new_tokens": 40}
    expected = greedy(model, ids, 40)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, **options, prefill_chunk_size=7), expected)
    assert torch.equal(model.generate(ids, **options, prompt_lookup_num_tokens=5), expected)
    for seed in (0, 1):  # its own twin, and another
        assistant = free(tiny_perceivers(kind, seed=seed).double())
        assistant.generation_config.eos_token_id = None
        assert torch.equal(model.generate(ids, **options, assistant_model=assistant), expected)
    first = model.generate(ids, do_sample=False, max_new_tokens=11, return_dict_in_generate=True)
    rest = model.generate(first.sequences, do_sample=False, max_new_tokens=29, past_key_values=first.past_key_values)
    assert torch.equal(rest, expected)


def test_refill_length_is_read_from_the_generation_config(events, tmp_path):
    model = free(tiny_perceivers().double())
    model.generation_config.eos_token_id = None
    outputs = {}
    for refill in (2, 7):
        model.generation_config.refill_length = refill
        model.save_pretrained(tmp_path / str(refill))
        loaded = free(type(model).from_pretrained(tmp_path / str(refill)).double())
        assert loaded.generation_config.refill_length == refill
        outputs[refill] = loaded.generate(events[:1, :20], do_sample=False, max_new_tokens=40)
        assert torch.equal(outputs[refill], greedy(model, events[:1, :20], 40, refill))
    assert not torch.equal(outputs[2], outputs[7])


@pytest.mark.parametrize("padding", [10, 15])
def test_padding_does_not_change_the_music(events, padding):
    """By a multiple of the 5 tokens that a window takes in, it leaves the windows where they are."""
    model = free(tiny_perceivers().double())
    options = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30}
    ids, mask = padded(events[:, :40], padding)
    together = model.generate(ids, attention_mask=mask, **options)
    for row, start in ((0, 0), (1, padding)):
        assert torch.equal(together[row : row + 1, start:], model.generate(events[row : row + 1, start:40], **options))


def test_going_past_the_context_is_no_warning(events):
    """Transformers warns at max_position_embeddings; this cache moves the context on."""
    model = free(tiny_perceivers())
    criteria = []
    original = model._get_stopping_criteria
    model._get_stopping_criteria = lambda *args, **kwargs: criteria.append(original(*args, **kwargs)) or criteria[-1]
    assert model.generate(events[:1, :40], max_new_tokens=30, min_new_tokens=30).shape[1] == 70
    assert [c.max_position_embeddings for c in criteria[0] if hasattr(c, "max_position_embeddings")] == [None]


def test_learned_positions_keep_the_whole_context(events):
    """A model that ends at M tokens sees all of them to its last, wherever its window of latents starts."""
    model, ids = tiny_perceivers("absolute", max_position_embeddings=24).double(), events[:, :24]
    cache = PerceiverSCache(model.config)
    window = cache.window_start(23)
    with torch.no_grad():
        cached = model(ids, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(cached, model(ids, num_latents=24 - window).logits[:, -1], **STRICT)
    assert window > 24 - model.config.num_latents


def test_learned_positions_end_before_anything_is_computed(events):
    model = tiny_perceivers("absolute", max_position_embeddings=48)
    with pytest.raises(ValueError, match="49 tokens were asked for, but this model has learned 48 positions"):
        model.generate(events[:, :40], max_new_tokens=10)
    assert model.generate(events[:1, :40], max_new_tokens=8).shape[1] <= 48


@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 2.0}, {"num_beams": 3, "do_sample": False}])
def test_generated_events_are_valid(options):
    """Plain `generate()` from BOS: every note_off has its note_on, and nothing is left hanging at the asked length."""
    model = tiny_perceivers(initializer_range=0.1)
    tokenizer = PerceiverSTokenizer()
    torch.manual_seed(0)
    ids = torch.full((3, 1), tokenizer.bos_token_id)
    for row in model.generate(ids, max_new_tokens=150, **options).tolist():
        sounding = set()
        for token in row:
            if token < 128:
                assert token not in sounding
                sounding.add(token)
            elif token < 256:
                sounding.remove(token - 128)
            elif token == tokenizer.eos_token_id:
                break
        assert not sounding
        starts = sum(token < 128 for token in row)
        assert tokenizer.decode_midi(row).note_num() == starts
