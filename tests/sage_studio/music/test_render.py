import subprocess
import sys
import wave

import numpy as np
import pytest
from conftest import band
from symusic import Note, Score, Synthesizer, Tempo, Track

from sage_studio.errors import MissingExtraError
from sage_studio.music.render import find_soundfont, render_piano_roll, render_wav, synthesize

# Long notes of every pitch from 90, of programs whose loops the synthesizer rounded to nothing, and extreme notes.
HIGH = """
import sys
from symusic import Note, Score, Tempo, Track
from sage_studio.music.render import synthesize

for rate in map(int, sys.argv[1:]):
    for program in (13, 24, 33, 40, 57, 73, 80):
        score = Score(480)
        score.tempos.append(Tempo(0, 120))
        score.tracks.append(Track(program=program))
        for pitch in range(90, 128):
            score.tracks[0].notes.append(Note(240 * (pitch - 90), 960, pitch, 90))
        for time, duration, pitch, velocity in (0, 0, 127, 1), (10, 1, 0, 127), (20, 96000, 127, 127), (0, 480, 0, 1):
            score.tracks[0].notes.append(Note(time, duration, pitch, velocity))
        sound = synthesize(score, rate)
        assert (abs(sound) <= 1).all() and rate * 100 <= sound.shape[1] < rate * 102
"""


def one_note(program: int, pitch: int, is_drum: bool = False, seconds: float = 1.0) -> Score:
    score = Score(480)
    score.tempos.append(Tempo(0, 120))
    score.tracks.append(Track(program=program, is_drum=is_drum))
    score.tracks[0].notes.append(Note(0, int(960 * seconds), pitch, 100))
    return score


