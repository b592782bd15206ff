"""Training data: pieces of token ids to packed rows of a fixed length, which `Trainer` takes as they are.

A row holds one sequence after another, each from its own BOS. `position_ids` restart at 0 where a sequence begins; by
that the model keeps attention within sequences. The label of a sequence's first token is -100, since what stands before
it in the row belongs to another piece: the labels other than -100 are exactly the tokens that are predicted.

Every random choice follows from the seed, the epoch and the number of the item: a resumed run, or one with another
number of `DataLoader` workers or processes, sees the same rows of a `BlockDataset`. The order of an epoch is the
dataset's own, so read it in sequence (`TrainingArguments(train_sampling_strategy="sequential")`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .tokenization_sage_music import SageMusicTokenizer

# What `BlockStream` keeps in memory: pieces whose beginnings fill up blocks, and blocks that wait in random order.
RECENT_PIECES = 256
WAITING_BLOCKS = 256

# (ids of a sequence from its BOS, generator) -> ids of a sequence from its BOS.
Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Item = dict[str, torch.Tensor]


class BlockDataset(Dataset):
    """Random training blocks without padding, freshly cropped and augmented in every epoch.

    A block starts with BOS at a random bar line of one piece, its tempo and program stated again (`crop_ids`); where
    the piece ends (EOS) before the block does, further pieces follow from their beginnings. A piece is visited in
    proportion to its length, `ceil(tokens / block_size)` times an epoch.

    Args:
        pieces: any sequence of integer arrays of ids, `BOS ... EOS` each: a list, or a column of a memory-mapped
            `datasets.Dataset` with NumPy format. A piece is read when a block needs it.
        tokenizer: the tokenizer that made them.
        block_size: tokens per block.
        augment: changes every crop before it is packed (`sage_music.augmentation`); `None`: nothing.
        seed: of all random choices.
        lengths: tokens of every piece; otherwise all pieces are read once to count them.

    Items: `input_ids`, `labels` and `position_ids`, each (block_size,) int64.

    Raises:
        ValueError: no pieces, a piece of fewer than 2 tokens, `lengths` that do not fit, or a block of fewer than 2
            tokens. For an item: `augment` returned something without BOS in front.
    """

    def __init__(
        self,
        pieces: Sequence[np.ndarray],
        tokenizer: SageMusicTokenizer,
        block_size: int,
        augment: Augmentation | None = None,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
    ):
        lengths = np.array([len(piece) for piece in pieces] if lengths is None else lengths, dtype=np.int64)
        if not len(pieces):
            raise ValueError("no pieces to train on.")
        if len(lengths) != len(pieces):
            raise ValueError(f"lengths has {len(lengths)} entries for {len(pieces)} pieces.")
        if lengths.min() < 2:
            raise ValueError(f"piece {lengths.argmin()} has {lengths.min()} tokens: one after BOS is the least.")
        self.pieces, self.seed = pieces, seed
        self.packing = _Packing(tokenizer, block_size, augment)
        self.visits = np.repeat(np.arange(len(lengths)), -(-lengths // block_size))
        # Shared with worker processes that outlive an epoch: they hold a copy of everything else.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._order: tuple[int, np.ndarray] = (-1, self.visits)

    def set_epoch(self, epoch: int) -> None:
        """From now on give the blocks of this epoch, in its order."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.visits)

    def __getitem__(self, index: int) -> Item:
        index, epoch = int(index), int(self._epoch)
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}.")
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.visits))
        rng = np.random.default_rng((self.seed, epoch, index))
        first = np.asarray(self.pieces[int(self._order[1][index])])
        return self.packing.block(first, lambda: np.asarray(self.pieces[int(rng.integers(len(self.pieces)))]), rng)


