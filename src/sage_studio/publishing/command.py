"""The `export`, `push` and `space` subcommands: their options, and what they say. Their work is loaded on use."""

import argparse
from pathlib import Path

KEPT = (".cache", ".git")  # folders beside a repository's files that are no part of it


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sage-music export`."""
    add = parser.add_argument
    add("checkpoint", help="sage-music, perceivers, a checkpoint's or an adapter's folder, a Hub name")
    add("output", help="folder to write")
    add("--repo-id", help="name on the Hub, user/name, for the card's examples")
    add("--replace", action="store_true", help="an older export even if files in it were changed since")
    _add_card_arguments(parser)


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sage-music push`."""
    add = parser.add_argument
    add("checkpoint", help="an export's folder, or what export takes")
    add("repo_id", metavar="user/name", help="name on the Hub")
    add("--dry-run", metavar="FOLDER", help="send nothing: write the complete repository there")
    add("--private", action="store_true", help="make the repository private")
    add("--revision", metavar="BRANCH", help="branch to write to (default: main)")
    add("--token", help="better: HF_TOKEN or `hf auth login`, which other users of this machine do not see")
    add("--message", help="of the commit")
    add("--exist-ok", action="store_true", help="write a new commit to a repository that has files in it")
    _add_card_arguments(parser)


def add_space_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sage-music space`."""
    parser.add_argument("output", help="folder to write")
    text = "a checkpoint on the Hub to offer instead of the installed ones; may be given again"
    parser.add_argument("--model", action="append", default=[], metavar="USER/NAME", help=text)


def _add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that `export` and `push` have."""
    add = parser.add_argument
    add("--card", help="model card to take (default: the bundled checkpoint's, or one that is made)")
    add("--license", help="license of the weights, such as apache-2.0 (default: the base's, where known)")
    add("--license-name", help="its name, with --license other")
    word = "take the license on your word, though another checkpoint's that these weights were made from is another "
    add("--confirm-license", action="store_true", help=f"{word}one, or out of reach")
    add("--base-model", help="name on the Hub of the checkpoint that these weights were made from")
    add("--datasets", nargs="+", default=(), metavar="NAME", help="names on the Hub of the training data")
    add("--max-shard-size", default="5GB", help="of one file of weights (default: %(default)s)")
    add("--no-samples", action="store_true", help="leave out the sample and its sound and picture")


def _card_options(args: argparse.Namespace) -> dict:
    """The keywords of `export.export` that `_add_card_arguments` has options for."""
    names = ("card", "license", "license_name", "base_model", "datasets", "max_shard_size", "confirm_license")
    return {name: getattr(args, name) for name in names} | {"samples": not args.no_samples}


def run_export(args: argparse.Namespace) -> dict:
    """Write a repository. Returns its folder, its files and their size.

    Raises:
        ValueError, OSError, MissingExtraError: as `export.export`.
    """
    from .export import export

    export(args.checkpoint, args.output, repo_id=args.repo_id, replace=args.replace, **_card_options(args))
    return _written(Path(args.output), args)


def run_push(args: argparse.Namespace) -> dict:
    """Send a repository, or write what would be sent. Returns its address and commit, or as `run_export`.

    Raises:
        ValueError, OSError, MissingExtraError: as `push.push`.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, logging

    from .push import push, write_repository

    if args.dry_run is not None:
        write_repository(args.checkpoint, args.repo_id, args.dry_run, **_card_options(args))
        return _written(Path(args.dry_run), args)
    disable_progress_bars()
    logging.set_verbosity_error()
    options = {name: getattr(args, name) for name in ("private", "revision", "token", "message", "exist_ok")}
    commit = push(args.checkpoint, args.repo_id, **options, **_card_options(args))
    address = f"{constants.ENDPOINT}/{args.repo_id}"
    if not args.json:
        print(f"{address}, commit {commit}")
    return {"repository": address, "commit": commit}


def run_space(args: argparse.Namespace) -> dict:
    """Write a Space. Returns as `run_export`.

    Raises:
        ValueError, OSError: as `space.export`.
    """
    from sage_studio.errors import install_hint

    from .space import export

    folder = export(args.output, args.model)
    result = _written(folder, args)
    if not args.json:
        print(f"run it: {install_hint('gradio')} -r {folder}/requirements.txt && python {folder}/app.py")
    return result


def _written(folder: Path, args: argparse.Namespace) -> dict:
    """What was written: the folder, its files but those of git and of huggingface_hub, and their bytes."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    sizes = {name.as_posix(): path.stat().st_size for name, path in paths.items() if name.parts[0] not in KEPT}
    total = sum(sizes.values())
    if not args.json:
        print(f"wrote {folder} ({len(sizes)} files, {total / 1e6:.1f} MB)")
    return {"folder": str(folder), "files": list(sizes), "bytes": total}
