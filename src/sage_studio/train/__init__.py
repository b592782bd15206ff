"""Fine-tune a checkpoint of either family, or train a new model, with the stock `Trainer`.

    sage-music train --data my_midi --output runs/mine
    torchrun --nproc_per_node 2 -m sage_studio.train --data my_midi --output runs/mine

`arguments` has the options, `checks` what is refused at once, `parts` what each family brings, `command` the run,
`resuming` what makes a killed run go on, `callbacks` the samples on the way and the weights' origin. Quality is
reported in nats per note, which compares tokenizations fairly: a note costs what all tokens that spell it, its bar
lines and programs (or time shifts) cost together, divided by the number of notes.
"""

from .nats import sum_of_nats

__all__ = ["sum_of_nats"]
