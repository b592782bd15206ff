"""Training data: pieces of token ids to fixed-length blocks that `Trainer` takes as they are."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from .tokenization_sage_music import SageMusicTokenizer


class BlockDataset(Dataset):
    """Random training blocks, freshly cropped and transposed at every visit.

    A block starts with BOS at a random bar line of one piece, its tempo and program stated again (`crop_ids`); where
    the piece ends (EOS) before the block does, further pieces follow, each after its own BOS. The random numbers are
    torch's, so `Trainer`'s seed governs them.

    Args:
        pieces: arrays of ids, `BOS ... EOS` each, as `notekit.corpus.encode_files` makes them.
        tokenizer: the tokenizer that made them.
        block_size: tokens per block.
        transpose: largest shift in semitones, up and down; drums never move. 0 under BPE.

    Items: `input_ids` and `labels`, each (block_size,) int64.
    """

    def __init__(
        self, pieces: Sequence[np.ndarray], tokenizer: SageMusicTokenizer, block_size: int, transpose: int = 6
    ):
        if not pieces:
            raise ValueError("no pieces to train on.")
        if transpose and tokenizer.miditok.is_trained:
            raise ValueError("transpose must be 0 under a BPE vocabulary: its tokens hold whole notes.")
        self.pieces, self.tokenizer, self.block_size, self.transpose = pieces, tokenizer, block_size, transpose
        bars = np.array(tokenizer.config_fields()["grammar"]["bars"])
        # A piece is visited in proportion to its length.
        self.visits = np.concatenate([np.full(-(-len(piece) // block_size), i) for i, piece in enumerate(pieces)])
        self.starts = [np.flatnonzero(bars[piece]) for piece in pieces]
        ids = tokenizer.get_vocab()
        self.pitches = (ids.get("Pitch_0", 0), ids.get("Pitch_127", 0))

    def __len__(self) -> int:
        return len(self.visits)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self._crop(int(self.visits[index]))
        while len(block) < self.block_size:
            block = np.concatenate([block, self._crop(int(torch.randint(len(self.pieces), ())), whole=True)])
        ids = torch.from_numpy(block[: self.block_size].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def _crop(self, piece: int, whole: bool = False) -> np.ndarray:
        ids, starts = self.pieces[piece], self.starts[piece]
        # The last crop begins half a block before the end, so that blocks are mostly music of one piece.
        usable = starts[starts <= max(len(ids) - self.block_size // 2, starts[0])]
        start = starts[0] if whole else usable[int(torch.randint(len(usable), ()))]
        ids = self.tokenizer.crop_ids(ids[: start + self.block_size], start).astype(np.int32)
        if self.transpose:
            low, high = self.pitches
            pitches = ids[(ids >= low) & (ids <= high)]
            if len(pitches):
                down = min(self.transpose, int(pitches.min()) - low)
                up = min(self.transpose, high - int(pitches.max()))
                ids = self.tokenizer.transpose_ids(ids, int(torch.randint(-down, up + 1, ())))
        return ids


class WindowDataset(Dataset):
    """Evaluation windows: every token of a piece predicted exactly once, in windows that restart at BOS.

    Args:
        pieces, tokenizer, block_size: as for `BlockDataset`.

    `num_tokens` and `num_notes` count what is predicted.

    Items: `input_ids`, `labels` (block_size,) int64, padded on the right with labels of -100.
    """

    def __init__(self, pieces: Sequence[np.ndarray], tokenizer: SageMusicTokenizer, block_size: int):
        body = block_size - 1
        self.windows = [
            np.concatenate([piece[:1], piece[start : start + body]])
            for piece in pieces
            for start in range(1, len(piece), body)
        ]
        self.block_size, self.pad = block_size, tokenizer.pad_token_id
        notes = np.array(tokenizer.config_fields()["grammar"]["notes"])
        self.num_tokens = sum(len(window) - 1 for window in self.windows)
        self.num_notes = int(sum(notes[window].sum() for window in self.windows))

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = torch.from_numpy(self.windows[index].astype(np.int64))
        ids = torch.full((self.block_size,), self.pad)
        labels = torch.full((self.block_size,), -100)
        ids[: len(window)], labels[: len(window)] = window, window
        return {"input_ids": ids, "labels": labels}


__all__ = ["BlockDataset", "WindowDataset"]
