"""What a forward pass is given, in both families: every argument is used or refused, and no cache is lost."""

import warnings
from importlib import metadata

import pytest
import torch
from conftest import ROUTINGS, band, tiny_model, tiny_perceivers
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.cache_utils import Cache

import perceivers.arguments_perceivers
import sage_music.arguments_sage_music
from perceivers import PerceiverSCache
from sage_music import SageMusicCache
from sage_music.arguments_sage_music import (
    CACHE_NAME,
    CACHE_NAMES,
    PACKING,
    PASSED_TO_ATTENTION,
    PASSED_WITH_PAGES,
    warn_untested,
)
from sage_studio.experiments.compound import CompoundMusicForCausalLM

FAMILIES = ("sage_music", "perceivers")
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
CLOSE = {"atol": 1e-5, "rtol": 0}  # the rotary tables are float32 by design


def made(family: str, tokenizer, **options):
    """A tiny model in float64, the ids (2, 40) of a prompt, and its cache class."""
    if family == "sage_music":
        model = tiny_model(tokenizer, "head", **options).double()
        return model, torch.tensor([tokenizer.midi_to_ids(band(bars=4, seed=seed))[:40] for seed in (1, 2)])
    model = tiny_perceivers(**options).double()
    model.generation_config.eos_token_id = None
    model.generation_config.midi_grammar = False  # it depends on how many tokens are left
    # Notes with an event of every kind, twice, so that prompt lookup has something to find.
    beat = [370, 60, 64, 265, 188, 192, 265, 375, 62, 265]
    return model, torch.tensor([beat + [token + (token < 256) for token in beat] + beat * 2, beat * 4])


def new_cache(model) -> Cache:
    return (SageMusicCache if model.config.model_type == "sage_music" else PerceiverSCache)(model.config)


class Passes:
    """Counts, of every forward pass of a model, the tokens it is fed and those that its cache has seen before."""

    def __init__(self, model):
        self.counts: list[tuple[int, int]] = []
        self.handle = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, model, args, given):
        ids = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        caches = [given[name] for name in CACHE_NAMES if given.get(name) is not None]
        assert len(caches) == 1, f"a pass of generate() came with {len(caches)} caches"
        self.counts.append((ids.shape[1], int(caches[0].get_seq_length())))


# What `generate()` is asked for; how many tokens the passes after the prompt's may be fed.
MODES = {
    "greedy": ({}, {1}),
    "sampling": ({"do_sample": True, "top_p": 0.9}, {1}),
    "beams": ({"num_beams": 3}, {1}),
    "several": ({"do_sample": True, "num_return_sequences": 3}, {1}),
    "chunks": ({"prefill_chunk_size": 7}, {1, 5, 7}),
    "lookup": ({"prompt_lookup_num_tokens": 4}, set(range(1, 6))),
    "assistant": ({"assistant_model": ..., "num_assistant_tokens": 4}, set(range(1, 14))),
    "static": ({"cache_implementation": "static"}, {1}),
    "draft": ({"use_mtp": True}, set(range(1, 6))),
}
ALONE = ("lookup", "assistant", "draft")  # modes of one sequence
OF_SAGE_MUSIC = ("static", "draft")


