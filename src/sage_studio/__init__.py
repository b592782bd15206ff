"""Around the models: music, checkpoints, generation, corpora, training, evaluation, publishing, the command line."""

from pathlib import Path

EXAMPLES = Path(__file__).with_name("examples")
"""Folder of the example prompts."""


def example(name: str) -> Path:
    """The MIDI file of an example prompt, such as `saints`.

    Raises:
        ValueError: there is none of this name.
    """
    path = EXAMPLES / f"{name}.mid"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in EXAMPLES.glob("*.mid")))
        raise ValueError(f"{name!r}: no such example; there are {known}.")
    return path


__all__ = ["EXAMPLES", "example"]
