"""The guarded pool: whatever an item does to its process, the other items and the run go on, and nothing is left."""

import faulthandler
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from sage_studio.corpus import workers
from sage_studio.corpus.workers import guarded_map

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")


def misbehave(item):
    """Does what the item says."""
    if item == "raise":
        raise ValueError("bad\nmusic")
    if item == "hang":
        while True:
            pass
    if item == "sleep":
        time.sleep(60)
    if item == "crash":
        faulthandler.disable()  # pytest's: it would print all this process inherited
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "exit":
        os._exit(3)
    if item == "memory":
        return len([bytes(1_000_000) for _ in range(2000)])
    return item


REASONS = {
    "raise": "bad music",
    "hang": "took longer than 1 s",
    "sleep": "took longer than 1 s",
    "crash": "the reader crashed (signal 11)",
    "exit": "the reader ended with exit code 3",
    "memory": "takes more than 0.2 GB of memory",
}


@linux
def test_a_bad_item_costs_itself_only():
    items = [*range(50), *REASONS, *range(50, 100), *REASONS, *range(100, 150)]
    found = list(guarded_map(misbehave, items, workers=3, time_limit=1, memory_limit=200_000_000))
    assert sorted(item for item, _, _ in found if isinstance(item, int)) == list(range(150))
    assert len(found) == len(items)
    for item, result, reason in found:
        assert (result, reason) == ((None, REASONS[item]) if item in REASONS else (item, ""))
    assert not multiprocessing.active_children()


def test_items_are_read_as_results_are_taken():
    read = itertools.count()
    with closing(guarded_map(misbehave, read, workers=2)) as results:
        assert [reason for _, _, reason in itertools.islice(results, 200)] == [""] * 200
        assert next(read) < 220
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def test_a_taker_of_results_may_take_its_time():
    """While the results wait, no item has exceeded its limit."""
    found = []
    for item, _, reason in guarded_map(misbehave, range(12), workers=2, time_limit=0.3):
        time.sleep(0.4 if item in (0, 5) else 0)
        found.append(reason)
    assert found == [""] * 12


def test_large_items_and_results_block_nobody():
    items = [bytes(3_000_000) for _ in range(8)]
    assert [len(result) for _, result, _ in guarded_map(misbehave, items, workers=2)] == [3_000_000] * 8


def test_no_items_start_no_processes():
    assert list(guarded_map(misbehave, [])) == []


@pytest.mark.parametrize("option", ["workers", "time_limit", "memory_limit"])
def test_bad_options_are_named(option):
    with pytest.raises(ValueError, match=f"{option} must be above 0, not 0"):
        guarded_map(misbehave, [1], **{option: 0})


def test_processes_that_do_not_start_are_said(monkeypatch):
    monkeypatch.setattr(workers, "_serve", lambda *args: os._exit(7))
    with pytest.raises(RuntimeError, match="do not start: the reader ended with exit code 7"):
        list(guarded_map(misbehave, [1, 2]))
    assert not multiprocessing.active_children()


def test_an_error_where_results_are_taken_ends_the_processes():
    with pytest.raises(ZeroDivisionError), closing(guarded_map(misbehave, ["sleep", 1, 2], workers=2)) as results:
        for _ in results:
            raise ZeroDivisionError
    assert not multiprocessing.active_children()


def test_processes_can_be_spawned(monkeypatch):
    """As where there is no fork."""
    monkeypatch.setattr(workers, "START", "spawn")
    found = list(guarded_map(abs, [-1, "x", -3], workers=1))
    assert found[0] == (-1, 1, "") and found[2] == (-3, 3, "")
    assert found[1][:2] == ("x", None) and found[1][2].startswith("TypeError: bad operand type")


RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had interrupts ignored
sys.path.insert(0, sys.argv[1])
from test_workers import misbehave
from sage_studio.corpus.workers import guarded_map
items = ["hang", "sleep"] if sys.argv[2] == "hang" else range(10**9)
for done, _ in enumerate(guarded_map(misbehave, items, workers=2, time_limit=1)):
    if done == 20:
        print("running", flush=True)
    if done == 100:
        time.sleep(60)  # its processes have nothing to do, or cannot hand over what they did
"""


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@linux
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("items", ["many", "hang"])
def test_no_process_outlives_its_parent(items, end):
    command = [sys.executable, "-c", RUN, str(Path(__file__).parent), items]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        if items == "many":
            assert parent.stdout.readline() == b"running\n"
        until = time.monotonic() + 60
        while len(found := children(parent.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(found) == 2
        parent.send_signal(end)
        until = time.monotonic() + 20
        while any(map(running, found)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(running, found))
        parent.wait(20)
        assert items == "hang" or end != signal.SIGINT or b"KeyboardInterrupt" in parent.stderr.read()
