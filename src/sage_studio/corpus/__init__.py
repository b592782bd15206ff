"""Folders of MIDI files to splits, token ids and shards: what training needs of a corpus, for either family (no torch).

`files` finds them, `encoding` makes the record of one, `workers` guards processes that do so for many, `store` keeps
what they made. `splits` tells which files are the same music and deals them, `prepared` does all of it for folders,
`shards` writes and reads the result as Parquet.
"""

from .encoding import MidiTokenizer, Record, encode_file, tokenizer_key
from .prepared import Corpus, prepare_corpus
from .shards import is_prepared, read_shards, write_shards
from .store import TokenStore, encode_corpus

__all__ = [
    "Corpus",
    "MidiTokenizer",
    "Record",
    "TokenStore",
    "encode_corpus",
    "encode_file",
    "is_prepared",
    "prepare_corpus",
    "read_shards",
    "tokenizer_key",
    "write_shards",
]
