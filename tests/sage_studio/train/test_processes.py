"""Training in processes of its own: killed at any moment it ends with the same weights; two processes are one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import band
from safetensors.torch import load_file
from transformers import AutoConfig

from perceivers import PerceiverSTokenizer
from sage_music import SageMusicTokenizer

SMALL = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 5}
SMALL |= {"model_type": "sage_music", "max_position_embeddings": 256}
PIANO = {"model_type": "perceivers", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
PIANO |= {"num_attention_heads": 2, "num_latents": 32, "max_position_embeddings": 128, "cross_scales": [None, 96]}
SHAPES = {"sage_music": SMALL, "perceivers": PIANO}
TOKENIZERS = {"sage_music": SageMusicTokenizer, "perceivers": PerceiverSTokenizer}
# Several epochs, so that their order and crops count; an evaluation, a checkpoint and samples now and then.
# The end is in the middle of an epoch.
COMMON = "--block_size 128 --max_steps 22 --save_steps 4 --warmup_steps 2 --learning_rate 0.01 --logging_steps 1 "
COMMON += "--sample_steps 8 --num_samples 1 --sample_bars 2 --tempo 0.1 --velocity 8 "
COMMON += "--report_to none --disable_tqdm true"

# Trainings one after the other, each forked after the slow imports: in one process, killed so many seconds after a
# checkpoint appears where "kill_at" says so (perhaps in the middle of a line), or in two that find each other as under
# torchrun.
FORKS = """
import json, os, signal, sys, time
from pathlib import Path
from sage_studio.train.__main__ import run
for job in json.loads(sys.argv[1]):
    argv, world = job["argv"], job.get("processes", 1)
    output, children = Path(argv[argv.index("--output") + 1]), []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if world > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
            sys.argv[1:] = argv
            run()  # ends the process
        children.append(child)
    if "kill_at" in job:
        step, delay = job["kill_at"]
        running = lambda: os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        while step and running() and not (output / f"checkpoint-{step}").exists():
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(children[0], signal.SIGKILL)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    kept = sorted(path.name for path in output.glob("checkpoint-*"))
    print("\\nended", *map(os.waitstatus_to_exitcode, statuses), *kept, flush=True)
