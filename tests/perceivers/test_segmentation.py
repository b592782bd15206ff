"""Segments: the ends each mode may draw and how often, every evaluation target once, batches padded on the left."""

import numpy as np
import pytest
import torch

from perceivers.segmentation import SegmentCollator, SegmentDataset, SequentialDataset

BOS, END = 390, 388


def piece(length: int, seed: int = 0) -> np.ndarray:
    """BOS, pitches and velocities at random, token_end."""
    body = np.random.default_rng(seed).integers(60, 70, length - 2)
    return np.array([BOS, *body, END], dtype=np.uint16)


def counted(length: int) -> list[int]:
    """A piece whose ids are its positions, so that a segment says where it lies."""
    return list(range(length))


def targets(item) -> list[int]:
    return item["input_ids"][item["labels"] != -100].tolist()


def visit(length: int, draws: int, **options) -> list[dict]:
    torch.manual_seed(0)
    dataset = SegmentDataset([counted(length)], **options)
    return [dataset[i % len(dataset)] for i in range(draws)]


def chi_square(counts: np.ndarray) -> float:
    """Of counts that should all be equal, in standard deviations from its mean, about normal for many cells."""
    expected = counts.mean()
    return (((counts - expected) ** 2 / expected).sum() - (len(counts) - 1)) / np.sqrt(2 * (len(counts) - 1))


# ---- which segments


@pytest.mark.parametrize(
    ("options", "first_end", "last_end"),
    [
        ({"mode": "effective"}, 9, 60),  # N + 1 .. L
        ({"mode": "baseline"}, 20, 60),  # M .. L: starts 0 .. L - M
        ({"position_uniform": True}, 2, 67),  # 2 .. L + N - 1
    ],
)
def test_ends_are_even_over_exactly_their_range(options, first_end, last_end):
    length, context, latents = 60, 20, 8
    torch.manual_seed(0)
    dataset = SegmentDataset([counted(length)], context, latents, **options)
    counts = np.zeros(80, int)
    for _ in range(20_000):
        start, end, first = dataset.draw(length)
        # The end before it was cut to the piece: the first of N targets says it, or near the left edge the last.
        drawn = first + latents if first > 1 else end
        assert (start, end) == (max(0, drawn - context), min(drawn, length))
        counts[drawn] += 1
    assert (counts.nonzero()[0].min(), counts.nonzero()[0].max()) == (first_end, last_end)
    assert abs(chi_square(counts[first_end : last_end + 1])) < 4


def test_segments_are_slices_with_the_last_n_as_targets():
    for item in visit(60, 300, context=20, num_latents=8):
        ids = item["input_ids"]
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert ids.tolist() == list(range(int(ids[0]), int(ids[-1]) + 1))
        assert len(ids) == min(int(ids[-1]) + 1, 20)
        assert targets(item) == ids[-8:].tolist()
        assert (item["labels"][:-8] == -100).all() and item["labels"][0] == -100
    starts = [int(item["input_ids"][0]) for item in visit(60, 2000, context=20, num_latents=8, mode="baseline")]
    assert (min(starts), max(starts)) == (0, 40)
    assert all(len(item["input_ids"]) == 20 for item in visit(60, 100, context=20, num_latents=8, mode="baseline"))
    # A piece shorter than the context is one segment under the baseline, and still many under effective.
    assert {len(i["input_ids"]) for i in visit(15, 100, context=20, num_latents=8, mode="baseline")} == {15}
    assert {len(i["input_ids"]) for i in visit(15, 300, context=20, num_latents=8)} == set(range(9, 16))


def trained(length: int, draws: int, **options) -> np.ndarray:
    """How often each position was a target."""
    counts = np.zeros(length, int)
    for item in visit(length, draws, **options):
        counts[targets(item)] += 1
    return counts


def test_plain_effective_rarely_trains_the_beginning_and_position_uniform_does_not_care():
    length, latents, draws = 45, 8, 20_000
    shape = {"context": 20, "num_latents": latents}
    plain = trained(length, draws, **shape)
    assert plain[0] == 0
    assert plain[1] / draws == pytest.approx(1 / (length - latents), rel=0.12)  # one of L - N crops
    assert plain[20] / draws == pytest.approx(latents / (length - latents), rel=0.05)
    baseline = trained(length, 2000, **shape, mode="baseline")
    assert not baseline[: 20 - latents].any() and baseline[20 - latents :].all()
    uniform = trained(length, draws, **shape, position_uniform=True)
    assert uniform[0] == 0
    # Each target has probability N / (L + N - 2); neighbours rise and fall together, so no chi-square here.
    share = latents / (length + latents - 2)
    assert np.abs(uniform[1:] / draws - share).max() < 4.5 * np.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize(("context", "latents"), [(20, 8), (8, 8), (100, 8), (20, 1), (2, 1)])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 11, 30])
