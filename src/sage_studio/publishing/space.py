"""A complete Space repository: the app, its page, and what is installed as wheels, which are on no index.

    sage-music space out/space
    sage-music space out/space --model user/sage-music-6m --model user/perceivers-6m

Without `--model` the Space plays the bundled checkpoints that are installed, which the wheels carry. A Space's build
reads `requirements.txt` before the other files are there, so that the wheels cannot stand in it: the app unpacks them
when it starts, and `requirements.txt` has what they require.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from huggingface_hub import SpaceCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from sage_studio.families import FAMILIES

from .distribution import NAME, PACKAGES, license_text, requirements

SPACE = Path(__file__).resolve().parent / "space_app"
APP_FILES = ("*.py", "*.js", "*.css")
# What an export may hold; a folder with anything else is not replaced.
OWN_NAMES = {"README.md", "requirements.txt", "models.json", "LICENSE", "NOTICE.md", ".git"}
OWN_NAMES |= {".gitattributes", "__pycache__"}
# What a wheel has beside its packages; the rest of an installed `.dist-info` says how it was installed.
DIST_INFO = {"METADATA", "WHEEL", "entry_points.txt", "top_level.txt"}


class SpaceError(ValueError):
    """A Space that cannot be written as asked. `str()` says what to do."""


def export(output: str | os.PathLike, models: Sequence[str] = ()) -> Path:
    """Write the Space's repository into the folder `output`, replacing an older export. Returns the folder.

    Args:
        models: Hub names of the checkpoints that the Space is to offer, instead of the bundled ones that are installed.

    Raises:
        SpaceError: a name that is none on the Hub, a folder that holds something else or that this runs in, or a wheel
            that does not build.
    """
    output = Path(output)
    for name in models:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise SpaceError(f"{name}: not a name on the Hub ({' '.join(str(error).split())})") from error
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
        wheel = build_wheel(NAME, PACKAGES, folder)
        for pattern in APP_FILES:
            for path in SPACE.glob(pattern):
                shutil.copy(path, folder)
        card = SpaceCard.load(SPACE / "README.md")
        for family in FAMILIES.values():
            # Weights that are a distribution of their own, where they are installed, with their licence.
            if family.distribution is not None and family.pretrained.is_dir() and not models:
                build_wheel(family.distribution, family.pretrained.parents[1], folder)
                shutil.copy(family.pretrained / "NOTICE.md", folder)
                card.data.license, card.data.license_name = "other", f"apache-2.0-and-{family.license}"
                card.data.license_link = "NOTICE.md"
        (folder / "LICENSE").write_text(license_text(), encoding="utf-8")
        header = (SPACE / "requirements.txt").read_text(encoding="utf-8")
        (made,) = metadata.distributions(path=[str(wheel)])
        needed = requirements("audio", of=made)  # that extra: the SoundFont
        (folder / "requirements.txt").write_text(header + "".join(f"{line}\n" for line in needed))
        (folder / ".gitattributes").write_text("*.whl filter=lfs diff=lfs merge=lfs -text\n")
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
    return path.name in OWN_NAMES | known or bool(re.fullmatch(r"sage_music(_\w+)?-.*\.whl", path.name))


def build_wheel(name: str, packages: Path, folder: Path) -> Path:
    """The wheel of an installed distribution, written into `folder`: built from its checkout, or made of its files.

    Args:
        name: of the distribution.
        packages: the folder that its packages lie in: `src/` of a checkout, or site-packages.

    Raises:
        SpaceError: it cannot be made; the message says why.
    """
    if (packages.parent / "pyproject.toml").is_file():
        _build(packages.parent, folder)
    else:
        _pack(name, folder)
    (wheel,) = folder.glob(f"{name.replace('-', '_')}-[0-9]*.whl")
    return wheel


def _build(checkout: Path, folder: Path) -> None:
    """The wheel of a checkout, built offline with the setuptools that is installed."""
    with tempfile.TemporaryDirectory() as temporary:
        # A copy: setuptools writes into the folder it builds from, and packs what an older build left there.
        source = Path(temporary)
        shutil.copytree(checkout / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            if (checkout / name).is_file():
                shutil.copy(checkout / name, source)
        code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder.resolve())!r})"
        build = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    if build.returncode:
        last = (build.stderr.strip() or build.stdout.strip() or "no output").splitlines()[-1]
        raise SpaceError(f"the wheel does not build (pip install 'setuptools>=77'): {last}")


def _pack(name: str, folder: Path) -> None:
    """The wheel that a distribution was installed from, put together again from the files that its RECORD lists."""
    installed = metadata.distribution(name)
    files = {str(file): Path(installed.locate_file(file)) for file in installed.files or [] if _is_packed(file)}
    if not any(file.endswith(".py") for file in files):
        raise SpaceError(f"{name} is not installed from a wheel: run this from a checkout, or install it again.")
    tag = re.search("^Tag: (.*)$", installed.read_text("WHEEL"), re.M)[1]
    stem = f"{name.replace('-', '_')}-{installed.version}"
    record = []
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for file, path in files.items():
            wheel.write(path, file)
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
            record.append(f"{file},sha256={digest},{path.stat().st_size}\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "".join([*record, f"{stem}.dist-info/RECORD,,\n"]))


def _is_packed(file: metadata.PackagePath) -> bool:
    """Whether a file of an installed distribution was in its wheel."""
    if file.parts[0].endswith(".dist-info"):
        return file.name in DIST_INFO or "licenses" in file.parts
    return file.parts[0] != ".." and file.suffix != ".pyc"
