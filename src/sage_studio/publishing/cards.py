"""Model cards: the one of a fine-tuned checkpoint, and what is wrong with the metadata of any.

The Hub validates a card's metadata only when it is sent, and some of it never: what `check_card` refuses has an error
that names the field, before anything is written or sent.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig

from sage_studio.checkpoints.provenance import ProvenanceError, front_matter, is_repo_id, read_mapping
from sage_studio.families import family_of

# License identifiers that the Hub knows (its documentation, "Licenses").
LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other""".split()
)

# Tasks that the Hub knows (`pipeline_tag`): those that music could be filed under come first.
TASKS = frozenset(
    """text-generation text-to-audio audio-to-audio other any-to-any audio-classification audio-text-to-text
    automatic-speech-recognition depth-estimation document-question-answering feature-extraction fill-mask graph-ml
    image-classification image-feature-extraction image-segmentation image-text-to-image image-text-to-text
    image-text-to-video image-to-3d image-to-image image-to-text image-to-video keypoint-detection mask-generation
    multiple-choice object-detection question-answering reinforcement-learning robotics sentence-similarity
    summarization table-question-answering table-to-text tabular-classification tabular-regression tabular-to-text
    text-classification text-ranking text-retrieval text-to-3d text-to-image text-to-speech text-to-video
    text2text-generation time-series-forecasting token-classification translation unconditional-image-generation
    video-classification video-text-to-text video-to-video visual-document-retrieval visual-question-answering
    voice-activity-detection zero-shot-classification zero-shot-image-classification
    zero-shot-object-detection""".split()
)

# What a card's examples load, as the export writes it: the name of a repository.
LOADED = re.compile(r"""pipeline\(\s*["']midi-continuation["'],\s*(?:model=)?["']([\w.-]+/[\w.-]+)["']""")
# What a card says where the repository has no name yet.
PLACEHOLDER = "USER/NAME"
TEMPLATE = Path(__file__).with_name("templates") / "card.md"
LENGTHS = {"bars": "prompt_bars=4, bars=16", "seconds": "prompt_s=20, music_s=60"}  # of its example

# Fields that are one word or one line.
TEXTS = ("license", "license_name", "license_link", "pipeline_tag", "library_name", "new_version", "thumbnail")
TEXTS += ("base_model_relation", "model_name")

# What an example of a widget may give to the model.
WIDGET_INPUTS = {"text", "src", "messages", "source_sentence", "structured_data", "table"}


class CardError(ValueError):
    """A card whose metadata is wrong. `str()` names the card, the field and what is wrong with it."""


def check_card(text: str, name: str = "README.md") -> ModelCardData:
    """The metadata of a model card, checked.

    Args:
        text: the card: YAML between two lines `---`, then Markdown.
        name: of the card, for errors.

    Raises:
        CardError: no metadata, or a field that the Hub would refuse or misunderstand.
    """
    text = text.removeprefix("\ufeff")
    try:
        raw = front_matter(text, name)
    except ProvenanceError as error:
        raise CardError(str(error)) from error
    if raw is None:
        raise CardError(f"{name}: no metadata: a model card begins with YAML between two lines of ---.")
    try:
        data = ModelCard(text).data
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        field = "model-index" if "model" in str(error) or "eval" in str(error) else "metadata"
        raise CardError(f"{name}: {field}: {' '.join(str(error).split())}") from error
    for problem in _problems(data, raw):
        raise CardError(f"{name}: {problem}")
    return data


