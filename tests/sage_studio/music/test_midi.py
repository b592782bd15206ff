"""Reading MIDI from strangers, writing it whole."""

import os
import struct
import subprocess
import sys

import mido
import numpy as np
import pytest
from conftest import band, notes_of

from perceivers import PerceiverSTokenizer
from sage_studio.errors import InvalidMidiError
from sage_studio.files import write_atomic
from sage_studio.music.midi import (
    bar_ticks,
    bar_times,
    midi_damage,
    notes_from_score,
    read_notes,
    read_score,
    score_from_notes,
    tick_to_seconds,
    write_midi,
)
from sage_studio.music.notes import note_array


def midi_file(track: bytes, division: int = 96, tracks: int = 1) -> bytes:
    header = b"MThd" + struct.pack(">IHHH", 6, 1, tracks, division)
    return header + (b"MTrk" + struct.pack(">I", len(track)) + track) * tracks


END = b"\0\xff\x2f\0"
NOTE = b"\0\x90\x3c\x40\x60\x80\x3c\0"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"RIFF....WAVEfmt " * 4, "not a MIDI file"),
        (midi_file(NOTE + END)[:30], "truncated"),
        (midi_file(NOTE + END, division=0xE728), "SMPTE"),
        (midi_file(NOTE + END, division=0), "0 ticks"),
        (midi_file(END), "no notes"),
        (midi_file(b"\xff\xff\xff\x7f" + NOTE[1:] + END, division=4), "longer than"),
        (midi_file((b"\xff\xff\xff\x7f" + NOTE[1:]) * 9 + END, division=4), "longer than"),
        (midi_file(b"\0\x9f\xbc\x40\0\x8f\xbc\0" + NOTE + END), "values that no MIDI file has"),
        (midi_file(b"\0\x3c\x40" + NOTE + END), "of a kind"),
        (midi_file(NOTE + b"\0\xf7\1\0" + END), "escape event"),
        (midi_file(NOTE + b"\0\xff\1\x50" + END), "inside an event"),
        (midi_file(NOTE + b"\0\x90\x3c"), "inside an event|values"),
        (midi_file(b"\0\xff\x58\4\4\x1f\x18\x08" + NOTE + END), "meter"),
        (midi_file(b"\0\xff\x58\4\0\2\x18\x08" + NOTE + END), "meter"),
    ],
    ids=[
        *("empty", "wav", "truncated", "smpte", "no-division", "no-notes", "endless", "overflow"),
        *("note-188", "no-status", "escape", "long-text", "cut-event", "meter-of-2-to-31", "meter-of-0"),
    ],
)
def test_what_cannot_be_read_says_why_and_where(tmp_path, data, reason):
    path = tmp_path / "strange.mid"
    path.write_bytes(data)
    with pytest.raises(InvalidMidiError, match=reason) as caught:
        read_score(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InvalidMidiError, match=reason):
        read_score(data)


@pytest.mark.parametrize("data", [midi_file(NOTE + END, division=0xE728), b"RIFF", midi_file(NOTE)[:-1]])
def test_every_reader_refuses_in_the_same_words(tokenizer, data):
    said = set()
    for read in (read_score, tokenizer.midi_to_ids, PerceiverSTokenizer().midi_to_ids):
        with pytest.raises(ValueError, match="<bytes>") as caught:
            read(data)
        said.add(str(caught.value))
    assert len(said) == 1


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.mid", tmp_path):
        with pytest.raises(InvalidMidiError, match="cannot be opened"):
            read_score(path)


@pytest.mark.parametrize("path", ["", "a\0b.mid", "\ud800.mid"], ids=ascii)
def test_what_is_no_file_name_is_shown(path):
    with pytest.raises(InvalidMidiError, match="cannot be opened") as caught:
        read_score(path)
    assert str(caught.value).startswith(f"{path!r}: ")


def test_every_truncation_of_a_file_is_refused(tokenizer):
    """At every byte: readers that stop quietly would return the first notes as if they were all."""
    data = band(bars=1).dumps_midi()
    for length in range(len(data)):
        with pytest.raises(InvalidMidiError):
            read_score(data[:length])
        with pytest.raises(ValueError, match="<bytes>"):
            tokenizer.midi_to_ids(data[:length])
    assert len(read_notes(data + b"trailing bytes")) == len(read_notes(data))


def test_statuses_that_go_on():
    """An event may leave out the status of the one before it, also after an event that is no channel's."""
    text = b"\0\xff\1\2hi"
    events = b"\0\x90\x3c\x40\x60\x3c\0" + text + b"\0\x40\x40\x60\x40\0\0\xc0\5" + text + b"\0\6"
    assert midi_damage(midi_file(events + END)) == ""
    assert read_notes(midi_file(b"\0\x90\x3c\x40\x60\x3c\0" + END))["pitch"].tolist() == [60]


