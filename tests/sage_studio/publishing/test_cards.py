"""A card's metadata are checked field by field, and the card that is made for a checkpoint passes the check."""

import pytest
import torch
from conftest import tiny_model, tiny_perceivers
from huggingface_hub import ModelCard
from transformers import pipeline

from perceivers import PerceiverSTokenizer
from sage_music import SageMusicTokenizer
from sage_studio.checkpoints.provenance import PERMISSIVE
from sage_studio.publishing.cards import (
    LICENSES,
    CardError,
    check_card,
    make_card,
    named,
    without_samples,
)

GOOD = """license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [midi]
datasets: [user/corpus]
base_model: user/base
language: en
widget:
- text: BOS_None
  output: {url: samples/continuation.wav}
inference:
  parameters: {top_p: 0.95}
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {type: midi, name: held-out music}
    metrics: [{type: nmsi, value: 61.5}]
"""
REPORT = {
    "corpus": {"splits": {"train": {"pieces": 1200, "notes": 90_000, "tokens": 400_000}}},
    "parameters": 5_900_000,
    "trainable_parameters": 210_000,
    "eval_nats_per_note": 5.98765,
    "nats_per_note_before": 6.5,
    "steps": 300,
}


def card(metadata: str) -> str:
    return f"---\n{metadata}---\n\n# A model\n"


def test_a_good_card_passes():
    data = check_card(card(GOOD))
    assert data.license == "apache-2.0" and data.eval_results[0].metric_value == 61.5


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("license: apache-2.0\n", "", "license: missing"),
        ("apache-2.0", "Apache 2", "license: 'Apache 2'"),
        ("apache-2.0", "other", "license_name: missing"),
        ("apache-2.0", "[mit]", "license: "),
        ("apache-2.0", "{a: b}", "license: "),
        ("apache-2.0", "1", "license: "),
        ("apache-2.0", "other\nlicense_name: [mine]", "license_name: "),
        ("apache-2.0", "other\nlicense_name: mine\nlicense_link: {a: b}", "license_link: "),
        ("text-generation\ntags", "[text-generation]\ntags", "pipeline_tag: "),
        ("text-generation\ntags", "{a: b}\ntags", "pipeline_tag: "),
        ("language: en", "language: {a: b}", "language: "),
        ("language: en", "new_version: [user/mine]", "new_version: "),
        ("language: en", "new_version: a/b/c", "new_version: 'a/b/c'"),
        ("language: en", "thumbnail: 7", "thumbnail: 7"),
        ("language: en", "base_model_relation: [finetune]", "base_model_relation: "),
        ("user/corpus", "{a: b}", "datasets: "),
        ("user/base", "{a: b}", "base_model: "),
        ("text-generation\ntags", "midi-continuation\ntags", "pipeline_tag: 'midi-continuation'"),
        ("transformers", "[a]", "library_name"),
        ("[midi]", "midi", "tags"),
        ("[midi]", "[1]", "tags"),
        ("user/corpus", "../corpus", "datasets: '../corpus'"),
        ("user/base", "runs/main/best", "base_model: 'runs/main/best'"),
        ("language: en", "language: music", "language: 'music'"),
        ("- text: BOS_None\n  output", "- output", "widget: example 1 has no input"),
        ("text: BOS_None", "text: [BOS_None]", "widget: text"),
        ("{url: samples/continuation.wav}", "sound", "widget: the output"),
        ("parameters: {top_p: 0.95}", "parameters: 1", "inference"),
        ("dataset: {type: midi, name: held-out music}", "data: {}", "model-index"),
        ("type: midi, ", "", "model-index"),
        ("value: 61.5", "value: high", "model-index: the value of nmsi is 'high'"),
        ("value: 61.5", "value: .nan", "model-index: the value of nmsi is nan"),
        ("- name: mine\n  results", "- results", "model-index"),
        ("tags: [midi]", "tags: [midi", "is no YAML"),
        ("license: apache-2.0", "- apache-2.0", ""),
    ],
)
def test_a_wrong_field_is_named(old, new, field):
    assert old in GOOD
    with pytest.raises(CardError, match=f"^mine.md: .*{field}"):
        check_card(card(GOOD.replace(old, new, 1)), "mine.md")


