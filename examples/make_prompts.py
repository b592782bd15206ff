"""Write the example prompts of `sage_studio.example`: public-domain tunes, arranged here for a few instruments.

    python examples/make_prompts.py

Melodies are written as `NOTE:BEATS` (a beat is a quarter note; `-` is a rest), harmony as one chord symbol a half bar.
"""

import sys
from pathlib import Path

from symusic import Note, Score, Tempo, TimeSignature, Track

TPQ = 480
STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
FOLDER = Path(__file__).resolve().parents[1] / "src" / "sage_studio" / "examples"

# Beethoven, Symphony No. 9 (1824)
ODE_TO_JOY = """
F#5:1 F#5:1 G5:1 A5:1 | A5:1 G5:1 F#5:1 E5:1 | D5:1 D5:1 E5:1 F#5:1 | F#5:1.5 E5:0.5 E5:2
F#5:1 F#5:1 G5:1 A5:1 | A5:1 G5:1 F#5:1 E5:1 | D5:1 D5:1 E5:1 F#5:1 | E5:1.5 D5:0.5 D5:2
"""
ODE_HARMONY = "D D | A D | G D | D A | D D | A D | G D | A D"

# English, 16th century
GREENSLEEVES = """
A4:0.5 | C5:1 D5:0.5 E5:0.75 F5:0.25 E5:0.5 | D5:1 B4:0.5 G4:0.75 A4:0.25 B4:0.5 | C5:1 A4:0.5 A4:0.75 G#4:0.25 A4:0.5
B4:1 G#4:0.5 E4:1 A4:0.5 | C5:1 D5:0.5 E5:0.75 F5:0.25 E5:0.5 | D5:1 B4:0.5 G4:0.75 A4:0.25 B4:0.5
C5:0.75 B4:0.25 A4:0.5 G#4:0.75 F#4:0.25 G#4:0.5 | A4:1.5 A4:1.5
"""
GREENSLEEVES_HARMONY = "Am Am | G G | Am Am | E E | Am Am | G G | Am E | Am Am"

# American spiritual, 19th century
SAINTS = """
-:1 C5:1 E5:1 F5:1 | G5:4 | -:1 C5:1 E5:1 F5:1 | G5:4 | -:1 C5:1 E5:1 F5:1 | G5:2 E5:2 | C5:2 E5:2 | D5:4
"""
SAINTS_HARMONY = "C C | C C | C C | C C | C C | C C | C C | G G"


def pitch(name: str) -> int:
    """MIDI number of a note name such as `F#5` (C4 is 60)."""
    return 12 * (int(name[-1]) + 1) + STEPS[name[0]] + name.count("#")


def melody(text: str, velocity: int, start: float = 0.0) -> list[Note]:
    notes, beat = [], start
    for item in text.replace("|", " ").split():
        name, beats = item.split(":")
        if name != "-":
            accent = 8 if beat % 2 == 0 else 0
            notes.append(Note(int(beat * TPQ), int(float(beats) * TPQ * 0.95), pitch(name), velocity + accent))
        beat += float(beats)
    return notes


def chords(text: str) -> list[tuple[int, list[int]]]:
    """Root (pitch class) and pitch classes of each half bar's triad."""
    found = []
    for symbol in text.replace("|", " ").split():
        root = (STEPS[symbol[0]] + symbol.count("#")) % 12
        found.append((root, [root, (root + (3 if symbol.endswith("m") else 4)) % 12, (root + 7) % 12]))
    return found


def pad(text: str, half_bar: float, velocity: int) -> list[Note]:
    return [
        Note(int(i * half_bar * TPQ), int(half_bar * TPQ * 0.97), 48 + pc if pc > 6 else 60 + pc, velocity)
        for i, (_, pcs) in enumerate(chords(text))
        for pc in pcs
    ]


def arpeggio(text: str, half_bar: float, velocity: int) -> list[Note]:
    step = half_bar / 3
    return [
        Note(int((i * half_bar + j * step) * TPQ), int(step * TPQ), 48 + pcs[j % 3] + 12 * (j == 2), velocity - 4 * j)
        for i, (_, pcs) in enumerate(chords(text))
        for j in range(3)
    ]


def bass(text: str, half_bar: float, velocity: int) -> list[Note]:
    return [
        Note(int(i * half_bar * TPQ), int(half_bar * TPQ * 0.9), 36 + root if root < 8 else 24 + root, velocity)
        for i, (root, _) in enumerate(chords(text))
    ]


def drums(bars: int) -> list[Note]:
    """Kick on one and three, snare on two and four, closed hi-hat in eighths."""
    hits = []
    for eighth in range(bars * 8):
        time = eighth * TPQ // 2
        hits.append(Note(time, TPQ // 4, 42, 72 if eighth % 2 == 0 else 52))
        if eighth % 2 == 0:
            hits.append(Note(time, TPQ // 4, 36 if eighth % 4 == 0 else 38, 92))
    return hits


def score(qpm: float, meter: tuple[int, int], tracks: list[tuple[str, int, list[Note]]]) -> Score:
    music = Score(TPQ)
    music.tempos.append(Tempo(0, qpm))
    music.time_signatures.append(TimeSignature(0, *meter))
    for name, program, notes in tracks:
        track = Track(name=name, program=max(program, 0), is_drum=program < 0)
        track.notes.extend(notes)
        music.tracks.append(track)
    return music


def main() -> int:
    pieces = {
        "ode_to_joy": score(
            116,
            (4, 4),
            [
                ("Violin", 40, melody(ODE_TO_JOY, 84)),
                ("Piano", 0, pad(ODE_HARMONY, 2, 62)),
                ("Bass", 33, bass(ODE_HARMONY, 2, 78)),
                ("Drums", -1, drums(8)),
            ],
        ),
        "greensleeves": score(
            66,
            (6, 8),
            [
                ("Flute", 73, melody(GREENSLEEVES, 80, start=2.5)),
                ("Guitar", 24, arpeggio("Am Am | " + GREENSLEEVES_HARMONY, 1.5, 66)),
                ("Cello", 42, bass("Am Am | " + GREENSLEEVES_HARMONY, 1.5, 68)),
            ],
        ),
        "saints": score(
            168,
            (4, 4),
            [
                ("Trumpet", 56, melody(SAINTS, 92)),
                ("Piano", 0, pad(SAINTS_HARMONY, 2, 68)),
                ("Tuba", 58, bass(SAINTS_HARMONY, 2, 84)),
                ("Drums", -1, drums(8)),
            ],
        ),
    }
    for name, music in pieces.items():
        music.dump_midi(FOLDER / f"{name}.mid")
        print(f"{name}.mid: {music.note_num()} notes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
