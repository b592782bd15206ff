"""Several performances in one batch: each is what it is alone, across refills of the latents too."""

import copy

import pytest
from conftest import tiny_perceivers
from test_seconds import SHAPE, piano

from perceivers import PerceiverSTokenizer
from sage_studio.generation.bars_batch import write_together as write_bars_together
from sage_studio.generation.seconds import continue_performance, plan_continuation
from sage_studio.generation.seconds_batch import write_together


@pytest.fixture(scope="module")
def loaded():
    """Random weights in float64, 32 latents: a second of music takes several windows."""
    return copy.deepcopy(tiny_perceivers(**SHAPE)).double(), PerceiverSTokenizer()


def test_performances_are_what_they_are_alone(loaded):
    """Three seeds of one prompt, which go together, and two other prompts, which do not."""
    prompts = [piano(seed=1)] * 2 + [piano(seed=2), piano(1.5, seed=3)] + [piano(seed=1)]
    options = {"prompt_s": 2, "music_s": 1.5, "max_note_s": 0.8}
    plans = [plan_continuation(*loaded, prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
    together = write_together(plans)
    for seed, (prompt, performance) in enumerate(zip(prompts, together, strict=True)):
        alone = continue_performance(*loaded, prompt, seed=seed, **options)
        assert performance.ids == alone.ids and performance.remarks == alone.remarks
        assert performance.score.dumps_midi() == alone.score.dumps_midi()
    assert together[0].elapsed_s == together[1].elapsed_s == together[4].elapsed_s != together[2].elapsed_s
    assert len({tuple(performance.ids) for performance in together}) == 5
    assert write_together([]) == []


def test_rows_that_the_model_ends_wait_for_the_others(loaded):
    model, tokenizer = loaded
    model.generation_config.sequence_bias = [[[388], 6.0]]
    options = {"prompt_s": 2, "music_s": None, "max_tokens": 200, "max_note_s": 0.1}
    try:
        together = write_together(
            [plan_continuation(model, tokenizer, piano(seed=1), seed=seed, **options) for seed in range(4)]
        )
        for seed, performance in enumerate(together):
            alone = continue_performance(model, tokenizer, piano(seed=1), seed=seed, **options)
            assert performance.ids == alone.ids and performance.remarks == alone.remarks
    finally:
        model.generation_config.sequence_bias = None
    assert len({performance.tokens for performance in together}) > 1


def test_a_time_that_the_checkpoint_names_cuts_no_performance(loaded):
    options = {"prompt_s": 2, "music_s": 1, "max_note_s": 0.8, "seed": 3}
    before = continue_performance(*loaded, piano(seed=1), **options)
    config = loaded[0].generation_config
    config.max_time = 1e-6
    try:
        alone = continue_performance(*loaded, piano(seed=1), **options)
        (together,) = write_together([plan_continuation(*loaded, piano(seed=1), **options)])
    finally:
        config.max_time = None
    assert before.ids == alone.ids == together.ids


def test_a_time_limit_ends_all_rows_where_they_are(loaded):
    plans = [plan_continuation(*loaded, piano(seed=1), music_s=5000, seed=seed, time_limit=0.4) for seed in (1, 2)]
    for performance in write_together(plans):
        assert 0 < performance.music_s < 5000
        assert performance.remarks[-1] == (f"the time limit of 0.4 s ended the piece after {performance.music_s:.2f} s")


def test_rows_of_a_batch_share_their_options(loaded):
    plans = [plan_continuation(*loaded, piano(), music_s=seconds) for seconds in (1, 2)]
    with pytest.raises(ValueError, match="share one music_s"):
        write_together(plans)


def test_a_cancelled_performance_is_apart_from_its_batch(loaded):
    plans = [plan_continuation(*loaded, piano(seed=1), prompt_s=2, music_s=1, seed=seed) for seed in (1, 2)]
    whole = plans[1].write()
    plans[0].cancel()
    ended, other = write_together(plans)
    assert (ended.music_s, ended.notes) == (0, 0) and ended.remarks[-1] == "cancelled before it began"
    assert other.ids == whole.ids and other.remarks == whole.remarks


def test_plans_of_the_other_family_are_refused(loaded):
    plans = [plan_continuation(*loaded, piano(seed=1), prompt_s=2, music_s=1)] * 2
    with pytest.raises(ValueError, match="planned by a BarsPlan"):
        write_bars_together(plans)
