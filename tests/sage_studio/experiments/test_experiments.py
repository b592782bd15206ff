"""Studies end to end on small folders with the real Trainer: reports, resuming, honest numbers; those declared."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import band
from symusic import Score

from sage_music import SageMusicTokenizer
from sage_studio.cli import main
from sage_studio.experiments import STUDIES
from sage_studio.experiments.measures import measured
from sage_studio.experiments.report import interval, report, summary
from sage_studio.experiments.runner import run
from sage_studio.experiments.study import Arm, Claim, Scale, Study, StudyError, runs_of
from sage_studio.experiments.training import arguments, corpus_files, prepare, train
from sage_studio.train.arguments import parse
from sage_studio.train.command import main as train_command
from sage_studio.train.parts import family_named, new_fields

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 4, "block_size": 96, "context": 256}
SHAPE |= {"steps": 2, "batch_size": 2, "warmup": 1, "eval_every": 1, "eval_pieces": 1}
STUDY = Study(
    name="small",
    title="A small study",
    claim="A claim.",
    baseline="full",
    arms={
        "full": Arm({"kv_routing": "none", "num_key_value_heads": 4}),
        "routed": Arm({"kv_routing": "token", "num_key_value_heads": 1}),
    },
    scales={
        "smoke": Scale(
            seeds=2,
            options=SHAPE,
            measures={
                "likelihood": {"pieces": 2},
                "continuation": {"prompts": 2, "bars": 1, "prompt_bars": 1},
                "decoding": {"context": 16, "tokens": 3, "rounds": 1},
            },
        )
    },
    claims=(Claim("routed", "nmsi", "NMSI", "-0.4 %"), Claim("routed", "speed", "speed", "+30 %")),
    findings={"smoke": ["Nothing can be concluded from two steps."]},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed, split in enumerate(("train", "train", "validation", "test", "test")):
        folder = root / "multitrack" / split
        folder.mkdir(parents=True, exist_ok=True)
        band(bars=4, seed=seed).dump_midi(folder / f"{seed}.mid")
    for seed, split in enumerate(("train", "validation", "test", "test", "test", "test")):
        folder = root / "piano" / split
        folder.mkdir(parents=True, exist_ok=True)
        band(bars=4, seed=seed).dump_midi(folder / f"{seed}.mid")
    return root


@pytest.fixture(scope="module")
def studied(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    return run(STUDY, "smoke", data, root / "runs", root / "results", workers=1), root


def test_a_study_leaves_tables_beside_the_papers_claims_and_a_picture(studied):
    result, root = studied
    text, kept, picture = (root / "results" / f"experiment-small-smoke{end}" for end in (".md", ".json", ".png"))
    shown = text.read_text()
    assert "| **full** |" in shown and "| routed |" in shown and "Nothing can be concluded" in shown
    claims = [line for line in shown.splitlines() if line.startswith("| routed | NMSI | -0.4 %")]
    assert len(claims) == 1 and claims[0].count("%") == 2  # the paper's figure and ours
    kept = json.loads(kept.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG") and result["files"] == [
        str(text),
        str(text.with_suffix(".json")),
        str(picture),
    ]
    for row in kept["summary"].values():
        assert row["nats_per_note"]["low"] <= row["nats_per_note"]["mean"] <= row["nats_per_note"]["high"]
        assert len(row["nmsi"]["seeds"]) == 2 and row["failed"] == 0
    assert kept["summary"]["full"]["cache"] == 1 and kept["summary"]["routed"]["cache"] == pytest.approx(1 / 4)
    assert "difference" not in kept["summary"]["full"]["nmsi"]


def test_a_study_goes_on_from_what_is_there(studied, data):
    result, root = studied
    folder = sorted((root / "runs").glob("multitrack-*-seed1"))[0]
    weights = {path: path.stat().st_mtime_ns for path in (root / "runs").glob("*/best/model.safetensors")}
    assert len(weights) == 4
    before = (folder / "measures.jsonl").read_text().splitlines(keepends=True)
    (folder / "measures.jsonl").write_text(before[1] + before[0][:50])  # killed while likelihood was written
    again = run(STUDY, "smoke", data, root / "runs", root / "again", workers=1)
    assert {path: path.stat().st_mtime_ns for path in weights} == weights  # nothing was trained again
    # And what was missing was measured again, alike.
    assert (folder / "measures.jsonl").read_text().splitlines(keepends=True)[2:] == before[:1]
    assert again["runs"] == result["runs"] and again["decoding"] == result["decoding"]


def test_an_interrupted_training_goes_on(data, tmp_path):
    one = runs_of(STUDY, "smoke", tmp_path)[0]
    command = arguments(one, data, tmp_path / "cache")
    command[command.index("--max_steps") + 1] = "1"
    assert train_command(command) == 0
    (one.folder / "report.json").unlink()  # as a run that was killed after its first step leaves it
    assert (one.folder / "checkpoint-1").is_dir()
    train(one, data, tmp_path / "cache")
    assert json.loads((one.folder / "report.json").read_text())["steps"] == 2
    log = (one.folder / "train.log").read_text()
    assert log.count("'eval_nats_per_note'") == 1  # after step 2; step 1 was not done again
    assert not list(one.folder.glob("checkpoint-*")) and one.checkpoint.is_dir()


def test_a_failed_training_names_its_log(data, tmp_path):
    arms = {"a": Arm({"num_key_value_heads": 3, "kv_routing": "none"})}
    wrong = Study("wrong", "", "", arms, "a", {"smoke": Scale(1, SHAPE, {})})
    with pytest.raises(StudyError, match=r"'a' \(seed 0\) ended with code 2: see .*train\.log"):
        run(wrong, "smoke", data, tmp_path, None, workers=1)


def test_wrong_input_is_named(data, tmp_path, capsys):
    with pytest.raises(ValueError, match="no scale 'huge': it has smoke"):
        run(STUDY, "huge", data, tmp_path)
    command = ["experiment", "segmentation", "--scale", "smoke", "--data", str(tmp_path), "--runs", str(tmp_path)]
    assert main(command) == 2
    assert "piano: no such folder" in capsys.readouterr().err


def test_a_corpus_has_the_files_of_allowed_licences_by_split(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    rows = ["path,licence", *(f"multitrack/{name},MIT" for name in ("train/0.mid", "validation/2.mid", "test/3.mid"))]
    (tmp_path / "metadata.csv").write_text("\n".join([*rows, "multitrack/test/4.mid,GPL-3.0", ""]))
    found = corpus_files(tmp_path, "multitrack")
    assert {name: [path.name for path in paths] for name, paths in found.items()} == {
        "train": ["0.mid"],
        "validation": ["2.mid"],
        "test": ["3.mid"],
    }
    assert [path.name for path in corpus_files(tmp_path, "piano")["test"]] == ["2.mid", "3.mid", "4.mid", "5.mid"]


def test_a_vocabulary_is_learned_once_from_the_corpus(data, tmp_path):
    study = Study("bpe", "", "", {"bpe": Arm({"bpe": 780})}, "bpe", {"smoke": Scale(1, SHAPE, {})})
    runs, cache = runs_of(study, "smoke", tmp_path), tmp_path / "cache"
    prepare(runs, data, cache)
    folder = cache / "bpe-multitrack-780"
    assert SageMusicTokenizer.from_pretrained(folder).vocab_size == 780
    written = (folder / "tokenizer_config.json").stat().st_mtime_ns
    prepare(runs, data, cache)
    assert (folder / "tokenizer_config.json").stat().st_mtime_ns == written


def test_pieces_from_nothing_are_compared_with_human_ones(data, tmp_path):
    """A PerceiverS arm: music in one batch, features of both sets, repetition over time; and its report."""
    shape = {"family": "perceivers", "hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 4}
    shape |= {"context": 96, "num_latents": 32, "steps": 1, "batch_size": 2, "warmup": 1, "eval_every": 1}
    study = Study(
        name="written",
        title="Written",
        claim="A claim.",
        baseline="one",
        arms={
            "one": Arm({"cross_scales": (None,)}, "piano"),
            "two": Arm({"cross_scales": (None, 48), "scale_mask": "static"}, "piano"),
        },
        scales={"smoke": Scale(1, shape, {"likelihood": {"pieces": 1}, "sets": {"pieces": 3, "tokens": 90}})},
        claims=(Claim("two", "repeated_late", "repetition", "rare"),),
    )
    result = run(study, "smoke", data, tmp_path / "runs", tmp_path / "results", workers=1)
    for one in result["runs"]:
        sets = one["sets"]
        assert (sets["written"], sets["human"]) == (3, 4) and np.shape(sets["repeated"]) == (3, 64)
        assert 0 <= sets["features"]["mean"]["oa"] <= 1 and len(sets["halves"]) == 14
    files = sorted((tmp_path / "runs").glob("*/from-nothing/3-90/*.mid"))
    assert len(files) == 6 and all(path.read_bytes().startswith(b"MThd") for path in files)
    shown = (tmp_path / "results" / "experiment-written-smoke.md").read_text()
    assert "| PCH/seg |" in shown and "| two | repetition | rare |" in shown
    assert "OA of human halves (n 4)" in shown
    # A piece without a note ends no study: it is counted, and the others are measured.
    folder = files[0].parents[2]
    Score(480).dump_midi(folder / "from-nothing" / "3-90" / "000.mid")
    (folder / "measures.jsonl").unlink()
    run(study, "smoke", data, tmp_path / "runs", tmp_path / "results", workers=1)
    found = json.loads((tmp_path / "results" / "experiment-written-smoke.json").read_text())["summary"]
    assert sorted(row["failed"] for row in found.values()) == [0, 1]
    assert sorted(row["oa"]["n"] for row in found.values()) == [2, 3]
    assert sorted(row["repeated_late"]["n"] for row in found.values()) == [2, 3]


def test_compound_tokens_are_an_arm_like_others(data, tmp_path):
    measures = {"likelihood": {"pieces": 2}, "continuation": {"prompts": 1, "bars": 1, "prompt_bars": 1}}
    measures["writing"] = {"prompts": 2, "bars": 3, "rounds": 1, "prompt_bars": 1}
    compound = STUDIES["pooling"].arms["compound tokens"]
    study = Study("pooled", "", "", {"pooled": compound}, "pooled", {"smoke": Scale(1, SHAPE, measures)})
    result = run(study, "smoke", data, tmp_path, None, workers=1)
    (one,) = result["runs"]
    assert one["continuation"]["pieces"][0]["failed"] is None
    scored = one["likelihood"]["pieces"]
    assert all(2 < record["nats"] / record["notes"] < 60 for record in scored)
    # Notes and flat tokens, whatever the model's own positions are.
    tokenizer = SageMusicTokenizer()
    for record in scored:
        ids = tokenizer.midi_to_ids(data / "multitrack" / "test" / record["piece"])
        assert record["tokens"] == len(ids) and record["notes"] == 4 * 17
    assert result["writing"]["pooled"]["notes_per_second"] > 0


def test_pieces_that_cannot_be_used_are_counted_and_named(tmp_path):
    """Flat and compound arms over test pieces of the same name, one too short for a prompt and one that is broken."""
    data = tmp_path / "data"
    files = ("train/0.mid", "validation/1.mid", "test/a/piece.mid", "test/b/piece.mid", "test/short.mid")
    for seed, name in enumerate(files):
        path = data / "multitrack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        band(bars=1 if "short" in name else 4, seed=seed).dump_midi(path)
    (data / "multitrack" / "test" / "broken.mid").write_bytes(b"MThd")
    measures = {"likelihood": {"pieces": 0}, "continuation": {"prompts": 5, "bars": 2, "prompt_bars": 1}}
    arms = {"flat": STUDY.arms["full"], "pooled": STUDIES["pooling"].arms["compound tokens"]}
    study = Study("counted", "", "", arms, "flat", {"smoke": Scale(1, SHAPE | {"context": 2048}, measures)})
    result = run(study, "smoke", data, tmp_path / "runs", tmp_path / "results", workers=1)
    for one in result["runs"]:
        failed = {record["piece"]: record["failed"] for record in one["likelihood"]["pieces"]}
        assert set(failed) == {"a/piece.mid", "b/piece.mid", "short.mid", "broken.mid"}
        assert "unreadable" in failed.pop("broken.mid") and set(failed.values()) == {None}
        assert {record["piece"] for record in one["continuation"]["pieces"]} == {"a/piece.mid", "b/piece.mid"}
    found = json.loads((tmp_path / "results" / "experiment-counted-smoke.json").read_text())
    assert set(found["skipped"]["multitrack"]) == {"short.mid", "broken.mid"}
    for row in found["summary"].values():
        assert (row["nats_per_note"]["n"], row["nmsi"]["n"], row["failed"]) == (3, 2, 1)
    shown = (tmp_path / "results" / "experiment-counted-smoke.md").read_text()
    assert "short.mid (multitrack: too short: 1 of 3 bars)" in shown and "| nats per note | n |" in shown
    # Other options are measured beside what is kept.
    one = runs_of(study, "smoke", tmp_path / "runs")[0]
    shorter = measured(one, "continuation", data, measures["continuation"] | {"bars": 1})
    assert len(shorter["pieces"]) == 2
    assert {path.name for path in (one.folder / "music").iterdir()} == {"1-1", "1-2"}


def test_a_missing_extra_is_said_before_the_work(monkeypatch, data, tmp_path, capsys):
    command = ["experiment", "as-kvhs", "--scale", "smoke", "--data", str(data), "--runs", str(tmp_path / "runs")]
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert all(f"'{name}>=" in error for name in ("accelerate", "datasets", "tensorboard", "matplotlib"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_is_a_command_that_training_takes(name, data, tmp_path):
    study = STUDIES[name]
    assert set(study.scales) == {"smoke", "cpu", "gpu"} and study.baseline in study.arms
    for claim in study.claims:
        assert claim.arm in study.arms
    for scale in study.scales:
        seen = set()
        for one in runs_of(study, scale, tmp_path):
            model, _, _, args = parse(arguments(one, data, tmp_path), family_named)
            assert args.max_steps == one.options["steps"]
            config = family_named(model.model).classes[0].config_class()
            assert all(hasattr(config, name) for name in new_fields(model.model))
            seen.add(one.folder)
        assert len(seen) == len(study.arms) * study.scales[scale].seeds  # no two arms are the same model


def test_studies_share_the_runs_they_have_in_common(tmp_path):
    def folders(name, arm):
        return {one.folder for one in runs_of(STUDIES[name], "cpu", tmp_path) if one.arm == arm}

    assert folders("as-kvhs", "full heads") == folders("pooling", "one token per attribute")
    assert folders("segmentation", "effective") == folders("multi-scale", "no second scale")


def records(nats, nmsi):
    """A run's records of two pieces of 10 notes."""
    return {
        "likelihood": {
            "pieces": [
                {"piece": str(i), "failed": None, "nats": v, "notes": 10, "tokens": 40} for i, v in enumerate(nats)
            ]
        },
        "continuation": {"pieces": [{"piece": str(i), "failed": None, "nmsi": v} for i, v in enumerate(nmsi)]},
        "parameters": 5,
        "train_elapsed_s": 60,
    }


