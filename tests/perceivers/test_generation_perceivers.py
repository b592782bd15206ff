"""The decoding aids, driven by random scores: every sequence valid, every length met, no row ever without a token."""

from types import SimpleNamespace

import pytest
import torch

from perceivers.generation_perceivers import (
    DurationLogitsProcessor,
    NoteDurationLogitsProcessor,
    PerformanceGrammarLogitsProcessor,
)
from perceivers.tokenization_perceivers import PerceiverSTokenizer

PAD, BOS, END = 389, 390, 388


@pytest.fixture(scope="module")
def tokenizer() -> PerceiverSTokenizer:
    return PerceiverSTokenizer()


@pytest.fixture(scope="module")
def config(tokenizer) -> SimpleNamespace:
    return SimpleNamespace(**tokenizer.config_fields())


def sample(processors, ids: torch.Tensor, tokens: int, seed: int = 0, likes: dict | None = None) -> torch.Tensor:
    """`ids` (B, T) and `tokens` more, drawn from random scores plus `likes` (first id, end: bonus); PAD after the end.

    Fails where a row that has not ended is left without a token.
    """
    generator = torch.Generator().manual_seed(seed)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(tokens):
        scores = torch.randn(len(ids), 391, generator=generator)
        for (first, end), bonus in (likes or {}).items():
            scores[:, first:end] += bonus
        for processor in processors:
            scores = processor(ids, scores)
        assert (scores > -torch.inf).any(-1).all() and not scores.isnan().any()
        new = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        new[ended] = PAD
        ended |= new == END
        ids = torch.cat([ids, new[:, None]], dim=1)
        if ended.all():
            break
    return ids


def faults(ids: list[int]) -> list[str]:
    """What an event-by-event reading finds wrong."""
    found, since, velocity, previous, ended = [], {}, False, BOS, False
    for token in ids:
        if token in (PAD, BOS):
            continue
        if ended:
            found.append("after the end")
        if 356 <= previous < 388 and token >= 128:
            found.append("velocity of nothing")
        if token < 128:
            if token in since:
                found.append(f"{token} struck while it sounds")
            if not velocity:
                found.append("no velocity")
            since[token] = 0
        elif token < 256:
            if since.pop(token - 128, 0) == 0:
                found.append(f"{token - 128} ended in its own step, or silent")
        elif token < 356:
            since = {pitch: steps + token - 255 for pitch, steps in since.items()}
        elif token < 388:
            velocity = True
        else:
            ended = True
        previous = token
    return found + [f"{pitch} hangs" for pitch in since] + ["velocity of nothing"] * (356 <= previous < 388)


def allowed_by_the_rules(ids: list[int], max_length: int | None) -> set[int]:
    """The grammar once more, token by token, from a plain reading of `ids`."""
    last = {token: index for index, token in enumerate(ids)}
    shift = max([last.get(t, -1) for t in range(256, 356)])
    sounding = {p for p in range(128) if last.get(p, -1) > last.get(128 + p, -1)}
    fresh = {p for p in sounding if last[p] > shift}
    said = any(t in last for t in range(356, 388))
    after_velocity = 356 <= ids[-1] < 388
    moves = {}  # token: what must follow it before all is ended
    for p in range(128):
        if p not in sounding and said:
            moves[p] = len(sounding) + 2
        if p in sounding and p not in fresh and not after_velocity:
            moves[128 + p] = len(sounding) - 1 + bool(fresh)
    if not after_velocity:
        moves |= {t: len(sounding) for t in range(256, 356)}
        moves |= {t: len(sounding) + 3 for t in range(356, 388) if len(sounding) < 128}
        moves |= {END: 0} if not sounding else {}
    room = 10**9 if max_length is None else max_length - len(ids) - 1
    fitting = {token for token, need in moves.items() if need <= room}
    if fitting:
        return fitting
    closing = {128 + p for p in sounding - fresh}
    closing |= set(range(256, 356)) if fresh or not sounding else set()
    return closing | (set() if sounding else {END})


# ---- the grammar


