"""The `sage-music` command: generate, continue, render, info, bench.

Results go to stdout (`--json`: one JSON object), progress and remarks to stderr. A wrong argument or input ends with
one line on stderr and exit code 2.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

from . import TEMPERATURE, TOP_P
from .midi import InvalidMidiError, read_score, write_midi
from .render import MissingExtraError, render_piano_roll, render_wav


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
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

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    def with_model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", help="checkpoint folder or Hub name (default: the bundled one)")
        sub.add_argument("--threads", type=positive_int, help="CPU threads (default: PyTorch's)")

    def with_sampling(sub: argparse.ArgumentParser) -> None:
        with_model(sub)
        sub.add_argument("--bars", type=positive_int, default=16, help="bars to write (default: %(default)s)")
        sub.add_argument(
            "--temperature", type=float, default=TEMPERATURE, help="0: the likeliest token (default: %(default)s)"
        )
        sub.add_argument("--top-p", type=float, default=TOP_P, help="nucleus sampling (default: %(default)s)")
        sub.add_argument("--seed", type=int, default=0, help="same seed, same output (default: %(default)s)")
        sub.add_argument("--num", type=positive_int, default=1, help="pieces to write, seeds counting up")
        sub.add_argument("--programs", type=program_list, help="only these programs, as in 0,33,drums")
        sub.add_argument("--out", type=Path, help="MIDI file to write (default: out/NAME.mid)")
        sub.add_argument("--wav", action="store_true", help="write the sound beside it")
        sub.add_argument("--png", action="store_true", help="write the piano roll beside it")

    sub = command("generate", run_generate, "Write a piece from nothing.")
    with_sampling(sub)
    sub.add_argument("--tempo", type=float, help="quarter notes per minute, held throughout (default: the model's)")
    sub.add_argument("--time-signature", help="such as 3/4 (default: the model's, or 4/4 with --tempo)")

    sub = command("continue", run_continue, "Continue the first bars of a MIDI file.")
    sub.add_argument("prompt", type=Path, metavar="PROMPT.mid")
    sub.add_argument("--prompt-bars", type=positive_int, default=4, help="bars to keep (default: %(default)s)")
    sub.add_argument("--free", action="store_true", help="allow instruments, meters, tempos the prompt has not")
    with_sampling(sub)

    sub = command("render", run_render, "Write the sound (.wav) and picture (.png) of a MIDI file.")
    sub.add_argument("file", type=Path, metavar="FILE.mid")
    sub.add_argument("--out", type=Path, help="folder to write to (default: beside the file)")

    sub = command("info", run_info, "Describe a checkpoint: size, vocabulary, attribute groups, cache.")
    sub.add_argument("--model", help="checkpoint folder or Hub name (default: the bundled one)")

    sub = command("bench", run_bench, "Compare decoding speed with a stock Llama of the same shape.")
    with_model(sub)
    sub.add_argument("--contexts", type=positive_int, nargs="+", default=[512, 2048, 8192])
    sub.add_argument("--tokens", type=positive_int, default=48, help="tokens decoded a round (default: %(default)s)")
    sub.add_argument("--rounds", type=positive_int, default=3, help="interleaved rounds (default: %(default)s)")
    return parser


def run_generate(args) -> dict:
    from .compose import generate_piece

    def write(model, tokenizer, **options):
        return generate_piece(model, tokenizer, tempo=args.tempo, time_signature=args.time_signature, **options)

    return _compose(args, write, "generated")


def run_continue(args) -> dict:
    from .compose import continue_score

    score = read_score(args.prompt)  # before the model loads: a wrong file should not have to wait

    def write(model, tokenizer, **options):
        return continue_score(model, tokenizer, score, prompt_bars=args.prompt_bars, free=args.free, **options)

    return _compose(args, write, "continuation")


def _compose(args, write, name: str) -> dict:
    from tqdm import tqdm

    from .compose import describe, load

    _set_threads(args)
    model, tokenizer = load(args.model)
    out = args.out or Path("out") / f"{name}.mid"
    pieces = []
    for index in range(args.num):
        path = out if args.num == 1 else out.with_name(f"{out.stem}-{index + 1}{out.suffix}")
        with tqdm(total=args.bars, unit="bar", desc=path.name, leave=False, disable=not sys.stderr.isatty()) as bar:

            def progress(bars: int, notes: int, bar=bar) -> None:
                bar.set_postfix_str(f"{notes / max(bar.format_dict['elapsed'], 1e-9):.0f} notes/s", refresh=False)
                bar.update(bars - bar.n)

            piece = write(
                model,
                tokenizer,
                bars=args.bars,
                temperature=args.temperature,
                top_p=args.top_p,
                seed=args.seed + index,
                programs=args.programs,
                progress=progress,
            )
        files = [write_midi(path, piece.score)]
        if args.wav:
            files.append(render_wav(path.with_suffix(".wav"), piece.score))
        if args.png:
            end = piece.prompt_end_s if piece.prompt_bars else None
            files.append(render_piano_roll(path.with_suffix(".png"), piece.score, prompt_end_s=end))
        pieces.append(
            {
                "files": [str(file) for file in files],
                "seed": args.seed + index,
                "prompt_bars": piece.prompt_bars,
                "bars": piece.bars,
                "notes": piece.notes,
                "seconds": round(piece.seconds, 3),
                "notes_per_second": round(piece.notes_per_second, 1),
                "music_seconds": round(piece.music_seconds, 3),
                "instruments": describe(piece.score),
                "remarks": piece.remarks,
            }
        )
        if not args.json:
            for remark in piece.remarks:
                print(f"note: {remark}", file=sys.stderr)
            print(f"wrote {', '.join(map(str, files))}")
            print(
                f"  {piece.bars} bars, {piece.notes} notes, {piece.music_seconds:.1f} s of music in "
                f"{piece.seconds:.1f} s: {piece.notes_per_second:.0f} notes/s"
            )
            print(f"  {', '.join(describe(piece.score))}")
    return {"pieces": pieces}


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
    from .compose import load

    model, tokenizer = load(args.model)
    config = model.config
    types: dict[str, int] = {}
    for token in tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size)):
        kind = token.split("_")[0] if "+" not in token else "merged"
        types[kind] = types.get(kind, 0) + 1
    heads = config.query_heads_per_attribute or [config.num_attention_heads] * len(config.attribute_names)
    element = next(model.parameters()).element_size()
    row = 2 * config.head_dim * element * config.num_hidden_layers
    info = {
        "model": args.model or "bundled",
        "parameters": model.num_parameters(),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_attention_heads,
        "key_value_heads_per_token": config.num_key_value_heads,
        "kv_routing": config.kv_routing,
        "context": config.max_position_embeddings,
        "vocabulary": tokenizer.vocab_size,
        "token_types": types,
        "attribute_groups": {
            name: {"tokens": config.token_attribute_ids.count(index), "query_heads": heads[index]}
            for index, name in enumerate(config.attribute_names)
        },
        "cache_bytes_per_token": config.num_key_value_heads * row,
        "cache_bytes_per_token_full_heads": config.num_attention_heads * row,
    }
    if not args.json:
        for key, value in info.items():
            shown = value
            if isinstance(value, dict):
                shown = ", ".join(
                    f"{k} {v}" if not isinstance(v, dict) else f"{k} ({v['tokens']} tokens, {v['query_heads']} heads)"
                    for k, v in value.items()
                )
            print(
                f"{key.replace('_', ' ')}: {shown:,}" if isinstance(shown, int) else f"{key.replace('_', ' ')}: {shown}"
            )
    return info


def run_bench(args) -> dict:
    from .bench import compare, table
    from .compose import load

    _set_threads(args)
    model, tokenizer = load(args.model)
    result = compare(model, tokenizer, args.contexts, args.tokens, args.rounds)
    if not args.json:
        print(table(result))
    return result


def _set_threads(args) -> None:
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a wrong argument or input, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():  # put back on leaving: `main` is also called from Python
            warnings.showwarning = lambda message, *rest, **more: print(f"note: {message}", file=sys.stderr)
            result = args.run(args)
    except (InvalidMidiError, MissingExtraError, ValueError, OSError) as error:
        print(f"sage-music: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
