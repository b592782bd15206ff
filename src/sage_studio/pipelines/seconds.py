"""The `midi-continuation` pipeline of PerceiverS, which counts in seconds."""

from typing import ClassVar

from sage_studio.generation.seconds import Performance, Plan, plan_continuation
from sage_studio.generation.seconds_batch import write_together

from .continuation import ContinuationPipeline


class PerceiverSContinuationPipeline(ContinuationPipeline):
    """`midi-continuation` with PerceiverS: the first seconds of a piano performance, and new ones after them.

    What `generation.seconds.continue_performance` does; see there, and `ContinuationPipeline` for inputs, batches and
    results. Of a batch, those are written at once whose prompts have equally many tokens, as several seeds for one
    prompt; others go one by one, because padding would change what PerceiverS hears.

    Options:
        prompt_seconds, seconds: seconds of the prompt to hear (20), and seconds to write (60); `seconds=None` lets
            `max_tokens` or the model end the piece.
        max_tokens: tokens to write at most.
        max_note_seconds: a note that has sounded for so long is ended (6); `None` leaves that to the model.
        temperature, top_p: sampling, the checkpoint's own by default; `temperature=0` takes the likeliest token.
        seed: same seed, same music; of several inputs the i-th gets `seed + i`, or the i-th of a list.
        time_limit: seconds of wall time for the generation of what is written at once; music that is not finished then
            ends where it is, and `remarks` says so. Waiting for other threads does not count.
        audio, sample_rate: render sound too (false), in so many samples a second (44,100).
    """

    model_type = "perceivers"
    options: ClassVar = {
        "prompt_seconds": "number",
        "seconds": "number",
        "max_tokens": "count",
        "max_note_seconds": "number",
    }
    nullable: ClassVar = ContinuationPipeline.nullable | {"seconds", "max_tokens", "max_note_seconds"}

    def _plan(self, prompt, **options) -> Plan:
        return plan_continuation(self.model, self.tokenizer, prompt, **options)

    def _write(self, plans: list[Plan]) -> list[Performance]:
        return write_together(plans)

    def _prompt_end_s(self, music: Performance) -> float:
        return music.prompt_seconds


__all__ = ["PerceiverSContinuationPipeline"]
