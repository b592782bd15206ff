"""A checkpoint as a complete Hub repository: one folder that works where this package is not installed.

    python -m conversion.export_hub sage-music out/sage-music-6m --repo-id user/sage-music-6m

In it: weights, config and tokenizer with the maps that Transformers loads remote code by, generation config, the
family's Hub files and the modules of its pipeline made flat, `handler.py` for an inference endpoint with its
`requirements.txt`, the model card as README.md, licences, and samples to see and hear. The folder is written whole or
not at all; an older export in its place is replaced.
"""

import argparse
import fnmatch
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizer
from transformers.utils import cached_file, logging

from notekit.checkpoint import BUNDLED, load
from notekit.compose import continue_score
from notekit.midi import write_midi
from notekit.perform import continue_performance
from notekit.render import MissingExtraError, render_piano_roll, render_wav

from .cards import check_card, keeps_license, make_card, without_samples
from .flattening import ROOT, SRC, flatten, project

TASK = "midi-continuation"
# What a card says where the repository has no name yet.
PLACEHOLDER = "USER/NAME"


class Family(NamedTuple):
    """What a family's repository holds: the prefix of its classes, its pipeline's module and class."""

    prefix: str
    module: str
    pipeline: str


FAMILIES = {
    "sage_music": Family("SageMusic", "notekit.pipelines.bars", "SageMusicContinuationPipeline"),
    "perceivers": Family("PerceiverS", "notekit.pipelines.seconds", "PerceiverSContinuationPipeline"),
}

# The piece that samples continue: of a band, or without drums for a pianist.
PROMPTS = {"sage_music": "ode_to_joy.mid", "perceivers": "greensleeves.mid"}
SAMPLE_RATE = 22_050  # half of a CD's, so that a page plays it soon

# Names that an export may have; a folder with others is not replaced.
OWN_NAMES = ("*.safetensors", "*.safetensors.index.json", "*_sage_music.py", "*_perceivers.py", "notekit_*.py")
OWN_NAMES += ("config.json", "generation_config.json", "tokenizer_config.json", "miditok.json", "handler.py")
OWN_NAMES += ("requirements.txt", "README.md", "LICENSE", "NOTICE.md", "samples")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ExportError(ValueError):
    """A checkpoint that cannot be exported as asked. `str()` says what to do."""


def export(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    repo_id: str | None = None,
    card: str | os.PathLike | None = None,
    license: str | None = None,
    license_name: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    max_shard_size: str = "5GB",
    samples: bool = True,
) -> Path:
    """Write the Hub repository of a checkpoint.

    Args:
        checkpoint: as `notekit.checkpoint.load` takes it: a bundled checkpoint's name, a folder, a Hub name; an adapter
            is merged into its base.
        output: folder to write; an older export there is replaced.
        repo_id: name on the Hub, `user/name`, for the card's examples.
        card: a model card to take. By default that of a bundled checkpoint, or of an older export; for any other
            checkpoint one is made from its config and the report of its training run, where that is beside it.
        license, license_name: identifier of the weights' license, for a card that is made; by default the base's, where
            that is known. The name belongs to the license `other`.
        base_model: name on the Hub of what the weights were made from, for a card that is made; by default the name by
            which an adapter or a training run knows its base.
        datasets: names on the Hub of the training data, for a card that is made.
        max_shard_size: of one file of weights.
        samples: write `samples/`: a prompt, its continuation, their sound and picture.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint does not load.
        CardError: the card's metadata is wrong; the message names the field.
        ExportError: the folder holds something else, or the license is unknown or not allowed.
        FlatteningError: a module that the pipeline needs cannot travel.
        MissingExtraError: samples need extras that are not installed.
    """
    name, output = os.fspath(checkpoint), Path(output).resolve()
    if repo_id is not None:
        check_repo_id(repo_id)
    check_replaceable(output)
    model, tokenizer = load(name)
    origin = str(BUNDLED.get(name, name))
    facts = {"license": license, "license_name": license_name, "base_model": base_model, "datasets": list(datasets)}
    title = output.name if repo_id is None else repo_id.partition("/")[2]
    text = _card_text(origin, model, title, card, facts)
    text = text if samples else without_samples(text)
    _check_license(check_card(text).license, _base_of(origin))
    with _written_whole(output) as folder:
        if samples:
            write_samples(model, tokenizer, folder / "samples")
        write_code(model.config.model_type, folder)
        _write_weights(model, origin, folder, max_shard_size)
        _write_tokenizer(tokenizer, model.config.model_type, folder)
        (folder / "README.md").write_text(text.replace(PLACEHOLDER, repo_id or PLACEHOLDER), encoding="utf-8")
        notice = _file_of(origin, "NOTICE.md") or _file_of(_base_of(origin), "NOTICE.md")
        if notice is not None:
            shutil.copyfile(notice, folder / "NOTICE.md")
    return output


