"""Make the model cards from the results files, the bundled checkpoints and the templates.

python -m model_cards.build            # writes model_cards/*.md, and each as README.md into its checkpoint's folder
python -m model_cards.build --check    # writes nothing; exit code 1 where a card is not what it would be

A card's figures come from `model_cards/results` and from the checkpoint's own files; results of other weights are
refused. `python -m model_cards.record` keeps an evaluation as a results file. `USER/NAME` in a card stands for the
repository: the export puts its name there.
"""

import argparse
import difflib
import re
import sys
import tomllib
from collections import Counter
from pathlib import Path

from huggingface_hub import ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from sage_studio.defaults import MAX_NOTE_S
from sage_studio.experiments import STUDIES
from sage_studio.files import write_atomic
from sage_studio.metrics.sets import FEATURES

from .facts import CARDS, HERE, CardError, Checkpoint, claims, read_checkpoint, read_results, row_of
from .metadata import metadata

BLANK_LINES = re.compile(r"\n\s*\n\s*\n+")
# The evaluations that a card shows, by the option that says how many pieces: `sage-music evaluate --task TASK`.
EVALUATIONS = {
    "sage-music-6m": {"continuation": "--prompts", "likelihood": "--num"},
    "perceivers-6m": {"set": "--num", "likelihood": "--num"},
}
# The studies of the source papers' claims, and the arms that a card gives of each.
CLAIMS = {
    "sage-music-6m": {
        "as-kvhs": ("AS-KVHS, 1 head", "AS-KVHS, head-routed"),
        "bpe": ("piano, 2k", "multitrack, 2k"),
        "pooling": ("compound tokens",),
    },
    "perceivers-6m": {
        "segmentation": ("effective", "effective, second scale (PerceiverS)"),
        "multi-scale": ("sliding 1,024", "static 1,024"),
    },
}


# The benchmark of a card's checkpoint beside stock models, and the context that the card gives.
BENCHMARKS = {"sage-music-6m": ("bench-small", 2048)}


def build(name: str, root: Path = HERE) -> str:
    """The card `name`, as `root/NAME.md` should read.

    Args:
        root: the folder that holds `results` and `templates`.

    Raises:
        CardError: no such card, results that are missing or of other weights, a template that asks for what is not
            there, or metadata that huggingface_hub does not take.
    """
    checkpoint = read_checkpoint(name)
    results = gather(checkpoint, root)
    context = {
        "checkpoint": checkpoint,
        "results": results,
        "claims": [
            (study, claims(read_results(f"experiment-{study}-cpu", root), STUDIES[study], arms))
            for study, arms in CLAIMS[name].items()
        ],
        "bench": _benchmark(checkpoint, root),
        "commands": {task: _command(checkpoint, results[task], count) for task, count in EVALUATIONS[name].items()},
        "core_hours": _core_hours(results["training"]["effort"]),
        "features": FEATURES,
        "row_of": row_of,
        "area": ("oa", "oa_low", "oa_high"),
        "max_note_s": MAX_NOTE_S,
        "version": _version(root),
        "repository": "USER/NAME",
    }
    try:
        body = environment(root).get_template(f"{name}.md").render(context)
        data = metadata(checkpoint, results)
        content = f"---\n{data.to_yaml()}\n---\n\n{BLANK_LINES.sub(chr(10) * 2, body).strip()}\n"
        if ModelCard(content).data.to_dict() != data.to_dict():
            raise ValueError("the metadata do not come back as they were written.")
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise CardError(f"{root / 'templates' / name}.md: {type(error).__name__}: {error}") from error
    return content


def places(name: str, root: Path = HERE) -> list[Path]:
    """Where a card is written to; cards of a copy of this folder are nobody's checkpoint's."""
    return [root / f"{name}.md", *([CARDS[name].pretrained / "README.md"] if root.resolve() == HERE else [])]


