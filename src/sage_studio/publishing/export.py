"""A checkpoint as a complete Hub repository: one folder that works where this package is not installed.

    sage-music export sage-music out/sage-music-6m --repo-id user/sage-music-6m

In it: weights, config and tokenizer with the maps that Transformers loads remote code by, generation config, the
family's Hub files and the modules of its pipeline made flat, `handler.py` for an inference endpoint with its
`requirements.txt`, the model card as README.md, licences, and samples to see and hear. The folder is written whole or
not at all; an older export in its place is replaced, unless that would lose what was changed in it by hand.
"""

import fnmatch
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizer
from transformers.utils import logging

from sage_studio import example, families
from sage_studio.checkpoints.loading import BUNDLED, load
from sage_studio.checkpoints.provenance import (
    CARD,
    NOTICE,
    OutOfReachError,
    ancestors,
    file_of,
    is_repo_id,
    keeps_license,
    licensed,
    look,
    made_from,
    notice_of,
    read_mapping,
    read_text,
)
from sage_studio.errors import MissingExtraError
from sage_studio.music.midi import write_midi
from sage_studio.music.render import render_piano_roll, render_wav

from .cards import PLACEHOLDER, check_card, make_card, named, read_report, without_samples
from .distribution import PACKAGES, license_text, requirements, version
from .flattening import flatten

TASK = "midi-continuation"


class ExportError(ValueError):
    """A checkpoint that cannot be exported as asked. `str()` says what to do."""


# The file and the class of a repository's own pipeline. It gives `ContinuationPipeline` the functions that an installed
# package finds by the names in `families`.
PIPELINE = "midi_continuation", "MidiContinuationPipeline"
PIPELINE_TEXT = """# The midi-continuation pipeline of this repository's model, of sage-music {version} (Apache-2.0).
from .sage_studio_families import family_of
from .{plan} import {plan_name}
from .{together} import {together_name}
from .sage_studio_pipelines_continuation import ContinuationPipeline


class {name}(ContinuationPipeline):
    family = family_of("{model_type}")
    plan = staticmethod({plan_name})
    together = staticmethod({together_name})
"""

SAMPLE_RATE = 22_050  # half of a CD's, so that a page plays it soon