@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, mode) for family in FAMILIES for mode in MODES if family == "sage_music" or mode not in OF_SAGE_MUSIC],
)
def test_every_pass_is_fed_the_new_tokens_alone_and_has_seen_all_others(tokenizer, family, mode):
    """A cache that is lost on the way, or not read, feeds a prompt twice or forgets it: no error, other music."""
    options, fed = MODES[mode]
    options = {**GREEDY, **options}
    model, ids = made(family, tokenizer, **({"num_mtp_layers": 4} if mode == "draft" else {}))
    if mode == "assistant":
        options["assistant_model"] = made(family, tokenizer, seed=0)[0]
    if mode in ALONE:
        ids = ids[:1]
    passes = Passes(model)
    torch.manual_seed(0)
    out = model.generate(ids, **options)
    assert out.shape[1] == ids.shape[1] + 12
    prompt, counts = ids.shape[1], passes.counts
    seen = 0
    for number, (new, before) in enumerate(counts):
        if number and mode in ALONE:
            # What was drafted and refused is taken back: never more than that, and nothing of the prompt.
            assert prompt <= before <= seen and new in fed
        else:
            assert before == seen and (new in fed or number == 0)
        seen = before + new
    if mode in ALONE:
        assert counts[0][0] - prompt in range(5) and len(counts) <= 12 and seen >= prompt + 11
    else:
        assert sum(new for new, _ in counts) == prompt + 11  # the last token is not fed
        assert counts[0][0] == (7 if mode == "chunks" else prompt)
    passes.handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_has_a_cache_of_its_own(tokenizer, family):
    """`guidance_scale` runs the model a second time for every token, without the prompt; its cache is named, too."""
    model, ids = made(family, tokenizer)
    if family == "perceivers":
        model.generation_config.refill_length = model.config.num_latents  # what a model without a cache computes
    ids = ids[:, :30]  # a PerceiverS without a cache ends at its context
    options = {**GREEDY, "guidance_scale": 1.5, "negative_prompt_ids": ids[:, :1]}
    guided = model.generate(ids, **options)
    assert torch.equal(guided, model.generate(ids, **options, use_cache=False))
    assert not torch.equal(guided, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_is_used_under_either_name(tokenizer, family):
    model, ids = made(family, tokenizer)
    with torch.no_grad():
        expected = model(ids, use_cache=True).logits[:, -1:]
        for name in CACHE_NAMES:
            cache = new_cache(model)
            for part in (ids[:, :25], ids[:, 25:]):
                output = model(part, **{name: cache}, logits_to_keep=1)
            torch.testing.assert_close(output.logits, expected, **CLOSE)
            assert output[1] is cache and getattr(output, CACHE_NAME) is cache and cache.get_seq_length() == 40
        positional = model(ids, None, None, new_cache(model), logits_to_keep=1)
        assert getattr(positional, CACHE_NAME).get_seq_length() == 40


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_goes_on_from_a_cache_under_either_name(tokenizer, family, name):
    model, ids = made(family, tokenizer)
    expected = model.generate(ids, **GREEDY)
    first = model.generate(ids, do_sample=False, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True)
    passes = Passes(model)
    rest = model.generate(
        first.sequences, do_sample=False, max_new_tokens=7, min_new_tokens=7, **{name: getattr(first, CACHE_NAME)}
    )
    assert torch.equal(rest, expected)
    assert [count for count, _ in passes.counts] == [1] * 7


@pytest.mark.parametrize("family", FAMILIES)
def test_two_caches_and_what_is_none_are_refused(tokenizer, family):
    model, ids = made(family, tokenizer)
    one, other = new_cache(model), new_cache(model)
    for target in (model, model.model):
        with pytest.raises(ValueError, match="two names for one cache"):
            target(ids, cache=one, past_key_values=other)
        for none in (((torch.zeros(1), torch.zeros(1)),), {}, set()):
            with pytest.raises(ValueError, match=f"the cache is a {type(none).__name__}"):
                target(ids, past_key_values=none)
    with pytest.raises(ValueError, match="two names for one cache"):
        model.generate(ids, cache=one, past_key_values=other)
    assert one.get_seq_length() == other.get_seq_length() == 0


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_cache_is_refused_under_either_name(tokenizer, family, name):
    model, ids = made(family, tokenizer)
    for foreign in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=60)):
        for target in (model, model.model):
            with pytest.raises(ValueError, match=type(foreign).__name__):
                target(ids, **{name: foreign})
        with pytest.raises(ValueError, match=type(foreign).__name__):
            model.generate(ids, **GREEDY, **{name: foreign})
        assert foreign.get_seq_length() == 0


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_of_another_routing_or_family_is_refused(tokenizer, name):
    head, token, performer = tiny_model(tokenizer), tiny_model(tokenizer, "token"), tiny_perceivers()
    ids = torch.full((1, 6), 1)
    for model, other in ((token, head), (token, performer), (head, token), (head, performer), (performer, head)):
        with pytest.raises(ValueError, match="Cache"):
            model(ids, **{name: new_cache(other)})


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_and_none_at_once_is_refused(tokenizer, family, name):
    """Otherwise the whole sequence would go into the cache again with every token."""
    model, ids = made(family, tokenizer)
    cache = new_cache(model)
    with torch.no_grad():
        model(ids[:, :-1], cache=cache)
    with pytest.raises(ValueError, match="a cache was given, and use_cache=False"):
        model.generate(ids, **GREEDY, use_cache=False, **{name: cache})


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_tunes_prompts(tokenizer, family, kind):
    """PEFT looks for the cache under its older name; where it finds none, it begins anew with every token."""
    peft = pytest.importorskip("peft")
    model, ids = made(family, tokenizer)
    if family == "sage_music":
        model = tiny_model(tokenizer, "mha").double()
    elif kind == "prefix":
        pytest.skip("a PerceiverS has no keys and values a layer to put before the prompt's")
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3)).double().eval()
    passes = Passes(model)
    model.generation_config.update(eos_token_id=None)
    out = tuned.generate(input_ids=ids[:1, :20], attention_mask=torch.ones(1, 20, dtype=torch.long), **GREEDY)
    assert out.shape[1] == 32
    if kind == "prompt":
        assert passes.counts == [(23, 0), *((1, 23 + i) for i in range(11))]
    else:
        assert passes.counts == [(20, 3), *((1, 23 + i) for i in range(11))]


