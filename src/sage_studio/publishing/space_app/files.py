"""Visitors' files: for an hour, and no more of them than the disk can hold."""

import shutil
import time
from pathlib import Path

KEEP_BYTES = 2_000_000_000  # of all files together
EVERY_SECONDS = 60


def sweep(folder: Path, now: float, keep_seconds: float, keep_bytes: int = KEEP_BYTES) -> None:
    """Delete what is in `folder` for longer than `keep_seconds`, and the oldest of more than `keep_bytes`."""
    entries = []
    for entry in folder.iterdir():
        try:
            files = [file.stat() for file in (entry, *entry.rglob("*"))]
        except FileNotFoundError:  # moved meanwhile: the next sweep's
            continue
        entries.append((max(file.st_mtime for file in files), sum(file.st_size for file in files), entry))
    held = 0
    for changed, size, entry in sorted(entries, reverse=True):
        held += size
        if now - changed <= keep_seconds and held <= keep_bytes:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def sweep_forever(folder: Path, keep_seconds: float) -> None:
    """`sweep` once a minute; for a thread."""
    while True:
        time.sleep(EVERY_SECONDS)
        sweep(folder, time.time(), keep_seconds)
