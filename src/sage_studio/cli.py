"""The `sage-music` command: generate, continue, stream, render, info, train, prepare, evaluate, experiment, bench, and
export, push, space.

Results go to stdout (`--json`: one JSON object), progress and remarks to stderr. A wrong argument or input ends with
one line on stderr and exit code 2; a reader of stdout that closes it ends the command quietly.

The checkpoint decides the family: SAGE-Music counts in bars, PerceiverS in seconds. An option that only the other
family has ends the command.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from sage_studio.bench.command import add_arguments as add_benchmark
from sage_studio.bench.command import run as bench
from sage_studio.corpus.command import add_arguments as add_preparation
from sage_studio.corpus.command import run as prepare
from sage_studio.defaults import BARS, MAX_NOTE_S, MUSIC_S, PROMPT_BARS, PROMPT_S
from sage_studio.errors import InvalidMidiError, MissingExtraError, install_hint
from sage_studio.evaluate import add_arguments as add_evaluation
from sage_studio.evaluate import run as evaluate
from sage_studio.experiments import add_arguments as add_experiment
from sage_studio.experiments import run_command as experiment
from sage_studio.experiments.study import StudyError
from sage_studio.families import Family, family_of, flag
from sage_studio.generation.options import positive_int
from sage_studio.music.midi import Prompt, describe, read_prompt, read_score, write_midi
from sage_studio.music.notes import instrument_name
from sage_studio.music.render import render_piano_roll, render_wav
from sage_studio.publishing import command as publishing

# Ways to decode faster: int8 weights, a compiled step, drafted tokens.
FASTER = ("int8", "compile", "draft")

JSON_LINES = "print one JSON object a note and a line, and a summary in the last"


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def program_list(text: str) -> list[int]:
    """`"0,33,drums"` to `[0, 33, -1]`."""
    try:
        programs = [-1 if part.strip().lower() == "drums" else int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: use General MIDI programs 0-127 and 'drums', as in 0,33,drums"
        ) from None
    if not all(-1 <= program <= 127 for program in programs):
        raise argparse.ArgumentTypeError(f"{text!r}: programs run from 0 to 127")
    return programs


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sage-music", description="Symbolic music generation: MIDI in, MIDI out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, as_json: str = "print one JSON object") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help=as_json)
        return sub

    def with_model(sub: argparse.ArgumentParser) -> None:
        add_model(sub)
        sub.add_argument("--threads", type=positive_int, help="CPU threads (default: PyTorch's)")

    def add_model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", help="sage-music (default), perceivers, a checkpoint folder or a Hub name")

    def with_speed(add) -> None:
        add("--int8", action="store_true", default=None, help="weights in 8-bit integers")
        add("--compile", action="store_true", default=None, help="compile decoding first: seconds, and a C++ compiler")
        add("--draft", action="store_true", default=None, help="guess tokens and check several at a time: same music")

    def with_sampling(sub: argparse.ArgumentParser, continues: bool) -> None:
        with_model(sub)
        add = sub.add_argument
        add("--temperature", type=float, help="0: the likeliest token (default: the checkpoint's)")
        add("--top-p", type=float, help="nucleus sampling (default: the checkpoint's)")
        add("--seed", type=int, default=0, help="same seed, same output (default: %(default)s)")
        add("--num", type=positive_int, default=1, help="pieces to write, seeds counting up")
        add("--out", type=Path, help="MIDI file to write (default: out/NAME.mid)")
        add("--wav", action="store_true", help="write the sound beside it")
        add("--png", action="store_true", help="write the piano roll beside it")
        add = sub.add_argument_group("SAGE-Music").add_argument
        add("--bars", type=positive_int, help=f"bars to write (default: {BARS})")
        add("--programs", type=program_list, help="only these programs, as in 0,33,drums")
        with_speed(add)
        if continues:
            add("--prompt-bars", type=positive_int, help=f"bars to keep (default: {PROMPT_BARS})")
            free = "allow instruments, meters, tempos the prompt has not"
            add("--free", action="store_true", default=None, help=free)
        else:
            add("--tempo", type=float, help="quarter notes per minute, held throughout (default: the model's)")
            add("--time-signature", help="such as 3/4 (default: the model's, or 4/4 with --tempo)")
        add = sub.add_argument_group("PerceiverS").add_argument
        add("--minutes", type=positive_float, help=f"length of the new music (default: {MUSIC_S / 60:g})")
        add("--max-tokens", type=positive_int, help="tokens to write at most; alone, the model ends the piece")
        longest = f"end notes that sound so long; inf: never (default: {MAX_NOTE_S:g})"
        add("--max-note-seconds", type=float, help=longest)
        if continues:
            add("--prompt-seconds", type=positive_float, help=f"seconds to keep (default: {PROMPT_S:g})")

    sub = command("generate", run_generate, "Write a piece from nothing.")
    with_sampling(sub, continues=False)

    sub = command("continue", run_continue, "Continue the beginning of a MIDI file.")
    sub.add_argument("prompt", type=Path, metavar="PROMPT.mid")
    with_sampling(sub, continues=True)

    sub = command("stream", run_stream, "Print notes as the model writes them (SAGE-Music).", as_json=JSON_LINES)
    sub.add_argument("prompt", type=Path, nargs="?", metavar="PROMPT.mid", help="to continue (default: from nothing)")
    with_model(sub)
    add = sub.add_argument
    add("--bars", type=positive_int, default=BARS, help="bars to write (default: %(default)s)")
    add("--prompt-bars", type=positive_int, help=f"bars of the prompt to keep (default: {PROMPT_BARS})")
    add("--programs", type=program_list, help="only these programs, as in 0,33,drums")
    add("--free", action="store_true", default=None, help="allow instruments, meters, tempos the prompt has not")
    add("--tempo", type=float, help="without a prompt: quarter notes per minute, held throughout")
    add("--time-signature", help="without a prompt: such as 3/4")
    add("--temperature", type=float, help="0: the likeliest token (default: the checkpoint's)")
    add("--top-p", type=float, help="nucleus sampling (default: the checkpoint's)")
    add("--seed", type=int, default=0, help="same seed, same output (default: %(default)s)")
    add("--out", type=Path, metavar="FILE.mid", help="write the whole piece")
    with_speed(add)
    add("--report", action="store_true", help="print to stderr how the notes kept up with playing them")

    sub = command("render", run_render, "Write the sound (.wav) and picture (.png) of a MIDI file.")
    sub.add_argument("file", type=Path, metavar="FILE.mid")
    sub.add_argument("--out", type=Path, help="folder to write to (default: beside the file)")

    add_model(command("info", run_info, "Describe a checkpoint: size, vocabulary, attention, cache."))

    text = "Fine-tune a checkpoint, or train a new model, on MIDI files."
    sub = commands.add_parser("train", help=text, add_help=False, allow_abbrev=False)
    sub.set_defaults(run=run_train, json=False)

    text = "Turn MIDI files into tokens: kept for training, or written as Parquet shards."
    add_preparation(command("prepare", prepare, text))

    add_evaluation(command("evaluate", evaluate, "Score checkpoints and folders of MIDI files against human music."))

    add_experiment(command("experiment", experiment, "Rerun a study of the source papers' claims."))

    text = "Write a checkpoint as a complete Hub repository: code, card, samples, endpoint."
    publishing.add_export_arguments(command("export", publishing.run_export, text))
    publishing.add_push_arguments(command("push", publishing.run_push, "Send a checkpoint, or an export, to the Hub."))
    text = "Write a Space: a page that continues MIDI files in the browser."
    publishing.add_space_arguments(command("space", publishing.run_space, text))

    sub = command("bench", run_bench, "Compare speed with a stock model of the same shape: Llama, Perceiver AR.")
    with_model(sub)
    add_benchmark(sub)
    return parser


def run_generate(args) -> dict:
    return _write_pieces(args, "generated")


def run_continue(args) -> dict:
    # Read before the model loads: a wrong file should not have to wait.
    return _write_pieces(args, "continuation", read_prompt(args.prompt))


def _speed_up(model, options: dict) -> None:
    """Quantise the model and turn the options in `FASTER` into those of `generate()`."""
    int8, compiled, draft = (options.pop(name, None) for name in FASTER)
    generate_options = {}
    if int8:
        from sage_music import quantize_int8

        quantize_int8(model)
    if compiled:
        from transformers import CompileConfig

        generate_options["compile_config"] = CompileConfig(fullgraph=True)
    if draft:
        if model.draft is None:
            raise ValueError("--draft: this checkpoint has no draft head (config.num_mtp_layers is 0).")
        generate_options["use_mtp"] = True
    if generate_options:
        options["generate_options"] = generate_options


def _plan(model, tokenizer, family: Family, prompt: Prompt | None, **options):
    """A plan of a continuation, or, without a prompt, of a piece from nothing."""
    if prompt is None:
        return family.load("begin")(model, tokenizer, **options)
    return family.load("plan")(model, tokenizer, prompt, **options)


def _write_pieces(args, name: str, prompt: Prompt | None = None) -> dict:
    from tqdm import tqdm

    from sage_studio.checkpoints import load

    _set_threads(args)
    model, tokenizer = load(args.model)
    family = family_of(model)
    options = family.given(args)
    _speed_up(model, options)
    plan = _plan(model, tokenizer, family, prompt, temperature=args.temperature, top_p=args.top_p, **options)
    total = getattr(plan, family.length)
    bar_options = {
        "total": None if total is None else round(total),
        "unit": "bar" if family.counts_bars else "s",
        "leave": False,
        "disable": not sys.stderr.isatty(),
    }
    out = args.out or Path("out") / f"{name}.mid"
    pieces = []
    for index in range(args.num):
        path = out if args.num == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
        with tqdm(desc=path.name, **bar_options) as bar:

            def progress(done: float, notes: int, bar=bar) -> None:
                bar.set_postfix_str(f"{notes / max(bar.format_dict['elapsed'], 1e-9):.0f} notes/s", refresh=False)
                bar.update(int(done) - bar.n)

            piece = replace(plan, seed=args.seed + index, progress=progress).write()
        files = [write_midi(path, piece.score)]
        if args.wav:
            files.append(render_wav(path.with_suffix(".wav"), piece.score))
        if args.png:
            end = piece.prompt_end_s or None
            in_seconds = not family.counts_bars
            files.append(render_piano_roll(path.with_suffix(".png"), piece.score, end, in_seconds=in_seconds))
        counted = _counted(piece, plan)
        pieces.append({"files": [str(file) for file in files], "seed": args.seed + index, **counted})
        if not args.json:
            for remark in piece.remarks:
                print(f"note: {remark}", file=sys.stderr)
            print(f"wrote {', '.join(map(str, files))}")
            length = "bars" if family.counts_bars else "tokens"
            print(
                f"  {counted[length]} {length}, {piece.notes} notes, {piece.music_s:.1f} s of music "
                f"in {piece.elapsed_s:.1f} s: {piece.notes_per_second:.0f} notes/s"
            )
            print(f"  {', '.join(describe(piece.score))}")
    return {"pieces": pieces}


def _counted(piece, plan) -> dict:
    """What `--json` says of a piece, its family's own counts first."""
    own = {"prompt_end_s": piece.prompt_end_s, "tokens": piece.tokens}
    if piece.bars is not None:
        own = {"prompt_bars": plan.prompt_bars, "bars": piece.bars}
    return {
        **own,
        "notes": piece.notes,
        "elapsed_s": round(piece.elapsed_s, 3),
        "notes_per_second": round(piece.notes_per_second, 1),
        "music_s": round(piece.music_s, 3),
        "instruments": describe(piece.score),
        "remarks": piece.remarks,
    }


