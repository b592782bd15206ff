"""SAGE-Music with one attribute goes out to a stock Llama that loads without this package."""

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import band, tiny_model
from miditok import REMI
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conversion.convert_llama import convert as convert_in
from conversion.convert_llama import main as main_in
from conversion.convert_to_llama import convert, llama_of, main
from conversion.weights import ConversionError
from sage_studio.publishing.cards import check_card
from sage_studio.publishing.export import ExportError, export

KINDS = {
    "full heads": ("mha", {}),
    "grouped": ("gqa", {"tie_word_embeddings": False}),
    "multi-query": ("mqa", {"mlp_bias": True, "attention_bias": True}),
    "output bias": ("gqa", {"attention_output_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
}

ALONE = """
import sys
for name in ("sage_music", "perceivers", "sage_studio"):
    sys.modules[name] = None  # importing one of them fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[1] + "/ids.pt")
with torch.no_grad():
    torch.save((type(model).__name__, model(ids).logits, model.generate(ids[:, :20], max_new_tokens=30, top_k=1)),
               sys.argv[1] + "/found.pt")
"""


def varied(tokenizer, routing: str, **options):
    """A tiny model whose biases and norms are not at their beginnings, and whose logits are not in the hundreds."""
    options = {"num_attention_heads": 8, "initializer_range": 0.2, **options}
    if routing == "mha":
        options["num_key_value_heads"] = 8
    model = tiny_model(tokenizer, routing, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                weight.add_(torch.randn_like(weight) * 0.3)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_and_back_again(tmp_path, tokenizer, kind):
    routing, options = KINDS[kind]
    model = varied(tokenizer, routing, rms_norm_eps=1e-4, **options)
    model.save_pretrained(tmp_path / "sage")
    tokenizer.save_pretrained(tmp_path / "sage")
    convert(tmp_path / "sage", tmp_path / "llama")
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(llama) is LlamaForCausalLM
    assert llama.generation_config.temperature == 0.7 and llama.generation_config.top_p == 0.9
    ids = torch.tensor([tokenizer.midi_to_ids(band(seed=seed))[:120] for seed in (1, 2)])
    with torch.no_grad():
        expected = model(ids).logits
        assert (llama(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    vocabulary = REMI(params=tmp_path / "llama" / "miditok.json")
    assert vocabulary.vocab == tokenizer.get_vocab()

    again, music = convert_in(tmp_path / "llama")
    with torch.no_grad():
        assert (again(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert again.generation_config.temperature == 0.7
    assert music.config_fields() == tokenizer.config_fields()


def test_license_and_notice_go_out_and_come_back(tmp_path, tokenizer):
    """The Llama is published by other tools: its card says so too. What comes back cannot be given away for less."""
    varied(tokenizer, "gqa").save_pretrained(tmp_path / "sage")
    tokenizer.save_pretrained(tmp_path / "sage")
    (tmp_path / "sage" / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# Mine\n")
    (tmp_path / "sage" / "NOTICE.md").write_text("Not for money.")
    convert(tmp_path / "sage", tmp_path / "llama")
    card = check_card((tmp_path / "llama" / "README.md").read_text())
    assert card.license == "cc-by-nc-sa-4.0" and (tmp_path / "llama" / "NOTICE.md").read_text() == "Not for money."
    (tmp_path / "llama" / "provenance.json").unlink()  # as someone else's Llama: the card alone
    convert_in(tmp_path / "llama", tmp_path / "back")
    assert main_in([str(tmp_path / "llama"), str(tmp_path / "pooled"), "--attributes", "token"]) == 0
    for name in ("back", "pooled"):
        with pytest.raises(ExportError, match=r"license mit: .* are cc-by-nc-sa-4\.0"):
            export(tmp_path / name, tmp_path / "out", license="mit", samples=False)
    folder = export(tmp_path / "back", tmp_path / "out", samples=False)
    assert check_card((folder / "README.md").read_text()).license == "cc-by-nc-sa-4.0"
    assert (folder / "NOTICE.md").read_text() == "Not for money."


def test_it_loads_where_this_package_is_not(tmp_path, tokenizer):
    model = varied(tokenizer, "gqa")
    model.save_pretrained(tmp_path / "sage")
    tokenizer.save_pretrained(tmp_path / "sage")
    folder = tmp_path / "llama"
    convert(tmp_path / "sage", folder)
    ids = torch.tensor([tokenizer.midi_to_ids(band())[:80]])
    torch.save(ids, folder / "ids.pt")
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    name, logits, written = torch.load(folder / "found.pt")
    assert name == "LlamaForCausalLM"
    with torch.no_grad():
        assert (model(ids).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    model.generation_config.midi_grammar = False
    assert torch.equal(model.generate(ids[:, :20], max_new_tokens=30, top_k=1), written)


def test_what_is_no_llama_is_refused(tmp_path, tokenizer, capsys):
    for routing in ("head", "token"):
        with pytest.raises(ConversionError, match="attribute"):
            llama_of(tiny_model(tokenizer, routing))
    with pytest.raises(ConversionError, match="qk_norm"):
        llama_of(tiny_model(tokenizer, "gqa", qk_norm=True))
    with pytest.raises(ConversionError, match="multiple"):
        llama_of(tiny_model(tokenizer, "mqa", hidden_size=60, num_attention_heads=8))
    with pytest.raises(ConversionError, match="no Llama"):
        convert("perceivers")
    assert main(["sage-music", str(tmp_path / "out")]) == 2
    assert "kv_routing" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_draft_head_is_left_out_with_a_remark(tmp_path, tokenizer, capsys):
    model = tiny_model(tokenizer, "mqa", num_attention_heads=8, num_mtp_layers=2)
    model.save_pretrained(tmp_path / "sage")
    tokenizer.save_pretrained(tmp_path / "sage")
    assert main([str(tmp_path / "sage"), str(tmp_path / "llama")]) == 0
    assert "draft head" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, info = LlamaForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert main([str(tmp_path / "sage"), str(tmp_path / "llama")]) == 2  # not empty any more
