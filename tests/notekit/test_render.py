import sys
import wave

import numpy as np
import pytest
from conftest import band

from notekit.render import MissingExtraError, find_soundfont, render_piano_roll, render_wav


def test_the_sound_lasts_as_long_as_the_music_and_is_not_silence(tmp_path):
    score = band(bars=2)  # 4 seconds
    with wave.open(str(render_wav(tmp_path / "a.wav", score))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 44100)
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2") / 32767
        assert 3.9 < file.getnframes() / 44100 < 8
    assert abs(np.abs(samples).max() - 10 ** (-1 / 20)) < 0.01
    assert np.sqrt(np.mean(samples**2)) > 0.01


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
    with pytest.raises(MissingExtraError, match="pip install pretty_midi"):  # of an index, where this package is not
        find_soundfont()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"sage-music\[plot\]"):
        render_piano_roll(tmp_path / "a.png", band(bars=1))
