"""Hear and see a piece without any system synthesizer: a WAV through a SoundFont, a piano-roll picture."""

import importlib.util
import io
import os
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from symusic import Note, Score

from sage_studio.errors import MissingExtraError, install_hint
from sage_studio.files import write_atomic

from .midi import bar_times, notes_from_score
from .notes import end_s, instrument_name
from .soundfont import SoundFontError, playable

SOUNDFONT = "TimGM6mb.sf2"
LOUDNESS_STEP_DB = 1.5  # notes of about one loudness are played together


def find_soundfont() -> Path:
    """The General MIDI SoundFont to play with: `$SAGE_MUSIC_SOUNDFONT`, or the one inside the `pretty_midi` package.

    Raises:
        MissingExtraError: neither is there.
    """
    chosen = os.environ.get("SAGE_MUSIC_SOUNDFONT")
    if chosen:
        if not Path(chosen).is_file():
            raise MissingExtraError(f"SAGE_MUSIC_SOUNDFONT names {chosen}, which is not a file.")
        return Path(chosen)
    spec = importlib.util.find_spec("pretty_midi")  # found, not imported: only its data file is wanted
    path = Path(spec.origin).parent / SOUNDFONT if spec is not None else None
    if path is None or not path.is_file():
        raise MissingExtraError(
            f"audio needs a SoundFont: {install_hint('pretty_midi')}, which holds one, "
            "or set SAGE_MUSIC_SOUNDFONT to an .sf2 or .sf3."
        )
    return path


def synthesize(score: Score, sample_rate: int = 44100) -> np.ndarray:
    """`score` as sound: float32 of shape (2, samples), left and right, its loudest sample at -1 dB.

    Raises:
        MissingExtraError: no SoundFont.
    """
    from symusic import Synthesizer

    path = find_soundfont()
    try:
        font = playable(path, score, sample_rate)
    except SoundFontError as error:
        raise MissingExtraError(str(error)) from error
    samples = np.zeros((2, 0), np.float32)
    # The synthesizer reads from a file as it plays; where an open file cannot be removed, it stays for the system.
    with tempfile.TemporaryDirectory(prefix="sage-studio-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "playable.sf2"
        file.write_bytes(font)
        synthesizer = Synthesizer(sf_path=str(file), sample_rate=sample_rate)
        for loudness, layer in _layers(score):
            sound = np.asarray(synthesizer.render(layer, stereo=True), dtype=np.float32)  # (2, samples)
            sound *= loudness
            if sound.shape[1] > samples.shape[1]:
                samples, sound = sound, samples
            samples[:, : sound.shape[1]] += sound
    peak = max(float(samples.max(initial=0.0)), -float(samples.min(initial=0.0)))  # no copy: a piece may be long
    samples *= np.float32(10 ** (-1 / 20) / peak if peak > 0 else 1.0)
    return samples


def _layers(score: Score) -> Iterator[tuple[np.float32, Score]]:
    """The notes of `score` by loudness: an amplitude, and the score with the notes of that alone.

    The synthesizer plays all velocities equally loud. A note's amplitude grows with the square of its velocity
    (SoundFont 2.04, section 8.4.1), here in steps of 1.5 dB.
    """
    levels = []
    for track in score.tracks:
        velocities = np.maximum(track.notes.numpy()["velocity"].astype(np.float64), 1)
        levels.append(np.round(40 * np.log10(velocities / 127) / LOUDNESS_STEP_DB))
    for level in np.unique(np.concatenate(levels or [np.zeros(0)])):
        layer = score.copy()
        for track, own in zip(layer.tracks, levels, strict=True):
            chosen = own == level
            track.notes = Note.from_numpy(**{name: values[chosen] for name, values in track.notes.numpy().items()})
        yield np.float32(10 ** (level * LOUDNESS_STEP_DB / 20)), layer


def render_wav(path: str | os.PathLike, score: Score, sample_rate: int = 44100) -> Path:
    """Write `score` as 16-bit stereo WAV, its loudest sample at -1 dB. Returns the path.

    Raises:
        MissingExtraError: no SoundFont.
    """
    samples = synthesize(score, sample_rate)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        samples *= 32767
        file.writeframes(samples.T.astype("<i2").tobytes())
    return write_atomic(path, buffer.getvalue())


def render_piano_roll(
    path: str | os.PathLike,
    score: Score,
    prompt_end_s: float | None = None,
    title: str | None = None,
    in_seconds: bool = False,
) -> Path:
    """Write a piano-roll PNG: one colour per instrument, bar lines, the prompt shaded. Returns the path.

    Args:
        prompt_end_s: seconds at which the prompt ends and the continuation begins.
        in_seconds: count seconds instead of bars, for performances, whose bars mean nothing.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PatchCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise MissingExtraError(f"pictures need matplotlib: {install_hint('matplotlib')}.") from error

    notes, bars = notes_from_score(score), bar_times(score)
    total = end_s(notes)
    figure = Figure(figsize=(min(max(total * 0.28, 9), 26), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Okabe and Ito's palette, told apart by colour-blind readers too; drums are grey.
    palette = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#6A3D9A", "#B2DF8A"]
    programs = sorted(set(notes["program"].tolist()), key=lambda p: (p < 0, p))
    handles = []
    for index, program in enumerate(programs):
        colour = "#777777" if program < 0 else palette[index % len(palette)]
        chosen = notes[notes["program"] == program]
        boxes = [
            Rectangle((note["onset_s"], note["pitch"] - 0.5), max(note["duration_s"] - 0.01, 0.03), 1)
            for note in chosen
        ]
        alpha = 0.35 + 0.6 * chosen["velocity"] / 127
        axes.add_collection(PatchCollection(boxes, facecolor=colour, alpha=alpha, linewidth=0))
        handles.append(Patch(facecolor=colour, label=instrument_name(program)))
    if in_seconds:
        axes.grid(axis="x", color="black", linewidth=0.3, alpha=0.35, zorder=0)
    else:
        for number, time in enumerate(bars):
            axes.axvline(time, color="black", linewidth=0.9 if number % 4 == 0 else 0.3, alpha=0.35, zorder=0)
        axes.set_xticks(bars[::4], [str(4 * i + 1) for i in range(len(bars[::4]))])
    if prompt_end_s is not None:
        axes.axvspan(0, prompt_end_s, color="#f2ead0", zorder=-1)
        axes.axvline(prompt_end_s, color="#a05a00", linewidth=1.6)
        for x, align, text in ((prompt_end_s, "right", "prompt  "), (prompt_end_s, "left", "  continuation")):
            axes.text(x, 1.0, text, ha=align, va="bottom", color="#a05a00", transform=axes.get_xaxis_transform())
    low, high = (int(notes["pitch"].min()), int(notes["pitch"].max())) if len(notes) else (48, 72)
    axes.set_xlim(0, max(total, 1.0))
    axes.set_ylim(low - 2, high + 2)
    octaves = [pitch for pitch in range(0, 128, 12) if low - 2 <= pitch <= high + 2]
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    axes.set(xlabel="second" if in_seconds else "bar", ylabel="pitch")
    if title:
        axes.set_title(title, loc="left")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6) or 1, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return write_atomic(path, buffer.getvalue())
