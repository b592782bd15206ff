"""A piano roll as HTML: prompt and new music told apart, a colour and a legend entry for each instrument, drums below.

Notes lie in an SVG that stretches to the page's width; everything with letters is HTML over it, so that no text is
distorted. Colours are CSS classes (`style.css` has those for light and for dark pages); how thick a note is shows its
velocity, which keeps every note's contrast.
"""

from dataclasses import dataclass
from html import escape

import numpy as np

from sage_studio.music.notes import instrument_name

COLOURS = 9  # classes i0, i1, ... in style.css; drums have their own
LEAST_PITCHES = 24  # rows: two octaves at least, so that a single line of melody is not blown up
DRUM_LANE, GAP = 0.24, 0.03  # shares of the height: what drums take below the other instruments
HEIGHT = 1000.0  # of the SVG's coordinates, which have no proportion to pixels


@dataclass(frozen=True)
class Roll:
    """What there is to see.

    Attributes:
        notes: note array (`sage_studio.music.notes`) of the prompt and of what has been written so far.
        prompt_end_s: where the new music begins, seconds.
        end_s: where the new music is going to end, seconds.
        lines_s: bar lines, or every so many seconds.
        labels: one text a line, empty where there is to be none.
        caption: what is said below the roll.
    """

    notes: np.ndarray
    prompt_end_s: float
    end_s: float
    lines_s: list[float]
    labels: list[str]
    caption: str


def draw(roll: Roll) -> str:
    """The roll's HTML; `data-notes` holds the number of notes, `data-seconds` the time that the width stands for."""
    notes = roll.notes
    total = max(roll.end_s, float((notes["onset_s"] + notes["duration_s"]).max(initial=0.0)), 1.0)
    programs = sorted(set(notes["program"].tolist()), key=lambda program: (program < 0, program))
    colours = {program: "drums" if program < 0 else f"i{index % COLOURS}" for index, program in enumerate(programs)}
    pitched, drums = notes[notes["program"] >= 0], notes[notes["program"] < 0]
    split = 1.0 if not len(drums) else 0.0 if not len(pitched) else 1 - DRUM_LANE
    rows = _Rows(pitched["pitch"], 0.0, split - (GAP if 0 < split < 1 else 0.0), LEAST_PITCHES)
    hits = _Rows(drums["pitch"], split, 1.0, 12)

    shapes = [f'<rect class="heard" width="{_x(roll.prompt_end_s, total)}" height="{HEIGHT:g}"/>']
    for second, label in zip(roll.lines_s, roll.labels, strict=True):
        shapes.append(_line("major" if label else "minor", _x(second, total)))
    for pitch, y in rows.octaves():
        shapes.append(f'<path class="octave" d="M0 {y:.1f}H1000"/><!-- C{pitch // 12 - 1} -->')
    if 0 < split < 1:
        shapes.append(f'<path class="lane" d="M0 {HEIGHT * (split - GAP / 2):.1f}H1000"/>')
    for program in programs:
        chosen = notes[notes["program"] == program]
        boxes = "".join((rows if program >= 0 else hits).box(note, total) for note in chosen)
        shapes.append(f'<path class="{colours[program]}" d="{boxes}"/>')
    shapes.append(_line("edge", _x(roll.prompt_end_s, total)))

    texts = [
        f'<span class="at" style="left:{100 * second / total:.2f}%">{escape(label)}</span>'
        for second, label in zip(roll.lines_s, roll.labels, strict=True)
        if label and second < total
    ]
    octaves = "".join(
        f'<span class="octave" style="top:{100 * y / HEIGHT:.2f}%">C{pitch // 12 - 1}</span>'
        for pitch, y in rows.octaves()
    )
    place = f"{100 * roll.prompt_end_s / total:.2f}%"
    legend = "".join(
        f'<li><i class="{colours[program]}"></i>{escape(instrument_name(program))}</li>' for program in programs
    )
    spoken = f"Piano roll. {roll.caption} Instruments: {', '.join(map(instrument_name, programs)) or 'none'}."
    width = max(len(roll.lines_s) * 26, 280)
    return f"""<figure class="roll" data-notes="{len(notes)}" data-seconds="{total:.4f}">
<div class="scroll" tabindex="0" role="region" aria-label="Piano roll, scrolls sideways">
<div class="sheet" style="min-width:{width}px" data-front="{_front(notes, total):.4f}">
<div class="parts"><span style="width:{place}">prompt</span><span class="new">new music</span></div>
<div class="notes">
<svg viewBox="0 0 1000 {HEIGHT:g}" preserveAspectRatio="none" role="img" aria-label="{escape(spoken)}">
{"".join(shapes)}</svg>{octaves}<div class="playhead" hidden></div></div>
<div class="scale" aria-hidden="true">{"".join(texts)}</div>
</div></div>
<figcaption><ul class="legend" aria-label="Instruments">{legend}</ul><p>{escape(roll.caption)}</p></figcaption>
</figure>"""


class _Rows:
    """Rows of pitches between two heights, given as shares of the roll's, the highest pitch on top."""

    def __init__(self, pitches: np.ndarray, top: float, bottom: float, least: int):
        low, high = (int(pitches.min()) - 1, int(pitches.max()) + 1) if len(pitches) else (48, 72)
        lack = max(least - (high - low + 1), 0)
        self.low, self.high = max(low - lack // 2, 0), min(high + lack - lack // 2, 127)
        self.top, self.row = top * HEIGHT, (bottom - top) * HEIGHT / (self.high - self.low + 1)

    def octaves(self) -> list[tuple[int, float]]:
        """Every C, and the height of its lower edge."""
        if self.row <= 0:
            return []
        return [(c, self.top + (self.high - c + 1) * self.row) for c in range(0, 128, 12) if self.low < c <= self.high]

    def box(self, note: np.void, total: float) -> str:
        """A note as a piece of an SVG path."""
        thick = self.row * (0.55 + 0.45 * note["velocity"] / 127)
        y = self.top + (self.high - note["pitch"]) * self.row + (self.row - thick) / 2
        # A hair shorter than it sounds, so that repeated notes do not run into one; but never too short to be seen.
        wide = max(1000 * note["duration_s"] / total - 0.6, 1.5)
        return f"M{_x(note['onset_s'], total)} {y:.1f}h{wide:.1f}v{thick:.1f}h-{wide:.1f}z"


def _x(second: float, total: float) -> str:
    return f"{1000 * second / total:.1f}"


def _line(kind: str, x: str) -> str:
    return f'<path class="{kind}" d="M{x} 0V{HEIGHT:g}"/>'


def _front(notes: np.ndarray, total: float) -> float:
    """How far the music has come, as a share of the width."""
    return float(notes["onset_s"].max(initial=0.0)) / total
