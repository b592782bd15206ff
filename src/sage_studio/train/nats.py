"""Nats of a batch, kept as one number a row: what evaluation needs of the logits."""

import torch


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


__all__ = ["sum_of_nats"]
