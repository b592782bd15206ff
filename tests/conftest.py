"""Shared fixtures: tokenizers, tiny models of both families and every kind, and MIDI files made on the spot."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
from pathlib import Path

import pytest
import torch
from symusic import Note, Score, Tempo, TimeSignature, Track

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
    torch._inductor.config.cpp.simdlen = 256  # compiled code knows nothing of that variable

from perceivers import PerceiverSConfig, PerceiverSForCausalLM, PerceiverSTokenizer
from sage_music import SageMusicConfig, SageMusicForCausalLM, SageMusicTokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# kv_routing, heads per attribute or in all, query heads per attribute
ROUTINGS = {
    "head": ("head", 1, None),
    "head-uneven": ("head", 2, [2, 2, 4, 2, 6]),
    "token": ("token", 1, None),
    "token-gqa": ("token", 2, None),
    "mha": ("none", 16, None),
    "gqa": ("none", 4, None),
    "mqa": ("none", 1, None),
}

# Options of a PerceiverS over N = 8 latents and M = 48 tokens.
PERCEIVERS = {
    "sliding": {},
    "static": {"scale_mask": "static"},
    "one scale": {"cross_scales": [None]},
    "many scales": {"cross_scales": [5, None, 17]},
    "stream": {"cross_kv_source": "stream"},
    "stream static": {"cross_kv_source": "stream", "scale_mask": "static", "cross_scales": [None, 9]},
    "ported": {
        "norm_type": "layer",
        "hidden_act": "gelu",
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "final_norm": False,
        "tie_word_embeddings": False,
        "num_rotary_layers": 1,
        "rope_endpoint": True,
        "head_dim": 12,
        "initializer_range": 0.3,
    },
    "absolute": {"absolute_positions": True, "position_offset": 1, "max_position_embeddings": 256},
}


def band(bars: int = 8, seed: int = 0, qpm: float = 120.0) -> Score:
    """Piano, bass and drums: random but on a grid of sixteenths, 4/4."""
    rng = random.Random(seed)
    score = Score(480)
    score.tempos.append(Tempo(0, qpm))
    score.time_signatures.append(TimeSignature(0, 4, 4))
    for program, drum, low, high, hits in ((0, False, 60, 84, 6), (33, False, 33, 50, 3), (0, True, 35, 50, 8)):
        track = Track(program=program, is_drum=drum, name="Drums" if drum else f"program {program}")
        for bar in range(bars):
            for step in sorted(rng.sample(range(16), hits)):
                time = bar * 1920 + step * 120
                track.notes.append(
                    Note(time, rng.choice([120, 240, 480]), rng.randint(low, high), rng.randint(30, 120))
                )
        score.tracks.append(track)
    return score


def notes_of(score: Score) -> list[tuple]:
    """Every note as (program or -1, tick in 1/48 quarter, pitch), sorted."""
    scale = 48 / score.ticks_per_quarter
    return sorted(
        (-1 if track.is_drum else track.program, round(note.time * scale), note.pitch)
        for track in score.tracks
        for note in track.notes
    )


@pytest.fixture(scope="session")
def tokenizer() -> SageMusicTokenizer:
    """Program on every note, so that short token texts in tests are whole; the default is tested beside it."""
    return SageMusicTokenizer(program_changes=False)


@pytest.fixture(scope="session")
def bpe_tokenizer(tmp_path_factory) -> SageMusicTokenizer:
    """The default vocabulary grown to 1,200 tokens by MidiTok's BPE training."""
    folder = tmp_path_factory.mktemp("bpe")
    files = []
    for seed in range(12):
        files.append(folder / f"{seed}.mid")
        band(seed=seed).dump_midi(files[-1])
    plain = SageMusicTokenizer(program_changes=False)
    plain.miditok.train(vocab_size=1200, files_paths=files)
    plain.miditok.save(folder / "miditok.json")
    return SageMusicTokenizer(vocab_file=str(folder / "miditok.json"))


def tiny_config(tokenizer, routing: str = "head", **options) -> SageMusicConfig:
    kind, kv_heads, groups = ROUTINGS[routing]
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "head_dim": 8,
    }
    # Large weights: a slip in cache or mask then changes the likeliest token, not only the last digits.
    return SageMusicConfig(
        **tokenizer.config_fields(),
        **{
            **shape,
            "kv_routing": kind,
            "num_key_value_heads": kv_heads,
            "query_heads_per_attribute": groups,
            "initializer_range": 0.5,
            **options,
        },
    )


def tiny_model(tokenizer, routing: str = "head", seed: int = 0, **options) -> SageMusicForCausalLM:
    torch.manual_seed(seed)
    return SageMusicForCausalLM(tiny_config(tokenizer, routing, **options)).eval()


@pytest.fixture(scope="session", params=list(ROUTINGS))
def model(request, tokenizer) -> SageMusicForCausalLM:
    """In float64: what is left of rounding comes from the rotary tables, which are float32 by design."""
    return tiny_model(tokenizer, request.param).double()


@pytest.fixture(scope="session")
def prompts(tokenizer) -> torch.Tensor:
    """(2, 120) ids of two pieces."""
    return torch.tensor([tokenizer.midi_to_ids(band(seed=seed))[:120] for seed in (1, 2)])


def tiny_perceivers(kind: str = "sliding", seed: int = 0, **options) -> PerceiverSForCausalLM:
    """A PerceiverS of N = 8 latents over M = 48 tokens, with large weights as in `tiny_config`."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_latents": 8,
        "max_position_embeddings": 48,
        "cross_scales": [None, 12],
        "initializer_range": 0.5,
    }
    fields = PerceiverSTokenizer().config_fields()
    torch.manual_seed(seed)
    return PerceiverSForCausalLM(PerceiverSConfig(**{**fields, **shape, **PERCEIVERS[kind], **options})).eval()


@pytest.fixture(scope="session", params=list(PERCEIVERS))
def performer(request) -> PerceiverSForCausalLM:
    """A PerceiverS of every kind, in float64; the rotary tables are float32 by design."""
    return tiny_perceivers(request.param).double()


@pytest.fixture(scope="session")
def events() -> torch.Tensor:
    """(2, 150) ids of events: any of them, music or not."""
    return torch.randint(0, 388, (2, 150), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fixed_shapes():
    """Compile for each shape by itself, with nothing kept of what other tests compiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """flex_attention in plain operations: right everywhere, and what its masks are tested with. Compiled for the CPU it
    is not (PyTorch 2.13), and refused."""
    for family in ("sage_music", "perceivers"):
        monkeypatch.setattr(f"{family}.modeling_{family}.check_flex_attention", lambda config, device: None)
    with torch.compiler.set_stance("force_eager"):
        yield


def needs_data():
    return pytest.mark.skipif(not DATA.is_dir(), reason="development data is not beside the checkout")
