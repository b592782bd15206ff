"""Compound tokens, a note's attributes pooled into one vector, against one token for each attribute."""

from .as_kvhs import SCALES as ATTENTION_SCALES
from .as_kvhs import STUDY as ATTENTION
from .study import Arm, Claim, Scale, Study

# Speed as a user meets it: notes a second of whole continuations, the arms in turn.
WRITING = {
    "smoke": {"writing": {"prompts": 2, "bars": 2, "rounds": 1}},
    "cpu": {"writing": {"prompts": 3, "bars": 8, "rounds": 2}},
    "gpu": {"writing": {"prompts": 4, "bars": 16, "rounds": 5}},
}


def scale_of(name: str, seeds: int | None = None, **changes) -> Scale:
    """A scale of the study of heads, with the speed of whole continuations in place of its own."""
    scale = ATTENTION_SCALES[name]
    measures = {key: scale.measures[key] for key in ("likelihood", "continuation")}
    return Scale(seeds or scale.seeds, scale.options | changes, measures | WRITING[name])


STUDY = Study(
    name="pooling",
    title="Compound tokens (embedding pooling)",
    claim="SAGE-Music (arXiv 2510.00395): embedding pooling makes generation faster and degrades quality "
    "significantly (the sources at hand give no figure).",
    baseline="one token per attribute",
    arms={
        "one token per attribute": ATTENTION.arms["full heads"],
        "one token per attribute, AS-KVHS": ATTENTION.arms["AS-KVHS, head-routed"],
        "compound tokens": Arm(trainer="sage_studio.experiments.compound"),
    },
    claims=(
        Claim("compound tokens", "speed", "speed of generation", "faster (no figure)"),
        Claim("compound tokens", "nmsi", "NMSI", "significantly worse (no figure)"),
    ),
    findings={
        "cpu": [
            "Quality: the claim holds, plainly, in NMSI and in nats per note: parallel heads take the attributes of a "
            "note for independent of each other given the past, and they are not.",
            "Speed is that of whole continuations through this package: compound tokens make a quarter of the "
            "forward passes, with a stock Llama and its cache, and their sampling of eight fields runs in numpy; the "
            "flat arms follow the grammar token by token. It says what a user gets here, not what pooling could give.",
        ]
    },
    scales={name: scale_of(name) for name in ATTENTION_SCALES},
)
