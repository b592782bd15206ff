"""First look at decoding speed: SAGE-Music against a stock Llama of the same shape with full heads.

Both run through plain `generate()` in one process, in turn, on the same threads and the same number of tokens; medians
over the rounds, and ratios. Prompts repeat a bar of notes, so that the compacted cache fills as music fills it.
"""

import os
import platform
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from sage_music import SageMusicConfig, SageMusicForCausalLM, SageMusicTokenizer

CONTEXTS = (512, 2048, 8192)


def stock_llama(config: SageMusicConfig, context: int) -> LlamaForCausalLM:
    """A stock Llama with the same width, depth, heads and vocabulary, and one key-value head per query head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
    ).eval()


def music_like_ids(tokenizer: SageMusicTokenizer, length: int) -> torch.Tensor:
    """(1, length) ids in the proportions of music: `Bar TimeSig` and 16 positions of one note each, over and over."""
    bar = ["Bar_None", "TimeSig_4/4"]
    for step in range(16):
        named = step % 4 == 0 or not tokenizer.miditok.config.program_changes
        bar += [f"Position_{3 * step}", *["Program_0"] * named, f"Pitch_{48 + step}", "Velocity_79", "Duration_1.0.12"]
    vocabulary = tokenizer.get_vocab()
    by_type: dict[str, int] = {}
    for token, index in vocabulary.items():
        by_type.setdefault(token.split("_")[0], index)
    pattern = [vocabulary.get(token, by_type[token.split("_")[0]]) for token in bar]
    ids = (pattern * (length // len(pattern) + 1))[: length - 1]
    return torch.tensor([[tokenizer.bos_token_id, *ids]])


class _Clock(BaseStreamer):
    """Notes when each token arrives; the first call brings the prompt."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def token_seconds(model, ids: torch.Tensor, tokens: int, **options) -> list[float]:
    """Seconds that each of `tokens` tokens took in one greedy `generate()` call; the prompt counts to the first."""
    clock = _Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
        **options,
    )
    return np.diff(clock.times).tolist()


def decode_seconds(model, ids: torch.Tensor, tokens: int) -> tuple[float, float]:
    """(time to the first token, median time of the `tokens` tokens after it) in seconds of one `generate()` call."""
    first, *later = token_seconds(model, ids, tokens + 1)
    return first, statistics.median(later)


def cache_bytes(model, ids: torch.Tensor) -> float:
    """Bytes of keys and values in use per token, after `ids`."""
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    used = getattr(cache, "lengths", None)
    total = 0
    for layer in cache.layers:
        rows = layer.keys.shape[2] if used is None else int(used.max())
        rows = getattr(layer, "length", 0) or rows
        total += 2 * layer.keys[:, :, :rows].numel() * layer.keys.element_size()
    return total / ids.shape[1]


def machine() -> dict:
    """What was measured on, JSON-ready."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def machine_line(found: dict) -> str:
    """The `machine()` of a result in words."""
    return f"{found['threads']} threads of {found['cores']} cores, torch {found['torch']}"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def compare(model: SageMusicForCausalLM, tokenizer: SageMusicTokenizer, contexts, tokens: int, rounds: int) -> dict:
    """Decode `tokens` tokens after each context with both models, `rounds` times in turn.

    Returns a JSON-ready dict: the machine, the shape, and a row per context and model.
    """
    length = max(contexts) + tokens + 1
    config = SageMusicConfig(**{**model.config.to_dict(), "max_position_embeddings": length, "use_cache": True})
    ours = SageMusicForCausalLM(config).eval()
    ours.load_state_dict(model.state_dict())
    rivals = {"Llama, full heads": stock_llama(config, length), "SAGE-Music": ours}
    rows = []
    for context in contexts:
        ids = music_like_ids(tokenizer, context)
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
        for rival in rivals.values():
            decode_seconds(rival, ids, 4)
        for _ in range(rounds):
            for name, rival in rivals.items():
                samples[name].append(decode_seconds(rival, ids, tokens))
        for name, rival in rivals.items():
            prefill, per_token = (statistics.median(column) for column in zip(*samples[name], strict=True))
            rows.append(
                {
                    "context": context,
                    "model": name,
                    "tokens_per_second": round(1 / per_token, 1),
                    "ms_per_token": round(1000 * per_token, 3),
                    "prefill_tokens_per_second": round(context / prefill, 1),
                    "cache_bytes_per_token": round(cache_bytes(rival, ids)),
                }
            )
        full, ratio = rows[-2], rows[-1]
        ratio["speed_ratio"] = round(full["ms_per_token"] / ratio["ms_per_token"], 2)
        ratio["cache_ratio"] = round(full["cache_bytes_per_token"] / ratio["cache_bytes_per_token"], 1)
    return {
        "machine": machine(),
        "shape": {
            "parameters": model.num_parameters(),
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_routing": config.kv_routing,
        },
        "rows": rows,
    }


def table(result: dict) -> str:
    """The result as a Markdown table."""
    shape = result["shape"]
    columns = ["context", "model", "tokens/s", "ms/token", "speed", "prefill tokens/s", "cache bytes/token", "cache"]
    rows = [
        [
            f"{row['context']:,}",
            row["model"],
            f"{row['tokens_per_second']}",
            f"{row['ms_per_token']}",
            f"{row.get('speed_ratio', 1)} x",
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['cache_bytes_per_token']:,}",
            f"1/{row.get('cache_ratio', 1)}",
        ]
        for row in result["rows"]
    ]
    return (
        f"{shape['parameters']:,} parameters, hidden size {shape['hidden_size']}, {shape['layers']} layers, "
        f"{shape['heads']} heads; {machine_line(result['machine'])}\n\n{markdown(columns, rows)}"
    )
