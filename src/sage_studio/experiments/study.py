"""What a study is: arms that differ in one thing, trained alike, and what is measured of each.

A study is a small Python description (`as_kvhs.py` and its neighbours). An arm's options are those of `python -m
sage_studio.train`, so every run of a study can be repeated by hand: its folder keeps the command.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

# Where a corpus lies below the data folder, and the licences to keep of it where metadata.csv says them. The models of
# a study are not published, so the piano performances, which are non-commercial, may be used.
CORPORA = {
    "multitrack": ("multitrack", ["MIT", "CC0-1.0", "CC BY 4.0", "BSD-3-Clause", "Public Domain"]),
    "piano": ("piano", None),
}


class StudyError(RuntimeError):
    """A run of a study that failed; the message names its log."""


@dataclass(frozen=True)
class Scale:
    """How much of a study to do.

    Attributes:
        seeds: runs of every arm.
        options: options of training that all arms share at this scale: size, steps, batch.
        measures: per measure (a function of `sage_studio.experiments.measures`), its arguments.
    """

    seeds: int
    options: dict
    measures: dict[str, dict]


@dataclass(frozen=True)
class Arm:
    """One model of a study.

    Attributes:
        options: options of training that only this arm has. `bpe` (a vocabulary size) is not one of them: it is turned
            into a tokenizer trained on the corpus.
        corpus: a key of `CORPORA`.
        baseline: name of the arm that this one is compared with; empty for the study's own.
        trainer: the module that trains it.
    """

    options: dict = field(default_factory=dict)
    corpus: str = "multitrack"
    baseline: str = ""
    trainer: str = "sage_studio.train"


@dataclass(frozen=True)
class Claim:
    """Something the paper says of an arm: `measure` is one of `sage_studio.experiments.report`'s, or `speed`."""

    arm: str
    measure: str
    says: str
    paper: str


@dataclass(frozen=True)
class Study:
    """A question, the models that answer it, and what the paper says.

    Attributes:
        name, title: for the command line, and for people.
        claim: what the paper claims, with its figures and its source.
        arms: by name, in the order of the table.
        baseline: the arm that the others are compared with.
        scales: by name: `smoke`, `cpu`, `gpu`.
        claims: the paper's figures, to stand beside ours.
        findings: by scale: sentences on what was found beside what the paper says, written after reading the results.
    """

    name: str
    title: str
    claim: str
    arms: dict[str, Arm]
    baseline: str
    scales: dict[str, Scale]
    claims: tuple[Claim, ...] = ()
    findings: dict[str, list[str]] = field(default_factory=dict)

    def baseline_of(self, arm: str) -> str:
        """Name of the arm that `arm` is compared with."""
        return self.arms[arm].baseline or self.baseline


@dataclass(frozen=True)
class Run:
    """One arm trained with one seed. Runs with the same options are the same run, whatever study asks for them.

    Attributes:
        folder: where its checkpoint, its log and what is measured of it are kept.
    """

    arm: str
    seed: int
    corpus: str
    trainer: str
    options: dict
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "best"


def runs_of(study: Study, scale: str, folder: Path) -> list[Run]:
    """The runs of a study at a scale, seed by seed, so that an interrupted study has whole rows."""
    runs = []
    for seed in range(study.scales[scale].seeds):
        for name, arm in study.arms.items():
            options = {**study.scales[scale].options, **arm.options}
            text = json.dumps([arm.trainer, arm.corpus, options], sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:10]
            runs.append(Run(name, seed, arm.corpus, arm.trainer, options, folder / f"{arm.corpus}-{key}-seed{seed}"))
    return runs
