"""The note array: the one data structure that couples everything outside the models.

A structured numpy array, one element a note, sorted by onset, then track, then pitch:

| field | type | unit |
|---|---|---|
| `onset_s`, `duration_s` | float64 | seconds from the start |
| `pitch` | int16 | MIDI note number, 0-127 |
| `velocity` | int16 | 1-127 |
| `program` | int16 | General MIDI program 0-127; drums are -1 |
| `track` | int16 | index of the track the note came from |
"""

from collections.abc import Iterable

import numpy as np

NOTE_DTYPE = np.dtype(
    [
        ("onset_s", np.float64),
        ("duration_s", np.float64),
        ("pitch", np.int16),
        ("velocity", np.int16),
        ("program", np.int16),
        ("track", np.int16),
    ]
)

# General MIDI Level 1 sound set, by program number.
INSTRUMENTS = (
    """
Acoustic Grand Piano; Bright Acoustic Piano; Electric Grand Piano; Honky-tonk Piano; Electric Piano 1; Electric
Piano 2; Harpsichord; Clavi; Celesta; Glockenspiel; Music Box; Vibraphone; Marimba; Xylophone; Tubular Bells;
Dulcimer; Drawbar Organ; Percussive Organ; Rock Organ; Church Organ; Reed Organ; Accordion; Harmonica; Tango
Accordion; Acoustic Guitar (nylon); Acoustic Guitar (steel); Electric Guitar (jazz); Electric Guitar (clean);
Electric Guitar (muted); Overdriven Guitar; Distortion Guitar; Guitar Harmonics; Acoustic Bass; Electric Bass
(finger); Electric Bass (pick); Fretless Bass; Slap Bass 1; Slap Bass 2; Synth Bass 1; Synth Bass 2; Violin; Viola;
Cello; Contrabass; Tremolo Strings; Pizzicato Strings; Orchestral Harp; Timpani; String Ensembles 1; String
Ensembles 2; SynthStrings 1; SynthStrings 2; Choir Aahs; Voice Oohs; Synth Voice; Orchestra Hit; Trumpet; Trombone;
Tuba; Muted Trumpet; French Horn; Brass Section; Synth Brass 1; Synth Brass 2; Soprano Sax; Alto Sax; Tenor Sax;
Baritone Sax; Oboe; English Horn; Bassoon; Clarinet; Piccolo; Flute; Recorder; Pan Flute; Blown Bottle; Shakuhachi;
Whistle; Ocarina; Lead 1 (square); Lead 2 (sawtooth); Lead 3 (calliope); Lead 4 (chiff); Lead 5 (charang); Lead 6
(voice); Lead 7 (fifths); Lead 8 (bass + lead); Pad 1 (new age); Pad 2 (warm); Pad 3 (polysynth); Pad 4 (choir); Pad
5 (bowed); Pad 6 (metallic); Pad 7 (halo); Pad 8 (sweep); FX 1 (rain); FX 2 (soundtrack); FX 3 (crystal); FX 4
(atmosphere); FX 5 (brightness); FX 6 (goblins); FX 7 (echoes); FX 8 (sci-fi); Sitar; Banjo; Shamisen; Koto;
Kalimba; Bag pipe; Fiddle; Shanai; Tinkle Bell; Agogo; Steel Drums; Woodblock; Taiko Drum; Melodic Tom; Synth Drum;
Reverse Cymbal; Guitar Fret Noise, Guitar Cutting Noise; Breath Noise, Flute Key Click; Seashore, Rain, Thunder,
Wind, Stream, Bubbles; Bird Tweet, Dog, Horse Gallop; Telephone Ring, Door Creaking, Door, Scratch, Wind Chime;
Helicopter, Car Sounds; Applause, Laughing, Screaming, Punch, Heart Beat, Footstep; Gunshot, Machine Gun, Lasergun,
Explosion
""".replace("\n", " ")
    .strip()
    .split("; ")
)


def instrument_name(program: int) -> str:
    """General MIDI name of a program; -1 is "Drums"."""
    return "Drums" if program < 0 else INSTRUMENTS[program]


def note_array(notes: Iterable[tuple] = ()) -> np.ndarray:
    """A sorted, checked note array from tuples `(onset_s, duration_s, pitch, velocity, program, track)`.

    Raises:
        ValueError: a field outside its range; the message names the first such note.
    """
    return check_notes(np.array(list(notes), dtype=NOTE_DTYPE))


def check_notes(notes: np.ndarray) -> np.ndarray:
    """`notes` sorted, after checking every field's range; raises as `note_array`."""
    ranges = {"onset_s": (0, np.inf), "duration_s": (0, np.inf), "pitch": (0, 127), "velocity": (1, 127)}
    ranges["program"] = (-1, 127)
    for name, (low, high) in ranges.items():
        values = notes[name]
        wrong = ~((values >= low) & (values <= high) & np.isfinite(values))
        if wrong.any():
            index = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"note {index}: {name} is {values[index]}, outside {low}..{high}.")
    return notes[np.lexsort((notes["pitch"], notes["track"], notes["onset_s"]))]


def end_s(notes: np.ndarray) -> float:
    """Time in seconds at which the last note ends; 0 for no notes."""
    return float((notes["onset_s"] + notes["duration_s"]).max()) if len(notes) else 0.0
