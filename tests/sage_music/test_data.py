"""Training blocks: whole bars from BOS, transposed music, every evaluation token once."""

import numpy as np
import pytest
import torch
from conftest import band

from sage_music.data import BlockDataset, WindowDataset


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return [
        np.array([*tokenizer.midi_to_ids(band(bars=b, seed=b)), tokenizer.eos_token_id], dtype=np.uint16)
        for b in (2, 9)
    ]


def test_blocks_begin_at_a_bar_after_bos(tokenizer, pieces):
    torch.manual_seed(0)
    dataset = BlockDataset(pieces, tokenizer, block_size=200)
    bar = tokenizer.get_vocab()["Bar_None"]
    for index in range(len(dataset)):
        for _ in range(10):
            item = dataset[index]
            assert item["input_ids"].shape == item["labels"].shape == (200,)
            assert item["input_ids"][:2].tolist() == [tokenizer.bos_token_id, bar]
            starts = (item["input_ids"] == tokenizer.bos_token_id).nonzero().flatten()[1:]
            assert all(item["input_ids"][s - 1] == tokenizer.eos_token_id for s in starts)


def test_blocks_are_transposed_and_cropped_anew(tokenizer, pieces):
    torch.manual_seed(0)
    still, moving = (BlockDataset(pieces[1:], tokenizer, 64, transpose=t) for t in (0, 6))
    first = {tuple(still[0]["input_ids"].tolist()) for _ in range(60)}
    second = {tuple(moving[0]["input_ids"].tolist()) for _ in range(60)}
    assert 2 < len(first) < len(second)


def test_the_same_seed_gives_the_same_blocks(tokenizer, pieces):
    dataset = BlockDataset(pieces, tokenizer, 64)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([dataset[i % len(dataset)]["input_ids"].tolist() for i in range(5)])
    assert runs[0] == runs[1]


def test_windows_predict_every_token_once(tokenizer, pieces):
    dataset = WindowDataset(pieces, tokenizer, block_size=100)
    predicted = [
        token
        for item in dataset
        for token in item["labels"][1:].tolist()  # the shifted loss never sees the first
        if token != -100
    ]
    assert predicted == [token for piece in pieces for token in piece[1:].tolist()]
    assert dataset.num_tokens == len(predicted)
    assert dataset.num_notes == sum(band(bars=b, seed=b).note_num() for b in (2, 9))


def test_bpe_blocks_refuse_to_transpose_ids(bpe_tokenizer):
    with pytest.raises(ValueError, match="transpose"):
        BlockDataset([np.array([1, 3, 2])], bpe_tokenizer, 64)