def test_summary_of_numbers_known_by_hand():
    result = {
        "runs": [
            {"arm": "full", "seed": 0, **records((100, 60), (50, 70))},
            {"arm": "full", "seed": 1, **records((110, 70), (50, 70))},
            {"arm": "routed", "seed": 0, **records((110, 66), (40, 60))},
            {"arm": "routed", "seed": 1, **records((121, 77), (40, 60))},
        ],
        "decoding": {
            "full": {"token_s": 2.0, "cache_bytes": {"used": 100.0}},
            "routed": {"token_s": 1.0, "cache_bytes": {"used": 25.0}},
        },
    }
    found = summary(STUDY, result)
    # full: (10 + 6)/2 = 8 and (11 + 7)/2 = 9 nats a note; routed: 8.8 and 9.9.
    assert found["full"]["nats_per_note"]["mean"] == pytest.approx(8.5)
    assert found["full"]["nats_per_note"]["seeds"] == pytest.approx([8.0, 9.0])
    # 9.35 against 8.5 is 10 % more; by piece and seed 1.0, 0.6, 1.1, 0.7 of 8.5.
    change = found["routed"]["nats_per_note"]["difference"]
    assert change["mean"] == pytest.approx(10.0)
    assert 100 * 0.59 / 8.5 < change["low"] < change["mean"] < change["high"] < 100 * 1.11 / 8.5
    # NMSI falls by 10 of 60 on every piece: no spread at all.
    change = found["routed"]["nmsi"]["difference"]
    assert [change[name] for name in ("mean", "low", "high")] == pytest.approx([-100 / 6] * 3)
    assert found["routed"]["speed"] == 2.0 and found["routed"]["cache"] == 0.25
    assert found["routed"]["tokens_per_note"] == 4.0 and found["full"]["train_hours"] == pytest.approx(120 / 3600)
    options = {"options": {}, "sizes": {}, "study": "small", "scale": "smoke", "skipped": {}}
    shown = report(STUDY, result | options | {"machine": MACHINE}, found, "picture.png")
    assert (
        "| routed | NMSI | -0.4 % | -16.7 % [-16.7, -16.7] |" in shown
        and "| routed | speed | +30 % | +100 % |" in shown
    )


