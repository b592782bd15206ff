"""Folders to splits and ids: unreadable files are said, splits are stable, licences filter."""

import pytest
from conftest import band

from notekit.corpus import encode_files, midi_files, split_files
from sage_music import SageMusicTokenizer


def test_unreadable_files_are_left_out_and_said(tokenizer, tmp_path):
    band(bars=1).dump_midi(tmp_path / "good.mid")
    (tmp_path / "bad.MID").write_bytes(b"no")
    files = midi_files(tmp_path)
    assert [f.name for f in files] == ["bad.MID", "good.mid"]
    with pytest.warns(UserWarning, match=r"bad\.MID"):
        assert len(encode_files(files, tokenizer)) == 1


def test_kept_tokens_are_those_of_the_files_and_the_tokenizer(tokenizer, tmp_path):
    files = [tmp_path / f"{seed}.mid" for seed in range(3)]
    for seed, path in enumerate(files):
        band(bars=1 + seed, seed=seed).dump_midi(path)
    fresh = encode_files(files, tokenizer)
    first, again = (encode_files(files, tokenizer, tmp_path / "cache") for _ in range(2))
    for pieces in (first, again):
        assert [piece.tolist() for piece in pieces] == [piece.tolist() for piece in fresh]
    (kept,) = (tmp_path / "cache").iterdir()
    written = kept.stat().st_mtime_ns
    encode_files(files, tokenizer, tmp_path / "cache")
    assert kept.stat().st_mtime_ns == written
    band(bars=1, seed=9).dump_midi(files[0])  # other contents, another entry
    assert encode_files(files, tokenizer, tmp_path / "cache")[0].tolist() != fresh[0].tolist()
    coarse = SageMusicTokenizer(beat_resolution=4)
    assert (
        encode_files(files[1:], coarse, tmp_path / "cache")[0].tolist() == encode_files(files[1:], coarse)[0].tolist()
    )
    assert len(list((tmp_path / "cache").iterdir())) == 3


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
