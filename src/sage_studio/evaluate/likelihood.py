"""Nats a note of human pieces under a checkpoint (`sage-music evaluate --task likelihood`).

Conventions: those of `evaluate`. As in training's evaluation, every token of a piece is predicted once, and a
note costs what all tokens that spell it cost together, with its bar lines, programs or time shifts: different
tokenizations of the same notes can be compared. The families' are not quite of the same notes: a PerceiverS hears no
drums, one piano, and steps of 10 ms; a SAGE-Music hears a grid, and no pedal.

A mean is total nats over total notes. Its interval is the bootstrap over pieces of the ratio's linearisation,
`z = R + (nats - R * notes) / mean(notes)`, whose mean is the ratio R itself.

Two reference rows for each vocabulary: all tokens alike (`log V` nats a token), and tokens by how frequent they are in
the other pieces (counts plus one): what a model that hears nothing reaches.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sage_studio.families import family_of
from sage_studio.files import Journal
from sage_studio.reports import plotting

from . import report
from .pieces import NUM, OUT, corpus_files, differences, digests, failures, finish, interval, reason, shuffled
from .systems import System, find_systems, loaded

WINDOW = 1024
BATCH = 8  # windows or segments at a time


@dataclass(frozen=True)
class PieceLikelihood:
    """Nats of a piece under a checkpoint: `work(key, path)` returns its record.

    A model of another kind is a subclass with its own `parts`, `dataset` and `sum_of_nats`.

    Attributes:
        window: tokens that a SAGE-Music sees at a time; a PerceiverS sees its whole context.
    """

    checkpoint: str
    window: int = WINDOW
    device: str = "cpu"

    def __call__(self, key: str, path: str) -> dict:
        record = {"piece": key, "failed": None, "nats": 0.0, "notes": 0, "tokens": 0}
        try:
            dataset, collate = self.dataset(path)
        except ValueError as error:  # unreadable, or nothing that this family hears
            return record | {"failed": reason(error, path)}
        record |= {"notes": dataset.num_notes, "tokens": dataset.num_tokens}
        if not record["notes"]:
            return record | {"failed": "no note of it is predicted"}
        import torch

        model, _ = self.parts()
        items = [dataset[index] for index in range(len(dataset))]
        with torch.no_grad():
            for start in range(0, len(items), BATCH):
                batch = {
                    name: tensor.to(model.device) for name, tensor in collate(items[start : start + BATCH]).items()
                }
                record["nats"] += float(self.sum_of_nats(model(**batch).logits, batch["labels"]).sum())
        return record

    def parts(self):
        """Model, on the device, and tokenizer of the checkpoint."""
        return loaded(self.checkpoint, self.device)

    def sum_of_nats(self, logits, labels):
        """(B,) nats of the rows of a batch."""
        from sage_studio.train import sum_of_nats

        return sum_of_nats(logits, labels)

    def dataset(self, path: str):
        """The piece as training's evaluation takes it, and what makes batches of it; raises `ValueError` as `ids`."""
        model, tokenizer = self.parts()
        return family_of(model).load("windows")([self.ids(path)], model, tokenizer, self.window)

    def ids(self, path: str) -> np.ndarray:
        """Token ids of a file, with its end; raises `ValueError` where there are none."""
        _, tokenizer = self.parts()
        with warnings.catch_warnings(action="ignore"):
            ids = tokenizer.midi_to_ids(path)
        return np.array(ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id])


