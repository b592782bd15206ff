"""Training of a study's runs: a process of one thread each, a corpus tokenized once, finished runs never repeated."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sage_music import SageMusicTokenizer
from sage_studio.corpus import TokenStore, encode_corpus
from sage_studio.corpus.prepared import collect
from sage_studio.families import SAGE_MUSIC
from sage_studio.files import SPLITS

from .study import CORPORA, Run, StudyError

# A study's options and what they are called: fields of the config, and arguments of training.
CONFIG = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "context": "max_position_embeddings",
    "kv_routing": "kv_routing",
    "num_key_value_heads": "num_key_value_heads",
    "num_latents": "num_latents",
    "cross_scales": "cross_scales",
    "scale_mask": "scale_mask",
}
TRAINING = {
    "steps": ("max_steps",),
    "batch_size": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "warmup": ("warmup_steps",),
    "eval_every": ("eval_steps", "save_steps"),
    "learning_rate": ("learning_rate",),
    "bf16": ("bf16",),
    "eval_pieces": ("eval_pieces",),
    "block_size": ("block_size",),
    "segmentation": ("segmentation",),
    "position_uniform": ("position_uniform",),
}
# What all runs of all studies share, where a study says nothing else.
RECIPE = "--learning_rate 2e-3 --lr_scheduler_type warmup_stable_decay --gradient_accumulation_steps 1".split()
RECIPE += "--logging_steps 50 --sample_steps 0 --report_to none --disable_tqdm true --eval_on_start false".split()
RECIPE += ["--position_uniform", "false"]  # of PerceiverS

# Files a BPE vocabulary is learned from.
BPE_FILES = 400


def corpus_files(data: Path, corpus: str) -> dict[str, list[Path]]:
    """Files of a corpus by split, as training finds them.

    Raises:
        FileNotFoundError: `data` has no such corpus, naming the folder.
        ValueError: metadata.csv cannot be read, or leaves no file.
    """
    folder, licences = CORPORA[corpus]
    if not (data / folder).is_dir():
        raise FileNotFoundError(f"{data / folder}: no such folder; studies read {data}/NAME/train, validation, test.")
    filtered = (data / "metadata.csv").is_file() and licences is not None
    files = collect([data / folder], data / "metadata.csv" if filtered else None, licences if filtered else None)
    found = list(zip(files.paths, files.facts, strict=True))
    return {name: [path for path, fact in found if fact.split == name] for name in SPLITS}


def train(run: Run, data: Path, cache: Path) -> None:
    """Train one run, or go on with it, or return at once where it is finished.

    Raises:
        StudyError: training failed.
    """
    if (run.folder / "report.json").is_file():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", run.trainer, *arguments(run, data, cache)]
    (run.folder / "command.txt").write_text(shlex.join(["python", *command[1:]]) + "\n", encoding="utf-8")
    with open(run.folder / "train.log", "a", encoding="utf-8") as log:
        # One thread a process: several runs side by side are faster than one on several threads.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
    if code:
        raise StudyError(f"training {run.arm!r} (seed {run.seed}) ended with code {code}: see {run.folder}/train.log.")
    for checkpoint in run.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def arguments(run: Run, data: Path, cache: Path) -> list[str]:
    """Arguments of `python -m sage_studio.train` for a run; writes its `config.json`, the new model's config."""
    folder, licences = CORPORA[run.corpus]
    options = run.options
    # A compound model's config is its own trainer's; PerceiverS says its family, SAGE-Music is what is left.
    fields = {"model_type": options.get("family", SAGE_MUSIC.model_type)}
    fields |= {to: options[name] for name, to in CONFIG.items() if options.get(name) is not None}
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    found = ["--data", str(data / folder), "--output", str(run.folder), "--model", str(run.folder / "config.json")]
    found += ["--cache", str(cache), "--seed", str(run.seed), *RECIPE]
    if licences is not None and (data / "metadata.csv").is_file():
        found += ["--metadata", str(data / "metadata.csv"), "--licences", *licences]
    if options.get("bpe"):
        found += ["--tokenizer", str(bpe_folder(run, cache))]
    for name, names in TRAINING.items():
        if options.get(name) is not None:
            found += [text for flag in names for text in (f"--{flag}", str(options[name]))]
    found += ["--lr_scheduler_kwargs", json.dumps({"num_decay_steps": options["steps"] // 4})]
    return found


def bpe_folder(run: Run, cache: Path) -> Path:
    return cache / f"bpe-{run.corpus}-{run.options['bpe']}"


def learn_bpe(run: Run, data: Path, cache: Path) -> None:
    """Learn the run's BPE vocabulary from its corpus, unless that is done: merges within bars, as MidiTok's."""
    folder = bpe_folder(run, cache)
    if folder.is_dir():
        return
    tokenizer = SageMusicTokenizer()
    files = corpus_files(data, run.corpus)["train"]
    chosen = np.random.default_rng(0).permutation(len(files))[:BPE_FILES]
    keys, _ = encode_corpus([files[index] for index in sorted(chosen)], tokenizer, cache)
    rows = TokenStore(cache, tokenizer).dataset([key for key in keys if key is not None]).with_format("numpy")
    bar = tokenizer.convert_tokens_to_ids("Bar_None")
    tokenizer.miditok.train(vocab_size=run.options["bpe"], iterator=list(_bars(rows, bar, tokenizer.miditok)))
    tokenizer.miditok.save(cache / f"{folder.name}.json")
    grown = SageMusicTokenizer(vocab_file=str(cache / f"{folder.name}.json"))
    grown.save_pretrained(f"{folder}.part")
    os.replace(f"{folder}.part", folder)


def _bars(rows: Iterable[dict], bar: int, miditok) -> Iterator[list[str]]:
    for row in rows:
        body = row["input_ids"][1:-1]  # no BOS, no EOS: they are never merged
        bars = np.split(body, np.flatnonzero(body == bar)[1:])
        yield miditok._ids_to_bytes([part.tolist() for part in bars], as_one_str=True)


def prepare(runs: list[Run], data: Path, cache: Path) -> None:
    """What runs share, before they start side by side: vocabularies; and a data folder that has their corpora."""
    for corpus in sorted({run.corpus for run in runs}):
        for files in corpus_files(data, corpus).values():
            if not files:
                raise FileNotFoundError(f"{data / CORPORA[corpus][0]}: train, validation and test need MIDI files.")
    cache.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if run.options.get("bpe"):
            learn_bpe(run, data, cache)
