"""PerceiverS measured: training step, decoding and its growth with the context, against `perceiver-ar-pytorch`.

Speed: rivals of one shape (width, depth, heads, latents, context) run in one process, in turn, on the same threads and
token ids; medians over the rounds, and ratios. Weights are random: time does not depend on them, so no checkpoint is
read, and no grammar masks the logits. `perceiver-ar-pytorch` has one cross-attention layer. So has the first of our
rows, `PERCEIVERS_ONE`; `PERCEIVERS` is the product, with a second one over the last 1,024 tokens, and does more work.

Decoding, ms per token, greedy, from a context that ends where the table says:
- ours: `generate()` with its cache, over whole turns of N - R + 1 tokens (R = N / 2), each of which holds one refill.
  Reported is the amortised time: (N - R plain steps at their median + the refill) / (N - R + 1), and beside it the mean
  of all steps as they came, the cache's moves to larger buffers included. At the end of a full context the window
  takes the context with it, so that the refill attends anew too: its price in a generation of any length.
- ours without the cache: `generate(use_cache=False)`, a forward pass over the context per token.
- `perceiver-ar-pytorch`: its own `generate`, which has no cache. (It samples from the top tokens; that is no work.)

Training step: forward and backward of one sequence in float32, M tokens in and N targets; its dropout of the prefix is
off, as it is by default, so that both attend the whole context.

Memory is the peak of a fresh process, PyTorch itself included.
"""

import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from perceivers import PerceiverSCache, PerceiverSConfig, PerceiverSForCausalLM
from sage_studio.errors import install_hint
from sage_studio.reports import machine, machine_line, markdown

from .decoding import rounded, token_seconds, training_seconds
from .tables import formatted

CONTEXTS = (2048, 8192, 32768)
PERCEIVERS, PERCEIVERS_ONE = "PerceiverS", "PerceiverS, one scale"
RIVAL = "perceiver-ar-pytorch"
RIVAL_ABSENT = f"Without {RIVAL}, which is not installed: {install_hint(RIVAL)}"
UNCACHED_TOKENS = 2  # per round: they cost a forward pass each, and one is like the other
PAPER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def config_for(context: int, **options) -> PerceiverSConfig:
    """The shape measured at `context` tokens: width 256, 8 heads; 4 layers and 512 latents, from 32,768 on 2 and 1,024.

    Below 2,048 tokens the latents are a quarter of the context. Without an end token, so that decoding does not end.

    Raises:
        ValueError: fewer than 16 tokens.
    """
    if context < 16:
        raise ValueError(f"a context of {context} tokens is too short to measure: give 16 or more.")
    long = context >= 32768
    shape = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_hidden_layers": 2 if long else 4,
        "num_latents": 1024 if long else min(512, context // 4),
        "cross_scales": [None, 1024],
        "max_position_embeddings": context,
    }
    return PerceiverSConfig(**{**shape, "eos_token_id": None, **options})


def stock_perceiver_ar(config: PerceiverSConfig):
    """`perceiver-ar-pytorch` of the same shape, in its wrapper that trains and generates; `None` if not installed."""
    try:
        from perceiver_ar_pytorch import PerceiverAR
        from perceiver_ar_pytorch.autoregressive_wrapper import AutoregressiveWrapper
    except ImportError:
        return None
    net = PerceiverAR(
        num_tokens=config.vocab_size,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        dim_head=config.head_dim,
        ff_mult=config.intermediate_size // config.hidden_size,
        max_seq_len=config.max_position_embeddings,
        cross_attn_seq_len=config.max_position_embeddings - config.num_latents,
        cross_attn_dropout=0.0,
    )
    return AutoregressiveWrapper(net).eval()


