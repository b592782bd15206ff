"""Training rows are full, packed by position and reproducible; evaluation tokens come once; streams lose nothing."""

import pickle
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import band, tiny_model
from torch.utils.data import DataLoader, default_collate

from sage_music.data import BlockDataset, BlockStream, WindowDataset


def encode(tokenizer, bars, seed):
    ids = tokenizer.midi_to_ids(band(bars=bars, seed=seed))
    return np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16)


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return [encode(tokenizer, bars=bars, seed=bars) for bars in (2, 9)]


@pytest.fixture(scope="module")
def many(tokenizer):
    """60 short pieces; each has a pitch of its own, which nothing else has, as its first note."""
    pieces = [encode(tokenizer, bars=1 + seed % 3, seed=seed) for seed in range(60)]
    pitch = tokenizer.get_vocab()["Pitch_0"]
    for number, piece in enumerate(pieces):
        melodic = (piece >= pitch) & (piece < pitch + 128)
        piece[melodic] = pitch + number
    return pieces


def numbers_of(tokenizer, ids):
    """Which of `many` are in a row."""
    pitch = tokenizer.get_vocab()["Pitch_0"]
    return {int(i) - pitch for i in ids if pitch <= i < pitch + 128}


def sequences_of(item):
    """The sequences of a row, by its positions."""
    starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], len(item["position_ids"])]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def blocks(dataset):
    return [{name: tensor.tolist() for name, tensor in dataset[i].items()} for i in range(len(dataset))]


def test_a_block_is_full_of_sequences_that_begin_at_a_bar(tokenizer, pieces):
    dataset = BlockDataset(pieces, tokenizer, block_size=200)
    bar = tokenizer.get_vocab()["Bar_None"]
    for epoch in range(8):
        dataset.set_epoch(epoch)
        for item in (dataset[i] for i in range(len(dataset))):
            assert {name: tensor.dtype for name, tensor in item.items()} == dict.fromkeys(
                ("input_ids", "labels", "position_ids"), torch.int64
            )
            assert all(tensor.shape == (200,) for tensor in item.values())
            ids, labels = item["input_ids"], item["labels"]
            assert not (ids == tokenizer.pad_token_id).any()
            sequences = sequences_of(item)
            for part in sequences:
                assert item["position_ids"][part].tolist() == list(range(part.stop - part.start))
                assert ids[part][:2].tolist() == [tokenizer.bos_token_id, bar][: part.stop - part.start]
                assert labels[part][0] == -100 and torch.equal(labels[part][1:], ids[part][1:])
            assert all(ids[part.start - 1] == tokenizer.eos_token_id for part in sequences[1:])


def test_blocks_follow_from_seed_epoch_and_index_alone(tokenizer, pieces):
    def made(epoch=0, seed=0):
        dataset = BlockDataset(pieces, tokenizer, 64, seed=seed)
        dataset.set_epoch(epoch)
        return dataset

    expected = blocks(made())
    torch.manual_seed(7)
    np.random.seed(7)
    dataset = pickle.loads(pickle.dumps(made(epoch=5)))
    dataset.set_epoch(0)
    backwards = [dataset[i]["input_ids"].tolist() for i in reversed(range(len(dataset)))]
    assert backwards[::-1] == [item["input_ids"] for item in expected]
    assert blocks(made(epoch=1)) != expected
    assert blocks(made(seed=1)) != expected
    order = [int(dataset._order[1][i]) for i in range(len(dataset))]
    assert order != sorted(order) and sorted(order) == dataset.visits.tolist()


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_give_the_same_blocks_in_every_epoch(tokenizer, pieces, persistent):
    dataset = BlockDataset(pieces, tokenizer, 64)
    loader = DataLoader(dataset, num_workers=2, persistent_workers=persistent, batch_size=2)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        got = torch.cat([batch["input_ids"] for batch in loader]).tolist()
        assert got == [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]


