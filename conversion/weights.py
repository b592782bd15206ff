"""What every converter shares: reading a checkpoint's tensors, renaming them by a map, filling a model with them.

A weight map is one dict, target name -> source name, read from top to bottom:

    WEIGHTS = {
        "model.embed_tokens.weight": "token_emb.weight",
        "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.1.weight",
        "model.layers.{i}.attn.kv_proj.weight": (("blocks.{i}.k", "blocks.{i}.v"), lambda k, v: torch.cat((k, v))),
    }

`{i}` and other names in braces run over `layers["i"]`, from 0. No tensor is left over and none is made up: a key that
no entry explains ends the conversion, and so does an entry without its key.
"""

import json
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from string import Formatter

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WeightMap = Mapping[str, "str | tuple[str | tuple[str, ...], Callable[..., Tensor]]"]

# Names under which a training checkpoint keeps its weights.
NESTED = ("state_dict", "model_state_dict", "model", "module")
# A folder's weights, the first of these that it has.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHOWN = 4  # keys of each kind that an error names


class ConversionError(ValueError):
    """A checkpoint that a converter does not understand; the message names the file or the keys."""


def load_state(path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their names.

    Args:
        path: a `.safetensors`, `.bin`, `.pt`, `.pth`, `.ckpt` or `.npz` file, an index of shards
            (`*.index.json`), or a folder with one of the names that Transformers writes. Weights inside a training
            checkpoint, under `state_dict` or the like, are found.

    Raises:
        ConversionError: no such file, not a checkpoint, damaged, or a pickle that would run code.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not found:
            raise ConversionError(f"{path}: none of {', '.join(FOLDER_FILES)} is in this folder: name the file.")
        path = found[0]
    if not path.is_file():
        raise ConversionError(f"{path}: no such file.")
    if path.name.endswith(".index.json"):
        return _load_shards(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path}: a pickle with more than tensors in it (or a damaged one); loading it could run any code, so it "
            "is not loaded. Where it comes from, load it and save its tensors with safetensors.torch.save_file."
        ) from error
    except (SafetensorError, RuntimeError, ValueError, TypeError, EOFError, OSError) as error:
        raise ConversionError(f"{path}: no checkpoint, or a damaged one: {_one_line(error)}") from error
    return _tensors_of(path, content)


def _load_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(f"{index}: no index of shards (it has no readable weight_map).") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ConversionError(f"{index}: the shard {shard!r} lies outside the folder.")
        state.update(load_state(index.parent / shard))
    if state.keys() != weight_map.keys():
        raise ConversionError(f"{index}: the shards hold other tensors: {_name(state.keys() ^ weight_map.keys())}.")
    return state


def _tensors_of(path: Path, content) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for name in NESTED:
            if isinstance(content.get(name), Mapping):
                return _tensors_of(path, content[name])
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
    raise ConversionError(f"{path}: no dict of tensors is in it, nor under {', '.join(NESTED)}.")


def read_json(file: Path) -> dict:
    """The fields in a file; `{}` where there is none.

    Raises:
        ConversionError: it holds something else.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file}: no set of fields.")
    return content


def strip_prefix(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """`state` without the first of `prefixes` that most of its names begin with, if one does; other names stay.

    Raises:
        ConversionError: two names become one.
    """
    for prefix in prefixes:
        if 2 * sum(name.startswith(prefix) for name in state) > len(state):
            stripped = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            if len(stripped) < len(state):
                twice = [name for name in stripped if name in state and prefix + name in state]
                raise ConversionError(f"with and without the prefix {prefix!r}: {_name(twice)}.")
            return stripped
    return dict(state)


def count(state: Iterable[str], pattern: str) -> int:
    """For how many numbers, from 0 on without a gap, `pattern` (with one name in braces) is in `state`."""
    (field,) = _fields(pattern)
    state, number = set(state), 0
    while pattern.format(**{field: number}) in state:
        number += 1
    return number


def remap(
    state: Mapping[str, Tensor],
    weight_map: WeightMap,
    layers: Mapping[str, int] | None = None,
    ignored: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Tensors under the target's names.

    Args:
        state: tensors by their source names.
        weight_map: target pattern -> source pattern, or (source pattern or patterns, function of those tensors).
        layers: for each name in braces how many numbers it runs over.
        ignored: patterns (`fnmatch`) of source names that no target needs, such as masks and tables.

    Raises:
        ConversionError: names that are missing, or that neither the map nor `ignored` knows, the first few of each; or
            a tensor whose shape a function of the map cannot take.
    """
    entries = {}
    for target, source in weight_map.items():
        names, function = source if isinstance(source, tuple) else (source, None)
        names = (names,) if isinstance(names, str) else names
        for values in _numbers(_fields(target), layers or {}):
            entries[target.format(**values)] = tuple(name.format(**values) for name in names), function
    needed = {name for names, _ in entries.values() for name in names}
    missing = needed - state.keys()
    unknown = [name for name in state.keys() - needed if not any(fnmatchcase(name, some) for some in ignored)]
    if missing or unknown:
        parts = [f"{kind}: {_name(keys)}" for kind, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise ConversionError(f"the weights have another layout than this converter reads. {'; '.join(parts)}.")
    tensors = {}
    for target, (names, function) in entries.items():
        given = [state[name] for name in names]
        try:
            tensors[target] = function(*given) if function else given[0]
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip(names, given, strict=True))
            raise ConversionError(f"{shapes}: not of the shape that {target} needs: {_one_line(error)}") from error
    return tensors


