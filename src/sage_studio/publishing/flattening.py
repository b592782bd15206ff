"""A package's modules as one flat folder: what a Hub repository holds beside a family's Hub files.

    files = flatten(["sage_studio.music.midi"], "sage_music")     # {"sage_studio_music_midi.py": "...", ...}

Transformers copies remote code one level deep and finds it by a regular expression over import lines. So
`sage_studio.music.midi` becomes `sage_studio_music_midi.py`, and its import lines siblings:

    from sage_studio.files import write_atomic               ->  from .sage_studio_files import write_atomic
    from .notes import NOTE_DTYPE                            ->  from .sage_studio_music_notes import NOTE_DTYPE
    from sage_music.cache_sage_music import SageMusicCache   ->  from .cache_sage_music import SageMusicCache

Which modules travel follows from the imports. What cannot travel, or what Transformers would misread, is an error that
names file and line; nothing else in a file is changed.
"""

import ast
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .distribution import PACKAGES, version

# What an import may name besides the standard library and siblings: what a model's repository can count on. Anything
# else stands in a `try` that catches ImportError, which Transformers' check of requirements passes over.
PROVIDED = {"torch", "numpy", "transformers", "huggingface_hub", "symusic", "miditok"} | set(sys.stdlib_module_names)

# How Transformers finds relative imports, comments and docstrings included.
RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.\S+\s*$|from\s+\.\S+\s+import)")


class FlatteningError(ValueError):
    """A module that cannot travel. `str()` names the file, the line and what to do."""

    def __init__(self, path: Path, line: int, reason: str):
        super().__init__(f"{path.name}, line {line}: {reason}")


def flatten(modules: Sequence[str], family: str, source: Path = PACKAGES) -> dict[str, str]:
    """Flat files of modules of one package, and of all modules of that package that they need.

    Args:
        modules: dotted names, such as `sage_studio.music.midi`.
        family: the package whose Hub files (`*_FAMILY.py`) travel beside them, such as `sage_music`.
        source: folder of the packages.

    Returns:
        Texts by file name. Hub files are not among them.

    Raises:
        FlatteningError: a module that does not exist, or an import that cannot travel.
    """
    files: dict[str, str] = {}
    owners: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        flat = f"{name.replace('.', '_')}.py"
        if owners.get(flat) == name:
            continue
        path = source / f"{name.replace('.', '/')}.py"
        if flat in owners or (source / family / flat).exists():
            raise FlatteningError(path, 1, f"becomes {flat}, as {owners.get(flat, 'a Hub file')} does: rename it.")
        if not path.is_file():
            raise FlatteningError(path, 1, f"there is no module {name}.")
        owners[flat] = name
        text, needed = _flatten_file(path, name, family, source)
        files[flat] = f"{_header(name)}\n{text}"
        waiting += needed
    return dict(sorted(files.items()))


def _header(module: str) -> str:
    return f"# {module} of sage-music {version()} (Apache-2.0), with its imports made flat. Generated: change it there."


def _flatten_file(path: Path, module: str, family: str, source: Path) -> tuple[str, list[str]]:
    """The rewritten text of one file, and the modules of its package that it needs."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    package = module.split(".")[0]
    lines, needed, rewritten = text.splitlines(keepends=True), [], set()
    optional = _inside_try(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "__file__":
            raise FlatteningError(path, node.lineno, "__file__ is another place in a repository: read no files there.")
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in (package, family):
                    raise FlatteningError(
                        path,
                        node.lineno,
                        f"`import {alias.name}` cannot travel: write `from {alias.name} import NAME`.",
                    )
                _check_provided(path, node, alias.name, optional)
            continue
        if not isinstance(node, ast.ImportFrom):
            continue
        target = _absolute(path, node, module)
        owner = target.split(".")[0]
        if owner == family:
            sibling = target.removeprefix(f"{family}.")
            if not sibling.endswith(f"_{family}") or not (source / family / f"{sibling}.py").is_file():
                raise FlatteningError(
                    path, node.lineno, f"`from {target} import` cannot travel: import from a Hub file (*_{family}.py)."
                )
        elif owner == package:
            place = source / target.replace(".", "/")
            if not place.with_suffix(".py").is_file():
                what = "names a package: import from a module of it." if place.is_dir() else "names no module."
                raise FlatteningError(path, node.lineno, f"`from {target} import` {what}")
            sibling = target.replace(".", "_")
            needed.append(target)
        elif owner not in PROVIDED and node not in optional and (source / owner).is_dir():
            raise FlatteningError(path, node.lineno, f"`from {target} import`: of packages, only {family} travels.")
        else:
            _check_provided(path, node, target, optional)
            continue
        index = node.lineno - 1
        start = re.match(r"(\s*from\s+)[.\w]+(\s+import\b)", lines[index])
        if start is None:
            raise FlatteningError(path, node.lineno, "an import that travels begins its line: `from MODULE import`.")
        lines[index] = f"{start[1]}.{sibling}{start[2]}{lines[index][start.end() :]}"
        rewritten.add(index)
    for index, line in enumerate(lines):
        if index not in rewritten and RELATIVE_IMPORT.match(line):
            raise FlatteningError(path, index + 1, "Transformers would read this text as an import: reword it.")
    return "".join(lines), needed


def _absolute(path: Path, node: ast.ImportFrom, module: str) -> str:
    """The dotted name of what an import reads from."""
    if not node.level:
        return node.module
    if node.level > 1 or node.module is None:
        raise FlatteningError(path, node.lineno, "a relative import that travels is `from .module import NAME`.")
    return f"{module.rpartition('.')[0]}.{node.module}"


def _inside_try(tree: ast.AST) -> set[ast.AST]:
    """All nodes in the body of a `try` that goes on without a missing package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any("ImportError" in ast.dump(handler) for handler in node.handlers):
            found.update(inner for statement in node.body for inner in ast.walk(statement))
    return found


def _check_provided(path: Path, node: ast.stmt, name: str, optional: set[ast.AST]) -> None:
    package = name.split(".")[0]
    if package not in PROVIDED and node not in optional:
        raise FlatteningError(
            path,
            node.lineno,
            f"{package} is not what a repository can count on: import it in a `try` that catches ImportError.",
        )
