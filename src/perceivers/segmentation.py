"""Segments of long pieces for training and evaluation: effective segmentation (PerceiverS, arXiv 2411.08307).

A PerceiverS model reads a long context and predicts only its last few tokens, so where training segments *end* decides
which tokens are ever predicted. Symbols: a piece `x` of `L` tokens, `BOS ... token_end`; `M` (`context`) tokens at most
in a segment; `N` (`num_latents`) targets at most. A segment holds its own targets, so one of M tokens has
`n = min(N, M - 1)`; its last token is only a target. Target j (1 <= j <= L - 1; BOS is never one) is trained by a
segment that ends before position e exactly if e - n <= j <= e - 1. Ends are integers, drawn evenly:

    baseline              e ~ U[min(M, L), L]   x[max(0, e-M) : e]   the start is U[0, L-M]: all segments full
    effective             e ~ U[n+1, L]         x[max(0, e-M) : e]   short contexts are trained too
      position_uniform    e ~ U[2, L+n-1]       x[max(0, e-M) : e]   every target equally often
    sequential            k = 1..ceil((L-1)/N)  x[max(0, kN-M) : kN+1]   evaluation: every target exactly once

The baseline, the paper's control, never trains a token with less than M - N tokens before it, although every generated
piece begins that way. A piece of at most N + 1 tokens is one segment in every mode.

Segments differ in length, and a batch is padded to its longest. Training items therefore come in batches of similar
lengths (`grouping.py`); what padding is left, their method `padding` tells.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .grouping import POOL, grouped_order, padding_share

MODES = ("effective", "baseline")

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Segmentation:
    """Where the training segments of a piece end; the formulas are at the top of this module.

    Args:
        context: `M`, tokens in a segment at most.
        num_latents: `N`, targets in a segment at most.
        mode: `"effective"` or `"baseline"`.
        position_uniform: in effective mode, train every target of a piece with equal probability. Plain `effective`
            trains target 1 in one of L - N segments only, the ones in the middle in N of them. Segments at a piece's
            two edges then have fewer than N targets. A step's loss is a mean over its targets, so the fewer segments a
            step has, the more those few count.

    Raises:
        ValueError: an unknown mode, or sizes that contradict each other.
    """

    context: int
    num_latents: int
    mode: str = "effective"
    position_uniform: bool = False

    def __post_init__(self):
        _check_sizes(self.context, self.num_latents)
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is none of {', '.join(MODES)}.")
        if self.position_uniform and self.mode != "effective":
            raise ValueError(f"position_uniform is a kind of effective segmentation; mode is {self.mode!r}.")

    @property
    def targets(self) -> int:
        """`n`, targets of a segment of M tokens."""
        return min(self.num_latents, self.context - 1)

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One random segment `x[start:end]` of each piece of `lengths` (S,): start, end and first target, each (S,)."""
        if self.mode == "baseline":
            low, high = np.minimum(self.context, lengths), lengths
        elif self.position_uniform:
            # Weights on the ends n+1..L cannot do it: e = n+1 alone trains target 1, and e = n+1 and n+2 train target
            # 2, so n+2 would have to get no weight, and so on up to 2n. Hence ends beyond both edges, cut to the piece:
            # target j is trained by e = j+1..j+n, which lie in 2..L+n-1 for every j in 1..L-1. Each target has n of
            # the L+n-2 equally likely ends, and each of these ends has at least one target.
            low, high = np.full_like(lengths, 2), lengths + self.targets - 1
        else:
            low, high = np.full_like(lengths, self.targets + 1), lengths
        whole = lengths <= self.num_latents + 1
        ends = rng.integers(np.where(whole, lengths, low), np.where(whole, lengths, high), endpoint=True)
        starts = np.where(whole, 0, np.maximum(0, ends - self.context))
        firsts = np.where(whole, 1, np.maximum(1, ends - self.targets))
        return starts, np.minimum(ends, lengths), firsts

    def visits(self, lengths: np.ndarray) -> np.ndarray:
        """Segments of each piece in an epoch, in proportion to its length: `ceil((L - 1) / N)`."""
        return -(-(lengths - 1) // self.num_latents)

    def augmented(
        self, ids: np.ndarray, first: int, augment: Augment, rng: np.random.Generator
    ) -> tuple[np.ndarray, int]:
        """The segment `ids` after `augment`, and its first target.

        The last tokens are the targets, as many as before. A segment without any token but its first before the
        targets, as at a piece's beginning, keeps all but the first, up to N. What a change of tempo adds beyond M
        tokens is cut off at the front; a segment that it leaves without a target stays as it was.
        """
        changed = np.asarray(augment(ids, rng), dtype=np.int64)[-max(self.context, len(ids)) :]
        if len(changed) < 2:
            return ids, first
        targets = self.targets if first == 1 else len(ids) - first
        return changed, max(1, len(changed) - targets)


class SegmentDataset(Dataset):
    """Random training segments, all drawn anew in every epoch; item `index` depends on (seed, epoch, index) alone.

    A piece is visited in proportion to its length, `ceil((L - 1) / N)` times an epoch. The order is random, too: read
    it in sequence (`TrainingArguments(train_sampling_strategy="sequential")`, which also makes `Trainer` call
    `set_epoch`).

    Batches of `batch_size` consecutive items hold segments of similar lengths (`grouping.py`). A batch then has the
    beginnings of several pieces, or later parts of several pieces, rather than some of each; a step of several batches
    (processes, gradient accumulation) mixes them again. Which segments an epoch has is as without grouping.

    Args:
        pieces: any sequence of integer sequences, `BOS ... token_end` each: arrays, lists, a `datasets` column. Pieces
            are read when an item is asked for.
        context, num_latents, mode, position_uniform: see `Segmentation`.
        augment: called as `augment(ids, rng)` with the segment's ids (T,) int64 and a generator; returns new ids. See
            `Segmentation.augmented` for what the targets are then.
        seed: 0 or more.
        lengths: tokens of each piece (P,), if they are known; otherwise one pass over the pieces counts them.
        batch_size: items in a batch of one process. Times the number of processes, the batches of a step are alike as
            well: no process waits for one with longer segments, and steps mix less. 1 groups nothing.

    `set_epoch(epoch)` draws that epoch's segments; it also reaches the persistent workers of a `DataLoader`. `visits`
    (S,) holds the piece of each segment of an epoch, piece by piece.

    Items: `input_ids` (T,) int64; `labels` (T,) int64, -100 except for the targets, all among the last N. T varies.

    Raises:
        ValueError: no pieces, a piece without a target, an unknown mode, or sizes that contradict each other.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[int]],
        context: int,
        num_latents: int,
        mode: str = "effective",
        position_uniform: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ):
        self.segmentation = Segmentation(context, num_latents, mode, position_uniform)
        _check_drawing(seed, batch_size)
        self.pieces, self.augment, self.seed, self.batch_size = pieces, augment, seed, batch_size
        self.lengths = _lengths(pieces, lengths)
        self.visits = np.repeat(np.arange(len(self.lengths)), self.segmentation.visits(self.lengths))
        self._epoch = _shared_epoch()
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.visits)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def segment(self, index: int) -> tuple[int, int, int, int]:
        """(piece, start, end, first target) of an item of this epoch, before augmentation."""
        piece, start, end, first = self._segments()[index].tolist()
        return piece, start, end, first

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece, start, end, first = self.segment(index)
        ids = _slice(self.pieces, piece, start, end)
        first -= start
        if self.augment is not None:
            # SeedSequence takes (a, b) and (a, b, 0) for the same seed; (a, b) has drawn the segments.
            rng = np.random.default_rng((self.seed, int(self._epoch), 1 + index % len(self)))
            ids, first = self.segmentation.augmented(ids, first, self.augment, rng)
        return _item(ids, first)

    def padding(self, batch_size: int | None = None) -> float:
        """Share of this epoch's positions that are padding, in batches of `batch_size` (default: the dataset's).

        Lengths are those before augmentation.
        """
        segments = self._segments()
        return padding_share(segments[:, 2] - segments[:, 1], batch_size or self.batch_size)

    def _segments(self) -> np.ndarray:
        epoch = int(self._epoch)
        if self._drawn is None or self._drawn[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            starts, ends, firsts = self.segmentation.draw(self.lengths[self.visits], rng)
            order = grouped_order(ends - starts, self.batch_size, rng)
            self._drawn = epoch, np.stack([self.visits, starts, ends, firsts], axis=1)[order]
        return self._drawn[1]


class SegmentStream(IterableDataset):
    """`SegmentDataset`'s segments of pieces that are read once an epoch, in constant memory.

    A piece of `L` tokens gives `ceil((L - 1) / N)` segments, drawn from (seed, epoch, the piece itself), so that they
    are the same in any order of the pieces, process or worker. Pieces are held until two pools of segments (each of
    64 batches, or of 1,024 segments where those are more) are full; one is then grouped into batches and given out.
    Batches so far apart do not mix: shuffle the pieces.

    With several processes, `Trainer` needs `accelerator_config={"dispatch_batches": False}`: by default Accelerate
    joins the processes' batches of an iterable dataset, which cannot be done where they differ in length.

    Args:
        pieces: iterable of integer sequences, or of rows with such a sequence as `input_ids`: a `datasets`
            `IterableDataset` as it is. It must be possible to iterate over it again.
        context, num_latents, mode, position_uniform, augment, seed, batch_size: as for `SegmentDataset`.

    `set_epoch(epoch)` is passed on to `pieces`, if it has it. The workers of a `DataLoader` share the pieces: an
    `IterableDataset` (torch's or that of `datasets`) shares them out itself, of a sequence each takes its part.

    Items: as `SegmentDataset`'s.

    Raises:
        ValueError: as `SegmentDataset`; on iteration: a piece without a target, no pieces, or several workers of an
            iterable that is neither.
    """

    def __init__(
        self,
        pieces: Iterable,
        context: int,
        num_latents: int,
        mode: str = "effective",
        position_uniform: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        batch_size: int = 1,
    ):
        self.segmentation = Segmentation(context, num_latents, mode, position_uniform)
        _check_drawing(seed, batch_size)
        self.pieces, self.augment, self.seed, self.batch_size = pieces, augment, seed, batch_size
        self._epoch = _shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        if hasattr(self.pieces, "set_epoch"):
            self.pieces.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = np.random.default_rng((self.seed, int(self._epoch)))
        size = self.batch_size * max(POOL, -(-1024 // self.batch_size))
        pool: list[tuple] = []
        for segment in self._draws():
            pool.append(segment)
            if len(pool) == 2 * size:
                yield from self._given_out(pool[:size], rng)
                del pool[:size]
        yield from self._given_out(pool, rng)

    def _draws(self) -> Iterator[tuple[np.ndarray, int, int, int, tuple[int, ...]]]:
        """(ids of the piece, start, end, first target, seed of its augmentation) of every segment."""
        empty = get_worker_info() is None
        for number, row in enumerate(self._shared_pieces()):
            ids = np.asarray(row["input_ids"] if isinstance(row, Mapping) else row).astype(np.int32)
            if len(ids) < 2:
                raise ValueError(f"piece {number} has {len(ids)} tokens: a target needs one before it.")
            empty = False
            key = (self.seed, int(self._epoch), zlib.crc32(ids))
            lengths = np.full(int(self.segmentation.visits(np.array(len(ids)))), len(ids))
            drawn = self.segmentation.draw(lengths, np.random.default_rng(key))
            for visit, (start, end, first) in enumerate(zip(*(part.tolist() for part in drawn), strict=True)):
                yield ids, start, end, first, (*key, 1 + visit)
        if empty:
            raise ValueError("no pieces to take segments from; an iterator gives them only once.")

    def _shared_pieces(self) -> Iterable:
        worker = get_worker_info()
        if worker is None or worker.num_workers == 1 or isinstance(self.pieces, IterableDataset):
            return self.pieces
        if not (hasattr(self.pieces, "__len__") and hasattr(self.pieces, "__getitem__")):
            raise ValueError(
                f"{worker.num_workers} workers cannot share a {type(self.pieces).__name__}: give an IterableDataset "
                "or a sequence, or use one worker."
            )
        return itertools.islice(self.pieces, worker.id, None, worker.num_workers)

    def _given_out(self, pool: list[tuple], rng: np.random.Generator) -> Iterator[dict[str, torch.Tensor]]:
        sizes = np.array([end - start for _, start, end, _, _ in pool], dtype=np.int64)
        for index in grouped_order(sizes, self.batch_size, rng):
            piece, start, end, first, key = pool[index]
            ids, first = piece[start:end].astype(np.int64), first - start
            if self.augment is not None:
                ids, first = self.segmentation.augmented(ids, first, self.augment, np.random.default_rng(key))
            yield _item(ids, first)


def is_note_on(ids: np.ndarray) -> np.ndarray:
    """Which ids of the performance vocabulary begin a note: 0 to 127."""
    return ids < 128


class SequentialDataset(Dataset):
    """Evaluation segments: every target of every piece exactly once, each after as much context as fits.

    Segment k of a piece has the targets (k-1)N+1 .. kN; the last one may have fewer. A segment may hold M + 1 tokens:
    its last is only a target, so M of them are read.

    Args:
        pieces, context, num_latents, lengths: as for `SegmentDataset`.
        is_note: which ids of an array begin a note, as an array of booleans.

    `num_tokens` and `num_notes` count the targets; the notes by a pass over the pieces, when first asked for.
    `segments` holds (piece, start, end, first target) of each item, the longest first: batches then have little
    padding, and what does not fit in memory fails at once.

    Items: as `SegmentDataset`'s.

    Raises:
        ValueError: as `SegmentDataset`.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[int]],
        context: int,
        num_latents: int,
        is_note: Callable[[np.ndarray], np.ndarray] = is_note_on,
        lengths: Sequence[int] | None = None,
    ):
        _check_sizes(context, num_latents)
        lengths = _lengths(pieces, lengths)
        self.pieces, self.is_note = pieces, is_note
        self.segments = [
            (index, max(0, last - context), min(last + 1, length), last - num_latents + 1)
            for index, length in enumerate(lengths.tolist())
            for last in range(num_latents, length - 1 + num_latents, num_latents)
        ]
        self.segments.sort(key=lambda segment: segment[1] - segment[2])
        self.num_tokens = int((lengths - 1).sum())

    @cached_property
    def num_notes(self) -> int:
        return sum(int(self.is_note(np.asarray(piece[1:])).sum()) for piece in self.pieces)

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece, start, end, first = self.segments[index]
        return _item(_slice(self.pieces, piece, start, end), first - start)

    def padding(self, batch_size: int) -> float:
        """Share of the positions that are padding, in batches of `batch_size`."""
        return padding_share(np.array([end - start for _, start, end, _ in self.segments]), batch_size)