def every_model(tokenizer):
    for routing in ROUTINGS:
        model = tiny_model(tokenizer, routing)
        yield from (model, model.model)
    model = tiny_perceivers()
    yield from (model, model.model)


@pytest.mark.parametrize("name", ["cache_params", "mems", "state", "attention_maks", "token_type_ids", "softcap"])
def test_an_unknown_argument_is_named(tokenizer, name):
    """Above all a cache under a name of a later version, which `**kwargs` would swallow without a word."""
    for model in every_model(tokenizer):
        with pytest.raises(TypeError, match=rf"\.forward\(\) got an unexpected keyword argument '{name}'"):
            model(torch.full((1, 4), model.config.bos_token_id), **{name: None})
    with pytest.raises(TypeError, match=name):
        CompoundMusicForCausalLM.forward(torch.nn.Module(), torch.zeros(1, 2, 8), **{name: None})


def test_a_decode_step_swallows_nothing_either(tokenizer):
    """The short way through a decode step has no modules between the argument and the answer."""
    model, ids = made("sage_music", tokenizer)
    first = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    cache = getattr(first, CACHE_NAME)
    assert cache.step is not None
    with torch.no_grad(), pytest.raises(TypeError, match="'is_causal'"):
        model(ids[:, :1], cache=cache, is_causal=False)


def test_what_reads_an_argument_gets_it(tokenizer):
    ids = torch.full((2, 6), 1)
    for model in every_model(tokenizer):
        model.set_attn_implementation("eager")
        output = model(ids, output_hidden_states=True, output_attentions=True, return_dict=True)
        assert len(output.hidden_states) == 3 and len(output.attentions) == 2
        assert isinstance(model(ids, return_dict=False), tuple)
    model = tiny_model(tokenizer, "head")
    one, half = (model(ids, labels=ids, num_items_in_batch=count).loss for count in (10, 20))
    torch.testing.assert_close(one, 2 * half)
    shifted = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    given = model(ids, labels=ids, shift_labels=shifted).loss
    torch.testing.assert_close(given, model(ids, labels=ids).loss)
    performer = tiny_perceivers()
    performer.set_attn_implementation("eager")
    for target in (performer, performer.model):
        assert len(target(ids, output_attentions=True).cross_attentions) == 2


