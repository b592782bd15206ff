"""What a family of models is: names, checkpoint, unit of length, options, and where its code lies.

from sage_studio.families import FAMILIES, family_of
family = family_of(model)                        # also of a config, or of a model_type
plan = family.load("plan")(model, tokenizer, "prompt.mid", seed=0)

This file imports neither torch nor another module of ours: code is named by a dotted path, and loaded on use. It is the
only one that compares `model_type`.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option of a continuation.

    Attributes:
        kind: `count` (a whole number from 1), `number`, `flag`, `programs` or `mapping`.
        nullable: whether None may be given.
        flag: its name on the command line, without the dashes; the option's own by default.
    """

    kind: str
    nullable: bool = False
    flag: str | None = None


@dataclass(frozen=True)
class Family:
    """One family of models. A field that is a path, `package.module:name`, is loaded by `load`.

    Attributes:
        model_type: of its configs; also the name of its package.
        name: as texts say it; `plays`: what it is like, in two words.
        prefix: of its classes: `SageMusic` in `SageMusicForCausalLM`.
        paper: number on arXiv.
        checkpoint: short name of the bundled checkpoint; `folder`: where it lies, from its package on; `license`: of
            its weights; `distribution`: the package that has them, where that is not this one.
        unit: what its music is counted in, `bars` or `seconds`.
        prompt_length, length: the options that say how much of a prompt is heard, and how much is written.
        options: of a continuation, beside those that both families have.
        flags: options of the command line that only this family has, beside `options`.
        plan, begin: what makes a plan (`generation.result.Plan`) of a continuation, and of a piece from nothing.
        together: writes several plans at once.
        grammar: the processor that keeps generation to the grammar.
        summary: what `sage-music info` says of a model.
        parts: what training is made of; `recipe`: its defaults of `TrainingArguments`; `eval_pieces`: pieces that it
            evaluates on; `windows`: items in which each token of a piece is predicted once, and what makes batches.
        example: the prompt of an export's samples; `sample`: the options of its continuation.
        tags: of a model card; `about`: what a card says of it; `limits`: what it cannot do; `widget`: a beginning.
    """

    model_type: str
    name: str
    plays: str
    prefix: str
    paper: str
    checkpoint: str
    folder: str
    license: str
    distribution: str | None
    unit: str
    prompt_length: str
    length: str
    options: dict[str, Option]
    flags: tuple[str, ...]
    plan: str
    begin: str
    together: str
    grammar: str
    summary: str
    parts: str
    windows: str
    recipe: dict[str, Any]
    eval_pieces: int
    example: str
    sample: dict[str, Any]
    tags: tuple[str, ...]
    about: str
    limits: str
    widget: str

    @property
    def counts_bars(self) -> bool:
        """Whether its music is counted in bars, not in seconds."""
        return self.unit == "bars"

    @property
    def command_line(self) -> dict[str, str]:
        """Options of the command line that only this family has: the argument of its functions that each one is."""
        own = {option.flag or name: name for name, option in self.options.items()}
        return own | {name: name for name in self.flags}

    def given(self, args: Any) -> dict[str, Any]:
        """Those of a command line's options that only this family has, as arguments of its functions.

        Args:
            args: an argparse.Namespace; an option that is None was not given.

        Raises:
            ValueError: an option that only another family has.
        """
        own = self.command_line
        for other in FAMILIES.values():
            for name in other.command_line:
                if name not in own and getattr(args, name, None) is not None:
                    known = ", ".join(flag(other) for other in own if hasattr(args, other))
                    is_of = f"{flag(name)} is an option of {other.name}"
                    raise ValueError(f"{is_of}; this checkpoint is {self.name}, with {known}.")
        found = {argument: getattr(args, name, None) for name, argument in own.items()}
        found = {name: value for name, value in found.items() if value is not None}
        if "minutes" in found:
            found[self.length] = 60 * found.pop("minutes")
        elif "max_tokens" in found:
            found.setdefault(self.length, None)  # with a number of tokens alone the model ends the music
        return found

    def load(self, name: str) -> Any:
        """What the path in the field `name` names."""
        return _named(getattr(self, name))

    @property
    def classes(self) -> tuple[type, type]:
        """Its model and its tokenizer class."""
        return tuple(_named(f"{self.model_type}:{self.prefix}{part}") for part in ("ForCausalLM", "Tokenizer"))

    @property
    def pretrained(self) -> Path:
        """The folder of its bundled checkpoint; there is none where that is a package that is not installed."""
        specs = map(find_spec, (self.folder.partition("/")[0], self.model_type))
        return next(Path(spec.origin).parents[1] / self.folder for spec in specs if spec and spec.origin)

    @property
    def absence(self) -> str:
        """What to say where the bundled checkpoint is not installed."""
        if self.distribution is None:
            return f"{self.checkpoint}: the bundled checkpoint is not installed ({self.pretrained} is missing)."
        return (
            f"{self.checkpoint}: these weights are a separate, non-commercial package ({self.license}), which is not "
            f"installed: {self.distribution}. In a checkout of sage-music: pip install ./weights. Any other checkpoint "
            "of the family needs no package: --model FOLDER, or from_pretrained(FOLDER)."
        )