def test_pieces_are_visited_by_their_length(tokenizer, many, pieces):
    dataset = BlockDataset(many, tokenizer, 64)
    assert len(dataset) == sum(-(-len(piece) // 64) for piece in many)
    first = [
        numbers_of(tokenizer, item["input_ids"][sequences_of(item)[0]])
        for item in map(dataset.__getitem__, range(len(dataset)))
    ]
    visits = Counter(number for numbers in first for number in numbers)
    assert visits == {number: -(-len(piece) // 64) for number, piece in enumerate(many)}


def test_augmentation_changes_crops_and_blocks_stay_full(tokenizer, pieces):
    seen = []

    def halve(ids, rng):
        seen.append((ids[0], rng.random()))
        return ids[: 1 + len(ids) // 2]

    dataset = BlockDataset(pieces, tokenizer, 200, augment=halve)
    for item in map(dataset.__getitem__, range(len(dataset))):
        lengths = [part.stop - part.start for part in sequences_of(item)]
        assert sum(lengths) == 200 and len(lengths) > 1 and max(lengths) <= 103
        assert not (item["input_ids"] == tokenizer.pad_token_id).any()
    assert {first for first, _ in seen} == {tokenizer.bos_token_id}
    first = list(seen)
    seen.clear()
    blocks(dataset)
    assert seen == first and len({draw for _, draw in seen}) == len(seen)
    with pytest.raises(ValueError, match="BOS"):
        BlockDataset(pieces, tokenizer, 64, augment=lambda ids, rng: ids[1:])[0]


def test_bpe_blocks_are_cut_at_bars_as_they_are(bpe_tokenizer):
    pieces = [encode(bpe_tokenizer, bars=9, seed=seed) for seed in range(2)]
    dataset = BlockDataset(pieces, bpe_tokenizer, 64)
    texts = [text for piece in pieces for text in ["/".join(map(str, piece[1:]))]]
    for item in map(dataset.__getitem__, range(len(dataset))):
        for part in sequences_of(item):
            body = item["input_ids"][part][1:].tolist()
            assert any("/".join(map(str, body)) in text for text in texts)
            assert not body or "Bar" in bpe_tokenizer.convert_ids_to_tokens(body[0])


class Watched:
    """Pieces that count how often they are read."""

    def __init__(self, pieces):
        self.pieces, self.reads = pieces, Counter()

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, index):
        self.reads[range(len(self.pieces))[index]] += 1
        return self.pieces[index]


def test_pieces_are_read_when_they_are_needed(tokenizer, many):
    watched = Watched(many)
    dataset = BlockDataset(watched, tokenizer, 2048, lengths=[len(piece) for piece in many])
    assert not watched.reads
    dataset[3]
    assert 0 < watched.reads.total() < len(many)
    watched = Watched(many)
    windows = WindowDataset(watched, tokenizer, 256)
    assert watched.reads == dict.fromkeys(range(len(many)), 1)
    assert not any(isinstance(value, np.ndarray) and value.size > 257 for value in vars(windows).values())


def test_blocks_of_a_memory_mapped_column(tokenizer, many, tmp_path):
    import datasets

    rows = {"input_ids": many, "tokens": [len(piece) for piece in many]}
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("uint16")), "tokens": datasets.Value("int32")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    column = datasets.load_from_disk(tmp_path / "rows").with_format("numpy")
    dataset = BlockDataset(column["input_ids"], tokenizer, 128, lengths=column["tokens"][:])
    assert blocks(dataset) == blocks(BlockDataset(many, tokenizer, 128))
    windows = [WindowDataset(of, tokenizer, 128) for of in (column["input_ids"], many)]
    assert blocks(windows[0]) == blocks(windows[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pieces": []}, "no pieces"),
        ({"pieces": [np.array([1, 3, 2]), np.array([1])]}, "piece 1 has 1 tokens"),
        ({"lengths": [3]}, "1 entries for 2 pieces"),
        ({"block_size": 1}, "block_size"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tokenizer, pieces, change, message):
    with pytest.raises(ValueError, match=message):
        BlockDataset(**{"pieces": pieces, "tokenizer": tokenizer, "block_size": 64, **change})


def test_windows_predict_every_token_once(tokenizer, pieces, many):
    for group, size in ((pieces, 100), (many, 256), (many, 32), (pieces, 4000)):
        dataset = WindowDataset(group, tokenizer, size)
        predicted = Counter()
        for item in map(dataset.__getitem__, range(len(dataset))):
            labels = item["labels"]
            predicted.update(labels[labels != -100].tolist())
            assert (labels == -100).sum() - (labels[1:] == -100).sum() == 1  # the shifted loss never sees the first
            for part in sequences_of(item):
                assert item["position_ids"][part].tolist() == list(range(part.stop - part.start))
                assert item["input_ids"][part.start] in (tokenizer.bos_token_id, tokenizer.pad_token_id)
        assert predicted == Counter(token for piece in group for token in piece[1:].tolist())
        assert dataset.num_tokens == predicted.total()
    bars = [2, 9]
    assert WindowDataset(pieces, tokenizer, 64).num_notes == sum(band(bars=b, seed=b).note_num() for b in bars)


def test_windows_of_many_short_pieces_leave_little_room(tokenizer, many):
    dataset = WindowDataset(many * 4, tokenizer, 512)
    padding = sum(
        int((item["input_ids"] == tokenizer.pad_token_id).sum())
        for item in map(dataset.__getitem__, range(len(dataset)))
    )
    waste = padding / (512 * len(dataset))
    print(f"{len(many) * 4} windows in {len(dataset)} rows, {waste:.1%} padding")
    assert waste <= 0.05


@pytest.mark.parametrize("routing", ["head", "token"])
def test_nats_of_packed_windows_are_those_of_each_alone(tokenizer, many, routing):
    model = tiny_model(tokenizer, routing, initializer_range=0.1)
    dataset = WindowDataset(many[:12], tokenizer, 256)
    with torch.no_grad():
        batch = default_collate([dataset[i] for i in range(len(dataset))])
        packed = float(model(**batch).loss) * dataset.num_tokens
        alone = 0.0
        for piece in many[:12]:
            ids = torch.from_numpy(piece.astype(np.int64))[None]
            alone += float(model(ids, labels=ids).loss) * (len(piece) - 1)
    assert packed == pytest.approx(alone, rel=1e-5)


def test_a_stream_gives_full_blocks_of_every_piece(tokenizer, many):
    stream = BlockStream(many, tokenizer, 128)
    epochs = []
    for epoch in (0, 0, 1):
        stream.set_epoch(epoch)
        epochs.append([item["input_ids"].tolist() for item in stream])
    assert epochs[0] == epochs[1] != epochs[2]
    assert len(epochs[0]) == len(BlockDataset(many, tokenizer, 128))
    assert set().union(*(numbers_of(tokenizer, ids) for ids in epochs[0])) == set(range(len(many)))
    first = [min(numbers_of(tokenizer, ids[: ids.index(2)] if 2 in ids else ids)) for ids in epochs[0]]
    assert set(first) == set(range(len(many))) and first != sorted(first)  # in random order
    for item in stream:
        assert not (item["input_ids"] == tokenizer.pad_token_id).any()
        for part in sequences_of(item):
            assert item["labels"][part.start] == -100
            assert item["input_ids"][part.start] == tokenizer.bos_token_id
    with pytest.raises(ValueError, match="no pieces"):
        next(iter(BlockStream([], tokenizer, 128)))


def test_a_stream_holds_no_more_pieces_the_longer_it_is(tokenizer, many):
    class Piece(np.ndarray):
        """An array that can be watched."""

    made = gone = most = 0

    def forget():
        nonlocal gone
        gone += 1

    def read():
        nonlocal made
        for piece in many * 20:
            watched = Piece(piece.shape, piece.dtype)
            watched[:] = piece
            weakref.finalize(watched, forget)
            made += 1
            yield watched

    for _ in BlockStream(read(), tokenizer, 64):
        most = max(most, made - gone)
    assert made == 1200 and most <= 3


def test_workers_share_a_streamed_dataset_without_duplicates(tokenizer, many, tmp_path):
    import datasets

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
    files = []
    for shard in range(4):
        files.append(str(tmp_path / f"{shard}.parquet"))
        datasets.Dataset.from_dict({"input_ids": many[shard::4]}, features=features).to_parquet(files[-1])
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=tmp_path)
    # From several shards at a time, datasets ends every epoch with five seconds of sleep.
    rows = rows.with_format("numpy").shuffle(seed=0, buffer_size=10, max_buffer_input_shards=1)
    streams = [BlockStream(pieces, tokenizer, 512) for pieces in (rows["input_ids"], rows, many)]
    for epoch in range(2):
        for stream in streams:
            stream.set_epoch(epoch)
        assert len({str([item["input_ids"].tolist() for item in stream]) for stream in streams[:2]}) == 1
    for stream in (streams[0], streams[2]):
        loader = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
        orders = []
        for epoch in range(2):
            stream.set_epoch(epoch)
            # One visit a piece: each piece leads one block.
            led = [min(numbers_of(tokenizer, item["input_ids"][sequences_of(item)[0]])) for item in loader]
            assert sorted(led) == list(range(len(many)))
            orders.append(led)
        assert orders[0] != orders[1]