@pytest.mark.parametrize("extra", [None, 0, 1, 2, 3, 5, 9, 40])
def test_the_grammar_is_the_plain_reading_of_any_ids(config, extra):
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        # Few pitches, so that keys are struck, ended and struck again; garbage as well as music.
        kinds = torch.tensor([60, 61, 62, 188, 189, 190, 256, 300, 370, 371, PAD, BOS])
        rows = kinds[torch.randint(0, len(kinds), (4, 1 + trial), generator=generator)]
        rows[:2, : trial // 2] = PAD
        max_length = None if extra is None else rows.shape[1] + extra
        allowed = PerformanceGrammarLogitsProcessor(config, max_length).allowed(rows)
        for row, mask in zip(rows.tolist(), allowed, strict=True):
            assert set(mask.nonzero()[:, 0].tolist()) == allowed_by_the_rules(row, max_length)


@pytest.mark.parametrize(
    "likes",
    [None, {(0, 128): 4.0}, {(356, 388): 4.0}, {(128, 256): 6.0, (0, 128): 2.0}, {(256, 356): 2.0, (388, 389): 6.0}],
    ids=["even", "chords", "velocities", "short notes", "short pieces"],
)
def test_sampled_pieces_are_valid_and_nothing_hangs(config, tokenizer, likes):
    grammar = PerformanceGrammarLogitsProcessor(config, max_length=600)
    ids = sample([grammar], torch.full((8, 1), BOS), 599, likes=likes)
    for row in ids.tolist():
        assert faults(row) == []
        notes = tokenizer.decode_midi(row).tracks[0].notes
        assert len(notes) == sum(token < 128 for token in row)
    assert ids.shape[1] == 600 or (ids == END).any(-1).all()


def test_decoding_keeps_each_onset_and_end(config, tokenizer):
    row = sample([PerformanceGrammarLogitsProcessor(config, 2000)], torch.tensor([[BOS]]), 1999, seed=1)[0].tolist()
    time, events = 0, []
    for token in row:
        time += (token - 255) * 10 if 256 <= token < 356 else 0
        events += [(time, token)] if token < 256 else []
    score = tokenizer.decode_midi(row)
    again = [(n.time, n.pitch) for n in score.tracks[0].notes] + [(n.end, 128 + n.pitch) for n in score.tracks[0].notes]
    assert sorted(again) == sorted(events)


def test_left_padding_changes_nothing(config):
    row = sample([PerformanceGrammarLogitsProcessor(config)], torch.tensor([[BOS]]), 80)
    padded = torch.cat([torch.full((1, 7), PAD), row], dim=1)
    free, padded_free = (PerformanceGrammarLogitsProcessor(config).allowed(x) for x in (row, padded))
    assert (free == padded_free).all()
    tight = PerformanceGrammarLogitsProcessor(config, row.shape[1] + 12).allowed(row)
    assert (PerformanceGrammarLogitsProcessor(config, padded.shape[1] + 12).allowed(padded) == tight).all()


def test_any_prefix_may_be_asked_in_any_order(config):
    """Assisted decoding asks for several prefixes of one sequence, beams for reordered rows: nothing is remembered."""
    processor = PerformanceGrammarLogitsProcessor(config, 200)
    rows = sample([processor], torch.full((3, 1), BOS), 150)
    answers = {length: processor.allowed(rows[:, :length]) for length in range(1, 151)}
    for length in torch.randperm(150, generator=torch.Generator().manual_seed(0))[:40].tolist():
        assert (processor.allowed(rows[:, : length + 1].flip(0)).flip(0) == answers.get(length + 1)).all()


def test_hopeless_prompts_end_what_they_can(config):
    """More keys sound than tokens are left: only moves that end notes, and no row without a token."""
    crowded = [BOS, 370, *range(20, 90)]
    for tail in ([], [256], [256, 370], [370]):
        prompt = torch.tensor([crowded + tail])
        ids = sample([PerformanceGrammarLogitsProcessor(config, prompt.shape[1] + 5)], prompt, 9)[0].tolist()
        new = ids[prompt.shape[1] :]
        assert all(128 <= token < 356 for token in new)
        assert sum(128 <= token < 256 for token in new) >= 8


def test_doubled_and_absurd_prompts_are_survived(config, tokenizer):
    for prompt in (
        [BOS, 60, 60, 188, 188],
        [370, 371, 60, 60],
        [BOS, 370, *range(128)],
        [BOS, 370, *range(128), 370],
        [END, END],
        [PAD, PAD, PAD],
        [BOS, BOS, 370],
    ):
        prompt = torch.tensor([prompt])
        ids = sample([PerformanceGrammarLogitsProcessor(config, 400)], prompt, 300)
        tokenizer.decode_midi(ids[0])
        sample([PerformanceGrammarLogitsProcessor(config)], prompt, 300)


def test_rows_that_have_ended_keep_a_token(config):
    ids = torch.tensor([[BOS, 370, 60, 256, 188, END, PAD, PAD], [PAD, PAD, BOS, 370, 60, 256, 188, 256]])
    for length in (None, 8, 9, 12):
        assert PerformanceGrammarLogitsProcessor(config, length).allowed(ids).any(-1).all()


def test_a_vocabulary_without_an_end_or_a_bos(tokenizer):
    fields = PerceiverSTokenizer(end_token=False, bos=False).config_fields()
    grammar = PerformanceGrammarLogitsProcessor(SimpleNamespace(**fields), max_length=300)
    ids = torch.tensor([[370]])
    generator = torch.Generator().manual_seed(0)
    while ids.shape[1] < 300:
        scores = grammar(ids, torch.randn(1, 389, generator=generator))
        assert scores[0, 388] == -torch.inf
        ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1, generator=generator)], dim=1)
    assert faults(ids[0].tolist()) == []


