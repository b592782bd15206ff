"""Items of different lengths in batches with little padding, in an order that is random all the same."""

import numpy as np

POOL = 64  # batches of a pool


def grouped_order(sizes: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of items of `sizes` (S,), in which batches of consecutive items have similar sizes.

    Items are shuffled and dealt into pools of 64 to 127 batches; each pool is sorted by size and cut into batches; all
    batches are then shuffled. Items of equal size stay in random order. A smaller last batch comes at the end, with
    items from a random place of its pool's sizes.

    Fewer batches than a pool's are less alike within: sizes spread evenly from 0 up, dealt into k batches, have a
    padding of 1 / (k + 1) at most, so that 5 % takes 19 batches.
    """
    count, pool = len(sizes), POOL * batch_size
    order = rng.permutation(count)
    last = max(count // pool, 1) - 1  # what is left over joins the last pool
    pools = np.minimum(np.arange(count) // pool, last)
    order = order[np.lexsort((sizes[order], pools))]
    left = count % batch_size
    place = last * pool + batch_size * int(rng.integers((count - last * pool) // batch_size + 1)) if left else count
    full = np.concatenate([order[:place], order[place + left :]]).reshape(-1, batch_size)
    return np.concatenate([rng.permutation(full).ravel(), order[place : place + left]])


def padding_share(sizes: np.ndarray, batch_size: int) -> float:
    """Share of the positions that are padding, in batches of `batch_size` consecutive items of `sizes` (S,)."""
    starts = np.arange(0, len(sizes), batch_size)
    rows = np.diff(np.append(starts, len(sizes)))
    return 1 - float(sizes.sum() / (np.maximum.reduceat(sizes, starts) * rows).sum())


__all__ = ["POOL", "grouped_order", "padding_share"]
