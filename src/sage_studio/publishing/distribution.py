"""The distribution sage-music as it is installed: what it requires, its version, its licence, and where it lies."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

NAME = "sage-music"
PACKAGES = Path(__file__).resolve().parents[2]  # src/ of a checkout, or site-packages


def version() -> str:
    """Its version."""
    return metadata.version(NAME)


def license_text() -> str:
    """The licence of its code.

    Raises:
        FileNotFoundError: it was installed without.
    """
    for found in metadata.distributions(name=NAME):  # of a checkout there may be two, the one of a build without it
        text = found.read_text("licenses/LICENSE")
        if text is not None:
            return text
    raise FileNotFoundError(f"the licence of {NAME} is not where it is installed: install it again.")


def requirements(*extras: str, of: metadata.Distribution | None = None) -> list[str]:
    """What it, or another distribution, requires with some of its extras, as lines of a requirements file."""
    lines = (of or metadata.distribution(NAME)).requires or []
    found = map(Requirement, lines)
    chosen = [one for one in found if not one.marker or any(one.marker.evaluate({"extra": name}) for name in extras)]
    # In the order of a person: >= before <.
    return [one.name + ",".join(sorted(map(str, one.specifier), reverse=True)) for one in chosen]
