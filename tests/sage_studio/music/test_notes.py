import numpy as np
import pytest

from sage_studio.music.notes import INSTRUMENTS, end_s, instrument_name, note_array


def test_notes_are_sorted_by_onset_track_pitch():
    notes = note_array([(1.0, 1, 60, 80, 0, 1), (0.5, 1, 64, 80, 0, 0), (1.0, 1, 72, 80, 0, 0), (1.0, 1, 50, 80, 0, 1)])
    assert notes["pitch"].tolist() == [64, 72, 50, 60]
    assert end_s(notes) == 2.0


def test_no_notes_are_an_array_too():
    assert len(note_array()) == 0 and end_s(note_array()) == 0.0


@pytest.mark.parametrize(
    ("note", "field"),
    [
        ((0, 1, 128, 80, 0, 0), "pitch"),
        ((0, 1, 60, 0, 0, 0), "velocity"),
        ((-1, 1, 60, 80, 0, 0), "onset_s"),
        ((0, np.nan, 60, 80, 0, 0), "duration_s"),
        ((0, 1, 60, 80, -2, 0), "program"),
    ],
)
def test_a_field_out_of_range_is_named(note, field):
    with pytest.raises(ValueError, match=f"note 0: {field}"):
        note_array([note])


def test_general_midi_names():
    assert len(INSTRUMENTS) == 128
    assert [instrument_name(p) for p in (-1, 0, 40, 73)] == ["Drums", "Acoustic Grand Piano", "Violin", "Flute"]