MUTATIONS = """
import sys
import numpy as np
from sage_studio.music.midi import InvalidMidiError, midi_damage, read_score
data, rng, kept = open(sys.argv[1], "rb").read(), np.random.default_rng(0), 0
for _ in range(2000):
    broken = bytearray(data)
    for at in rng.integers(14, len(data), rng.integers(1, 6)):
        broken[at] = rng.integers(256)
    try:
        read_score(bytes(broken))
        kept += 1
    except InvalidMidiError:
        pass
print(kept)
"""


def test_no_broken_file_crashes_the_reader(tmp_path):
    """Of some the reader in C++ would write beyond its tables."""
    path = tmp_path / "band.mid"
    path.write_bytes(band(bars=2).dumps_midi())
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", MUTATIONS, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    assert 0 < int(run.stdout) < 2000


def test_a_tempo_of_zero_is_said_and_left_out():
    data = midi_file(b"\0\xff\x51\x03\0\0\0" + NOTE + END)
    with pytest.warns(UserWarning, match="tempo of 0"):
        notes = read_notes(data)
    assert notes["duration_s"].tolist() == [0.5]


def test_of_several_tempos_at_once_the_files_last_one_holds():
    slow, fast = b"\0\xff\x51\x03\x0f\x42\x40", b"\0\xff\x51\x03\x03\xd0\x90"  # 1 s and 0.25 s a quarter note
    for tempos, quarter in ((slow + fast, 0.25), (fast + slow, 1.0)):
        score = read_score(midi_file(tempos + NOTE + END))
        times = tick_to_seconds(score, np.array([score.ticks_per_quarter]))
        assert times == pytest.approx(notes_from_score(score)["duration_s"]) == [quarter]


def test_three_hundred_tracks():
    assert len(read_notes(midi_file(NOTE + END, tracks=300))) == 300


def test_notes_agree_with_another_reader(tmp_path):
    """Onsets in seconds under tempo changes, against mido."""
    score = band(bars=4)
    from symusic import Tempo

    score.tempos.append(Tempo(2 * 1920, 60))
    path = write_midi(tmp_path / "a.mid", score)
    expected, now = [], 0.0
    for message in mido.MidiFile(path):
        now += message.time
        if message.type == "note_on" and message.velocity:
            expected.append((round(now, 3), message.note, message.velocity))
    notes = read_notes(path)
    got = [(round(float(n["onset_s"]), 3), int(n["pitch"]), int(n["velocity"])) for n in notes]
    assert sorted(got) == sorted(expected)


def test_notes_to_score_and_back():
    notes = note_array([(0.0, 0.5, 60, 100, 0, 0), (0.25, 1.0, 36, 90, -1, 1), (2.0, 0.125, 43, 80, 33, 2)])
    again = notes_from_score(score_from_notes(notes, qpm=97))
    for name in ("pitch", "velocity", "program"):
        assert again[name].tolist() == notes[name].tolist()
    for name in ("onset_s", "duration_s"):
        np.testing.assert_allclose(again[name], notes[name], atol=0.002)


def test_bar_lines_follow_meter_and_tempo_changes():
    from symusic import Note, Score, Tempo, TimeSignature, Track

    score = Score(480)
    score.time_signatures.append(TimeSignature(0, 3, 4))
    score.time_signatures.append(TimeSignature(2880, 6, 8))
    score.tempos.append(Tempo(0, 120))
    score.tempos.append(Tempo(1440, 60))
    score.tracks.append(Track())
    score.tracks[0].notes.append(Note(0, 4320, 60, 80))
    assert bar_ticks(score).tolist() == [0, 1440, 2880]
    assert bar_ticks(score, at_least=5).tolist() == [0, 1440, 2880, 4320, 5760]
    np.testing.assert_allclose(bar_times(score), [0, 1.5, 4.5])
    np.testing.assert_allclose(tick_to_seconds(score, np.array([720, 1920])), [0.75, 2.5])


def test_notes_on_a_bar_line_are_not_before_it():
    """An hour of tempo changes: the same seconds for notes and for bar lines."""
    from symusic import Note, Score, Tempo, TimeSignature, Track

    score = Score(480)
    score.time_signatures.append(TimeSignature(0, 7, 8))
    for index in range(3000):
        score.tempos.append(Tempo(240 * index, 97.3 + index % 7))
    lines = np.arange(1200) * 1680
    score.tracks.append(Track())
    score.tracks[0].notes.extend([Note(int(tick), 1680, 60, 80) for tick in lines])
    notes, bars = notes_from_score(score), bar_times(score, at_least=1201)
    assert bars[1200] > 2000
    np.testing.assert_array_equal(notes["onset_s"], bars[:1200])
    np.testing.assert_allclose(notes["onset_s"] + notes["duration_s"], bars[1:1201], rtol=1e-12)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.mid"
    write_midi(path, band())
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"half")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.mid"]


def test_many_programs_survive_the_sixteen_channels(tmp_path):
    from symusic import Note, Score, Track

    score = Score(480)
    for program in range(40):
        score.tracks.append(Track(program=program))
        score.tracks[-1].notes.append(Note(0, 480, 60, 80))
    assert notes_of(read_score(write_midi(tmp_path / "a.mid", score))) == notes_of(score)
