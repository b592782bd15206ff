"""Evaluation as its users meet it: truth scores 100, failures count, runs go on where they stopped."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, band, needs_data, notes_of, tiny_model, tiny_perceivers
from symusic import Note, Score, TimeSignature, Track

from perceivers import PerceiverSTokenizer
from sage_studio.cli import main
from sage_studio.errors import MissingExtraError
from sage_studio.evaluate import (
    CheckpointWriter,
    choose_prompts,
    continuation_scores,
    evaluate_continuations,
    evaluate_likelihood,
    evaluate_sets,
    generated_set,
    measured_set,
    set_overlap,
)
from sage_studio.evaluate.continuation import ANOTHER, REPEATED
from sage_studio.evaluate.pieces import corpus_files, cut_notes, cut_prompt, shuffled
from sage_studio.evaluate.report import markdown_report
from sage_studio.evaluate.sets import HALVES, HUMAN
from sage_studio.evaluate.systems import find_systems, match_files
from sage_studio.metrics.sets import FEATURES
from sage_studio.music.midi import notes_from_score, read_score, write_midi

SMALL = {"prompt_bars": 2, "bars": 2, "workers": 1, "plots": False}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """Six pieces of 6 bars below a, b, one too short and one broken."""
    root = tmp_path_factory.mktemp("pieces")
    for seed in range(6):
        write_midi(root / "ab"[seed % 2] / f"{seed}.mid", band(bars=6, seed=seed, qpm=90 + seed))
    write_midi(root / "a" / "short.mid", band(bars=3))
    (root / "b" / "broken.mid").write_bytes(b"MThd but no more")
    return root


@pytest.fixture(scope="module")
def sage(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("sage") / "best"
    tiny_model(tokenizer, max_position_embeddings=512, initializer_range=0.05).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def performer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("performer") / "best"
    tiny_perceivers(num_hidden_layers=1, num_latents=32, max_position_embeddings=256).save_pretrained(folder)
    PerceiverSTokenizer().save_pretrained(folder)
    return folder


def row(result: dict, system: str) -> dict:
    return next(row for row in result["rows"] if row["system"] == system)


def without_time(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name != "elapsed_s"} for record in records]


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main(["evaluate", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_truth_scores_100_and_what_is_missing_scores_0(pieces, tmp_path):
    truth = tmp_path / "truth"
    for seed in range(4):  # 4 is missing, 5 is unreadable; b/3 is found by its name alone
        where = truth / "ab"[seed % 2] if seed != 3 else truth / "elsewhere"
        write_midi(where / f"{seed}.mid", read_score(pieces / "ab"[seed % 2] / f"{seed}.mid"))
    (truth / "b").mkdir(exist_ok=True)
    (truth / "b" / "5.mid").write_bytes(b"")
    result = evaluate_continuations({"truth": truth}, [pieces], num=9, out=tmp_path / "out", **SMALL)
    found = row(result, "truth")
    assert (found["n"], found["failed"], found["empty"], found["notes_per_second"]) == (6, 2, 0, None)
    assert found["valid"] == pytest.approx(4 / 6)
    # Four pieces of 100 and two of 0.
    assert found["nmsi"]["mean"] == pytest.approx(400 / 6) and found["chroma"]["mean"] == pytest.approx(4 / 6)
    assert found["nmsi_without_failures"]["mean"] == found["nmsi_without_failures"]["low"] == 100
    reasons = {record["piece"]: record["failed"] for record in result["pieces"]["truth"] if record["failed"]}
    assert reasons["a/4.mid"] == "FileNotFoundError: no file continues this piece" and "is empty" in reasons["b/5.mid"]
    assert result["skipped"]["a/short.mid"] == "too short: 3 of 4 bars"
    assert result["skipped"]["b/broken.mid"].startswith("unreadable")
    for name in (ANOTHER, REPEATED):
        assert row(result, name)["kind"] == "reference" and row(result, name)["n"] == 6
        assert 0 < row(result, name)["nmsi"]["mean"] < 90
    pairs = {(pair["a"], pair["b"]): pair for pair in result["differences"]}
    assert set(pairs) == {("truth", ANOTHER), ("truth", REPEATED)}
    mean = found["nmsi"]["mean"] - row(result, ANOTHER)["nmsi"]["mean"]
    assert pairs["truth", ANOTHER]["mean"] == pytest.approx(mean)
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.strip() == markdown_report(result)
    for said in (
        "| truth | 6 | 66.67 [",
        "only 6 of 9 prompts",
        "a/short.mid: too short",
        "truth: b/5.mid",
        "1 (too short)",
    ):
        assert said in text, said
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result


def test_reference_rows_score_loops_and_other_pieces(tmp_path):
    """Both pieces repeat their first two bars: the looped prompt is the truth. The other piece is another."""
    for seed in range(2):
        score = band(bars=2, seed=seed, qpm=100 + 50 * seed)
        for track in score.tracks:
            once = list(track.notes)
            for loop in (1, 2, 3):
                track.notes.extend(Note(n.time + loop * 3840, n.duration, n.pitch, n.velocity) for n in once)
        write_midi(tmp_path / "data" / f"{seed}.mid", score)
    prompts = tmp_path / "prompts"
    options = {**SMALL, "bars": 5, "write_prompts": prompts}
    result = evaluate_continuations([], [tmp_path / "data"], out=tmp_path / "out", **options)
    assert row(result, REPEATED)["nmsi"]["mean"] == pytest.approx(100)
    one, two = (record["nmsi"] for record in result["pieces"][ANOTHER])
    assert one == pytest.approx(two) and one < 90  # the other of two pieces: NMSI is symmetric
    for seed in range(2):  # the very notes of the first two bars, their tempo, and nothing after them
        prompt, whole = read_score(prompts / f"{seed}.mid"), read_score(tmp_path / "data" / f"{seed}.mid")
        assert notes_of(prompt) == [note for note in notes_of(whole) if note[1] < 2 * 192]
        assert prompt.tempos[0].qpm == pytest.approx(100 + 50 * seed)


def test_folders_count_their_own_bars_or_seconds(pieces, tmp_path):
    """The truth at half the tempo is the truth by its own bars, and not by the reference's seconds."""
    files, _ = choose_prompts([pieces], 3, 2, 2)
    scores = {}
    for name, options in {
        "slow": {},
        "alone": {"continuation_only": True},
        "slow, performed": {"performed": True},
        "alone, performed": {"performed": True, "continuation_only": True},
    }.items():

        def write(path, seed, name=name):
            score = read_score(path)
            if name.startswith("slow"):
                for tempo in score.tempos:
                    tempo.mspq *= 2
                return score
            score = score.clip(2 * 1920, score.end())
            return score.shift_time(-2 * 1920)

        records = continuation_scores(write, files, 2, 2, **options)
        assert all(record["failed"] is None and record["elapsed_s"] >= 0 for record in records)
        scores[name] = [record["nmsi"] for record in records]
    assert scores["slow"] == scores["alone"] == [100.0] * 3
    assert scores["alone, performed"] == pytest.approx([100.0] * 3)
    assert max(scores["slow, performed"]) < 95


