"""What studies measure of a trained run: each function takes a `Run` and returns numbers that JSON can keep.

Music and numbers are kept in the run's folder, so that an interrupted study goes on. Conventions are those of
`sage_studio.evaluate`; pieces come from the corpus' test split, the same ones for every run.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessorList

from perceivers import NoteDurationLogitsProcessor, PerceiverSTokenizer
from sage_music import SageMusicTokenizer
from sage_music.arguments_sage_music import CACHE_NAME
from sage_studio.bench.decoding import cache_bytes, stock_llama, token_seconds
from sage_studio.defaults import MAX_NOTE_S, PROMPT_BARS
from sage_studio.evaluate.continuation import PARTS, continuation_scores
from sage_studio.evaluate.likelihood import WINDOW, PieceLikelihood
from sage_studio.evaluate.pieces import by_key, shuffled, usable
from sage_studio.evaluate.sets import human_overlap, measured_set, set_overlap
from sage_studio.evaluate.systems import CheckpointWriter, loaded
from sage_studio.files import Journal, seed_of
from sage_studio.generation.result import Piece
from sage_studio.generation.sampling import sampling_options, seeded
from sage_studio.metrics import repeated_notes_by_segment
from sage_studio.music.midi import read_notes, write_midi

from .compound import CompoundMusicForCausalLM, CompoundWindowDataset, collate
from .compound_generation import continue_score_compound
from .segmentation import HALF_SAMPLES
from .study import Run
from .training import corpus_files

COMPOUND = "sage_studio.experiments.compound"
HALVES = 8  # random splits of the human pieces
WITHIN_S = 30.0  # what came back sooner is a loop; what came back later may be a theme


def measured(run: Run, name: str, data: Path, options: dict) -> dict:
    """`MEASURES[name]` of a run, from its folder where it is there with the same options."""
    journal = Journal(run.folder, lines="measures.jsonl")
    return kept(journal, {"name": name, "options": options}, lambda: MEASURES[name](run, data, **options))


def compared(name: str, runs: dict[str, Run], data: Path, options: dict, folder: Path) -> dict[str, dict]:
    """`SPEEDS[name]` of a study's arms, from `folder` where it is there; compared in one process, so kept for all."""
    settings = {"name": name, "options": options, "runs": {arm: run.folder.name for arm, run in runs.items()}}
    return kept(Journal(folder, lines="speeds.jsonl"), settings, lambda: SPEEDS[name](runs, data, **options))


def kept(journal: Journal, settings: dict, measure: Callable[[], dict]) -> dict:
    """The journal's result for these settings, or what `measure` returns, kept from now on."""
    settings = json.loads(json.dumps(settings))
    for record in journal.records():
        if record.get("settings") == settings:
            return record["result"]
    result = measure()
    journal.add({"settings": settings, "result": result})
    return result


@cache
def test_files(data: Path, corpus: str) -> dict[str, Path]:
    """The corpus' test files by key, in the order in which measures take them."""
    files = by_key(corpus_files(data, corpus)["test"])
    return {key: files[key] for key in shuffled(files, 0)}


@cache
def compound_of(checkpoint: str):
    """Model and tokenizer of a checkpoint on compound tokens."""
    return CompoundMusicForCausalLM.from_pretrained(checkpoint).eval(), SageMusicTokenizer.from_pretrained(checkpoint)


@dataclass(frozen=True)
class CompoundLikelihood(PieceLikelihood):
    """`PieceLikelihood` for compound tokens, on the CPU; `window` and a record's `tokens` count flat ones."""

    def parts(self):
        return compound_of(self.checkpoint)

    def sum_of_nats(self, logits, labels):
        return self.parts()[0].sum_of_nats(logits, labels)

    def dataset(self, path: str):
        return CompoundWindowDataset([self.ids(path)], self.parts()[1], self.window), collate


def likelihood(run: Run, data: Path, pieces: int) -> dict:
    """Nats of the first `pieces` test pieces (0: all), whole, in windows as long as training's blocks.

    Returns `pieces`: a record a piece with `piece`, `nats`, `notes` and `tokens` (flat ones, for compound tokens too),
    and `failed`, as `sage_studio.evaluate` has them.
    """
    kind = CompoundLikelihood if run.trainer == COMPOUND else PieceLikelihood
    score = kind(str(run.checkpoint), window=run.options.get("block_size", WINDOW))
    files = list(test_files(data, run.corpus).items())[: pieces or None]
    return {"pieces": [score(key, str(path)) for key, path in files]}


