"""Files to records: the ids are the tokenizer's, what is wrong is said, keys tell tokenizers apart."""

import hashlib
import os

import numpy as np
import pytest
from conftest import DATA, band, needs_data

from perceivers import PerceiverSTokenizer
from sage_music import SageMusicTokenizer
from sage_studio.corpus import encode_file, tokenizer_key
from sage_studio.files import midi_files


def check_record(path, tokenizer):
    record, of_bytes = encode_file(path, tokenizer), encode_file(path.read_bytes(), tokenizer)
    assert {**record, "input_ids": 0} == {**of_bytes, "input_ids": 0} and not record["error"]
    assert record["input_ids"].dtype == np.uint16
    assert record["input_ids"].tolist() == [*tokenizer.midi_to_ids(path), tokenizer.eos_token_id]
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and record["fingerprint"]
    return record


def test_a_record_holds_the_tokenizers_ids(tokenizer, tmp_path):
    band(bars=3).dump_midi(tmp_path / "a.mid")
    assert check_record(tmp_path / "a.mid", tokenizer)["notes"] == band(bars=3).note_num()


@pytest.mark.filterwarnings("ignore")
def test_without_an_eos_in_the_vocabulary_a_piece_ends_with_its_last_event(tmp_path):
    plain = PerceiverSTokenizer(end_token=False)
    assert encode_file(band(bars=1).dumps_midi(), plain)["input_ids"].tolist() == plain.midi_to_ids(band(bars=1))


@needs_data()
@pytest.mark.data
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [SageMusicTokenizer, PerceiverSTokenizer])
def test_records_of_real_files_hold_the_tokenizers_ids(make):
    tokenizer = make()
    files = [path for folder in ("multitrack", "piano") for path in midi_files(DATA / folder)[::300]]
    assert len(files) > 10
    for path in files:
        check_record(path, tokenizer)


def test_what_is_wrong_is_in_the_record(tokenizer, tmp_path):
    good = band(bars=1).dumps_midi()
    broken = {
        "empty": b"",
        "not a MIDI": b"RIFF....",
        "truncated": good[:-20],
        "no notes": b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk\0\0\0\4\0\xff\x2f\0",
    }
    for name, data in broken.items():
        record = encode_file(data, tokenizer)
        (tmp_path / "x.mid").write_bytes(data)
        assert encode_file(tmp_path / "x.mid", tokenizer)["error"] == record["error"], name
        assert name in record["error"] or "damaged" in record["error"], record["error"]
        assert "<bytes>" not in record["error"] and "x.mid" not in record["error"]
        assert record["sha256"] == hashlib.sha256(data).hexdigest() and not len(record["input_ids"])
    drums = band(bars=1)
    drums.tracks = [track for track in drums.tracks if track.is_drum]
    drums = encode_file(drums.dumps_midi(), PerceiverSTokenizer())
    assert drums["error"] == "it holds no notes but drums, which a piano cannot play"
    (tmp_path / "large.mid").write_bytes(good)
    assert "more than the limit of 100" in encode_file(tmp_path / "large.mid", tokenizer, 100)["error"]
    os.mkfifo(tmp_path / "pipe.mid")
    assert encode_file(tmp_path / "pipe.mid", tokenizer)["error"] == "it is not a regular file"
    for path, reason in ((tmp_path / "none.mid", "No such file"), (tmp_path, "directory")):
        record = encode_file(path, tokenizer)
        assert record["error"].startswith("cannot be opened (") and reason in record["error"]
        assert not record["sha256"]


def test_a_slip_of_the_reader_is_the_files_error(tokenizer, tmp_path):
    class Slips:
        vocab_size, eos_token_id = 70_000, 1

        def midi_to_ids(self, source):
            raise IndexError("list index\nout of range " + 500 * "x")

    record = encode_file(band(bars=1).dumps_midi(), Slips())
    assert record["error"].startswith("IndexError: list index out of range xxx") and len(record["error"]) <= 200
    assert record["input_ids"].dtype == np.uint32


def test_keys_are_those_of_what_makes_the_ids(tokenizer, bpe_tokenizer, tmp_path):
    tokenizers = {
        "on every note": tokenizer,
        "on change": SageMusicTokenizer(),  # the same vocabulary
        "no names": SageMusicTokenizer(track_programs={}),
        "bpe": bpe_tokenizer,
        "piano": PerceiverSTokenizer(),
        "dry": PerceiverSTokenizer(fold_pedal=False),  # the same vocabulary
    }
    keys = {name: tokenizer_key(each) for name, each in tokenizers.items()}
    assert len(set(keys.values())) == len(keys)
    for name, each in tokenizers.items():
        each.save_pretrained(tmp_path / name)
        loaded = type(each).from_pretrained(tmp_path / name)
        assert tokenizer_key(loaded) == keys[name], name
        loaded.save_pretrained(tmp_path / "again")
        assert tokenizer_key(type(each).from_pretrained(tmp_path / "again")) == keys[name], name
