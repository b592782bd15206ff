"""LoRA on both families: it learns, its files load in every way PEFT and Transformers know, and it plays as merged."""

import json
import sys

import pytest
import torch
from conftest import tiny_model, tiny_perceivers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from perceivers import PerceiverSForCausalLM, PerceiverSTokenizer
from sage_music import PRETRAINED, SageMusicForCausalLM, quantize_int8
from sage_studio.checkpoints import load
from sage_studio.checkpoints.lora import add_lora, lora_targets
from sage_studio.errors import CheckpointError, MissingExtraError

KINDS = ["head", "head-uneven", "token", "mha", "sliding", "stream", "ported"]
SAGE_MUSIC = ["kv_weight", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PERCEIVERS = ["q_proj", "kv_proj", "qkv_proj", "o_proj", "up_proj", "down_proj"]


def make(kind: str, tokenizer, **options):
    if kind in ("sliding", "stream", "ported"):
        return tiny_perceivers(kind, **options)
    return tiny_model(tokenizer, kind, **options)


def disturb(model, size: float = 0.3) -> None:
    """Give the adapters' B, which begin as zero, weights that change the likeliest token."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def ids(kind, prompts, events) -> torch.Tensor:
    """(2, 40) tokens of the family."""
    return (events if kind in ("sliding", "stream", "ported") else prompts)[:, :40]


@pytest.fixture
def adapted(kind, tokenizer, tmp_path):
    """A `PeftModel` with disturbed adapters, saved in `tmp_path / "adapter"`, its base in `tmp_path / "base"`."""
    base = make(kind, tokenizer)
    base.save_pretrained(tmp_path / "base")
    (PerceiverSTokenizer() if hasattr(base.config, "num_latents") else tokenizer).save_pretrained(tmp_path / "base")
    model = add_lora(type(base).from_pretrained(tmp_path / "base"), rank=3, alpha=6).eval()
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return model


@pytest.fixture
def folder(tokenizer, tmp_path):
    """The folder of an adapter to break; its base in `tmp_path / "base"`."""
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    add_lora(load(tmp_path / "base")[0], rank=2).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_every_matrix_of_attention_and_mlp_learns_and_nothing_else(kind, ids, tokenizer):
    base = make(kind, tokenizer)
    before = base(ids).logits
    model = add_lora(base, rank=3)
    assert torch.equal(model(ids).logits, before)
    disturb(model)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    names = {name for name, _ in model.named_parameters() if ".lora_A." in name}
    config = base.config
    family = SAGE_MUSIC if hasattr(config, "kv_routing") else PERCEIVERS
    assert lora_targets(make(kind, tokenizer)) == sorted(family)
    layers = config.num_hidden_layers
    # PerceiverS: qkv, o, up, down of a layer; q, kv, o, up, down of a cross-attention layer.
    assert len(names) == (6 * layers if family is SAGE_MUSIC else 4 * layers + 5 * len(config.cross_scales))


@pytest.mark.parametrize("kind", ["head", "head-uneven", "mha"])
def test_each_attribute_has_a_low_rank_update_of_its_own(kind, tokenizer):
    base = make(kind, tokenizer)
    before = [layer.self_attn.kv_weight.detach().clone() for layer in base.model.layers]
    model = add_lora(base, rank=3, targets=["kv_weight"])
    disturb(model)
    merged = model.merge_and_unload()
    for layer, old in zip(merged.model.layers, before, strict=True):
        update = layer.self_attn.kv_weight.detach() - old
        assert update.shape == old.shape  # (A, 2 * h * d, hidden_size)
        assert (torch.linalg.matrix_rank(update, rtol=1e-4) == 3).all()
        # Of one rank-3 space the stacked updates of all attributes would be; they have theirs.
        together = torch.linalg.matrix_rank(update.flatten(0, 1), rtol=1e-4)
        assert together == min(3 * len(old), old.shape[2])


@pytest.mark.parametrize(
    ("kind", "targets"), [("head", None), ("head", ["kv_weight"]), ("sliding", None), ("sliding", ["kv_proj"])]
)
def test_training_it_lowers_the_loss_and_leaves_the_base(kind, targets, ids, tokenizer):
    base = make(kind, tokenizer)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = add_lora(base, rank=4, targets=targets)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    state = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): t for name, t in model.state_dict().items()
    }
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_it_loads_by_peft_transformers_and_our_loader(kind, adapted, ids, tmp_path):
    wanted = adapted(ids).logits
    cls, base, folder = type(adapted.get_base_model()), tmp_path / "base", tmp_path / "adapter"
    assert (wanted - cls.from_pretrained(base).eval()(ids).logits).abs().max() > 0.1
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    beside = cls.from_pretrained(base)
    beside.load_adapter(folder)
    for way, model in (
        ("PeftModel", PeftModel.from_pretrained(cls.from_pretrained(base), folder)),
        ("load_adapter", beside),
        ("from_pretrained", cls.from_pretrained(folder)),
        ("auto class", AutoModelForCausalLM.from_pretrained(folder)),
    ):
        assert torch.equal(model.eval()(ids).logits, wanted), way
    model, _ = load(folder)
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=2e-4)
    assert type(model) is cls and not model.training
    assert not any("lora" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(cls.from_pretrained(tmp_path / "merged").eval()(ids).logits, model(ids).logits)


def test_unmerged_it_plays_what_it_plays_merged(kind, adapted, ids, tmp_path):
    """Token for token: SAGE-Music's decode step and PerceiverS's cache read weights that an adapter is not in."""
    cls, prompt, options = type(adapted.get_base_model()), ids[:1], {"do_sample": False, "max_new_tokens": 40}
    plain = cls.from_pretrained(tmp_path / "base").eval().generate(prompt, **options)
    merged = load(tmp_path / "adapter")[0]
    wanted = merged.generate(prompt, **options)
    assert not torch.equal(wanted, plain)
    inside = cls.from_pretrained(tmp_path / "adapter").eval()
    for model in (adapted, inside, merged):
        for more in ({}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(model.generate(prompt, **options, **more), wanted), (type(model).__name__, more)
        # PerceiverS without a cache takes no more than its context, in windows that it begins anew with every token.
        short = {"do_sample": False, "max_new_tokens": 7, "use_cache": False}
        slow = model.generate(prompt[:, :40], **short)
        assert torch.equal(slow, merged.generate(prompt[:, :40], **short))
        assert cls is PerceiverSForCausalLM or torch.equal(slow, wanted[:, : slow.shape[1]])
    masked = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    both = {"attention_mask": masked[1], "num_beams": 2, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(adapted.generate(masked[0], **both), merged.generate(masked[0], **both))


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_one_model_plays_with_without_and_after_merging(targets, tokenizer, prompts):
    """The decode step kept from a generation before must not go on with weights of then."""
    model, prompt, options = tiny_model(tokenizer), prompts[:1, :40], {"do_sample": False, "max_new_tokens": 30}
    plain = model.generate(prompt, **options)
    assert model._decode_step is not None
    adapted = add_lora(model, rank=3, targets=targets)
    assert torch.equal(adapted.generate(prompt, **options), plain)
    # Around linear layers alone the step goes on; an adapter of kv_weight is around the whole attention.
    assert (model._decode_step is None) == (targets is None)
    disturb(adapted, 0.5)
    changed = adapted.generate(prompt, **options)
    assert torch.equal(changed, adapted.generate(prompt, **options, use_cache=False))
    assert not torch.equal(changed, plain)
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(prompt, **options), plain)
    adapted.merge_adapter()
    assert torch.equal(adapted.generate(prompt, **options), changed)
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    assert merged is model and not any("lora" in name for name in model.state_dict())
    assert torch.equal(merged.generate(prompt, **options), changed) and merged._decode_step is not None


def test_an_adapter_of_a_bundled_checkpoint_names_it_shortly(tmp_path):
    """It can be published: no file in it says where this machine keeps its packages."""
    base, tokenizer = load("sage-music")
    place = base.name_or_path
    model = add_lora(base, rank=2).eval()
    disturb(model, 0.05)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "sage-music"
    assert not [path for path in tmp_path.iterdir() if place.encode() in path.read_bytes()]
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1e6
    ids = torch.tensor([tokenizer.encode("BOS_None Bar_None TimeSig_4/4")])
    with torch.no_grad():
        wanted = model(ids).logits
        again, its_tokenizer = load(tmp_path)
        torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        beside = SageMusicForCausalLM.from_pretrained(PRETRAINED)
        beside.load_adapter(tmp_path)
        assert torch.equal(beside.eval()(ids).logits, wanted)
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()
    merged = quantize_int8(again)  # merged, it is a model as any
    assert merged.generate(ids, max_new_tokens=8).shape == (1, ids.shape[1] + 8)


def test_an_adapter_upon_an_adapter(folder, prompts, tmp_path):
    """The base of the second is the model with the first, not the bare one."""
    first, _ = load(folder)
    second = add_lora(first, rank=2).eval()
    disturb(second)
    with torch.no_grad():
        wanted = second(prompts).logits
        second.save_pretrained(tmp_path / "second")
        torch.testing.assert_close(load(tmp_path / "second")[0](prompts).logits, wanted, rtol=1e-4, atol=2e-4)


def test_its_own_tokenizer_comes_before_the_base_models(folder, tokenizer, tmp_path):
    assert load(folder)[1].name_or_path == str(tmp_path / "base")
    tokenizer.save_pretrained(folder)
    assert load(folder)[1].name_or_path == str(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    other = type(tokenizer)(num_velocities=8)
    assert settings and other.get_vocab() != tokenizer.get_vocab()
    other.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        load(folder)


@pytest.mark.parametrize(
    ("base", "word"),
    [
        (None, "names no base model"),
        (
            "./gone",
            r"base model does not load: \./gone: no such folder.*Set base_model_name_or_path in .*adapter_config",
        ),
        ("sage-music", r"\(an adapter of sage-music\): the weights have missing keys"),  # more layers
        ("perceivers", "cannot be loaded|keys"),
        ("itself", "names itself"),
    ],
)
def test_a_base_model_that_is_not_there_or_another_is_refused(folder, base, word):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = str(folder) if base == "itself" else base
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=word) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t, key: t.pop(key), "missing keys"),
        (lambda t, key: t.update({key: t[key][:-1].clone()}), "mismatched keys"),
        (lambda t, key: t.update({key + "2": t[key].clone()}), "unexpected keys"),
        (lambda t, key: t.update({key: t[key] * float("nan")}), "NaN"),
    ],
    ids=["missing", "misshapen", "unexpected", "nan"],
)
def test_an_adapter_that_does_not_fit_is_refused(folder, change, word):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors, next(key for key in sorted(tensors) if "lora_A" in key and "q_proj" in key))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=word):
        load(folder)


def test_an_adapter_without_its_weights_is_refused(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=str(folder)):
        load(folder)


def test_without_peft_the_error_names_the_extra(folder, monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (lambda: add_lora(tiny_model(tokenizer)), lambda: load(folder)):
        with pytest.raises(MissingExtraError, match="needs PEFT: pip install 'peft>="):
            call()


def test_bad_arguments_are_refused(tokenizer):
    model = tiny_model(tokenizer)
    for options, word in (
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ["lm_head"]}, "lm_head: choose from down_proj, gate_proj, kv_weight"),
        ({"targets": []}, "choose from"),
        ({"dropout": 0.1}, "does not work on kv_weight"),
    ):
        with pytest.raises(ValueError, match=word):
            add_lora(model, **options)
    assert not any("lora" in name for name, _ in model.named_parameters())
    add_lora(model, dropout=0.1, targets=["q_proj"])
    with pytest.raises(ValueError, match="adapter already"):
        add_lora(model)
    add_lora(tiny_perceivers(), dropout=0.1)
    with pytest.raises(ValueError, match="int8"):
        add_lora(quantize_int8(tiny_model(tokenizer)))


@pytest.mark.parametrize("kind", ["head", "sliding"])
def test_trainer_saves_resumes_and_keeps_the_best(kind, tokenizer, ids, tmp_path):
    """A run of six steps, and one cut after three: the same adapter in the end. A checkpoint is an adapter's folder."""
    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]
    made = make(kind, tokenizer, initializer_range=0.1)
    made.save_pretrained(tmp_path / "base")
    (PerceiverSTokenizer() if kind == "sliding" else tokenizer).save_pretrained(tmp_path / "base")

    def trainer(out, **options):
        torch.manual_seed(0)
        model = add_lora(type(made).from_pretrained(tmp_path / "base"), rank=2)
        options = {"max_steps": 6, "learning_rate": 0.01, "save_steps": 3, "eval_steps": 3, **options}
        args = TrainingArguments(
            str(tmp_path / out),
            per_device_train_batch_size=4,
            eval_strategy="steps",
            load_best_model_at_end=True,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)

    whole = trainer("whole")
    whole.train()
    cut = trainer("cut", max_steps=3)
    cut.train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and resumed.state.best_model_checkpoint.endswith("checkpoint-6")
    adapters = [load_file(tmp_path / out / "checkpoint-6" / "adapter_model.safetensors") for out in ("whole", "cut")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    model, _ = load(tmp_path / "whole" / "checkpoint-6")
    with torch.no_grad():
        trained = whole.model.eval()(ids).logits
        assert (trained - made(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-4)


def test_other_adapters_of_peft_keep_the_cache_exact(tokenizer, prompts):
    """On the embedding and the norms, which the decode step reads by itself."""
    options = {"do_sample": False, "max_new_tokens": 30}
    for more in ({"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}):
        model = get_peft_model(tiny_model(tokenizer), LoraConfig(r=2, task_type="CAUSAL_LM", **more)).eval()
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        prompt = prompts[:1, :40]
        assert torch.equal(model.generate(prompt, **options), model.generate(prompt, **options, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["head", "sliding"])
def test_a_base_in_half_precision_keeps_its_adapters(kind, tokenizer, ids):
    model = add_lora(make(kind, tokenizer).bfloat16(), rank=2).eval()
    disturb(model, 0.1)
    unmerged = model(ids).logits
    merged = model.merge_and_unload()(ids).logits
    assert unmerged.dtype == merged.dtype == torch.bfloat16
    assert (unmerged - merged).abs().mean() < 0.05 * merged.abs().mean()
