"""What weights were made from, under which licenses: read from what lies beside them, and written beside new ones.

A checkpoint's card states its license, and `NOTICE.md` says what must be said with it. What it was made from is told by
an adapter's config, by a run's `run.json`, and by `provenance.json`, which training and the converters write into every
folder of weights, so that a folder that is copied away or a network that is down hides nothing:

    {"made_from": [{"name": "user/piano", "license": "cc-by-nc-sa-4.0"}, {"name": null, "license": "cc-by-4.0"}]}

All ancestors, the nearest first. `name` is one of the Hub's or of the bundled checkpoints', never a folder's; `license`
is null where none is stated; `"seen": false` where it could not be looked at. The nearest notice is copied too.

What is made of weights has a license that all of these allow: `keeps_license`. `carry` writes that of converted ones.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import ModelCardData, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from sage_studio.files import write_atomic

from .loading import BUNDLED

# httpx's or httpx2's, whichever huggingface_hub is built on: a download may break off in the middle.
HTTPError = HfHubHTTPError.__bases__[0]

CARD, NOTICE, RECORD = "README.md", "NOTICE.md", "provenance.json"

# Licenses that derivatives may leave for any other. All that is not here is kept, `other` and `unknown` too.
PERMISSIVE = frozenset(
    """apache-2.0 mit afl-3.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 etalab-2.0 isc odc-by openmdw-1.0
    postgresql ncsa unlicense zlib pddl""".split()
)


class ProvenanceError(ValueError):
    """A file beside a checkpoint that is damaged or out of reach. `str()` names it and says what to do."""


class OutOfReachError(ProvenanceError):
    """A checkpoint whose files could not be looked at. `str()` says why."""


class Ancestor(NamedTuple):
    """A checkpoint, or one that it was made from.

    Attributes:
        place: folder or Hub name; of one that is only known from a `provenance.json`, the folder of that file.
        name: on the Hub, or of a bundled checkpoint; None for other folders.
        license: that its card states; None where it states none.
        source: the file that says so.
        notice: its `NOTICE.md`.
        unseen: why none of this could be looked at; None where it could.
    """

    place: str
    name: str | None
    license: str | None = None
    source: Path | None = None
    notice: Path | None = None
    unseen: str | None = None


def look(place: str, name: str) -> Path | None:
    """A file of a folder or of a repository on the Hub; None where it is known that there is none.

    Raises:
        OutOfReachError: it is not known: no such folder, no network, no right to read it.
    """
    if os.path.isdir(place):
        path = Path(place, name)
        return path if path.is_file() else None
    if not is_repo_id(place):
        raise OutOfReachError("no such folder")
    try:
        return Path(hf_hub_download(place, name))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, HTTPError) as error:
        found = try_to_load_from_cache(place, name)
        if isinstance(found, str):
            return Path(found)
        if found is not None:  # the Hub has said once that there is none
            return None
        raise OutOfReachError(_reason(error)) from error


def file_of(place: str, name: str) -> Path | None:
    """A file of a folder or of a repository on the Hub; None where there is none, or none is to be had."""
    try:
        return look(place, name)
    except OutOfReachError:
        return None


def _reason(error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return "no such folder here, and HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "the Hub gives it only to those who have asked for access"
    if isinstance(error, RepositoryNotFoundError):
        return "no such folder here, and the Hub knows none or does not show it without the right token"
    if isinstance(error, HfHubHTTPError):
        return f"the Hub answered with status {error.response.status_code}"
    if isinstance(error, LocalEntryNotFoundError):
        return "no such folder here, and the Hub was not reached"
    return " ".join(str(error).split()) or type(error).__name__


def read_text(path: Path) -> str:
    """A text file, without a byte order mark.

    Raises:
        ProvenanceError: it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProvenanceError(f"{path}: no text in UTF-8: mend it, or put it away.") from error


def read_mapping(path: Path) -> dict:
    """A JSON file that holds a mapping.

    Raises:
        ProvenanceError: it holds none.
    """
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ProvenanceError(f"{path}: damaged, for it is no mapping in JSON: mend it, or put it away.")
    return found


