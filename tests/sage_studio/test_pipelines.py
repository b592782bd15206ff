"""The `midi-continuation` pipeline: registered, any input, batches that equal single calls, clear errors, threads."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import band
from symusic import Note, Score, Tempo, TimeSignature, Track
from torch.utils.data import Dataset
from transformers import pipeline

import perceivers
import sage_music
import sage_studio.pipelines
from sage_studio.checkpoints import load
from sage_studio.errors import InvalidMidiError
from sage_studio.generation.bars import continue_score
from sage_studio.generation.seconds import continue_performance
from sage_studio.music.midi import read_notes
from sage_studio.music.notes import end_s
from sage_studio.publishing.export import export


def tune(bars: int = 4, qpm: float = 120.0) -> bytes:
    """One voice in quarter notes, of which a bar is quickly written."""
    score = Score(480)
    score.tempos.append(Tempo(0, qpm))
    score.time_signatures.append(TimeSignature(0, 4, 4))
    score.tracks.append(Track(program=0))
    score.tracks[0].notes.extend([Note(480 * i, 480, 60 + 5 * i % 12, 80) for i in range(4 * bars)])
    return score.dumps_midi()


MIDI = tune()


@pytest.fixture(scope="module")
def bars():
    return pipeline("midi-continuation", model=str(sage_music.PRETRAINED), device="cpu")


@pytest.fixture(scope="module")
def seconds():
    return pipeline("midi-continuation", model=str(perceivers.PRETRAINED), device="cpu")


@pytest.fixture(params=["bars", "seconds"])
def either(request):
    """A pipeline of each family, with options of a short piece."""
    options = {"bars": {"bars": 1, "prompt_bars": 2}, "seconds": {"music_s": 1.5, "prompt_s": 3}}
    return request.getfixturevalue(request.param), options[request.param]


def test_the_family_is_that_of_the_model(bars, seconds):
    assert isinstance(bars, sage_studio.pipelines.pipeline_class("sage_music"))
    assert isinstance(seconds, sage_studio.pipelines.pipeline_class("perceivers"))
    with pytest.raises(ValueError, match="SAGE-Music's; the model is PerceiverS's"):
        sage_studio.pipelines.pipeline_class("sage_music")(seconds.model, seconds.tokenizer)


def test_a_result_holds_midi_and_its_notes(either):
    pipe, options = either
    result = pipe(MIDI, seed=4, **options)
    assert set(result) == {"midi", "notes", "prompt_end_s", "new_notes", "elapsed_s", "seed", "remarks"}
    notes = read_notes(result["midi"])
    assert len(notes) == len(result["notes"]) and result["seed"] == 4 and result["elapsed_s"] > 0
    assert np.allclose(notes["onset_s"], result["notes"]["onset_s"], atol=2e-3)
    assert 2 < result["prompt_end_s"] <= 4 and result["new_notes"] > 0
    for music in (notes, result["notes"]):
        assert (music["onset_s"] >= result["prompt_end_s"]).sum() == result["new_notes"]


@pytest.mark.parametrize("qpm", [97.3, 133.7])
def test_the_end_of_the_prompt_parts_old_notes_from_new(either, qpm):
    """In any tempo: the same seconds for bar lines and notes."""
    pipe, options = either
    for seed in (1, 2):
        result = pipe(band(bars=3, seed=seed, qpm=qpm).dumps_midi(), seed=seed, **options)
        assert (result["notes"]["onset_s"] >= result["prompt_end_s"]).sum() == result["new_notes"] > 0


def test_bars_are_those_of_continue_score(bars):
    result = bars(MIDI, prompt_bars=3, bars=2, seed=7, programs=[0, -1], temperature=1.1)
    piece = continue_score(
        bars.model, bars.tokenizer, MIDI, prompt_bars=3, bars=2, seed=7, programs=[0, -1], temperature=1.1
    )
    assert result["midi"] == piece.score.dumps_midi() and result["new_notes"] == piece.notes
    drafted = bars(MIDI, bars=1, seed=7, generate_options={"do_sample": False})
    assert drafted["midi"] == bars(MIDI, bars=1, temperature=0)["midi"]


def test_seconds_are_those_of_continue_performance(seconds):
    result = seconds(MIDI, prompt_s=3, music_s=2, seed=7, top_p=0.9, max_note_s=1)
    piece = continue_performance(
        seconds.model, seconds.tokenizer, MIDI, prompt_s=3, music_s=2, seed=7, top_p=0.9, max_note_s=1
    )
    assert result["midi"] == piece.score.dumps_midi() and result["remarks"] == piece.remarks
    few = seconds(MIDI, prompt_s=3, music_s=None, max_tokens=20, seed=7)
    assert 0 < few["new_notes"] < 20


# ---- inputs


class Files(Dataset):
    """What `torch.utils.data` calls a map-style dataset: no iterator of its own, no IndexError at its end."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return MIDI


