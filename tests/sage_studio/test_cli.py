"""The command line as its users meet it: files, JSON, exit codes, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import band, notes_of, tiny_perceivers

from perceivers import PerceiverSTokenizer
from sage_studio import EXAMPLES
from sage_studio.cli import main
from sage_studio.music.midi import read_score


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def perceivers(tmp_path_factory) -> Path:
    """A small checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("perceivers")
    tiny_perceivers(num_hidden_layers=1, num_latents=32, max_position_embeddings=256).save_pretrained(folder)
    PerceiverSTokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["ode_to_joy", "greensleeves", "saints"])
def test_continue_writes_music_sound_and_picture(capsys, tmp_path, name):
    out = tmp_path / "deep" / "x.mid"
    prompt = EXAMPLES / f"{name}.mid"
    code, text, _ = run(capsys, "continue", prompt, "--bars", 2, "--out", out, "--wav", "--png", "--json")
    assert code == 0
    piece = json.loads(text)["pieces"][0]
    assert [Path(file).suffix for file in piece["files"]] == [".mid", ".wav", ".png"]
    assert all(Path(file).stat().st_size > 100 for file in piece["files"])
    assert piece["bars"] == 2 and piece["notes"] > 0
    assert read_score(out).note_num() > piece["notes"]


def test_continue_a_performance(capsys, tmp_path, perceivers):
    out, length = tmp_path / "deep" / "x.mid", ["--prompt-seconds", 4.5, "--minutes", 0.05]
    options = ["--model", perceivers, *length, "--out", out]
    code, text, err = run(capsys, "continue", EXAMPLES / "saints.mid", *options, "--wav", "--png", "--json")
    assert code == 0 and err == ""
    piece = json.loads(text)["pieces"][0]
    assert [Path(file).suffix for file in piece["files"]] == [".mid", ".wav", ".png"]
    assert all(Path(file).stat().st_size > 100 for file in piece["files"])
    assert (piece["prompt_end_s"], piece["music_s"], piece["seed"]) == (4.5, 3.0, 0)
    assert piece["notes"] > 0 and piece["tokens"] > 0 and piece["notes_per_second"] > 0 and piece["elapsed_s"] > 0
    total = read_score(out).note_num()
    assert piece["instruments"] == [f"Acoustic Grand Piano ({total} notes)"] and total > piece["notes"]
    assert "drum notes are left out" in " ".join(piece["remarks"])
    code, text, err = run(capsys, "continue", EXAMPLES / "saints.mid", *options)
    assert code == 0 and f"wrote {out}" in text and f"{piece['tokens']} tokens, {piece['notes']} notes, 3.0 s" in text
    assert "note: " in err and "drum notes are left out" in err


def test_generate_performances(capsys, tmp_path, perceivers):
    files = []
    for folder in ("a", "b"):
        options = ["--model", perceivers, "--max-tokens", 60, "--seed", 3, "--num", 2, "--top-p", 0.9]
        code, text, _ = run(capsys, "generate", *options, "--out", tmp_path / folder / "g.mid", "--json")
        pieces = json.loads(text)["pieces"]
        assert code == 0 and all(0 < piece["tokens"] <= 60 and piece["prompt_end_s"] == 0 for piece in pieces)
        files.append([Path(piece["files"][0]) for piece in pieces])
    assert [file.name for file in files[0]] == ["g-1.mid", "g-2.mid"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert files[0][0].read_bytes() != files[0][1].read_bytes()


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--bars", "2"],
        ["generate", "--programs", "0"],
        ["generate", "--tempo", "100"],
        ["generate", "--time-signature", "3/4"],
        ["continue", str(EXAMPLES / "saints.mid"), "--prompt-bars", "2"],
        ["continue", str(EXAMPLES / "saints.mid"), "--free"],
    ],
    ids=" ".join,
)
def test_options_of_the_other_family_are_refused(capsys, tmp_path, perceivers, argv):
    option = next(part for part in argv if part.startswith("--"))
    code, text, err = run(capsys, *argv, "--model", perceivers, "--out", tmp_path / "x.mid")
    assert code == 2 and text == "" and not (tmp_path / "x.mid").exists()
    assert err.startswith(f"sage-music: error: {option} is an option of SAGE-Music; this checkpoint is PerceiverS")
    assert "--minutes" in err and err.count("\n") == 1


def test_options_of_perceivers_are_refused_elsewhere(capsys, tmp_path):
    for argv in (["--minutes", 1], ["--max-tokens", 9], ["--prompt-seconds", 3, "--bars", 2]):
        code, text, err = run(capsys, "continue", EXAMPLES / "saints.mid", *argv, "--out", tmp_path / "x.mid")
        assert code == 2 and text == "" and not (tmp_path / "x.mid").exists()
        assert f"{argv[0]} is an option of PerceiverS; this checkpoint is SAGE-Music, with --prompt-bars, --bars" in err


