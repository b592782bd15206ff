"""What a family brings to training: tokenizer, model, datasets, collator."""

import copy
import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer, TrainingArguments

from perceivers.augmentation import PerceiverSAugmentation
from perceivers.segmentation import SegmentDataset, SegmentStream
from sage_music.augmentation import SageMusicAugmentation
from sage_music.data import BlockDataset, BlockStream
from sage_studio.checkpoints.loading import load
from sage_studio.corpus import prepare_corpus
from sage_studio.corpus.shards import corpus_info, fetch, is_prepared, read_shards
from sage_studio.defaults import TEMPERATURE, TOP_P
from sage_studio.families import Family, bundled, family_of
from sage_studio.files import write_atomic

from .arguments import DataArguments, ModelArguments
from .nats import perceivers_windows, sage_music_windows

BLOCK_SIZE = 1024
# Fields of a checkpoint's config that its weights do not depend on.
FREE_FIELDS = ("max_position_embeddings", "num_latents", "num_mtp_layers", "attention_dropout")


class Parts(NamedTuple):
    """What is trained.

    Attributes:
        tokenizer, model: to train and to save.
        train: items for `Trainer`; an epoch's order is the dataset's own.
        evaluation: items, with `num_notes` and `num_tokens`, the notes and tokens it predicts.
        collator: makes batches of both.
        corpus: what was found in the data: `pieces`, `notes` and `tokens` by split, and what was skipped.
    """

    tokenizer: PreTrainedTokenizer
    model: PreTrainedModel
    train: Dataset
    evaluation: Dataset
    collator: Callable
    corpus: dict


class Pieces(Sequence):
    """The `input_ids` of a `datasets.Dataset`, one array at a time from the file that is mapped into memory."""

    def __init__(self, dataset):
        self.dataset = dataset.with_format("arrow", columns=["input_ids"])  # four times faster than its NumPy format
        self.lengths = np.asarray(dataset.with_format("numpy")["tokens"][:])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.dataset[int(index)]["input_ids"][0].values.to_numpy()


