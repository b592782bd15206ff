"""Every MIDI file of a folder and nothing else; seeds by name; journals outlast a kill and refuse other settings."""

import pytest

from sage_studio.files import Journal, midi_files, seed_of


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


def test_a_journal_is_of_all_processes_and_passes_over_what_a_kill_cut_off(tmp_path):
    one, two = (Journal(tmp_path, {"seed": 0}, lines=f"done/{rank}.jsonl") for rank in (0, 1))
    one.add({"piece": "a", "n": 1})
    two.add({"piece": "b"})
    with one.lines.open("ab") as file:
        file.write(b'{"piece": "c", "n"')
    assert list(one.records()) == [{"piece": "a", "n": 1}, {"piece": "b"}]
    one.add({"piece": "a", "n": 2})
    assert list(Journal(tmp_path, {"seed": 0}, lines="done/0.jsonl").records()) == [
        *({"piece": "a", "n": n} for n in (1, 2)),
        {"piece": "b"},
    ]


def test_a_journal_of_other_settings_is_not_gone_on_with(tmp_path):
    Journal(tmp_path, {"bars": (4, 8), "seed": 0})
    Journal(tmp_path, {"bars": (4, 8), "seed": 0})
    with pytest.raises(ValueError, match=r"seed 0 \(now None\), split None \(now test\)"):
        Journal(tmp_path, {"bars": [4, 8], "split": "test"})
    (tmp_path / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"settings\.json: does not hold the settings"):
        Journal(tmp_path, {})
