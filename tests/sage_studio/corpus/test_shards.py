"""Shards are what the corpus was, read in constant memory, from a folder or from a Hub; wrong ones are refused."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from conftest import band
from symusic import Note, Score, Tempo, Track

from perceivers import PerceiverSTokenizer
from sage_music import SageMusicTokenizer
from sage_studio.corpus import is_prepared, prepare_corpus, read_shards, write_shards
from sage_studio.corpus.shards import check_output, dataset_card, fetch


@pytest.fixture(scope="module", autouse=True)
def quick_datasets(tmp_path_factory):
    """What `datasets` makes of shards goes to a folder of the test, and a shuffled stream does not end with a sleep.

    The 5 seconds are for Arrow's threads, which must not outlive an interpreter that ends right after.
    """
    from datasets import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
        yield


@pytest.fixture(scope="module")
def midi(tmp_path_factory) -> Path:
    """A folder of 24 pieces and one broken file."""
    folder = tmp_path_factory.mktemp("midi")
    for seed in range(24):
        band(bars=2 + seed % 5, seed=seed).dump_midi(folder / f"{seed:02}.mid")
    (folder / "broken.mid").write_bytes(b"no")
    return folder


@pytest.fixture(scope="module")
def corpus(midi, tokenizer, tmp_path_factory):
    return prepare_corpus([midi], tokenizer, cache=tmp_path_factory.mktemp("cache"), workers=1)


@pytest.fixture(scope="module")
def shards(corpus, tokenizer, tmp_path_factory) -> Path:
    """The corpus in shards of 4,000 bytes, so that there are many."""
    return write_shards(corpus, tmp_path_factory.mktemp("shards") / "mine", tokenizer, shard_bytes=4000)


def rows(data) -> dict[str, list[int]]:
    return {row["path"]: [int(token) for token in row["input_ids"]] for row in data}


def test_what_is_read_is_what_was_prepared(corpus, shards, tokenizer):
    names = sorted(path.name for path in (shards / "data").iterdir())
    train = [name for name in names if name.startswith("train")]
    assert len(train) > 3 and train[0] == f"train-00000-of-{len(train):05}.parquet"
    assert not any(name.startswith("test") for name in names)
    for split in ("train", "validation"):
        expected = rows(corpus.splits[split])
        for streaming in (False, True):
            data = read_shards(shards, tokenizer, streaming=streaming, split=split)
            assert rows(data) == expected
            row = next(iter(data))
            assert isinstance(row["input_ids"], np.ndarray) and row["tokens"] == len(row["input_ids"])
            assert row["notes"] > 0 and len(row["group"]) == 16
    assert [row["path"] for row in read_shards(shards, tokenizer)] != sorted(rows(corpus.splits["train"]))
    assert (shards / "skipped.csv").read_text().startswith("file,reason\nbroken.mid,not a MIDI file")
    assert SageMusicTokenizer.from_pretrained(shards / "tokenizer").get_vocab() == tokenizer.get_vocab()


def test_a_shard_is_read_by_row_groups(corpus, tokenizer, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr("sage_studio.corpus.shards.ROW_GROUP_BYTES", 3000)
    folder = write_shards(corpus, tmp_path / "out", tokenizer)
    (shard,) = (folder / "data").glob("train-*")
    with pq.ParquetFile(shard) as file:
        assert file.metadata.num_row_groups > 4
        assert file.schema_arrow.field("input_ids").type.value_type == "uint16"
    stream = read_shards(folder, tokenizer, streaming=True)
    assert rows(stream) == rows(corpus.splits["train"])
    assert stream.reshard().num_shards > 4


def test_streams_are_shuffled_anew_each_epoch(shards, tokenizer):
    stream = read_shards(shards, tokenizer, streaming=True).shuffle(seed=1, buffer_size=8)
    orders = []
    for epoch in (0, 0, 1):
        stream.set_epoch(epoch)
        orders.append([row["path"] for row in stream])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_the_folder_is_a_dataset_by_its_card(shards, corpus, tmp_path):
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(shards / "README.md").data
    assert card.license == "unknown" and card.size_categories == ["n<1K"] and "midi" in card.tags
    loaded = load_dataset(str(shards))
    assert {name: len(split) for name, split in loaded.items()} == {
        name: len(split) for name, split in corpus.splits.items() if len(split)
    }


def test_the_card_names_a_licence_only_if_all_files_have_it(shards):
    info = json.loads((shards / "corpus.json").read_text())
    for licences, named in (
        ({"CC BY 4.0": 24}, "cc-by-4.0"),
        ({"MIT": 23}, "other"),
        ({"MIT": 12, "GPL": 12}, "other"),
    ):
        info["report"]["licences"] = licences
        assert f"\nlicense: {named}\n" in dataset_card(info)


def test_another_vocabulary_is_refused_and_other_options_are_said(shards, tokenizer, recwarn):
    vocabularies = r"SageMusicTokenizer \(769 tokens\).*PerceiverSTokenizer \(391 tokens\).*--model perceivers"
    with pytest.raises(ValueError, match=vocabularies):
        read_shards(shards, PerceiverSTokenizer())
    with pytest.raises(ValueError, match="two vocabularies"):
        read_shards(shards, SageMusicTokenizer(num_velocities=16))
    read_shards(shards, tokenizer, streaming=True)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="other options of SageMusicTokenizer"):
        read_shards(shards, SageMusicTokenizer(program_changes=True), streaming=True)


def test_only_whole_corpora_are_read(shards, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no split 'test' in it; it has train, validation"):
        read_shards(shards, tokenizer, split="test")
    with pytest.raises(ValueError, match="not a prepared corpus"):
        read_shards(tmp_path, tokenizer)
    part = shutil.copytree(shards, tmp_path / "part")
    next((part / "data").glob("train-00001-*")).unlink()
    with pytest.raises(ValueError, match=r"train-00001-of.*missing.*not whole"):
        read_shards(part, tokenizer)
    shutil.copy(next((shards / "data").glob("train-00001-*")), part / "data")
    cut = next((part / "data").glob("train-00000-*"))
    cut.write_bytes(cut.read_bytes()[:-200])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"part: its shards cannot be read"):
            read_shards(part, tokenizer, streaming=streaming)
    info = json.loads((part / "corpus.json").read_text())
    (part / "corpus.json").write_text(json.dumps({**info, "version": 99}))
    with pytest.raises(ValueError, match="later version"):
        is_prepared(part)


def test_nothing_else_is_overwritten(corpus, shards, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="something else"):
        write_shards(corpus, tmp_path / "mine", tokenizer, overwrite=True)
    copy = shutil.copytree(shards, tmp_path / "copy")
    with pytest.raises(ValueError, match="--overwrite"):
        check_output(copy)
    (tmp_path / ".copy.partial" / "data").mkdir(parents=True)  # of a run that was killed
    write_shards(corpus, copy, tokenizer, overwrite=True)
    assert len(list((copy / "data").glob("train-*"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "mine"]


def test_a_failure_leaves_no_folder(corpus, tokenizer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter", full)
    with pytest.raises(OSError, match="disk is full; choose another --output"):
        write_shards(corpus, tmp_path / "out", tokenizer)
    assert not list(tmp_path.iterdir())


class Hub(BaseHTTPRequestHandler):
    """What the clients ask of a Hub, for the dataset repositories that are folders below `root`."""

    protocol_version = "HTTP/1.1"
    commit = "0" * 40
    root: Path

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        repository = self.root.joinpath(*self.parts()[2:4])
        self.answer_json([self.entry(repository, repository / path) for path in wanted if (repository / path).exists()])

    def do_GET(self):
        parts = self.parts()
        if parts[:2] == ["api", "datasets"] and (repository := self.root.joinpath(*parts[2:4])).is_dir():
            files = sorted(path for path in repository.rglob("*") if path.is_file())
            if parts[4:5] == ["tree"]:
                below = repository.joinpath(*parts[6:])
                found = (
                    files
                    if "recursive=true" in self.path.lower()
                    else sorted(below.iterdir())
                    if below.is_dir()
                    else []
                )
                return self.answer_json([self.entry(repository, path) for path in found if below in path.parents])
            siblings = [{"rfilename": str(path.relative_to(repository))} for path in files]
            return self.answer_json({"id": "/".join(parts[2:4]), "sha": self.commit, "siblings": siblings})
        if parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
            repository = self.root.joinpath(*parts[1:3])
            path = repository.joinpath(*parts[5:])
            if path.is_file():
                return self.answer_file(path.read_bytes())
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if repository.is_dir() else "RepoNotFound"})
        return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def parts(self) -> list[str]:
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def entry(self, repository: Path, path: Path) -> dict:
        name = str(path.relative_to(repository))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": name, "oid": "0" * 40, "size": path.stat().st_size}

    def answer_file(self, data: bytes) -> None:
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            return self.answer(206, data[start:end], headers)
        return self.answer(200, data, headers)

    def answer_json(self, content) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, code: int, data: bytes, headers: dict) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(midi, shards, tmp_path):
    """Environment of a process whose Hub is on this machine: datasets `me/midi` and `me/shards`."""
    shutil.copytree(midi, tmp_path / "hub" / "me" / "midi" / "pieces")
    (tmp_path / "hub" / "me" / "midi" / "film.avi").write_bytes(b"large")
    (tmp_path / "hub" / "me" / "midi" / "LOUD.MID").write_bytes(b"no")
    shutil.copytree(shards, tmp_path / "hub" / "me" / "shards")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHere", (Hub,), {"root": tmp_path / "hub"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()


FROM_HUB = """
import json, sys
from sage_studio.corpus import is_prepared, read_shards
from sage_studio.corpus.shards import fetch
from sage_music import SageMusicTokenizer
tokenizer = SageMusicTokenizer(program_changes=False)
tokens = {}
for streaming in (True, False):
    stream = read_shards("me/shards", tokenizer, streaming=streaming)
    tokens[streaming] = {row["path"]: row["input_ids"].tolist() for row in stream}
