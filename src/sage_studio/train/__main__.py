"""`python -m sage_studio.train`: what torchrun and accelerate launch start, once a process."""

import os
import sys

import torch

from .command import main


def run() -> None:
    code = main()
    if torch.distributed.is_initialized():
        # All is written. Gloo's threads abort a process now and then as its interpreter ends ("terminate called without
        # an active exception"), which torchrun would take for a failed run.
        if code == 0:
            torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