def is_export(folder: str | os.PathLike) -> bool:
    """Whether a folder is what `export` writes."""
    module = _pipeline_module(os.fspath(folder)) if os.path.isdir(folder) else None
    names = (f"{module}.py", "handler.py", "README.md")
    return module is not None and all(Path(folder, name).is_file() for name in names)


def check_replaceable(output: Path) -> None:
    """Refuse a place that has something else than an older export.

    Raises:
        ExportError: and nothing was changed.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ExportError(f"{output}: is a file; give a folder.")
    names = sorted(path.name for path in output.iterdir())
    if names and not is_export(output):
        raise ExportError(f"{output}: not empty, and not an export; choose another folder.")
    others = [name for name in names if not any(fnmatch.fnmatchcase(name, own) for own in OWN_NAMES)]
    if others:
        raise ExportError(f"{output}: an export with other things in it ({', '.join(others[:3])}): move them away.")


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no `user/name`.

    Raises:
        ExportError: it is none.
    """
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ExportError(f"{repo_id!r} is no name on the Hub: write user/name.") from error
    if repo_id.count("/") != 1:
        raise ExportError(f"{repo_id!r} is no name on the Hub: write user/name.")


def write_code(model_type: str, folder: Path) -> None:
    """The family's Hub files, its pipeline made flat, the handler and what they need installed, and their licence."""
    family = FAMILIES[model_type]
    for path in sorted((SRC / model_type).glob(f"*_{model_type}.py")):
        shutil.copyfile(path, folder / path.name)
    for name, text in flatten(family.module, model_type).items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(ROOT / "model_cards" / "handler.py", folder / "handler.py")
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    about = project()
    needed = [*about["dependencies"], *about["optional-dependencies"]["audio"]]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")


def write_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizer, folder: Path) -> None:
    """A prompt, its continuation as MIDI, sound and picture: what a reader of the card sees and hears first."""
    prompt, threads = ROOT / "examples" / PROMPTS[model.config.model_type], torch.get_num_threads()
    torch.set_num_threads(1)  # as fast where a model is small, and the same music on every machine of its kind
    try:
        if model.config.model_type == "perceivers":
            music = continue_performance(model, tokenizer, prompt, prompt_seconds=11.0, seconds=16.0, seed=0)
            prompt_end_s = music.prompt_seconds
        else:
            music = continue_score(model, tokenizer, prompt, prompt_bars=4, bars=8, seed=0)
            prompt_end_s = music.prompt_end_s
    finally:
        torch.set_num_threads(threads)
    folder.mkdir()
    shutil.copyfile(prompt, folder / "prompt.mid")
    write_midi(folder / "continuation.mid", music.score)
    render_wav(folder / "continuation.wav", music.score, sample_rate=SAMPLE_RATE)
    in_seconds = model.config.model_type == "perceivers"
    render_piano_roll(folder / "continuation.png", music.score, prompt_end_s, in_seconds=in_seconds)