def test_only_pieces_that_both_could_score_are_compared():
    """The second piece failed in one run: differences are over the first, and nothing stands in for it."""
    runs = [
        {"arm": "full", "seed": 0, **records((100, 60), (50, 70))},
        {"arm": "routed", "seed": 0, **records((110, 0), (40, 60))},
    ]
    runs[1]["likelihood"]["pieces"][1] |= {"failed": "unreadable", "notes": 0, "tokens": 0}
    found = summary(STUDY, {"runs": runs})
    assert (found["full"]["nats_per_note"]["n"], found["routed"]["nats_per_note"]["n"]) == (2, 1)
    assert found["full"]["nats_per_note"]["mean"] == pytest.approx(8.0)
    assert found["routed"]["nats_per_note"]["mean"] == pytest.approx(11.0)
    assert found["routed"]["nats_per_note"]["difference"]["mean"] == pytest.approx(10.0)  # 11 against 10, not 8
    assert (found["full"]["failed"], found["routed"]["failed"]) == (0, 1)
    assert found["routed"]["tokens_per_note"] == 4.0


def test_what_is_undefined_is_said_so():
    """An Overlap Area that one of two seeds has not, and a baseline of 0: no mean and no per cent."""
    runs = []
    for arm, seed, oa in (("full", 0, 0.5), ("full", 1, None), ("routed", 0, 0.6), ("routed", 1, 0.7)):
        features = {"mean": {"oa": oa, "oa_low": None, "oa_high": None}}
        sets = {"written": 2, "human": 4, "failed": [], "features": features, "repeated": [[0.0] * 64] * 2}
        one = records((100, 60), (0, 0) if arm == "full" else (40, 60))
        runs.append({"arm": arm, "seed": seed, **one, "sets": sets})
    found = summary(STUDY, {"runs": runs})
    assert found["full"]["oa"]["mean"] is None and found["full"]["oa"]["seeds"] == [0.5, None]
    assert found["routed"]["oa"]["mean"] == pytest.approx(0.65)
    nothing = {"mean": None, "low": None, "high": None}
    assert found["routed"]["oa"]["difference"] == found["routed"]["nmsi"]["difference"] == nothing
    assert found["routed"]["repeated_late"]["difference"]["mean"] == 0
    del runs[0]["sets"]  # the tables of features are not what is asked for here
    options = {"options": {}, "sizes": {}, "study": "small", "scale": "smoke", "skipped": {}}
    line = next(
        line
        for line in report(STUDY, {"runs": runs, **options, "machine": MACHINE}, found, "x.png").splitlines()
        if line.startswith("| routed |")
    )
    assert "| 50.00 [40.00, 60.00] | 2 | undefined | 0.65 [0.60, 0.70] | 2 | undefined |" in line
    json.dumps(found, allow_nan=False)


MACHINE = {"cores": 2, "threads": 2, "torch": "2"}


def test_intervals_hold_what_seeds_add():
    """Pieces that agree and seeds that do not: the interval is as wide as the seeds are apart."""
    found = interval(np.array([[1.0] * 50, [2.0] * 50, [3.0] * 50]))
    assert found["mean"] == 2.0 and found["low"] < 1.4 and found["high"] > 2.6
