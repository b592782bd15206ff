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
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

MODES = ("effective", "baseline")
PIANO = (21, 108)  # MIDI pitches of the lowest and the highest key


class SegmentDataset(Dataset):
    """Random training segments, drawn anew at every visit. The random numbers are torch's: `Trainer`'s seed rules them.

    A piece is visited in proportion to its length, `ceil((L - 1) / N)` times an epoch.

    Args:
        pieces: any sequence of integer sequences, `BOS ... token_end` each: arrays, lists, a `datasets` column.
        context: `M`, tokens in a segment at most.
        num_latents: `N`, targets in a segment at most.
        mode: `"effective"` or `"baseline"`; the formulas are at the top of this module.
        position_uniform: in effective mode, train every target of a piece with equal probability. Plain `effective`
            trains target 1 in one of L - N segments only, the ones in the middle in N of them. Segments at a piece's
            two edges then have fewer than N targets. A step's loss is a mean over its targets, so the fewer segments a
            step has, the more those few count.
        transpose: largest random shift in semitones, up and down, within the piano's pitches 21 to 108 (a segment
            that leaves them already is not moved farther out). Needs `tokenizer`.
        tokenizer: has `transpose_ids(ids, semitones)` and, in `config_fields()["grammar"]`, the id ranges `note_on` and
            `note_off`.

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
        transpose: int = 0,
        tokenizer=None,
    ):
        lengths = _lengths(pieces, context, num_latents)
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}.")
        if position_uniform and mode != "effective":
            raise ValueError(f"position_uniform is a kind of effective segmentation; mode is {mode!r}.")
        if transpose and tokenizer is None:
            raise ValueError(f"transpose ({transpose}) needs the tokenizer, which knows the tokens of a pitch.")
        self.pieces, self.context, self.num_latents, self.mode = pieces, context, num_latents, mode
        self.position_uniform, self.transpose, self.tokenizer = position_uniform, transpose, tokenizer
        self.visits = np.repeat(np.arange(len(lengths)), -(-(lengths - 1) // num_latents))
        grammar = tokenizer.config_fields()["grammar"] if transpose else None
        self.pitch_ranges = [grammar[name] for name in ("note_on", "note_off")] if transpose else []

    def __len__(self) -> int:
        return len(self.visits)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece = np.asarray(self.pieces[int(self.visits[index])])
        start, end, first = self.draw(len(piece))
        ids = piece[start:end].astype(np.int64)
        if self.transpose:
            ids = self._transposed(ids)
        return _item(ids, first - start)

    def draw(self, length: int) -> tuple[int, int, int]:
        """One random segment of a piece: (start, end, first target), so that it is `x[start:end]`."""
        context, targets = self.context, min(self.num_latents, self.context - 1)
        if length <= self.num_latents + 1:
            return 0, length, 1
        if self.mode == "baseline":
            low, high = min(context, length), length
        elif self.position_uniform:
            # Weights on the ends n+1..L cannot do it: e = n+1 alone trains target 1, and e = n+1 and n+2 train target
            # 2, so n+2 would have to get no weight, and so on up to 2n. Hence ends beyond both edges, cut to the piece:
            # target j is trained by e = j+1..j+n, which lie in 2..L+n-1 for every j in 1..L-1. Each target has n of
            # the L+n-2 equally likely ends, and each of these ends has at least one target.
            low, high = 2, length + targets - 1
        else:
            low, high = targets + 1, length
        end = int(torch.randint(low, high + 1, ()))
        return max(0, end - context), min(end, length), max(1, end - targets)

    def _transposed(self, ids: np.ndarray) -> np.ndarray:
        # note_offs too: some end notes that began before the segment.
        pitches = np.concatenate([ids[(ids >= low) & (ids < high)] - low for low, high in self.pitch_ranges])
        if not len(pitches):
            return ids
        down = min(self.transpose, max(0, int(pitches.min()) - PIANO[0]))
        up = min(self.transpose, max(0, PIANO[1] - int(pitches.max())))
        return np.asarray(self.tokenizer.transpose_ids(ids, int(torch.randint(-down, up + 1, ()))), dtype=np.int64)


def is_note_on(ids: np.ndarray) -> np.ndarray:
    """Which ids of the performance vocabulary begin a note: 0 to 127."""
    return ids < 128


class SequentialDataset(Dataset):
    """Evaluation segments: every target of every piece exactly once, each after as much context as fits.

    Segment k of a piece has the targets (k-1)N+1 .. kN; the last one may have fewer. A segment may hold M + 1 tokens:
    its last is only a target, so M of them are read.

    Args:
        pieces, context, num_latents: as for `SegmentDataset`.
        is_note: which ids of an array begin a note, as an array of booleans.

    `num_tokens` and `num_notes` count the targets. `segments` holds (piece, start, end, first target) of each item,
    the longest first: batches then have little padding, and what does not fit in memory fails at once.

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
    ):
        lengths = _lengths(pieces, context, num_latents)
        self.pieces = pieces
        self.segments = [
            (index, max(0, last - context), min(last + 1, int(length)), last - num_latents + 1)
            for index, length in enumerate(lengths)
            for last in range(num_latents, int(length) - 1 + num_latents, num_latents)
        ]
        self.segments.sort(key=lambda segment: segment[1] - segment[2])
        self.num_tokens = int((lengths - 1).sum())
        self.num_notes = sum(int(is_note(np.asarray(piece)[1:]).sum()) for piece in pieces)

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        piece, start, end, first = self.segments[index]
        return _item(np.asarray(self.pieces[piece])[start:end].astype(np.int64), first - start)


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


def _lengths(pieces: Sequence[Sequence[int]], context: int, num_latents: int) -> np.ndarray:
    """Length of each piece (P,), after the checks both datasets share."""
    if not 1 <= num_latents <= context or context < 2:
        raise ValueError(
            f"num_latents ({num_latents}) must be from 1 to context ({context}), and a context is 2 tokens at least."
        )
    lengths = np.array([len(piece) for piece in pieces])
    if not len(lengths):
        raise ValueError("no pieces to take segments from.")
    if lengths.min() < 2:
        raise ValueError(f"piece {lengths.argmin()} has {lengths.min()} tokens: a target needs one before it.")
    return lengths


def _item(ids: np.ndarray, first: int) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(ids)
    labels = ids.clone()
    labels[:first] = -100
    return {"input_ids": ids, "labels": labels}


__all__ = ["SegmentCollator", "SegmentDataset", "SequentialDataset", "is_note_on"]