def front_matter(text: str, name: str) -> dict | None:
    """The YAML between two lines `---` that a card begins with; None where there is none.

    Raises:
        ProvenanceError: it is no YAML, or no mapping; `name` is the card's.
    """
    block = re.match(r"\s*---[ \t]*(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---", text, re.DOTALL)
    if block is None:
        return None
    try:
        raw = yaml.safe_load(block[1])
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a ValueError: a date such as 2026-99-99
        raise ProvenanceError(f"{name}: its metadata is no YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(raw, dict):
        raise ProvenanceError(f"{name}: its metadata is no mapping of fields.")
    return raw


def stated_license(card: Path) -> str | None:
    """The license that a card states; None where it states none.

    Raises:
        ProvenanceError: the metadata are no YAML, or the license is no identifier.
    """
    text = read_text(card)
    try:
        license = (front_matter(text, str(card)) or {}).get("license")
    except ProvenanceError as error:
        raise ProvenanceError(f"{error} Mend it, or put it away.") from error
    if license is not None and not isinstance(license, str):
        raise ProvenanceError(
            f"{card}: license: {license!r} is no identifier such as apache-2.0. Mend it, or put it away."
        )
    return license


def base_of(place: str) -> str | None:
    """What a checkpoint was made from, where it tells: a folder or a Hub name. Training begun anew has no base.

    Raises:
        ProvenanceError: the file that tells is damaged.
        OutOfReachError: as `look`.
    """
    path, names = look(place, "adapter_config.json"), ("base_model_name_or_path",)
    if path is None or look(place, "config.json") is not None:
        # What `sage-music train` leaves beside best/ and adapter/; the folder's place is in newer runs.
        path, names = Path(place, "..", "run.json"), ("model_folder", "model")
        if not os.path.isdir(place) or not path.is_file():
            return None
    found = read_mapping(path)
    base = next((found[name] for name in names if found.get(name)), None)
    if base is not None and not isinstance(base, str):
        raise ProvenanceError(f"{path}: damaged, for its base model is {base!r}: mend it, or put it away.")
    if base is None or base.endswith(".json"):
        return None
    return str(BUNDLED.get(base, base))


def made_from(place: str) -> str | None:
    """As `base_of`, or else as `provenance.json` says; None where neither tells, or they are out of reach.

    Raises:
        ProvenanceError: a file is damaged.
    """
    try:
        base = base_of(place)
        record = read_record(place) if base is None else None
    except OutOfReachError:
        return None
    if record is not None:
        base = next((row["name"] for row in record[1] if row.get("name")), None)
    return None if base is None else str(BUNDLED.get(base, base))


def read_record(place: str) -> tuple[Path, list[dict]] | None:
    """The `provenance.json` of a checkpoint and the ancestors in it; None where there is none.

    Raises:
        ProvenanceError: it is damaged.
        OutOfReachError: as `look`.
    """
    path = look(place, RECORD)
    if path is None:
        return None
    found = read_mapping(path).get("made_from")
    rows = found if isinstance(found, list) else [None]
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str | None) for key in ("name", "license")):
            raise ProvenanceError(f"{path}: not as training or a conversion writes it: mend it, or put it away.")
    return path, rows


def ancestors(origin: str) -> Iterator[Ancestor]:
    """A checkpoint, what it was made from, what that was made from, as far as they tell.

    The Hub is asked only for what no `provenance.json` tells.

    Raises:
        ProvenanceError: a file is damaged.
    """
    bundled = {str(folder.resolve()): name for name, folder in BUNDLED.items()}
    todo, known = [str(BUNDLED.get(origin, origin))], set()
    while todo:
        place = todo.pop(0)
        here = os.path.isdir(place)
        key = os.path.realpath(place) if here else place
        if key in known:
            continue
        known.add(key)
        name = bundled.get(key, None if here else place)
        try:
            card, notice = look(place, CARD), look(place, NOTICE)
            record, base = read_record(place), base_of(place)
        except OutOfReachError as error:
            # The place of a folder that is gone is nothing to tell others.
            yield Ancestor(place, name if is_repo_id(name) else None, unseen=str(error))
            continue
        license = None if card is None else stated_license(card)
        yield Ancestor(place, name, license, None if license is None else card, notice)
        if base is not None and (record is None or os.path.isdir(base)):
            todo.append(base)
        if record is None:
            continue
        for row in record[1]:
            name = row.get("name")
            unknown = row.get("seen") is False
            if name in BUNDLED:  # its folder has the notice too, and is looked at where it is installed
                unknown = BUNDLED[name].is_dir() or row.get("license") is None
            if unknown and name is not None:
                todo.append(str(BUNDLED.get(name, name)))
            elif unknown:
                yield Ancestor(place, None, source=record[0], unseen="it is a folder that was not found")
            else:
                known.add(name)  # so that an older folder's word for it needs no network
                yield Ancestor(place, name, row.get("license"), record[0])