def continuation(run: Run, data: Path, prompts: int, bars: int, prompt_bars: int = PROMPT_BARS) -> dict:
    """NMSI of `bars` bars after the prompts, by piece; `pieces` are records of `continuation_scores`."""
    files, _ = _prompts(data, run.corpus, prompts, bars, prompt_bars)
    music = run.folder / "music" / f"{prompt_bars}-{bars}"
    records = continuation_scores(_writer(run, prompt_bars, bars), files, prompt_bars, bars, 0, music)
    keep = ("piece", "failed", *PARTS, "new_notes", "elapsed_s")
    return {"pieces": [{name: record[name] for name in keep} for record in records]}


@cache
def _prompts(
    data: Path, corpus: str, prompts: int, bars: int, prompt_bars: int
) -> tuple[dict[str, Path], dict[str, str]]:
    """`usable` test files."""
    files, skipped = usable(test_files(data, corpus), prompts, prompt_bars, bars)
    if not files:
        shown = "; ".join(f"{key}: {why}" for key, why in list(skipped.items())[:3])
        raise ValueError(f"{data}: no test piece of {corpus} can be a prompt with {bars} more bars ({shown}).")
    return files, skipped


def skipped_prompts(data: Path, corpus: str, options: dict) -> dict[str, str]:
    """Test pieces that `continuation` or `writing`, of these options, passed over, and why."""
    return _prompts(data, corpus, options["prompts"], options["bars"], options.get("prompt_bars", PROMPT_BARS))[1]


def _writer(run: Run, prompt_bars: int, bars: int) -> Callable[[str, int], Piece]:
    """What continues a file with a seed."""
    if run.trainer != COMPOUND:
        return CheckpointWriter(str(run.checkpoint), bars=bars, prompt_bars=prompt_bars)
    model, tokenizer = compound_of(str(run.checkpoint))
    return lambda path, seed: continue_score_compound(model, tokenizer, path, prompt_bars, bars, seed)


def sets(run: Run, data: Path, pieces: int, tokens: int, half_samples: int = HALF_SAMPLES) -> dict:
    """`pieces` pieces from nothing of `tokens` tokens at most, against the test pieces' first `tokens` tokens.

    The music is written in one batch by `generate()`, with the checkpoint's sampling and the end of notes that sound
    for too long, as `sage-music generate` does. Both sets are compared feature by feature (`features`, as
    `sage_studio.evaluate.sets.set_overlap`; `halves` is one random half of the test pieces against the other), and
    `repeated` has repeated notes per second by 64ths of each generated piece, `repeated_human` those of the test
    pieces. What cannot be measured is in neither: `failed` has the records of such generated pieces, `skipped` the
    reasons of such test pieces. `written` and `human` count all that were generated, and the test pieces used.
    """
    model, tokenizer = loaded(str(run.checkpoint), "cpu")
    written = _write_from_nothing(run, model, tokenizer, pieces, tokens)
    generated = measured_set(written, performed=True)
    human, skipped, halves, repeated_human = _human(data, run.corpus, tokens, run.folder.parent / "cache")
    return {
        "written": len(written),
        "human": len(human),
        "failed": [record for record in generated if record["failed"]],
        "skipped": skipped,
        "features": set_overlap(
            human, [r["features"] for r in generated if not r["failed"]], half_samples=half_samples
        ),
        "halves": halves,
        "repeated": _repeated(written, generated),
        "repeated_human": repeated_human,
    }


@cache
def _human(
    data: Path, corpus: str, tokens: int, folder: Path
) -> tuple[list[dict], dict[str, str], dict, list[list[float]]]:
    """Features of the test pieces' first tokens, what has none, one half against the other, and their repetition."""
    files = _cut_pieces(data, corpus, tokens, folder)
    records = measured_set(files, performed=True)
    features = [record["features"] for record in records if not record["failed"]]
    skipped = {record["piece"]: record["failed"] for record in records if record["failed"]}
    return features, skipped, human_overlap(features, splits=HALVES), _repeated(files, records)