# Names that an export's files may have; a folder with others is neither replaced nor sent.
OWN_NAMES = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
OWN_NAMES += ("config.json", "generation_config.json", "tokenizer_config.json", "miditok.json", "handler.py")
OWN_NAMES += ("requirements.txt", "README.md", "LICENSE", "LICENSE-CODE", "NOTICE.md")
# Of code: the Hub files that there are, for `train_sage_music.py` is somebody's own, and whatever was made flat.
OWN_NAMES += (*(path.name for name in families.FAMILIES for path in sorted((PACKAGES / name).glob(f"*_{name}.py"))),)
OWN_NAMES += ("sage_studio_*.py", f"{PIPELINE[0]}.py")
SAMPLES = ("samples/prompt.mid", *(f"samples/continuation.{kind}" for kind in ("mid", "wav", "png")))
# What Python, a download and the Hub leave in it.
PASSED_OVER = ("__pycache__", ".cache", ".gitattributes")
# Sums of an export's files as they were written, where huggingface_hub keeps what is no part of a repository.
RECORD = Path(".cache", "huggingface", "sage_music_export.json")
# Files beside a checkpoint that may hold the text of its license.
LICENSE_NAMES = ("LICENSE", "LICENSE.txt", "LICENSE.md")

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    confirm_license: bool = False,
    replace: bool = False,
) -> Path:
    """Write the Hub repository of a checkpoint.

    Args:
        checkpoint: as `checkpoints.load` takes it: a bundled checkpoint's name, a folder, a Hub name; an adapter
            is merged into its base.
        output: folder to write; an older export there is replaced. It is not the folder that this runs in.
        repo_id: name on the Hub, `user/name`, for the card's examples.
        card: a model card to take. By default that of a bundled checkpoint, or of an older export; for any other
            checkpoint one is made from its config and the report of its training run, where that is beside it.
        license, license_name: identifier of the weights' license, for a card that is made; by default the base's, where
            that is known. The name belongs to the license `other`.
        base_model: name on the Hub of what the weights were made from, for a card that is made; by default the name by
            which an adapter or a training run knows its base, where the Hub has one of that name.
        datasets: names on the Hub of the training data, for a card that is made.
        max_shard_size: of one file of weights.
        samples: write `samples/`: a prompt, its continuation, their sound and picture.
        confirm_license: take the license on the caller's word, though the weights' own, or that of what they were made
            from, is another, unknown or out of reach.
        replace: replace an older export even where files in it were changed since.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint does not load.
        CardError: the card's metadata is wrong; the message names the field.
        ExportError: the folder holds something else, or an export that was changed since; the context is too short for
            the samples; or the license is unknown or not what the weights' own, or that of those that they were made
            from, allows.
        ProvenanceError: a file beside the checkpoint is damaged, or a license out of reach.
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
    text = text if repo_id is None else named(text, repo_id)
    chosen = check_card(text).license
    if not confirm_license:
        _check_license(chosen, origin)
    with _written_whole(output) as folder:
        if samples:
            try:
                write_samples(model, tokenizer, folder / "samples")
            except MissingExtraError as error:
                raise MissingExtraError(f"{error} --no-samples leaves the samples out.") from error
            except ValueError as error:  # a context too short for the prompt, which nobody here chose
                reason = str(error).rstrip(".")
                raise ExportError(
                    f"{name}: does not play the prompt of the samples ({reason}): --no-samples leaves them out."
                ) from error
        write_code(model.config.model_type, folder)
        _write_weights(model, origin, folder, max_shard_size)
        _write_tokenizer(tokenizer, model.config.model_type, folder)
        (folder / CARD).write_text(text, encoding="utf-8")
        _write_own_license(origin, chosen, folder, confirm_license)
        notice = notice_of(origin)
        if notice is not None:
            shutil.copyfile(notice, folder / NOTICE)
        _write_record(folder, output, replace)
    return output


def write_copy(exported: Path, repo_id: str, put: Callable[[Path, Path], object], folder: Path) -> None:
    """An export's files in an empty folder, each `put` there from its place; its card has the repository's name in it.

    Raises:
        ExportError: there are other things in the folder of the export.
    """
    for name in own_files(exported):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name == CARD:
            place.write_text(named((exported / name).read_text(encoding="utf-8"), repo_id), encoding="utf-8")
        else:
            put((exported / name).resolve(), place)


def pipeline_module(origin: str) -> str | None:
    """The file of the custom pipeline that a checkpoint's config names; None where it names none of ours."""
    path = file_of(origin, "config.json")
    try:
        impl = read_mapping(path)["custom_pipelines"][TASK]["impl"]
        module = impl.split(".")[0]
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return None
    return module if file_of(origin, f"{module}.py") is not None else None


def is_export(folder: str | os.PathLike) -> bool:
    """Whether a folder is what `export` writes."""
    module = pipeline_module(os.fspath(folder)) if os.path.isdir(folder) else None
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
    if any(output.iterdir()) and not is_export(output):
        raise ExportError(f"{output}: not empty, and not an export; choose another folder.")
    if Path.cwd().is_relative_to(output.resolve()):
        # Whoever stands in it would stand in a folder that is gone, beside a new one of its name.
        raise ExportError(f"{output}: the folder that this runs in: run it from another one, for this is replaced.")
    own_files(output)


def is_own(name: str) -> bool:
    """Whether a file of a repository is one that an export may have; `name` with slashes, from the root."""
    return name in SAMPLES or ("/" not in name and any(fnmatch.fnmatchcase(name, own) for own in OWN_NAMES))


def own_files(folder: Path) -> list[str]:
    """The files of an export by name, without caches.

    Raises:
        ExportError: there are other things in the folder, or its record is damaged.
    """
    known = _recorded(folder)  # by whichever version wrote it
    paths = sorted([*folder.iterdir(), *folder.glob("samples/*")])
    found = {path.relative_to(folder).as_posix(): path for path in paths if path.name not in PASSED_OVER}
    if (folder / "samples").is_dir():
        del found["samples"]
    others = [name for name, path in found.items() if not (is_own(name) or name in known) or not path.is_file()]
    if others:
        raise ExportError(f"{folder}: an export with other things in it ({', '.join(others[:3])}): move them away.")
    return list(found)


def _sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of an export by its name."""
    sums = {}
    for name in own_files(folder):
        with open(folder / name, "rb") as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _recorded(folder: Path) -> dict[str, str]:
    """The sums of an export's files when it was written; none of one that was downloaded."""
    return read_mapping(folder / RECORD) if (folder / RECORD).is_file() else {}


