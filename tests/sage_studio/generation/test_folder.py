"""Continuations of a folder of prompts: by one process, by two under torchrun, killed and gone on with."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import band, tiny_model, tiny_perceivers

from perceivers import PerceiverSTokenizer
from sage_music import SageMusicTokenizer
from sage_studio.checkpoints import load
from sage_studio.files import seed_of
from sage_studio.generation.bars import continue_score
from sage_studio.generation.folder import continue_folder, fingerprint, main
from sage_studio.music.midi import read_notes

COMMAND = [sys.executable, "-m", "sage_studio.generation.folder"]


@pytest.fixture(autouse=True)
def threads():
    """The command sets the process' number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Four pieces at two depths, and two files that are none."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "b").mkdir()
    for seed, name in enumerate(("a.mid", "b/a.mid", "b/loud.MIDI", "c.mid")):
        band(bars=3, seed=seed).dump_midi(folder / name)
    (folder / "b" / "broken.mid").write_bytes((folder / "a.mid").read_bytes()[:200])
    (folder / "text.mid").write_text("not music")
    (folder / "notes.txt").write_text("not a prompt")
    return folder


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory) -> Path:
    """The output of a run that went through, in one process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main(argv(prompts, folder)) == 0
    return folder


def argv(prompts: Path, output: Path, *more) -> list[str]:
    return [*map(str, ("--prompts", prompts, "--output", output, "--bars", 1, "--prompt-bars", 2, "--seed", 3, *more))]


def files(output: Path) -> dict[str, bytes]:
    """The manifest, and all files of music."""
    found = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.glob("music/**/*.*")}
    return found | {"manifest.jsonl": (output / "manifest.jsonl").read_bytes()}


def manifest(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_every_prompt_has_a_line_and_its_music(prompts, whole):
    records = {record["path"]: record for record in manifest(whole)}
    assert list(records) == ["a.mid", "b/a.mid", "b/broken.mid", "b/loud.MIDI", "c.mid", "text.mid"]
    assert len(manifest(whole)) == len(records)
    assert "truncated" in records["b/broken.mid"]["error"] and "MThd" in records["text.mid"]["error"]
    assert len({record["seed"] for record in records.values()}) == len(records)
    model, tokenizer = load()
    for name, record in records.items():
        data = (prompts / name).read_bytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest() and record["seed"] == seed_of(3, name)
        if "error" not in record:
            written = (whole / record["output"]).read_bytes()
            assert record["output_sha256"] == hashlib.sha256(written).hexdigest()
            # The line says how to get the same music without this command.
            piece = continue_score(model, tokenizer, data, prompt_bars=2, bars=1, seed=record["seed"])
            assert piece.score.dumps_midi() == written
            assert (record["notes"], record["bars"]) == (piece.notes, piece.bars) and record["bars"] == 1
    assert set(files(whole)) == {"manifest.jsonl"} | {f"music/{n}" for n, r in records.items() if "error" not in r}


def test_two_processes_write_what_one_does(prompts, whole, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*launch, *COMMAND[1:], *argv(prompts, tmp_path / "out")], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("4 prompts continued, 2 refused") == 1
    assert files(tmp_path / "out") == files(whole)
    shares = [path.read_bytes().count(b"\n") for path in sorted((tmp_path / "out" / "journal").iterdir())]
    assert shares == [3, 3]


def test_a_killed_run_goes_on_where_it_was(prompts, whole, tmp_path):
    out = tmp_path / "out"
    journal = out / "journal" / "0.jsonl"
    process = subprocess.Popen([*COMMAND, *argv(prompts, out)], env=environment(), stdout=subprocess.DEVNULL)
    while not (journal.is_file() and b"\n" in journal.read_bytes()):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.jsonl").exists()
    # What a kill in the middle of a write leaves.
    with journal.open("ab") as file:
        file.write(b'{"path": "c.mid", "sha256": "0')
    left = out / "music" / "b" / ".a.mid.x1y2"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"MThd")
    before = {path: path.stat().st_mtime_ns for path in out.glob("music/*.mid")}
    assert main(argv(prompts, out)) == 0
    assert files(out) == files(whole) and not left.exists()
    assert before and before == {path: path.stat().st_mtime_ns for path in before}


def test_only_what_changed_is_done_again(prompts, whole, tmp_path):
    folder, out = tmp_path / "prompts", tmp_path / "out"
    shutil.copytree(prompts, folder)
    shutil.copytree(whole, out)
    shutil.copy(folder / "a.mid", folder / "text.mid")  # repaired
    shutil.copy(folder / "a.mid", folder / "new.mid")
    (folder / "c.mid").unlink()
    (out / "music" / "b" / "a.mid").write_bytes(b"MThd")  # spoilt
    before = {path: path.stat().st_mtime_ns for path in out.glob("music/**/*.*")}
    assert main(argv(folder, out)) == 0
    records = {record["path"]: record for record in manifest(out)}
    assert list(records) == ["a.mid", "b/a.mid", "b/broken.mid", "b/loud.MIDI", "new.mid", "text.mid"]
    assert "error" not in records["text.mid"] and "error" not in records["new.mid"]
    touched = {path.relative_to(out / "music").as_posix() for path in before if path.stat().st_mtime_ns > before[path]}
    assert touched == {"b/a.mid"}
    assert (out / "music/b/a.mid").read_bytes() == (whole / "music/b/a.mid").read_bytes()


def test_prompts_written_at_once_are_what_they_are_alone(prompts, whole, tmp_path):
    assert main(argv(prompts, tmp_path / "out", "--batch-size", 4)) == 0
    assert files(tmp_path / "out") == files(whole)


def test_performances_in_seconds(prompts, tmp_path):
    """The second process first: what it has noted the first one finds."""
    model, tokenizer = load("perceivers")
    options = {"music_s": 1.0, "prompt_s": 2.0, "temperature": 0.8}
    one = continue_folder(model, tokenizer, prompts, tmp_path / "one", **options)
    assert continue_folder(model, tokenizer, prompts, tmp_path / "two", rank=1, ranks=2, **options) is None
    assert continue_folder(model, tokenizer, prompts, tmp_path / "two", rank=0, ranks=2, **options) == one
    assert files(tmp_path / "one") == files(tmp_path / "two")
    continued = [record for record in one if "error" not in record]
    assert len(continued) == 4 and len(one) == 6
    for record in continued:
        assert record["music_s"] == pytest.approx(1.0, abs=0.011)
        notes = read_notes(tmp_path / "one" / record["output"])
        assert np.max(notes["onset_s"] + notes["duration_s"]) < 3.1


def test_an_output_folder_of_something_else_is_left_alone(prompts, whole, tmp_path, capsys):
    before = files(whole)
    assert main(argv(prompts, whole, "--bars", 2)) == 2
    assert "bars 1 (now 2)" in capsys.readouterr().err
    assert main([*argv(prompts, whole), "--temperature", "1.1"]) == 2
    assert "temperature None (now 1.1)" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "song.mid").write_bytes(b"MThd")
    assert main(argv(prompts, tmp_path / "mine")) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(argv(prompts, prompts / "out")) == 2
    assert "lies in the folder of the prompts" in capsys.readouterr().err
    assert main(argv(whole / "music", whole)) == 2  # `music/a.mid` would be its own prompt
    assert "lies in the output folder" in capsys.readouterr().err
    assert files(whole) == before


def test_the_fingerprint_is_of_all_that_the_music_depends_on(tmp_path):
    """Equal weights are not yet an equal model."""
    tokenizer, piano = SageMusicTokenizer(), PerceiverSTokenizer()
    models = [(tiny_model(tokenizer), tokenizer)]
    models += [(tiny_model(tokenizer, max_position_embeddings=256), tokenizer)]
    models += [(tiny_model(tokenizer), SageMusicTokenizer(track_programs={}))]
    models += [(tiny_perceivers(), piano), (tiny_perceivers(cross_scales=[None, None]), piano)]
    others = ({"fold_pedal": False}, {"velocity_offset": 0}, {"time_rounding": "delta"})
    models += [(tiny_perceivers(), PerceiverSTokenizer(**options)) for options in others]
    found = [fingerprint(*both) for both in models]
    assert len(set(found)) == len(models)
    for index in (0, 2, 3, 5):
        for part in models[index]:
            part.save_pretrained(tmp_path / str(index))
        assert fingerprint(*load(tmp_path / str(index))) == found[index]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seconds", "3"], "--seconds is an option of PerceiverS"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--programs", "300"], "programs are 0-127"),
        (["--model", "./nothing"], "no such folder"),
        (["--model", "perceivers"], "this checkpoint is PerceiverS, with --prompt-seconds, --seconds"),
        (["--device", "cudas"], "cudas"),
    ],
)
def test_wrong_options_end_with_a_sentence_before_the_first_prompt(prompts, tmp_path, capsys, more, message):
    assert main(argv(prompts, tmp_path / "out", *more)) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


@pytest.mark.parametrize("text", ["[1]", "{x", "null", "\udcff"])
def test_an_options_file_that_says_nothing_is_named(prompts, tmp_path, capsys, text):
    (tmp_path / "options.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(argv(prompts, tmp_path)) == 2
    errors = capsys.readouterr().err
    assert str(tmp_path / "options.json") in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "music").exists()


@pytest.mark.parametrize(
    ("rank", "ranks", "message"),
    [("1", "1", "rank 1 of 1"), ("-1", "2", "rank -1 of 2"), ("zero", "2", "RANK='zero'"), ("0", "", "WORLD_SIZE=''")],
)
def test_a_wrong_environment_ends_with_a_sentence(prompts, tmp_path, capsys, monkeypatch, rank, ranks, message):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert main(argv(prompts, tmp_path / "out")) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_prompts_is_an_error(tmp_path, capsys):
    assert main(argv(tmp_path, tmp_path / "out")) == 2
    assert "no .mid or .midi file" in capsys.readouterr().err
