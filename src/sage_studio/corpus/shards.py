"""A prepared corpus as a folder of Parquet shards, which is also a Hub dataset repository; and reading it back.

    data/{train,validation,test}-00000-of-00003.parquet   path, input_ids, tokens, notes, group
    tokenizer/     what made the ids
    corpus.json    counts, tokenizer, names of the shards
    skipped.csv    files that could not be read, and why
    README.md      the dataset card: `load_dataset("user/name")` finds the splits by it

Rows are in a random order, so that a stream with a small shuffle buffer mixes what lies together in the folders.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sage_studio.families import SAGE_MUSIC, of_tokenizer
from sage_studio.files import MIDI_SUFFIXES

from .encoding import MidiTokenizer, ids_dtype, tokenizer_key
from .prepared import COLUMNS, Corpus

if TYPE_CHECKING:
    import datasets

FORMAT = "sage-music corpus"
FORMAT_VERSION = 1
SHARD_BYTES = 100_000_000  # of ids and texts before compression, as `datasets` counts
ROW_GROUP_BYTES = 2_000_000  # read at a time by a stream
# Names of licences on the Hub.
HUB_LICENCES = {
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "BSD-3-Clause": "bsd-3-clause",
    "CC0": "cc0-1.0",
    "CC0-1.0": "cc0-1.0",
    "CC BY 4.0": "cc-by-4.0",
    "CC BY-SA 4.0": "cc-by-sa-4.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
    "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0",
}


def describe_tokenizer(tokenizer: MidiTokenizer) -> dict:
    """What `corpus.json` keeps of a tokenizer: `class`, `vocab_size`, `vocabulary` (a hash) and `key`."""
    vocabulary = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    return {
        "class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "key": tokenizer_key(tokenizer),
    }


def check_output(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """The folder `write_shards` would write; before hours of encoding, whether it can.

    Raises:
        ValueError: it is a file, or holds something else than a prepared corpus, or one and `overwrite` is not set.
        OSError: it cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_dir() and any(folder.iterdir()):
        if not is_prepared(folder):
            raise ValueError(f"{folder}: holds something else than a prepared corpus; choose a new folder.")
        if not overwrite:
            raise ValueError(f"{folder}: holds a prepared corpus already; --overwrite replaces it.")
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, not a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(folder.parent))
    return folder