def test_position_uniform_is_exact(monkeypatch, length, context, latents):
    """Every end once, instead of drawn: every target is then trained equally often, and at least once."""
    dataset = SegmentDataset([counted(length)], context, latents, position_uniform=True)
    ranges = []
    monkeypatch.setattr(torch, "randint", lambda low, high, size: ranges.append((low, high)) or torch.tensor(low))
    dataset.draw(length)
    counts = np.zeros(length, int)
    for end in range(*(ranges or [(0, 1)])[0]):
        monkeypatch.setattr(torch, "randint", lambda low, high, size, end=end: torch.tensor(end))
        found = targets(dataset[0])
        assert found
        counts[found] += 1
    assert counts[0] == 0 and counts[1] > 0 and (counts[1:] == counts[1]).all()


@pytest.mark.parametrize("options", [{}, {"position_uniform": True}, {"mode": "baseline"}])
@pytest.mark.parametrize("length", [2, 5, 8, 9])
def test_a_piece_of_n_plus_one_tokens_is_one_segment(length, options):
    for item in visit(length, 20, context=20, num_latents=8, **options):
        assert item["input_ids"].tolist() == counted(length)
        assert targets(item) == counted(length)[1:]


def test_pieces_are_visited_in_proportion_to_their_length():
    dataset = SegmentDataset([counted(n) for n in (2, 9, 10, 81, 82)], context=20, num_latents=8)
    assert np.bincount(dataset.visits).tolist() == [1, 1, 2, 10, 11]
    assert len(dataset) == 25 and len(dataset[24]["input_ids"]) >= 9


def test_a_latent_length_of_the_whole_context_leaves_a_token_to_read():
    for options in ({}, {"position_uniform": True}, {"mode": "baseline"}):
        for item in visit(30, 200, context=8, num_latents=8, **options):
            assert item["labels"][0] == -100 and len(item["input_ids"]) <= 8 and targets(item)
    assert trained(30, 2000, context=8, num_latents=8)[1:].all()


def test_the_seed_decides_the_segments():
    first, second = ([i["input_ids"].tolist() for i in visit(60, 20, context=20, num_latents=8)] for _ in range(2))
    assert first == second
    torch.manual_seed(1)
    dataset = SegmentDataset([counted(60)], context=20, num_latents=8)
    assert first != [dataset[i % len(dataset)]["input_ids"].tolist() for i in range(20)]


def test_a_datasets_column_is_a_sequence_of_pieces():
    datasets = pytest.importorskip("datasets")
    rows = [counted(30), counted(12)]
    column = datasets.Dataset.from_dict({"input_ids": rows})["input_ids"]
    a, b = (SequentialDataset(p, context=16, num_latents=8) for p in (rows, column))
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, b, strict=True))
    torch.manual_seed(0)
    assert all(targets(item) for item in SegmentDataset(column, context=16, num_latents=8))


# ---- evaluation


