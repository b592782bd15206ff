"""Folders to splits and ids: unreadable files are said, splits are stable, licences filter."""

import pytest
from conftest import band

from notekit.corpus import encode_files, midi_files, split_files


def test_unreadable_files_are_left_out_and_said(tokenizer, tmp_path):
    band(bars=1).dump_midi(tmp_path / "good.mid")
    (tmp_path / "bad.MID").write_bytes(b"no")
    files = midi_files(tmp_path)
    assert [f.name for f in files] == ["bad.MID", "good.mid"]
    with pytest.warns(UserWarning, match=r"bad\.MID"):
        assert len(encode_files(files, tokenizer)) == 1


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
