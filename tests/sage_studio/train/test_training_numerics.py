"""What a stock `Trainer` computes with both families: accumulation, checkpointing and half precision change no result.

Rows have very different numbers of labels, and the last step of an epoch fewer rows: a mean over batches, instead of
one over tokens, shows at once.
"""

import pytest
import torch
from conftest import band, tiny_model, tiny_perceivers
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from perceivers import PerceiverSTokenizer, SegmentCollator
from sage_studio.checkpoints.lora import add_lora

WEIGHTS = {"initializer_range": 0.1}  # gradients of all layers, but no chaos
ROWS = 20  # two steps of 8 rows and one of 4


class Rows(Dataset):
    """Items made beforehand."""

    def __init__(self, items: list[dict[str, torch.Tensor]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


@pytest.fixture(scope="module")
def rows(tokenizer) -> dict:
    """Items by family. SAGE-Music: 40 tokens, of which 3 to 39 are trained; PerceiverS: segments of 4 to 49 tokens with
    up to N = 8 targets, of contexts both shorter and longer than N."""
    pieces = [tokenizer.midi_to_ids(band(bars=4, seed=seed)) for seed in range(ROWS)]
    piano = PerceiverSTokenizer()
    performances = [piano.midi_to_ids(band(bars=4, seed=seed)) for seed in range(ROWS)]
    blocks, segments = [], []
    for row in range(ROWS):
        ids = torch.tensor(pieces[row][:40])
        labels = ids.clone()
        labels[: 40 - (3, 39, 11, 30, 5)[row % 5]] = -100
        blocks.append({"input_ids": ids, "labels": labels})
        ids = torch.tensor(performances[row][: (4, 49, 9, 20, 6)[row % 5]])
        labels = ids.clone()
        labels[: max(1, len(ids) - 8)] = -100
        segments.append({"input_ids": ids, "labels": labels})
    return {
        "head": (Rows(blocks), default_data_collator),
        "sliding": (Rows(segments), SegmentCollator(piano.pad_token_id)),
    }


def make(kind: str, tokenizer, lora: bool = False):
    model = tiny_perceivers(**WEIGHTS) if kind == "sliding" else tiny_model(tokenizer, **WEIGHTS)
    if not lora:
        return model
    torch.manual_seed(0)
    return add_lora(model, rank=2)


def train(model, rows, folder, **options) -> Trainer:
    """Two epochs, each step logged."""
    dataset, collator = rows
    settings = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    args = TrainingArguments(str(folder), **{**settings, **options})
    trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    trainer.train()
    return trainer


def history(trainer: Trainer, name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in trainer.state.log_history if name in row], dtype=torch.float64)


def difference(one: Trainer, other: Trainer) -> float:
    """How far two runs' trained weights are apart, relative to their length."""
    states = [dict(trainer.model.named_parameters()) for trainer in (one, other)]
    names = [name for name, parameter in states[0].items() if parameter.requires_grad]
    a, b = (torch.cat([state[name].detach().flatten().double() for name in names]) for state in states)
    return float((a - b).norm() / a.norm())


pytestmark = pytest.mark.filterwarnings("ignore:.*drum notes", "ignore:.*one piano", "ignore:.*gradient_checkpointing")
KINDS = [("head", False), ("sliding", False), ("head", True), ("sliding", True)]
IDS = ["sage-music", "perceivers", "sage-music lora", "perceivers lora"]


@pytest.mark.parametrize(("kind", "lora"), KINDS, ids=IDS)
def test_accumulated_gradients_are_those_of_one_batch(kind, lora, rows, tokenizer, tmp_path):
    """In float32 within its rounding, in float64 within that: no trace of another mean is left."""
    for dtype, limit, ways in ((torch.float32, 1e-5, [(1, 8), (2, 4)]), (torch.float64, 1e-12, [(1, 8)])):
        whole = train(make(kind, tokenizer, lora).to(dtype), rows[kind], tmp_path)
        assert whole.state.global_step == 6 and history(whole, "loss")[-1] < history(whole, "loss")[0]
        for batch, steps in ways:
            parts = train(
                make(kind, tokenizer, lora).to(dtype),
                rows[kind],
                tmp_path,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=steps,
            )
            assert parts.state.global_step == 6
            torch.testing.assert_close(history(parts, "grad_norm"), history(whole, "grad_norm"), rtol=limit, atol=0)
            torch.testing.assert_close(history(parts, "loss"), history(whole, "loss"), rtol=1e-5, atol=0)
            assert difference(parts, whole) < limit


@pytest.mark.parametrize(("kind", "lora"), KINDS, ids=IDS)
def test_checkpointing_changes_nothing(kind, lora, rows, tokenizer, tmp_path):
    # The second name is the one of Transformers 4, which 5 still takes.
    names = ("activation_checkpointing", "gradient_checkpointing")[: 1 if lora else 2]
    plain = train(make(kind, tokenizer, lora), rows[kind], tmp_path, num_train_epochs=1)
    for name in names:
        spared = train(make(kind, tokenizer, lora), rows[kind], tmp_path, num_train_epochs=1, **{name: True})
        inner = spared.model.get_base_model() if lora else spared.model
        assert all(layer.gradient_checkpointing for layer in inner.model.layers)
        torch.testing.assert_close(history(spared, "grad_norm"), history(plain, "grad_norm"), rtol=1e-6, atol=0)
        assert difference(spared, plain) < 1e-6


@pytest.mark.parametrize(("kind", "lora"), KINDS, ids=IDS)
def test_bfloat16_autocast_learns_as_float32(kind, lora, rows, tokenizer, tmp_path):
    """20 steps; the model's own weights stay in float32."""
    options = {"max_steps": 20, "learning_rate": 5e-3}
    full = history(train(make(kind, tokenizer, lora), rows[kind], tmp_path, **options), "loss")
    half_run = train(make(kind, tokenizer, lora), rows[kind], tmp_path, bf16=True, **options)
    half = history(half_run, "loss")
    assert {parameter.dtype for parameter in half_run.model.parameters()} == {torch.float32}
    assert half[-3:].mean() < 0.95 * half[0]
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["head", "sliding"])
def test_bfloat16_weights_play(kind, rows, tokenizer):
    model = make(kind, tokenizer)
    ids = rows[kind][0][3]["input_ids"][None]  # 40 or 20 tokens
    full = model(ids).logits
    model = model.bfloat16()
    half = model(ids).logits
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.02 * full.norm()
    torch.manual_seed(0)
    played = model.generate(ids, do_sample=True, max_new_tokens=30)
    assert played.shape[1] == ids.shape[1] + 30 or int(played[0, -1]) == model.config.eos_token_id