def _write_weights(model: PreTrainedModel, origin: str, folder: Path, max_shard_size: str) -> None:
    """Weights, config and generation config; each tensor in the type that it has in the checkpoint."""
    model_type, family = model.config.model_type, FAMILIES[model.config.model_type]
    stored = _stored_dtypes(origin)
    for key, weight in model.named_parameters():
        # A model is loaded in one type. Narrower ones, such as a draft head's, come back where nothing is lost.
        dtype = stored.get(key, weight.dtype)
        if dtype != weight.dtype and torch.equal(weight.data.to(dtype).to(weight.dtype), weight.data):
            weight.data = weight.data.to(dtype)
    model.config.auto_map = {
        "AutoConfig": f"configuration_{model_type}.{family.prefix}Config",
        "AutoModel": f"modeling_{model_type}.{family.prefix}Model",
        "AutoModelForCausalLM": f"modeling_{model_type}.{family.prefix}ForCausalLM",
    }
    impl = f"{family.module.replace('.', '_')}.{family.pipeline}"
    model.config.custom_pipelines = {TASK: {"impl": impl, "pt": ["AutoModelForCausalLM"], "tf": [], "type": "text"}}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_tokenizer(tokenizer: PreTrainedTokenizer, model_type: str, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # How it was loaded here is nobody's business.
    settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    reference = f"tokenization_{model_type}.{FAMILIES[model_type].prefix}Tokenizer"
    settings["auto_map"] = {"AutoTokenizer": [reference, None]}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored_dtypes(origin: str) -> dict[str, torch.dtype]:
    """The types of a checkpoint's tensors by name; of an adapter, its base's."""
    index = _file_of(origin, "model.safetensors.index.json")
    single = _file_of(origin, "model.safetensors")
    if single is not None:
        files = [single]
    elif index is not None:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [path for path in (_file_of(origin, shard) for shard in shards) if path is not None]
    else:
        base = _base_of(origin)
        return {} if base is None else _stored_dtypes(base)
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():
                dtype = DTYPES.get(tensors.get_slice(key).get_dtype())
                if dtype is not None:
                    found[key] = dtype
    return found


def _file_of(origin: str | None, name: str) -> Path | None:
    """A file of a folder or of a repository on the Hub; None where there is none."""
    if origin is None:
        return None
    if os.path.isdir(origin):
        path = Path(origin, name)
        return path if path.is_file() else None
    try:
        found = cached_file(origin, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found)


def _base_of(origin: str | None) -> str | None:
    """What a checkpoint was made from, where it tells: a folder or a Hub name. Training begun anew has no base."""
    adapter, run = _file_of(origin, "adapter_config.json"), Path(origin or "", "..", "run.json")
    base = None
    if adapter is not None and _file_of(origin, "config.json") is None:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    elif os.path.isdir(origin or "") and run.is_file():  # what `sage-music train` leaves beside best/ and adapter/
        base = json.loads(run.read_text(encoding="utf-8")).get("model")
    if not base or base == origin or base.endswith(".json"):
        return None
    return str(BUNDLED.get(base, base))


def _bundled_name(origin: str | None) -> str | None:
    """The name of a bundled checkpoint's card, by its folder."""
    if origin is None:
        return None
    return next((f.name for f in BUNDLED.values() if Path(origin).resolve() == f.resolve()), None)


def _own_card(origin: str | None) -> Path | None:
    """The card of a bundled checkpoint, of an export or of one on the Hub."""
    bundled = _bundled_name(origin)
    if bundled is not None:
        return ROOT / "model_cards" / f"{bundled}.md"
    return _file_of(origin, "README.md") if _pipeline_module(origin) is not None else None


def _pipeline_module(origin: str | None) -> str | None:
    """The file of the custom pipeline that a checkpoint's config names; None where it names none of ours."""
    path = _file_of(origin, "config.json")
    try:
        impl = json.loads(path.read_text(encoding="utf-8"))["custom_pipelines"][TASK]["impl"]
        module = impl.split(".")[0]
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return None
    return module if _file_of(origin, f"{module}.py") is not None else None


def _license_of(base: str | None) -> str | None:
    """The license of a base, where its card tells."""
    own = _own_card(base) or _file_of(base, "README.md")
    try:
        return None if own is None else ModelCard.load(own).data.license
    except ValueError:
        return None


def _card_text(origin: str, model: PreTrainedModel, title: str, card, facts: dict) -> str:
    """The card to write, with the placeholder for the repository's name."""
    card = _own_card(origin) if card is None else Path(card)
    if card is not None:
        given = [name for name, value in facts.items() if value]
        if given:
            raise ExportError(f"{given[0]} is for a card that is made; this checkpoint's is {card}: change it there.")
        return card.read_text(encoding="utf-8")
    base, report = _base_of(origin), Path(origin, "..", "report.json")
    license = facts["license"] or _license_of(base)
    if license is None:
        raise ExportError(f"{origin}: the license of these weights is not known: give --license, such as apache-2.0.")
    on_hub = base is not None and not os.path.isdir(base)
    bundled = _bundled_name(base)
    return make_card(
        title,
        PLACEHOLDER,
        model.config,
        license,
        license_name=facts["license_name"],
        base=f"`{bundled}`, which the package sage-music ships" if bundled else f"`{base}`" if on_hub else None,
        base_model=facts["base_model"] or (base if on_hub else None),
        datasets=facts["datasets"],
        report=json.loads(report.read_text(encoding="utf-8")) if os.path.isdir(origin) and report.is_file() else None,
    )


def _check_license(license: str, base: str | None) -> None:
    """Weights made from share-alike ones stay so."""
    known = _license_of(base)
    if known is not None and not keeps_license(known, license):
        raise ExportError(f"license {license}: the weights were made from {known} ones, which must be shared alike.")


@contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends, and vanishes when it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    fresh, older = scratch / "new", scratch / "old"
    try:
        fresh.mkdir()
        yield fresh
        mask = os.umask(0)
        os.umask(mask)
        for path in fresh.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~mask)  # safetensors makes files for their owner alone
        if output.exists():
            output.rename(older)
        try:
            fresh.rename(output)
        except OSError:
            if older.exists():
                older.rename(output)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that `push_to_hub` has too."""
    add = parser.add_argument
    add("--card", help="model card to take (default: the bundled checkpoint's, or one that is made)")
    add("--license", help="license of the weights, such as apache-2.0 (default: the base's, where known)")
    add("--license-name", help="its name, with --license other")
    add("--base-model", help="name on the Hub of the checkpoint that these weights were made from")
    add("--datasets", nargs="+", default=(), metavar="NAME", help="names on the Hub of the training data")
    add("--max-shard-size", default="5GB", help="of one file of weights (default: %(default)s)")
    add("--no-samples", action="store_true", help="leave out the sample and its sound and picture")


def card_options(options: argparse.Namespace) -> dict:
    """The keywords of `export` that `add_card_arguments` has options for."""
    names = ("card", "license", "license_name", "base_model", "datasets", "max_shard_size")
    return {name: getattr(options, name) for name in names} | {"samples": not options.no_samples}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion.export_hub", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="sage-music, perceivers, a checkpoint's or an adapter's folder, a Hub name")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--repo-id", help="name on the Hub, user/name, for the card's examples")
    add_card_arguments(parser)
    options = parser.parse_args(argv)
    try:
        folder = export(options.checkpoint, options.output, repo_id=options.repo_id, **card_options(options))
    except (ValueError, OSError, MissingExtraError) as error:
        print(f"export_hub: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    print(f"wrote {options.output} ({len(sizes)} files, {sum(sizes) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