FIELDS = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "tags", "datasets", "base_model")
FIELDS += ("language", "widget", "inference", "model-index", "metrics", "new_version", "thumbnail", "model_name")


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_a_field_is_too_odd(field):
    """A card passes, or it is a `CardError` that says why."""
    for value in (
        "[x]",
        "{a: b}",
        "7",
        "1.5",
        "true",
        "2024-01-01",
        "[[x]]",
        "[{a: [b]}]",
        "[null]",
        "''",
        "2026-99-99",
    ):
        metadata = "license: mit\n" if field != "license" else ""
        try:
            check_card(card(f"{metadata}{field}: {value}\n"), "mine.md")
        except CardError as error:
            assert str(error).startswith("mine.md: ")


def test_permissive_licenses_are_licenses():
    assert PERMISSIVE < LICENSES


def test_a_byte_order_mark_hides_no_card():
    assert check_card("\ufeff" + card(GOOD)).license == "apache-2.0"


@pytest.mark.parametrize("family", ["sage_music", "perceivers"])
def test_what_the_widget_begins_with_is_gone_on_with(family):
    """As the Hub's widget does: the stock pipeline puts the new text right behind the old, and takes both again."""
    tokenizer = SageMusicTokenizer() if family == "sage_music" else PerceiverSTokenizer()
    model = tiny_model(tokenizer) if family == "sage_music" else tiny_perceivers()
    (example,) = check_card(make_card("mine", "user/mine", model.config, "mit")).widget
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    torch.manual_seed(0)
    (written,) = pipe(example["text"], max_new_tokens=5, do_sample=True, return_full_text=True)
    text = written["generated_text"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    assert text.split() == tokenizer.convert_ids_to_tokens(ids)
    assert len(ids) == len(tokenizer(example["text"])["input_ids"]) + 5


@pytest.mark.parametrize(
    ("splits", "expected"),
    [(["train", "test"], "test"), (["train", "validation"], "validation"), (["train"], "train"), ([], "validation")],
)
def test_the_result_names_the_split_that_was_measured(tokenizer, splits, expected):
    counts = {name: {"pieces": 1, "notes": 10, "tokens": 40} for name in splits}
    text = make_card("m", "u/m", tiny_model(tokenizer).config, "mit", report=REPORT | {"corpus": {"splits": counts}})
    assert check_card(text).eval_results[0].dataset_split == expected


def test_a_card_gets_the_name_of_its_repository():
    text = """A model.\n\n```python
pipe = pipeline("midi-continuation", model="USER/NAME", trust_remote_code=True)
old = pipeline("midi-continuation", model="user/mine-0")
```
Better than user/mine.\n```\nhf download USER/NAME\n```\n"""
    first = named(text, "user/mine")
    assert first == text.replace("USER/NAME", "user/mine")
    second = named(first, "user/mine-2")
    assert second == text.replace("USER/NAME", "user/mine-2") and named(second, "user/mine-2") == second
    assert named("# Nothing to run\n", "user/mine") == "# Nothing to run\n"


def test_a_card_without_metadata_is_refused():
    with pytest.raises(CardError, match="no metadata"):
        check_card("# A model\n")


@pytest.mark.parametrize("family", ["sage_music", "perceivers"])
def test_a_card_is_made_of_what_is_known(family, tokenizer):
    model = tiny_model(tokenizer) if family == "sage_music" else tiny_perceivers()
    text = make_card(
        "mine", "user/mine", model.config, "cc-by-4.0", base_model="user/base", datasets=["user/corpus"], report=REPORT
    )
    data = check_card(text)
    assert (data.base_model, data.datasets, data.license) == ("user/base", ["user/corpus"], "cc-by-4.0")
    assert data.eval_results[0].metric_value == 5.9877 and data.model_name == "mine"
    assert check_card(ModelCard(text).content).to_dict() == data.to_dict()
    for words in ('model="user/mine"', "trust_remote_code=True", "1,200 | 90,000 | 400,000", "210,000", "## Limits"):
        assert words in text
    assert "6.500 before training" in text
    assert "samples/continuation.png" in text and "samples/" not in without_samples(text)
    assert check_card(without_samples(text)).to_dict() == data.to_dict()
    assert "held-out music costs" not in make_card("mine", "user/mine", model.config, "mit").lower()


def test_a_made_card_with_a_wrong_name_is_caught(tokenizer):
    text = make_card("mine", "user/mine", tiny_model(tokenizer).config, "mit", base_model="runs/main/best")
    with pytest.raises(CardError, match="base_model: 'runs/main/best'"):
        check_card(text)
