"""Checkpoints of both families: loading them, adapters, what they were made from and under which licence.

from sage_studio.checkpoints import load
model, tokenizer = load("perceivers")
"""

from sage_studio.errors import CheckpointError

from .loading import load

__all__ = ["CheckpointError", "load"]