def test_without_ids_the_scores_stay(config):
    """Generation from inputs_embeds begins with no ids at all."""
    scores = torch.randn(2, 391)
    empty = torch.zeros(2, 0, dtype=torch.long)
    for processor in (PerformanceGrammarLogitsProcessor(config, 50), DurationLogitsProcessor(config, 3.0)):
        assert processor(empty, scores) is scores


def test_several_end_tokens(config):
    several = SimpleNamespace(**{**vars(config), "eos_token_id": [END, BOS]})
    ids = torch.tensor([[BOS, 370, 60, 300, 188]])
    assert PerformanceGrammarLogitsProcessor(several).allowed(ids)[0, [END, BOS]].all()
    assert not DurationLogitsProcessor(several, 9.0).allowed(ids)[0, [END, BOS]].any()


# ---- seconds


def seconds_of(ids: list[int]) -> float:
    return sum(token - 255 for token in ids if 256 <= token < 356) / 100


@pytest.mark.parametrize("seconds", [0.07, 1.0, 12.345, 30.0])
@pytest.mark.parametrize("likes", [None, {(256, 356): 4.0}, {(0, 128): 4.0, (388, 389): 20.0}])
def test_pieces_last_as_many_seconds_as_asked(config, seconds, likes):
    processors = [PerformanceGrammarLogitsProcessor(config), DurationLogitsProcessor(config, seconds)]
    ids = sample(processors, torch.full((4, 1), BOS), 6000, likes=likes)
    for row in ids.tolist():
        assert END in row and faults(row) == []
        assert -1e-9 <= seconds_of(row) - seconds < 0.0099


def test_after_its_time_a_piece_only_ends(config):
    """A prompt that is longer already, or was cut in the middle of what it announced."""
    processors = [PerformanceGrammarLogitsProcessor(config), DurationLogitsProcessor(config, 1.0)]
    chord = [BOS, 370, 60, 64, 67]
    for prompt, tokens in (
        ([*chord, 355, 355], 4),
        ([*chord, 355, 188, 60], 5),  # struck at the end itself: lasts 10 ms
        ([*chord, 355, 371], 7),  # the announced note, 10 ms, four note_offs, the end
        ([*chord, 355, 188, 192, 195], 1),
    ):
        for order in (processors, processors[::-1]):
            row = sample(order, torch.tensor([prompt]), 20)[0].tolist()
            assert row[-1] == END and faults(row) == []
            assert len(row) - len(prompt) <= tokens
            assert seconds_of(row) - seconds_of(prompt) <= 0.011