def _fields(pattern: str) -> list[str]:
    return sorted({field for _, field, _, _ in Formatter().parse(pattern) if field is not None})


def _numbers(fields: list[str], layers: Mapping[str, int]) -> Iterable[dict[str, int]]:
    return (dict(zip(fields, row, strict=True)) for row in product(*(range(layers[field]) for field in fields)))


def halves_from_pairs(weight: Tensor, heads: int, rotated: int) -> Tensor:
    """Query or key rows for rotary positions that turn channels (i, i + r/2), from rows for pairs (2i, 2i + 1).

    Args:
        weight: (heads * head_dim, inputs), or a bias (heads * head_dim,).
        rotated: r, the first channels of every head that are rotated; an even number.

    Raises:
        ConversionError: the rows are not those of so many heads.
    """
    if heads < 1 or weight.shape[0] % heads:
        raise ConversionError(f"{weight.shape[0]} rows of queries or keys are not those of {heads} heads.")
    rows = weight.unflatten(0, (heads, -1))
    order = torch.arange(rows.shape[1])
    order[:rotated] = torch.cat((torch.arange(0, rotated, 2), torch.arange(1, rotated, 2)))
    return rows[:, order].flatten(0, 1)


@torch.no_grad()
def load_into(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into a model, every parameter and persistent buffer once; tied ones have any one of their names.

    Values go to the model's dtype and device.

    Raises:
        ConversionError: a tensor is missing, unknown, given twice, or of another shape. The model is then unchanged.
    """
    names: dict[int, list[str]] = {}
    own = model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    given = {key: [name for name in tied if name in tensors] for key, tied in names.items()}
    missing = [names[key][0] for key, found in given.items() if not found]
    twice = [" and ".join(found) for found in given.values() if len(found) > 1]
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    kinds = {
        "missing": missing,
        "unknown": tensors.keys() - own.keys(),
        "given twice": twice,
        "of another shape": shapes,
    }
    wrong = [f"{kind}: {_name(keys)}" for kind, keys in kinds.items() if keys]
    if wrong:
        raise ConversionError(f"the weights do not fill the model. {'; '.join(wrong)}.")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def check_output(output) -> None:
    """Refuse an output folder that holds something, before minutes of work.

    Raises:
        ConversionError: it exists and is not an empty folder.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output}: it is there already and not empty: name another folder.")


@contextmanager
def new_folder(output) -> Iterator[Path]:
    """A folder to save in, which becomes `output` when all is in it; where saving fails, nothing is left.

    Raises:
        ConversionError: as `check_output`.
    """
    check_output(output)
    output = Path(output).resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        folder = Path(scratch) / output.name
        folder.mkdir()
        yield folder
        if output.exists():  # an empty folder, which not every system renames over
            output.rmdir()
        folder.rename(output)


def run_command(command: Callable[[], object]) -> int:
    """Call a script's `command`; returns the exit code: 0, or 2 with one line on stderr for wrong input."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _name(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
