"""Decoding speed of SAGE-Music against stock Llamas of the same shape: full heads, grouped (GQA) and multi-query (MQA).

All run through plain `generate()` in one process, in turn, on the same threads, prompts and number of tokens, greedily;
SAGE-Music with its MIDI grammar on, as a user has it. Figures are medians over the rounds, and ratios.

- Shape `small` is the checkpoint itself, `medium` a wider and deeper one (`MEDIUM`) with random weights. The rivals'
  weights are random.
- Prompts: at batch 1 in shape `small` a piece that the checkpoint wrote (how well drafting does depends on the music).
  Otherwise a bar of notes over and over, each row of a batch one token ahead of the row before. Contexts beyond the
  checkpoint's own are as fast as they would be if it had been trained on them; what it writes there is another matter.
- A note is `tokens_per_note` tokens for every rival, the mean of the prompt rounded: what a stock Llama of random
  weights writes has no notes. `ms_per_note_*` are the gaps between notes, each timed when its last token arrives.
- Roofline: the bytes that one step must move (every weight used, the cache in use) over the bandwidth measured in the
  same run, as a share of the step's time. Bandwidth is the best of the run: of products with one row through copies of
  the model's own matrices in the layout of stock layers (another layout may be faster, and a processor's cache may hold
  a part: the share can pass 100 %), and of a sum over a buffer that no cache holds.
- Memory: the weights, and what a generation adds to what the process holds.
"""

import copy
import ctypes
import gc
import io
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from sage_music import (
    NoDoubledNotesLogitsProcessor,
    SageMusicConfig,
    SageMusicForCausalLM,
    SageMusicTokenizer,
    quantize_int8,
)
from sage_music.arguments_sage_music import CACHE_NAME
from sage_studio.generation.bars import window
from sage_studio.generation.sampling import device_of, sampling_options, seeded
from sage_studio.reports import machine

