"""What a checkpoint tells of itself: its card, its license, what it was made from, the report of its training.

All of it is read from files beside the weights, in a folder or on the Hub; a damaged one is an error that names it.
`carry` writes the license of converted weights beside them.
"""

import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers.utils import cached_file

from sage_studio.checkpoints import provenance as traces
from sage_studio.checkpoints.loading import BUNDLED
from sage_studio.checkpoints.provenance import (
    CARD,
    OutOfReachError,
    ProvenanceError,
    ancestors,
    front_matter,
    look,
    read_record,
    record_of,
    stated_license,
    write_record,
)

from .cards import keeps_license
from .flattening import ROOT

TASK = "midi-continuation"


class ExportError(ValueError):
    """A checkpoint that cannot be exported as asked. `str()` says what to do."""


def file_of(origin: str, name: str) -> Path | None:
    """A file of a folder or of a repository on the Hub; None where there is none, or none is to be had."""
    if os.path.isdir(origin):
        path = Path(origin, name)
        return path if path.is_file() else None
    try:
        found = cached_file(origin, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found)


def read_text(path: Path) -> str:
    """A text file, without a byte order mark.

    Raises:
        ExportError: it is no UTF-8.
    """
    try:
        return traces.read_text(path)
    except ProvenanceError as error:
        raise ExportError(str(error)) from error


def read_mapping(path: Path) -> dict:
    """A JSON file that holds a mapping.

    Raises:
        ExportError: it holds none.
    """
    try:
        return traces.read_mapping(path)
    except ProvenanceError as error:
        raise ExportError(str(error)) from error