@pytest.mark.parametrize("name", PACKING)
def test_packed_rows_need_positions(tokenizer, name):
    ids, lengths = torch.full((2, 6), 1), torch.tensor([0, 6, 12])
    for routing in ("head", "token"):
        model = tiny_model(tokenizer, routing)
        for target in (model, model.model):
            with pytest.raises(ValueError, match=f"{name} without position_ids"):
                target(ids, **{name: lengths})
    model, ids = made("sage_music", tokenizer)
    cache = getattr(model.generate(ids, **GREEDY, return_dict_in_generate=True), CACHE_NAME)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{name} without position_ids"):
        model(ids[:, :1], cache=cache, **{name: lengths})  # not by the decode step either


def test_a_page_table_needs_pages(tokenizer):
    for name in PASSED_WITH_PAGES - PASSED_TO_ATTENTION:
        with pytest.raises(TypeError, match=f"'{name}'"):
            tiny_model(tokenizer, "token")(torch.full((2, 6), 1), **{name: torch.zeros(1)})


def test_perceivers_take_one_piece_a_row(tokenizer):
    model, ids = made("perceivers", tokenizer)
    positions = torch.arange(20).repeat(2)[None].expand(2, -1)
    with pytest.raises(ValueError, match="one piece a row"):
        model(ids, position_ids=positions)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    given = (mask.cumsum(-1) - 1).clamp(min=0)  # stands still in the padding
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, attention_mask=mask, position_ids=given).logits, model(ids, attention_mask=mask).logits
        )
        with pytest.raises(ValueError, match="num_latents is for passes without a cache"):
            model(ids, use_cache=True, num_latents=3)


