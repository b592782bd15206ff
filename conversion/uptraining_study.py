"""How far uptraining restores a converted model: nats per note after 0, 1 and 5 % of the original's tokens.

    python -m conversion.uptraining_study ORIGINAL --original-tokens 8192000 --data multitrack --data drums \\
        --metadata metadata.csv --seeds 3 --output runs/uptraining --results model_cards/results

ORIGINAL, a SAGE-Music with full heads, goes out to a stock `LlamaForCausalLM` and comes back in by
`conversion.convert_llama`; each arm of `ARMS` is then uptrained from there by `conversion.uptrain`, a run for each
fraction and seed, and scored on held-out pieces of the first --data folder as `sage-music evaluate` does. Writes
`uptraining-cpu.md` and `.json`. Called again, it goes on where it was.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from sage_studio.checkpoints import load
from sage_studio.evaluate.likelihood import evaluate_likelihood, linearised
from sage_studio.experiments.report import interval
from sage_studio.files import write_atomic
from sage_studio.reports import machine, machine_line, markdown

from .convert_to_llama import convert as convert_out
from .uptrain import pool, steps_of, uptrain
from .weights import ConversionError, run_command

CONTROL = "full heads, trained on"
# Name -> routing, key-value heads of an attribute (None: the original's), pooling.
ARMS = {
    CONTROL: ("none", None, "mean"),
    "head-routed, 1 head": ("head", 1, "mean"),
    "token-routed, 1 head": ("token", 1, "mean"),
    "multi-query": ("none", 1, "mean"),
    "head-routed, 1 head, projection": ("head", 1, "projection"),
    "token-routed, 1 head, projection": ("token", 1, "projection"),
}
FRACTIONS = (0.0, 0.01, 0.05)
PIECES = 40
ORIGINAL = "original"
BLOCK_SIZE, BATCH, LEARNING_RATE = 512, 4, 1.5e-3
RECIPE = {
    "--block_size": BLOCK_SIZE,
    "--per_device_train_batch_size": BATCH,
    "--learning_rate": LEARNING_RATE,
    "--eval_pieces": 6,
    "--sample_steps": 0,
    "--save_only_model": "true",
}
LICENCES = ("MIT", "CC0-1.0", "CC BY 4.0", "BSD-3-Clause", "Public Domain")


def study(original, original_tokens: float, data: list, metadata, seeds: int, output, results) -> Path:
    """Run what is not there yet and write the results; returns the path of `uptraining-cpu.md`.

    Args:
        original: a SAGE-Music checkpoint with `kv_routing="none"`.
        original_tokens: that it was trained on.
        data: folders of MIDI with train/, validation/ and test/; held-out pieces are of the first one's test/.
        metadata: its CSV, for the licences of the training files.
        seeds: of the uptraining, from 0.
        output: folder of the runs.
        results: folder of the two files.

    Raises:
        ValueError, OSError: an argument or the data are wrong, or a training failed.
    """
    output, results = Path(output), Path(results)
    llama = output / "llama"
    if not (llama / "config.json").is_file():
        convert_out(original, llama)
    heads = load(original)[0].config.num_key_value_heads
    options = ["--data", *map(str, data), "--metadata", str(metadata), "--licences", *LICENCES, "--bf16"]
    options += [str(text) for pair in RECIPE.items() for text in pair]

    systems = {ORIGINAL: str(original)}
    for seed in range(seeds):  # a whole table after every seed
        for arm, (routing, kv_heads, pooling) in ARMS.items():
            kv_heads = kv_heads or heads
            for fraction in FRACTIONS:
                label = name_of(arm, fraction, seed)
                folder = output / label
                if fraction:
                    steps = steps_of(fraction, original_tokens, BLOCK_SIZE * BATCH)
                    argv = [*options, "--seed", str(seed), "--eval_steps", str(steps)]
                    if uptrain(llama, folder, routing, kv_heads, pooling, fraction, original_tokens, argv):
                        raise ConversionError(f"{folder}: the training failed; what it said is above.")
                    systems[label] = str(folder / "best")
                elif seed == 0:
                    systems[label] = str(pool(llama, folder, routing, kv_heads, pooling))
    found = evaluate_likelihood(
        systems, [data[0]], out=output / "evaluation", num=PIECES, split="test", workers=1, plots=False
    )
    result = summary(found["pieces"], seeds)
    result |= {
        "original_tokens": original_tokens,
        "learning_rate": LEARNING_RATE,
        "parameters": {label: load(systems[label])[0].num_parameters() for label in systems if label.endswith(" 0")}
        | {ORIGINAL: load(original)[0].num_parameters()},
        "machine": machine(),
    }
    write_atomic(results / "uptraining-cpu.json", (json.dumps(result, indent=1) + "\n").encode())
    path = results / "uptraining-cpu.md"
    write_atomic(path, report(result, load(original)[0].config).encode())
    return path


def name_of(arm: str, fraction: float, seed: int) -> str:
    """Label of a model; nothing is drawn before uptraining, so that seed is always 0."""
    return f"{arm} {fraction:.0%} {seed if fraction else 0}"


def summary(pieces: dict[str, list[dict]], seeds: int) -> dict:
    """Nats per note of the original and of every arm and fraction, with 95 % intervals, and what they lose to it.

    Intervals draw seeds and pieces anew; differences are paired by piece, in per cent: `difference` of the original's
    mean, `control` (after some training) of what the control has after the same, paired by seed too.

    Args:
        pieces: by label, the records of `evaluate_likelihood`: all systems over the same pieces.
    """
    kept = {label: linearised(pieces[label]) for label in pieces}
    keys = sorted(set.intersection(*(set(of_label) for of_label in kept.values())))
    values = {label: np.array([of_label[key] for key in keys]) for label, of_label in kept.items()}
    base = values[ORIGINAL]
    rows = {ORIGINAL: interval(base[None])}
    for arm in ARMS:
        for fraction in FRACTIONS:
            drawn = range(seeds) if fraction else range(1)
            table = np.stack([values[name_of(arm, fraction, seed)] for seed in drawn])
            difference = interval((table - base) / base.mean() * 100)
            row = rows[f"{arm} {fraction:.0%}"] = interval(table) | {"seeds": len(table), "difference": difference}
            if fraction and arm != CONTROL:
                control = np.stack([values[name_of(CONTROL, fraction, seed)] for seed in drawn])
                row["control"] = interval((table - control) / control.mean() * 100)
    return {"rows": rows, "pieces": len(keys), "seeds": seeds}


def report(result: dict, config) -> str:
    """The results as Markdown."""
    rows = [
        ["original (full heads)", f"{result['parameters'][ORIGINAL]:,}", "1/1", *[_said(result["rows"][ORIGINAL])] * 3]
    ]
    for arm, (_, kv_heads, _) in ARMS.items():
        cells = []
        for fraction in FRACTIONS:
            row = result["rows"][f"{arm} {fraction:.0%}"]
            cells.append(f"{_said(row)} ({_per_cent(row['difference'])})")
        share = f"1/{config.num_key_value_heads // (kv_heads or config.num_key_value_heads)}"
        rows.append([arm, f"{result['parameters'][name_of(arm, 0, 0)]:,}", share, *cells])
    beside = []
    for arm in ARMS:
        found = [result["rows"][f"{arm} {fraction:.0%}"].get("control") for fraction in FRACTIONS[1:]]
        beside += [] if arm == CONTROL else [[arm, *map(_per_cent, found)]]
    trained = [f"after {fraction:.0%}" for fraction in FRACTIONS[1:]]
    header = ["arm", "parameters", "cache a token", *(f"after {fraction:.0%}" for fraction in FRACTIONS)]
    shape = (
        f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{result['original_tokens']:,.0f} training tokens"
    )
    seeds = result["seeds"]
    drawn = (
        f"{seeds} seeds of the uptraining" if seeds > 1 else "one seed of the uptraining: intervals are of pieces alone"
    )
    parts = [
        "# Uptraining: attribute-specialized heads from a stock Llama (`python -m conversion.uptraining_study`)",
        "Nats per note of held-out music (lower is better), 95 % intervals in brackets; in parentheses the difference "
        "to the original, paired by piece, in per cent.",
        markdown(header, rows),
        f"The original: {shape}. It went out to a `LlamaForCausalLM` and came back in, which changes nothing; then its "
        "key and value heads were pooled and the model trained on for 0, 1 and 5 % of the original's tokens: "
        f"blocks of {BLOCK_SIZE}, {BATCH} at a time, peak learning rate {result['learning_rate']} (cosine), bfloat16. "
        f"{result['pieces']} pieces of the test split; {drawn} (at 0 % nothing is "
        f"drawn). {machine_line(result['machine'])}.",
        f"`{CONTROL}` is the control for more training as such: the original itself under the same recipe, which "
        "takes it out of the minimum that it had settled in. `multi-query` is the mean pool for all attributes alike. "
        "`projection` begins with what the heads have most in common, not with their mean (`--pooling`).",
        "## Beside the control, after as many tokens",
        markdown(["arm", *trained], beside),
    ]
    return "\n\n".join(parts) + "\n"


def _said(row: dict) -> str:
    return f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _per_cent(row: dict) -> str:
    return f"{row['mean']:+.1f} % [{row['low']:+.1f}, {row['high']:+.1f}]"


def main(argv=None) -> int:
    """The command; returns its exit code: 0, or 2 where an argument, the data or a training is wrong."""
    parser = argparse.ArgumentParser(prog="python -m conversion.uptraining_study", description=__doc__.split("\n")[0])
    parser.add_argument("original", help="SAGE-Music checkpoint with kv_routing 'none'")
    parser.add_argument("--original-tokens", type=float, required=True, help="tokens that it was trained on")
    parser.add_argument("--data", action="append", required=True, help="folder of MIDI; the first one is tested on")
    parser.add_argument("--metadata", required=True, help="CSV of the files' licences")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm and fraction (default: 3)")
    parser.add_argument("--output", default="runs/uptraining", help="folder of the runs")
    parser.add_argument("--results", default="model_cards/results", help="folder of the results")
    options = parser.parse_args(argv)
    return run_command(lambda: print(study(**vars(options))))


if __name__ == "__main__":
    sys.exit(main())
