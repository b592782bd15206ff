"""Int8 weights: close to the float model, a quarter of its bytes, valid music, and clear refusals."""

import copy

import pytest
import torch
from conftest import DATA, tiny_model
from torch import nn

from sage_music import SageMusicCache, quantize_int8
from sage_music.quantization_sage_music import FEW_ROWS, Int8Linear
from sage_studio.checkpoints import load


def test_rows_are_rounded_to_127_steps_of_their_own_scale():
    torch.manual_seed(0)
    weight = torch.randn(5, 64) * torch.tensor([1e-6, 1e-2, 1.0, 50.0, 0.0])[:, None]
    layer = Int8Linear(weight)
    steps = (layer.weight - weight).abs() / layer.scale.float()[:, None]
    assert steps.max() <= 0.75  # half a step, and the scale is itself rounded for the largest
    assert layer.weight_int8.abs().amax(1).tolist()[:4] == pytest.approx([127] * 4, abs=1)
    assert not layer.weight[4].any()


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
def test_few_and_many_rows_give_the_product(rows):
    torch.manual_seed(0)
    layer, states = Int8Linear(torch.randn(96, 64)), torch.randn(1, rows, 64)
    expected = states @ layer.weight.T
    got = layer(states)
    assert got.dtype == torch.float32 and got.shape == (1, rows, 96)
    assert (got - expected).abs().max() < 0.01 * expected.abs().max()


def test_the_bundled_checkpoint_loses_next_to_nothing():
    model, tokenizer = load()
    fast = quantize_int8(copy.deepcopy(model))
    files = sorted((DATA / "multitrack" / "validation").rglob("*.mid"))[:6]
    if not files:
        pytest.skip("the evaluation files are not beside this checkout")
    losses = {"float": 0.0, "int8": 0.0, "bfloat16": 0.0}
    half = copy.deepcopy(model).to(torch.bfloat16)
    for file in files:
        ids = torch.tensor([tokenizer.midi_to_ids(file)[:400]])
        for name, one in (("float", model), ("int8", fast), ("bfloat16", half)):
            cache = SageMusicCache(one.config)
            with torch.no_grad():  # a few tokens at a time: through the integer product
                logits = [one(part, past_key_values=cache, use_cache=True).logits for part in ids.split(FEW_ROWS, 1)]
            losses[name] += float(nn.functional.cross_entropy(torch.cat(logits, 1)[0, :-1].float(), ids[0, 1:]))
    print(*(f"{name} {losses[name] / losses['float'] - 1:+.4%}" for name in ("int8", "bfloat16")), "nats, to float32")
    assert losses["int8"] / losses["float"] == pytest.approx(1, abs=0.002)
    assert losses["bfloat16"] / losses["float"] == pytest.approx(1, abs=0.002)

    def sizes(one):
        return [module for module in one.modules() if isinstance(module, nn.Linear | Int8Linear)]

    bytes_of = [sum(b.nbytes for m in sizes(one) for b in m.state_dict().values()) for one in (model, fast)]
    assert bytes_of[0] / bytes_of[1] > 3.9


def test_it_generates_what_decodes(tokenizer, prompts):
    model = tiny_model(tokenizer, "head")
    model.generate(prompts[:1], max_new_tokens=2)  # lays the float weights out
    quantize_int8(model)
    assert isinstance(model.lm_head, Int8Linear)
    ids = model.generate(prompts[:1], do_sample=True, max_new_tokens=200, eos_token_id=None)[0].tolist()
    ends = [step for step, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if token.startswith("Duration")]
    whole = ids[: ends[-1] + 1]  # the last note may be cut
    assert tokenizer.decode_midi(whole).note_num() == sum(model.config.grammar["notes"][token] for token in whole) > 40
    drafted = model.generate(prompts[:1], do_sample=False, max_new_tokens=30, prompt_lookup_num_tokens=3)
    assert drafted.shape[1] == prompts.shape[1] + 30


def test_refusals(tokenizer, tmp_path):
    model = tiny_model(tokenizer, "head")
    with pytest.raises(ValueError, match="float32"):
        quantize_int8(copy.deepcopy(model).to(torch.bfloat16))
    with pytest.raises(ValueError, match="meta"):
        quantize_int8(copy.deepcopy(model).to("meta"))
    quantize_int8(model)
    with pytest.raises(ValueError, match="already"):
        quantize_int8(model)
    with pytest.raises(ValueError, match="not saved"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_layers_that_do_not_fit_stay_and_are_named(tokenizer):
    model = tiny_model(tokenizer, "head", intermediate_size=100)
    with pytest.warns(UserWarning, match=r"2 layers stay in float32.*layers\.0\.mlp\.down_proj"):
        quantize_int8(model)
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert isinstance(model.model.layers[1].mlp.up_proj, Int8Linear)


def test_layers_with_a_bias_stay_and_generate(tokenizer, prompts):
    model = tiny_model(tokenizer, "head", attention_bias=True, mlp_bias=True, qk_norm=True)
    with pytest.warns(UserWarning, match="8 layers stay in float32 because they have a bias"):
        quantize_int8(model)
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear and isinstance(attention.o_proj, Int8Linear)
    assert model.generate(prompts[:1], do_sample=False, max_new_tokens=10, min_new_tokens=10).shape[1] == 130
