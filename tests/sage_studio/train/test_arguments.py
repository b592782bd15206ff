"""The command's options: ours and all of Transformers', defaults by family, no contradiction by defaults."""

import re
import shlex
from pathlib import Path

import pytest

from sage_studio.families import FAMILIES, SAGE_MUSIC, bundled
from sage_studio.train.arguments import parse


def parsed(text: str, family=SAGE_MUSIC):
    return parse(text.split(), lambda model: family)


def test_every_training_argument_is_taken_in_both_spellings(tmp_path):
    text = f"--data a b --output {tmp_path} --learning-rate 0.5 --max_grad_norm 3 --dataloader-num-workers 2 --bf16"
    model, data, watch, args = parsed(text)
    assert (args.learning_rate, args.max_grad_norm, args.dataloader_num_workers, args.bf16) == (0.5, 3, 2, True)
    assert data.data == ["a", "b"] and args.output_dir == str(tmp_path) and model.model == "sage-music"
    assert watch.sample_steps is None
    assert parsed(f"--data a --output={tmp_path}")[3].output_dir == str(tmp_path)


def test_defaults_are_the_familys_and_what_is_given_comes_first(tmp_path):
    for family in FAMILIES.values():
        args = parsed(f"--data a --output {tmp_path}", family)[3]
        assert all(getattr(args, name) == value for name, value in family.recipe.items())
        assert args.train_sampling_strategy == "sequential" and args.metric_for_best_model == "nats_per_note"
        assert parsed(f"--data a --output {tmp_path} --learning_rate 7", family)[3].learning_rate == 7


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--num_train_epochs 2", {"max_steps": -1, "num_train_epochs": 2}),
        ("--num_train_epochs 2 --max_steps 5", {"max_steps": 5}),
        ("--eval_steps 30", {"eval_steps": 30, "save_steps": 30}),
        ("--save-steps 30", {"eval_steps": 30, "save_steps": 30}),
        ("--max_steps 40", {"eval_steps": 40, "save_steps": 40, "warmup_steps": 4}),
        ("--eval_strategy no", {"load_best_model_at_end": False, "save_strategy": "steps"}),
        ("--eval_strategy epoch", {"save_strategy": "epoch", "load_best_model_at_end": True}),
        ("--save_strategy best", {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "best"}),
        ("--max_steps 5 --max_steps 50", {"max_steps": 50, "eval_steps": 50}),
        ("--save_strategy no", {"load_best_model_at_end": False, "eval_strategy": "steps"}),
    ],
)
def test_one_argument_alone_does_not_contradict_a_default(tmp_path, given, expected):
    args = parsed(f"--data a --output {tmp_path} {given}")[3]
    for name, value in expected.items():
        got = getattr(args, name)
        assert getattr(got, "value", got) == value, name


def test_unknown_and_missing_arguments_end_the_command(tmp_path, capsys):
    for text, word in ((f"--data a --output {tmp_path} --lerning_rate 1", "--lerning_rate"), ("--data a", "output")):
        with pytest.raises(SystemExit) as ended:
            parsed(text)
        assert ended.value.code == 2 and word in capsys.readouterr().err


def test_help_has_both_kinds(capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--help")
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "--track_dropout" in text and "--fsdp_config" in text


ROOT = Path(__file__).resolve().parents[3]
PAGES = ["README.md", "docs/training.md", "model_cards/sage-music-6m.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_pages_is_taken(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in (["sage-music", "train"], ["-m", "sage_studio.train"]):
                for index in range(len(words)):
                    if words[index : index + 2] == start and "..." not in words:
                        commands.append(words[index + 2 :])
    assert commands
    for argv in commands:
        model, data, _, args = parse(argv, lambda model: bundled(model) or SAGE_MUSIC)
        assert data.data and args.output_dir and model.model