CONTEXTS, BATCHES = (512, 2048, 8192), (1, 16)
TOKENS, ROUNDS = 128, 3
TRAINING_CONTEXTS, TRAINING_BATCHES = (1024,), (2,)
MEDIUM = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "head_dim": 64}
MEDIUM |= {"intermediate_size": 2048}
# What a stock Llama's config has of ours.
SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SHARED += ("max_position_embeddings", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
SHAPES = ("small", "medium")
NAMES = {
    "full": "Llama, full heads",
    "gqa": "Llama, GQA",
    "mqa": "Llama, MQA",
    "ours": "SAGE-Music",
    "compiled": "SAGE-Music compiled",
    "bf16": "SAGE-Music bf16",
    "int8": "SAGE-Music int8",
    "int8-compiled": "SAGE-Music int8 compiled",
    "draft": "SAGE-Music + draft",
    "int8-draft": "SAGE-Music int8 + draft",
    "int8-compiled-draft": "SAGE-Music int8 compiled + draft",
}
MODELS = tuple(NAMES)
DRAFTED = {"draft": "ours", "int8-draft": "int8", "int8-compiled-draft": "int8-compiled"}
COMPILED = ("compiled", "int8-compiled", "int8-compiled-draft")
FULL_PRECISION = ("full", "gqa", "mqa", "ours", "compiled")
SLOW_S = 120.0  # a cell whose warm-up takes longer is measured once
STREAM_BYTES = 512 << 20


def shaped(model: SageMusicForCausalLM, shape: str, context: int) -> SageMusicForCausalLM:
    """A float32 copy of `model`, or one of shape `medium` with random weights, that takes `context` tokens.

    Raises:
        ValueError: no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}.")
    fields = {**model.config.to_dict(), "max_position_embeddings": context, "use_cache": True, "dtype": "float32"}
    if shape == "medium":  # heads of draft that nobody trained would say nothing
        fields |= {**MEDIUM, "query_heads_per_attribute": None, "num_mtp_layers": 0}
    ours = SageMusicForCausalLM(SageMusicConfig(**fields)).eval()
    if shape == "small":
        ours.load_state_dict(model.state_dict())
    ours.generation_config = copy.deepcopy(model.generation_config)
    return ours


def stock_llama(config: SageMusicConfig, kv_heads: int, **changes) -> LlamaForCausalLM:
    """A stock Llama with `config`'s width, depth, heads and vocabulary, and `kv_heads` key-value heads."""
    shape = {name: getattr(config, name) for name in SHARED} | {"num_key_value_heads": kv_heads}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()


def grouped_heads(heads: int) -> int:
    """Key-value heads of the GQA rival: the largest divisor of `heads` that is at most a third of them."""
    return max(d for d in range(1, max(heads // 3, 1) + 1) if heads % d == 0)


def equal_llama(ours: SageMusicForCausalLM) -> LlamaForCausalLM:
    """A stock Llama with full heads and, through a smaller `intermediate_size`, as many parameters as `ours`."""
    config = ours.config
    one = stock_llama(config, config.num_attention_heads, intermediate_size=1).num_parameters()
    per_channel = 3 * config.hidden_size * config.num_hidden_layers
    width = 1 + round((ours.num_parameters() - one) / per_channel)
    return stock_llama(config, config.num_attention_heads, intermediate_size=max(width, 1))


def music_like_ids(tokenizer: SageMusicTokenizer, length: int, batch: int = 1) -> torch.Tensor:
    """(batch, length) ids in the proportions of music: `Bar TimeSig` and 16 positions of one note each, over and over.

    Each row is one token ahead of the row before, so that a column holds tokens of several attributes.
    """
    bar = ["Bar_None", "TimeSig_4/4"]
    for step in range(16):
        named = step % 4 == 0 or not tokenizer.miditok.config.program_changes
        bar += [f"Position_{3 * step}", *["Program_0"] * named, f"Pitch_{48 + step}", "Velocity_79", "Duration_1.0.12"]
    vocabulary = tokenizer.get_vocab()
    by_type: dict[str, int] = {}
    for token, index in vocabulary.items():
        by_type.setdefault(token.split("_")[0], index)
    pattern = [vocabulary.get(token, by_type[token.split("_")[0]]) for token in bar]
    rows = [[pattern[(row + i) % len(pattern)] for i in range(length - 1)] for row in range(batch)]
    return torch.tensor([[tokenizer.bos_token_id, *row] for row in rows])


def written_ids(model, tokenizer: SageMusicTokenizer, length: int, prompt: "str | os.PathLike | None" = None):
    """(1, length) ids of a piece that `model` samples with a fixed seed, hearing its last bars where it gets too long.

    Args:
        prompt: MIDI file to continue; from nothing by default.
    """
    ids = [tokenizer.bos_token_id] if prompt is None else tokenizer.midi_to_ids(os.fspath(prompt))
    context = model.config.max_position_embeddings
    with seeded(0):
        while len(ids) < length:
            heard = window(model, tokenizer, ids).ids
            new = min(length - len(ids), context - len(heard))
            output = model.generate(
                torch.tensor([heard], device=model.device),
                max_new_tokens=new,
                min_new_tokens=new,  # no end
                logits_processor=LogitsProcessorList([NoDoubledNotesLogitsProcessor(model.config)]),
                **sampling_options(None, None),
            )
            ids = ids + output[0, len(heard) :].tolist()
    return torch.tensor([ids[:length]])


class _Clock(BaseStreamer):
    """Notes when tokens arrive and how many for each row; the first call brings the prompt."""

    def __init__(self, batch: int):
        self.batch = batch
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value):
        self.times.append(time.perf_counter())  # tokens come on the host: an accelerator has done its work
        self.counts.append(value.numel() // self.batch)

    def end(self):
        pass


def _clocked(model, ids: torch.Tensor, tokens: int, **options) -> tuple[_Clock, object]:
    clock = _Clock(len(ids))
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    return clock, output


def token_seconds(model, ids: torch.Tensor, tokens: int, **options) -> list[float]:
    """Seconds that each of `tokens` tokens took in one greedy `generate()` call; the prompt counts to the first."""
    return np.diff(_clocked(model, ids, tokens, **options)[0].times).tolist()


@dataclass
class Run:
    """One timed generation.

    Attributes:
        passes: (seconds since the call, tokens of a row) of every forward pass; the first is the prompt's.
        cache: bytes per token of the cache at its end, see `cache_bytes`.
    """

    passes: list[tuple[float, int]]
    cache: dict[str, float] = field(default_factory=dict)

    @property
    def prefill_s(self) -> float:
        return self.passes[0][0]

    @property
    def tokens_per_second(self) -> float:
        """Of one row, after the first pass."""
        return sum(count for _, count in self.passes[1:]) / (self.passes[-1][0] - self.prefill_s)

    @property
    def tokens_per_pass(self) -> float:
        return sum(count for _, count in self.passes[1:]) / (len(self.passes) - 1)

    def token_seconds(self) -> list[float]:
        """Of each token after the first pass; the tokens of one pass share its time."""
        gaps = np.diff([at for at, _ in self.passes])
        return [gap / count for gap, (_, count) in zip(gaps, self.passes[1:], strict=True) for _ in range(count)]

    def note_arrivals(self, tokens_per_note: int) -> list[float]:
        """Seconds since the call at which each note's last token arrived."""
        tokens = [at for at, count in self.passes for _ in range(count)]
        return tokens[tokens_per_note - 1 :: tokens_per_note]


def timed(model, ids: torch.Tensor, tokens: int, **options) -> Run:
    """`tokens` tokens after `ids` (B, T) by `generate()`, greedy unless `options` say otherwise."""
    start = time.perf_counter()
    clock, output = _clocked(model, ids, tokens, return_dict_in_generate=True, **options)
    passes = [(at - start, count) for at, count in zip(clock.times[1:], clock.counts[1:], strict=True)]
    return Run(passes, cache_bytes(getattr(output, CACHE_NAME)))


def cache_bytes(cache) -> dict[str, float]:
    """Bytes of keys and values per token and row that a cache holds: `used`, `padded` and `allocated`.

    `used` are rows of tokens. A cache compacted by attribute pads every attribute's rows to the longest's: `padded`.
    `allocated` are whole buffers, which grow ahead of their use.
    """
    lengths = getattr(cache, "lengths", None)  # (B, A) rows of each attribute
    found = {"used": 0, "padded": 0, "allocated": 0}
    for layer in cache.layers:
        batch, heads, rows, width = layer.keys.shape
        row = 2 * width * layer.keys.element_size()
        found["allocated"] += batch * heads * rows * row
        if lengths is not None:
            found["used"] += int(lengths.sum()) * heads // lengths.shape[1] * row
            found["padded"] += batch * heads * int(lengths.max()) * row
        else:
            rows = getattr(layer, "length", 0) or rows
            found["used"] += batch * heads * rows * row
            found["padded"] += batch * heads * rows * row
    tokens = cache.layers[0].keys.shape[0] * int(cache.get_seq_length())
    return {name: count / tokens for name, count in found.items()}


def weight_bytes_per_step(model, batch: int = 1) -> float:
    """Bytes of weights that a step of one token for each of `batch` rows must read.

    The embedding gives a row per token; tied to the output layer, all of it is read there. Of the key-value weights a
    token reads its own attribute's. Drafting heads do not count.
    """
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    total = 0.0
    for name, weight in model.named_parameters():
        if name.startswith("draft."):
            continue
        share = 1.0
        if weight is embedding:
            share = batch / weight.shape[0] + tied
        elif name.endswith("kv_weight"):
            share = min(batch, weight.shape[0]) / weight.shape[0]
        total += share * weight.numel() * weight.element_size()
    return total


class Bandwidth:
    """Bytes per second, measured a little in every round: `products` and `stream` hold the best."""

    def __init__(self, model, device: torch.device):
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self.matrices = []
        for name, weight in model.named_parameters():
            embedding = weight is model.get_input_embeddings().weight
            if weight.ndim < 2 or name.startswith("draft.") or (embedding and not tied):
                continue
            matrix = weight[0] if name.endswith("kv_weight") else weight
            # In the order stock layers keep, whatever the model has made of its own.
            self.matrices.append(matrix.detach().clone(memory_format=torch.contiguous_format))
        self.rows = [torch.randn(1, matrix.shape[1], device=device) for matrix in self.matrices]
        free = free_bytes(device)
        size = STREAM_BYTES if free is None else min(STREAM_BYTES, free // 4)
        self.buffer = torch.ones(size // 4, device=device)
        self.device, self.products, self.stream = device, 0.0, 0.0

    def _through(self) -> None:
        for row, matrix in zip(self.rows, self.matrices, strict=True):
            F.linear(row, matrix)

    @torch.inference_mode()
    def measure(self, passes: int = 5) -> None:
        """Take the best of `passes` passes into account."""
        bytes_of = sum(matrix.numel() * matrix.element_size() for matrix in self.matrices)
        self.products = max(self.products, bytes_of / _fastest(self._through, passes, self.device))
        bytes_of = self.buffer.numel() * self.buffer.element_size()
        self.stream = max(self.stream, bytes_of / _fastest(self.buffer.sum, 2, self.device))


def _fastest(work: Callable, passes: int, device: torch.device) -> float:
    seconds = []
    for _ in range(passes + 1):
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free for new tensors; `None` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def peak_rise(device: torch.device, work: Callable[[], object]) -> int | None:
    """Most bytes that `work` adds to what the process holds; `None` where the system does not say (not Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    try:
        # Memory that others have freed goes back first, or the work could take it unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
    except (AttributeError, OSError, StopIteration, TypeError):
        work()
        return None
    work()
    return max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def stored_bytes(model) -> int:
    """Bytes of the model's weights as they are stored, quantized ones included."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


@dataclass
class Rival:
    """One of the models compared: its key in `NAMES`, and what `generate()` gets beside the prompt."""

    key: str
    name: str
    model: torch.nn.Module
    options: dict = field(default_factory=dict)

    def estimated_cache_bytes(self, batch: int, tokens: int) -> int:
        """Bytes of keys and values after `tokens` tokens of `batch` rows, about."""
        config = self.model.config
        heads = config.num_key_value_heads
        if self.key not in ("full", "gqa", "mqa"):
            heads *= 2  # rows of the shorter attributes are padded, and buffers grow ahead
        row = 2 * heads * config.head_dim * self.model.dtype.itemsize * config.num_hidden_layers
        return batch * tokens * row


def rivals_of(ours: SageMusicForCausalLM, keys: Sequence[str], remarks: list[str]) -> list[Rival]:
    """The models named by `keys`, on `ours`' device; what is left out is said in `remarks`."""
    config, heads = ours.config, ours.config.num_attention_heads
    kv_heads = {"full": heads, "gqa": grouped_heads(heads), "mqa": 1}
    made: dict[str, torch.nn.Module] = {"ours": ours}

    def quantized():
        if "int8" not in made:
            made["int8"] = quantize_int8(copy.deepcopy(ours))
        return made["int8"]

    compiling = {"compile_config": CompileConfig(fullgraph=True)}
    if ours.device.type == "cuda":  # there `generate()` compiles what has a static cache
        compiling = {"cache_implementation": "static"}
    rivals = []
    for key in [key for key in MODELS if key in keys]:
        name = NAMES[key]
        if key in kv_heads:
            name = f"{name} ({kv_heads[key]} heads)" if key == "gqa" else name
            rivals.append(Rival(key, name, stock_llama(config, kv_heads[key]).to(ours.device)))
            continue
        if key in DRAFTED and not config.num_mtp_layers:
            remarks.append(f"{name} is left out: this model has no draft head")
            continue
        try:
            if key == "bf16":
                model = copy.deepcopy(ours).to(torch.bfloat16)
            else:
                model = quantized() if key.startswith("int8") else ours
        except (RuntimeError, ValueError, NotImplementedError) as error:
            remarks.append(f"{name} is left out: {' '.join(str(error).split())}")
            continue
        options = {"use_mtp": True} if key in DRAFTED else {}
        rivals.append(Rival(key, name, model, options | (compiling if key in COMPILED else {})))
    return rivals


def compare(
    model: SageMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    contexts: Sequence[int] = CONTEXTS,
    tokens: int = TOKENS,
    rounds: int = ROUNDS,
    *,
    shape: str = "small",
    batches: Sequence[int] = BATCHES,
    models: Sequence[str] = MODELS,
    device: str = "cpu",
    prompt: "str | os.PathLike | None" = None,
    say: Callable[[str], None] | None = None,
) -> dict:
    """Decode after each context, in batches of each size, with every model in turn.

    Args:
        contexts: tokens of the prompts, 16 or more each.
        tokens: decoded in a round after the first note, rounded up to whole notes.
        rounds: how often everything is measured.
        shape: `small` is `model` itself, `medium` a larger one with random weights.
        models: keys of `NAMES`.
        device: `cpu` or `cuda`.
        prompt: MIDI file that the checkpoint continues to write the prompts of shape `small`; from nothing by default.
        say: called with a line before each context and batch.

    Returns:
        A JSON-ready dict: `machine`, `shape`, `prompts`, `bandwidth`, a row per context, batch and model, `remarks`.

    Raises:
        ValueError: an unknown shape, model or device, no model at all, or a context too short, naming it.
    """
    target = _check(contexts, batches, rounds, device)
    unknown = [key for key in models if key not in NAMES]
    if unknown or not models:
        raise ValueError(f"models {unknown or 'none'}: choose among {', '.join(NAMES)}.")
    contexts, batches = sorted(set(contexts)), sorted(set(batches))
    say = say or (lambda line: None)
    notes_of = np.array(tokenizer.config_fields()["grammar"]["notes"])
    remarks: list[str] = []
    rows: list[dict] = []
    with seeded(0):
        ours = shaped(model, shape, max(contexts) + 2 * (tokens + 64)).to(target)
        written = None
        if shape == "small" and 1 in batches:
            say(f"writing {max(contexts):,} tokens to start from")
            written = written_ids(model, tokenizer, max(contexts), prompt)
        rivals = rivals_of(ours, models, remarks)
        weights = {rival.key: stored_bytes(rival.model) for rival in rivals}
        sampled = [key for rival in rivals if rival.key in DRAFTED for key in (rival.key, DRAFTED[rival.key])]
        bandwidth = Bandwidth(ours, target)
        bandwidth.measure()
        for context in contexts:
            for batch in batches:
                say(f"context {context:,}, batch {batch}")
                if batch == 1 and written is not None:
                    ids = written[:, :context]
                else:
                    ids = music_like_ids(tokenizer, context, batch)
                per_note = ids.numel() / max(int(notes_of[ids].sum()), 1)
                cell = _Cell(ids.to(target), tokens, per_note, remarks)
                rows += cell.measure(rivals, rounds, sampled if batch == 1 else [], weights, bandwidth)
    for row in rows:
        _add_ratios(row, rows)
        if row["key"] in FULL_PRECISION:
            step_s = row["ms_per_token"] / 1000
            row["roofline_products"] = rounded(row["step_bytes"] / bandwidth.products / step_s)
            row["roofline_stream"] = rounded(row["step_bytes"] / bandwidth.stream / step_s)
    if any("peak_mb" not in row for row in rows):
        remarks.append("peak memory is left out: this system does not tell a process its peak anew (Linux does)")
    trained = model.config.max_position_embeddings
    if written is not None and max(contexts) > trained:
        remarks.append(
            f"contexts over {trained:,} are longer than the checkpoint's own: only their speed means anything"
        )
    pattern = "a bar of notes over and over"
    heard = "from nothing" if prompt is None else f"after {Path(prompt).name}"
    prompts = {}
    if 1 in batches:
        prompts["batch 1"] = pattern if written is None else f"written by the checkpoint {heard}"
    if batches[-1] > 1:
        prompts["larger batches"] = f"{pattern}, each row one token ahead of the row before"
    return {
        "machine": machine(target),
        "shape": _described(ours, shape),
        "prompts": prompts,
        "bandwidth": {
            "products_gb_s": rounded(bandwidth.products / 1e9),
            "stream_gb_s": rounded(bandwidth.stream / 1e9),
        },
        "rows": rows,
        "remarks": remarks,
    }


def _check(contexts: Sequence[int], batches: Sequence[int], rounds: int, device: str) -> torch.device:
    if device not in ("cpu", "cuda"):  # of others neither memory nor time is measured right
        raise ValueError(f"device {device!r} is neither cpu nor cuda.")
    for context in contexts:
        if context < 16:
            raise ValueError(f"a context of {context} tokens is too short to measure: give contexts of 16 or more.")
    if not contexts or not batches or min(batches) < 1 or rounds < 1:
        raise ValueError("contexts, batches and rounds need one entry or more, each at least 1.")
    return device_of(device)


@dataclass
class _Cell:
    """One context and batch: prompts (B, T), tokens to decode, mean tokens per note of the prompts."""

    ids: torch.Tensor
    tokens: int
    tokens_per_note: float
    remarks: list[str]

    def __post_init__(self):
        self.per_note = max(round(self.tokens_per_note), 1)
        self.total = self.per_note * (1 + -(-self.tokens // self.per_note))

    def measure(self, rivals, rounds: int, sampled: list[str], weights: dict, bandwidth: Bandwidth) -> list[dict]:
        batch, context = self.ids.shape
        device = self.ids.device
        place = f"context {context:,}, batch {batch}"
        fitting, rises = [], {}
        started = time.perf_counter()
        for rival in rivals:
            if rival.key in DRAFTED and batch > 1:
                self.remarks.append(f"{rival.name} is left out at {place}: drafting takes one sequence at a time")
                continue
            needed, free = rival.estimated_cache_bytes(batch, context + self.total), free_bytes(device)
            if free is not None and needed > free / 2:
                self.remarks.append(
                    f"{rival.name} is left out at {place}: its cache would take {needed / 1e9:.3g} GB, "
                    f"more than half of the {free / 1e9:.3g} GB that are free"
                )
                continue
            # The warm-up, too: what is measured later has run before.
            rises[rival.key] = peak_rise(
                device, lambda rival=rival: timed(rival.model, self.ids, 2 * self.per_note, **rival.options)
            )
            fitting.append(rival)
        if time.perf_counter() - started > SLOW_S and rounds > 1:
            self.remarks.append(f"{place} is measured once: a round takes minutes")
            rounds = 1
        runs: dict[str, list[Run]] = {rival.key: [] for rival in fitting}
        drawn: dict[str, list[Run]] = {rival.key: [] for rival in fitting if rival.key in sampled}
        for number in range(rounds):
            bandwidth.measure()
            for rival in fitting:
                runs[rival.key].append(timed(rival.model, self.ids, self.total, **rival.options))
                if rival.key in drawn:
                    with seeded(number):
                        run = timed(rival.model, self.ids, self.total, do_sample=True, **rival.options)
                    drawn[rival.key].append(run)
        rows = []
        for rival in fitting:
            row = {"context": context, "batch": batch, "key": rival.key, "model": rival.name, "rounds": rounds}
            row |= summary(runs[rival.key], context, batch, self.tokens_per_note)
            if rival.key in drawn:
                row["sampled_tokens_per_second"] = statistics.median(r.tokens_per_second for r in drawn[rival.key])
                row["sampled_tokens_per_pass"] = statistics.mean(r.tokens_per_pass for r in drawn[rival.key])
            if rival.key in FULL_PRECISION:
                cached = row["cache_bytes_per_token"] * batch * (context + self.total / 2)
                row["step_bytes"] = weight_bytes_per_step(rival.model, batch) + cached
            if rises[rival.key] is not None:
                row["peak_mb"] = (weights[rival.key] + rises[rival.key]) / 1e6
            rows.append({name: rounded(value) for name, value in row.items()})
        return rows


def summary(runs: list[Run], context: int, batch: int, tokens_per_note: float) -> dict[str, float]:
    """The columns of one model: medians of its rounds, percentiles over the tokens and notes of all of them."""
    per_note = max(round(tokens_per_note), 1)
    arrivals = [run.note_arrivals(per_note) for run in runs]
    gaps = np.concatenate([np.diff(times) for times in arrivals])
    tokens_per_second = batch * statistics.median(run.tokens_per_second for run in runs)
    prefill_s = statistics.median(run.prefill_s for run in runs)
    return {
        "tokens_per_second": tokens_per_second,
        "notes_per_second": tokens_per_second / tokens_per_note,
        "tokens_per_note": tokens_per_note,
        "tokens_per_pass": statistics.mean(run.tokens_per_pass for run in runs),
        "ms_per_token": 1000 * float(np.median(np.concatenate([run.token_seconds() for run in runs]))),
        **{f"ms_per_note_p{q}": 1000 * float(np.percentile(gaps, q)) for q in (50, 95, 99)},
        "first_note_ms": 1000 * statistics.median(times[0] for times in arrivals),
        "prefill_tokens_per_second": batch * context / prefill_s,
        "cache_bytes_per_token": runs[-1].cache["used"],
        "cache_padded_bytes_per_token": runs[-1].cache["padded"],
        "cache_allocated_bytes_per_token": runs[-1].cache["allocated"],
    }


def _add_ratios(row: dict, rows: list[dict]) -> None:
    """Against the full-head and multi-query Llamas of the same context and batch, where they were measured."""
    same = {r["key"]: r for r in rows if (r["context"], r["batch"]) == (row["context"], row["batch"])}
    for key, name in (("full", "speed_ratio"), ("mqa", "mqa_speed_ratio")):
        if key in same:
            row[name] = rounded(row["tokens_per_second"] / same[key]["tokens_per_second"])
    if "full" in same:
        base = same["full"]
        row["cache_ratio"] = rounded(base["cache_bytes_per_token"] / row["cache_bytes_per_token"])
        row["cache_padded_ratio"] = rounded(base["cache_bytes_per_token"] / row["cache_padded_bytes_per_token"])
        if "sampled_tokens_per_second" in row:
            row["sampled_speed_ratio"] = rounded(row["sampled_tokens_per_second"] / base["tokens_per_second"])


def compare_training(
    model: SageMusicForCausalLM,
    tokenizer: SageMusicTokenizer,
    contexts: Sequence[int] = TRAINING_CONTEXTS,
    rounds: int = ROUNDS,
    *,
    shape: str = "small",
    batches: Sequence[int] = TRAINING_BATCHES,
    device: str = "cpu",
) -> dict:
    """Forward and backward (no optimiser) of SAGE-Music and of a stock Llama of equal parameters, in turn, float32.

    Returns a JSON-ready dict with a `training` row per context, batch and model; `time_ratio` is the time over the
    Llama's. Arguments and errors as for `compare`.
    """
    target = _check(contexts, batches, rounds, device)
    rows = []
    with seeded(0):
        bare = copy.copy(model.config.to_dict()) | {"num_mtp_layers": 0}  # the backbone alone has a rival
        ours = SageMusicForCausalLM(SageMusicConfig(**bare))
        ours = shaped(ours, shape, max(contexts)).to(target)
        models = {NAMES["full"]: equal_llama(ours).to(target), NAMES["ours"]: ours}
        for context in sorted(set(contexts)):
            for batch in sorted(set(batches)):
                ids = music_like_ids(tokenizer, context, batch).to(target)
                seconds: dict[str, list[float]] = {name: [] for name in models}
                for _ in range(rounds + 1):  # the first is the warm-up
                    for name, trained in models.items():
                        step = partial(trained, ids, labels=ids, use_cache=False)
                        seconds[name].append(training_seconds(trained, lambda step=step: step().loss))
                medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
                for name, trained in models.items():
                    row = {"context": context, "batch": batch, "model": name, "parameters": trained.num_parameters()}
                    row |= {"intermediate_size": trained.config.intermediate_size, "training_step_s": medians[name]}
                    row["time_ratio"] = medians[name] / medians[NAMES["full"]]
                    rows.append({key: rounded(value) for key, value in row.items()})
    return {"machine": machine(target), "shape": _described(ours, shape), "training": rows}


def training_seconds(model, loss: Callable[[], torch.Tensor]) -> float:
    """Seconds of a forward and backward pass of `loss`, which computes it with `model` in training mode."""
    device = next(model.parameters()).device
    model.train()
    _synchronise(device)
    start = time.perf_counter()
    loss().backward()
    _synchronise(device)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    model.eval()
    return seconds


def _described(ours: SageMusicForCausalLM, shape: str) -> dict:
    return {
        "name": shape,
        "parameters": ours.num_parameters(),
        "hidden_size": ours.config.hidden_size,
        "layers": ours.config.num_hidden_layers,
        "heads": ours.config.num_attention_heads,
        "kv_routing": ours.config.kv_routing,
    }


def rounded(value):
    """A float to four significant digits; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