def _write_record(folder: Path, older: Path, replace: bool) -> None:
    """Write the sums of a new export's files, unless by taking the place of an `older` one it would lose work."""
    sums, known, changed = _sums(folder), _recorded(older), {}
    if older.exists() and not replace:
        changed = {name: found for name, found in _sums(older).items() if found != known.get(name)}
    lost = [name for name, found in changed.items() if found != sums.get(name)]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        how = "changed since it was exported"
        if not known:
            how = "may be somebody's work, for no record of the export is left"
        raise ExportError(
            f"{older}: {', '.join(lost[:3])}{more}: {how}. Choose another folder; --replace overwrites it "
            "(--card keeps a card)."
        )
    # What came from somebody's hand still does after an export that kept it.
    record = {name: found for name, found in sums.items() if name not in changed or not known}
    (folder / RECORD).parent.mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no `user/name`.

    Raises:
        ExportError: it is none.
    """
    if not is_repo_id(repo_id) or repo_id.count("/") != 1:
        raise ExportError(f"{repo_id!r} is no name on the Hub: write user/name.")


def export_again(exported: str | os.PathLike, output: str | os.PathLike, repo_id: str) -> Path:
    """Write an export into another folder, with the name of a repository in its card. Returns the folder.

    Raises:
        ExportError: as `export`.
    """
    output = Path(output).resolve()
    check_replaceable(output)
    with _written_whole(output) as folder:
        write_copy(Path(exported), repo_id, shutil.copyfile, folder)
        _write_record(folder, output, replace=False)
    return output


def write_code(model_type: str, folder: Path) -> None:
    """The family's Hub files, its pipeline made flat, the handler and what they need installed, and their licence."""
    family = families.family_of(model_type)
    for path in sorted((PACKAGES / model_type).glob(f"*_{model_type}.py")):
        shutil.copyfile(path, folder / path.name)
    paths = {field: getattr(family, field).partition(":") for field in ("plan", "together")}
    modules = ["sage_studio.pipelines.continuation", *(module for module, _, _ in paths.values())]
    for name, text in flatten(modules, model_type).items():
        (folder / name).write_text(text, encoding="utf-8")
    names = {field: module.replace(".", "_") for field, (module, _, _) in paths.items()}
    names |= {f"{field}_name": name for field, (_, _, name) in paths.items()}
    file, pipeline = PIPELINE
    text = PIPELINE_TEXT.format(version=version(), model_type=model_type, name=pipeline, **names)
    (folder / f"{file}.py").write_text(text, encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("handler.py"), folder / "handler.py")
    (folder / "LICENSE").write_text(license_text(), encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements("audio")) + "\n", encoding="utf-8")


def write_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizer, folder: Path) -> None:
    """A prompt, its continuation as MIDI, sound and picture: what a reader of the card sees and hears first."""
    family, threads = families.family_of(model), torch.get_num_threads()
    prompt = example(family.example)
    torch.set_num_threads(1)  # as fast where a model is small, and the same music on every machine of its kind
    try:
        music = family.load("plan")(model, tokenizer, prompt, seed=0, **family.sample).write()
    finally:
        torch.set_num_threads(threads)
    folder.mkdir()
    shutil.copyfile(prompt, folder / "prompt.mid")
    write_midi(folder / "continuation.mid", music.score)
    render_wav(folder / "continuation.wav", music.score, sample_rate=SAMPLE_RATE)
    in_seconds = not family.counts_bars
    render_piano_roll(folder / "continuation.png", music.score, music.prompt_end_s, in_seconds=in_seconds)


def _write_own_license(origin: str, chosen: str, folder: Path, confirmed: bool) -> None:
    """The text of the weights' license, where there is one beside them, as LICENSE; the code's then gets another name.

    It is their own, or that of weights that they were made from and whose license they keep: not where only the
    caller's word says so.
    """
    codes = license_text().split()
    known = [] if confirmed else licensed(origin)
    kept = {origin, *(ancestor.place for ancestor in known if ancestor.license == chosen)}
    for place in dict.fromkeys(ancestor.place for ancestor in ancestors(origin)):
        found = next(filter(None, (file_of(place, name) for name in LICENSE_NAMES if place in kept)), None)
        # An older export's is the code's.
        if found is not None and read_text(found).split() != codes:
            (folder / "LICENSE").rename(folder / "LICENSE-CODE")
            shutil.copyfile(found, folder / "LICENSE")
            return


