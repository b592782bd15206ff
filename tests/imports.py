"""The picture of a package's imports: its rooms by floors, what each imports, and counts.

    python tests/imports.py src/sage_studio

A room is a module or a sub-package directly below the package; an arrow is an import from one room by another, wherever
in a file it stands. A room's floor is one above the highest of those that it imports.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def modules(package: Path) -> dict[str, Path]:
    """The modules of a package by their names below it, such as `music.midi`; a sub-package's is its `__init__`."""
    paths = sorted(package.rglob("*.py"))
    return {".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(package: Path, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """The modules of the package that a file imports, each with the name that is taken of it ("" for none)."""
    here = (package.name, *path.relative_to(package).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        taken = [(alias.name, "") for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = [*here[: -node.level]] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            taken = [(base, alias.name) for alias in node.names]
        for source, name in taken:
            if f"{source}.".startswith(f"{package.name}."):
                module = source[len(package.name) + 1 :]
                below = f"{module}.{name}".lstrip(".")
                yield (below, "") if below in known else (module or "__init__", name)


def arrows(package: Path) -> dict[str, set[str]]:
    """By room, the rooms that it imports."""
    known, found = modules(package), {}
    for name, path in known.items():
        room = name.split(".")[0]
        if room != "__init__":
            others = {module.split(".")[0] for module, _ in imported(package, path, known)}
            found.setdefault(room, set()).update(others - {room, "__init__"})
    return found


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of nodes that each lead to each other."""
    reached = {node: set(others) for node, others in graph.items()}
    for middle in graph:
        for node in graph:
            if middle in reached[node]:
                reached[node] |= reached[middle]
    rings = {frozenset(other for other in graph if other in reached[node] and node in reached[other]) for node in graph}
    return [set(ring) for ring in rings if ring]


def floors(graph: dict[str, set[str]]) -> list[list[str]]:
    """Nodes by floor, the lowest first; those of a cycle share one."""
    ring_of = {node: frozenset(ring) for ring in cycles(graph) for node in ring}
    floor: dict[str, int] = {}

    def height(node: str) -> int:
        if node not in floor:
            ring = ring_of.get(node, {node})
            below = {other for member in ring for other in graph[member]} - set(ring)
            floor.update(dict.fromkeys(ring, 1 + max(map(height, sorted(below)), default=0)))
        return floor[node]

    highest = max(map(height, graph), default=0)
    return [sorted(node for node in graph if floor[node] == level) for level in range(1, highest + 1)]


def main(package: Path) -> None:
    graph = arrows(package)
    stack, rings = floors(graph), cycles(graph)
    for level in range(len(stack), 0, -1):
        for room in stack[level - 1]:
            print(f"{level:>2}  {room:<16} {' '.join(sorted(graph[room])) or '-'}")
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py"))
    count = sum(map(len, graph.values()))
    print(f"{len(graph)} rooms, {len(stack)} floors, {count} arrows, {len(rings)} cycles, {lines:,} lines")
    for ring in rings:
        print(f"cycle: {' '.join(sorted(ring))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
