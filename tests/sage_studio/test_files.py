"""Folders to files and splits: every MIDI file and nothing else, splits are stable, licences filter."""

import pytest

from sage_studio.files import midi_files, split_files


def test_midi_files_are_found_wherever_they_are(tmp_path):
    (tmp_path / "a" / "b.mid").mkdir(parents=True)  # a folder, whatever its name
    for name in ("z.MID", "a/y.midi", "a/b.mid/x.mid", "a/notes.txt", "a/mid"):
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in midi_files(tmp_path)]
    assert found == ["a/b.mid/x.mid", "a/y.midi", "z.MID"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no \.mid"):
        midi_files(tmp_path / "empty")


def test_a_folder_without_splits_is_split_by_name(tmp_path):
    for index in range(60):
        (tmp_path / f"{index}.mid").write_bytes(b"")
    splits = split_files([str(tmp_path)], None, None)
    assert len(splits["train"]) + len(splits["validation"]) == 60 and not splits["test"]
    assert 1 <= len(splits["validation"]) <= 15
    assert splits == split_files([str(tmp_path)], None, None)


def test_licences_filter_files(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("a", "b"):
        (tmp_path / "train" / f"{name}.mid").write_bytes(b"")
    (tmp_path / "metadata.csv").write_text("path,licence\ntrain/a.mid,MIT\ntrain/b.mid,GPL-3.0\n")
    splits = split_files([str(tmp_path)], str(tmp_path / "metadata.csv"), ["MIT"])
    assert [path.name for path in splits["train"]] == ["a.mid"]
