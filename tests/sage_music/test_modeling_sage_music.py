"""The model: padding, causality, checkpointing, compilation, saving, and configs that contradict themselves."""

import pytest
import torch
from conftest import ROUTINGS, tiny_config, tiny_model

from sage_music import SageMusicConfig, SageMusicForCausalLM


def test_left_padding_changes_nothing(model, prompts):
    padding = torch.zeros(2, 9, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(prompts)], dim=1)
    with torch.no_grad():
        got = model(torch.cat([padding, prompts], dim=1), attention_mask=mask).logits[:, 9:]
        torch.testing.assert_close(got, model(prompts).logits, atol=1e-4, rtol=1e-4)


def test_no_token_reads_the_future(model, prompts):
    changed = prompts.clone()
    changed[:, 60] = (changed[:, 60] + 7) % 700 + 10
    with torch.no_grad():
        before, after = model(prompts).logits, model(changed).logits
    torch.testing.assert_close(after[:, :60], before[:, :60], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[:, 60], before[:, 60])


def test_gradient_checkpointing_gives_the_same_gradients(model, prompts):
    model.train()
    grads = []
    for checkpointing in (False, True):
        model.activation_checkpointing_enable() if checkpointing else model.activation_checkpointing_disable()
        model.zero_grad()
        model(prompts, labels=prompts).loss.backward()
        grads.append(model.model.layers[0].self_attn.kv_weight.grad.clone())
    model.activation_checkpointing_disable()
    model.zero_grad()
    model.eval()
    torch.testing.assert_close(grads[0], grads[1])


def test_loss_uses_num_items_in_batch(tokenizer, prompts):
    """Gradient accumulation divides by the items of all micro-batches; a model that ignores them trains wrong."""
    model = tiny_model(tokenizer)
    with torch.no_grad():
        mean = model(prompts, labels=prompts).loss
        half = model(prompts, labels=prompts, num_items_in_batch=2 * prompts.shape[0] * (prompts.shape[1] - 1)).loss
    torch.testing.assert_close(half, mean / 2)


def test_inputs_embeds_need_attribute_ids(tokenizer, prompts):
    model = tiny_model(tokenizer)
    embeds = model.model.embed_tokens(prompts)
    with pytest.raises(ValueError, match="attribute_ids"):
        model(inputs_embeds=embeds)
    codes = model.model.token_codes[prompts]
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds, attribute_ids=codes).logits, model(prompts).logits)


def test_ids_outside_the_vocabulary_are_named(tokenizer):
    model = tiny_model(tokenizer)
    with pytest.raises(ValueError, match="9999"):
        model(torch.tensor([[1, 9999]]))
    with pytest.raises(ValueError, match="-3"):
        model.generate(torch.tensor([[1, -3]]), max_new_tokens=2)


def test_a_foreign_cache_is_refused(tokenizer, prompts):
    from transformers import DynamicCache

    model = tiny_model(tokenizer)
    with pytest.raises(ValueError, match="SageMusicCache"):
        model(prompts, past_key_values=DynamicCache(config=model.config), use_cache=True)


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_saved_and_loaded_logits_are_identical(tokenizer, prompts, tmp_path, routing):
    model = tiny_model(tokenizer, routing)
    model.save_pretrained(tmp_path)
    again = SageMusicForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(prompts).logits, model(prompts).logits)


def test_a_grammar_switched_off_stays_off(tokenizer, tmp_path):
    model = tiny_model(tokenizer)
    model.generation_config.midi_grammar = False
    model.save_pretrained(tmp_path)
    assert SageMusicForCausalLM.from_pretrained(tmp_path).generation_config.midi_grammar is False


def test_compiled_training_step_has_no_graph_break(tokenizer, prompts):
    import shutil

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    model = tiny_model(tokenizer, "head", initializer_range=0.1, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True)
    losses = [run(prompts, labels=prompts, use_cache=False).loss for run in (compiled, model)]
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert model.model.layers[0].self_attn.kv_weight.grad.abs().sum() > 0
    positions = torch.cat([torch.arange(50), torch.arange(70)]).expand(2, -1)  # packed rows
    losses = [run(prompts, labels=prompts, position_ids=positions).loss for run in (compiled, model)]
    torch.testing.assert_close(*losses)


def test_auto_classes_load_a_saved_model(tokenizer, prompts, tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    model = tiny_model(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "SageMusicForCausalLM"
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "SageMusicModel"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_attribute_ids": [0, 1, 2]}, "token_attribute_ids has 3 entries"),
        ({"token_attribute_ids": [9] * 769}, "holds 9"),
        ({"query_heads_per_attribute": [1, 2, 3]}, "query_heads_per_attribute"),
        ({"query_heads_per_attribute": [16, 0, 0, 0, 0]}, "positive multiple"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"kv_routing": "tokens"}, "kv_routing"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_contradicting_configs_are_refused(tokenizer, change, message):
    fields = tiny_config(tokenizer).to_dict()
    with pytest.raises(Exception, match=message):
        SageMusicConfig(**{**fields, **change})


def test_a_routed_model_without_an_attribute_map_is_refused():
    with pytest.raises(ValueError, match="config_fields"):
        SageMusicForCausalLM(SageMusicConfig(vocab_size=50))


def test_label_smoothing_shifts_the_labels(tokenizer, prompts, tmp_path):
    """Trainer smooths labels itself; a causal model it does not know would be trained to copy its input."""
    from transformers import Trainer, TrainingArguments

    model = tiny_model(tokenizer, initializer_range=0.1)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=arguments)
    with torch.no_grad():
        smoothed = trainer.compute_loss(model, {"input_ids": prompts, "labels": prompts.clone()})
        torch.testing.assert_close(smoothed, model(prompts, labels=prompts).loss, atol=1e-4, rtol=1e-4)