def test_a_decode_step_reads_what_is_given(tokenizer):
    model, ids = made("sage_music", tokenizer)
    cache = getattr(model.generate(ids, **GREEDY, return_dict_in_generate=True), CACHE_NAME)
    with torch.no_grad():
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(ids[:, :1], inputs_embeds=model.get_input_embeddings()(ids[:, :1]), cache=cache)
        model.config.output_hidden_states = True
        assert len(model(ids[:, :1], cache=cache).hidden_states) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_takes_back_by_negative_numbers(tokenizer, family):
    """What Transformers asks of a cache of our own: past recording, then `crop` with minus the number of tokens."""
    model, ids = made(family, tokenizer)
    assistant = made(family, tokenizer, seed=1)[0]
    calls = []
    crop, record = (getattr(new_cache(model).__class__, name) for name in ("crop", "activate_past_recording"))
    kind = type(new_cache(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kind, "crop", lambda self, n: (calls.append(("crop", int(n), self.get_seq_length())), crop(self, n))[1]
        )
        patch.setattr(kind, "activate_past_recording", lambda self: (calls.append(("record",)), record(self))[1])
        expected = model.generate(ids[:1], **GREEDY)
        assert not calls
        assert torch.equal(model.generate(ids[:1], **GREEDY, assistant_model=assistant), expected)
    crops = [call[1:] for call in calls if call[0] == "crop"]
    assert calls[0] == ("record",) and crops
    assert all(count <= 0 for count, _ in crops) and any(count < 0 for count, _ in crops)
    # `crop(n)` that keeps n tokens would give wrong tokens without an error: a positive number is refused.
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.crop(-15)
        assert cache.get_seq_length() == 25
        cache.crop(0)
        assert cache.get_seq_length() == 25
        with pytest.raises(ValueError, match="0 or minus"):
            cache.crop(25)
        again = model(ids[:, 25:], cache=cache, logits_to_keep=1).logits
        torch.testing.assert_close(again, model(ids, use_cache=True, logits_to_keep=1).logits, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_caches_answer_what_generate_asks(tokenizer, family):
    model, ids = made(family, tokenizer)
    cache = new_cache(model)
    with torch.no_grad():
        model(ids, cache=cache)
    assert isinstance(cache, DynamicCache) and cache.is_compileable is False
    assert cache.get_query_offset(0) == 40 and tuple(cache.get_mask_sizes(3, 0)) == (43, 0)
    if family == "sage_music":
        assert SageMusicCache(model.config, max_cache_len=50).is_compileable is True


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_and_a_cache_are_not_mixed(tokenizer, family):
    """A layer that is computed again on the way back would write its rows into the cache twice."""
    model, ids = made(family, tokenizer)
    model.train().gradient_checkpointing_enable()
    assert getattr(model(ids, labels=ids), CACHE_NAME) is None
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, labels=ids, cache=new_cache(model))
    with torch.no_grad():  # without gradients nothing is computed twice
        assert torch.equal(model.generate(ids, **GREEDY), model.eval().generate(ids, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_hands_no_cache_to_the_metrics(tokenizer, family, tmp_path):
    """`Trainer.predict` collects every output that the config does not list: tensors, not caches."""
    model, ids = made(family, tokenizer)
    rows = [{"input_ids": row, "labels": row} for row in ids[:, -8:]]
    seen = []
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=2),
        eval_dataset=rows,
        compute_metrics=lambda prediction: seen.append(prediction.predictions) or {},
    )
    model.config.use_cache = True  # Trainer sets what its own arguments say
    assert trainer.evaluate()["eval_loss"] > 0
    assert seen[0].shape == (2, 8, model.config.vocab_size)
    assert CACHE_NAME in model.config.keys_to_ignore_at_inference  # whoever asks PerceiverS for a cache there


@pytest.mark.parametrize("module", [sage_music.arguments_sage_music, perceivers.arguments_perceivers])
def test_only_an_untested_version_warns(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.warn_untested(("transformers>=5,<6", "no_such_package>=1,<2"))
    installed = metadata.version("transformers")
    with pytest.warns(UserWarning, match=rf"tested with transformers>=4,<5, and .*{installed} is installed") as caught:
        module.warn_untested(("transformers>=4,<5", "torch>=2,<3"))
    assert len(caught) == 1 and str(caught[0].message).count(". ") == 0


@pytest.mark.parametrize(
    ("version", "warns"),
    [
        ("5.23.0", False),
        ("5.24.9", False),
        ("5.24.1+cpu", False),
        ("5.22.2", True),
        ("5.25.0", True),
        ("5.25.0.dev0", True),  # what a clone of the repository calls itself, after 5.24
        ("5.25.0rc1", True),
        ("6.0", True),
        (None, True),  # a package without metadata
    ],
)
def test_versions_count_by_their_release(monkeypatch, version, warns):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_untested(("transformers>=5.23,<5.25",))
    assert len(caught) == warns


def test_a_model_is_built_with_a_warning_under_an_untested_version(tokenizer, monkeypatch):
    for module, build in (
        ("sage_music.modeling_sage_music", lambda: tiny_model(tokenizer)),
        ("perceivers.modeling_perceivers", tiny_perceivers),
    ):
        monkeypatch.setattr(f"{module}.warn_untested", lambda: warn_untested(("torch>=0,<1",)))
        with pytest.warns(UserWarning, match="tested with torch>=0,<1"):
            build()


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_is_refused_on_the_cpu(tokenizer, family):
    """There PyTorch's kernel gives wrong numbers at some lengths and says nothing: wrong music, silently."""
    model, ids = made(family, tokenizer)
    model.set_attn_implementation("flex_attention")
    for call in (lambda: model(ids), lambda: model.model(ids), lambda: model.generate(ids, **GREEDY)):
        with pytest.raises(ValueError, match=r"'flex_attention' is refused on the CPU.*use 'sdpa'"):
            call()