"""

# PyTorch's FSDP, layer by layer as Accelerate shards them on GPUs (it passes over `--fsdp` on CPUs).
SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
import perceivers, sage_music
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (world,))
    for layer in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(type(p).__name__ == "DTensor" for p in model.parameters())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model.train()
for step in range(6):
    ids = torch.randint(3, 200, (4, 64), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    labels[:, :33] = -100
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    loss = model(input_ids=ids[mine], labels=labels[mine], use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if world > 1:
        dist.all_reduce(loss, dist.ReduceOp.AVG)
    if rank == 0:
        print("loss", float(loss))
if world > 1:
    dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo's threads abort a process now and then as its interpreter ends
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("midi")
    for seed in range(7):
        name = "validation" if seed == 6 else "train"
        (root / name).mkdir(exist_ok=True)
        band(bars=6, seed=seed).dump_midi(root / name / f"{seed}.mid")
    for name, shape in SHAPES.items():
        (root / f"{name}.json").write_text(json.dumps(shape))
    return root


def command(folder, out, family="sage_music", batch=4, common=COMMON) -> list[str]:
    options = ["--data", str(folder), "--output", str(out), "--model", str(folder / f"{family}.json")]
    options += [*common.split(), "--per_device_train_batch_size", str(batch), "--cache", str(folder / "cache")]
    if family == "perceivers":
        options.remove("--block_size")
        options.remove("128")
    return options


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def run(*argv) -> str:
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trainings(*jobs: dict) -> list[list[str]]:
    """Run `FORKS`; of each job the exit codes of its processes and the checkpoints it left."""
    lines = run("-c", FORKS, json.dumps(jobs)).splitlines()
    ended = [line.split()[1:] for line in lines if line.startswith("ended")]
    assert len(ended) == len(jobs)
    return ended


def torchrun(*argv) -> str:
    return run("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), *argv)


def free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def losses(out: Path, step: int, key: str = "loss") -> list[float]:
    rows = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [row[key] for row in rows if key in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "best" / "model.safetensors")


@pytest.mark.parametrize("family", SHAPES)
def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(folder, tmp_path, family):
    seed = random.randrange(1000)
    draw = random.Random(seed)
    print("seed of the moments:", seed)
    whole = {"argv": command(folder, tmp_path / "whole", family)}
    killed = {"argv": command(folder, tmp_path / "killed", family)}
    # Before the first checkpoint, and soon after, or while, each of the next four is written.
    moments = [(step, round(draw.uniform(0.01, 0.2), 3)) for step in (None, 4, 8, 12, 16)]
    first, *ended = trainings(whole, *[{**killed, "kill_at": moment} for moment in moments], killed)
    print(*zip([*moments, None], ended, strict=True), sep="\n")
    assert first[0] == ended[-1][0] == "0" and {one[0] for one in ended[:-1]} <= {"-9", "0"}
    assert sum(one[0] == "-9" and "checkpoint-22" not in one for one in ended[:-1]) >= 2
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), f"seed {seed}"
    assert losses(tmp_path / "whole", 20) == losses(tmp_path / "killed", 20)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    assert reports[0]["eval_nats_per_note"] == reports[1]["eval_nats_per_note"]


@pytest.mark.parametrize("family", SHAPES)
def test_two_processes_train_as_one_with_the_same_global_batch(folder, tmp_path, family):
    """Over gloo: the same loss curve, weights and evaluation, and a resumed run equals one that went through."""
    half = COMMON.replace("--max_steps 22", "--max_steps 22 --lr_scheduler_type constant")
    stopped = half.replace("--max_steps 22", "--max_steps 10")

    def pair(name, common):
        argv = command(folder, tmp_path / name, family, batch=2, common=common)
        return {"argv": argv, "processes": 2, "port": free_port()}

    ended = trainings(
        {"argv": command(folder, tmp_path / "one", family, batch=4)},
        pair("through", half),
        pair("resumed", stopped),
        pair("resumed", half),
    )
    assert [codes[: 1 + (index > 0)] for index, codes in enumerate(ended)] == [["0"], *[["0", "0"]] * 3]
    torchrun("-m", "sage_studio.train", *command(folder, tmp_path / "two", family, batch=2))
    one, two = losses(tmp_path / "one", 20), losses(tmp_path / "two", 20)
    assert len(one) == len(two) == 20 and one[0] > one[-1]
    assert two == pytest.approx(one, abs=1e-4)
    nats = [losses(tmp_path / name, 20, "eval_nats_per_note") for name in ("one", "two")]
    assert nats[1] == pytest.approx(nats[0], rel=1e-4)
    assert losses(tmp_path / "resumed", 20) == losses(tmp_path / "through", 20)
    through, resumed = weights(tmp_path / "through"), weights(tmp_path / "resumed")
    assert all(torch.equal(through[name], resumed[name]) for name in through)


def test_an_interrupt_ends_the_run_and_leaves_its_checkpoints(folder, tmp_path):
    out = tmp_path / "run"
    argv = command(folder, out, common=COMMON.replace("--max_steps 22", "--max_steps 5000"))
    reset = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start = reset + "from sage_studio.cli import main; import sys; sys.exit(main(['train', *sys.argv[1:]]))"
    process = subprocess.Popen(
        [sys.executable, "-c", start, *argv], env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not (out / "checkpoint-8" / "trainer_state.json").is_file():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors


@pytest.mark.parametrize("family", SHAPES)
def test_sharded_over_two_processes_the_loss_curve_is_the_same(tmp_path, family):
    config = AutoConfig.for_model(**{**TOKENIZERS[family]().config_fields(), **SHAPES[family], "num_hidden_layers": 2})
    config.save_pretrained(tmp_path)
    (tmp_path / "sharded.py").write_text(SHARDED)
    found = [
        [float(line.split()[1]) for line in text.splitlines() if line.startswith("loss")]
        for text in (
            run(str(tmp_path / "sharded.py"), str(tmp_path)),
            torchrun(str(tmp_path / "sharded.py"), str(tmp_path)),
        )
    ]
    assert len(found[0]) == 6 and found[0][0] > found[0][-1]
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_sharding_on_a_cpu_is_refused_not_passed_over(folder, tmp_path):
    argv = ["-m", "sage_studio.train", *command(folder, tmp_path / "run"), "--fsdp"]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and "--fsdp" in done.stderr.splitlines()[-1]
