"""Keep what `sage-music evaluate` found as a results file that a card is made of.

sage-music evaluate sage-music --data DATA/multitrack --prompts 100 --out out/evaluation
python -m model_cards.record out/evaluation/continuation/report.json sage-music-6m

Kept are rows, differences, settings and what was skipped, not the single pieces; folders are named from `DATA` on.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from sage_studio.evaluate.systems import find_systems
from sage_studio.files import Journal, write_atomic

from .facts import CARDS, HERE, CardError, read_checkpoint

KEPT = ("task", "settings", "rows", "differences", "features", "remarks", "skipped")


def record(report: Path, name: str, root: Path = HERE) -> Path:
    """Write `results/NAME-TASK.json` from a report of an evaluation of the checkpoint that the card is of.

    Raises:
        CardError: no report, or one of other weights than the checkpoint's present ones.
    """
    checkpoint = read_checkpoint(name)
    if not report.is_file():
        raise CardError(f"{report}: no such file; an evaluation leaves a report.json in its folder.")
    found = json.loads(report.read_text(encoding="utf-8"))
    if "task" not in found or not any(row.get("system") == checkpoint.system for row in found.get("rows", [])):
        raise CardError(f"{report}: no report of an evaluation of {checkpoint.system}.")
    home = _home_of(report.parent, find_systems([checkpoint.system])[0].fingerprint)
    if home is None:
        raise CardError(f"{report}: not of the present weights of {checkpoint.system}: evaluate them again.")
    kept = {"fingerprint": checkpoint.fingerprint, **{key: found[key] for key in KEPT if key in found}}
    kept["settings"]["data"] = [f"DATA/{Path(folder).name}" for folder in kept["settings"]["data"]]
    pieces = {piece["piece"]: piece for piece in Journal(home).records()}
    seconds = [piece["elapsed_s"] for piece in pieces.values() if piece.get("elapsed_s")]
    if seconds:
        kept["writing"] = {"median_elapsed_s": statistics.median(seconds), "n": len(seconds)}
    return write_atomic(
        root / "results" / f"{name}-{found['task']}.json",
        (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode(),
    )


def _home_of(folder: Path, fingerprint: str) -> Path | None:
    """The folder below an evaluation's that holds what these weights wrote."""
    for settings in sorted(folder.glob("*/settings.json")):
        if json.loads(settings.read_text(encoding="utf-8")).get("weights") == fingerprint:
            return settings.parent
    return None


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model_cards.record", description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, help="report.json of an evaluation")
    parser.add_argument("card", choices=CARDS, help="the card that shows it")
    args = parser.parse_args(argv)
    try:
        path = record(args.report, args.card)
    except (CardError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