def _repeated(files: dict[str, Path], records: list[dict]) -> list[list[float]]:
    """A row of 64 numbers for every file that could be measured."""
    notes = [read_notes(files[record["piece"]]) for record in records if not record["failed"]]
    return [repeated_notes_by_segment(of_piece, within_s=WITHIN_S).round(4).tolist() for of_piece in notes]


def _write_from_nothing(run: Run, model, tokenizer, pieces: int, tokens: int) -> dict[str, Path]:
    """Pieces as files of the run's folder; all of them are written again where one is missing."""
    folder = run.folder / "from-nothing" / f"{pieces}-{tokens}"
    files = {f"{index:03}": folder / f"{index:03}.mid" for index in range(pieces)}
    if not all(path.is_file() for path in files.values()):
        with seeded(seed_of(run.seed, "from nothing")):
            rows = model.generate(
                torch.full((pieces, 1), tokenizer.bos_token_id),
                max_new_tokens=tokens - 1,
                logits_processor=LogitsProcessorList([NoteDurationLogitsProcessor(model.config, MAX_NOTE_S)]),
                **sampling_options(None, None),
            )
        for path, row in zip(files.values(), rows, strict=True):
            write_midi(path, tokenizer.decode_midi(row))
    return files


def _cut_pieces(data: Path, corpus: str, tokens: int, folder: Path) -> dict[str, Path]:
    """The test pieces' first tokens, as files: models write no more than so many."""
    files, tokenizer = {}, PerceiverSTokenizer()
    for key, path in test_files(data, corpus).items():
        files[key] = folder / f"{corpus}-{tokens}" / key
        if not files[key].is_file():
            write_midi(files[key], tokenizer.decode_midi(tokenizer.midi_to_ids(path)[:tokens]))
    return files


MEASURES = {"likelihood": likelihood, "continuation": continuation, "sets": sets}


def decoding(runs: dict[str, Run], data: Path, context: int, tokens: int, rounds: int) -> dict[str, dict]:
    """Greedy decoding after `context` tokens of a test piece, all arms in turn in this process.

    An arm without routing is a stock `LlamaForCausalLM` of its shape with random weights, as in `sage-music bench`.

    Returns, by arm: `token_s`, seconds a token (the median of `rounds` medians), `cache_bytes` a token.
    """
    ids = _long_piece(data, next(iter(runs.values())), context)
    models = {}
    for name, run in runs.items():
        model, _ = loaded(str(run.checkpoint), "cpu")
        config = copy.deepcopy(model.config)
        config.max_position_embeddings = max(config.max_position_embeddings, context + tokens)
        if model.config.kv_routing == "none":
            model = stock_llama(config, config.num_key_value_heads)
        models[name] = model
    times: dict[str, list[float]] = {name: [] for name in models}
    found: dict[str, dict] = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, model in models.items():
            times[name].append(float(np.median(token_seconds(model, ids, tokens)[1:])))
    for name, model in models.items():
        output = model.generate(ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        held = cache_bytes(getattr(output, CACHE_NAME))
        found[name] = {"token_s": float(np.median(times[name][1:])), "cache_bytes": held}
    return found


def _long_piece(data: Path, run: Run, context: int) -> torch.Tensor:
    _, tokenizer = loaded(str(run.checkpoint), "cpu")
    for path in test_files(data, run.corpus).values():
        ids = tokenizer.midi_to_ids(path)
        if len(ids) >= context:
            return torch.tensor([ids[:context]])
    raise ValueError(f"{data}: no test piece of {run.corpus} has {context} tokens.")


def writing(
    runs: dict[str, Run], data: Path, prompts: int, bars: int, rounds: int, prompt_bars: int = PROMPT_BARS
) -> dict[str, dict]:
    """Continuations of a few prompts, all arms in turn in this process: by arm, `notes_per_second` (rounds' median)."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first warms up
        for name, run in runs.items():
            files, _ = _prompts(data, run.corpus, prompts, bars, prompt_bars)
            pieces = [_writer(run, prompt_bars, bars)(path, seed_of(turn, key)) for key, path in files.items()]
            rates[name].append(sum(p.notes for p in pieces) / sum(p.elapsed_s for p in pieces))
    return {name: {"notes_per_second": float(np.median(values[1:]))} for name, values in rates.items()}


SPEEDS = {"decoding": decoding, "writing": writing}
