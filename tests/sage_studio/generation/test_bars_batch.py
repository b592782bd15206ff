"""Several pieces in one batch: each is what it is alone, over several windows too."""

import copy

import pytest
from conftest import band

from sage_studio.checkpoints import load
from sage_studio.generation.bars import continue_score, generate_piece, plan_continuation, plan_piece
from sage_studio.generation.bars_batch import write_together


@pytest.fixture(scope="module")
def loaded():
    """The bundled checkpoint in float64, where rounding tips no choice, with a context of few bars."""
    model, tokenizer = load()
    model = copy.deepcopy(model).double()
    model.config.max_position_embeddings = 256
    return model, tokenizer


def test_pieces_longer_than_the_context_are_what_they_are_alone(loaded):
    """Rows of other lengths, bars, programs and seeds, which fill their contexts at other times."""
    rows = [
        (band(bars=2, seed=1), {"bars": 2, "seed": 4}),
        (band(bars=1, seed=2, qpm=90), {"bars": 1, "seed": 5, "programs": [0, -1]}),
        (band(bars=8, seed=3), {"bars": 1, "seed": 6, "free": True}),
    ]
    pieces = write_together([plan_continuation(*loaded, prompt, **options) for prompt, options in rows])
    for piece, (prompt, options) in zip(pieces, rows, strict=True):
        alone = continue_score(*loaded, prompt, **options)
        assert piece.ids == alone.ids and piece.remarks == alone.remarks
        assert (piece.bars, piece.notes) == (alone.bars, alone.notes) and piece.bars == options["bars"]
        assert piece.score.dumps_midi() == alone.score.dumps_midi()
    assert max(len(piece.ids) for piece in pieces) > 256


def test_the_likeliest_tokens(loaded):
    options = {"prompt_bars": 1, "bars": 1, "temperature": 0}
    prompts = [band(bars=1, seed=1), band(bars=2, seed=2)]
    pieces = write_together([plan_continuation(*loaded, prompt, **options) for prompt in prompts])
    assert [piece.ids for piece in pieces] == [continue_score(*loaded, prompt, **options).ids for prompt in prompts]
    assert write_together([]) == []


@pytest.mark.parametrize("of", ["the plan", "the checkpoint"])
def test_what_rows_cannot_have_is_written_one_by_one(loaded, of):
    model, bars = loaded[0], []
    options = {"progress": lambda done, notes: bars.append(done)} if of == "the plan" else {}
    model.generation_config.min_p = None if of == "the plan" else 0.2
    try:
        plans = [plan_piece(*loaded, bars=1, seed=seed, **options) for seed in (1, 2)]
        assert write_together(plans)[1].ids == generate_piece(*loaded, bars=1, seed=2).ids
    finally:
        model.generation_config.min_p = None
    assert bars.count(1) == (2 if of == "the plan" else 0)


def test_what_the_checkpoint_forbids_no_piece_has(loaded):
    """Beside what the prompt's programs forbid; and a time that it names does not cut a piece."""
    model, tokenizer = loaded
    config = model.generation_config
    loudness = {index for token, index in tokenizer.get_vocab().items() if token.startswith("Velocity_")}
    plan = plan_continuation(*loaded, band(bars=1, seed=1), prompt_bars=1, bars=1, seed=3)
    written = loudness.intersection(plan.write().ids[len(plan.ids) :])
    config.suppress_tokens, config.max_time = sorted(written), 1e-6
    try:
        alone, (together,) = plan.write(), write_together([plan])
    finally:
        config.suppress_tokens = config.max_time = None
    assert written and not written.intersection(alone.ids[len(plan.ids) :])
    assert alone.ids == together.ids and alone.bars == 1 and not alone.remarks


def test_a_time_limit_ends_all_rows_with_whole_bars(loaded):
    plans = [plan_continuation(*loaded, band(bars=1, seed=seed), bars=50, seed=0, time_limit=0.5) for seed in (1, 2)]
    for piece in write_together(plans):
        assert piece.bars < 50
        assert piece.remarks[-1] == f"the time limit of 0.5 s ended the piece after {piece.bars} of 50 bars"
        assert piece.notes == piece.score.note_num() - 17


def test_rows_of_a_batch_share_their_sampling(loaded):
    plans = [plan_piece(*loaded, bars=1, seed=0, temperature=temperature) for temperature in (0.9, 1.0)]
    with pytest.raises(ValueError, match="share one temperature"):
        write_together(plans)