def strongest_hz(sound: np.ndarray, rate: int) -> float:
    """Frequency of the strongest partial between 0.1 and 0.6 s."""
    part = sound.sum(0)[rate // 10 : rate * 6 // 10]
    size = 1 << 18
    return float(np.argmax(np.abs(np.fft.rfft(part * np.hanning(len(part)), size))) * rate / size)


def test_the_sound_lasts_as_long_as_the_music_and_is_not_silence(tmp_path):
    score = band(bars=2)  # 4 seconds
    with wave.open(str(render_wav(tmp_path / "a.wav", score))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 44100)
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32767
        assert 3.9 < file.getnframes() / 44100 < 8
    assert abs(np.abs(samples).max() - 10 ** (-1 / 20)) < 0.01
    assert np.sqrt(np.mean(samples**2)) > 0.01


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_high_notes_do_not_hang_the_synthesizer(rate):
    # in a process of its own: it hangs where no signal and no other thread gets in
    subprocess.run([sys.executable, "-c", HIGH, str(rate)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("program", "pitch", "rate"),
    [
        (0, 48, 44100),
        (0, 60, 44100),
        (0, 72, 22050),
        (33, 36, 44100),
        (33, 72, 22050),
        (40, 60, 44100),
        (48, 60, 44100),
    ],
)
def test_a_note_sounds_at_its_pitch(program, pitch, rate):
    partial = strongest_hz(synthesize(one_note(program, pitch), rate), rate) / (440 * 2 ** ((pitch - 69) / 12))
    assert round(partial) in range(1, 9)
    assert abs(1200 * np.log2(partial / round(partial))) < 40  # cents; the fonts' samples themselves are not exact


@pytest.mark.parametrize("rate", [22050, 44100])
def test_what_the_synthesizer_plays_right_stays_as_it_is(rate):
    """A trumpet's samples state their root keys where the synthesizer looks, and it is far below the limits."""
    score = one_note(56, 60)
    plain = Synthesizer(sf_path=str(find_soundfont()), sample_rate=rate).render(score, stereo=True)[:, :rate]
    sound = synthesize(score, rate)
    assert rate < sound.shape[1] < 1.2 * rate  # it rings off for a moment
    held = slice(rate // 5, rate * 9 // 10)  # beyond the attack, for which the synthesizer takes no time of itself
    assert np.corrcoef(sound[0, held], plain[0, held])[0, 1] > 0.9999


def test_velocity_is_heard():
    """Amplitude grows with the square of velocity, whatever the notes' order and length."""
    score = Score(480)
    score.tempos.append(Tempo(0, 120))
    score.tracks.append(Track(program=0))
    velocities = [32, 127, 64, 1, 90]
    for index, velocity in enumerate(velocities):
        score.tracks[0].notes.append(Note(1920 * index, 480, 60, velocity))
    sound = synthesize(score, 22050)
    heard = [np.sqrt((sound[:, 44100 * i : 44100 * i + 11025] ** 2).mean()) for i in range(len(velocities))]
    decibels = 20 * np.log10(np.array(heard) / heard[1])
    assert np.abs(decibels - 40 * np.log10(np.array(velocities) / 127)).max() < 1


def test_a_note_rings_off_and_ends():
    sound = np.abs(synthesize(one_note(0, 60), 22050)).max(0)
    held, released, after = (sound[int(22050 * at) : int(22050 * (at + 0.03))].max() for at in (0.95, 1.03, 1.15))
    assert held > released > after > 0.001
    assert len(sound) < 2 * 22050


def test_a_score_without_notes_is_no_sound():
    assert synthesize(Score(480)).shape == (2, 0)


def test_a_drum_is_heard_to_its_end():
    snare = synthesize(one_note(0, 38, is_drum=True))
    assert np.abs(snare[:, 2205:4410]).max() > 0.01  # after 50 ms


def test_a_tone_that_the_rate_cannot_hold_is_silent():
    assert not synthesize(one_note(73, 108), 8000).any()  # 4186 Hz
    assert synthesize(one_note(73, 106), 8000).any()


def test_a_file_that_is_no_soundfont_is_an_error(tmp_path, monkeypatch):
    whole = find_soundfont().read_bytes()
    for name, data in (("text.sf2", b"not a SoundFont"), ("empty.sf2", b""), ("short.sf2", whole[:100_000])):
        path = tmp_path / name
        path.write_bytes(data)
        monkeypatch.setenv("SAGE_MUSIC_SOUNDFONT", str(path))
        with pytest.raises(MissingExtraError, match=name):
            synthesize(one_note(0, 60))


def test_the_picture_shows_instruments_bars_and_prompt(tmp_path):
    from matplotlib import image

    plain = image.imread(render_piano_roll(tmp_path / "a.png", band(bars=4)))
    told = image.imread(render_piano_roll(tmp_path / "b.png", band(bars=4), prompt_end_s=4.0))
    colours = {tuple((pixel * 255).astype(int)) for pixel in plain[:, :, :3].reshape(-1, 3)[::3]}
    assert (0x00, 0x72, 0xB2) in colours and (0xE6, 0x9F, 0x00) in colours and (0x77, 0x77, 0x77) in colours
    middle = told.shape[0] // 2
    shaded = np.abs(told[middle - 40 : middle + 40, :, :3] - np.array([0xF2, 0xEA, 0xD0]) / 255).sum(-1) < 0.03
    columns = np.flatnonzero(shaded.any(0))
    assert len(columns) and columns.max() < 0.6 * told.shape[1]  # the first half only


def test_the_picture_of_a_performance_counts_seconds(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), savefig(self, *args, **kw)))
    render_piano_roll(tmp_path / "a.png", band(bars=4), prompt_end_s=3.0, in_seconds=True)
    render_piano_roll(tmp_path / "b.png", band(bars=4), prompt_end_s=3.0)
    (performance,), (piece,) = (figure.axes for figure in drawn)
    assert (performance.get_xlabel(), piece.get_xlabel()) == ("second", "bar")
    ticks = {
        label.get_text(): at for at, label in zip(performance.get_xticks(), performance.get_xticklabels(), strict=True)
    }
    assert ticks["4"] == 4.0


def test_missing_extras_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_MUSIC_SOUNDFONT", str(tmp_path / "none.sf2"))
    with pytest.raises(MissingExtraError, match="SAGE_MUSIC_SOUNDFONT"):
        find_soundfont()
    monkeypatch.delenv("SAGE_MUSIC_SOUNDFONT")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install 'pretty_midi>="):  # of an index, where this package is not
        find_soundfont()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="pip install 'matplotlib>="):
        render_piano_roll(tmp_path / "a.png", band(bars=1))