def flag(option: str) -> str:
    """An option as the command line has it: `max_tokens` is `--max-tokens`."""
    return f"--{option.replace('_', '-')}"


def _named(path: str) -> Any:
    """`package.module:name`, loaded."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


SAGE_MUSIC = Family(
    model_type="sage_music",
    name="SAGE-Music",
    plays="a band",
    prefix="SageMusic",
    paper="2510.00395",
    checkpoint="sage-music",
    folder="sage_music/pretrained/sage-music-6m",
    license="apache-2.0",
    distribution=None,
    unit="bars",
    prompt_length="prompt_bars",
    length="bars",
    options={
        "prompt_bars": Option("count"),
        "bars": Option("count"),
        "free": Option("flag"),
        "programs": Option("programs", nullable=True),
        "generate_options": Option("mapping", nullable=True),
    },
    flags=("tempo", "time_signature", "int8", "compile", "draft"),
    plan="sage_studio.generation.bars:plan_continuation",
    begin="sage_studio.generation.bars:plan_piece",
    together="sage_studio.generation.bars_batch:write_together",
    grammar="sage_music:MidiGrammarLogitsProcessor",
    summary="sage_studio.checkpoints.summary:of_sage_music",
    parts="sage_studio.train.parts:sage_music_parts",
    windows="sage_studio.train.nats:sage_music_windows",
    # A rate that a style the checkpoint knows survives, and a new one is still learned by in a few dozen steps.
    recipe={"learning_rate": 3e-4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8},
    eval_pieces=60,
    example="ode_to_joy",
    sample={"prompt_bars": 4, "bars": 8},
    tags=("sage-music",),
    about="A model of multi-track music: it continues the beginning of a MIDI file.",
    limits="Times are on the grid of its tokens; controllers, pitch bend and pedal have none.",
    widget="BOS_None Bar_None TimeSig_4/4 ",
)
PERCEIVERS = Family(
    model_type="perceivers",
    name="PerceiverS",
    plays="a pianist",
    prefix="PerceiverS",
    paper="2411.08307",
    checkpoint="perceivers",
    folder="perceivers_weights/perceivers-6m",
    license="cc-by-nc-sa-4.0",
    distribution="sage-music-perceivers-weights",
    unit="seconds",
    prompt_length="prompt_s",
    length="music_s",
    options={
        "prompt_s": Option("number", flag="prompt_seconds"),
        "music_s": Option("number", nullable=True, flag="seconds"),
        "max_tokens": Option("count", nullable=True),
        "max_note_s": Option("number", nullable=True, flag="max_note_seconds"),
    },
    flags=("minutes",),
    plan="sage_studio.generation.seconds:plan_continuation",
    begin="sage_studio.generation.seconds:plan_performance",
    together="sage_studio.generation.seconds_batch:write_together",
    grammar="perceivers:PerformanceGrammarLogitsProcessor",
    summary="sage_studio.checkpoints.summary:of_perceivers",
    parts="sage_studio.train.parts:perceivers_parts",
    windows="sage_studio.train.nats:perceivers_windows",
    # Segments are as long as the context: one at a time.
    recipe={
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 4,
    },
    eval_pieces=12,
    example="greensleeves",
    sample={"prompt_s": 11.0, "music_s": 16.0},
    tags=("piano", "perceivers"),
    about="A model of expressive piano performance: it continues the beginning of a MIDI file.",
    limits="Pedal is folded into durations, and times are on a grid of 10 ms.",
    widget="BOS ",
)
FAMILIES = {family.model_type: family for family in (SAGE_MUSIC, PERCEIVERS)}


def family_of(model: Any) -> Family:
    """The family of a model, a config or a model_type.

    Raises:
        ValueError: of neither family.
    """
    config = getattr(model, "config", model)
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(f"a model of the type {model_type!r}, not one of {', '.join(map(repr, FAMILIES))}.")
    return FAMILIES[model_type]


def of_tokenizer(name: str | None) -> Family | None:
    """The family whose tokenizer's class has the name `name`; None where it is none's."""
    return next((family for family in FAMILIES.values() if name == f"{family.prefix}Tokenizer"), None)


def bundled(name: str) -> Family | None:
    """The family whose bundled checkpoint has the short name `name`; None where it is none's."""
    return next((family for family in FAMILIES.values() if family.checkpoint == name), None)