class SegmentCollator:
    """Batches segments, padded on the left: the model's targets are the last positions of a row.

    Args:
        pad_token_id: the id that fills `input_ids`.
        pad_to: length of every batch; the longest segment's where it is None.

    Returns, called with items: `input_ids`, `labels` (-100 on padding) and `attention_mask` (0 on padding), each
    (B, T) int64.

    Raises:
        ValueError: a segment is longer than `pad_to`.
    """

    def __init__(self, pad_token_id: int, pad_to: int | None = None):
        self.pad_token_id, self.pad_to = pad_token_id, pad_to

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        width = longest if self.pad_to is None else self.pad_to
        if longest > width:
            raise ValueError(f"a segment of {longest} tokens is longer than pad_to ({width}).")
        fills = {"input_ids": self.pad_token_id, "labels": -100, "attention_mask": 0}
        batch = {name: torch.full((len(items), width), fill) for name, fill in fills.items()}
        for row, item in enumerate(items):
            real = slice(width - len(item["input_ids"]), None)
            batch["input_ids"][row, real] = item["input_ids"]
            batch["labels"][row, real] = item["labels"]
            batch["attention_mask"][row, real] = 1
        return batch


def _shared_epoch() -> torch.Tensor:
    """An epoch in shared memory: a `DataLoader`'s persistent workers keep their copy of a dataset from the first on."""
    return torch.zeros((), dtype=torch.int64).share_memory_()