@pytest.mark.parametrize(("context", "latents"), [(20, 8), (8, 8), (100, 8), (9, 1), (2, 1)])
def test_sequential_segments_have_every_target_once(context, latents):
    lengths = [2, latents, latents + 1, latents + 2, 2 * latents, 3 * latents, 3 * latents + 1, 3 * latents + 2, 55]
    pieces = [counted(max(length, 2)) for length in lengths]
    dataset = SequentialDataset(pieces, context, latents)
    seen = [[] for _ in pieces]
    for (index, start, end, _), item in zip(dataset.segments, dataset, strict=True):
        ids = item["input_ids"]
        assert ids.tolist() == counted(len(pieces[index]))[start:end]
        assert len(ids) <= context + 1
        assert (item["labels"][:-latents] == -100).all() and item["labels"][0] == -100
        seen[index] += targets(item)
    for found, ids in zip(seen, pieces, strict=True):
        assert sorted(found) == ids[1:]
    assert dataset.num_tokens == sum(len(p) - 1 for p in pieces)
    assert len(dataset) == sum(-(-(len(p) - 1) // latents) for p in pieces)
    sizes = [len(item["input_ids"]) for item in dataset]
    assert sizes == sorted(sizes, reverse=True)


def test_sequential_segments_follow_the_formula():
    dataset = SequentialDataset([counted(60)], context=20, num_latents=8)
    for k in range(1, 9):
        item = next(i for s, i in zip(dataset.segments, dataset, strict=True) if s[3] == 8 * (k - 1) + 1)
        assert item["input_ids"].tolist() == counted(60)[max(0, 8 * k - 20) : 8 * k + 1]


def test_notes_are_counted_among_the_targets():
    assert SequentialDataset([piece(50), piece(12)], 16, 8).num_notes == 48 + 10
    ids = [60, 60, 130, 188, 300, 360, 61, END]  # what stands first is no target
    assert SequentialDataset([ids], 16, 8).num_notes == 2
    assert SequentialDataset([ids], 16, 8, is_note=lambda ids: ids == 300).num_notes == 1


# ---- batches


def test_batches_are_padded_on_the_left():
    dataset = SequentialDataset([counted(30)], context=16, num_latents=8)
    items = [dataset[0], dataset[len(dataset) - 1]]
    batch = SegmentCollator(pad_token_id=389)(items)
    sizes = [len(item["input_ids"]) for item in items]
    assert sizes[1] < sizes[0] and all(value.dtype == torch.int64 for value in batch.values())
    for name, fill in (("input_ids", 389), ("labels", -100), ("attention_mask", 0)):
        assert batch[name].shape == (2, sizes[0])
        assert (batch[name][1, : -sizes[1]] == fill).all()
    for row, item in enumerate(items):
        assert batch["input_ids"][row, -sizes[row] :].tolist() == item["input_ids"].tolist()
        assert batch["labels"][row, -sizes[row] :].tolist() == item["labels"].tolist()
        assert batch["attention_mask"][row, -sizes[row] :].all()
    assert SegmentCollator(389, pad_to=40)(items)["labels"].shape == (2, 40)
    with pytest.raises(ValueError, match="pad_to"):
        SegmentCollator(389, pad_to=10)(items)


# ---- transposition


class Pitches:
    """Moves note_on and note_off as the performance tokenizer does."""

    def config_fields(self):
        return {"grammar": {"note_on": [0, 128], "note_off": [128, 256], "time_shift": [256, 356]}}

    def transpose_ids(self, ids, semitones):
        ids = np.asarray(ids)
        moved = ids + semitones
        assert all((moved[ids < 128] >= 0) & (moved[ids < 128] < 128))
        assert all((moved[(ids >= 128) & (ids < 256)] >= 128) & (moved[(ids >= 128) & (ids < 256)] < 256))
        return np.where(ids < 256, moved, ids)


@pytest.mark.parametrize(
    ("note", "shifts"),
    [(60, range(-6, 7)), (23, range(-2, 7)), (106, range(-6, 3)), (0, range(0, 7)), (127, range(-6, 1))],
)
@pytest.mark.parametrize("event", [0, 128])
def test_transposition_stays_on_the_piano(note, shifts, event):
    ids = [BOS, 300, note + event, 360, END]
    torch.manual_seed(0)
    dataset = SegmentDataset([ids], context=16, num_latents=8, transpose=6, tokenizer=Pitches())
    seen = set()
    for _ in range(300):
        item = dataset[0]
        seen.add(int(item["input_ids"][2]) - note - event)
        assert torch.equal(item["labels"][1:], item["input_ids"][1:])
        assert item["input_ids"][[0, 1, 3, 4]].tolist() == [BOS, 300, 360, END]
    assert seen == set(shifts)


def test_a_segment_without_pitches_is_left_alone():
    dataset = SegmentDataset([[BOS, 300, END]], context=16, num_latents=8, transpose=6, tokenizer=Pitches())
    assert dataset[0]["input_ids"].tolist() == [BOS, 300, END]


# ---- errors


def test_wrong_arguments_are_named():
    good = [counted(30)]
    for pieces, context, latents, options, word in (
        ([], 16, 8, {}, "no pieces"),
        (good, 16, 17, {}, r"num_latents \(17\).*context \(16\)"),
        (good, 16, 0, {}, r"num_latents \(0\)"),
        (good, 16, 8, {"mode": "random"}, "'random' is none of effective, baseline"),
        (good, 16, 8, {"mode": "baseline", "position_uniform": True}, "position_uniform"),
        ([*good, [BOS]], 16, 8, {}, "piece 1 has 1 tokens"),
        (good, 16, 8, {"transpose": 3}, "tokenizer"),
    ):
        with pytest.raises(ValueError, match=word):
            SegmentDataset(pieces, context, latents, **options)
    with pytest.raises(ValueError, match="no pieces"):
        SequentialDataset([], 16, 8)
    with pytest.raises(ValueError, match="num_latents"):
        SequentialDataset(good, 8, 16)