class BlockStream(IterableDataset):
    """The blocks of a `BlockDataset` from pieces that are read one after another, in constant memory.

    Every piece is visited `ceil(tokens / block_size)` times an epoch, here too. What follows in a block is drawn from
    the last 256 pieces, and blocks leave in random order from among 256 that wait; order the pieces at random for
    more (`datasets.IterableDataset.shuffle`). Pieces without a token after BOS are passed over.

    Workers of a `DataLoader` share the pieces: a `datasets.IterableDataset` by its shards, so it needs as many shards
    as there are workers; any other iterable piece by piece. Another number of workers gives other blocks.

    Args:
        pieces: an iterable that can be read once an epoch, of arrays as for `BlockDataset` or of rows with such an
            array under `input_ids`: a streamed dataset as it is. Its `set_epoch` is called where it has one.
        tokenizer, block_size, augment, seed: as for `BlockDataset`.

    Items: as `BlockDataset`'s. Their number is not known, so `Trainer` needs `max_steps`.

    Raises:
        ValueError: a block of fewer than 2 tokens; when read: no pieces; items as for `BlockDataset`.
    """

    def __init__(
        self,
        pieces: Iterable[np.ndarray | Mapping],
        tokenizer: SageMusicTokenizer,
        block_size: int,
        augment: Augmentation | None = None,
        seed: int = 0,
    ):
        self.pieces, self.seed = pieces, seed
        self.packing = _Packing(tokenizer, block_size, augment)
        # A column of a streamed dataset (`dataset["input_ids"]`) leaves epochs and workers to that dataset.
        self.source = getattr(pieces, "source", pieces)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """From the next reading on give the blocks of this epoch."""
        self._epoch.fill_(epoch)
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[Item]:
        waiting: list[Item] = []
        rng = self._generator(0)
        for block, rng in self._blocks():
            if len(waiting) < WAITING_BLOCKS:
                waiting.append(block)
                continue
            chosen = int(rng.integers(len(waiting)))
            yield waiting[chosen]
            waiting[chosen] = block
        if not waiting and get_worker_info() is None:
            raise ValueError("no pieces to train on: the stream ended at once (a generator can be read only once).")
        yield from (waiting[index] for index in rng.permutation(len(waiting)))

    def _blocks(self) -> Iterator[tuple[Item, np.random.Generator]]:
        """Blocks in the order of the pieces, each with its piece's generator."""
        recent: list[np.ndarray] = []
        for number, piece in enumerate(self._read()):
            ids = np.asarray(piece["input_ids"] if isinstance(piece, Mapping) else piece)
            if len(ids) < 2:
                continue
            rng = self._generator(number)
            beginning = ids[: self.packing.block_size + 1].copy()  # a view would keep the whole piece
            if len(recent) < RECENT_PIECES:
                recent.append(beginning)
            else:
                recent[int(rng.integers(RECENT_PIECES))] = beginning
            for _ in range(-(-len(ids) // self.packing.block_size)):
                yield self.packing.block(ids, lambda rng=rng: recent[int(rng.integers(len(recent)))], rng), rng

    def _read(self) -> Iterator:
        info = get_worker_info()
        if info is None or isinstance(self.source, IterableDataset):  # such a dataset shares itself out
            yield from self.pieces
        else:
            yield from (piece for i, piece in enumerate(self.pieces) if i % info.num_workers == info.id)

    def _generator(self, number: int) -> np.random.Generator:
        info = get_worker_info()
        return np.random.default_rng((self.seed, int(self._epoch), 0 if info is None else info.id, number))


class WindowDataset(Dataset):
    """Evaluation windows: every token of a piece predicted exactly once, in windows that restart at BOS.

    A piece's last window is short; such windows share rows, each in the fullest one that holds it, the long ones first.

    Args:
        pieces, tokenizer, block_size: as for `BlockDataset`. The pieces are read once at the beginning.

    `num_tokens` and `num_notes` count what is predicted. `rows` holds the (piece, start) of every window of a row.

    Items: as `BlockDataset`'s, padded on the right where nothing fits: one more sequence, with labels of -100.

    Raises:
        ValueError: a block of fewer than 2 tokens.
    """

    def __init__(self, pieces: Sequence[np.ndarray], tokenizer: SageMusicTokenizer, block_size: int):
        _check_block_size(block_size)
        self.pieces, self.block_size, self.pad = pieces, block_size, tokenizer.pad_token_id
        notes = np.array(tokenizer.config_fields()["grammar"]["notes"])
        windows, self.num_tokens, self.num_notes = [], 0, 0
        for piece in range(len(pieces)):
            ids = np.asarray(pieces[piece])
            self.num_tokens += max(len(ids) - 1, 0)
            self.num_notes += int(notes[ids[1:]].sum())
            for start in range(1, len(ids), block_size - 1):
                windows.append((piece, start, min(len(ids) - start + 1, block_size)))
        windows.sort(key=lambda window: -window[2])
        self.rows: list[list[tuple[int, int]]] = []
        rows_with: list[list[int]] = [[] for _ in range(block_size + 1)]  # by how many tokens they have room for
        counts = np.zeros(block_size + 1, dtype=np.int64)
        for piece, start, size in windows:
            fitting = np.flatnonzero(counts[size:])
            if len(fitting):
                room = size + int(fitting[0])
                row = rows_with[room].pop()
                counts[room] -= 1
            else:
                room, row = block_size, len(self.rows)
                self.rows.append([])
            self.rows[row].append((piece, start))
            rows_with[room - size].append(row)
            counts[room - size] += 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        windows = []
        for piece, start in self.rows[index]:
            ids = np.asarray(self.pieces[piece])
            windows.append(np.concatenate([ids[:1], ids[start : start + self.block_size - 1]]))
        return _row(windows, self.block_size, self.pad)


class _Packing:
    """Crops of pieces, and rows of them without padding; the random numbers come with each call."""

    def __init__(self, tokenizer: SageMusicTokenizer, block_size: int, augment: Augmentation | None):
        _check_block_size(block_size)
        self.tokenizer, self.block_size, self.augment = tokenizer, block_size, augment
        self.bars = np.array(tokenizer.config_fields()["grammar"]["bars"]) > 0

    def block(self, ids: np.ndarray, draw: Callable[[], np.ndarray], rng: np.random.Generator) -> Item:
        """A block of a crop of `ids`, and of the beginnings of pieces that `draw()` gives."""
        crops = [self.crop(ids, rng)]
        length = len(crops[0])
        while length < self.block_size:
            crops.append(self.crop(draw(), rng, whole=True))
            length += len(crops[-1])
        return _row(crops, self.block_size, self.tokenizer.pad_token_id)

    def crop(self, ids: np.ndarray, rng: np.random.Generator, whole: bool = False) -> np.ndarray:
        """(T,) a block's worth of a piece from a random bar line, or (`whole`) from its first."""
        starts = np.flatnonzero(self.bars[ids[: self.block_size] if whole else ids])
        if not len(starts):  # nothing to choose from
            starts = np.array([1])
        # The last crop begins half a block before the end, so that blocks are mostly music of one piece.
        usable = starts[starts <= max(len(ids) - self.block_size // 2, starts[0])]
        start = int(starts[0] if whole else usable[rng.integers(len(usable))])
        ids = self.tokenizer.crop_ids(ids[: start + self.block_size], start).astype(np.int64)
        if self.augment is not None:
            ids = np.asarray(self.augment(ids, rng))
            if not len(ids) or ids[0] != self.tokenizer.bos_token_id:
                raise ValueError(f"augment must return ids that begin with BOS, not {ids[:5].tolist()}.")
        return ids


def _check_block_size(block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size ({block_size}) must be 2 at least: BOS and a token to predict.")


def _row(sequences: list[np.ndarray], size: int, pad: int) -> Item:
    """Sequences one after another, cut or padded to `size`."""
    ids, labels, positions = np.full(size, pad), np.full(size, -100), np.zeros(size, dtype=np.int64)
    begin = 0
    for sequence in sequences:
        sequence = sequence[: size - begin]
        here = slice(begin, begin + len(sequence))
        ids[here] = labels[here] = sequence
        labels[begin] = -100
        positions[here] = np.arange(len(sequence))
        begin = here.stop
    positions[begin:] = np.arange(size - begin)
    return {
        name: torch.from_numpy(values.astype(np.int64, copy=False))
        for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", positions))
    }


__all__ = ["BlockDataset", "BlockStream", "WindowDataset"]
