"""The `midi-continuation` pipeline of SAGE-Music, which counts in bars."""

from typing import ClassVar

from sage_studio.generation.bars import Piece, Plan, plan_continuation
from sage_studio.generation.bars_batch import write_together

from .continuation import ContinuationPipeline


class SageMusicContinuationPipeline(ContinuationPipeline):
    """`midi-continuation` with SAGE-Music: the first bars of a MIDI file, and new ones after them.

    What `generation.bars.continue_score` does; see there, and `ContinuationPipeline` for inputs, batches and results.

    Options:
        prompt_bars, bars: bars of the prompt to hear (4), and bars to write (16).
        free: let the model bring in instruments, meters and tempos that the prompt does not have (false).
        programs: the only General MIDI programs to use (-1: drums), instead of the prompt's.
        temperature, top_p: sampling, the checkpoint's own by default; `temperature=0` takes the likeliest token.
        seed: same seed, same music; of several inputs the i-th gets `seed + i`, or the i-th of a list.
        time_limit: seconds of wall time for the generation of one batch; music that is not finished then ends with its
            last whole bar, and `remarks` says so. Waiting for other threads does not count.
        generate_options: more options of `generate()`, such as `{"use_mtp": True}`, but none that the piece has already
            (its length, its rules, beams); a batch is then written one by one.
        audio, sample_rate: render sound too (false), in so many samples a second (44,100).
    """

    model_type = "sage_music"
    options: ClassVar = {
        "prompt_bars": "count",
        "bars": "count",
        "free": "flag",
        "programs": "programs",
        "generate_options": "mapping",
    }
    nullable: ClassVar = ContinuationPipeline.nullable | {"programs", "generate_options"}

    def _plan(self, prompt, **options) -> Plan:
        return plan_continuation(self.model, self.tokenizer, prompt, **options)

    def _write(self, plans: list[Plan]) -> list[Piece]:
        return write_together(plans)

    def _prompt_end_s(self, music: Piece) -> float:
        return music.prompt_end_s


__all__ = ["SageMusicContinuationPipeline"]
