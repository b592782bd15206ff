"""One function over many items in other processes; an item that hangs, crashes or eats memory costs itself only.

A process that outlasts an item's time limit is killed, one that died is replaced, and the run goes on.
"""

import gc
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from .encoding import one_line

START = "fork" if sys.platform == "linux" else "spawn"  # elsewhere a fork breaks libraries of the system
TIME_LIMIT = 20.0  # seconds
MEMORY_LIMIT = 1_000_000_000  # bytes
# Items sent to a process that has not answered them: it never waits for its next one. In bytes they fit the pipe of any
# system, so that this end never blocks in sending to one that blocks in sending back.
IN_FLIGHT, IN_FLIGHT_BYTES = 4, 4096
START_LIMIT = 120.0  # seconds; a spawned process imports all that the function needs
FAILED_STARTS = 3  # in a row, before it is the function's fault or the machine's


def guarded_map(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int | None = None,
    time_limit: float = TIME_LIMIT,
    memory_limit: int = MEMORY_LIMIT,
) -> Iterator[tuple[Any, Any, str]]:
    """`(item, function(item), "")` for every item, in the order they are done, or `(item, None, reason)`.

    The reason is the text of an exception, the limit that was passed, or how the process ended. Items are read as
    results are taken, so that memory does not grow with their number. Use the iterator up or close it
    (`contextlib.closing`): that ends the processes. Where this process is killed they end by themselves, after the item
    at work, or after `2 * time_limit` in one that hangs.

    Args:
        function: forked with this process on Linux, elsewhere pickled.
        items: pickled, as are the results; best short, such as paths.
        workers: processes; None for one a core.
        time_limit: seconds of wall clock for one item.
        memory_limit: bytes that a process may come to hold beside those it began with. Linux only.

    Raises:
        ValueError: a number of workers or a limit that is not positive.
        RuntimeError: the processes end before they take an item.
    """
    workers = default_workers() if workers is None else workers
    for name, value in (("workers", workers), ("time_limit", time_limit), ("memory_limit", memory_limit)):
        if value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}.")
    return _results(function, iter(items), workers, time_limit, memory_limit)


def default_workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _results(function, items: Iterator, workers: int, time_limit: float, memory_limit: int) -> Iterator[tuple]:
    pool: list[_Worker] = []
    waiting: deque[tuple[Any, bytes]] = deque()  # items and their pickles, which go out next
    failed_starts = 0

    def more() -> bool:
        waiting.extend((item, bytes(ForkingPickler.dumps(item))) for item in itertools.islice(items, not waiting))
        return bool(waiting)

    try:
        while True:
            while len(pool) < workers and more():
                pool.append(_Worker(function, time_limit, memory_limit, [worker.connection for worker in pool]))
                pool[-1].take(waiting)
            while more() and min(pool, key=lambda worker: len(worker.sent)).take(waiting):
                pass
            if not waiting and not any(worker.sent for worker in pool):
                return
            patience = min(worker.deadline for worker in pool) - time.monotonic()
            ready = wait([worker.connection for worker in pool], min(max(patience, 0), 60))
            for worker in list(pool):
                overdue = worker.deadline <= time.monotonic()
                # Asked again: it may have answered while the last result was being dealt with.
                if worker.connection in ready or (overdue and worker.connection.poll()):
                    answers = worker.receive()
                    if answers is not None:
                        yield from answers
                        continue
                    reason = worker.end(patience=1)
                elif overdue:
                    worker.end()
                    reason = f"took longer than {time_limit:g} s"
                else:
                    continue
                pool.remove(worker)
                failed_starts = 0 if worker.started else failed_starts + 1
                if failed_starts == FAILED_STARTS:
                    raise RuntimeError(f"the processes that read files do not start: {reason}.")
                if worker.started and worker.sent:
                    yield worker.sent.popleft()[0], None, reason
                waiting.extendleft(reversed(worker.sent))
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """A process, and the items it was sent and has not answered, the one at work first."""

    def __init__(self, function: Callable, time_limit: float, memory_limit: int, others: list[Connection]):
        context = multiprocessing.get_context(START)
        self.connection, theirs = context.Pipe()
        # A fork inherits this process's ends of all pipes; left open, they would hide from the others that it is gone.
        inherited = [self.connection, *others] if START == "fork" else []
        self.process = context.Process(
            target=_serve, args=(theirs, inherited, function, time_limit, memory_limit), daemon=True
        )
        self.process.start()
        theirs.close()
        self.time_limit, self.started = time_limit, False
        self.sent: deque[tuple[Any, bytes]] = deque()
        self.deadline = time.monotonic() + START_LIMIT

    def take(self, waiting: deque[tuple[Any, bytes]]) -> bool:
        """Send it the first of `waiting`, unless it has enough or is dead."""
        size = sum(len(data) for _, data in (*self.sent, waiting[0]))
        if self.sent and (len(self.sent) >= IN_FLIGHT or size > IN_FLIGHT_BYTES):
            return False
        try:
            self.connection.send_bytes(waiting[0][1])
        except OSError:  # `receive` will find it dead
            return False
        if self.started and not self.sent:
            self.deadline = time.monotonic() + self.time_limit
        self.sent.append(waiting.popleft())
        return True

    def receive(self) -> list[tuple[Any, Any, str]] | None:
        """The result that has come, or none where it says that it has started; None where it is dead."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            return None
        results = [(self.sent.popleft()[0], *answer)] if self.started else []
        self.started = True
        self.deadline = time.monotonic() + self.time_limit if self.sent else float("inf")
        return results

    def end(self, patience: float = 0) -> str:
        """End the process, unless it ends by itself within `patience` seconds. Returns how it ended."""
        self.process.join(patience)
        self.process.kill()
        self.process.join(5)
        self.connection.close()
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"the reader ended with exit code {code}"
        if code == -getattr(signal, "SIGALRM", 0):
            return f"took longer than {self.time_limit:g} s"
        return f"the reader crashed (signal {-code})" if code != -9 else "the reader was killed (signal 9)"


def _serve(
    connection: Connection, inherited: list[Connection], function: Callable, time_limit: float, memory_limit: int
) -> None:
    """What a process does: answer items until there is nobody to answer to."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt reaches the whole group; this is for the parent to end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads did not survive the fork
    # Collections would walk all that was inherited, for a third of the time, and unshare its pages.
    gc.freeze()
    _limit_memory(memory_limit)
    connection.send(None)
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        _alarm(2 * time_limit)
        try:
            answer = function(item), ""
        except MemoryError:
            answer = None, f"takes more than {memory_limit / 1e9:g} GB of memory"
        except Exception as error:
            answer = None, one_line(error)
        _alarm(0)
        try:
            connection.send(answer)
        except OSError:
            return


def _alarm(seconds: float) -> None:
    """Have the system end this process after so long (0: not at all): nobody else does once the parent is gone."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory(limit: int) -> None:
    if sys.platform == "linux":
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = held + limit if hard == resource.RLIM_INFINITY else min(held + limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