def is_repo_id(name) -> bool:
    """Whether a value is a name that the Hub could have."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def record_of(origin: str) -> tuple[list[dict], Path | None]:
    """What `provenance.json` says of a checkpoint made from `origin`, and the notice that goes with it.

    Raises:
        ProvenanceError: a file is damaged.
    """
    rows, notice = [], None
    for ancestor in ancestors(origin):
        row = {"name": ancestor.name, "license": ancestor.license}
        row |= {"seen": False} if ancestor.unseen else {}
        if row not in rows:
            rows.append(row)
        notice = notice or ancestor.notice
    return rows, notice


def write_record(folder: Path, rows: list[dict], notice: Path | None) -> None:
    """Write `provenance.json` and `NOTICE.md` into a folder of weights; `rows` and `notice` as `record_of` has them."""
    if notice is not None:
        write_atomic(folder / NOTICE, notice.read_bytes())
    write_atomic(folder / RECORD, (json.dumps({"made_from": rows}, indent=1) + "\n").encode())


def keeps_license(base: str, chosen: str) -> bool:
    """Whether weights derived from others of license `base` may have the license `chosen`, as far as names tell.

    Only what is known to be permissive lets others follow. A license that some derivatives may leave for a kindred one,
    such as lgpl-3.0 for gpl-3.0, counts as kept too.
    """
    return chosen == base or base in PERMISSIVE


def licensed(origin: str) -> Iterator[Ancestor]:
    """A checkpoint and what it was made from, those of which a license is known.

    Raises:
        ProvenanceError: a card is damaged; or a license, or the notice that goes with it, could not be looked at.
    """
    for ancestor in ancestors(origin):
        if ancestor.unseen is not None:
            raise ProvenanceError(
                f"{_unseen(ancestor, origin)} Make it reachable, or if you know that it allows the license you give: "
                "--confirm-license."
            )
        if ancestor.license is not None:
            yield ancestor


def notice_of(origin: str) -> Path | None:
    """The nearest `NOTICE.md` of a lineage.

    Raises:
        ProvenanceError: a file is damaged.
    """
    return next((ancestor.notice for ancestor in ancestors(origin) if ancestor.notice is not None), None)


def license_of(origin: str) -> tuple[str, Path] | None:
    """The license that a copy of these weights in another format has, and the file that says so; None: none is known.

    It is the nearest, or the nearest that must be kept where another one before it may not have been chosen. Warns of
    what could not be looked at.

    Raises:
        ProvenanceError: a card is damaged.
    """
    found = []
    for ancestor in ancestors(origin):
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
        ProvenanceError: a file beside the source is damaged.
    """
    origin = os.fspath(source)
    origin = os.path.dirname(origin) or "." if os.path.isfile(origin) else origin
    known = license_of(origin)
    rows, notice = record_of(origin)
    write_record(folder, rows, notice)
    if known is None:
        return
    license, card = known
    stated = (front_matter(read_text(card), str(card)) or {}) if card.name != RECORD else {}
    name = rows[0]["name"] if rows[0]["name"] not in BUNDLED else None
    more = {key: stated[key] for key in ("license_name", "license_link") if isinstance(stated.get(key), str)}
    if not more.get("license_link", "http").startswith("http"):  # a file that stays behind
        del more["license_link"]
    data = ModelCardData(license=license, base_model=name, **more)
    text = f"Converted from {name or 'another checkpoint'} by `python -m conversion.{converter}` of sage-music. "
    text += f"The license of the weights is `{more.get('license_name', license)}`, as before."
    text += " `NOTICE.md` belongs to it." if notice is not None else ""
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n# A converted checkpoint\n\n{text}\n", encoding="utf-8")


def _unseen(ancestor: Ancestor, origin: str) -> str:
    """That the license of an ancestor is out of reach, and why."""
    what = f"{ancestor.place}, which these weights were made from"
    if ancestor.source is not None:
        what = f"a folder that {ancestor.place} was made from"
    elif ancestor.place == origin:
        what = origin
    return f"{what}: its license could not be looked at ({ancestor.unseen})."