def _problems(data: ModelCardData, raw: dict):
    """What is wrong, as `field: what`; `raw` are the metadata before huggingface_hub puts them in order."""
    for field in TEXTS:
        if raw.get(field) is not None and not isinstance(raw[field], str):
            yield f"{field}: {raw[field]!r} is no word."
    if data.license is None:
        yield "license: missing; it is an identifier such as apache-2.0."
    elif data.license not in LICENSES:
        yield f"license: {data.license!r} is no license of the Hub's; for one of your own, `other` and license_name."
    elif data.license == "other" and not data.license_name:
        yield "license_name: missing; license `other` needs a name."
    if data.pipeline_tag is not None and data.pipeline_tag not in TASKS:
        yield f"pipeline_tag: {data.pipeline_tag!r} is no task of the Hub's; text-generation is one."
    new_version = raw.get("new_version")
    if new_version is not None and not is_repo_id(new_version):
        yield f"new_version: {new_version!r} is no name on the Hub (user/name)."
    for field in ("tags", "metrics"):
        value = raw.get(field)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            yield f"{field}: {value!r} is no list of words."
    for field in ("datasets", "base_model"):
        for item in _listed(data.get(field)):
            if not is_repo_id(item):
                yield f"{field}: {item!r} is no name on the Hub (user/name)."
    for item in _listed(data.language):
        if not isinstance(item, str) or not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", item):
            yield f"language: {item!r} is no ISO 639 code."
    yield from _widget_problems(data.get("widget"))
    inference = data.get("inference")
    if inference is not None and not isinstance(inference, bool):
        if not isinstance(inference, dict) or not isinstance(inference.get("parameters", {}), dict):
            yield "inference: is false, or has a mapping `parameters`."
    for result in data.eval_results or []:
        for field in ("task_type", "dataset_type", "dataset_name", "metric_type"):
            if not isinstance(getattr(result, field), str):
                yield f"model-index: {field.replace('_', '.')} {getattr(result, field)!r} is no word."
        if isinstance(result.metric_value, bool) or not isinstance(result.metric_value, int | float):
            yield f"model-index: the value of {result.metric_type} is {result.metric_value!r}, not a number."
        elif not math.isfinite(result.metric_value):
            yield f"model-index: the value of {result.metric_type} is {result.metric_value}."


def _widget_problems(widget):
    if widget is None:
        return
    if not isinstance(widget, list):
        yield "widget: is a list of examples."
        return
    for number, example in enumerate(widget, 1):
        if not isinstance(example, dict) or not WIDGET_INPUTS & example.keys():
            yield f"widget: example {number} has no input (such as `text` or `src`)."
        elif any(not isinstance(example.get(field, ""), str) for field in ("text", "src", "example_title", "group")):
            yield f"widget: text, src, example_title and group of example {number} are texts."
        elif not isinstance(example.get("output", {}), dict | list):
            yield f"widget: the output of example {number} is a mapping, such as `text: ...` or `url: ...`."


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def named(text: str, repo_id: str) -> str:
    """A card of the repository `repo_id`: instead of the placeholder, and in blocks of code of another one's name."""
    text = text.replace(PLACEHOLDER, repo_id)
    loaded = LOADED.findall(text)
    if not loaded or repo_id in loaded:
        return text
    older = re.compile(rf"(?<![\w./-]){re.escape(loaded[0])}(?![\w/-]|\.\w)")
    return re.sub(r"```.*?```", lambda block: older.sub(repo_id, block[0]), text, flags=re.DOTALL)


def make_card(
    title: str,
    repo_id: str,
    config: PreTrainedConfig,
    license: str,
    license_name: str | None = None,
    base: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    report: dict | None = None,
) -> str:
    """The card of a checkpoint that has none of its own, such as a fine-tuned one.

    Args:
        repo_id: name on the Hub, `user/name`, in the example.
        base: the checkpoint it was trained from, as the text names it.
        base_model, datasets: names on the Hub, for the metadata.
        report: `report.json` of the training run.

    It shows the samples beside it, between marks that `without_samples` knows.
    """
    family = family_of(config)
    data = ModelCardData(
        license=license,
        license_name=license_name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["midi", "music-generation", "symbolic-music", *family.tags],
        base_model=base_model,
        datasets=list(datasets) or None,
        # It ends with a space: the stock pipeline puts what is new right behind it, and spaces part tokens.
        widget=[{"text": family.widget, "example_title": "From nothing"}],
        model_name=title,
        eval_results=_results(report),
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        metadata=data.to_yaml(),
        title=title,
        repo_id=repo_id,
        about=family.about,
        family=family.name,
        paper=family.paper,
        began=f" Its training began with the weights of {base}." if base else "",
        lengths=LENGTHS[family.unit],
        sections="\n\n".join([_model_section(config), *([_training_section(report)] if report else [])]),
        limits=family.limits,
        license=license_name or license,
    )


