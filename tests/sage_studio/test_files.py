"""Every MIDI file of a folder and nothing else; seeds by name."""

import pytest

from sage_studio.files import midi_files, seed_of


def test_midi_files_are_found_wherever_they_are(tmp_path):
    (tmp_path / "a" / "b.mid").mkdir(parents=True)  # a folder, whatever its name
    for name in ("z.MID", "a/y.midi", "a/b.mid/x.mid", "a/notes.txt", "a/mid"):
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in midi_files(tmp_path)]
    assert found == ["a/b.mid/x.mid", "a/y.midi", "z.MID"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no \.mid"):
        midi_files(tmp_path / "empty")


def test_a_seed_is_that_of_the_names_alone():
    found = [seed_of(0, "a"), seed_of(0, "a", "b"), seed_of(0, "b"), seed_of(1, "a"), seed_of(0, "\udcff.mid")]
    assert len(set(found)) == len(found) and all(0 <= seed < 2**32 for seed in found)
    assert seed_of(0, "a") == found[0]
