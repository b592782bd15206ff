"""The `prepare` subcommand: folders of MIDI files to cached token ids, and to shards that training can stream."""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sage_studio.families import bundled, of_tokenizer

from . import prepare_corpus
from .encoding import SIZE_LIMIT
from .shards import SHARD_BYTES, check_output, fetch, is_prepared, write_shards
from .workers import TIME_LIMIT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizer

REASONS = 8  # of skipped files, that are printed


def size(text: str) -> int:
    """`"100MB"` to bytes; 1 MB is a million."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kKMG]?)B?", text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500kB, 100MB or 2GB")
    return round(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the `prepare` subcommand; what is outside its range, `run` refuses."""
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="FOLDER", help="of MIDI files, or a Hub dataset user/name of them")
    out = "folder of shards to write, ready for a Hub dataset (default: none: only the cache of `train` is filled)"
    add("--output", type=Path, metavar="DIR", help=out)
    add("--overwrite", action="store_true", help="replace the prepared corpus in DIR")
    whose = parser.add_mutually_exclusive_group().add_argument
    whose("--model", help="whose tokenizer: sage-music (default), perceivers, a checkpoint folder or a Hub name")
    whose("--tokenizer", metavar="FOLDER", help="a saved tokenizer")
    held_out = "share of the files for validation, where no folders or metadata name splits (default: %(default)s)"
    add("--held-out", type=float, default=0.1, metavar="SHARE", help=held_out)
    add("--seed", type=int, default=0, help="of the choice of those files (default: %(default)s)")
    facts = "columns path (from the CSV's folder) and any of licence, composition_key or composition, split"
    add("--metadata", type=Path, metavar="CSV", help=facts)
    add("--licences", nargs="+", metavar="LICENCE", help="use only files of these, by the metadata")
    add("--cache", type=Path, metavar="DIR", help="keeps what was encoded (default: in the cache of datasets)")
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    limit = "seconds for one file, which is skipped if it takes longer (default: %(default)g)"
    add("--time-limit", type=float, default=TIME_LIMIT, metavar="S", help=limit)
    add("--size-limit", type=size, default=SIZE_LIMIT, metavar="BYTES", help="of one file (default: 10MB)")
    shard = "bytes of a shard before compression (default: 100MB)"
    add("--shard-size", type=size, default=SHARD_BYTES, metavar="BYTES", help=shard)


def run(args: argparse.Namespace) -> dict:
    """What the subcommand does; prints counts and rates where no JSON is asked for. Returns the corpus' report.

    Raises:
        ValueError, OSError: as `prepare_corpus` and `write_shards`; or a folder is prepared already.
        MissingExtraError: `datasets` is not installed.
    """
    if args.output is not None:
        check_output(args.output, args.overwrite)
    tokenizer = load_tokenizer(args.tokenizer or args.model or "sage-music")
    folders = [fetch(source) for source in args.data]
    for folder in folders:
        if is_prepared(folder):
            raise ValueError(f"{folder}: is prepared already; --data wants the MIDI files.")
    with tqdm(desc="files", unit=" files", disable=None, file=sys.stderr) as bar:
        corpus = prepare_corpus(
            folders,
            tokenizer,
            cache=args.cache,
            workers=args.workers,
            time_limit=args.time_limit,
            size_limit=args.size_limit,
            metadata=args.metadata,
            licences=args.licences,
            held_out=args.held_out,
            seed=args.seed,
            progress=bar.update,
        )
    reasons = Counter(re.sub(r"\d[\d.,]*\d|\d", "N", reason) for _, reason in corpus.skipped)
    result = {**corpus.report, "reasons": dict(reasons.most_common()), "output": None}
    if args.output is not None:
        folder = write_shards(corpus, args.output, tokenizer, args.shard_size, args.overwrite)
        result["output"] = str(folder)
        result["bytes"] = sum(path.stat().st_size for path in folder.glob("data/*.parquet"))
    if not args.json:
        print("\n".join(_lines(result)))
    return result


def load_tokenizer(name: str) -> "PreTrainedTokenizer":
    """The tokenizer of a checkpoint (`sage-music` and `perceivers` are bundled), a folder or a Hub name; no weights.

    Raises:
        ValueError: there is none, or one of another kind.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    family = bundled(name)
    source = name if family is None else family.pretrained
    if family is None:
        if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
            raise ValueError(f"{name}: no such folder.")
        try:
            kind = get_tokenizer_config(name).get("tokenizer_class")
        except Exception as error:  # the Hub, HTTP and sockets raise a dozen kinds; all mean the same here
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{name}: no tokenizer can be loaded from it: {reason}") from error
        family = of_tokenizer(kind)
        if family is None:
            what = f"a {kind}" if kind else "no tokenizer_config.json"
            raise ValueError(f"{name}: has {what}; a SageMusicTokenizer or a PerceiverSTokenizer is needed.")
    elif not source.is_dir():
        raise ValueError(family.absence)
    try:
        return family.classes[1].from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: its tokenizer cannot be loaded: {' '.join(str(error).split())}") from error


def _lines(result: dict) -> list[str]:
    rates = f"{result['files_per_second']:,.0f} files/s, {result['notes_per_second']:,.0f} notes/s"
    lines = [
        f"{result['files']:,} files, {result['from_cache']:,} of them from the cache, in {result['elapsed_s']:,.1f} s: "
        f"{rates}",
        f"{result['notes']:,} notes, {result['tokens']:,} tokens",
        f"{result['groups']:,} groups of the same music or composition; {result['copies']:,} files are copies",
    ]
    for name, split in result["splits"].items():
        if split["files"]:
            lines.append(
                f"  {name}: {split['files']:,} files in {split['groups']:,} groups, {split['notes']:,} notes, "
                f"{split['tokens']:,} tokens"
            )
    lines.append(f"skipped: {result['skipped']:,} files")
    reasons = list(result["reasons"].items())
    lines += [f"  {count:,} x {reason}" for reason, count in reasons[:REASONS]]
    if len(reasons) > REASONS:
        lines.append(f"  {sum(count for _, count in reasons[REASONS:]):,} x other reasons")
    if result["output"]:
        lines.append(f"wrote {result['output']} ({result['bytes'] / 1e6:,.1f} MB)")
    return lines