def write_shards(
    corpus: Corpus,
    folder: str | os.PathLike,
    tokenizer: MidiTokenizer,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    seed: int = 0,
) -> Path:
    """Write a corpus as a folder of shards, whole or not at all, in constant memory. Returns the folder.

    Args:
        shard_bytes: of a shard at most, before compression (a longer piece is a shard by itself).
        overwrite: replace the prepared corpus in `folder`.
        seed: of the order of the rows.

    Raises:
        ValueError, OSError: as `check_output`; or the disk is full.
    """
    folder = check_output(folder, overwrite)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        (partial / "data").mkdir(parents=True)
        shards = {
            name: _write_split(partial / "data", name, split, ids_dtype(tokenizer), shard_bytes, seed)
            for name, split in corpus.splits.items()
            if len(split)
        }
        tokenizer.save_pretrained(partial / "tokenizer")
        corpus.write_skipped(partial / "skipped.csv")
        info = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "tokenizer": describe_tokenizer(tokenizer),
            "shards": shards,
            "report": corpus.report,
        }
        (partial / "corpus.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(dataset_card(info), encoding="utf-8")
        before = folder.with_name(f".{folder.name}.before")  # not removed until the new one is in its place
        shutil.rmtree(before, ignore_errors=True)
        if folder.is_dir():
            os.replace(folder, before)
        os.replace(partial, folder)
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "the disk is full; choose another --output", str(folder)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_split(
    folder: Path, name: str, split: "datasets.Dataset", dtype: np.dtype, shard_bytes: int, seed: int
) -> list[str]:
    """Write the shards of one split; returns their names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = (pa.string(), pa.list_(pa.from_numpy_dtype(dtype)), pa.int32(), pa.int32(), pa.string())
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    rows = split.select_columns(list(COLUMNS)).with_format("arrow")
    lengths = split.select_columns(["tokens"]).with_format("arrow")[:]["tokens"].to_numpy()
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = np.cumsum(lengths[order] * dtype.itemsize + 100)  # 100: path, group and counts
    # The rows of a shard, and in it of a row group, by where they end; the first byte of a shard begins a row group.
    shard_of = _runs(ends, shard_bytes)
    names = [f"{name}-{index:05}-of-{shard_of[-1] + 1:05}.parquet" for index in range(shard_of[-1] + 1)]
    for index, shard in enumerate(names):
        (chosen,) = np.nonzero(shard_of == index)
        group_of = _runs(ends[chosen] - (ends[chosen[0] - 1] if index else 0), ROW_GROUP_BYTES)
        with pq.ParquetWriter(folder / shard, schema, compression="zstd") as writer:
            for part in np.split(order[chosen], np.nonzero(np.diff(group_of))[0] + 1):
                table = rows[part].cast(schema)
                writer.write_table(table, row_group_size=len(table))
    return names


def _runs(ends: np.ndarray, size: int) -> np.ndarray:
    """Which run of about `size` each item belongs to, numbered from 0 without gaps, from the items' ends."""
    return np.unique((ends - 1) // size, return_inverse=True)[1]


def dataset_card(info: dict) -> str:
    """The README of a Hub dataset repository, from the contents of `corpus.json`."""
    from huggingface_hub import DatasetCardData

    report, splits = info["report"], info["report"]["splits"]
    licences = report.get("licences") or {}
    files = sum(split["files"] for split in splits.values())
    of_all = next((name for name, count in licences.items() if count == files), "")
    sizes = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
    data = DatasetCardData(
        license=HUB_LICENCES.get(of_all, "other") if licences else "unknown",
        tags=["music", "midi", "symbolic-music", "sage-music"],
        size_categories=[sizes[min(max(len(str(files)) - 3, 0), len(sizes) - 1)]],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"data/{name}-*.parquet"} for name in info["shards"]],
            }
        ],
    )
    table = [
        f"| {name} | {split['files']:,} | {split['groups']:,} | {split['notes']:,} | {split['tokens']:,} |"
        for name, split in splits.items()
    ]
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        "# Token ids of MIDI files\n",
        "| split | files | groups | notes | tokens |\n|---|---|---|---|---|",
        *table,
        "",
        f"Ids of {info['tokenizer']['class']} ({info['tokenizer']['vocab_size']:,} tokens), which is in `tokenizer/`. "
        "A row is one file: its `path`, `input_ids` (BOS ... EOS), their number (`tokens`), the file's `notes`, and "
        "the `group` of the files that are the same music or composition; no group is in two splits unless the splits "
        f"were given. {report['skipped']:,} files could not be read; `skipped.csv` says why.\n",
        "```python\nfrom datasets import load_dataset\n",
        'pieces = load_dataset("user/name", split="train", streaming=True)\n```\n',
        "Written by `sage-music prepare`.",
    ]
    if licences:
        named = ", ".join(f"{name} ({count:,} files)" for name, count in licences.items())
        lines.append(f"\nLicences of the files: {named}.")
    return "\n".join(lines) + "\n"


def corpus_info(source: str | os.PathLike) -> dict | None:
    """The `corpus.json` of a folder or of a Hub dataset `user/name`; None where there is none.

    Raises:
        ValueError: no such folder and no such dataset; or it was written by a later version of this package.
    """
    path = Path(source) / "corpus.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        name = _hub_name(source)
        try:
            path = Path(hf_hub_download(name, "corpus.json", repo_type="dataset"))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:  # offline, and not downloaded: for want of it, or with all the rest
            path = fetch(name) / "corpus.json"
        except Exception as error:  # the Hub's client, HTTP and sockets raise a dozen kinds; all mean the same here
            raise _hub_error(name, error) from error
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        return None
    if info["version"] > FORMAT_VERSION:
        raise ValueError(f"{source}: prepared by a later version of sage-music (format {info['version']}); upgrade.")
    return info


def is_prepared(source: str | os.PathLike) -> bool:
    """Whether a folder or a Hub dataset is what `write_shards` writes; raises as `corpus_info`."""
    return corpus_info(source) is not None


