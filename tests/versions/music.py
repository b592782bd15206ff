"""Music of both families by every way in, from fixed seeds: a digest of the bytes of each.

    python tests/versions/music.py            # JSON on stdout: {"sage_music continue": SHA-256, ...}

Two installations whose digests are equal write the same music; `tests/versions/run.py` compares them.
"""

import base64
import hashlib
import json
import tempfile
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from transformers import pipeline

import perceivers
import sage_music
import sage_studio.pipelines  # noqa: F401 (registers the pipeline)
from sage_studio import example
from sage_studio.checkpoints import load
from sage_studio.cli import main
from sage_studio.generation.bars import plan_continuation
from sage_studio.publishing.export import export

PROMPT = example("saints")
# Of the command line; and, of the pipeline and the endpoint, by name.
SHORT = {
    "sage-music": (["--bars", "8"], ["--prompt-bars", "4"], {"prompt_bars": 4, "bars": 8}),
    "perceivers": (["--minutes", "0.2"], ["--prompt-seconds", "5"], {"prompt_s": 5, "music_s": 12}),
}
FASTER = {"int8": ["--int8"], "draft": ["--draft"]}


def command(folder: Path, *arguments: str) -> bytes:
    """The MIDI file that a command line writes."""
    out = folder / "out.mid"
    with redirect_stdout(StringIO()):
        code = main([*arguments, "--seed", "0", "--out", str(out)])
    assert not code, f"sage-music {' '.join(arguments)}: exit code {code}"
    return out.read_bytes()


def pieces(folder: Path):
    """Name and bytes of every piece."""
    for name, (length, kept, options) in SHORT.items():
        family = name.replace("-", "_")
        model = ["--model", name]
        yield f"{family} generate", command(folder, "generate", *model, *length)
        yield f"{family} continue", command(folder, "continue", str(PROMPT), *model, *length, *kept)
        if name == "sage-music":
            yield f"{family} stream", command(folder, "stream", str(PROMPT), *length, *kept)
            with plan_continuation(*load(), PROMPT, bars=4, seed=1).stream() as stream:
                notes = [(note.program, note.pitch, round(note.onset_s, 6)) for note in stream]
            yield f"{family} notes of a stream", json.dumps(notes).encode()
            for way, option in FASTER.items():
                yield f"{family} {way}", command(folder, "continue", str(PROMPT), *option, *length, *kept)
        pretrained = {"sage-music": sage_music, "perceivers": perceivers}[name].PRETRAINED
        pipe = pipeline("midi-continuation", model=str(pretrained), device="cpu")
        yield f"{family} pipeline", pipe(PROMPT.read_bytes(), seed=0, **options)["midi"]
        batch = pipe([PROMPT.read_bytes()] * 2, seed=3, batch_size=2, **options)
        yield f"{family} pipeline, batch", b"".join(one["midi"] for one in batch)
        yield f"{family} handler", answered(export(name, folder / family, samples=False), options)
        yield from modes(name)


def answered(repository: Path, options: dict) -> bytes:
    """What the inference endpoint of an exported repository answers."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("handler", repository / "handler.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = base64.b64encode(PROMPT.read_bytes()).decode()
    answer = module.EndpointHandler(str(repository))({"inputs": inputs, "parameters": {**options, "seed": 0}})
    return base64.b64decode(answer["midi"])


def modes(name: str):
    """Ids by plain `generate()`."""
    model, tokenizer = load(name)
    ids = torch.tensor([tokenizer.midi_to_ids(PROMPT)[:150]])
    for mode, options in (
        ("sampled", {"do_sample": True}),
        ("beams", {"do_sample": False, "num_beams": 3}),
        ("chunked", {"do_sample": False, "prefill_chunk_size": 40}),
        ("prompt lookup", {"do_sample": False, "prompt_lookup_num_tokens": 4}),
        ("uncached", {"do_sample": False, "use_cache": False}),
    ):
        torch.manual_seed(0)
        ids_out = model.generate(ids, max_new_tokens=60, **options)
        yield f"{name.replace('-', '_')} generate(), {mode}", json.dumps(ids_out.tolist()).encode()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in pieces(Path(folder))}, indent=1))
