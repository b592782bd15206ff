"""What a card may state: a checkpoint as its files say it, and results files that belong to that checkpoint.

Conventions: a results file is JSON in `model_cards/results`. One that speaks of a bundled checkpoint holds its
`fingerprint`, and is refused when the checkpoint has changed since: a card cannot show figures of other weights.
"""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sage_studio.families import FAMILIES, Family, family_of

HERE = Path(__file__).resolve().parent

# The families by the names of their cards, which are those of their bundled checkpoints' folders.
CARDS = {family.pretrained.name: family for family in FAMILIES.values()}
# What of generation_config.json decides how music is sampled.
SAMPLING = ("do_sample", "temperature", "top_k", "top_p")


class CardError(ValueError):
    """A card that cannot be made; the message names the file and says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder as its files say it; no model is loaded.

    Attributes:
        name: of the card; `system`: of the bundled checkpoint (`sage-music`).
        config, generation: `config.json` and `generation_config.json`.
        miditok: options of its MidiTok tokenizer, empty where it has another kind.
        parameters: of the model alone; `draft_parameters`: of its draft head, 0 where it has none.
        files: bytes of each weights file.
        fingerprint: of the weights and the sampling defaults: what results depend on.
    """

    name: str
    system: str
    folder: Path
    config: dict
    generation: dict
    miditok: dict
    parameters: int
    draft_parameters: int
    files: dict[str, int]
    fingerprint: str

    @property
    def family(self) -> Family:
        """What a checkpoint of its kind is."""
        return family_of(self.config["model_type"])

    @property
    def megabytes(self) -> float:
        """Size of all weights files in MB."""
        return sum(self.files.values()) / 1e6


def read_checkpoint(name: str, folder: str | os.PathLike | None = None) -> Checkpoint:
    """The bundled checkpoint that the card `name` is of, or another `folder` in its place.

    Raises:
        CardError: no such card, or a folder without config, generation config or weights.
    """
    if name not in CARDS:
        raise CardError(f"{name}: no such card; there are {', '.join(CARDS)}.")
    folder = Path(folder or CARDS[name].pretrained)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CardError(f"{folder}: no weights (*.safetensors) in this folder.")
    config, generation = (_read_json(folder / file) for file in ("config.json", "generation_config.json"))
    miditok = _read_json(folder / "miditok.json")["config"] if (folder / "miditok.json").is_file() else {}
    digest = hashlib.sha256(json.dumps([generation.get(key) for key in SAMPLING]).encode())
    sizes: dict[str, int] = {}
    for path in weights:
        data = path.read_bytes()
        digest.update(data)
        sizes |= _tensor_sizes(data)
    draft = sum(size for key, size in sizes.items() if key.startswith("draft."))
    return Checkpoint(
        name=name,
        system=CARDS[name].checkpoint,
        folder=folder,
        config=config,
        generation=generation,
        miditok=miditok,
        parameters=sum(sizes.values()) - draft,
        draft_parameters=draft,
        files={path.name: path.stat().st_size for path in weights},
        fingerprint=digest.hexdigest()[:16],
    )


def read_results(name: str, root: Path = HERE, of: Checkpoint | None = None, remedy: str = "") -> dict:
    """The results file `name` (without its ending).

    Args:
        of: the checkpoint that the results must be of.
        remedy: the command that makes the file anew, for the error.

    Raises:
        CardError: it is missing, no JSON, or of another checkpoint.
    """
    path = root / "results" / f"{name}.json"
    found = _read_json(path)
    if of is not None and found.get("fingerprint") != of.fingerprint:
        raise CardError(
            f"{path}: results of other weights or sampling defaults ({found.get('fingerprint')}) than {of.folder} has "
            f"({of.fingerprint}). {remedy}".rstrip()
        )
    return found


def row_of(result: dict, system: str) -> dict:
    """The row of a system in the results of an evaluation.

    Raises:
        CardError: there is none.
    """
    for row in result["rows"]:
        if row["system"] == system:
            return row
    raise CardError(f"the results of task {result['task']} have no row of {system!r}: evaluate it again.")


def claims(result: dict, study, arms: Sequence[str] | None = None) -> list[dict]:
    """The source paper's figures beside ours: dicts of `arm`, `measure`, `paper`, `here`.

    Args:
        result: a results file of `study`, one of `sage_studio.experiments.STUDIES`.
        arms: those to give, all by default.

    Raises:
        CardError: the results lack an arm of the study.
    """
    rows = []
    for claim in study.claims:
        if arms is not None and claim.arm not in arms:
            continue
        found = result["summary"].get(claim.arm)
        if found is None:
            raise CardError(f"the results of {study.name} have no arm {claim.arm!r}: run the study again.")
        if claim.measure == "speed":
            here = f"{100 * (found['speed'] - 1):+.0f} %"
        else:
            unit = " notes/s" if claim.measure == "repeated_late" else " %"
            here = _change(found[claim.measure]["difference"], unit)
        rows.append({"arm": claim.arm, "measure": claim.says, "paper": claim.paper, "here": here})
    return rows


def _change(found: dict, unit: str) -> str:
    """A difference with its interval; one seed has none."""
    digits = 1 if unit == " %" else 2
    mean, low, high = (f"{found[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit} (one seed)" if unit == " %" and low == high == mean else f"{mean}{unit} [{low}, {high}]"


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CardError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise CardError(f"{path}: no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CardError(f"{path}: a JSON object is expected.")
    return found


def _tensor_sizes(data: bytes) -> dict[str, int]:
    """Numbers of elements by tensor, from a safetensors file's header."""
    (length,) = struct.unpack("<Q", data[:8])
    sizes = {}
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if key != "__metadata__":
            sizes[key] = 1
            for side in entry["shape"]:
                sizes[key] *= side
    return sizes
