"""The cache of token ids: encoded once, whatever happens in between, and read as it was encoded."""

import multiprocessing
import os
import random
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import band

from sage_music import SageMusicTokenizer
from sage_studio.corpus import TokenStore, encode_corpus, encode_file, store
from sage_studio.corpus.encoding import failed_record


def corpus(folder: Path, count: int) -> list[Path]:
    """Small files that differ."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{seed}.mid" for seed in range(count)]
    for seed, path in enumerate(files):
        band(bars=1, seed=seed).dump_midi(path)
    return files


def ids_of(dataset) -> list[list[int]]:
    return [row["input_ids"] for row in dataset]


class Slow:
    """Encodes like another tokenizer, but hangs in a piece of so many notes, and counts what it encodes in a file."""

    def __init__(self, tokenizer, log: Path, hangs: int = 0):
        self.tokenizer, self.log, self.hangs = tokenizer, log, hangs
        self.vocab_size, self.eos_token_id, self.get_vocab = 1000, 2, tokenizer.get_vocab

    def midi_to_ids(self, score):
        with open(self.log, "a") as file:
            file.write("x")
        time.sleep(1.5 if score.note_num() == self.hangs else 0)
        return self.tokenizer.midi_to_ids(score)

    def encoded(self) -> int:
        """How many since the last time it was asked."""
        count = self.log.stat().st_size if self.log.exists() else 0
        self.log.unlink(missing_ok=True)
        return count


def test_a_corpus_is_encoded_once(tokenizer, tmp_path):
    files = corpus(tmp_path / "midi", 12)
    (tmp_path / "midi" / "copy.mid").write_bytes(files[3].read_bytes())
    (tmp_path / "midi" / "broken.mid").write_bytes(b"MThd")
    (tmp_path / "midi" / "broken too.mid").write_bytes(b"MThd")
    (tmp_path / "midi" / "large.mid").write_bytes(bytes(5001))
    everything = sorted((tmp_path / "midi").iterdir())
    counting, done = Slow(tokenizer, tmp_path / "log"), []
    for again in range(2):
        keys, skipped = encode_corpus(
            everything, counting, tmp_path / "cache", workers=2, size_limit=5000, progress=done.append
        )
        assert counting.encoded() == (0 if again else 12)
        assert [path.name for path, key in zip(everything, keys, strict=True) if key is None] == [
            "broken too.mid",
            "broken.mid",
            "large.mid",
        ]
        assert {path.name: reason.split(" (")[0] for path, reason in skipped.items()} == {
            "broken too.mid": "damaged or truncated MIDI",
            "broken.mid": "damaged or truncated MIDI",
            "large.mid": "it has 5,001 bytes, more than the limit of 5,000",
        }
        kept = [path for path in everything if path not in skipped]
        dataset = TokenStore(tmp_path / "cache", counting).dataset([key for key in keys if key])
        assert ids_of(dataset) == [[*tokenizer.midi_to_ids(path), 2] for path in kept]
        for path, row in zip(kept, dataset, strict=True):
            record = encode_file(path, counting)
            assert {**row, "input_ids": 0} == {**record, "input_ids": 0}
        counting.encoded()
    assert sum(done) == 2 * len(everything)
    band(bars=2, seed=99).dump_midi(tmp_path / "midi" / "new.mid")
    keys, _ = encode_corpus([*everything, tmp_path / "midi" / "new.mid"], counting, tmp_path / "cache")
    assert counting.encoded() == 1 and keys[-1]
    other = SageMusicTokenizer()  # has ids of its own
    keys, _ = encode_corpus(files[:1], other, tmp_path / "cache")
    assert ids_of(TokenStore(tmp_path / "cache", other).dataset(keys)) == [[*other.midi_to_ids(files[0]), 2]]


def test_what_took_too_long_is_tried_again_under_a_higher_limit(tokenizer, tmp_path):
    files = corpus(tmp_path / "midi", 3)
    band(bars=2).dump_midi(files[1])
    slow = Slow(tokenizer, tmp_path / "log", hangs=band(bars=2).note_num())
    for limit, encoded in ((0.7, 3), (0.7, 0), (0.2, 0), (30, 1), (0.7, 0)):
        keys, skipped = encode_corpus(files, slow, tmp_path / "cache", time_limit=limit)
        assert slow.encoded() == encoded
        if encoded == 1:
            assert not skipped and all(keys)
    assert not skipped and all(keys)
    assert not TokenStore(tmp_path / "cache", slow).failures()
    assert len(ids_of(TokenStore(tmp_path / "cache", slow).dataset(keys))[1]) > 50


def test_a_file_that_changes_meanwhile_is_not_kept(tokenizer, tmp_path, monkeypatch):
    (path,) = corpus(tmp_path / "midi", 1)
    with monkeypatch.context() as patch:
        patch.setattr(store, "read_within", lambda path, limit: b"what was there before")
        assert encode_corpus([path], tokenizer, tmp_path / "cache") == ([None], {path: "it changed while it was read"})
    assert all(encode_corpus([path], tokenizer, tmp_path / "cache")[0])


def start(files: list[Path], tokenizer, cache: Path) -> multiprocessing.Process:
    """`encode_corpus` in another process, in parts of a tenth of a second."""

    def encode() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had interrupts ignored
        store.PART_SECONDS = 0.1
        encode_corpus(files, tokenizer, cache, workers=2)

    run = multiprocessing.get_context("fork").Process(target=encode)
    run.start()
    return run


def test_a_killed_run_goes_on_where_it_was(tokenizer, tmp_path):
    """Ended at random moments, then run to the end: as if it had never been ended."""
    files, cache = corpus(tmp_path / "midi", 500), tmp_path / "cache"
    kept, rng, held = TokenStore(cache, tokenizer), random.Random(0), [0]
    for end in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        parts, run, until = (
            len(list(kept.folder.glob("*.arrow"))),
            start(files, tokenizer, cache),
            time.monotonic() + 60,
        )
        while len(list(kept.folder.glob("*.arrow"))) == parts and run.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        with suppress(ProcessLookupError):  # it may be through
            os.kill(run.pid, end)
        run.join(60)
        held.append(len(kept.keys()))
        assert run.exitcode is not None and (held[-1] > held[-2] or held[-1] == len(files))
    keys, skipped = encode_corpus(files, tokenizer, cache)
    assert not skipped
    assert ids_of(kept.dataset(keys)) == [encode_file(path, tokenizer)["input_ids"].tolist() for path in files]


def test_two_processes_fill_one_cache(tokenizer, tmp_path):
    files, cache = corpus(tmp_path / "midi", 200), tmp_path / "cache"
    runs = [start(files, tokenizer, cache) for _ in range(2)]
    for run in runs:
        run.join(100)
    assert [run.exitcode for run in runs] == [0, 0]
    kept = TokenStore(cache, tokenizer)
    keys, _ = encode_corpus(files, tokenizer, cache)
    assert len(kept.keys()) == 200
    assert ids_of(kept.dataset(keys)) == [encode_file(path, tokenizer)["input_ids"].tolist() for path in files]


def record_of(key: str, number: int, tokenizer) -> dict:
    ids = np.arange(number % 5 + 1, dtype=np.uint16) + number
    return {**failed_record(key, tokenizer, ""), "input_ids": ids, "notes": number, "fingerprint": key}


def test_many_small_parts_become_few(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MANY_PARTS", 4)
    monkeypatch.setattr(store, "BATCH_BYTES", 400)
    kept = TokenStore(tmp_path, tokenizer)
    keys = [f"{number:064x}" for number in range(30)]
    kept.add([failed_record(keys[0], tokenizer, "too slow", 5.0)])
    kept.add([failed_record(keys[1], tokenizer, "broken")])
    opened = kept.dataset(keys[1:2])
    for number, key in enumerate(keys):
        if number != 1:
            kept.add([record_of(key, number, tokenizer)])
        assert len(list(kept.folder.iterdir())) <= 5
    assert opened[0]["error"] == "broken"  # though its part is gone
    assert kept.keys() == set(keys) and kept.failures() == {keys[1]: ("broken", 0.0)}
    order = random.Random(0).sample(keys, 30)
    dataset = kept.dataset(order)
    assert dataset["notes"] == [0 if key == keys[1] else keys.index(key) for key in order]
    assert ids_of(dataset) == [
        [] if key == keys[1] else record_of(key, keys.index(key), tokenizer)["input_ids"].tolist() for key in order
    ]
    assert len(dataset.data["sha256"].chunks) < 12
    with pytest.raises(KeyError, match="1 records are not in this cache"):
        kept.dataset([keys[0], "0"])
    assert len(kept.dataset([])) == 0 and len(TokenStore(tmp_path / "new", tokenizer).dataset([])) == 0


def test_damaged_and_unfinished_parts_cost_their_records_only(tokenizer, tmp_path, monkeypatch):
    kept = TokenStore(tmp_path, tokenizer)
    for number in range(3):
        kept.add([record_of(str(number), number, tokenizer)])
    parts = sorted(kept.folder.iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:-100])
    parts[2].write_bytes(b"")
    (kept.folder / ".unfinished.arrow.part").write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged file of the token cache"):
        assert kept.keys() == {"1"}
    monkeypatch.setattr(store, "STALE_SECONDS", 0.0)
    kept.add([record_of("0", 0, tokenizer)])
    assert kept.dataset(["0", "1"])["notes"] == [0, 1] and len(list(kept.folder.iterdir())) == 2


def test_a_full_disk_is_one_clear_error(tokenizer, tmp_path):
    """Here a limit on the size of files takes the disk's place: writing fails with the same kind of error."""
    files = corpus(tmp_path / "midi", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(OSError, match=r"cannot be written .*another folder with --cache: '.*cache") as raised:
            encode_corpus(files, tokenizer, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "cache") in str(raised.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert all(encode_corpus(files, tokenizer, tmp_path / "cache")[0])


def test_a_cache_that_cannot_be_a_folder_is_named(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"another folder with --cache: '.*file"):
        encode_corpus(corpus(tmp_path / "midi", 1), tokenizer, tmp_path / "file" / "cache")