def test_a_generation_that_fails_or_falls_silent_is_counted(pieces):
    files, _ = choose_prompts([pieces], 3, 2, 2)

    def write(path, seed):
        if path == str(next(iter(files.values()))):
            raise RuntimeError("out of\nmemory")
        return cut_prompt(read_score(path), 2)

    first, second, third = continuation_scores(write, files, 2, 2)
    assert first["failed"] == "RuntimeError: out of memory" and first["nmsi"] == 0 == first["notes"]
    for record in (second, third):  # nothing after the prompt: no failure, but chroma, groove and density of 0
        assert record["failed"] is None and record["notes"] == 0
        assert record["chroma"] == record["groove"] == record["note_density"] == 0


def test_a_run_goes_on_where_it_stopped(pieces, sage, tmp_path):
    def evaluate(**options):
        return evaluate_continuations({"s": sage}, [pieces], out=tmp_path / "out", **{**SMALL, "num": 4, **options})

    first = evaluate()
    (home,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    files = {path: path.read_bytes() for path in home.rglob("*.mid")}
    assert len(files) == 4 and row(first, "s")["failed"] == 0 and row(first, "s")["notes_per_second"] > 0
    lines = (home / "results.jsonl").read_text().splitlines(keepends=True)
    (home / json.loads(lines[0])["midi"]).unlink()
    (home / "results.jsonl").write_text("".join(lines[:2]) + lines[2][:50])  # killed in the third line
    kept = home / json.loads(lines[1])["midi"]
    untouched = kept.stat().st_mtime_ns
    second = evaluate()
    assert kept.stat().st_mtime_ns == untouched
    assert {path: path.read_bytes() for path in home.rglob("*.mid")} == files
    assert without_time(first["pieces"]["s"]) == without_time(second["pieces"]["s"])
    for result in (first, second):
        row(result, "s").pop("notes_per_second")
    assert first["rows"] == second["rows"] and first["differences"] == second["differences"]
    # Fewer prompts are the first of them; other settings, and other weights, are refused by name.
    assert [r["piece"] for r in evaluate(num=2)["pieces"]["s"]] == [r["piece"] for r in first["pieces"]["s"]][:2]
    for options, said in (({"bars": 3}, "bars 2 (now 3)"), ({"temperature": 0.5}, "temperature None (now 0.5)")):
        with pytest.raises(ValueError, match="keeps results of other settings") as caught:
            evaluate(**options)
        assert said in str(caught.value)
    # A reference that has changed is another piece.
    changed = tmp_path / "changed"
    shutil.copytree(pieces, changed)
    for path in changed.rglob("[0-9].mid"):
        write_midi(path, band(bars=6, seed=9))
    other = evaluate_continuations({"s": sage}, [changed], num=4, out=tmp_path / "out", **SMALL)
    assert all(a["nmsi"] != b["nmsi"] for a, b in zip(other["pieces"]["s"], first["pieces"]["s"], strict=True))


def test_other_weights_are_not_taken_for_the_kept_ones(sage, tmp_path, tokenizer):
    copy = shutil.copytree(sage, tmp_path / "model")
    (before,) = find_systems([copy])
    tiny_model(tokenizer, seed=1, max_position_embeddings=512).save_pretrained(copy)
    (after,) = find_systems([copy])
    assert before.fingerprint != after.fingerprint and before.home("x") == after.home("x")
    (elsewhere,) = find_systems([sage])
    assert elsewhere.fingerprint == before.fingerprint and elsewhere.home("x") != before.home("x")


def test_workers_change_nothing(pieces, sage, tmp_path):
    files, _ = choose_prompts([pieces], 3, 2, 2)
    found = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        records = continuation_scores(CheckpointWriter(str(sage), 2, 2), files, 2, 2, 0, out, workers=workers)
        found.append((without_time(records), [(out / record["midi"]).read_bytes() for record in records]))
    assert found[0] == found[1] and len(set(found[0][1])) == 3


def test_both_families_continue_and_are_drawn(capsys, pieces, sage, performer, tmp_path):
    out = tmp_path / "out"
    argv = [
        sage,
        performer,
        "--data",
        pieces,
        "--num",
        2,
        "--prompt-bars",
        2,
        "--bars",
        1,
        "--workers",
        1,
        "--out",
        out,
    ]
    code, text, err = run(capsys, *argv, "--json")
    result = json.loads(text)
    assert code == 0 and err == ""
    labels = [f"{folder.parent.name}/best" for folder in (sage, performer)]  # both are called best
    assert [r["system"] for r in result["rows"]] == [*labels, ANOTHER, REPEATED]
    assert [r["kind"] for r in result["rows"]] == ["sage_music", "perceivers", "reference", "reference"]
    assert all(r["failed"] == 0 and 0 < r["nmsi"]["mean"] < 100 for r in result["rows"])
    assert len(result["differences"]) == 2 + 2 + 1
    names = {"report.md", "report.json", "distributions.png", "self_similarity.png", "piano_rolls.png"}
    assert {Path(file).name for file in result["files"]} == names
    assert all(Path(file).stat().st_size > 500 for file in result["files"])
    # A performance goes on from the reference's bar line, for as long as its bars.
    (settings,) = [s for s in map(json.loads, (p.read_text() for p in out.rglob("settings.json"))) if s["performed"]]
    assert settings["prompt_bars"] == 2
    code, text, _ = run(capsys, *argv)
    assert code == 0 and "| another human piece | 2 |" in text and f"wrote {out / 'report.md'}" in text


def test_prompts_are_chosen_by_seed_from_the_split(tmp_path):
    score = band(bars=4)
    for name in ("x/train/1", "x/test/1", "x/test/2", "x/test/3", "x/validation/1"):
        write_midi(tmp_path / f"{name}.mid", score)
    assert set(corpus_files([tmp_path])) == {"x/test/1.mid", "x/test/2.mid", "x/test/3.mid"}
    assert len(corpus_files([tmp_path], None)) == 5 and set(corpus_files([tmp_path / "x" / "train"])) == {"1.mid"}
    two = corpus_files([tmp_path / "x" / "train", tmp_path / "x" / "test"])
    assert set(two) == {"train/1.mid", "test/1.mid", "test/2.mid", "test/3.mid"}
    assert list(choose_prompts([tmp_path], 3, 2, 2)[0])[:2] == list(choose_prompts([tmp_path], 2, 2, 2)[0])
    keys = [str(index) for index in range(50)]
    assert shuffled(keys, 0) == shuffled(reversed(keys), 0) != shuffled(keys, 1)
    assert sorted(shuffled(keys, 0), key=int) == keys

    silent, late = Score(480), Score(480)
    silent.tracks.append(Track(notes=[Note(2 * 1920, 480, 60, 60), Note(3 * 1920, 480, 60, 60)]))
    late.tracks.append(Track(notes=[Note(0, 480, 60, 60), Note(4 * 1920, 480, 60, 60)]))
    two_meters = band(bars=9)
    two_meters.time_signatures.append(TimeSignature(0, 3, 4))
    for name, made in (("silent", silent), ("late", late), ("meters", two_meters)):
        write_midi(tmp_path / "x" / "test" / f"{name}.mid", made)
    chosen, skipped = choose_prompts([tmp_path], 9, 2, 2)
    assert len(chosen) == 3 and skipped["x/test/silent.mid"] == "its prompt is silent"
    assert skipped["x/test/late.mid"] == "its true continuation is silent"
    assert "two meters at once" in skipped["x/test/meters.mid"]


def test_files_are_matched_by_path_then_by_name(tmp_path):
    for name in ("a/1.mid", "b/2.midi", "c/1.mid", "c/3.mid", "d/3.mid"):
        write_midi(tmp_path / name, band(bars=1))
    files = {name: Path(name) for name in ("a/1.mid", "x/2.mid", "y/3.mid", "z/4.mid", "p/5.mid", "q/5.mid")}
    found = {key: Path(value).relative_to(tmp_path).as_posix() for key, value in match_files(tmp_path, files).items()}
    assert found == {"a/1.mid": "a/1.mid", "x/2.mid": "b/2.midi"}  # 3 is there twice, 4 is not there
    write_midi(tmp_path / "5.mid", band(bars=1))
    assert "p/5.mid" not in match_files(tmp_path, files)  # it could continue either


def test_a_set_against_its_like_and_against_noise(pieces, tmp_path):
    human, like, noise = (tmp_path / name for name in ("human", "like", "noise"))
    rng = np.random.default_rng(0)
    for seed in range(10):
        write_midi(human / f"{seed}.mid", band(bars=4, seed=seed))
        write_midi(like / f"{seed}.mid", band(bars=4, seed=100 + seed))
        score = Score(480)
        notes = [
            Note(int(t), 30, int(p), 99)
            for t, p in zip(rng.integers(0, 7000, 90), rng.integers(0, 128, 90), strict=True)
        ]
        score.tracks.append(Track(notes=notes))
        if seed < 8:
            write_midi(noise / f"{seed}.mid", score)
    (human / "broken.mid").write_bytes(b"no")
    systems = {"like": like, "noise": noise}
    options = {"out": tmp_path / "out", "workers": 1, "half_samples": 3}
    result = evaluate_sets(systems, [human], **options)
    assert set(result["features"]) == {"like", "noise", HALVES} and set(result["features"]["like"]) == {
        *FEATURES,
        "mean",
    }
    means = {label: result["features"][label]["mean"] for label in result["features"]}
    assert means["like"]["oa"] > 0.75 and means[HALVES]["oa"] > 0.7 and means["noise"]["oa"] < 0.5
    assert means["like"]["kld"] < means["noise"]["kld"]
    for found in means.values():
        assert 0 <= found["oa_low"] <= found["oa"] <= found["oa_high"] <= 1
    assert (row(result, HUMAN)["n"], row(result, HUMAN)["failed"]) == (11, 1)
    assert "not a MIDI file" in result["skipped"][f"{HUMAN}: broken.mid"]
    assert row(result, "noise")["figures"]["notes"] == {"mean": 90, "low": 90, "high": 90, "n": 8}
    assert any("unequal (human pieces 10, like 10, noise 8)" in remark for remark in result["remarks"])
    differences = {(pair["a"], pair["figure"]): pair for pair in result["differences"]}
    assert differences["noise", "scale_consistency"]["high"] < 0 or differences["noise", "notes"]["low"] > 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| **mean** |" in text and "1 (unreadable)" in text and "| noise | 8 of 8 | 90.0 [90.0, 90.0] |" in text
    assert {Path(file).name for file in result["files"]} >= {"distributions.png", "figures.png"}
    mgeval = evaluate_sets(systems, [human], **{**options, "mode": "mgeval", "plots": False})
    assert any("as many of each as the smaller" in remark for remark in mgeval["remarks"])


def test_a_set_against_itself_and_constant_features(pieces):
    records = measured_set(sorted(pieces.rglob("[0-9].mid")))
    features = [record["features"] for record in records]
    assert [record["piece"] for record in records] == sorted(record["piece"] for record in records)
    found = set_overlap(features * 4, features * 4, half_samples=2)
    assert found["mean"]["oa"] > 0.95
    same = set_overlap(features[:1] * 5, features[:1] * 5, half_samples=2)
    assert same["PC"]["constant"] and same["PC"]["oa"] == 1 and same["PC"]["kld"] == 0
    gone = set_overlap(features[:1] * 5, features[:1] * 5, "mgeval", half_samples=2)
    assert gone["PC"]["oa"] is None and gone["mean"]["oa"] is None  # mgeval has no number for them
    json.dumps(gone, allow_nan=False)


def test_cutting_evens_the_lengths(tmp_path):
    write_midi(tmp_path / "a.mid", band(bars=8, qpm=120))
    late = Score(480)
    late.tracks.append(Track(notes=[Note(9600, 480, 60, 60)]))  # at 10 s
    write_midi(tmp_path / "late.mid", late)
    cut, silent = measured_set([tmp_path / "a.mid", tmp_path / "late.mid"], cut_s=4)
    notes = notes_from_score(read_score(tmp_path / "a.mid"))
    assert cut["figures"]["notes"] == (notes["onset_s"] < 4).sum() and cut["figures"]["music_s"] <= 4
    assert silent["failed"] == "it is silent for its first 4 s" and "features" not in silent
    kept = cut_notes(notes, 4)
    assert (kept["onset_s"] + kept["duration_s"]).max() <= 4 and cut_notes(notes, None) is notes


def test_unprompted_pieces_are_kept_and_gone_on_with(capsys, pieces, performer, tmp_path):
    out = tmp_path / "out"
    argv = [performer, "--task", "set", "--data", pieces, "--num", 6, "--seconds", 3, "--half-samples", 2]
    argv += ["--workers", 1, "--no-plots", "--out", out, "--json"]
    code, text, err = run(capsys, *argv)
    assert code == 0, err
    first = json.loads(text)
    files = sorted(out.rglob("*.mid"))
    assert len(files) == 6 and row(first, "best")["n"] == 6 and row(first, HUMAN)["failed"] == 1
    failed = [record for record in first["pieces"]["best"] if record["failed"]]  # random weights fall silent
    assert row(first, "best")["failed"] == len(failed) and len(first["skipped"]) == len(failed) + 1
    data = [path.read_bytes() for path in files]
    files[1].unlink()
    untouched = files[0].stat().st_mtime_ns
    code, text, _ = run(capsys, *argv)
    assert [path.read_bytes() for path in files] == data and files[0].stat().st_mtime_ns == untouched
    assert json.loads(text) == first
    code, _, err = run(capsys, *argv, "--seconds", 4)
    assert code == 2 and "music_s 3.0 (now 4.0)" in err


def test_a_set_that_cannot_be_written_says_why(tmp_path):
    def write(path, seed):
        raise ValueError("no music today")

    records = generated_set(write, 2, out=tmp_path)
    assert [record["failed"] for record in records] == ["ValueError: no music today"] * 2


def test_likelihood_of_a_model_that_knows_nothing(pieces, tmp_path, tokenizer):
    """All weights 0: every token costs log V, in both families, and so does the row of all tokens alike."""
    sizes = {}
    for name, model, own in (
        ("sage", tiny_model(tokenizer), tokenizer),
        ("performer", tiny_perceivers(), PerceiverSTokenizer()),
    ):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
        sizes[name] = own.vocab_size
    systems = [tmp_path / "sage", tmp_path / "performer"]
    result = evaluate_likelihood(systems, [pieces], out=tmp_path / "out", workers=1)
    for name, size in sizes.items():
        found = row(result, name)
        assert found["nats_per_token"]["mean"] == pytest.approx(math.log(size), abs=1e-5)
        assert found["nats_per_note"]["mean"] == pytest.approx(math.log(size) * found["tokens"] / found["notes"])
        alike = row(result, f"all tokens alike ({name}'s tokens)")
        assert alike["nats_per_note"]["mean"] == pytest.approx(found["nats_per_note"]["mean"])
        assert alike["nats_per_note"]["low"] == pytest.approx(found["nats_per_note"]["low"], abs=1e-4)
        frequent = row(result, f"token frequencies ({name}'s tokens)")
        assert 1 < frequent["nats_per_token"]["mean"] < alike["nats_per_token"]["mean"]
    assert row(result, "sage")["n"] == 8 and row(result, "sage")["failed"] == 1  # of 8 pieces one is broken
    assert any(key.startswith("performer: b/broken") for key in result["skipped"])
    assert [(pair["a"], pair["b"], pair["n"]) for pair in result["differences"]] == [("sage", "performer", 7)]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| sage | 7 of 8 |" in text and "do not spell the same notes" in text


def test_likelihood_is_the_models_own_and_is_kept(sage, tmp_path, tokenizer):
    piece = tmp_path / "data" / "1.mid"
    write_midi(piece, band(bars=3))
    options = {"out": tmp_path / "out", "workers": 1, "plots": False}
    first = evaluate_likelihood({"s": sage}, [piece.parent], **options)
    from sage_studio.checkpoints import load

    ids = torch.tensor([[*tokenizer.midi_to_ids(piece), tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = load(sage)[0](ids).logits[0, :-1]
    nats = float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert row(first, "s")["nats_per_note"]["mean"] == pytest.approx(nats / band(bars=3).note_num(), rel=1e-4)
    assert row(first, "s")["tokens"] == ids.shape[1] - 1
    assert evaluate_likelihood({"s": sage}, [piece.parent], **options) == first
    with pytest.raises(ValueError, match=r"window 1024 \(now 64\)"):
        evaluate_likelihood({"s": sage}, [piece.parent], window=64, **options)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{empty}", "--data", "{pieces}"], "neither a checkpoint"),
        (["{pieces}/a/0.mid", "--data", "{pieces}"], "not one file"),
        (["no/such/checkpoint", "--data", "{pieces}"], "no such folder"),
        (["{pieces}", "{pieces}", "--data", "{pieces}"], "given twice"),
        (["--data", "{pieces}"], "name a checkpoint or a folder"),
        (["{pieces}", "--data", "{empty}"], "no .mid or .midi file"),
        (["{pieces}", "--data", "{pieces}", "--bars", "99"], "0 of 8 pieces can be used"),
        (["{pieces}", "--data", "{pieces}", "--bars", "0"], "bars is 0"),
        (["{pieces}", "--data", "{pieces}", "--num", "0"], "num is 0"),
        (["{pieces}", "--data", "{pieces}", "--mode", "mgeval"], "--mode is an option of --task set"),
        (["{pieces}", "--data", "{pieces}", "--task", "set", "--prompt-bars", "2"], "--prompt-bars is an option of"),
        (["{pieces}", "--data", "{pieces}", "--cut-seconds", "2"], "--cut-seconds is an option of --task set"),
        (["{pieces}", "--data", "{pieces}", "--task", "set", "--cut-seconds", "-1"], "cut_s is -1"),
        (["{pieces}", "--data", "{pieces}", "--task", "set", "--references", "2"], "references is 2"),
        (["{pieces}/a", "--data", "{pieces}/short", "--task", "set"], "1 human"),
        (["{pieces}", "--data", "{pieces}", "--task", "likelihood"], "likelihood takes checkpoints"),
    ],
    ids=lambda value: None if isinstance(value, list) else value,
)
def test_bad_input_is_named_in_one_line(capsys, tmp_path, pieces, argv, said):
    (tmp_path / "empty").mkdir()
    if "{pieces}/short" in argv:
        write_midi(tmp_path / "short" / "1.mid", band(bars=1))
        argv = [part.replace("{pieces}/short", str(tmp_path / "short")) for part in argv]
    argv = [part.format(empty=tmp_path / "empty", pieces=pieces) for part in argv]
    if "--task" not in argv and "--bars" not in argv:
        argv += ["--bars", "2", "--prompt-bars", "2"]
    code, text, err = run(capsys, *argv, "--workers", "1", "--no-plots", "--out", tmp_path / "out")
    assert code == 2 and text == "" and err.startswith("sage-music: error:") and err.count("\n") == 1, err
    assert said in err
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_command_line_loads_no_torch_for_its_options():
    code = "import sys, sage_studio.cli; sage_studio.cli.build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_and_labels_are_checked(pieces):
    files, _ = choose_prompts([pieces], 2, 2, 2)
    with pytest.raises(ValueError, match="workers is 0"):
        continuation_scores(lambda path, seed: read_score(path), files, 2, 2, workers=0)
    with pytest.raises(ValueError, match="as a reference row is"):
        evaluate_continuations({ANOTHER: pieces}, [pieces], **SMALL)


def test_a_missing_plot_library_is_said_before_the_work(monkeypatch, pieces, sage, tmp_path):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    options = {**SMALL, "plots": True, "out": tmp_path / "out"}
    with pytest.raises(MissingExtraError, match="pip install 'matplotlib>="):
        evaluate_continuations([sage], [pieces], **options)
    assert not (tmp_path / "out").exists()


@needs_data()
@pytest.mark.data
def test_real_pieces_lie_between_the_references(tmp_path):
    """The truth is above a real piece's own prompt repeated, which is above another piece."""
    data = [DATA / "multitrack", DATA / "piano"]
    options = {"num": 24, "bars": 8, "out": tmp_path / "out", "workers": 1, "plots": False}
    result = evaluate_continuations({"truth": DATA / "multitrack" / "test"}, data, **options)
    assert 100 > row(result, REPEATED)["nmsi"]["low"] > row(result, ANOTHER)["nmsi"]["high"] > 5
    assert row(result, "truth")["nmsi_without_failures"]["mean"] == 100
    kinds = {record["piece"].split("/")[0] for record in result["pieces"]["truth"]}
    assert kinds == {"multitrack", "piano"}
    assert row(result, "truth")["failed"] == sum(r["piece"].startswith("piano") for r in result["pieces"]["truth"])
