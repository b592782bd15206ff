"""What counts as the same music, and that no split leaks into another."""

import random
from collections import Counter

import numpy as np
import pytest
from conftest import DATA, band, needs_data
from symusic import Note, Score, Tempo, Track

from sage_studio.corpus.splits import deal, fingerprint, group_files, leaks, read_metadata


def played(score: Score, seed: int = 0) -> Score:
    """The score as somebody plays it: onsets off the grid by up to 40 ticks of 480."""
    rng = random.Random(seed)
    score = score.copy()
    for track in score.tracks:
        for note in track.notes:
            note.time += rng.randint(0, 40)
    return score


def changed(score: Score, change) -> Score:
    """A copy with `change(track, note)` done to every note."""
    score = score.copy()
    for track in score.tracks:
        for note in track.notes:
            change(track, note)
    return score


def transposed(score: Score, semitones: int) -> Score:
    return (
        score.shift_pitch(semitones)
        if not any(t.is_drum for t in score.tracks)
        else changed(
            score, lambda track, note: setattr(note, "pitch", note.pitch + (0 if track.is_drum else semitones))
        )
    )


def few(*notes: tuple[int, int], program: int = 0) -> Score:
    score = Score(480)
    score.tracks.append(Track(program=program))
    for time, pitch in notes:
        score.tracks[0].notes.append(Note(time, 240, pitch, 80))
    return score


def test_copies_share_a_fingerprint():
    score = band(bars=16)
    same = [
        *(transposed(score, semitones) for semitones in (-6, -1, 5)),
        *(score.resample(resolution, 1) for resolution in (96, 220, 960)),
        score.shift_time(1920),
        changed(score, lambda track, note: setattr(note, "velocity", 64)),
        changed(score, lambda track, note: setattr(note, "duration", 60)),
        changed(score, lambda track, note: setattr(track, "program", 5)),
    ]
    other_tempo = score.copy()
    other_tempo.tempos = type(score.tempos)([Tempo(0, 77)])
    backwards = score.copy()
    backwards.tracks = type(score.tracks)(list(score.tracks)[::-1])
    assert {fingerprint(copy) for copy in (*same, other_tempo, backwards)} == {fingerprint(score)}


def test_a_performance_saved_in_another_resolution_keeps_its_fingerprint():
    """Where rounded onsets would not: each of these has some note between two grid points."""
    kept = Counter()
    for seed in range(40):
        score = played(band(bars=16, seed=seed), seed)
        for resolution in (960, 384, 220):
            kept[resolution] += fingerprint(score.resample(resolution, 1)) == fingerprint(score)
    assert kept[960] == 40 and kept[384] >= 37 and kept[220] >= 37


def test_other_music_has_another_fingerprint():
    score = band(bars=8)
    drums_moved = changed(score, lambda track, note: setattr(note, "pitch", note.pitch + track.is_drum))
    one_more, later = score.copy(), score.copy()
    one_more.tracks[0].notes.append(Note(0, 120, 61, 80))
    later.tracks[0].notes = type(later.tracks[0].notes)(
        [Note(n.time + 480, n.duration, n.pitch, n.velocity) for n in later.tracks[0].notes]
    )
    scores = [drums_moved, one_more, later, *(band(bars=8, seed=seed) for seed in range(200))]
    assert len({fingerprint(one) for one in scores}) == len(scores)
    # The same notes in another order of time.
    rng = np.random.default_rng(0)
    shuffled = [few(*zip(range(0, 32 * 240, 240), rng.permutation(32) % 8 + 60, strict=True)) for _ in range(200)]
    assert len({fingerprint(one) for one in shuffled}) == 200


def test_short_pieces_are_told_by_their_whole_content():
    one = few((0, 60), (480, 64), (960, 67))
    assert fingerprint(one) == fingerprint(few((0, 60), (480, 64), (960, 67)).resample(96, 1))
    others = [few((0, 62), (480, 66), (960, 69)), few((0, 60), (480, 64), (990, 67)), few((0, 60), (480, 64))]
    others += [few((0, 60), (480, 64), (960, 67), program=40), Score(480)]
    assert len({fingerprint(score) for score in (one, *others)}) == 6