def read_shards(
    source: str | os.PathLike, tokenizer: MidiTokenizer, streaming: bool = False, split: str = "train"
) -> "datasets.Dataset | datasets.IterableDataset":
    """A split of a prepared corpus, rows as numpy: `path, input_ids, tokens, notes, group`.

    Args:
        source: the folder, or the name `user/name` of a Hub dataset.
        tokenizer: must have the vocabulary the ids are of.
        streaming: an `IterableDataset` that reads row by row, in constant memory and without downloading first;
            otherwise a memory-mapped `Dataset`. Of a stream, `shuffle(seed=..., buffer_size=...)` mixes the shards and
            what is in the buffer, another order after each `set_epoch`; `reshard()` divides it among more readers than
            there are shards.

    Raises:
        ValueError: no prepared corpus, incomplete, without this split, or of another vocabulary.
    """
    import datasets

    info = corpus_info(source)
    if info is None:
        raise ValueError(f"{source}: not a prepared corpus (no corpus.json): run sage-music prepare on it.")
    check_vocabulary(source, info, tokenizer)
    if split not in info["shards"]:
        raise ValueError(f"{source}: no split {split!r} in it; it has {', '.join(info['shards'])}.")
    if Path(source).is_dir():
        files = [str(Path(source) / "data" / name) for name in info["shards"][split]]
        missing = [file for file in files if not os.path.isfile(file)]
        if missing:
            raise ValueError(f"{missing[0]}: missing; {source} is not whole: copy or prepare it again.")
    else:
        files = [f"hf://datasets/{source}/data/{name}" for name in info["shards"][split]]
    try:
        data = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"{source}: its shards cannot be read: {error.__cause__ or error}") from error
    return data.with_format("numpy")


def check_vocabulary(source: str | os.PathLike, info: dict, tokenizer: MidiTokenizer) -> None:
    """Refuse a corpus (`corpus_info`) whose ids mean something else to `tokenizer`.

    The same vocabulary with other options, or another version of MidiTok, is warned about: the ids are valid, though
    the files might be spelled a little differently today.

    Raises:
        ValueError: the vocabularies differ.
    """
    made, given = info["tokenizer"], describe_tokenizer(tokenizer)
    if made["vocabulary"] != given["vocabulary"]:
        family = of_tokenizer(given["class"]) or SAGE_MUSIC
        raise ValueError(
            f"{source}: its ids are of {made['class']} ({made['vocab_size']:,} tokens), the model's tokenizer is "
            f"{given['class']} ({given['vocab_size']:,} tokens): two vocabularies. Prepare the MIDI files again with "
            f"--model {family.checkpoint}, or your checkpoint."
        )
    if made["key"] != given["key"]:
        warnings.warn(
            f"{source}: prepared with other options of {made['class']} or another version of MidiTok or symusic; its "
            "vocabulary is the same.",
            stacklevel=3,
        )


def fetch(source: str | os.PathLike) -> Path:
    """A folder as it is; or a Hub dataset `user/name`, of which MIDI files and prepared shards are downloaded.

    Raises:
        ValueError: neither a folder nor a dataset that can be read.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    # The patterns tell capitals from small letters.
    midi = ["*" + "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in suffix) for suffix in MIDI_SUFFIXES]
    wanted = [*midi, "data/*.parquet", "tokenizer/*", "corpus.json", "*.csv"]
    name = _hub_name(source)
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # as in `corpus_info`
        raise _hub_error(name, error) from error


def _hub_name(source: str | os.PathLike) -> str:
    name = os.fspath(source)
    if Path(name).exists():
        raise ValueError(f"{name}: not a folder.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"{name}: no such folder.")
    return name


def _hub_error(name: str, error: Exception) -> ValueError:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        reason = "the Hub has no dataset of this name, or it is private: log in with 'hf auth login'"
    elif isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
        reason = "the Hub cannot be reached, or HF_HUB_OFFLINE is set"
    else:
        reason = f"it cannot be downloaded ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return ValueError(f"{name}: no such folder, and {reason}.")
