"""`sage-music evaluate`: checkpoints of either family, or folders of MIDI files from anywhere, against human music.

from sage_studio.evaluate import evaluate_continuations
from sage_studio.evaluate.report import markdown_report
result = evaluate_continuations(["sage-music", "folder/of/continuations"], ["folder/of/pieces"])
print(markdown_report(result))

- *continuation*: the first bars of a piece are continued; NMSI compares the next bars with the true ones.
- *set*: unprompted pieces as a set against human pieces: 13 features, their KLD and OA, and figures of single pieces.
- *likelihood*: nats a note of human pieces under a checkpoint.

Conventions: every mean comes with its 95 % interval and n. What fails is counted, listed and, where there is a number
for it, in the mean: a failed or missing continuation scores 0. Reference rows say what a number means. A piece's seed
depends on `seed` and the piece's key, not on its place in the list or on the number of workers. Finished pieces of
checkpoints are kept in `out`, and a second call goes on; it refuses an `out` that keeps results of other settings.
Folders are read again each time.
Modules: `continuation`, `sets` and `likelihood` are the tasks; `pieces` chooses and keeps pieces and shares the work,
`systems` is what is evaluated, `report` what is shown. This one has the command's options; it imports no torch.
"""

import argparse
from pathlib import Path

from sage_studio.defaults import BARS, PROMPT_BARS, SECONDS
from sage_studio.files import SPLITS
from sage_studio.metrics.densities import MODES

from .continuation import continuation_scores, evaluate_continuations
from .likelihood import WINDOW, evaluate_likelihood
from .pieces import NUM, OUT, choose_prompts
from .report import markdown_report
from .sets import HALF_SAMPLES, evaluate_sets, generated_set, human_overlap, measured_set, set_overlap
from .systems import CheckpointWriter

# Of each task: its function, and the options that only some tasks have.
TASKS = {
    "continuation": (
        evaluate_continuations,
        ("prompt_bars", "bars", "performed", "continuation_only", "write_prompts", "temperature", "top_p"),
    ),
    "set": (
        evaluate_sets,
        (
            *("bars", "music_s", "max_tokens", "temperature", "top_p"),
            *("cut_s", "performed", "references", "mode", "half_samples"),
        ),
    ),
    "likelihood": (evaluate_likelihood, ("window",)),
}
FLAGS = {"music_s": "seconds", "cut_s": "cut-seconds"}  # of options that are called otherwise on the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the `evaluate` subcommand; what is outside its range, `run` refuses."""
    add = parser.add_argument
    add("systems", nargs="*", metavar="SYSTEM", help="checkpoints (as --model elsewhere), folders of MIDI files")
    add("--task", choices=tuple(TASKS), default="continuation", help="default: %(default)s")
    add("--data", nargs="+", required=True, metavar="FOLDER", help="human pieces")
    add("--split", choices=(*SPLITS, "all"), default="test", help="of data that has splits (default: %(default)s)")
    add("--out", type=Path, help=f"folder of reports and of pieces to go on from (default: {OUT}/TASK)")
    add("--num", "--prompts", type=int, default=NUM, help="prompts, or pieces (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the choice of pieces and of all music (default: %(default)s)")
    add("--workers", type=int, help="processes, of one thread each (default: as many as CPUs)")
    add("--device", default="cpu", help="of checkpoints: cpu or cuda (default: %(default)s)")
    add("--no-plots", dest="plots", action="store_false", help="write no pictures")
    add = parser.add_argument_group("continuation and set").add_argument
    add("--bars", type=int, help=f"bars compared, or of SAGE-Music's unprompted pieces (default: {BARS})")
    add("--temperature", type=float, help="0: the likeliest token (default: the checkpoint's)")
    add("--top-p", type=float, help="nucleus sampling (default: the checkpoint's)")
    performed = "the folders' bars mean nothing: the reference's bars in seconds; for sets, bars of 2 s"
    add("--performed", action="store_true", default=None, help=performed)
    add = parser.add_argument_group("continuation").add_argument
    add("--prompt-bars", type=int, help=f"bars of the prompt (default: {PROMPT_BARS})")
    add("--continuation-only", action="store_true", default=None, help="the folders' files begin after the prompt")
    add("--write-prompts", type=Path, metavar="FOLDER", help="write the prompts as MIDI files, for other systems")
    add = parser.add_argument_group("set").add_argument
    add("--mode", choices=MODES, help=f"of KLD and OA (default: {MODES[0]})")
    length = f"length of PerceiverS' pieces (default: {SECONDS:g})"
    add("--seconds", dest="music_s", type=float, metavar="SECONDS", help=length)
    add("--max-tokens", type=int, help="tokens of PerceiverS' pieces at most; alone, the model ends the piece")
    first = "look at the first so many seconds of every piece, human or not"
    add("--cut-seconds", dest="cut_s", type=float, metavar="CUT_SECONDS", help=first)
    add("--references", type=int, help="human pieces (default: all)")
    add("--half-samples", type=int, help=f"behind the intervals of OA (default: {HALF_SAMPLES})")
    add = parser.add_argument_group("likelihood").add_argument
    add("--window", type=int, help=f"tokens SAGE-Music sees at a time (default: {WINDOW})")


def run(args: argparse.Namespace) -> dict:
    """What the subcommand does: evaluates, prints the Markdown table where no JSON is asked for. Returns the result.

    Raises:
        ValueError, OSError, MissingExtraError: as the tasks' functions; or an option of another task.
    """
    function, own = TASKS[args.task]
    given = {name: getattr(args, name) for name in {name: None for _, names in TASKS.values() for name in names}}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in own:
            tasks = " and ".join(task for task, (_, names) in TASKS.items() if name in names)
            flag = FLAGS.get(name, name.replace("_", "-"))
            raise ValueError(f"--{flag} is an option of --task {tasks}, not of {args.task}.")
    if "max_tokens" in given:
        given.setdefault("music_s", None)
    result = function(
        args.systems,
        args.data,
        out=args.out or f"{OUT}/{args.task}",
        num=args.num,
        seed=args.seed,
        split=None if args.split == "all" else args.split,
        device=args.device,
        workers=args.workers,
        plots=args.plots,
        **given,
    )
    if not args.json:
        print(markdown_report(result))
        print(f"\nwrote {', '.join(result['files'])}")
    return result


__all__ = [
    "CheckpointWriter",
    "add_arguments",
    "choose_prompts",
    "continuation_scores",
    "evaluate_continuations",
    "evaluate_likelihood",
    "evaluate_sets",
    "generated_set",
    "human_overlap",
    "measured_set",
    "run",
    "set_overlap",
]
