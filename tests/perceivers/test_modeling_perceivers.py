"""The model: what a latent sees, padding, losses, attention kernels, checkpointing, saving, and configs refused."""

import shutil

import pytest
import torch
from conftest import PERCEIVERS, tiny_perceivers

from perceivers import PerceiverSConfig, PerceiverSForCausalLM
from perceivers.attention_perceivers import plan_cross


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def visible(config, scale, columns, latents):
    """(n, m) bool by the definition: latent at p sees k <= p, and k > p - W or k >= m - W."""
    p = torch.arange(columns - latents, columns)[:, None]
    k = torch.arange(columns)
    seen = k <= p
    if scale is not None:
        seen = seen & (k > p - scale if config.scale_mask == "sliding" else k >= columns - scale)
    return seen


@pytest.mark.parametrize("kind", ["sliding", "static"])
@pytest.mark.parametrize("scale", [None, 8, 12, 30, 100])
@pytest.mark.parametrize("columns", [8, 9, 20, 47])
def test_the_plan_is_the_definition(kind, scale, columns):
    config = tiny_perceivers(kind).config
    plan = plan_cross(config, scale, columns, 8, window=columns - 8)
    mask = torch.zeros(8, columns, dtype=torch.bool)
    mask[:, plan.start :] = plan.mask("eager", torch.zeros(1))[0, 0] == 0
    assert torch.equal(mask, visible(config, scale, columns, 8))


def test_no_position_reads_the_future(performer, events):
    ids = events[:, :40]
    for j in (0, 10, 33, 36, 39):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 7) % 388
        before, after = logits(performer, ids), logits(performer, changed)
        first = max(j - 32, 0)  # latents are the columns 32 .. 39
        torch.testing.assert_close(after[:, :first], before[:, :first], atol=1e-9, rtol=0)
        assert not torch.allclose(after[:, first:], before[:, first:], atol=1e-6)


def test_no_position_reads_the_future_through_padding(performer, events):
    ids, mask = events[:, :40].clone(), torch.ones(2, 40, dtype=torch.long)
    ids[1, :35], mask[1, :35] = 389, 0  # three of its eight latents are padding
    changed = ids.clone()
    changed[:, 37] = (changed[:, 37] + 7) % 388
    before, after = (logits(performer, x, attention_mask=mask) for x in (ids, changed))
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=1e-9, rtol=0)
    assert not torch.allclose(after[1, 5:], before[1, 5:], atol=1e-6)


