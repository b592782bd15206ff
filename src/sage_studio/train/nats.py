"""What evaluation is made of: windows in which each token of a piece is predicted once, and the nats of their rows."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from perceivers.segmentation import SegmentCollator, SequentialDataset
from sage_music.data import WindowDataset


def sage_music_windows(
    pieces: Sequence[np.ndarray], model, tokenizer, size: int | None = None
) -> tuple[Dataset, Callable]:
    """Windows of `size` tokens, and what makes batches of them."""
    return WindowDataset(pieces, tokenizer, size), default_collate


def perceivers_windows(
    pieces: Sequence[np.ndarray], model, tokenizer, size: int | None = None
) -> tuple[Dataset, Callable]:
    """Windows of the model's whole context, and what makes batches of them; `size` is another family's."""
    sizes = (model.config.max_position_embeddings, model.config.num_latents)
    return SequentialDataset(pieces, *sizes), SegmentCollator(tokenizer.pad_token_id)


def sum_of_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B,) summed negative log-likelihood of each row, so that evaluation keeps one number a row, not the logits.

    `labels` (B, T) are not shifted. `logits` (B, n, V) predict the last n of them; where they are as many as the
    labels, the last one predicts nothing. Columns on the right without any label are passed over: with several
    processes, `Trainer` has padded labels and logits there to the widths of the widest process.
    """
    labels = labels[:, : int((labels != -100).any(0).nonzero().max()) + 1]
    n = min(logits.shape[1], labels.shape[1] - 1)
    logits, labels = logits[:, :n].float(), labels[:, -n:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(-1)
