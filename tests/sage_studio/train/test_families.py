"""What surrounds the datasets: whole steps, pieces from mapped files, configs and their changes."""

import json

import numpy as np
import pytest
from conftest import tiny_model
from datasets import Dataset

from sage_studio.families import PERCEIVERS, SAGE_MUSIC
from sage_studio.train.arguments import ModelArguments
from sage_studio.train.parts import Pieces, WholeBatches, config_changes, family_named, start


@pytest.mark.parametrize(
    ("items", "rows", "batches", "kept"), [(23, 4, 2, 16), (23, 4, 1, 20), (7, 4, 2, 4), (3, 4, 2, 3)]
)
def test_an_epoch_is_whole_steps_where_there_is_one(items, rows, batches, kept):
    class Counted(list):
        def set_epoch(self, epoch):
            self.epoch = epoch

    dataset = Counted(range(items))
    whole = WholeBatches(dataset, rows, batches)
    assert len(whole) == kept and [whole[index] for index in range(kept)] == list(range(kept))
    whole.set_epoch(3)
    assert dataset.epoch == 3


def test_pieces_are_arrays_and_know_their_lengths():
    rows = [[1, 5, 2], [1, 2], [1, 9, 9, 2]]
    pieces = Pieces(Dataset.from_dict({"input_ids": rows, "tokens": [3, 2, 4], "notes": [1, 0, 2]}).select([2, 0]))
    assert len(pieces) == 2 and pieces.lengths.tolist() == [4, 3]
    assert all(isinstance(piece, np.ndarray) for piece in pieces) and [*pieces[0]] == rows[2]


def test_a_model_of_neither_family_is_named(tmp_path):
    (tmp_path / "new.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"new\.json: a model of the type 'llama'"):
        family_named(str(tmp_path / "new.json"))


def test_changes_of_a_config_are_json_or_text():
    options = ModelArguments(config=["num_latents=64", "cross_scales=[null, 96]", "kv_routing=token"], draft_tokens=2)
    changes = {"num_latents": 64, "cross_scales": [None, 96], "kv_routing": "token", "num_mtp_layers": 2}
    assert config_changes(options) == changes


def test_the_family_is_the_checkpoints_the_configs_or_the_bases(tmp_path):
    assert family_named("sage-music") is SAGE_MUSIC and family_named("perceivers") is PERCEIVERS
    (tmp_path / "new.json").write_text(json.dumps({"model_type": "perceivers"}))
    assert family_named(str(tmp_path / "new.json")) is PERCEIVERS
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "perceivers"}))
    assert family_named(str(tmp_path / "adapter")) is PERCEIVERS


@pytest.mark.parametrize("options", [{"config": ["attention_dropout=0.1"]}, {"draft_tokens": 2}], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_with_an_adapter_is_not_changed(tmp_path, tokenizer, whole, options):
    """Beside a whole model or alone: Transformers would load the changed model with the adapter still apart."""
    if whole:
        tiny_model(tokenizer).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "sage-music"}')
    with pytest.raises(ValueError, match="has an adapter: merge it"):
        start(ModelArguments(model=str(tmp_path), **options))