def test_inputs_of_every_kind(bars, tmp_path):
    (tmp_path / "x.mid").write_bytes(MIDI)
    options = {"bars": 1, "prompt_bars": 2}
    expected = [bars(MIDI, seed=seed, **options)["midi"] for seed in (5, 6)]
    for one in (str(tmp_path / "x.mid"), tmp_path / "x.mid", bytearray(MIDI), Score.from_midi(MIDI)):
        assert bars(one, seed=5, **options)["midi"] == expected[0]
    for several in ([MIDI, MIDI], (MIDI, tmp_path / "x.mid")):
        results = bars(several, seed=5, **options)
        assert isinstance(results, list) and [result["midi"] for result in results] == expected
    for streamed in ((item for item in (MIDI, MIDI)), Files(), iter([MIDI, MIDI])):
        results = bars(streamed, seed=5, **options)
        assert not isinstance(results, list) and [result["midi"] for result in results] == expected
    assert bars([]) == []


def test_a_column_of_a_dataset(bars):
    datasets = pytest.importorskip("datasets")
    column = datasets.Dataset.from_dict({"midi": [MIDI, MIDI, MIDI]})["midi"]
    results = list(bars(column, batch_size=2, bars=1, prompt_bars=2, seed=5))
    assert [result["seed"] for result in results] == [5, 6, 7] and all(result["new_notes"] for result in results)


HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am a MIDI file", "not a MIDI file"),
    "truncated": (MIDI[: len(MIDI) // 2], "truncated"),
    "no notes": (Score(480).dumps_midi(), "no notes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_midi_is_named(either, tmp_path, kind):
    pipe, options = either
    data, reason = HOSTILE[kind]
    (tmp_path / "bad.mid").write_bytes(data)
    before = pipe(MIDI, seed=1, **options)["midi"]
    with pytest.raises(InvalidMidiError, match=rf"bad\.mid.*{reason}"):
        pipe(tmp_path / "bad.mid", **options)
    with pytest.raises(InvalidMidiError, match=f"^<bytes>: .*{reason}"):
        pipe([data], **options)
    with pytest.raises(InvalidMidiError, match=rf"inputs\[1\].*{reason}"):
        pipe([MIDI, data, MIDI], batch_size=3, **options)
    assert pipe(MIDI, seed=1, **options)["midi"] == before  # and nothing is left in its way


def test_what_the_model_cannot_continue_is_named(bars, seconds):
    """Before anything is written, so that no other of its batch is lost; alone it has its own words."""
    dense = Score(480)
    for program in range(0, 120, 3):
        dense.tracks.append(Track(program=program))
        dense.tracks[-1].notes.extend([Note(40 * i, 40, 60 + i % 12, 80) for i in range(48)])
    chord = Score(480)
    chord.tracks.append(Track(program=0))
    chord.tracks[0].notes.extend([Note(0, 9600, pitch, 80) for pitch in range(40, 80)])
    for pipe, prompt, words, options in (
        (bars, dense, "a single bar holds more than the context", {"bars": 1}),
        (seconds, chord, "max_tokens 9 cannot end the 40 notes", {"prompt_s": 1, "max_tokens": 9}),
    ):
        data = prompt.dumps_midi()
        for size in (1, 3):
            with pytest.raises(ValueError, match=rf"^inputs\[1\]: {words}"):
                pipe([MIDI, data, MIDI], batch_size=size, **options)
        with pytest.raises(ValueError, match=f"^{words}"):
            pipe(data, **options)


def test_other_inputs_are_refused(either):
    pipe, _ = either
    with pytest.raises(ValueError, match=r"addresses are not fetched"):
        pipe("https://example.org/x.mid")
    for path in ("", "a\0b.mid"):
        with pytest.raises(InvalidMidiError, match="cannot be opened") as caught:
            pipe(path)
        assert repr(path) in str(caught.value)
    with pytest.raises(InvalidMidiError, match="no notes"):
        pipe(Score(480))
    for wrong in (None, 3, {"path": "x.mid"}):
        with pytest.raises(ValueError, match="inputs must be a path, bytes or a symusic"):
            pipe(wrong)


# ---- options


@pytest.mark.parametrize(
    "options",
    [
        {"temprature": 1.0},
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"temperature": 1e-300},
        {"top_p": 1.5},
        {"seed": "x"},
        {"seed": 2**64},
        {"time_limit": 0},
        {"audio": 1},
        {"sample_rate": 12},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_options_of_both_are_checked(either, options):
    pipe, _ = either
    with pytest.raises(ValueError, match=next(iter(options))):
        pipe([MIDI], **options)


@pytest.mark.parametrize("options", [{"bars": 0}, {"bars": 2.5}, {"bars": "4"}, {"prompt_bars": True}], ids=str)
def test_options_of_bars_are_checked(bars, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a whole number from 1"):
        bars(MIDI, **options)


@pytest.mark.parametrize(
    "options", [{"programs": [200]}, {"programs": "drums"}, {"free": "no"}, {"music_s": 3}], ids=str
)
def test_other_options_of_bars_are_checked(bars, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bars(MIDI, **options)


@pytest.mark.parametrize("options", [{"music_s": -1}, {"music_s": "3"}, {"max_tokens": 0}, {"bars": 4}], ids=str)
def test_options_of_seconds_are_checked(seconds, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        seconds(MIDI, **options)


def test_generate_options_do_not_collide(bars):
    with pytest.raises(ValueError, match="generate_options cannot hold max_new_tokens"):
        bars(MIDI, generate_options={"max_new_tokens": 20})


def test_options_may_be_numpy_s(bars, seconds):
    given = {"bars": np.int64(1), "prompt_bars": np.int8(2), "seed": np.int64(5), "temperature": np.float64(0.8)}
    result = bars(MIDI, **given, free=np.bool_(False), programs=np.array([0]))
    expected = bars(MIDI, bars=1, prompt_bars=2, seed=5, temperature=0.8, programs=[0])
    assert result["midi"] == expected["midi"] and json.dumps(result["seed"]) == "5"
    several = bars([MIDI] * 2, batch_size=np.int64(2), bars=1, prompt_bars=2, seed=np.arange(5, 7))
    assert [result["seed"] for result in several] == [5, 6]
    short = {"music_s": np.float32(1.5), "prompt_s": np.float64(3), "seed": np.uint8(5)}
    assert seconds(MIDI, **short)["midi"] == seconds(MIDI, music_s=1.5, prompt_s=3, seed=5)["midi"]


def test_options_of_the_pipeline_hold_for_its_calls(bars):
    own = sage_studio.pipelines.MidiContinuationPipeline(
        bars.model, bars.tokenizer, device="cpu", bars=1, prompt_bars=2, seed=3
    )
    assert own(MIDI)["midi"] == bars(MIDI, bars=1, prompt_bars=2, seed=3)["midi"] != own(MIDI, seed=4)["midi"]
    with pytest.raises(ValueError, match="no option 'barz'"):
        sage_studio.pipelines.MidiContinuationPipeline(bars.model, bars.tokenizer, device="cpu", barz=1)


# ---- batches, seeds, threads


def test_a_batch_is_its_rows(either, tmp_path):
    """Prompts of different lengths: each is what it is alone, in float64, where rounding tips no choice."""
    pipe, options = either
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder)
    exact = pipeline("midi-continuation", model=folder, device="cpu", dtype="float64")
    prompts = [MIDI, band(bars=2, seed=2).dumps_midi(), MIDI, tune(bars=1, qpm=90)]
    alone = [exact(prompt, seed=20 + index, **options) for index, prompt in enumerate(prompts)]
    for size in (3, 8):
        together = exact(prompts, batch_size=size, seed=20, **options)
        assert [result["midi"] for result in together] == [result["midi"] for result in alone]
        assert [result["remarks"] for result in together] == [result["remarks"] for result in alone]
    chosen = exact(prompts[:2], batch_size=2, seed=[21, 20], **options)
    assert [result["seed"] for result in chosen] == [21, 20]
    assert chosen[1]["midi"] == exact(prompts[1], seed=20, **options)["midi"]


def test_several_seeds_of_one_prompt(either):
    pipe, options = either
    results = pipe([MIDI] * 3, batch_size=3, seed=1, **options)
    assert len({result["midi"] for result in results}) == 3
    assert len({result["elapsed_s"] for result in results}) == 1  # written at once


def test_seeds_must_fit_the_inputs(bars):
    for inputs in ([MIDI, MIDI], MIDI):
        with pytest.raises(ValueError, match=r"seed holds 3 seeds for \d|one input"):
            bars(inputs, seed=[1, 2, 3])
    for given, words in ((1, "there are more inputs"), (3, "more seeds than there are inputs")):
        with pytest.raises(ValueError, match=words):
            list(bars((item for item in [MIDI, MIDI]), seed=list(range(given)), bars=1, prompt_bars=1))


def test_every_seed_of_a_result_is_taken_back(either):
    pipe, options = either
    results = pipe([MIDI, MIDI], seed=2**63 - 1, **options)
    assert results[0]["seed"] == 2**63 - 1
    for result in results:
        assert pipe(MIDI, seed=result["seed"], **options)["midi"] == result["midi"]


def test_without_a_seed_torch_s_own_decides(bars):
    def draw():
        result = bars(MIDI, bars=1, prompt_bars=1)
        return result["seed"], result["midi"]

    torch.manual_seed(0)
    first, second = draw(), draw()
    torch.manual_seed(0)
    assert draw() == first != second
    assert bars(MIDI, bars=1, prompt_bars=1, seed=second[0])["midi"] == second[1]


def test_seeds_hold_in_threads(bars, seconds):
    """Both families at once: one torch has one random state."""
    jobs = [(bars, {"bars": 1, "prompt_bars": 2, "seed": seed}) for seed in range(3)]
    jobs += [(seconds, {"music_s": 1, "prompt_s": 2, "seed": seed}) for seed in range(3)]
    jobs += [(bars, {"bars": 1, "prompt_bars": 2, "seed": 9, "generate_options": {"use_cache": True}})]

    def midi(job):
        pipe, options = job
        return pipe(MIDI, **options)["midi"]

    expected = [midi(job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(midi, jobs)) == expected


def test_a_time_limit_keeps_whole_bars(bars):
    result = bars([MIDI, MIDI], batch_size=2, bars=200, seed=0, time_limit=1.0)[0]
    assert result["elapsed_s"] < 10
    (remark,) = [remark for remark in result["remarks"] if "time limit of 1 s ended the piece after" in remark]
    kept = int(remark.split("after ")[1].split(" of 200 bars")[0])
    assert end_s(result["notes"]) < 2 * (4 + kept + 4)
    onsets = result["notes"]["onset_s"]
    assert onsets.max() < 2 * (4 + kept) + 1e-6  # two seconds a bar at 120


def test_a_time_limit_ends_seconds(seconds):
    result = seconds(MIDI, prompt_s=3, music_s=500, seed=0, time_limit=0.5)
    assert result["elapsed_s"] < 10 and any("time limit of 0.5 s" in remark for remark in result["remarks"])


# ---- exports


def test_an_export_s_weights_run_in_the_installed_code(either, tmp_path):
    """By name Transformers wants the flag, for the repository's own pipeline; of objects it asks for none."""
    pipe, options = either
    folder = export(pipe.family.checkpoint, tmp_path / "hub", samples=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline("midi-continuation", model=str(folder), device="cpu")
    model, tokenizer = load(folder)
    own = pipeline("midi-continuation", model=model, tokenizer=tokenizer, device="cpu")
    assert type(own) is type(pipe) and own(MIDI, seed=3, **options)["midi"] == pipe(MIDI, seed=3, **options)["midi"]


# ---- sound, device, saving


def test_audio(either):
    pipe, options = either
    result = pipe(MIDI, seed=1, audio=True, sample_rate=16_000, **options)
    sound = result["audio"]
    assert sound.dtype == np.float32 and sound.shape[0] == 2 and result["sampling_rate"] == 16_000
    assert end_s(result["notes"]) <= sound.shape[1] / 16_000 < end_s(result["notes"]) + 10
    assert 0.85 < np.abs(sound).max() < 0.9


def test_missing_sound_is_said_before_anything_is_written(bars, monkeypatch):
    monkeypatch.setenv("SAGE_MUSIC_SOUNDFONT", "/nowhere.sf2")
    with pytest.raises(RuntimeError, match="SAGE_MUSIC_SOUNDFONT"):
        bars([b"not even MIDI"], audio=True)


@pytest.mark.parametrize("family", [sage_music, perceivers])
def test_other_dtypes(family):
    pipe = pipeline("midi-continuation", model=str(family.PRETRAINED), device="cpu", dtype="bfloat16")
    assert pipe.dtype == torch.bfloat16
    options = {"bars": 1} if family is sage_music else {"music_s": 1, "prompt_s": 3}
    assert pipe([MIDI, MIDI], batch_size=2, seed=0, **options)[1]["prompt_end_s"] > 2


REMOTE = """
import sys
for name in ("sage_music", "perceivers", "sage_studio"):
    sys.modules[name] = None
import hashlib
from transformers import pipeline
folder, midi, saved = sys.argv[1:]
pipe = pipeline("midi-continuation", model=folder, trust_remote_code=True, device="cpu")
print(hashlib.sha256(pipe(midi, seed=5, bars=1, prompt_bars=2)["midi"]).hexdigest())
pipe.save_pretrained(saved)
"""


def test_a_pipeline_with_its_own_code_saves_that_too(bars, tmp_path):
    """Loaded where the package is not installed, saved there, and loaded again from what was saved."""
    export("sage-music", tmp_path / "hub", samples=False)
    (tmp_path / "x.mid").write_bytes(MIDI)
    digests = []
    for source, target in (("hub", "saved"), ("saved", "again")):
        run = subprocess.run(
            [sys.executable, "-c", REMOTE, tmp_path / source, tmp_path / "x.mid", tmp_path / target],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        digests.append(run.stdout.split())
    info = json.loads((tmp_path / "again" / "config.json").read_text())["custom_pipelines"]["midi-continuation"]
    assert info["impl"] == "midi_continuation.MidiContinuationPipeline"
    assert info["pt"] == ["AutoModelForCausalLM"]
    assert digests[0] == digests[1]
