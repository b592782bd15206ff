"""What pyproject.toml admits is what `run.py` runs, and what the models and docs say."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import perceivers.arguments_perceivers
import sage_music.arguments_sage_music

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("audio", "plot", "train", "peft", "space")


def normalised(name: str) -> str:
    return name.replace("-", "_").lower()


def pins(name: str) -> dict[str, Version]:
    found = re.findall(r"^([\w.-]+)==(\S+)$", (HERE / name).resolve().read_text(), re.M)
    return {normalised(package): Version(version) for package, version in found}


def admitted() -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra])]
    found = {normalised(r.name): r for r in map(Requirement, lines)}
    return {name: requirement for name, requirement in found.items() if name != "sage_music"}


def test_both_ends_of_every_range_are_run():
    oldest, newest = pins("oldest.txt"), {**pins("../../constraints.txt"), **pins("newest.txt")}
    assert set(oldest) == set(admitted())
    for name, requirement in admitted().items():
        bounds = {spec.operator: Version(spec.version) for spec in requirement.specifier}
        if "==" in bounds:
            assert oldest[name] == newest[name] == bounds["=="]
            continue
        assert set(bounds) == {">=", "<"}, f"{name} has no two bounds"
        assert bounds[">="] == oldest[name], f"{name}: the oldest version that is run is {oldest[name]}"
        after = (newest[name].major, newest[name].minor + 1)
        assert bounds["<"].release[:2] == after, f"{name}: the newest version that is run is {newest[name]}"


def test_what_the_gate_installs_lies_inside():
    installed = pins("../../constraints.txt")
    for name, requirement in admitted().items():
        assert installed[name] in requirement.specifier, name


def test_the_models_say_the_same():
    for module in (sage_music.arguments_sage_music, perceivers.arguments_perceivers):
        assert set(module.TESTED_VERSIONS) <= set(PROJECT["dependencies"])
        assert {Requirement(line).name for line in module.TESTED_VERSIONS} == {"transformers", "torch"}


def test_the_table_in_the_docs_is_of_these_versions():
    rows = re.findall(r"^\| (\w+) \| `(.*?)` \| (.*) \|$", (ROOT / "docs" / "versions.md").read_text(), re.M)
    table = {normalised(name): (bounds, cells.split(" | ")) for name, bounds, cells in rows}
    middle, newest, oldest = pins("../../constraints.txt"), pins("newest.txt"), pins("oldest.txt")
    assert set(table) == set(admitted())
    for name, requirement in admitted().items():
        bounds, (alone, new, old) = table[name]
        assert Requirement(name + bounds).specifier == requirement.specifier
        assert (
            Version(new.split("+")[0]) == newest.get(name, middle[name]) and Version(old.split("+")[0]) == oldest[name]
        )
        assert Version(alone.split("+")[0]) == pins("transformers.txt").get(name, middle[name])


def test_a_set_that_is_none_is_named():
    run = subprocess.run([sys.executable, HERE / "run.py", "newer"], capture_output=True, text=True)
    assert run.returncode == 2 and "newer" in run.stderr


def test_what_is_run_is_there():
    from run import TESTS

    assert len(set(TESTS)) == len(TESTS) and all((ROOT / name).exists() for name in TESTS)