@pytest.mark.parametrize("length", [3, 8, 20, 30])
def test_left_padding_changes_nothing(performer, events, length):
    ids = events[:, :length]
    padding = torch.full((2, 11), 389)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], dim=1)
    expected = logits(performer, ids)
    got = logits(performer, torch.cat([padding, ids], dim=1), attention_mask=mask)[:, -expected.shape[1] :]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_what_padding_holds_does_not_matter(performer, events):
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :25] = 0
    changed = events[:, :30].clone()
    changed[0, :25] = 389
    before, after = (logits(performer, x, attention_mask=mask) for x in (events[:, :30], changed))
    torch.testing.assert_close(after[0, -5:], before[0, -5:], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "eager") for kind in PERCEIVERS), ("sliding", "flex_attention"), ("static", "flex_attention")],
)
def test_attention_implementations_agree(events, uncompiled_flex, kind, implementation):
    model = tiny_perceivers(kind, initializer_range=0.2)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    expected = logits(model, events[:, :40], attention_mask=mask)
    model.set_attn_implementation(implementation)
    got = logits(model, events[:, :40], attention_mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_sliding_scale_in_blocks_is_the_whole(events):
    """More latents than a block of queries: 600, over a scale of 300."""
    model = tiny_perceivers(
        num_latents=600, max_position_embeddings=1000, cross_scales=[300, None], initializer_range=0.1
    )
    ids = torch.randint(0, 388, (2, 900), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 900, dtype=torch.long)
    mask[1, :400] = 0
    for attention_mask in (None, mask):
        model.set_attn_implementation("sdpa")
        expected = logits(model, ids, attention_mask=attention_mask)
        model.set_attn_implementation("eager")
        got = logits(model, ids, attention_mask=attention_mask)
        torch.testing.assert_close(got[0], expected[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(got[1, -500:], expected[1, -500:], atol=2e-5, rtol=1e-4)  # 100 latents are padding


@pytest.mark.parametrize("kind", list(PERCEIVERS))
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_agree_with_eager(events, kind, padded):
    """The fused kernel's merged backward pass against autograd of the plain formula."""
    model = tiny_perceivers(kind, initializer_range=0.2).double()
    labels = torch.full((2, 40), -100)
    labels[:, -8:] = events[:, 32:40]
    mask = torch.ones(2, 40, dtype=torch.long)
    if padded:
        mask[0, :34] = 0
        labels[0, :35] = -100
    grads = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(events[:, :40], attention_mask=mask, labels=labels).loss.backward()
        grads[implementation] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads["sdpa"].keys() == grads["eager"].keys()
    for name, grad in grads["eager"].items():
        torch.testing.assert_close(grads["sdpa"][name], grad, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradient_checkpointing_gives_the_same_gradients(performer, events, implementation):
    performer.train()
    performer.set_attn_implementation(implementation)
    grads = []
    for checkpointing in (False, True):
        performer.activation_checkpointing_enable() if checkpointing else performer.activation_checkpointing_disable()
        performer.zero_grad()
        performer(events[:, :30], labels=events[:, :30]).loss.backward()
        grads.append(performer.model.cross_layers[0].attention.kv_proj.weight.grad.clone())
    performer.activation_checkpointing_disable()
    performer.zero_grad()
    performer.set_attn_implementation("sdpa")
    performer.eval()
    torch.testing.assert_close(*grads)


def test_loss_is_the_mean_over_the_latents_targets(performer, events):
    """With more tokens than latents the last token is a target only; short sequences shift as everywhere."""
    long, short = events[:, :31], events[:, :6]
    with torch.no_grad():
        output = performer(long, labels=long)
        log_probabilities = logits(performer, long[:, :-1]).log_softmax(-1)
        expected = -log_probabilities.gather(2, long[:, -8:, None]).mean()
        torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=1e-5)
        assert output.logits.shape == (2, 8, 391)
        log_probabilities = logits(performer, short)[:, :-1].log_softmax(-1)
        expected = -log_probabilities.gather(2, short[:, 1:, None]).mean()
        torch.testing.assert_close(performer(short, labels=short).loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_training_step_has_no_graph_break(events):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    model = tiny_perceivers(initializer_range=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    losses = [run(events[:, :40], labels=events[:, :40]).loss for run in (compiled, model)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    losses[0].backward()
    assert model.model.cross_layers[0].attention.kv_proj.weight.grad.abs().sum() > 0


def test_a_segment_may_hold_one_token_more_than_the_context(events):
    model = tiny_perceivers()
    assert torch.isfinite(model(events[:, :49], labels=events[:, :49]).loss)
    with pytest.raises(ValueError, match=r"49 tokens.*max_position_embeddings \(48\)"):
        model(events[:, :49])
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(events[:, :50], labels=events[:, :50])


def test_loss_uses_num_items_in_batch(events):
    model = tiny_perceivers()
    ids = events[:, :30]
    with torch.no_grad():
        half = model(ids, labels=ids, num_items_in_batch=2 * 2 * 8).loss
        torch.testing.assert_close(half, model(ids, labels=ids).loss / 2)


def test_embeddings_instead_of_ids(performer, events):
    embeds = performer.model.embed_tokens(events[:, :30])
    torch.testing.assert_close(logits(performer, None, inputs_embeds=embeds), logits(performer, events[:, :30]))
    with pytest.raises(ValueError, match="exactly one"):
        performer(events[:, :30], inputs_embeds=embeds)


@pytest.mark.parametrize("kind", ["sliding", "stream", "absolute"])
def test_keys_looked_up_by_token_are_those_of_the_embeddings(events, kind):
    """With more tokens than the vocabulary has, keys and values are projected once a token; gradients add up alike."""
    model = tiny_perceivers(kind, initializer_range=0.2).double()
    ids = torch.cat([events, events.flip(1)])[:, :120].reshape(10, 48)
    labels = torch.full_like(ids, -100)
    labels[:, -8:] = ids[:, -8:]
    results = []
    for by_token in (True, False):
        model.zero_grad()
        embeds = None if by_token else model.model.embed_tokens(ids)
        loss = model(ids if by_token else None, inputs_embeds=embeds, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), model.model.embed_tokens.weight.grad.clone()))
        results[-1] += (model.model.cross_layers[0].attention.kv_proj.weight.grad.clone(),)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        cached = model(ids, use_cache=True, logits_to_keep=1).logits
        embedded = model(inputs_embeds=model.model.embed_tokens(ids), use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(cached, embedded)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_fewer_latents_can_be_asked_for(performer, events, n):
    got = logits(performer, events[:, :30], num_latents=n)
    assert got.shape[1] == n
    with pytest.raises(ValueError, match=r"num_latents \(9\)"):
        performer(events[:, :30], num_latents=9)


def test_bad_input_is_named(events):
    model = tiny_perceivers()
    ids = events[:, :20]
    with pytest.raises(ValueError, match="9999"):
        model(torch.tensor([[1, 9999]]))
    with pytest.raises(ValueError, match="-3"):
        model.generate(torch.tensor([[1, -3]]), max_new_tokens=2)
    right = torch.ones(2, 20, dtype=torch.long)
    right[1, 15:] = 0
    with pytest.raises(ValueError, match="Pad on the left"):
        model(ids, attention_mask=right)
    with pytest.raises(ValueError, match="Pad on the left"):
        model(ids, attention_mask=right, use_cache=True)
    nothing = torch.ones(2, 20, dtype=torch.long)
    nothing[0] = 0
    with pytest.raises(ValueError, match="every row a token"):
        model(ids, attention_mask=nothing)
    with pytest.raises(ValueError, match="every row of the prompt a token"):
        model.generate(ids, attention_mask=nothing, max_new_tokens=2)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(ids, attention_mask=torch.ones(2, 19, dtype=torch.long))


@pytest.mark.parametrize("kind", list(PERCEIVERS))
def test_saved_and_loaded_logits_are_identical(events, tmp_path, kind):
    model = tiny_perceivers(kind)
    model.save_pretrained(tmp_path)
    again = PerceiverSForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, events[:, :30]), logits(model, events[:, :30]))


def test_attention_weights_are_returned_by_eager(events):
    model = tiny_perceivers()
    model.set_attn_implementation("eager")
    output = model(events[:, :30], output_attentions=True, output_hidden_states=True)
    assert [w.shape for w in output.attentions] == [(2, 4, 8, 8)] * 2
    assert len(output.hidden_states) >= 2


def test_label_smoothing_shifts_the_labels(events, tmp_path):
    """Trainer smooths labels itself; a causal model it does not know would be trained to copy its input."""
    from transformers import Trainer, TrainingArguments

    model = tiny_perceivers(initializer_range=0.1)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments)
    ids = events[:, :8]
    with torch.no_grad():
        smoothed = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
        torch.testing.assert_close(smoothed, model(ids, labels=ids).loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_mask": "static", "cross_scales": [None, 7]}, "num_latents.*scale 7"),
        ({"cross_scales": []}, "at least one"),
        ({"cross_scales": [None, 0]}, "positive"),
        ({"num_latents": 0}, "num_latents"),
        ({"num_latents": 49}, "num_latents.*max_position_embeddings"),
        ({"head_dim": 6}, "head_dim"),
        ({"scale_mask": "banded"}, "scale_mask"),
        ({"cross_kv_source": "prefix"}, "cross_kv_source"),
    ],
)
def test_contradicting_configs_are_refused(change, message):
    fields = tiny_perceivers().config.to_dict()
    with pytest.raises(Exception, match=message):
        PerceiverSConfig(**{**fields, **change})


def test_the_rotated_share_of_a_head(events):
    """Rotary positions are relative: moving all of them changes nothing; turning one channel more does."""
    model = tiny_perceivers().double()
    positions = torch.arange(30)[None]
    moved = logits(model, events[:, :30], position_ids=positions + 5)
    torch.testing.assert_close(moved, logits(model, events[:, :30]), atol=1e-4, rtol=1e-4)
    stretched = logits(model, events[:, :30], position_ids=2 * positions)
    assert not torch.allclose(stretched, moved, atol=1e-2)
    assert model.config.rotary_dim == 4


@pytest.mark.parametrize(("rotated", "head"), [(26, 46), (2, 49), (32, 64)])
def test_a_share_of_a_head_is_a_whole_number_of_channels(rotated, head):
    """26 / 46 * 46 is a little less than 26."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotated / head}
    assert PerceiverSConfig(head_dim=head, rope_parameters=rope).rotary_dim == rotated


def test_only_the_latents_are_projected(events):
    """With a projection that changes nothing, the logits are those of a model without one."""
    plain = tiny_perceivers("ported")
    model = tiny_perceivers("ported", latent_projection=True)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == ["model.latent_proj.weight", "model.latent_proj.bias"]
    ids = events[:, :30]
    with torch.no_grad():
        torch.nn.init.eye_(model.model.latent_proj.weight)
        model.model.latent_proj.bias.zero_()
        torch.testing.assert_close(logits(model, ids), logits(plain, ids))
        model.model.latent_proj.bias.fill_(0.1)
        assert not torch.allclose(logits(model, ids), logits(plain, ids), atol=1e-2)


def test_endpoint_frequencies():
    """DeepMind's rule: from 1 to 1 / theta, both included."""
    model = tiny_perceivers("ported")  # heads of 12, 6 channels rotated: three pairs
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, torch.tensor([1.0, 0.01, 0.0001]))
    plain = tiny_perceivers(head_dim=12)
    torch.testing.assert_close(plain.model.rotary_emb.inv_freq, 10000.0 ** -torch.tensor([0.0, 1 / 3, 2 / 3]))
