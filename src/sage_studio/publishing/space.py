"""A complete Space repository: the app, its page, examples, and this package as a wheel, which is on no index.

    python -m sage_studio.publishing.space out/space
    python -m sage_studio.publishing.space out/space --model user/sage-music-6m --model user/perceivers-6m

Without `--model` the Space plays the two bundled checkpoints, which the wheel carries. A Space's build reads
`requirements.txt` before the other files are there, so that the wheel cannot stand in it: the app unpacks the wheel
when it starts, and `requirements.txt` has what the wheel itself requires.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

from huggingface_hub import SpaceCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

ROOT = Path(__file__).resolve().parents[3]
SPACE = Path(__file__).resolve().parent / "space_app"
APP_FILES = ("*.py", "*.js", "*.css")
# What an export may hold; a folder with anything else is not replaced.
OWN_NAMES = {"README.md", "requirements.txt", "models.json", "examples", "LICENSE", "NOTICE.md", ".git"}
OWN_NAMES |= {".gitattributes", "__pycache__"}
EXTRAS = ("audio",)  # of the package: the SoundFont


class SpaceError(ValueError):
    """A Space that cannot be written as asked. `str()` says what to do."""


def export(output: str | os.PathLike, models: Sequence[str] = ()) -> Path:
    """Write the Space's repository into the folder `output`, replacing an older export. Returns the folder.

    Args:
        models: Hub names of the checkpoints that the Space is to offer, instead of the bundled ones.

    Raises:
        SpaceError: a name that is none on the Hub, a folder that holds something else or that this runs in, or a wheel
            that does not build.
    """
    output = Path(output)
    for name in models:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise SpaceError(f"{name}: not a name on the Hub ({error})") from error
        if "/" not in name:
            raise SpaceError(f"{name}: not a name on the Hub: write user/name.")
    foreign = [path.name for path in output.iterdir() if not _is_ours(path)] if output.is_dir() else []
    if output.is_file() or foreign:
        what = f"holds {foreign[0]}, which no Space of ours has" if foreign else "is a file"
        raise SpaceError(f"{output}: {what}. Choose another folder, or empty this one.")
    if Path.cwd().is_relative_to(output.resolve()):
        raise SpaceError(f"{output}: the folder that this runs in: run it from another one, for this is replaced.")

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "space"
        folder.mkdir()
        wheel = build_wheel(folder)
        for pattern in APP_FILES:
            for path in SPACE.glob(pattern):
                shutil.copy(path, folder)
        (folder / "examples").mkdir()
        for path in (ROOT / "examples").glob("*.mid"):
            shutil.copy(path, folder / "examples")
        # The second: the licence of the weights of PerceiverS.
        for path in (ROOT / "LICENSE", *(ROOT / "src" / "perceivers" / "pretrained").glob("*/NOTICE.md")):
            shutil.copy(path, folder)
        header = (SPACE / "requirements.txt").read_text(encoding="utf-8")
        (folder / "requirements.txt").write_text(header + "".join(f"{line}\n" for line in requirements(wheel)))
        (folder / ".gitattributes").write_text("*.whl filter=lfs diff=lfs merge=lfs -text\n")
        card = SpaceCard.load(SPACE / "README.md")
        if models:
            (folder / "models.json").write_text(json.dumps(list(models), indent=2) + "\n")
            card.data.models = list(models)
        card.save(folder / "README.md")
        if (output / ".git").exists():  # a clone of the Space stays one
            shutil.move(output / ".git", folder / ".git")
        shutil.rmtree(output, ignore_errors=True)
        folder.rename(output)
    return output


def _is_ours(path: Path) -> bool:
    known = {own.name for pattern in APP_FILES for own in SPACE.glob(pattern)}
    return path.name in OWN_NAMES | known or bool(re.fullmatch(r"sage_music-.*\.whl", path.name))


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, written into `folder`, built offline with the setuptools that is installed.

    Raises:
        SpaceError: setuptools is missing or too old, or the build failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as temporary:
        # A copy: setuptools writes into the folder it builds from, and packs what an older build left there.
        source = Path(temporary)
        shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder.resolve())!r})"
        build = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    if build.returncode:
        last = (build.stderr.strip() or build.stdout.strip() or "no output").splitlines()[-1]
        raise SpaceError(f"the wheel does not build (pip install 'setuptools>=77'): {last}")
    (wheel,) = folder.glob("sage_music-*.whl")
    return wheel


def requirements(wheel: Path) -> list[str]:
    """What a wheel and its extras `EXTRAS` require, as lines of a requirements file."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = Parser().parsestr(archive.read(metadata).decode("utf-8")).get_all("Requires-Dist") or []
    chosen = []
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        extra = re.search(r"extra == [\"'](\w+)[\"']", marker)
        if extra is None or extra[1] in EXTRAS:
            chosen.append(requirement)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sage_studio.publishing.space", description=__doc__.split("\n")[0])
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="USER/NAME",
        help="a checkpoint on the Hub to offer instead of the bundled ones; may be given again",
    )
    options = parser.parse_args(argv)
    try:
        folder = export(options.output, options.model)
    except (ValueError, OSError) as error:
        print(f"export_space: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    print(f"wrote {folder} ({len(sizes)} files, {sum(sizes) / 1e6:.1f} MB)")
    print(f"run it: pip install gradio -r {folder}/requirements.txt && python {folder}/app.py")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