assert tokens[True] == tokens[False]
errors = []
for name in ("me/none", "nowhere"):
    try:
        fetch(name)
    except ValueError as error:
        errors.append(str(error))
midi, shards = fetch("me/midi"), fetch("me/shards")
print(json.dumps({
    "tokens": tokens[True],
    "midi": sorted(str(path.relative_to(midi)) for path in midi.rglob("*") if path.is_file()),
    "prepared": [is_prepared(source) for source in ("me/midi", "me/shards", midi, shards)],
    "downloaded": len(list(read_shards(shards, tokenizer))),
    "errors": errors,
}))
from huggingface_hub import constants
constants.HF_HUB_OFFLINE = True
assert fetch("me/midi") == midi and not is_prepared("me/midi") and is_prepared("me/shards")
"""


def test_midi_and_shards_come_from_a_hub(hub, midi, corpus):
    done = subprocess.run([sys.executable, "-c", FROM_HUB], env=hub, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == rows(corpus.splits["train"])
    assert found["midi"] == ["LOUD.MID", *sorted(f"pieces/{path.name}" for path in midi.iterdir())]
    assert found["prepared"] == [False, True, False, True]
    assert found["downloaded"] == len(corpus.splits["train"])
    assert "me/none: no such folder, and the Hub has no dataset of this name" in found["errors"][0]
    assert found["errors"][1] == "nowhere: no such folder."


TRAIN_FROM_HUB = """
import json, sys
from pathlib import Path
from sage_studio.train.command import main
from sage_music import SageMusicTokenizer
root = Path(sys.argv[1])
SageMusicTokenizer(program_changes=False).save_pretrained(root / "tokenizer")
fields = {"model_type": "sage_music", "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 1}
(root / "new.json").write_text(json.dumps({**fields, "num_attention_heads": 5, "max_position_embeddings": 256}))
for number, data in enumerate((["me/midi"], ["me/shards"], ["me/shards", "--streaming"])):
    model = ["--model", str(root / "new.json"), "--tokenizer", str(root / "tokenizer"), "--output", f"{root}/{number}"]
    few = "--max_steps 2 --block_size 64 --per_device_train_batch_size 2 --sample_steps 0 --report_to none".split()
    assert main(["--data", *data, *model, *few]) == 0
    print("steps", json.loads((root / str(number) / "report.json").read_text())["steps"])
"""


def test_training_takes_datasets_of_a_hub(hub, tmp_path):
    argv = [sys.executable, "-c", TRAIN_FROM_HUB, str(tmp_path)]
    done = subprocess.run(argv, env=hub, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("steps")] == ["steps 2"] * 3


def test_a_hub_out_of_reach_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="me/other: no such folder, and the Hub cannot be reached"):
        fetch("me/other")
    assert fetch(tmp_path) == tmp_path


def write_many(folder: Path, count: int, pieces: int) -> None:
    """`count` different files of `pieces` pieces of 12 notes: each has another tempo."""
    contents = []
    for seed in range(pieces):
        rng, score = random.Random(seed), Score(480)
        score.tempos.append(Tempo(0, 120.0))
        score.tracks.append(Track(program=seed % 100))
        for index in range(12):
            score.tracks[0].notes.append(Note(index * 240, rng.choice([120, 240]), rng.randint(40, 90), 80))
        contents.append(score.dumps_midi())
    for index in range(count):
        if index % 1000 == 0:
            place = folder / f"{index // 1000:04}"
            place.mkdir(parents=True)
        data = contents[index % pieces]
        at = data.index(b"\xff\x51\x03") + 3
        (place / f"{index:07}.mid").write_bytes(data[:at] + (400_000 + index).to_bytes(3, "big") + data[at + 3 :])


STREAM = """
import json, sys, time
from pathlib import Path
import datasets
from sage_studio.corpus import prepare_corpus, read_shards, shards, write_shards
from perceivers import PerceiverSTokenizer

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1
tokenizer = PerceiverSTokenizer()
corpus = prepare_corpus([sys.argv[1] + "/midi"], tokenizer, cache=sys.argv[1] + "/cache", workers=1)
shards.ROW_GROUP_BYTES = 40_000
folder = write_shards(corpus, sys.argv[1] + "/out", tokenizer, shard_bytes=200_000)
report = corpus.report
del corpus
stream = read_shards(folder, tokenizer, streaming=True).shuffle(seed=0, buffer_size=200)
early, most, tokens, read = 0, 0, 0, 0
for epoch in range(3):
    stream.set_epoch(epoch)
    for row in stream:
        read += 1
        tokens += len(row["input_ids"])
        if read == report["splits"]["train"]["files"] // 2:
            early = held()
        elif read % 500 == 0:
            most = max(most, held())
found = {"report": report, "read": read, "tokens": tokens, "growth": most - early, "shards": stream.num_shards}
print(json.dumps(found), flush=True)
time.sleep(2)
"""


# A million of them: SAGE_MUSIC_STREAM_FILES=1000000 pytest -k constant_memory
FILES = int(os.environ.get("SAGE_MUSIC_STREAM_FILES", "10000"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_many_files_stream_in_constant_memory(tmp_path):
    """What is held must not grow with what was read. Were 10,000 rows kept, it would by 17 MB in three epochs."""
    write_many(tmp_path / "midi", FILES, 300)
    argv, patience = [sys.executable, "-c", STREAM, tmp_path], 300 + FILES // 100
    done = subprocess.run(argv, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: value for name, value in found.items() if name != "report"})
    report = found["report"]
    assert (report["files"], report["skipped"], report["copies"], report["groups"]) == (FILES, 0, 0, 300)
    assert 0.04 * FILES < report["splits"]["validation"]["files"] < 0.19 * FILES
    assert found["shards"] > 3
    assert found["read"] == 3 * report["splits"]["train"]["files"]
    assert found["tokens"] == 3 * report["splits"]["train"]["tokens"]
    assert found["growth"] < (8e6 if FILES <= 10_000 else 50e6)
