"""Folders to a corpus: every file is a row or a reason, no music is in two splits, nothing is encoded twice."""

import csv
import pickle
import shutil
import warnings

import numpy as np
import pytest
from conftest import DATA, band, needs_data
from symusic import Note, Score

from perceivers import PerceiverSTokenizer
from sage_studio.corpus import prepare_corpus


def transposed(score: Score, semitones: int) -> Score:
    score = score.copy()
    for track in score.tracks:
        if not track.is_drum:
            track.notes = type(track.notes)(
                [Note(n.time, n.duration, n.pitch + semitones, n.velocity) for n in track.notes]
            )
    return score


@pytest.fixture(scope="module")
def midi(tmp_path_factory):
    """Twenty pieces; of the first five a copy and a transposed copy; two files that are no music."""
    folder = tmp_path_factory.mktemp("midi")
    (folder / "copies").mkdir()
    for seed in range(20):
        band(bars=4, seed=seed).dump_midi(folder / f"piece {seed:02}.mid")
        if seed < 5:
            shutil.copy(folder / f"piece {seed:02}.mid", folder / "copies" / f"same {seed:02}.mid")
            transposed(band(bars=4, seed=seed), 3).dump_midi(folder / "copies" / f"higher {seed:02}.midi")
    (folder / "text.mid").write_text("not music")
    (folder / "empty.mid").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(midi, tokenizer, cache):
    return prepare_corpus([midi], tokenizer, cache=cache, workers=2)


def paths(corpus) -> dict[str, str]:
    """The split of every row."""
    return {row["path"]: name for name, split in corpus.splits.items() for row in split}


def test_every_file_is_a_row_or_a_reason(corpus, midi, tokenizer, tmp_path):
    assert len(paths(corpus)) == 30
    assert dict(corpus.skipped).keys() == {"text.mid", "empty.mid"}
    for split in corpus.splits.values():
        for row in split:
            expected = [*tokenizer.midi_to_ids(midi / row["path"]), tokenizer.eos_token_id]
            assert row["input_ids"] == expected and row["tokens"] == len(expected)
            assert row["notes"] == 4 * 17
    with open(corpus.write_skipped(tmp_path / "skipped.csv"), newline="") as file:
        written = [tuple(row) for row in csv.reader(file)]
    assert written == [("file", "reason"), *corpus.skipped] and "empty" in dict(corpus.skipped)["empty.mid"]


def test_copies_are_in_the_split_of_their_piece(corpus):
    splits = paths(corpus)
    for seed in range(5):
        names = (f"piece {seed:02}.mid", f"copies/same {seed:02}.mid", f"copies/higher {seed:02}.midi")
        assert len({splits[name] for name in names}) == 1
    report = corpus.report
    assert (report["files"], report["skipped"], report["groups"], report["copies"]) == (32, 2, 20, 5)
    assert sum(split["groups"] for split in report["splits"].values()) == 20
    assert report["leaks"] == [] and report["splits"]["validation"]["files"] > 0


def test_counts_are_those_of_the_rows(corpus):
    report = corpus.report
    for name, split in corpus.splits.items():
        assert split.column_names == ["path", "input_ids", "tokens", "notes", "group"]
        for column in ("notes", "tokens"):
            assert report["splits"][name][column] == sum(split[column])
        assert len(set(split["group"])) == report["splits"][name]["groups"]
    assert report["notes"] == 30 * 4 * 17
    assert report["files_per_second"] == pytest.approx(32 / report["elapsed_s"], rel=0.1)
    row = corpus.splits["train"].with_format("numpy")[0]
    assert isinstance(row["input_ids"], np.ndarray)


def test_rows_are_in_the_order_of_the_paths_and_travel_to_other_processes(corpus):
    train = corpus.splits["train"]
    assert train["path"] == sorted(train["path"], key=lambda path: path.split("/"))
    there = pickle.loads(pickle.dumps(train))
    assert there[3] == train[3] and len(there) == len(train)


def test_only_new_files_are_encoded(corpus, midi, tokenizer, cache, tmp_path):
    assert corpus.report["from_cache"] == 0
    folder = shutil.copytree(midi, tmp_path / "moved")
    band(bars=4, seed=99).dump_midi(folder / "new.mid")
    done = []
    again = prepare_corpus([folder], tokenizer, cache=cache, workers=1, progress=done.append)
    assert again.report["from_cache"] == 30 and sum(done) == 33
    before, after = paths(corpus), paths(again)
    assert {path: after[path] for path in before} == before
    other = prepare_corpus([folder], PerceiverSTokenizer(), cache=cache, workers=1)
    assert other.report["from_cache"] == 0 and paths(other) == after


