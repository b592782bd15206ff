"""What a checkpoint tells of itself: its card, its license, what it was made from, the report of its training.

All of it is read from files beside the weights, in a folder or on the Hub; a damaged one is an error that names it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import cached_file

from notekit.checkpoint import BUNDLED

from .cards import CardError, stated_license
from .flattening import ROOT

TASK = "midi-continuation"


class ExportError(ValueError):
    """A checkpoint that cannot be exported as asked. `str()` says what to do."""


def file_of(origin: str, name: str) -> Path | None:
    """A file of a folder or of a repository on the Hub; None where there is none."""
    if os.path.isdir(origin):
        path = Path(origin, name)
        return path if path.is_file() else None
    try:
        found = cached_file(origin, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found)


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ExportError: it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{path}: no text in UTF-8: mend it, or put it away.") from error


def read_mapping(path: Path) -> dict:
    """A JSON file that holds a mapping.

    Raises:
        ExportError: it holds none.
    """
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ExportError(f"{path}: damaged, for it is no mapping in JSON: mend it, or put it away.")
    return found


def read_report(origin: str) -> dict | None:
    """The `report.json` that `sage-music train` leaves beside `best/` and `adapter/`; None where there is none.

    Raises:
        ExportError: it is not as training writes it.
    """
    path = Path(origin, "..", "report.json")
    if not os.path.isdir(origin) or not path.is_file():
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
        raise ExportError(f"{path}: not the report of a training run: mend it, or put it away.")
    return report


def base_of(origin: str) -> str | None:
    """What a checkpoint was made from, where it tells: a folder or a Hub name. Training begun anew has no base.

    Raises:
        ExportError: the file that tells is damaged.
    """
    path, names = file_of(origin, "adapter_config.json"), ("base_model_name_or_path",)
    if path is None or file_of(origin, "config.json") is not None:
        # What `sage-music train` leaves beside best/ and adapter/; the folder's place is in newer runs.
        path, names = Path(origin, "..", "run.json"), ("model_folder", "model")
        if not os.path.isdir(origin) or not path.is_file():
            return None
    found = read_mapping(path)
    base = next((found[name] for name in names if found.get(name)), None)
    if base is not None and not isinstance(base, str):
        raise ExportError(f"{path}: damaged, for its base model is {base!r}: mend it, or put it away.")
    if base is None or base.endswith(".json"):
        return None
    return str(BUNDLED.get(base, base))


def lineage(origin: str) -> Iterator[str]:
    """A checkpoint, what it was made from, what that was made from, as far as they tell."""
    seen = set()
    while origin is not None:
        key = os.path.realpath(origin) if os.path.isdir(origin) else origin
        if key in seen:
            return
        seen.add(key)
        yield origin
        origin = base_of(origin)


def is_there(name: str) -> bool:
    """Whether a checkpoint's name is a folder's, or one that the Hub knows."""
    return os.path.isdir(name) or any(file_of(name, file) for file in ("config.json", "adapter_config.json"))


def bundled_name(origin: str | None) -> str | None:
    """The name of a bundled checkpoint's card, by its folder."""
    if origin is None:
        return None
    return next((f.name for f in BUNDLED.values() if Path(origin).resolve() == f.resolve()), None)


def own_card(origin: str) -> Path | None:
    """The card of a bundled checkpoint, of an export or of one on the Hub."""
    bundled = bundled_name(origin)
    if bundled is not None:
        return ROOT / "model_cards" / f"{bundled}.md"
    return file_of(origin, "README.md") if pipeline_module(origin) is not None else None


def pipeline_module(origin: str) -> str | None:
    """The file of the custom pipeline that a checkpoint's config names; None where it names none of ours."""
    path = file_of(origin, "config.json")
    try:
        impl = read_mapping(path)["custom_pipelines"][TASK]["impl"]
        module = impl.split(".")[0]
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return None
    return module if file_of(origin, f"{module}.py") is not None else None


def licenses_of(origin: str) -> Iterator[tuple[str, str, Path]]:
    """The checkpoints of a lineage whose card tells a license: the checkpoint, its license, the card.

    Raises:
        ExportError: a card is damaged.
    """
    for ancestor in lineage(origin):
        card = own_card(ancestor) or file_of(ancestor, "README.md")
        if card is None:
            continue
        try:
            license = stated_license(read_text(card), str(card))
        except CardError as error:
            raise ExportError(f"{error} Mend it, or put it away.") from error
        if license is not None:
            yield ancestor, license, card


__all__ = [
    "TASK",
    "ExportError",
    "base_of",
    "bundled_name",
    "file_of",
    "is_there",
    "licenses_of",
    "lineage",
    "own_card",
    "pipeline_module",
    "read_mapping",
    "read_report",
    "read_text",
]
