"""Uptraining: a model with ordinary heads goes on as a SAGE-Music with attribute-specialized key-value heads.

    python -m conversion.uptrain SOURCE OUTPUT --routing head --data MIDI_FOLDER --original-tokens 8.2e6 --fraction 0.05

SOURCE is a SAGE-Music checkpoint with `kv_routing="none"`, or a Llama-shaped folder as `conversion.convert_llama` reads
it. Its key and value heads are pooled, every attribute begins with the pool, and the model is then trained on, for a
fraction of the tokens that it was trained on before. `--pooling mean` averages the heads; `projection` keeps what they
have most in common, and begins better. How much helps: `model_cards/results/uptraining-cpu.md`.

The training is `sage-music train`: every option of it may follow (`--learning_rate`, `--block_size`, `--bf16`, ...).
`OUTPUT/pooled` is the model before it, `OUTPUT/best` the result. Called again, an interrupted run goes on; one that
began from other heads is refused.
"""

import argparse
import hashlib
import json
import math
import sys
import warnings
from pathlib import Path

from sage_music import SageMusicForCausalLM, SageMusicTokenizer
from sage_studio.checkpoints import load
from sage_studio.families import SAGE_MUSIC
from sage_studio.files import changes, write_atomic
from sage_studio.publishing.licences import carry
from sage_studio.train.arguments import parse
from sage_studio.train.command import main as train

from .convert_llama import KINDS, POOLINGS, convert, pool_heads
from .weights import ConversionError, read_json, run_command

# What the options say, not this command: how long to train, on which model, and where to.
TAKEN = ("--max_steps", "--num_train_epochs", "--model", "--output", "--output_dir")
BLOCK_SIZE = 1024  # as in `sage-music train`
# In the folder of the pooled model, what it was made of.
RECORD = "pooled_from.json"


def read_source(source) -> tuple[SageMusicForCausalLM, SageMusicTokenizer]:
    """Model and tokenizer of a SAGE-Music checkpoint (any name that `sage_studio.checkpoints.load` takes) or a Llama's.

    Raises:
        ConversionError, sage_studio.checkpoints.CheckpointError: it is neither.
    """
    kind = str(read_json(Path(source) / "config.json").get("model_type"))
    model, tokenizer = convert(source) if kind in KINDS else load(source)
    if not isinstance(model, SageMusicForCausalLM):
        raise ConversionError(f"{source}: a {type(model).__name__}; only SAGE-Music has heads by attribute.")
    return model, tokenizer


def steps_of(fraction: float, original_tokens: float, tokens_a_step: int) -> int:
    """Training steps that see `fraction` of the original's tokens, rounded up.

    Raises:
        ConversionError: an argument that is not positive.
    """
    if not fraction > 0 or not original_tokens > 0:
        raise ConversionError(f"fraction ({fraction}) and original tokens ({original_tokens}) must be above 0.")
    return math.ceil(round(fraction * original_tokens / tokens_a_step, 6))


def pool(source, output, routing: str, kv_heads: int = 1, pooling: str = "mean") -> Path:
    """Write the pooled model of `source`, its tokenizer, license and notice; returns the folder, `output/pooled`.

    One that is there already stays as it is: the run in `output` began from it.

    Raises:
        ConversionError, sage_studio.checkpoints.CheckpointError: as `read_source` and `pool_heads`; or `output/pooled`
            was made of another model, or with other arguments.
    """
    model, tokenizer = read_source(source)
    model, folder = model.float(), Path(output) / "pooled"
    record = {"weights": _digest(model), "routing": routing, "kv_heads": kv_heads, "pooling": pooling}
    kept = read_json(folder / RECORD)
    if not kept:
        pool_heads(model, routing, kv_heads, pooling).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        carry(source, folder, "uptrain")
        write_atomic(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())  # last: all before it is there
    elif kept != record:
        raise ConversionError(
            f"{folder}: this run began from another model ({changes(kept, record)}): name another OUTPUT."
        )
    return folder


def _digest(model: SageMusicForCausalLM) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


def uptrain(
    source,
    output,
    routing: str,
    kv_heads: int,
    pooling: str,
    fraction: float,
    original_tokens: float,
    options: list[str],
) -> int:
    """Pool the heads of `source` and train on; `options` are those of `sage-music train`, `--data` among them.

    Returns the exit code of the training.

    Raises:
        ConversionError: an argument that this command sets itself, or as `pool` and `steps_of`.
    """
    taken = [option for option in options if option.split("=")[0] in TAKEN]
    if taken:
        raise ConversionError(f"{', '.join(taken)}: this command sets it, by SOURCE, OUTPUT and --fraction.")
    steps_of(fraction, original_tokens, 1)
    folder = pool(source, output, routing, kv_heads, pooling)
    argv = ["--model", str(folder), "--output", str(output), *options]
    _, data, _, args = parse([*argv, "--max_steps", "1"], lambda model: SAGE_MUSIC)
    rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    steps = steps_of(fraction, original_tokens, rows * (data.block_size or BLOCK_SIZE))
    print(f"note: {steps} steps, {fraction:.1%} of {original_tokens:,.0f} tokens.", file=sys.stderr)
    return train([*argv, "--max_steps", str(steps)])


def main(argv=None) -> int:
    """The command; returns its exit code: 0, or 2 where the source, the data or an argument is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.uptrain",
        description=__doc__.split("\n")[0],
        epilog="Other options are those of `sage-music train`: --data and what else it takes.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="SAGE-Music with kv_routing 'none', or a Llama-shaped folder")
    parser.add_argument("output", help="folder of the run")
    parser.add_argument(
        "--routing", choices=("head", "token", "none"), default="head", help="none: plain grouped-query attention"
    )
    parser.add_argument("--kv-heads", type=int, default=1, help="key-value heads of an attribute (default: 1)")
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="how heads become fewer (default: mean)")
    parser.add_argument("--original-tokens", type=float, help="tokens that SOURCE was trained on")
    parser.add_argument("--fraction", type=float, default=0.05, help="of them to train on now (default: 0.05)")
    options, rest = parser.parse_known_args(argv)
    code = 0

    def command():
        nonlocal code
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            if options.original_tokens is None:
                raise ConversionError("--original-tokens: say how many tokens SOURCE was trained on.")
            run = (options.source, options.output, options.routing, options.kv_heads, options.pooling)
            code = uptrain(*run, options.fraction, options.original_tokens, rest)
        for warning in caught:
            print(f"note: {warning.message}", file=sys.stderr)

    return run_command(command) or code


if __name__ == "__main__":
    sys.exit(main())
