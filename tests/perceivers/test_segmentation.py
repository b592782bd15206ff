"""Segments: the ends each mode draws and how often, in which epoch; every evaluation target once; batches, streams."""

import numpy as np
import pytest
import torch
from conftest import band
from torch.utils.data import DataLoader

from perceivers import PerceiverSTokenizer
from perceivers.augmentation import PerceiverSAugmentation
from perceivers.grouping import grouped_order
from perceivers.segmentation import SegmentCollator, SegmentDataset, SegmentStream, SequentialDataset

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


def visit(length: int, draws: int, seed: int = 0, **options) -> list[dict]:
    """Segments of one piece, an epoch after the other."""
    dataset = SegmentDataset([counted(length)], seed=seed, **options)
    return [item for epoch in range(-(-draws // len(dataset))) for item in in_epoch(dataset, epoch)][:draws]


def in_epoch(dataset, epoch: int) -> list[dict]:
    dataset.set_epoch(epoch)
    return list(dataset)


def tokens(items) -> list[list[int]]:
    return [item["input_ids"].tolist() for item in items]


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
    dataset = SegmentDataset([counted(length)] * 2500, context, latents, **options)
    counts = np.zeros(80, int)
    for _, start, end, first in (dataset.segment(index) for index in range(len(dataset))):
        # The end before it was cut to the piece: the first of N targets says it, or near the left edge the last.
        drawn = first + latents if first > 1 else end
        assert (start, end) == (max(0, drawn - context), min(drawn, length))
        counts[drawn] += 1
    assert counts.sum() == 20_000
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
def test_position_uniform_is_exact(length, context, latents):
    """Every end once, instead of drawn: every target is then trained equally often, and at least once."""
    dataset = SegmentDataset([counted(length)] * 800, context, latents, position_uniform=True)
    ends = {dataset.segment(index)[1:] for index in range(len(dataset))}
    n = min(latents, context - 1)
    assert len(ends) == (1 if length <= latents + 1 else length + n - 2)
    counts = np.zeros(length, int)
    for start, end, first in ends:
        assert start < first < end
        counts[first:end] += 1
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


def test_items_depend_on_seed_epoch_and_index_alone():
    def made(seed=0):
        pieces = [counted(n) for n in (60, 45, 90)]
        return SegmentDataset(pieces, 20, 8, augment=lambda ids, rng: ids + rng.integers(1000), seed=seed)

    first, second = made(), made()
    expected = [tokens(in_epoch(first, epoch)) for epoch in range(3)]
    torch.manual_seed(1)
    np.random.seed(1)
    assert expected[0] != expected[1] != expected[2] and expected[0] != tokens(made(seed=1))
    second.set_epoch(2)  # as after a resume, and in another order
    order = np.random.default_rng(0).permutation(len(second))
    assert tokens(second[int(i)] for i in order) == [expected[2][i] for i in order]
    second.set_epoch(0)
    assert tokens(second) == expected[0] and tokens([second[-1]]) == expected[0][-1:]
    # Workers that keep their copy of the dataset hear of the epoch, too.
    loader = DataLoader(second, None, num_workers=2, persistent_workers=True)
    for epoch in (0, 1, 0, 2):
        second.set_epoch(epoch)
        assert tokens(loader) == expected[epoch]


class Recorder(torch.nn.Module):
    """Keeps the rows it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight, self.rows = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, input_ids, labels, attention_mask, **kwargs):
        self.rows += [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        return {"loss": self.weight * 1.0}


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_trainer_takes_the_epochs_in_turn(tmp_path, kind):
    from transformers import Trainer, TrainingArguments

    made = {"map": SegmentDataset, "stream": SegmentStream}[kind]
    dataset = made([counted(n) for n in (60, 45, 50)], 20, 8, batch_size=4)  # 8 + 6 + 7 segments
    model, options = Recorder(), {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(
        tmp_path, max_steps=18, per_device_train_batch_size=4, train_sampling_strategy="sequential", **options
    )
    Trainer(model, arguments, train_dataset=dataset, data_collator=SegmentCollator(0)).train()
    assert model.rows == [ids for epoch in range(3) for ids in tokens(in_epoch(dataset, epoch))]


def test_a_datasets_column_is_a_sequence_of_pieces():
    datasets = pytest.importorskip("datasets")
    rows = [counted(30), counted(12)]
    column = datasets.Dataset.from_dict({"input_ids": rows})["input_ids"]
    a, b = (SequentialDataset(p, context=16, num_latents=8) for p in (rows, column))
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, b, strict=True))
    assert tokens(SegmentDataset(column, 16, 8)) == tokens(SegmentDataset(rows, 16, 8))


class Lazy:
    """Pieces that say which of them were read."""

    def __init__(self, lengths):
        self.lengths, self.read = lengths, []

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        self.read.append(index)
        return np.arange(self.lengths[index], dtype=np.uint16)


def test_pieces_are_read_when_they_are_needed():
    lengths = [30, 12, 44]
    pieces = Lazy(lengths)
    for made in (SegmentDataset, SequentialDataset):
        dataset = made(pieces, 16, 8, lengths=np.array(lengths))
        assert not pieces.read and dataset.padding(2) >= 0 and len(dataset) == 4 + 2 + 6
        assert tokens(dataset) == tokens(made([counted(length) for length in lengths], 16, 8))
        assert len(pieces.read) == len(dataset)
        pieces.read.clear()
    assert dataset.num_notes == 29 + 11 + 43


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


@pytest.mark.parametrize("context", [2048, 8192, 32768])
@pytest.mark.parametrize("batch_size", [2, 5, 16])
@pytest.mark.parametrize("made", [SegmentDataset, SegmentStream])
def test_batches_hold_segments_of_similar_lengths(made, context, batch_size):
    lengths = np.random.default_rng(0).lognormal(9.3, 0.7, 100).astype(int)  # about those of piano performances
    pieces = [np.zeros(length, dtype=np.uint16) for length in lengths]
    items = [len(item["input_ids"]) for item in made(pieces, context, 1024, batch_size=batch_size)]
    assert len(items) == sum(-(-(length - 1) // 1024) for length in lengths)
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    share = 1 - sum(items) / sum(max(batch) * len(batch) for batch in batches)
    assert share < 0.04
    # The order of the batches and what is in them stay random.
    firsts = np.array([batch[0] for batch in batches])
    assert abs(np.corrcoef(firsts[1:], firsts[:-1])[0, 1]) < 0.4
    if made is SegmentDataset:
        dataset = made(pieces, context, 1024, batch_size=batch_size)
        alone = made(pieces, context, 1024)
        assert dataset.padding() == pytest.approx(share)
        assert dataset.padding(1) == 0 and alone.padding(batch_size) > (0.15 if context > 2048 else 0.01)
        # Grouping draws the same segments in another order.
        assert sorted(map(dataset.segment, range(len(items)))) == sorted(map(alone.segment, range(len(items))))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 200, 258, 515])
def test_grouping_keeps_every_item_and_full_batches_first(count):
    rng = np.random.default_rng(0)
    places = []
    for _ in range(20):
        order = grouped_order(np.arange(count) * 2, 4, rng)
        assert sorted(order) == list(range(count))
        places += order[count - count % 4 :].tolist()
    if count == 7:
        assert set(places) == {0, 1, 2, 4, 5, 6}  # the first or the last three: no segment is always the last one


# ---- augmentation


class Stretch:
    """Shortens or lengthens, as a change of tempo does: drops or repeats one token after the first."""

    def __init__(self, by: int):
        self.by = by

    def __call__(self, ids, rng):
        assert ids.dtype == np.int64 and isinstance(rng, np.random.Generator)
        return np.concatenate([ids[:1], np.repeat(ids[1], max(0, self.by)), ids[1 + max(0, -self.by) :]])


def test_targets_are_the_last_ones_after_augmentation():
    for by in (-2, 0, 3):
        plain = SegmentDataset([counted(60)] * 5, 20, 8, position_uniform=True)
        dataset = SegmentDataset([counted(60)] * 5, 20, 8, position_uniform=True, augment=Stretch(by))
        for index, (before, item) in enumerate(zip(plain, dataset, strict=True)):
            ids = item["input_ids"]
            assert len(ids) <= 20 and item["labels"][0] == -100
            if len(before["input_ids"]) + by < 2:
                assert ids.tolist() == before["input_ids"].tolist()
                continue
            number = len(targets(before))
            if plain.segment(index)[3] == 1:  # from BOS on: all of it, where that is not too much
                number = 8
            expected = min(number, len(ids) - 1)
            assert targets(item) == ids[-expected:].tolist()
            assert len(ids) == min(20, len(before["input_ids"]) + by)
    assert tokens(SegmentDataset([counted(9)], 8, 8, augment=Stretch(0))) == [counted(9)]


@pytest.mark.filterwarnings("ignore:.*piano", "ignore:.*drum notes", "ignore:.*struck twice")
def test_a_change_of_tempo_keeps_the_targets():
    tokenizer = PerceiverSTokenizer()
    ids = np.array([*tokenizer.midi_to_ids(band(qpm=12)), tokenizer.eos_token_id], dtype=np.uint16)
    augment = PerceiverSAugmentation(tokenizer, transpose=0, tempo=0.3)
    plain, dataset = (
        SegmentDataset([ids] * 20, 96, 32, position_uniform=True, augment=augment) for augment in (None, augment)
    )
    lengths = []
    for before, item in zip(plain, dataset, strict=True):
        old, new = before["input_ids"], item["input_ids"]
        number, lengths = len(targets(before)), [*lengths, len(new) - len(old)]
        if int((before["labels"] == -100).sum()) == 1:
            number = 32
        assert targets(item) == new[-min(number, len(new) - 1) :].tolist() and len(new) <= 96
        if len(new) < 96:  # nothing was cut off at the front
            assert sorted(new[new < 128]) == sorted(old[old < 128]) and (new[0] == BOS) == (old[0] == BOS)
        assert (new[-1] == tokenizer.eos_token_id) == (old[-1] == tokenizer.eos_token_id)
    assert min(lengths) < 0 and max(lengths) > 0 and np.count_nonzero(lengths) > len(dataset) / 8


# ---- streams


def test_a_stream_draws_as_the_dataset_does():
    options = {"context": 20, "num_latents": 8}
    lengths = [2, 9, 10, 81, 82]
    stream = SegmentStream([counted(length) for length in lengths], **options, batch_size=3)
    assert len(list(stream)) == 1 + 1 + 2 + 10 + 11
    for mode in ({}, {"position_uniform": True}, {"mode": "baseline"}):
        pieces = [np.arange(60) + 1000 * k for k in range(400)]  # draws go by what is in a piece
        drawn = np.bincount([int(i["input_ids"][-1]) % 1000 for i in SegmentStream(pieces, **options, **mode)])
        expected = np.bincount([int(i["input_ids"][-1]) % 1000 for i in SegmentDataset(pieces, **options, **mode)])
        assert len(drawn) == len(expected) and drawn.nonzero()[0].min() == expected.nonzero()[0].min()
        assert np.abs(drawn - expected)[:59].max() < 5 * np.sqrt(2 * 3200 / 40)


def test_a_streams_segments_depend_on_seed_epoch_and_piece():
    def drawn(pieces, seed=0, epoch=0):
        stream = SegmentStream(pieces, 20, 8, augment=lambda ids, rng: ids + 1000 * rng.integers(9), seed=seed)
        return tokens(in_epoch(stream, epoch))

    pieces = [np.arange(60) + k for k in range(30)]
    assert drawn(pieces) == drawn(pieces)
    assert sorted(drawn(pieces)) == sorted(drawn(pieces[::-1])) != sorted(drawn(pieces, epoch=1))
    assert sorted(drawn(pieces)) != sorted(drawn(pieces, seed=1))
    assert sorted(drawn(pieces)) == sorted(drawn(pieces[:9]) + drawn(pieces[9:]))


def test_a_stream_holds_a_part_of_its_pieces():
    read, most = 0, 0

    def pieces():
        nonlocal read
        for k in range(1500):
            read += -(-(59 - k % 50) // 8)
            yield np.arange(k % 50, 60)

    for given, _ in enumerate(SegmentStream(pieces(), 20, 8, batch_size=4)):
        most = max(most, read - given)
    assert given + 1 == read and read > 5000 and most <= 2 * 1024 + 8


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_processes_share_a_stream(workers):
    from accelerate.data_loader import IterableDatasetShard

    datasets = pytest.importorskip("datasets")
    rows = [list(range(k, k + 40)) for k in range(40)]
    streamed = datasets.Dataset.from_dict({"input_ids": rows, "path": [str(k) for k in range(40)]})
    streamed = streamed.to_iterable_dataset(num_shards=3).shuffle(seed=0, buffer_size=10)
    orders = []
    for pieces in (streamed, streamed.with_format("numpy"), rows):
        stream = SegmentStream(pieces, 20, 8, batch_size=2)
        expected = [sorted(tokens(SegmentStream(rows, 20, 8)))]
        stream.set_epoch(1)
        expected.append(sorted(tokens(in_epoch(SegmentStream(rows, 20, 8), 1))))
        loader = DataLoader(stream, None, num_workers=workers, persistent_workers=workers > 0)
        for epoch in (0, 1, 0):
            stream.set_epoch(epoch)
            orders.append(tokens(loader))
            assert sorted(orders[-1]) == expected[epoch]
        assert orders[-1] == orders[-3] != orders[-2]
        if not workers:
            shares = [tokens(IterableDatasetShard(stream, 2, num_processes=2, process_index=k)) for k in (0, 1)]
            assert sorted(shares[0] + shares[1]) == expected[0]


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
        (good, 16, 8, {"seed": -1}, r"seed \(-1\)"),
        (good, 16, 8, {"batch_size": 0}, r"batch_size \(0\)"),
    ):
        with pytest.raises(ValueError, match=word):
            SegmentDataset(pieces, context, latents, **options)
    with pytest.raises(ValueError, match="no pieces"):
        SequentialDataset([], 16, 8)
    with pytest.raises(ValueError, match="num_latents"):
        SequentialDataset(good, 8, 16)
    for made in (SegmentDataset, SequentialDataset):
        with pytest.raises(ValueError, match="2 numbers for 1 pieces"):
            made(good, 16, 8, lengths=[30, 30])
    with pytest.raises(ValueError, match="piece 0 ends before"):
        list(SegmentDataset(good, 16, 8, lengths=[3000]))
    with pytest.raises(ValueError, match="'random' is none"):
        SegmentStream(good, 16, 8, mode="random")
    for pieces, word in (([*good, [BOS]], "piece 1 has 1 tokens"), ([], "no pieces"), (iter([]), "only once")):
        with pytest.raises(ValueError, match=word):
            list(SegmentStream(pieces, 16, 8))
    with pytest.raises(ValueError, match="2 workers cannot share a generator"):
        list(DataLoader(SegmentStream((p for p in good), 16, 8), None, num_workers=2))