class WholeBatches(Dataset):
    """A dataset without the last items of an epoch that make no whole step; which they are changes with the epoch.

    Under several processes Accelerate would fill the last batch up with items that it had before, and `Trainer`'s own
    `dataloader_drop_last` leaves out pieces of the evaluation too.

    Args:
        rows: items of a batch, of all processes.
        batches: batches of a step. A dataset that has no whole step keeps its whole batches, or all that it has.
    """

    def __init__(self, dataset: Dataset, rows: int, batches: int = 1):
        sizes = [len(dataset) // size * size for size in (rows * batches, rows)]
        self.dataset, self.size = dataset, sizes[0] or sizes[1] or len(dataset)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        return self.dataset[index]

    def set_epoch(self, epoch: int) -> None:
        """Items and order of that epoch."""
        self.dataset.set_epoch(epoch)


class EndlessStream(IterableDataset):
    """A stream read again and again, each time in the order of its next epoch.

    `Trainer` knows no length of a stream and counts all its passes as one epoch: it then skips right when it resumes.
    """

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __iter__(self):
        stream = copy.deepcopy(self.stream)  # workers may be in different passes
        for epoch in itertools.count():
            stream.set_epoch(epoch)
            yield from stream


def family_named(model: str) -> Family:
    """The family of a bundled checkpoint's name, a folder, a Hub name or a config file.

    Raises:
        ValueError, OSError: there is none, it is no config, or of neither family.
    """
    if family := bundled(model):
        return family
    folder = Path(model)
    if model.endswith(".json"):
        fields = new_fields(model)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(f"{model}: no checkpoint (it has no config.json). Folders of MIDI files go to --data.")
        return family_named(str(new_fields(str(folder / "adapter_config.json")).get("base_model_name_or_path")))
    else:
        fields = PreTrainedConfig.get_config_dict(model)[0]
    try:
        return family_of(str(fields.get("model_type")))
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from None


def new_fields(path: str) -> dict:
    """The fields of a new model's config.

    Raises:
        ValueError: the file is no JSON object.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a config file that can be read ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f'{path}: a config is a JSON object, as in {{"model_type": "sage_music"}}.')
    return fields


def config_changes(options: ModelArguments) -> dict:
    """`--config` as fields and values.

    Raises:
        ValueError: something that is not FIELD=VALUE.
    """
    changes = {}
    for text in options.config:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--config {text}: write FIELD=VALUE, as in max_position_embeddings=4096.")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    if options.draft_tokens is not None:
        changes["num_mtp_layers"] = options.draft_tokens
    return changes


def start(options: ModelArguments) -> tuple[PreTrainedTokenizer, PreTrainedModel]:
    """Tokenizer and model to begin with.

    Raises:
        ValueError: a checkpoint that does not load, another model's, a field that does not exist, or a tokenizer whose
            vocabulary is not the model's.
    """
    changes, own = config_changes(options), bundled(options.model)
    source = str(own.pretrained) if own else options.model
    model_class, tokenizer_class = family_named(options.model).classes
    if source.endswith(".json"):
        fields = {**new_fields(source), **changes}
        fields.pop("model_type")
        tokenizer = tokenizer_class.from_pretrained(options.tokenizer) if options.tokenizer else tokenizer_class()
        known = {name for name in dir(model_class.config_class()) if not name.startswith("_")}
        for name in fields:
            if name not in known:
                raise ValueError(f"{options.model}: {name!r} is no field of {model_class.config_class.__name__}.")
        model = model_class(model_class.config_class(**{**tokenizer.config_fields(), **fields}))
        model.generation_config.update(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0)
        return tokenizer, model
    for name in changes:
        if name not in FREE_FIELDS:
            raise ValueError(
                f"--config {name}: the weights of {options.model} depend on it; of a checkpoint only "
                f"{', '.join(FREE_FIELDS)} can change. Give a .json file to train a new model."
            )
    if changes and (Path(source) / "adapter_config.json").is_file():
        raise ValueError(f"--config and --draft_tokens: {source} has an adapter: merge it and save the model first.")
    model, tokenizer = load(options.model)
    if changes:
        model = model_class.from_pretrained(source, **changes)
    if options.tokenizer:
        tokenizer = tokenizer_class.from_pretrained(options.tokenizer)
        if tokenizer.get_vocab() != tokenizer_class.from_pretrained(source).get_vocab():
            raise ValueError(
                f"--tokenizer {options.tokenizer}: its vocabulary ({tokenizer.vocab_size} tokens) is not that of "
                f"{options.model} ({model.config.vocab_size}): leave it out, or train a new model."
            )
    return tokenizer, model


def read_pieces(
    data: DataArguments, tokenizer: PreTrainedTokenizer, args: TrainingArguments
) -> tuple[Pieces | object, Pieces, dict]:
    """Training pieces (a stream of rows with --streaming), pieces to evaluate on, and what was found.

    Raises:
        ValueError, OSError: no files, none that can be read, an empty split, or shards of another vocabulary.
    """
    if len(data.data) == 1 and is_prepared(data.data[0]):
        source = data.data[0]
        for name in ("metadata", "licences", "held_out"):
            if getattr(data, name) is not None:
                raise ValueError(f"--{name}: {source} is prepared; it was decided when `sage-music prepare` ran.")
        if data.streaming:
            train = read_shards(source, tokenizer, streaming=True, split="train")
            held_out = read_shards(source, tokenizer, split=data.eval_split)
            found = {"splits": {data.eval_split: _counts(held_out)}, "skipped": 0, "shards": corpus_info(source)}
            train = train.select_columns("input_ids").shuffle(
                seed=args.seed, buffer_size=data.shuffle_buffer, max_buffer_input_shards=1
            )
            return train, _chosen(held_out, data), found
        splits, skipped = {name: read_shards(source, tokenizer, split=name) for name in ("train", data.eval_split)}, 0
    elif data.streaming:
        raise ValueError(
            "--streaming reads the shards that `sage-music prepare --output DIR` writes: give that folder as --data."
        )
    else:
        splits, skipped = _encoded(data, tokenizer, args)
    for name, split in splits.items():
        if not len(split):
            raise ValueError(f"{' '.join(data.data)}: no pieces for the {name} split.")
    found = {"splits": {name: _counts(split) for name, split in splits.items()}, "skipped": skipped}
    return Pieces(splits["train"]), _chosen(splits[data.eval_split], data), found


def _encoded(data: DataArguments, tokenizer: PreTrainedTokenizer, args: TrainingArguments) -> tuple[dict, int]:
    """The splits of folders of MIDI files, and how many files were skipped; `skipped.csv` and `held_out.csv` list them.

    How fast it was depends on what was kept from earlier, so it is said and not part of the report.
    """
    first = args.process_index == 0
    with tqdm(desc="files", unit=" files", disable=None if first else True, file=sys.stderr) as bar:
        corpus = prepare_corpus(
            [fetch(source) for source in data.data],
            tokenizer,
            cache=data.cache,
            workers=data.workers,
            time_limit=data.time_limit,
            size_limit=data.size_limit,
            metadata=data.metadata,
            licences=data.licences,
            held_out=0.1 if data.held_out is None else data.held_out,
            progress=bar.update,
        )
    if first:
        names, text = corpus.splits[data.eval_split]["path"][:], io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["file"], *([name] for name in names)])
        write_atomic(Path(args.output_dir) / "held_out.csv", text.getvalue().encode())
        if corpus.skipped:
            path = corpus.write_skipped(Path(args.output_dir) / "skipped.csv")
            print(f"note: {len(corpus.skipped)} of {corpus.report['files']} files skipped: {path}", file=sys.stderr)
        counted = {name: split["files"] for name, split in corpus.report["splits"].items() if split["files"]}
        said = ", ".join(f"{count:,} {name}" for name, count in counted.items())
        rates = f"{corpus.report['files_per_second']:,.0f} files/s, {corpus.report['notes_per_second']:,.0f} notes/s"
        print(f"note: pieces: {said} ({corpus.report['from_cache']:,} from the cache; {rates})", file=sys.stderr)
    return {name: corpus.splits[name] for name in ("train", data.eval_split)}, len(corpus.skipped)


def _counts(split) -> dict[str, int]:
    columns = split.select_columns(["notes", "tokens"]).with_format("numpy")[:]
    return {"pieces": len(split), **{name: int(column.sum()) for name, column in columns.items()}}


def _chosen(split, data: DataArguments) -> Pieces:
    """Whole pieces in an order that mixes the sources, and the same ones for every run and tokenization."""
    order = np.random.default_rng(0).permutation(len(split))[: data.eval_pieces or None]  # None or 0: all
    return Pieces(split.select(order))


def sage_music_parts(options: ModelArguments, data: DataArguments, args: TrainingArguments) -> Parts:
    """Packed blocks of a fixed length; evaluation in windows of the same length."""
    _refuse(data, "PerceiverS", "segmentation", "position_uniform")
    if options.draft_tokens is not None and (options.draft_tokens < 1 or options.model.endswith(".json")):
        raise ValueError("--draft_tokens is at least 1 and needs --model CHECKPOINT, whose tokens the head guesses.")
    tokenizer, model = start(options)
    if options.draft_tokens is not None:
        model.requires_grad_(False)
        model.draft.requires_grad_(True)
    augment, size = None, data.block_size or BLOCK_SIZE
    if tokenizer.miditok.is_trained and data.transpose:
        data.transpose = 0
        if args.process_index == 0:
            print("note: nothing is transposed: tokens of a BPE vocabulary hold whole notes.", file=sys.stderr)
    if any((data.transpose, data.tempo, data.velocity, data.track_dropout)):
        augment = SageMusicAugmentation(tokenizer, data.transpose, data.tempo, data.velocity, data.track_dropout)
    pieces, held_out, found = read_pieces(data, tokenizer, args)
    if data.streaming:
        train = BlockStream(pieces, tokenizer, size, augment, args.seed)
    else:
        train = BlockDataset(pieces, tokenizer, size, augment, args.seed, pieces.lengths)
    return Parts(tokenizer, model, train, *sage_music_windows(held_out, model, tokenizer, size), found)


def perceivers_parts(options: ModelArguments, data: DataArguments, args: TrainingArguments) -> Parts:
    """Segments up to the context's length, with the loss on the last `num_latents` tokens."""
    _refuse(data, "SAGE-Music", "block_size", "track_dropout")
    if options.draft_tokens is not None:
        raise ValueError("--draft_tokens is an option of SAGE-Music; this is PerceiverS.")
    tokenizer, model = start(options)
    augment = None
    if any((data.transpose, data.tempo, data.velocity)):
        augment = PerceiverSAugmentation(tokenizer, data.transpose, data.tempo, data.velocity)
    pieces, held_out, found = read_pieces(data, tokenizer, args)
    sizes = (model.config.max_position_embeddings, model.config.num_latents)
    mode = data.segmentation or "effective"
    uniform = mode == "effective" if data.position_uniform is None else data.position_uniform
    # Lengths are alike within a step of all processes: they wait for each other, and see what one process would.
    rows = args.train_batch_size * args.world_size
    shared = {"augment": augment, "seed": args.seed, "batch_size": rows}
    if data.streaming:
        train = SegmentStream(pieces, *sizes, mode, uniform, **shared)
    else:
        train = SegmentDataset(pieces, *sizes, mode, uniform, **shared, lengths=pieces.lengths)
    return Parts(tokenizer, model, train, *perceivers_windows(held_out, model, tokenizer), found)


def _refuse(data: DataArguments, family: str, *names: str) -> None:
    for name in names:
        if getattr(data, name):
            raise ValueError(f"--{name} is an option of {family}; this is the other family.")
