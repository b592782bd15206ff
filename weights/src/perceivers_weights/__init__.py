"""The weights of PerceiverS, non-commercial as the performances they were trained on: `perceivers.PRETRAINED`."""

from pathlib import Path

PRETRAINED = Path(__file__).parent / "perceivers-6m"
"""Folder of the checkpoint, for `from_pretrained`."""

__all__ = ["PRETRAINED"]