def gather(checkpoint: Checkpoint, root: Path = HERE) -> dict[str, dict]:
    """The checkpoint's results by task (`training`, and those of `EVALUATIONS`), checked to be of its weights."""
    record = "Evaluate it again and run python -m model_cards.record REPORT.json " + checkpoint.name
    found = {
        task: read_results(f"{checkpoint.name}-{task}", root, checkpoint, f"{record}.")
        for task in EVALUATIONS[checkpoint.name]
    }
    remedy = "Write down how these weights were trained."
    return {**found, "training": read_results(f"{checkpoint.name}-training", root, checkpoint, remedy)}


def environment(root: Path = HERE) -> Environment:
    """Templates of `root`, with the filters that write figures; a name without a value is an error."""
    made = Environment(
        loader=FileSystemLoader(root / "templates"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "count": lambda value: f"{value:,}",
        "fixed": lambda value, digits: f"{value:,.{digits}f}",
        "interval": interval,
        "reasons": reasons,
    }
    return made


def interval(found: dict, digits: int = 3, keys: tuple[str, str, str] = ("mean", "low", "high")) -> str:
    """A mean and its 95 % interval: `62.21 [60.58, 63.73]`."""
    mean, low, high = (f"{found[key]:,.{digits}f}" for key in keys)
    return f"{mean} [{low}, {high}]"


def reasons(skipped: dict[str, str]) -> str:
    """Why pieces were not used, counted: `7 too short, 4 its prompt is silent`."""
    counts = Counter(reason.split(":")[0] for reason in skipped.values())
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def _command(checkpoint: Checkpoint, result: dict, count: str) -> str:
    """The command that a results file is of, from its settings."""
    settings, task = result["settings"], result["task"]
    pieces = row_of(result, checkpoint.system)["n"]
    words = ["sage-music evaluate", checkpoint.system, *([] if task == "continuation" else [f"--task {task}"])]
    words += [f"--data {' '.join(settings['data'])}", f"{count} {pieces}"]
    if task == "set":
        words += [f"--seconds {settings['music_s']:g}", f"--cut-seconds {settings['cut_s']:g}"]
    return " ".join(words)


def _benchmark(checkpoint: Checkpoint, root: Path) -> dict | None:
    """Rows of the checkpoint's benchmark by key (`ours`, `compiled`, ...) at one context and batch 1, and `machine`."""
    if checkpoint.name not in BENCHMARKS:
        return None
    file, context = BENCHMARKS[checkpoint.name]
    found = read_results(file, root)
    total = checkpoint.parameters + checkpoint.draft_parameters
    if found["shape"]["parameters"] != total:
        raise CardError(
            f"{root / 'results' / file}.json: a benchmark of {found['shape']['parameters']:,} parameters, the "
            f"checkpoint has {total:,}: run sage-music bench --json again."
        )
    rows = {row["key"]: row for row in found["rows"] if row["context"] == context and row["batch"] == 1}
    return {**rows, "machine": found["machine"]}


def _core_hours(effort: dict) -> float:
    return sum(row["cores"] * row["minutes"] for row in effort["rows"]) / 60


def _version(root: Path) -> str:
    return tomllib.loads((root.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, 1 where `--check` finds a stale card, 2 for results that make none."""
    parser = argparse.ArgumentParser(prog="python -m model_cards.build", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, only say which cards are stale")
    parser.add_argument("--root", type=Path, default=HERE, help="folder of cards, results and templates")
    args = parser.parse_args(argv)
    stale = 0
    for name in CARDS:
        try:
            made = build(name, args.root)
            present = {
                path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in places(name, args.root)
            }
        except (CardError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for path, text in present.items():
            if made == text:
                continue
            stale += 1
            if args.check:
                changes = difflib.unified_diff(text.splitlines(), made.splitlines(), "present", "from results", n=0)
                print(
                    f"{path}: not what its results and template say: run python -m model_cards.build", file=sys.stderr
                )
                print("\n".join(list(changes)[:20]), file=sys.stderr)
            else:
                print(write_atomic(path, made.encode()))
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
