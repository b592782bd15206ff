"""The `prepare` command: what it prints and writes, and that a wrong argument is told before any work."""

import argparse
import csv
import json

import pytest
from conftest import band

from perceivers import PerceiverSTokenizer
from sage_music import SageMusicTokenizer
from sage_studio.corpus import read_shards
from sage_studio.corpus.command import add_arguments, load_tokenizer, run, size


@pytest.fixture
def midi(tmp_path):
    folder = tmp_path / "midi"
    folder.mkdir()
    for seed in range(8):
        band(bars=3, seed=seed).dump_midi(folder / f"{seed}.mid")
    (folder / "broken.mid").write_bytes(b"MThd and no more")
    for name in ("a.mid", "b.mid"):
        (folder / name).write_bytes(b"x" * 3001 + name.encode())
    return folder


def prepare(tmp_path, *options, data=None) -> dict:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    cache = ["--cache", str(tmp_path / "cache"), "--workers", "1"]
    return run(parser.parse_args(["--data", str(data or tmp_path / "midi"), *cache, *map(str, options)]))


def test_it_prints_counts_and_writes_shards(midi, tmp_path, capsys):
    result = prepare(tmp_path, "--output", tmp_path / "out", "--size-limit", "3kB")
    printed = capsys.readouterr().out
    assert "11 files, 0 of them from the cache" in printed and "files/s" in printed and "notes/s" in printed
    assert f"408 notes, {result['tokens']:,} tokens" in printed
    assert "skipped: 3 files\n  2 x it has N bytes, more than the limit of N" in printed
    assert f"wrote {tmp_path / 'out'}" in printed
    with open(tmp_path / "out" / "skipped.csv", newline="") as file:
        skipped = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert skipped.keys() == {"broken.mid", "a.mid", "b.mid"} and "3,006 bytes" in skipped["a.mid"]
    train = read_shards(tmp_path / "out", load_tokenizer("sage-music"), streaming=True)
    assert sum(len(row["input_ids"]) for row in train) == result["splits"]["train"]["tokens"]


def test_without_output_it_fills_the_cache(midi, tmp_path, capsys):
    first = prepare(tmp_path, "--json", "--model", "perceivers")
    again = prepare(tmp_path, "--json", "--model", "perceivers")
    assert (first["from_cache"], again["from_cache"], again["output"]) == (0, 8, None)
    assert json.loads(json.dumps(again))["reasons"] == first["reasons"] and capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "midi"]


def test_the_tokenizer_is_the_checkpoints(midi, tmp_path):
    own = SageMusicTokenizer(num_velocities=16)
    own.save_pretrained(tmp_path / "tokenizer")
    PerceiverSTokenizer().save_pretrained(tmp_path / "piano")
    assert load_tokenizer(str(tmp_path / "tokenizer")).get_vocab() == own.get_vocab()
    assert isinstance(load_tokenizer(str(tmp_path / "piano")), PerceiverSTokenizer)
    prepare(tmp_path, "--json", "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "out")
    read_shards(tmp_path / "out", own, streaming=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "{}/midi"), "midi: holds something else than a prepared corpus"),
        (("--output", "{}/midi/0.mid"), "0.mid: is a file"),
        (("--model", "{}/nothing"), "nothing: no such folder"),
        (("--tokenizer", "{}/midi"), "midi: has no tokenizer_config.json"),
        (("--held-out", "1.5"), "held_out is a share"),
        (("--licences", "MIT"), "give --metadata"),
        (("--metadata", "{}/none.csv"), "none.csv: cannot be read"),
        (("--workers", "0"), "workers must be above 0"),
    ],
)
def test_wrong_arguments_are_told_before_any_work(midi, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, *(option.format(tmp_path) for option in options))


def test_prepared_data_are_not_prepared_again(midi, tmp_path):
    prepare(tmp_path, "--json", "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="is prepared already"):
        prepare(tmp_path, data=tmp_path / "out")
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(tmp_path, "--output", tmp_path / "out")
    assert prepare(tmp_path, "--json", "--output", tmp_path / "out", "--overwrite")["from_cache"] == 8


def test_sizes_are_read():
    assert [size(text) for text in ("100MB", "2 GB", "1.5k", "77")] == [100_000_000, 2_000_000_000, 1500, 77]
    for text in ("many", "0", "-3MB", "1TB"):
        with pytest.raises(argparse.ArgumentTypeError, match="not a size"):
            size(text)
