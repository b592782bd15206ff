"""perceiver-ar-pytorch's checkpoints: logits recorded and live, wrappers of public models, and a folder to play."""

from pathlib import Path

import pytest
import torch
from perceiver_checks import TOLERANCE, assert_cached_equals_full, assert_every_key_counts, recorded
from safetensors.torch import load_file, save_file

from conversion.convert_perceiver_ar_pytorch import FREQUENCIES, convert, main
from conversion.weights import ConversionError
from perceivers import PerceiverSForCausalLM
from sage_studio.checkpoints import load

FIXTURES = Path(__file__).parent / "fixtures"
FILE = FIXTURES / "perceiver_ar_pytorch.safetensors"
LOGITS = FIXTURES / "perceiver_ar_pytorch_logits.npz"


def test_logits_are_those_of_the_original():
    model, _ = convert(FILE, prefix=14)
    ids, theirs = recorded(LOGITS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs["logits"], **TOLERANCE)
        torch.testing.assert_close(model(ids[:, :19], num_latents=5).logits, theirs["logits_of_19"], **TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"heads": 2, "dim_head": 64}, {}),
        ({"heads": 3, "dim_head": 46, "perceive_depth": 2}, {"head_dim": 46}),
        ({"heads": 1, "dim_head": 80, "ff_mult": 3}, {"head_dim": 80}),
    ],
    ids=["default", "two cross-attentions", "wide heads"],
)
def test_logits_are_those_of_the_package(tmp_path, shape, options):
    """Against the package itself, where it is installed."""
    package = pytest.importorskip("perceiver_ar_pytorch")
    torch.manual_seed(1)
    theirs = package.PerceiverAR(num_tokens=50, dim=24, depth=2, max_seq_len=20, cross_attn_seq_len=11, **shape).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("weight"))
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    model, tokenizer = convert(tmp_path / "model.pth", prefix=11, **options)
    ids = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids), **TOLERANCE)
    assert tokenizer is None and model.config.rotary_dim == max(32, shape["dim_head"] // 2)


def test_cached_decoding_agrees():
    model, _ = convert(FILE, prefix=14)
    assert_cached_equals_full(model, recorded(LOGITS)[0])


def test_every_key_counts(tmp_path):
    assert_every_key_counts(lambda path: convert(path, prefix=14), FILE, tmp_path, [FREQUENCIES], ["pos_emb.weight"])


@pytest.mark.parametrize("prefix", ["module.net.", "net.", ""], ids=["distributed", "wrapped", "bare"])
def test_wrappers_are_taken_off(tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in load_file(FILE).items()}
    torch.save({"state_dict": state, "epoch": 2} if prefix == "" else state, tmp_path / "model.pth")
    ids, theirs = recorded(LOGITS)
    with torch.no_grad():
        torch.testing.assert_close(
            convert(tmp_path / "model.pth", prefix=14)[0](ids).logits, theirs["logits"], **TOLERANCE
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "context of 24 tokens: say with prefix"),
        ({"prefix": 24}, "prefix of 24 tokens does not lie within the context of 24"),
        ({"prefix": 14, "head_dim": 60}, "heads of 60 channels do not divide the attention's 128"),
        ({"prefix": 14, "head_dim": 128}, "not those of 64 rotated channels.*say --head-dim"),
        ({"prefix": 14, "head_dim": 16}, "16 channels are narrower than the 32"),
    ],
)
def test_what_no_tensor_tells_must_fit(options, message):
    with pytest.raises(ConversionError, match=message):
        convert(FILE, **options)


def test_the_prefix_of_the_public_models_is_known(tmp_path):
    state = load_file(FILE)
    save_file(state | {"pos_emb.weight": torch.zeros(2048, 16)}, tmp_path / "model.safetensors")
    config = convert(tmp_path / "model.safetensors")[0].config
    assert (config.max_position_embeddings, config.num_latents) == (2048, 1024)


def test_the_folder_makes_music(tmp_path, capsys):
    output = tmp_path / "converted"
    assert main([str(FILE), str(output), "--prefix", "14"]) == 0
    assert "390 ids" in capsys.readouterr().err
    model, tokenizer = load(output)
    assert (model.config.eos_token_id, model.config.pad_token_id, tokenizer.bos_token_id) == (388, 389, None)
    prompt = torch.tensor([tokenizer("VELOCITY_16 NOTE_ON_60 TIME_SHIFT_500")["input_ids"]])
    torch.manual_seed(0)
    written = model.generate(prompt, max_length=24, min_length=24, do_sample=True)
    assert written.shape == (1, 24) and tokenizer.decode_midi(written[0]).note_num() > 0
    with pytest.raises(ValueError, match="learned 24 positions"):
        model.generate(prompt, max_length=26)


def test_another_encoding_gives_the_model_alone(tmp_path, capsys):
    state = load_file(FILE)
    for name in ("token_emb.weight", "to_logits.weight"):
        state[name] = torch.cat((state[name], state[name]))[:500].contiguous()
    save_file(state, tmp_path / "model.safetensors")
    output = tmp_path / "converted"
    assert main([str(tmp_path / "model.safetensors"), str(output), "--prefix", "14"]) == 0
    assert "500 ids of an encoding that is not PerceiverSTokenizer's" in capsys.readouterr().err
    assert not (output / "tokenizer_config.json").exists()
    model = PerceiverSForCausalLM.from_pretrained(output)
    assert model.config.grammar is None
    assert model.generate(torch.tensor([[1, 2, 3]]), max_length=20, do_sample=False).shape == (1, 20)
    assert convert(FILE, prefix=14, events=False)[1] is None
