"""A cache of token ids by files' contents: Arrow files that are mapped into memory, and how a corpus gets into them.

A tokenizer has a folder of its own, named by its key, and in it parts: files of records in Arrow's stream format. A
part is written whole and then renamed into place under a name of its own. So a kill costs the records of the part that
was not written yet, and processes that share a cache see whole parts only; at worst both encode the same file.
"""

import functools
import hashlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from sage_studio.errors import MissingExtraError, install_hint

from .encoding import (
    SIZE_LIMIT,
    MidiTokenizer,
    Record,
    encode_file,
    failed_record,
    ids_dtype,
    one_line,
    read_within,
    tokenizer_key,
)
from .workers import TIME_LIMIT, guarded_map

# A part is written after so many seconds of work or bytes of ids: what a kill costs, and what is held in memory.
PART_SECONDS, PART_BYTES = 10.0, 32_000_000
# Each part is an open file of every process that reads it. So many below such a size become one.
MANY_PARTS, SMALL_PART = 64, 16_000_000
BATCH_BYTES = 8_000_000  # of records that are merged
STALE_SECONDS = 24 * 3600.0  # after which an unfinished part is nobody's


class TokenStore:
    """Records (`Record`) of files by the SHA-256 of their bytes, for one tokenizer.

    Args:
        folder: the cache; one for all tokenizers.
        tokenizer: whose ids are kept; `tokenizer_key` tells tokenizers apart.

    Raises:
        MissingExtraError: pyarrow, which comes with `datasets`, is not installed.
    """

    def __init__(self, folder: str | os.PathLike, tokenizer: MidiTokenizer):
        try:
            import pyarrow as pa
        except ImportError as error:
            raise MissingExtraError(f"a corpus needs datasets: {install_hint('datasets')}.") from error
        self.folder = Path(folder) / tokenizer_key(tokenizer)[:16]
        self.schema = pa.schema(
            {
                "sha256": pa.string(),
                "input_ids": pa.list_(pa.from_numpy_dtype(ids_dtype(tokenizer))),
                "notes": pa.int32(),
                "fingerprint": pa.string(),
                "error": pa.string(),
                "limit": pa.float64(),
            }
        )

    def keys(self) -> set[str]:
        """The SHA-256 of every record there is, failed ones among them."""
        return set(self._columns("sha256")["sha256"].to_pylist())

    def failures(self) -> dict[str, tuple[str, float]]:
        """`error` and `limit` of every failed record, by its SHA-256."""
        import pyarrow.compute as pc

        table = self._columns("sha256", "error", "limit")
        failed = table.filter(pc.not_equal(table["error"], ""))
        # By the newest record of the file: it may have been encoded since, under a higher limit.
        newest = table.take(pc.index_in(failed["sha256"], value_set=table["sha256"]))
        rows = zip(*(newest[name].to_pylist() for name in ("sha256", "error", "limit")), strict=True)
        return {key: (error, limit) for key, error, limit in rows if error}

    def add(self, records: Sequence[Record]) -> None:
        """Keep records, as one part; of several with one SHA-256 the one added last holds.

        Raises:
            OSError: the cache cannot be written, for want of room or of permission.
        """
        import pyarrow as pa

        if not records:
            return
        lengths = [len(record["input_ids"]) for record in records]
        ids = np.concatenate([record["input_ids"] for record in records])
        columns = {name: [record[name] for record in records] for name in self.schema.names if name != "input_ids"}
        columns["input_ids"] = pa.ListArray.from_arrays(
            np.cumsum([0, *lengths], dtype=np.int32), pa.array(ids, self.schema.field("input_ids").type.value_type)
        )
        self._write(self._name(time.time_ns()), [pa.record_batch(columns, self.schema)])
        self._merge()

    def dataset(self, sha256s: Sequence[str]):
        """A `datasets.Dataset` of the records asked for, in that order, mapped into memory from the cache.

        Columns: the fields of `Record`. Of a row, format "arrow" gives the ids as they lie in the cache
        and format "numpy" as an int64 array.

        Raises:
            KeyError: a record that is not there.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        from datasets import Dataset, concatenate_datasets

        parts = self._opened(lambda path: Dataset.from_file(str(path)))
        whole = concatenate_datasets(parts) if parts else Dataset(self.schema.empty_table())
        rows = pc.index_in(pa.array(sha256s, pa.string()), value_set=whole.data["sha256"])
        if rows.null_count:
            missing = sha256s[rows.is_null().to_pylist().index(True)]
            raise KeyError(f"{self.folder}: {rows.null_count} records are not in this cache, {missing} among them.")
        return whole.select(rows.to_numpy())

    def _paths(self) -> list[Path]:
        """The parts, newest first."""
        return sorted(self.folder.glob("*.arrow"), reverse=True)

    def _opened(self, read: Callable[[Path], object]) -> list:
        """`read` of every part, newest first."""
        import pyarrow as pa

        while True:
            opened = []
            try:
                for path in self._paths():
                    try:
                        opened.append(read(path))
                    except pa.ArrowInvalid:
                        warnings.warn(f"{path}: a damaged file of the token cache is removed.", stacklevel=4)
                        path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue  # another process has merged it into one that a new look will find
            return opened

    def _columns(self, *names: str):
        """A table of some columns of all parts, newest first."""
        import pyarrow as pa

        def read(path: Path) -> pa.Table:
            return pa.ipc.open_stream(pa.memory_map(str(path))).read_all().select(names)

        return pa.concat_tables([pa.schema([self.schema.field(n) for n in names]).empty_table(), *self._opened(read)])

    @staticmethod
    def _name(stamp: int) -> str:
        return f"{stamp:020d}-{uuid.uuid4().hex[:8]}.arrow"

    def _write(self, name: str, batches: Iterable) -> None:
        import pyarrow as pa

        temporary = self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    with pa.ipc.new_stream(file, self.schema) as writer:
                        for batch in batches:
                            writer.write_batch(batch)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.folder / name)
            finally:
                temporary.unlink(missing_ok=True)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"the token cache cannot be written ({error.strerror}): make room there, or choose another folder "
                "with --cache",
                str(self.folder),
            ) from error

    def _merge(self) -> None:
        """Make one part of the small ones where there are many."""
        for path in self.folder.glob(".*.part"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
        with suppress(FileNotFoundError):  # another process is merging them
            small = [path for path in self._paths() if path.stat().st_size < SMALL_PART]
            if len(small) > MANY_PARTS:
                newest = int(small[0].name.split("-")[0])
                self._write(self._name(newest), _regrouped(small, self.schema))
                for path in small:
                    # Whoever has it mapped goes on reading it; where a system forbids the removal of such, it stays.
                    with suppress(OSError):
                        path.unlink()


def _regrouped(paths: Sequence[Path], schema) -> Iterator:
    """The record batches of parts, small ones put together."""
    import pyarrow as pa

    group: list[pa.RecordBatch] = []
    for path in paths:
        group.extend(pa.ipc.open_stream(pa.memory_map(str(path))))
        if path == paths[-1] or sum(batch.nbytes for batch in group) >= BATCH_BYTES:
            yield from pa.Table.from_batches(group, schema).combine_chunks().to_batches()
            group = []


def encode_corpus(
    files: Sequence[Path],
    tokenizer: MidiTokenizer,
    cache: str | os.PathLike,
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    size_limit: int = SIZE_LIMIT,
    progress: Callable[[int], object] | None = None,
) -> tuple[list[str | None], dict[Path, str]]:
    """Have the records of all files in the cache: `TokenStore(cache, tokenizer).dataset` then has them.

    What the cache knows by its contents is not encoded again, nor are copies. That includes files that failed, except
    those that failed under a lower time limit. Killed or interrupted, the next call goes on where this one was.

    Args:
        workers: processes that encode; None for one a core.
        time_limit: seconds for one file; a file that takes longer is skipped.
        size_limit: bytes; larger files are skipped unread.
        progress: called with how many more files are done, as tqdm's `update`.

    Returns:
        For each file the SHA-256 of its contents, or None where it is skipped; and why files are skipped.

    Raises:
        OSError: the cache cannot be written.
        ValueError, RuntimeError: as `guarded_map`.
    """
    store = TokenStore(cache, tokenizer)
    failures = store.failures()
    failed = {key: error for key, (error, limit) in failures.items() if not 0 < limit < time_limit}
    known = store.keys() - (failures.keys() - failed.keys())
    keys: list[str | None] = []
    reasons: dict[Path, str] = {}
    advance = progress if progress is not None else lambda files: None

    def unknown() -> Iterator[tuple[Path, str]]:
        """Files that are to be encoded, with the SHA-256 they have now."""
        for path in files:
            try:
                keys.append(hashlib.sha256(read_within(path, size_limit)).hexdigest())
            except ValueError as error:
                keys.append(None)
                reasons[path] = one_line(error)
            if keys[-1] is None or keys[-1] in known:
                advance(1)
            else:
                known.add(keys[-1])
                yield path, keys[-1]

    encode = functools.partial(_encode, tokenizer=tokenizer, size_limit=size_limit)
    batch: list[Record] = []
    size, since = 0, time.monotonic()
    with closing(guarded_map(encode, unknown(), workers, time_limit)) as results:
        try:
            for (_, key), result, reason in results:
                record = result or failed_record(key, tokenizer, reason, time_limit)
                if record["error"] or record["sha256"] != key:
                    failed[key] = record["error"] or "it changed while it was read"
                if record["sha256"] == key:
                    batch.append(record)
                    size += record["input_ids"].nbytes
                advance(1)
                if size >= PART_BYTES or time.monotonic() - since >= PART_SECONDS:
                    full, batch = batch, []
                    store.add(full)
                    size, since = 0, time.monotonic()
        finally:
            store.add(batch)  # after an interrupt too
    for index, (path, key) in enumerate(zip(files, keys, strict=True)):
        if key in failed:
            keys[index], reasons[path] = None, failed[key]
    return keys, reasons


def _encode(item: tuple[Path, str], tokenizer: MidiTokenizer, size_limit: int) -> Record:
    return encode_file(item[0], tokenizer, size_limit)