def random_ids(config: PerceiverSConfig, length: int) -> torch.Tensor:
    """(1, length) event ids, the same every time; not 0, which the rival's loss leaves out."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, config.pad_token_id, (1, length), generator=generator)


def turn_of(config: PerceiverSConfig) -> int:
    """Tokens from one refill to the next, N - R + 1."""
    return config.num_latents - PerceiverSCache(config).refill_length + 1


def decoded_seconds(model: PerceiverSForCausalLM, ids: torch.Tensor, tokens: int) -> dict[str, float]:
    """Decode `tokens` whole turns' tokens, the last of `ids`, after a prompt of the others, through the cache.

    Returns seconds: `prefill` (to the first token), `step` (median plain step), `refill`, `mean` of all steps, and
    `token`, amortised.
    """
    prompt = ids[:, : ids.shape[1] - tokens]
    prefill, *later = token_seconds(model, prompt, tokens + 1)
    schedule = PerceiverSCache(model.config)
    starts = [schedule.window_start(prompt.shape[1] + step) for step in range(-1, tokens)]
    refills = [start != before for before, start in itertools.pairwise(starts)]
    step = statistics.median(itertools.compress(later, [not refill for refill in refills]))
    refill = statistics.median(itertools.compress(later, refills))
    token = amortised(model.config, step, refill)
    return {"prefill": prefill, "step": step, "refill": refill, "mean": statistics.mean(later), "token": token}


def amortised(config: PerceiverSConfig, step: float, refill: float) -> float:
    """Seconds per token in the long run, one refill per turn."""
    turn = turn_of(config)
    return ((turn - 1) * step + refill) / turn


def uncached_seconds(model: PerceiverSForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Seconds per token of decoding the last of `ids` (1, T) without a cache."""
    return {
        "uncached": statistics.median(token_seconds(model, ids[:, :-UNCACHED_TOKENS], UNCACHED_TOKENS, use_cache=False))
    }


def rival_seconds(rival, ids: torch.Tensor) -> dict[str, float]:
    """Seconds per token of the rival's own generation, which has no cache."""
    start = time.perf_counter()
    rival.generate(ids[:, :-UNCACHED_TOKENS], UNCACHED_TOKENS)
    return {"token": (time.perf_counter() - start) / UNCACHED_TOKENS}