def test_generate_several_with_seeds(capsys, tmp_path):
    files = []
    for folder in ("a", "b"):
        options = ["--bars", 2, "--seed", 3, "--num", 2, "--tempo", 100, "--programs", "0,drums"]
        code, text, _ = run(capsys, "generate", *options, "--out", tmp_path / folder / "g.mid", "--json")
        assert code == 0
        files.append([Path(piece["files"][0]) for piece in json.loads(text)["pieces"]])
    assert [file.name for file in files[0]] == ["g-1.mid", "g-2.mid"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    assert files[0][0].read_bytes() != files[0][1].read_bytes()
    assert {program for program, _, _ in notes_of(read_score(files[0][0]))} <= {0, -1}


def test_render(capsys, tmp_path):
    band(bars=1).dump_midi(tmp_path / "a.mid")
    code, text, _ = run(capsys, "render", tmp_path / "a.mid")
    assert code == 0 and "a.wav" in text and "a.png" in text
    assert (tmp_path / "a.wav").read_bytes()[:4] == b"RIFF" and (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"


def test_info_describes_the_bundled_checkpoint(capsys):
    code, text, _ = run(capsys, "info", "--json")
    info = json.loads(text)
    assert code == 0 and list(info["attribute_groups"]) == ["structure", "instrument", "pitch", "velocity", "duration"]
    assert sum(info["token_types"].values()) == info["vocabulary"]
    assert info["cache_bytes_per_token_full_heads"] == info["query_heads"] * info["cache_bytes_per_token"]
    code, text, _ = run(capsys, "info")
    assert "kv routing" in text


def test_info_describes_a_perceivers_checkpoint(capsys, perceivers):
    code, text, _ = run(capsys, "info", "--model", perceivers, "--json")
    info = json.loads(text)
    assert code == 0 and info["family"] == "PerceiverS"
    assert (info["latents"], info["context"], info["refill_length"], info["cross_scales"]) == (32, 256, 16, [None, 12])
    assert sum(info["token_types"].values()) == info["vocabulary"] == 391
    assert info["cross_cache_bytes_per_token"] == 2 * 2 * 32 * 4  # layers, keys and values, channels, bytes
    assert info["latent_cache_bytes"] == 32 * 2 * 32 * 4
    code, text, _ = run(capsys, "info", "--model", perceivers)
    assert "cross scales: all, 12" in text


def test_bench_compares_with_a_stock_llama(capsys):
    few = ("--batch", 1, "--tokens", 4, "--rounds", 1, "--models", "full", "ours")
    code, text, _ = run(capsys, "bench", "--contexts", 64, 128, *few, "--json")
    rows = json.loads(text)["rows"]
    assert code == 0 and [row["context"] for row in rows] == [64, 64, 128, 128]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[3]["cache_ratio"] > 5
    code, text, _ = run(capsys, "bench", "--contexts", 64, *few)
    assert "| 64 | SAGE-Music |" in text


@pytest.mark.parametrize(
    "junk", [b"", b"not music at all", b"MThd\0\0\0\6\0\1\0\0\1\xe0"], ids=["empty", "text", "bare"]
)
def test_wrong_files_end_with_two_and_one_line(capsys, tmp_path, junk):
    path = tmp_path / "junk.mid"
    path.write_bytes(junk)
    for command in ("continue", "render"):
        code, text, err = run(capsys, command, path)
        assert code == 2 and text == ""
        assert err.startswith("sage-music: error:") and "junk.mid" in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junk.mid"]


@pytest.mark.parametrize(
    "argv",
    [
        ["continue", "absent.mid"],
        ["generate", "--model", "no/such/checkpoint"],
        ["generate", "--bars", "2", "--tempo", "9999"],
        ["generate", "--bars", "2", "--time-signature", "four"],
        ["generate", "--bars", "2", "--temperature", "-1"],
        ["generate", "--bars", "2", "--top-p", "nan"],
    ],
    ids=lambda argv: " ".join(argv[-2:]),
)
def test_wrong_arguments_end_with_two(capsys, argv):
    code, _, err = run(capsys, *argv)
    assert code == 2 and err.startswith("sage-music: error:")


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--bars", "0"],
        ["generate", "--programs", "piano"],
        ["generate", "--programs", "300"],
        ["generate", "--minutes", "0"],
        ["generate", "--minutes", "inf"],
        ["generate", "--max-tokens", "0"],
        ["continue", "x.mid", "--prompt-seconds", "-1"],
        [],
    ],
)
def test_the_parser_refuses_nonsense(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_as_a_process_there_is_no_traceback(tmp_path):
    (tmp_path / "x.mid").write_bytes(b"junk")
    run = subprocess.run(
        [sys.executable, "-m", "sage_studio.cli", "render", str(tmp_path / "x.mid")], capture_output=True, text=True
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr and "x.mid" in run.stderr


@pytest.mark.parametrize("command", ["generate", "stream"])
def test_faster_ways_write_music(capsys, tmp_path, command):
    code, text, err = run(
        capsys, command, "--bars", 2, "--int8", "--draft", "--seed", 3, "--out", tmp_path / "a.mid", "--json"
    )
    summary = json.loads(text.splitlines()[-1])
    assert code == 0, err
    assert (summary["pieces"][0] if command == "generate" else summary)["notes"] > 0
    assert read_score(tmp_path / "a.mid").note_num() > 0


def test_drafting_gives_the_same_greedy_music(capsys, tmp_path):
    for name, flags in (("plain", ()), ("draft", ("--draft",))):
        code, *_ = run(capsys, "generate", "--bars", 3, "--temperature", 0, "--out", tmp_path / f"{name}.mid", *flags)
        assert code == 0
    assert (tmp_path / "plain.mid").read_bytes() == (tmp_path / "draft.mid").read_bytes()


def test_faster_ways_are_refused_where_there_are_none(capsys, tmp_path):
    code, _, err = run(capsys, "generate", "--model", "perceivers", "--int8", "--out", tmp_path / "a.mid")
    assert code == 2 and "--int8 is an option of SAGE-Music" in err