@pytest.mark.data
@needs_data()
def test_no_two_compositions_of_the_development_data_share_a_fingerprint():
    facts = read_metadata(DATA / "metadata.csv")
    paths = sorted(facts)[::4]
    names = [fingerprint(Score(path)) for path in paths]
    groups = group_files(names, [""] * len(names))
    compositions = {}
    for group, path in zip(groups, paths, strict=True):
        assert compositions.setdefault(group, facts[path].composition) == facts[path].composition, path


def test_groups_join_by_music_and_by_composition():
    music = ["a", "b", "b", "c", "d", "e", "f"]
    works = ["", "one", "", "one", "two", "two", "three"]
    groups = group_files(music, works)
    assert groups[1] == groups[2] == groups[3] and groups[4] == groups[5]
    assert len(set(groups)) == 4
    # A file that is both `two` and music `c` joins `one` and `two`; the others stay what they were.
    joined = group_files([*music, "c"], [*works, "two"])
    assert len({*joined[1:6], joined[7]}) == 1 and [joined[0], joined[6]] == [groups[0], groups[6]]


def test_added_files_move_no_other_group():
    groups = group_files([f"music {index // 2}" for index in range(4000)], [""] * 4000)
    before = deal(groups[:3000], [""] * 3000)
    after = deal(groups, [""] * 4000)
    assert after[:3000] == before
    share = after.count("validation") / 4000
    assert 0.08 < share < 0.12
    assert all(len({after[index], after[index + 1]}) == 1 for index in range(0, 4000, 2))
    assert deal(groups, [""] * 4000, seed=1) != after


@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_small_folders_have_both_splits(count):
    for start in range(60):
        groups = group_files([f"{start} {index}" for index in range(count)], [""] * count)
        assert {"train", "validation"} == set(deal(groups, [""] * count))
        assert set(deal(groups, [""] * count, held_out=0.95)) == {"train", "validation"}


def test_a_group_of_most_files_is_trained_on():
    for start in range(60):
        groups = group_files([str(start)] * 50 + [f"{start} {index}" for index in range(4)], [""] * 54)
        splits = deal(groups, [""] * 54)
        assert set(splits[:50]) == {"train"} and "validation" in splits


def test_one_piece_alone_cannot_be_split():
    with pytest.raises(ValueError, match=r"all 3 files are copies .* folder named validation"):
        deal(["a"] * 3, [""] * 3)
    assert deal(["a"] * 3, [""] * 3, held_out=0) == ["train"] * 3
    with pytest.raises(ValueError, match=r"held_out .* not 1\.5"):
        deal(["a", "b"], ["", ""], held_out=1.5)


def test_given_splits_are_kept_and_files_beside_them_follow_their_group():
    groups = ["a", "b", "b", "a", "c", "c"]
    given = ["train", "test", "", "", "train", "validation"]
    splits = deal(groups, given)
    assert splits == ["train", "test", "test", "train", "train", "validation"]
    assert leaks(groups, splits) == [5]
    assert leaks(groups[:4], splits[:4]) == []


def test_metadata_are_read_and_wrong_ones_refused(tmp_path):
    table = tmp_path / "metadata.csv"
    table.write_text("path,licence,composition_key,split\nmidi/a.mid,MIT,opus 1,test\nmidi/../b.mid,,,\n")
    facts = read_metadata(table)
    assert facts[str((tmp_path / "midi" / "a.mid").resolve())] == ("MIT", "opus 1", "test")
    assert facts[str((tmp_path / "b.mid").resolve())] == ("", "", "")
    table.write_text("file,licence\na.mid,MIT\n")
    with pytest.raises(ValueError, match="no column 'path'"):
        read_metadata(table)
    table.write_text("path,split\na.mid,dev\n")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2: split 'dev'"):
        read_metadata(table)
    with pytest.raises(ValueError, match=r"none\.csv: cannot be read"):
        read_metadata(tmp_path / "none.csv")