def medians(measures: dict[tuple, Callable[[], dict[str, float]]], rounds: int) -> dict[tuple, dict[str, float]]:
    """Run the measures in turn, `rounds` times; per name the medians of what they returned."""
    samples: dict[tuple, list[dict[str, float]]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            samples[name].append(measure())
    return {
        name: {field: statistics.median(sample[field] for sample in found) for field in found[0]}
        for name, found in samples.items()
    }


def compare_at(config: PerceiverSConfig, tokens: int, rounds: int) -> list[dict]:
    """The rows of one shape, JSON-ready: the rival (where installed), then ours with one scale and with `config`'s."""
    context = config.max_position_embeddings
    ids = random_ids(config, context + 1)  # in training the last one is a target only
    decoded = whole_turns(config, context, tokens)
    models = {
        PERCEIVERS_ONE: PerceiverSForCausalLM(config_like(config, cross_scales=[None])).eval(),
        PERCEIVERS: PerceiverSForCausalLM(config).eval(),
    }
    measures: dict[tuple, Callable] = {}
    rival = stock_perceiver_ar(config)
    if rival is not None:
        measures[RIVAL, "training"] = lambda: {"training": training_seconds(rival, lambda: rival(ids))}
        measures[RIVAL, "decoding"] = lambda: rival_seconds(rival, ids[:, :-1])
    for name, model in models.items():
        measures[name, "training"] = lambda model=model: {
            "training": training_seconds(model, lambda: model(ids, labels=ids).loss)
        }
        measures[name, "decoding"] = lambda model=model: decoded_seconds(model, ids[:, :-1], decoded)
        measures[name, "uncached"] = lambda model=model: uncached_seconds(model, ids[:, :-1])
    found: dict[str, dict[str, float]] = {}
    for (name, _), seconds in medians(measures, rounds).items():
        found.setdefault(name, {}).update(seconds)
    rows = []
    for name, seconds in found.items():
        row = {
            "context": context,
            "latents": config.num_latents,
            "layers": config.num_hidden_layers,
            "model": name,
            "parameters": sum(weight.numel() for weight in (models.get(name) or rival).parameters()),
            "training_step_s": seconds["training"],
            "ms_per_token": 1000 * seconds["token"],
        }
        if name in models:
            row["uncached_ms_per_token"] = 1000 * seconds["uncached"]
            row["step_ms"], row["refill_ms"] = 1000 * seconds["step"], 1000 * seconds["refill"]
            row["mean_ms_per_token"], row["prefill_ms"] = 1000 * seconds["mean"], 1000 * seconds["prefill"]
            if rival is not None:
                row["training_ratio"] = found[RIVAL]["training"] / seconds["training"]
                row["decoding_ratio"] = found[RIVAL]["token"] / seconds["token"]
        rows.append({key: rounded(value) for key, value in row.items()})
    return rows


def config_like(config: PerceiverSConfig, **changes) -> PerceiverSConfig:
    return PerceiverSConfig(**{**config.to_dict(), **changes})


def whole_turns(config: PerceiverSConfig, context: int, tokens: int) -> int:
    """`tokens` rounded up to whole turns, as far as a context of `context` tokens holds them beyond its latents."""
    turn = turn_of(config)
    return turn * max(1, min(math.ceil(tokens / turn), (context - config.num_latents) // turn))


def growth(contexts, tokens: int, rounds: int) -> list[dict]:
    """Decoding one model, that of the shortest context, after each of the contexts: rows, JSON-ready.

    What grows is the first cross-attention layer, whose keys and values of the whole context every token reads.
    """
    contexts = sorted(set(contexts))
    config = config_like(config_for(contexts[0]), max_position_embeddings=contexts[-1])
    model = PerceiverSForCausalLM(config).eval()
    measures = {
        (context,): lambda context=context: decoded_seconds(
            model, random_ids(config, context), whole_turns(config, context, tokens)
        )
        for context in contexts
    }
    rows = []
    for (context,), seconds in medians(measures, rounds).items():
        row = {
            "context": context,
            "layers": config.num_hidden_layers,
            "latents": config.num_latents,
            "ms_per_token": 1000 * seconds["token"],
            "step_ms": 1000 * seconds["step"],
            "first_cross_layer_bytes": context * 2 * config.hidden_size * 4,
        }
        if rows:
            row["growth"] = row["ms_per_token"] / rows[0]["ms_per_token"]
        rows.append({key: rounded(value) for key, value in row.items()})
    return rows


def compare(contexts=CONTEXTS, tokens: int = 48, rounds: int = 3) -> dict:
    """Training and decoding at each context against the rival, and decoding's growth; a JSON-ready dict.

    Args:
        contexts: tokens, 16 or more each; `config_for` says which shape is measured at which.
        tokens: decoded with the cache in a round, at least: whole turns are.
        rounds: how often everything is measured.
    """
    configs = [config_for(context) for context in contexts]
    result = {"machine": machine(), "rows": []}
    for config in configs:
        result["rows"] += compare_at(config, tokens, rounds)
    if len(set(contexts)) > 1:
        result["growth"] = growth(contexts, tokens, rounds)
    if all(row["model"] != RIVAL for row in result["rows"]):
        result["remark"] = RIVAL_ABSENT
    return result


def paper_size(contexts=(2048, 32768), tokens: int = 64, **shape) -> dict:
    """The paper's size, with random weights in float32: a full forward pass, decoding after each context, peak memory.

    To be run in a process of its own, as `in_fresh_process(paper_size)` does. `shape` changes fields of the config.
    """
    torch.manual_seed(0)
    config = config_for(max(contexts), **{**PAPER, **shape})
    started = time.perf_counter()
    model = PerceiverSForCausalLM(config).eval()
    result = {"parameters": model.num_parameters(), "instantiate_s": time.perf_counter() - started}
    ids = random_ids(config, config.max_position_embeddings)
    started = time.perf_counter()
    with torch.no_grad():
        model(ids, use_cache=False)
    result["forward_s"] = time.perf_counter() - started
    rows = result["decoding"] = []
    for context in contexts:
        cache = PerceiverSCache(config)
        prefill, *steps = token_seconds(model, ids[:, : context - tokens], tokens + 1, cache=cache)
        step, refill = statistics.median(steps), refill_seconds(model, cache, ids)
        row = {"context": context, "prefill_s": prefill, "step_ms": 1000 * step, "refill_ms": 1000 * refill}
        row["ms_per_token"] = 1000 * amortised(config, step, refill)
        rows.append({key: rounded(value) for key, value in row.items()})
    result["ratio"] = rows[-1]["ms_per_token"] / rows[0]["ms_per_token"]
    result["peak_gb"] = peak_memory() / 1e9
    return {"machine": machine(), "paper_size": {key: rounded(value) for key, value in result.items()}}


@torch.no_grad()
def refill_seconds(model: PerceiverSForCausalLM, cache: PerceiverSCache, ids: torch.Tensor) -> float:
    """Seconds of the last refill that `cache` holds, done again: the cache is cropped to just before it."""
    column = cache.get_seq_length() - 1
    while cache.window_start(column) == cache.window_start(column - 1):
        column -= 1
    cache.crop(column - 1 - cache.get_seq_length())
    model(ids[:, column - 1 : column], cache=cache, logits_to_keep=1)  # the window before it, computed anew
    start = time.perf_counter()
    model(ids[:, column : column + 1], cache=cache, logits_to_keep=1)
    return time.perf_counter() - start


def training_memory(**shape) -> dict:
    """Peak memory and time of one training step (one sequence, float32) of the default size; `shape` changes fields.

    To be run in a process of its own, as `in_fresh_process(training_memory)` does.
    """
    config = PerceiverSConfig(**{"num_attention_heads": 4, **shape})  # heads as in the bundled checkpoint
    model = PerceiverSForCausalLM(config)
    ids = random_ids(config, config.max_position_embeddings + 1)
    seconds = training_seconds(model, lambda: model(ids, labels=ids).loss)
    found = {
        "context": config.max_position_embeddings,
        "latents": config.num_latents,
        "parameters": model.num_parameters(),
        "training_step_s": rounded(seconds),
        "peak_gb": rounded(peak_memory() / 1e9),
    }
    return {"machine": machine(), "training_memory": found}


def peak_memory() -> int:
    """Most bytes this process has held in memory so far.

    Raises:
        OSError: the system does not say (Windows).
    """
    try:
        import resource
    except ImportError:
        raise OSError("this system does not tell a process its peak memory: measure on Linux or macOS.") from None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_fresh_process(measure: Callable[[], dict]) -> dict:
    """What `measure` returns in a new process with this one's threads, so that the peak memory is its own.

    Raises:
        OSError: the process was killed.
    """
    spawn, threads = multiprocessing.get_context("spawn"), torch.get_num_threads()
    try:
        with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (threads,)) as pool:
            return pool.submit(measure).result()
    except BrokenProcessPool:
        raise OSError("the measuring process was killed, probably because memory ran out.") from None


def table(result: dict) -> str:
    """The result of `compare`, `paper_size` or `training_memory` as Markdown."""
    parts = [f"PerceiverS; {machine_line(result['machine'])}"]
    if "rows" in result:
        parts.append(_speed_table(result["rows"]))
    if "growth" in result:
        parts.append(_growth_table(result["growth"]))
    if "paper_size" in result:
        parts.append(_paper_table(result["paper_size"]))
    if "training_memory" in result:
        found = result["training_memory"]
        parts.append(
            f"Training step, {found['parameters']:,} parameters, context {found['context']:,}, {found['latents']:,} "
            f"latents: {found['training_step_s']} s, peak memory {found['peak_gb']} GB"
        )
    if "remark" in result:
        parts.append(result["remark"])
    return "\n\n".join(parts)


def _speed_table(rows: list[dict]) -> str:
    columns = ["context", "latents", "layers", "model", "training step", "training speed", "ms/token", "decoding speed"]
    columns += ["mean step", "plain step", "refill", "ms/token without cache"]
    cells = []
    for row in rows:
        line = [f"{row['context']:,}", f"{row['latents']:,}", str(row["layers"]), row["model"]]
        one = "1 x" if row["model"] == RIVAL else ""
        line += [f"{row['training_step_s']} s", _times(row, "training_ratio", one)]
        line += [str(row["ms_per_token"]), _times(row, "decoding_ratio", one)]
        if "step_ms" in row:
            line += [f"{row[name]} ms" for name in ("mean_ms_per_token", "step_ms", "refill_ms")]
            line.append(str(row["uncached_ms_per_token"]))
        else:
            line += ["", "", "", str(row["ms_per_token"])]
        cells.append(line)
    return markdown(columns, cells)


def _growth_table(rows: list[dict]) -> str:
    columns = (
        ("context", "{context:,}"),
        ("ms/token", "{ms_per_token}"),
        ("growth", "{times}"),
        ("plain step", "{step_ms} ms"),
        ("keys and values that the first cross layer reads", "{read_mb:.1f} MB"),
    )
    told = [
        row | {"times": _times(row, "growth", "1 x"), "read_mb": row["first_cross_layer_bytes"] / 1e6} for row in rows
    ]
    shape = f"One model ({rows[0]['layers']} layers, {rows[0]['latents']:,} latents) after contexts of growing length:"
    return f"{shape}\n\n{formatted(columns, told)}"


def _paper_table(found: dict) -> str:
    columns = (
        ("context", "{context:,}"),
        ("prefill", "{prefill_s} s"),
        ("plain step", "{step_ms} ms"),
        ("refill", "{refill_ms} ms"),
        ("ms/token", "{ms_per_token}"),
    )
    return (
        f"The paper's size, {found['parameters']:,} parameters: a forward pass {found['forward_s']} s, decoding "
        f"{found['ratio']} x as long at the last context as at the first, peak memory {found['peak_gb']} GB\n\n"
        f"{formatted(columns, found['decoding'])}"
    )


def _times(row: dict, name: str, otherwise: str) -> str:
    return f"{row[name]} x" if name in row else otherwise