def _write_weights(model: PreTrainedModel, origin: str, folder: Path, max_shard_size: str) -> None:
    """Weights, config and generation config; each tensor in the type that it has in the checkpoint."""
    model_type, family = model.config.model_type, families.family_of(model)
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
    impl = ".".join(PIPELINE)
    model.config.custom_pipelines = {TASK: {"impl": impl, "pt": ["AutoModelForCausalLM"], "tf": [], "type": "text"}}
    if getattr(model, "_hf_peft_config_loaded", False):
        # Transformers would write the adapters alone, or, from 5.24 on beside PEFT 0.21, raise.
        raise ExportError(f"{origin}: no whole model, but one with adapters beside it: merge them first.")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        if shown:
            logging.enable_progress_bar()
    if not (folder / "config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise ExportError(f"{origin}: Transformers wrote no whole model of it.")


def _write_tokenizer(tokenizer: PreTrainedTokenizer, model_type: str, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # How it was loaded here is nobody's business.
    settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
    reference = f"tokenization_{model_type}.{families.family_of(model_type).prefix}Tokenizer"
    settings["auto_map"] = {"AutoTokenizer": [reference, None]}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored_dtypes(origin: str) -> dict[str, torch.dtype]:
    """The types of a checkpoint's tensors by name; of an adapter, its base's."""
    index = file_of(origin, "model.safetensors.index.json")
    single = file_of(origin, "model.safetensors")
    if single is not None:
        files = [single]
    elif index is not None:
        files = [file_of(origin, shard) for shard in sorted(set(read_mapping(index)["weight_map"].values()))]
    else:
        base = made_from(origin)
        return {} if base is None else _stored_dtypes(base)
    found = {}
    for path in filter(None, files):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():
                dtype = DTYPES.get(tensors.get_slice(key).get_dtype())
                if dtype is not None:
                    found[key] = dtype
    return found


def _card_text(origin: str, model: PreTrainedModel, title: str, card, facts: dict) -> str:
    """The card to write, with the placeholder for the repository's name where it is made here."""
    bundled = _bundled(origin)
    if card is not None:
        card = Path(card)
    elif bundled is not None or pipeline_module(origin) is not None:  # one of ours, or an export of one
        card = file_of(origin, CARD)
    if card is not None:
        given = [name for name, value in facts.items() if value]
        if given:
            raise ExportError(f"{given[0]} is for a card that is made; this checkpoint's is {card}: change it there.")
        return read_text(card)
    license = facts["license"] or next((ancestor.license for ancestor in licensed(origin)), None)
    if license is None:
        raise ExportError(f"{origin}: the license of these weights is not known: give --license, such as apache-2.0.")
    base = made_from(origin)
    if base is not None and not facts["base_model"] and not _is_there(base):
        print(
            f"note: {base}, which these weights were made from, is no folder here and was not found on the Hub: the "
            "card does not name it. --base-model does.",
            file=sys.stderr,
        )
        base = None
    on_hub = base is not None and not os.path.isdir(base)
    bundled = _bundled(base)
    if bundled is not None:
        began = f"`{bundled.pretrained.name}`, which the package {bundled.distribution or 'sage-music'} ships"
    else:
        began = f"`{base}`" if on_hub else None
    return make_card(
        title,
        PLACEHOLDER,
        model.config,
        license,
        license_name=facts["license_name"],
        base=began,
        base_model=facts["base_model"] or (base if on_hub else None),
        datasets=facts["datasets"],
        report=read_report(origin),
    )


def _check_license(license: str, origin: str) -> None:
    """Weights have a license that theirs, and those of all that they were made from, allow."""
    for ancestor in licensed(origin):
        if not keeps_license(ancestor.license, license):
            bundled = _bundled(ancestor.place)
            name = bundled.pretrained.name if bundled else ancestor.name or ancestor.place
            raise ExportError(
                f"license {license}: the weights of {name} are {ancestor.license} (so says {ancestor.source}), and "
                "what is made of them keeps that license. If you have their owner's leave: --confirm-license."
            )


def _bundled(place: str | None) -> families.Family | None:
    """The family whose bundled checkpoint lies in a folder."""
    found = families.FAMILIES.values() if place is not None else ()
    return next((family for family in found if family.pretrained.resolve() == Path(place).resolve()), None)


def _is_there(name: str) -> bool:
    """Whether a checkpoint's name is a folder's, or one that the Hub knows."""
    try:
        return os.path.isdir(name) or any(look(name, file) for file in ("config.json", "adapter_config.json"))
    except OutOfReachError:
        return False


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