def test_given_splits_are_kept_and_leaks_are_said(tokenizer, cache, tmp_path):
    for index, split in enumerate(("train", "train", "validation", "test", "more")):
        (tmp_path / split).mkdir(exist_ok=True)
        band(bars=4, seed=index).dump_midi(tmp_path / split / f"{index}.mid")
    transposed(band(bars=4, seed=3), -2).dump_midi(tmp_path / "more" / "3 lower.mid")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = paths(prepare_corpus([tmp_path], tokenizer, cache=cache, workers=1))
    given = {"train/0.mid": "train", "train/1.mid": "train", "validation/2.mid": "validation", "test/3.mid": "test"}
    assert {path: splits[path] for path in given} == given
    assert splits["more/3 lower.mid"] == "test"
    transposed(band(bars=4, seed=0), 4).dump_midi(tmp_path / "validation" / "0.mid")
    with pytest.warns(UserWarning, match="1 of validation are the same music or composition as files of train"):
        corpus = prepare_corpus([tmp_path], tokenizer, cache=cache, workers=1)
    assert corpus.report["leaks"] == [{"path": "validation/0.mid", "split": "validation"}]
    assert paths(corpus)["validation/0.mid"] == "validation"


def test_metadata_choose_licences_splits_and_compositions(tokenizer, cache, tmp_path):
    rows = ["path,licence,composition,split"]
    for index in range(12):
        band(bars=4, seed=index).dump_midi(tmp_path / f"{index:02}.mid")
        rows.append(f"{index:02}.mid,{'MIT' if index % 3 else 'GPL'},work {index // 2},{'test' if index == 1 else ''}")
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("\n".join(rows[:-1]))
    prepare = {"tokenizer": tokenizer, "cache": cache, "workers": 1, "metadata": metadata}
    splits = paths(prepare_corpus([tmp_path], **prepare))
    assert len(splits) == 12 and splits["01.mid"] == splits["00.mid"] == "test"
    assert all(splits[f"{index:02}.mid"] == splits[f"{index + 1:02}.mid"] for index in range(0, 10, 2))
    corpus = prepare_corpus([tmp_path], **prepare, licences=["MIT"])
    assert sorted(paths(corpus)) == [f"{index:02}.mid" for index in range(11) if index % 3]
    assert corpus.report["licences"] == {"MIT": 7}
    with pytest.raises(ValueError, match=r"no file has a licence of BSD; there are: GPL, MIT\."):
        prepare_corpus([tmp_path], **prepare, licences=["BSD"])
    with pytest.raises(ValueError, match="give --metadata"):
        prepare_corpus([tmp_path], tokenizer, licences=["MIT"])
    metadata.write_text("path,licence\nelsewhere/0.mid,MIT\n")
    with pytest.raises(ValueError, match="names none of the files"):
        prepare_corpus([tmp_path], **prepare)


def test_several_folders_are_one_corpus(tokenizer, cache, tmp_path):
    for index, folder in enumerate(("one/songs", "two/songs", "two/songs/more")):
        (tmp_path / folder).mkdir(parents=True)
        band(bars=4, seed=index).dump_midi(tmp_path / folder / "same name.mid")
    folders = [tmp_path / "one" / "songs", tmp_path / "two" / "songs", tmp_path / "two" / "songs" / "more"]
    corpus = prepare_corpus(folders, tokenizer, cache=cache, workers=1)
    assert sorted(paths(corpus)) == [
        f"{folder}/same name.mid" for folder in ("one/songs", "two/songs/more", "two/songs")
    ]


def test_names_that_are_not_utf8_are_rows(tokenizer, cache, tmp_path):
    for index, name in enumerate((b"caf\xe9.mid", "né.mid".encode())):
        with open(bytes(tmp_path) + b"/" + name, "wb") as file:
            file.write(band(bars=4, seed=index).dumps_midi())
    assert sorted(paths(prepare_corpus([tmp_path], tokenizer, cache=cache, workers=1))) == ["caf\ufffd.mid", "né.mid"]


def test_folders_without_music_are_refused(tokenizer, cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.mid or \.midi file"):
        prepare_corpus([tmp_path], tokenizer, cache=cache)
    (tmp_path / "broken.mid").write_text("no")
    with pytest.raises(ValueError, match=r"none of the 1 files can be used; the first: broken\.mid: not a MIDI file"):
        prepare_corpus([tmp_path], tokenizer, cache=cache, workers=1)
    with pytest.raises(ValueError, match="held_out"):
        prepare_corpus([tmp_path], tokenizer, cache=cache, held_out=1)


@pytest.mark.data
@needs_data()
def test_the_development_data_have_no_leaks(cache, recwarn):
    corpus = prepare_corpus([DATA / "piano"], PerceiverSTokenizer(), cache=cache, metadata=DATA / "metadata.csv")
    assert corpus.report["skipped"] == 0 and corpus.report["leaks"] == []
    assert [len(split) for split in corpus.splits.values()] == [807, 90, 142]