def _check_sizes(context: int, num_latents: int) -> None:
    if not 1 <= num_latents <= context or context < 2:
        raise ValueError(
            f"num_latents ({num_latents}) must be from 1 to context ({context}), and a context is 2 tokens at least."
        )


def _check_drawing(seed: int, batch_size: int) -> None:
    if seed < 0 or batch_size < 1:
        raise ValueError(f"seed ({seed}) must be 0 or more, and batch_size ({batch_size}) 1 or more.")


def _lengths(pieces: Sequence[Sequence[int]], lengths: Sequence[int] | None) -> np.ndarray:
    """Tokens of each piece (P,) int64, checked."""
    if lengths is not None and len(lengths) != len(pieces):
        raise ValueError(f"lengths has {len(lengths)} numbers for {len(pieces)} pieces.")
    lengths = np.array([len(piece) for piece in pieces] if lengths is None else lengths, dtype=np.int64)
    if not len(lengths):
        raise ValueError("no pieces to take segments from.")
    if lengths.min() < 2:
        raise ValueError(f"piece {lengths.argmin()} has {lengths.min()} tokens: a target needs one before it.")
    return lengths


def _slice(pieces: Sequence[Sequence[int]], piece: int, start: int, end: int) -> np.ndarray:
    ids = np.array(pieces[piece][start:end], dtype=np.int64)
    if len(ids) != end - start:
        raise ValueError(f"piece {piece} ends before token {end}: it is shorter than lengths says.")
    return ids


def _item(ids: np.ndarray, first: int) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(ids)
    labels = ids.clone()
    labels[:first] = -100
    return {"input_ids": ids, "labels": labels}


__all__ = [
    "MODES",
    "SegmentCollator",
    "SegmentDataset",
    "SegmentStream",
    "Segmentation",
    "SequentialDataset",
    "is_note_on",
]