def run_stream(args) -> dict:
    begins = args.prompt is None
    for option in ("prompt_bars", "free") if begins else ("tempo", "time_signature"):
        if getattr(args, option) is not None:
            hint = "give a PROMPT.mid" if begins else "the prompt has its own; --free lets the model change them"
            raise ValueError(f"{flag(option)} is for music {'after a' if begins else 'without a'} prompt: {hint}.")
    began = time.perf_counter()
    prompt = None if begins else read_prompt(args.prompt)
    reading_s = time.perf_counter() - began
    from sage_studio.checkpoints import load
    from sage_studio.generation.stream import latency_report

    _set_threads(args)
    model, tokenizer = load(args.model)
    family = family_of(model)
    if not family.counts_bars:
        raise ValueError(f"stream needs a SAGE-Music checkpoint; this one is {family.name}: use continue or generate.")
    names = ("bars", "programs", "temperature", "top_p", "seed")
    names += ("tempo", "time_signature") if begins else ("prompt_bars", "free")
    options = {name: getattr(args, name) for name in (*names, *FASTER) if getattr(args, name) is not None}
    _speed_up(model, options)
    if args.compile:
        print("compiling ...", file=sys.stderr)
        warm_up = {"bars": 1, "generate_options": options["generate_options"]}
        with _plan(model, tokenizer, family, None, **warm_up).stream() as stream:
            next(iter(stream), None)
    notes = []
    if not args.json:
        print(NOTE_HEADER, flush=True)
    began = time.perf_counter() - reading_s
    plan = _plan(model, tokenizer, family, prompt, **options)
    with plan.stream(began) as stream:
        for note in stream:
            print(json.dumps(asdict(note)) if args.json else _note_line(note), flush=True)
            notes.append(note)
        piece = stream.piece
    report = latency_report([note.onset_s for note in notes], [note.elapsed_s for note in notes])
    files = [] if args.out is None else [str(write_midi(args.out, piece.score))]
    if not args.json:
        for remark in piece.remarks:
            print(f"note: {remark}", file=sys.stderr)
        for file in files:
            print(f"wrote {file}", file=sys.stderr)
    if args.report and not args.json:
        print("\n".join(_latency_lines(report)), file=sys.stderr)
    return {
        "files": files,
        "seed": args.seed,
        **_counted(piece, plan),
        "latency": report,
    }