def test_both_limits_together_leave_a_token(config):
    """Seconds, tokens and any prompt: the grammar and the clock never contradict each other."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.tensor([60, 61, 62, 188, 189, 190, 256, 300, 355, 370, 371, PAD, BOS])
    for trial in range(60):
        prompt = kinds[torch.randint(0, len(kinds), (4, 1 + trial % 12), generator=generator)]
        processors = [
            PerformanceGrammarLogitsProcessor(config, prompt.shape[1] + trial),
            DurationLogitsProcessor(config, 0.01 + 0.2 * (trial % 9)),
        ]
        sample(processors, prompt, 40, seed=trial)


def test_a_held_note_is_ended_in_time(config):
    """C4 from 0 s, E4 from 0.5 s: after 1 s the first is overdue, whatever the scores; E4 only half a second later."""
    processor = NoteDurationLogitsProcessor(config, 1.0)
    ids = [BOS, 370, 60, 256 + 49, 64, 256 + 48]  # 0.99 s
    scores = torch.zeros(1, 391)
    assert not processor.overdue(torch.tensor([ids])).any()
    assert torch.equal(processor(torch.tensor([ids]), scores), scores)
    ids.append(256)  # 1 s
    assert processor.overdue(torch.tensor([ids])).nonzero().tolist() == [[0, 60]]
    assert processor(torch.tensor([ids]), scores).argmax() == 128 + 60
    ids += [128 + 60, 60, 256 + 49]  # struck again at 1 s; now 1.5 s
    assert processor.overdue(torch.tensor([ids])).nonzero().tolist() == [[0, 64]]
    with pytest.raises(ValueError, match="positive"):
        NoteDurationLogitsProcessor(config, 0)


def test_no_sampled_note_is_held_longer(config, tokenizer):
    """Beside the other two, in the order of generate(), with scores that hardly ever end a note."""
    processors = [
        PerformanceGrammarLogitsProcessor(config, 600),
        DurationLogitsProcessor(config, 20.0),
        NoteDurationLogitsProcessor(config, 2.0),
    ]
    for row in sample(processors, torch.full((4, 1), BOS), 599, seed=3, likes={(128, 256): -6.0}).tolist():
        durations = tokenizer.decode_midi(row).tracks[0].notes.numpy()["duration"]
        assert len(durations) and durations.max() <= 2000 + 1000  # one time shift of 1 s may pass before it is asked


def test_the_end_draws_no_crowd(config):
    """0.2 s before the end, the shift of 0.2 s has the probability of all that would reach or pass the end."""
    processor = DurationLogitsProcessor(config, 1.0)
    ids = torch.tensor([[BOS, 256 + 79]])  # 0.8 s
    scores = torch.randn(1, 391, generator=torch.Generator().manual_seed(0))
    before, after = scores.softmax(-1)[0], processor(ids, scores).softmax(-1)[0]
    torch.testing.assert_close(after[256 + 19] / after[60], before[256 + 19 : 356].sum() / before[60])
    torch.testing.assert_close(after[256 + 18] / after[60], before[256 + 18] / before[60])
    assert not after[256 + 20 : 356].any()


def test_before_its_time_a_piece_cannot_end(config):
    processor = DurationLogitsProcessor(config, 0.5)
    allowed = processor.allowed(torch.tensor([[BOS, 370, 60, 275, 188]]))[0]  # 0.2 s
    assert not allowed[END] and allowed[256:286].all() and not allowed[286:356].any()
    assert allowed[:256].all() and allowed[356:388].all()
    reached = processor.allowed(torch.tensor([[BOS, 370, 60, 275, 188, 285]]))[0]
    assert reached.nonzero()[:, 0].tolist() == [END]


# ---- what is refused


def test_a_config_of_another_kind_is_refused(config):
    for grammar in (None, {"types": []}):
        other = SimpleNamespace(**{**vars(config), "grammar": grammar})
        with pytest.raises(ValueError, match="config_fields"):
            PerformanceGrammarLogitsProcessor(other)
        with pytest.raises(ValueError, match="config_fields"):
            DurationLogitsProcessor(other, 3.0)


def test_impossible_durations_are_refused(config):
    for seconds in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            DurationLogitsProcessor(config, seconds)
    endless = SimpleNamespace(**{**vars(config), "eos_token_id": None})
    with pytest.raises(ValueError, match="token_end"):
        DurationLogitsProcessor(endless, 3.0)