def evaluate_likelihood(
    systems: "Sequence[str | os.PathLike] | Mapping[str, str | os.PathLike]",
    data: Sequence[str | os.PathLike],
    *,
    out: str | os.PathLike = f"{OUT}/likelihood",
    num: int = NUM,
    seed: int = 0,
    split: str | None = "test",
    window: int = WINDOW,
    device: str = "cpu",
    workers: int | None = None,
    plots: bool = True,
) -> dict:
    """Nats a note, and a token, of the first `num` pieces in an order drawn by `seed`; writes `report.md` and JSON.

    Args:
        systems: checkpoints.
        data, split: folders of human pieces, as for `corpus_files`.
        window: as for `PieceLikelihood`.
        plots: draw the distributions over pieces.

    Raises:
        FileNotFoundError, ValueError: no piece that can be read, a system that is no checkpoint, an option outside its
            range.
        MissingExtraError: `plots` without matplotlib.
    """
    if plots:
        plotting()  # before hours of work: matplotlib may be missing
    if num < 1 or window < 2:
        raise ValueError(f"num {num} must be positive, and window {window} 2 tokens at least.")
    files = corpus_files(data, split)
    files = {key: files[key] for key in shuffled(files, seed)[:num]}
    found = find_systems(systems)
    folders = [system.source for system in found if system.family is None]
    if folders or not found:
        raise ValueError(f"systems: likelihood takes checkpoints, not {', '.join(folders) or 'nothing'}.")
    homes = {}
    for system in found:  # all of them before the first piece
        settings = {"task": "likelihood", "weights": system.fingerprint, "window": window}
        homes[system.label] = Journal(system.home(out), settings)
    records, kinds, systems_of = {}, {}, [system.label for system in found]
    for system in found:
        work = PieceLikelihood(system.source, window, device)
        items = {key: (key, str(path)) for key, path in files.items()}
        records[system.label] = finish(homes[system.label], items, work, workers, system.label, digests(files))
        kinds[system.label] = system.family.model_type
    baselines, seen = {}, []
    for system in found:
        vocabulary = loaded(system.source, device)[1].get_vocab()
        if vocabulary not in seen:
            seen.append(vocabulary)
            ids = PieceLikelihood(system.source, window, device).ids
            baselines |= _baselines(system, records[system.label], files, ids, len(vocabulary))
    records |= baselines
    values = {label: linearised(of_label) for label, of_label in records.items()}
    empty = [label for label, of_label in values.items() if not of_label]
    if empty:
        why = next(record["failed"] for record in records[empty[0]])
        raise ValueError(f"{empty[0]}: no piece of {', '.join(map(str, data))} can be scored ({why}).")
    result = {
        "task": "likelihood",
        "settings": {"data": [str(folder) for folder in data], "split": split, "seed": seed, "window": window},
        "rows": [_row(label, kinds.get(label, "reference"), of_label) for label, of_label in records.items()],
        "differences": _paired_differences(records, systems_of),
        "remarks": [] if len(files) == num else [f"only {len(files)} of {num} pieces: the data holds no more."],
        "skipped": failures({label: records[label] for label in systems_of}),
        "pieces": records,
    }
    if len(set(kinds.values())) > 1:
        result["remarks"].append("the families do not spell the same notes: see the drums, pedals and grids of each.")
    pictures = {}
    if plots:
        per_note = {
            label: [{"nats per note": r["nats"] / r["notes"], "failed": None} for r in of_label if not r["failed"]]
            for label, of_label in records.items()
        }
        pictures["distributions.png"] = report.draw_scores(per_note, ("nats per note",))
    return report.write_report(result, out, pictures)


def _baselines(system: System, records: list[dict], files: Mapping[str, Path], ids, size: int) -> dict[str, list[dict]]:
    """Records of the reference rows in a checkpoint's vocabulary, on the pieces that it scored."""
    scored = [record for record in records if not record["failed"]]
    counts = np.array([np.bincount(ids(str(files[record["piece"]]))[1:], minlength=size) for record in scored])
    others = counts.sum(axis=0, keepdims=True) - counts + 1 if len(scored) else counts
    nats = {"all tokens alike": [record["tokens"] * float(np.log(size)) for record in scored], "token frequencies": []}
    for own, rest in zip(counts, others, strict=True):
        nats["token frequencies"].append(float(-(own * np.log(rest / rest.sum())).sum()))
    return {
        f"{name} ({system.label}'s tokens)": [
            record | {"nats": value} for record, value in zip(scored, of_name, strict=True)
        ]
        for name, of_name in nats.items()
    }


def linearised(records: list[dict], per: str = "notes") -> dict[str, float]:
    """By piece, the numbers whose mean is total nats over total `per`."""
    scored = [record for record in records if not record["failed"]]
    if not scored:
        return {}
    nats, counts = (np.array([record[name] for record in scored], dtype=np.float64) for name in ("nats", per))
    ratio = nats.sum() / counts.sum()
    values = ratio + (nats - ratio * counts) / counts.mean()
    return {record["piece"]: float(value) for record, value in zip(scored, values, strict=True)}


def _paired_differences(records: Mapping[str, list[dict]], systems: list[str]) -> list[dict]:
    """`differences` between systems, each over the pieces that both could score."""
    found = []
    for index, a in enumerate(systems):
        for b in systems[index + 1 :]:
            scored = [{record["piece"] for record in records[label] if not record["failed"]} for label in (a, b)]
            both = scored[0] & scored[1]
            pair = {label: linearised([r for r in records[label] if r["piece"] in both]) for label in (a, b)}
            found += differences(pair, [a])
    return found


def _row(label: str, kind: str, records: list[dict]) -> dict:
    """A system's line of the table, as JSON."""
    scored = [record for record in records if not record["failed"]]
    return {
        "system": label,
        "kind": kind,
        "n": len(records),
        "failed": len(records) - len(scored),
        "notes": sum(record["notes"] for record in scored),
        "tokens": sum(record["tokens"] for record in scored),
        "nats_per_note": interval(list(linearised(records).values())),
        "nats_per_token": interval(list(linearised(records, "tokens").values())),
    }