@pytest.mark.parametrize("kind", ["head", "sliding"])
def test_the_loss_is_divided_by_the_labels_it_sums(kind, rows, tokenizer, tmp_path):
    """Trainer counts labels from the second column on, whatever the loss reads of them."""
    dataset, collator = rows[kind]
    model = make(kind, tokenizer)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    batches = [[0], [4, 2], [0, 1, 2, 3, 4], list(range(ROWS))]
    # Of PerceiverS: shorter than N = 8, one longer, and with padding.
    lengths = {collator([dataset[i] for i in batch])["input_ids"].shape[1] for batch in batches}
    assert lengths == ({4, 9, 49} if kind == "sliding" else {40})
    for batch in batches:
        inputs = collator([dataset[i] for i in batch])
        counted = trainer._get_num_items_in_batch([inputs], torch.device("cpu"))
        assert int(counted) == sum(int((dataset[i]["labels"][1:] != -100).sum()) for i in batch)
        with torch.no_grad():
            mean, weighted = model(**inputs).loss, model(**inputs, num_items_in_batch=counted).loss
            alone = [float(model(**collator([dataset[i]]), num_items_in_batch=counted).loss) for i in batch]
        torch.testing.assert_close(mean, weighted, rtol=1e-6, atol=0)  # the mean divides by what it sums
        assert float(weighted) == pytest.approx(sum(alone), rel=1e-5)


def test_label_smoothing_reads_shifted_labels_or_fails(rows, tokenizer, tmp_path):
    """Trainer takes the labels from the model and shifts them only for classes it knows by name, which the package
    sees to. Of a PerceiverS, whose logits are the last N, it can make nothing: that must not pass in silence."""
    dataset, collator = rows["head"]
    model = make("head", tokenizer)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    inputs = collator([dataset[i] for i in range(4)])
    trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    with torch.no_grad():
        smoothed = trainer.compute_loss(model, dict(inputs))
        log = model(inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    exact = log.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    by_hand = -(0.9 * exact[kept].mean() + 0.1 * log[kept].mean())
    torch.testing.assert_close(smoothed, by_hand, rtol=1e-5, atol=0)

    dataset, collator = rows["sliding"]
    trainer = Trainer(model=make("sliding", tokenizer), args=args, train_dataset=dataset, data_collator=collator)
    with pytest.raises((RuntimeError, ValueError)):
        trainer.compute_loss(trainer.model, collator([dataset[i] for i in range(5)]))


def test_a_compiled_model_trains_the_same(rows, tokenizer, tmp_path, fixed_shapes):
    plain = train(make("head", tokenizer), rows["head"], tmp_path, max_steps=2)
    compiled = train(
        make("head", tokenizer),
        rows["head"],
        tmp_path,
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="eager",
    )
    torch.testing.assert_close(history(compiled, "loss"), history(plain, "loss"), rtol=1e-5, atol=0)
    torch.testing.assert_close(history(compiled, "grad_norm"), history(plain, "grad_norm"), rtol=1e-4, atol=0)
