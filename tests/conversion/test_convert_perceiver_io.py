"""perceiver-io's causal checkpoints: recorded logits of theirs, cached decoding, and a folder that makes music."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from perceiver_checks import TOLERANCE, assert_cached_equals_full, assert_every_key_counts, recorded
from safetensors.torch import load_file, save_file
from symusic import Note, Score, Tempo, Track

from conversion.convert_perceiver_io import FREQUENCIES, convert, main
from conversion.weights import ConversionError
from sage_studio.checkpoints import load

FIXTURES = Path(__file__).parent / "fixtures"
AUDIO, TEXT = FIXTURES / "perceiver_io.safetensors", FIXTURES / "perceiver_io_text.safetensors"
SIZES = {AUDIO: {"context": 24, "latents": 8}, TEXT: {"latents": 8, "rotary_layers": -1}}


@pytest.fixture(params=[AUDIO, TEXT], ids=["audio", "text"])
def converted(request):
    return request.param, convert(request.param, **SIZES[request.param])[0]


def test_logits_are_those_of_the_original(converted):
    file, model = converted
    ids, theirs = recorded(file.with_name(f"{file.stem}_logits.npz"))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs["logits"], **TOLERANCE)
        torch.testing.assert_close(model(ids[:, :11], num_latents=7).logits, theirs["logits_of_11"], **TOLERANCE)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, theirs["logits_padded"], **TOLERANCE)


def test_cached_decoding_agrees(converted):
    file, model = converted
    ids, _ = recorded(file.with_name(f"{file.stem}_logits.npz"))
    # Learned positions end at the context; without them it moves on.
    assert_cached_equals_full(model, ids if file == TEXT else torch.cat((ids, ids.flip(1)), dim=1))


@pytest.mark.parametrize("file", [AUDIO, TEXT], ids=["audio", "text"])
def test_every_key_counts(tmp_path, file):
    optional = [f"backend_model.{FREQUENCIES}"]
    if file == AUDIO:  # two halves of a norm are missed together, one alone is not
        with pytest.raises(ConversionError, match=r"missing: out_norm\.bias"):
            state = {name: tensor for name, tensor in load_file(file).items() if not name.endswith("out_norm.bias")}
            save_file(state, tmp_path / "half.safetensors")
            convert(tmp_path / "half.safetensors", **SIZES[file])
    else:  # a model without an output bias, or without positions, is a model too
        optional += ["backend_model.output_adapter.bias", "backend_model.input_adapter.pos_embedding.weight"]
    embedding = ["backend_model.input_adapter.txt_embedding.weight"] if file == AUDIO else []  # no bias to compare with
    assert_every_key_counts(lambda path: convert(path, **SIZES[file]), file, tmp_path, optional, embedding)


def test_sizes_come_from_the_config(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(AUDIO, folder / "model.safetensors")
    said = {"num_heads": 3, "max_seq_len": 30, "max_latents": 5, "num_self_attention_rotary_layers": 2}
    (folder / "config.json").write_text(json.dumps({"model_config": said}))
    config = convert(folder)[0].config
    assert (config.max_position_embeddings, config.num_latents, config.num_rotary_layers) == (30, 5, 2)
    assert convert(folder, latents=4)[0].config.num_latents == 4
    for wrong, message in (({"num_heads": "three"}, "num_heads 'three'"), ([8], "no set of fields")):
        (folder / "config.json").write_text(json.dumps({"model_config": wrong}))
        with pytest.raises(ConversionError, match=message):
            convert(folder)
    lone = convert(AUDIO)[0].config  # as the public checkpoint's
    assert (lone.max_position_embeddings, lone.num_latents, lone.num_rotary_layers) == (6144, 2048, 1)


def test_a_lightning_checkpoint_is_read(tmp_path):
    """Also one without the table of frequencies, from which the number of heads would be read."""
    state = {name.replace("backend_model.", "model."): tensor for name, tensor in load_file(AUDIO).items()}
    del state[f"model.{FREQUENCIES}"]
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "last.ckpt")
    ids, theirs = recorded(AUDIO.with_name("perceiver_io_logits.npz"))
    with torch.no_grad():
        logits = convert(tmp_path / "last.ckpt", heads=3, **SIZES[AUDIO])[0](ids).logits
    torch.testing.assert_close(logits, theirs["logits"], **TOLERANCE)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (AUDIO, {"heads": 5}, "5 heads: the model is 24 wide.*it has 3"),
        (AUDIO, {"heads": 4}, "4 heads.*it has 3"),
        (AUDIO, {"heads": 0}, "0 heads.*it has 3"),
        (AUDIO, {"rotary_layers": -7}, "-7 rotary layers: the model has 2"),
        (AUDIO, {"rotary_layers": 99}, "99 rotary layers: the model has 2"),
        (TEXT, {"context": 20}, "20 tokens: the model has learned 24"),
        (TEXT, {"latents": 25}, r"num_latents \(25\) must lie in 1\.\.max_position_embeddings"),
    ],
)
def test_options_that_the_tensors_contradict(file, options, message):
    with pytest.raises(ConversionError, match=message):
        convert(file, **options)


def test_other_frequencies_are_refused(tmp_path):
    state = load_file(AUDIO)
    state[f"backend_model.{FREQUENCIES}"] = state[f"backend_model.{FREQUENCIES}"] * 2
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ConversionError, match="other rotary frequencies"):
        convert(tmp_path / "other.safetensors")


def test_the_folder_makes_music(tmp_path, capsys):
    output = tmp_path / "converted"
    assert main([str(AUDIO), str(output), "--context", "24", "--latents", "8"]) == 0
    printed = capsys.readouterr()
    assert "2 layers, 3 heads of 8, 8 latents over 24 tokens" in printed.out
    assert printed.err.startswith("note: 389 ids") and "no end" in printed.err and printed.err.count("\n") == 1
    model, tokenizer = load(output)
    score = Score(480)
    score.tempos.append(Tempo(0, 120))
    score.tracks.append(Track(program=0))
    score.tracks[0].notes.extend(Note(480 * i, 240, 60 + i, 64) for i in range(4))
    prompt = torch.tensor([tokenizer.midi_to_ids(score)])
    # PAD is the only special token, and every note says its velocity.
    assert prompt.max() < 388 and sum(356 <= index < 388 for index in prompt[0].tolist()) == 4
    torch.manual_seed(0)
    written = model.generate(prompt, max_new_tokens=40)
    assert not torch.equal(written, model.generate(prompt, max_new_tokens=40))  # it samples
    assert written.shape[1] == prompt.shape[1] + 40 and written.max() < 388
    assert tokenizer.decode_midi(written[0]).note_num() > 4


def test_main_says_what_is_wrong_in_one_line(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("kept")
    for argv in ([AUDIO, tmp_path / "taken"], [tmp_path / "absent.bin", tmp_path / "new"]):
        assert main([str(part) for part in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