def read_report(origin: str) -> dict | None:
    """The `report.json` that `sage-music train` leaves beside `best/` and `adapter/`; None where there is none.

    It is of these two alone: a run's checkpoints have seen fewer steps, and other figures.

    Raises:
        ExportError: it is not as training writes it, or a figure is not finite.
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
        raise ExportError(f"{path}: not the report of a training run: mend it, or put it away.")
    if not all(map(math.isfinite, numbers)):
        wrong = next((name for name in optional if not math.isfinite(report.get(name) or 0)), "a number in it")
        raise ExportError(
            f"{path}: {wrong} is not finite. Did the training diverge? To publish the weights without these figures, "
            "put the file away."
        )
    return report


def base_of(origin: str) -> str | None:
    """What a checkpoint was made from, where it tells: a folder or a Hub name. Training begun anew has no base.

    Raises:
        ExportError: the file that tells is damaged.
    """
    try:
        base = traces.base_of(origin)
        record = read_record(origin) if base is None else None
    except OutOfReachError:
        return None
    except ProvenanceError as error:
        raise ExportError(str(error)) from error
    if record is None:
        return base
    base = next((row["name"] for row in record[1] if row.get("name")), None)
    return str(BUNDLED.get(base, base)) if base is not None else None


def lineage(origin: str) -> Iterator[str]:
    """A checkpoint, what it was made from, what that was made from, as far as they tell.

    Raises:
        ExportError: a file is damaged.
    """
    yield from dict.fromkeys(ancestor.place for ancestor in _ancestors(origin))


def _ancestors(origin: str) -> Iterator[traces.Ancestor]:
    """Those of `checkpoints.provenance`, with the license of the bundled checkpoints, whose cards are not installed."""
    try:
        for ancestor in ancestors(origin):
            if ancestor.name in BUNDLED and ancestor.unseen is None:
                card = own_card(ancestor.place)
                ancestor = ancestor._replace(license=stated_license(card), source=card)
            yield ancestor
    except ProvenanceError as error:
        raise ExportError(str(error)) from error


def is_there(name: str) -> bool:
    """Whether a checkpoint's name is a folder's, or one that the Hub knows."""
    try:
        return os.path.isdir(name) or any(look(name, file) for file in ("config.json", "adapter_config.json"))
    except OutOfReachError:
        return False


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
    return file_of(origin, CARD) if pipeline_module(origin) is not None else None


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
    """The checkpoints of a lineage of which a license is known: the checkpoint, its license, the file that says so.

    Raises:
        ExportError: a card is damaged; or a license, or the notice that goes with it, could not be looked at.
    """
    for ancestor in _ancestors(origin):
        if ancestor.unseen is not None:
            raise ExportError(
                f"{_unseen(ancestor, origin)} Make it reachable, or if you know that it allows the license you give: "
                "--confirm-license."
            )
        if ancestor.license is not None:
            name = ancestor.place if ancestor.name is None or ancestor.name in BUNDLED else ancestor.name
            yield name, ancestor.license, ancestor.source


def notice_of(origin: str) -> Path | None:
    """The nearest `NOTICE.md` of a lineage.

    Raises:
        ExportError: a file is damaged.
    """
    return next((ancestor.notice for ancestor in _ancestors(origin) if ancestor.notice is not None), None)


def license_of(origin: str) -> tuple[str, Path] | None:
    """The license that a copy of these weights in another format has, and the file that says so; None: none is known.

    It is the nearest, or the nearest that must be kept where another one before it may not have been chosen. Warns of
    what could not be looked at.

    Raises:
        ExportError: a card is damaged.
    """
    found = []
    for ancestor in _ancestors(origin):
        if ancestor.unseen is not None:
            warnings.warn(f"{_unseen(ancestor, origin)} What is written may lack it.", stacklevel=3)
        elif ancestor.license is not None:
            found.append((ancestor.license, ancestor.source))
    return next((known for known in found if not keeps_license(known[0], "")), found[0] if found else None)


def carry(source: str | os.PathLike, folder: Path, converter: str) -> None:
    """Write into the new `folder` of a converted checkpoint what was known of its `source`: its license and notice.

    That is `provenance.json`, `NOTICE.md` where there is one, and a card with the license, for whoever publishes the
    folder as it is. Nothing in them names a folder.

    Args:
        source: what was converted: a folder, a file in one, a Hub name.
        converter: name of the module.

    Raises:
        ExportError: a file beside the source is damaged.
    """
    origin = os.fspath(source)
    origin = os.path.dirname(origin) or "." if os.path.isfile(origin) else origin
    known = license_of(origin)
    rows, notice = record_of(origin)
    write_record(folder, rows, notice)
    if known is None:
        return
    license, card = known
    stated = (front_matter(read_text(card), str(card)) or {}) if card.name != traces.RECORD else {}
    name = rows[0]["name"] if rows[0]["name"] not in BUNDLED else None
    more = {key: stated[key] for key in ("license_name", "license_link") if isinstance(stated.get(key), str)}
    if not more.get("license_link", "http").startswith("http"):  # a file that stays behind
        del more["license_link"]
    data = ModelCardData(license=license, base_model=name, **more)
    text = f"Converted from {name or 'another checkpoint'} by `python -m conversion.{converter}` of sage-music. "
    text += f"The license of the weights is `{more.get('license_name', license)}`, as before."
    text += " `NOTICE.md` belongs to it." if notice is not None else ""
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n# A converted checkpoint\n\n{text}\n", encoding="utf-8")


def _unseen(ancestor: traces.Ancestor, origin: str) -> str:
    """That the license of an ancestor is out of reach, and why."""
    what = f"{ancestor.place}, which these weights were made from"
    if ancestor.source is not None:
        what = f"a folder that {ancestor.place} was made from"
    elif ancestor.place == origin:
        what = origin
    return f"{what}: its license could not be looked at ({ancestor.unseen})."


__all__ = [
    "TASK",
    "ExportError",
    "base_of",
    "bundled_name",
    "carry",
    "file_of",
    "is_there",
    "license_of",
    "licenses_of",
    "lineage",
    "notice_of",
    "own_card",
    "pipeline_module",
    "read_mapping",
    "read_report",
    "read_text",
]