# Bar; onset and length in quarter notes and in seconds; when the note came, in seconds.
NOTE_HEADER = " bar     onset  length     at s  for s pitch vel  came s  instrument"


def _note_line(note) -> str:
    quarters = f"{note.onset:>9.3f} {note.duration:>7.3f}"
    seconds = f"{note.onset_s:>8.3f} {note.duration_s:>6.3f}"
    rest = f"{note.pitch:>5} {note.velocity:>3} {note.elapsed_s:>7.3f}  {instrument_name(note.program)}"
    return f"{note.bar:>4} {quarters} {seconds} {rest}"


def _latency_lines(report: dict) -> list[str]:
    if not report["notes"]:
        return ["no notes"]
    lines = [f"first note after {report['first_note_ms']:.0f} ms"]
    if report["notes"] > 1:
        gaps = ", ".join(f"{name} {value:.1f}" for name, value in report["note_to_note_ms"].items())
        lines.append(f"from note to note, ms: {gaps}")
    for played in report["deadlines"]:
        line = f"played at {played['speed']:g}x: {played['missed']} of {report['notes']} notes late"
        if played["missed"]:
            head_start = f"{played['head_start_ms']:.0f} ms"
            line += f" ({played['share']:.1%}), by {head_start} at most: a head start of {head_start} would save all"
        lines.append(line)
    return lines