def read_report(origin: str) -> dict | None:
    """The `report.json` that `sage-music train` leaves beside `best/` and `adapter/`; None where there is none.

    It is of these two alone: a run's checkpoints have seen fewer steps, and other figures.

    Raises:
        ProvenanceError: it is not as training writes it, or a figure is not finite.
    """
    folder = Path(origin).resolve()
    path = folder.parent / "report.json"
    if not folder.is_dir() or folder.name not in ("best", "adapter") or not path.is_file():
        return None
    report = read_mapping(path)
    corpus = report.get("corpus", {})
    splits = corpus.get("splits", {}) if isinstance(corpus, dict) else None
    rows = list(splits.values()) if isinstance(splits, dict) else [None]
    optional = ("trainable_parameters", "steps", "eval_nats_per_note", "nats_per_note_before")
    numbers = [report.get("parameters"), *(report[name] for name in optional if report.get(name) is not None)]
    if all(isinstance(row, dict) for row in rows):
        numbers += [row.get(name, 0) for row in rows for name in ("pieces", "notes", "tokens")]
    else:
        numbers.append(None)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
        raise ProvenanceError(f"{path}: not the report of a training run: mend it, or put it away.")
    if not all(map(math.isfinite, numbers)):
        wrong = next((name for name in optional if not math.isfinite(report.get(name) or 0)), "a number in it")
        raise ProvenanceError(
            f"{path}: {wrong} is not finite. Did the training diverge? To publish the weights without these figures, "
            "put the file away."
        )
    return report


def without_samples(text: str) -> str:
    """A card without what stands between `<!-- samples -->` and `<!-- /samples -->`."""
    return re.sub(r"<!-- samples -->.*?<!-- /samples -->\n*", "", text, flags=re.DOTALL)


def _model_section(config: PreTrainedConfig) -> str:
    rows = {
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "context": f"{config.max_position_embeddings:,} tokens",
    }
    if hasattr(config, "num_latents"):
        rows["latents"] = f"{config.num_latents:,}"
    if hasattr(config, "kv_routing"):
        rows["attention"] = f'`kv_routing="{config.kv_routing}"`'
    return "## Model\n\n| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def _training_section(report: dict) -> str:
    splits = report.get("corpus", {}).get("splits", {})
    lines = [
        f"| {split} | {found.get('pieces', 0):,} | {found.get('notes', 0):,} | {found.get('tokens', 0):,} |"
        for split, found in splits.items()
    ]
    text = f"## Training\n\n{report['parameters']:,} parameters"
    if report.get("trainable_parameters", report["parameters"]) != report["parameters"]:
        text += f", of which {report['trainable_parameters']:,} (an adapter's, merged into the weights) were trained"
    text += f"; {report.get('steps', 0):,} steps."
    if report.get("eval_nats_per_note") is not None:
        text += f" Held-out music costs {report['eval_nats_per_note']:.3f} nats per note"
        before = report.get("nats_per_note_before")
        text += f" ({before:.3f} before training)." if before is not None else "."
    if lines:
        text += "\n\n| split | pieces | notes | tokens |\n|---|---|---|---|\n" + "\n".join(lines)
    return text


def _results(report: dict | None) -> list[EvalResult] | None:
    if not report or report.get("eval_nats_per_note") is None:
        return None
    # Training counts the split that it learns from and the one that it measures on.
    splits = list(report.get("corpus", {}).get("splits", {}))
    split = next((name for name in splits if name != "train"), "train" if splits else "validation")
    return [
        EvalResult(
            task_type="text-generation",
            task_name="MIDI continuation",
            dataset_type="midi",
            dataset_name="held-out pieces of the training corpus",
            dataset_split=split,
            metric_type="nats_per_note",
            metric_name="nats per note",
            metric_value=round(report["eval_nats_per_note"], 4),
        )
    ]