def run_train(argv: list[str]) -> int:
    """`sage-music train`, which has a parser of its own; returns the exit code."""
    needed = ("accelerate", "datasets", "tensorboard")
    for package in needed:
        if importlib.util.find_spec(package) is None:
            print(f"sage-music: error: train needs {package}: {install_hint(*needed)}.", file=sys.stderr)
            return 2
    from sage_studio.train.command import main as train

    try:
        return train(argv)
    except KeyboardInterrupt:
        return 130


def run_render(args) -> dict:
    score = read_score(args.file)
    folder = args.out or args.file.parent
    files = [
        render_wav(folder / f"{args.file.stem}.wav", score),
        render_piano_roll(folder / f"{args.file.stem}.png", score, title=args.file.stem),
    ]
    if not args.json:
        print(f"wrote {', '.join(map(str, files))}")
    return {"files": [str(file) for file in files]}


def run_info(args) -> dict:
    from sage_studio.checkpoints import load

    model, tokenizer = load(args.model)
    family = family_of(model)
    info = {
        "model": args.model or "bundled",
        "family": family.name,
        "parameters": model.num_parameters(),
        "layers": model.config.num_hidden_layers,
        "hidden_size": model.config.hidden_size,
        "query_heads": model.config.num_attention_heads,
        "context": model.config.max_position_embeddings,
        "vocabulary": tokenizer.vocab_size,
        **family.load("summary")(model, tokenizer),
    }
    if not args.json:
        for key, value in info.items():
            print(f"{key.replace('_', ' ')}: {_shown(value)}")
    return info


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{k} {v}" if not isinstance(v, dict) else f"{k} ({v['tokens']} tokens, {v['query_heads']} heads)"
            for k, v in value.items()
        )
    if isinstance(value, list):
        return ", ".join("all" if part is None else f"{part:,}" for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def run_bench(args) -> dict:
    _set_threads(args)
    return bench(args)


def _set_threads(args) -> None:
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a wrong argument or input, 130 when interrupted."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if args.run is run_train:  # its options are those of `TrainingArguments` too, which are slow to import
        return run_train(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with warnings.catch_warnings():  # put back on leaving: `main` is also called from Python
            warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
            result = args.run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted, as `head` does; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InvalidMidiError, MissingExtraError, StudyError, ValueError, OSError) as error:
        print(f"sage-music: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
