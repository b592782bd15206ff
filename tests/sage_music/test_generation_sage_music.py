"""Plain `generate()`: every mode gives what the uncached model gives, and only music that decodes whole."""

import functools
import shutil

import pytest
import torch
from conftest import band, tiny_model

from sage_music import (
    BarCountCriteria,
    MidiGrammarLogitsProcessor,
    MinBarsLogitsProcessor,
    NoDoubledNotesLogitsProcessor,
    RunningState,
)

GREEDY = {"do_sample": False, "max_new_tokens": 40}


def padded(prompts):
    """Two prompts of different lengths, the second padded on the left."""
    ids, mask = prompts[:, :60].clone(), torch.ones(2, 60, dtype=torch.long)
    ids[1, 20:] = prompts[1, :40]
    ids[1, :20], mask[1, :20] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {"do_sample": True, "max_new_tokens": 40, "temperature": 1.3, "top_p": 0.9},
        {**GREEDY, "num_beams": 4},
        {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 20},
        {"do_sample": False, "max_new_tokens": 24, "num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    ],
    ids=["greedy", "sampling", "beams", "several", "beams-several"],
)
def test_a_padded_batch_gives_what_the_uncached_model_gives(model, prompts, options):
    outputs = []
    for use_cache in (False, True):
        torch.manual_seed(5)
        outputs.append(model.generate(**padded(prompts), **options, use_cache=use_cache))
    assert torch.equal(*outputs)


def test_padding_does_not_change_the_music(model, prompts):
    alone = model.generate(prompts[1:, :40], **GREEDY)
    together = model.generate(**padded(prompts), **GREEDY)
    music, rest = together[1, 20:].split([alone.shape[1], together.shape[1] - 20 - alone.shape[1]])
    assert torch.equal(music, alone[0])
    assert not rest.any()  # the other row went on


@pytest.mark.parametrize("chunk", [7, 32])
def test_chunked_prefill(model, prompts, chunk):
    expected = model.generate(prompts, **GREEDY)
    assert torch.equal(model.generate(prompts, **GREEDY, prefill_chunk_size=chunk), expected)


def test_static_cache(model, prompts):
    expected = model.generate(**padded(prompts), **GREEDY)
    assert torch.equal(model.generate(**padded(prompts), **GREEDY, cache_implementation="static"), expected)


@pytest.mark.parametrize("routing", ["head", "token"])
def test_compiled_decoding_with_a_static_cache(tokenizer, prompts, routing):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    model = tiny_model(tokenizer, routing).double()
    expected = model.generate(**padded(prompts), **GREEDY)
    torch._dynamo.reset()
    whole, step = model.forward, torch.compile(model.forward, fullgraph=True)
    # As `generate()` does on an accelerator: the prefill runs as it is, every later step compiled.
    model.forward = functools.wraps(whole)(
        lambda **inputs: (whole if inputs["input_ids"].shape[1] > 1 else step)(**inputs)
    )
    with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=4, fail_on_recompile_limit_hit=True):
        got = model.generate(**padded(prompts), **GREEDY, cache_implementation="static")
    assert torch.equal(got, expected)


def test_prompt_lookup(model, tokenizer):
    ids = torch.tensor([tokenizer.midi_to_ids(band(bars=2)) * 2])
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=5), expected)


@pytest.mark.parametrize("seed", [0, 1], ids=["same", "other"])
def test_an_assistant_model_changes_nothing(model, tokenizer, prompts, seed):
    assistant = tiny_model(tokenizer, "head", seed=seed)
    expected = model.generate(prompts[:1], **GREEDY)
    assert torch.equal(model.generate(prompts[:1], **GREEDY, assistant_model=assistant), expected)


def test_generation_goes_on_from_a_cache(model, prompts):
    expected = model.generate(prompts, **GREEDY)
    first = model.generate(prompts, do_sample=False, max_new_tokens=15, return_dict_in_generate=True)
    rest = model.generate(first.sequences, do_sample=False, max_new_tokens=25, past_key_values=first.past_key_values)
    assert torch.equal(rest, expected)


def test_generation_from_embeddings(model, prompts):
    """`inputs_embeds` and `attribute_ids` instead of the prompt's ids; the grammar, which reads ids, is off in both."""
    codes = None if model.model.token_codes is None else model.model.token_codes[prompts]
    model.generation_config.midi_grammar = False
    try:
        expected = model.generate(prompts, **GREEDY)[:, prompts.shape[1] :]
        embeds = model.model.embed_tokens(prompts)
        options = {} if codes is None else {"attribute_ids": codes}
        assert torch.equal(model.generate(inputs_embeds=embeds, **options, **GREEDY), expected)
    finally:
        model.generation_config.midi_grammar = True


def note_fields(tokens):
    """Every note of base tokens as (bar, position, program, pitch, velocity), read independently of MidiTok."""
    notes, bar, position, program = [], -1, 0, None
    for token in tokens:
        kind, value = token.split("_")
        if kind == "Bar":
            bar += 1
        elif kind == "Position":
            position = int(value)
        elif kind == "Program":
            program = int(value)
        elif kind in ("Pitch", "PitchDrum"):
            notes.append((bar, position, program, int(value)))
        elif kind == "Velocity":
            notes[-1] += (int(value),)
    return sorted(notes)


def assert_nothing_dropped(tokenizer, ids):
    tokens = tokenizer.base_tokens(ids)
    # A sequence cut off inside a note has lost no complete note.
    while tokens and tokens[-1].split("_")[0] in ("Program", "Pitch", "PitchDrum", "Velocity"):
        tokens.pop()
    expected = note_fields(tokens)
    score = tokenizer.decode_midi(tokenizer.convert_tokens_to_ids(tokens))
    assert score.note_num() == len(expected)
    assert len(score.tempos) == sum(token.startswith("Tempo") for token in tokens)
    lines, found = [0], []
    meters = [(m.time, m.numerator, m.denominator) for m in score.time_signatures]
    for _ in range(sum(token.startswith("Bar") for token in tokens)):
        _, numerator, denominator = [m for m in meters if m[0] <= lines[-1]][-1]
        lines.append(lines[-1] + score.ticks_per_quarter * 4 * numerator // denominator)
    for track in score.tracks:
        for note in track.notes:
            bar = max(i for i, line in enumerate(lines) if line <= note.time)
            denominator = [m for m in meters if m[0] <= lines[bar]][-1][2]
            per_position = score.ticks_per_quarter * 4 // denominator // tokenizer.miditok.config.max_num_pos_per_beat
            position, rest = divmod(note.time - lines[bar], per_position)
            assert rest == 0
            found.append((bar, position, -1 if track.is_drum else track.program, note.pitch, note.velocity))
    assert sorted(found) == expected


@pytest.mark.parametrize("kind", ["plain", "bpe", "on-change"])
def test_a_random_model_at_high_temperature_writes_only_valid_music(tokenizer, bpe_tokenizer, kind):
    from sage_music import SageMusicTokenizer

    chosen = {"plain": tokenizer, "bpe": bpe_tokenizer, "on-change": SageMusicTokenizer()}[kind]
    model = tiny_model(chosen, "head", num_hidden_layers=1)
    torch.manual_seed(0)
    start = torch.full((250, 1), chosen.bos_token_id)
    notes = 0
    for _ in range(4):
        for row in model.generate(start, do_sample=True, temperature=1.5, max_new_tokens=120, top_k=0).tolist():
            assert_nothing_dropped(chosen, row)
            notes += chosen.decode_midi(row).note_num()
    assert notes > 1000  # valid, and not by being empty


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=["beams", "lookup"])
def test_grammar_holds_in_other_modes(tokenizer, options):
    model = tiny_model(tokenizer, "token", num_hidden_layers=1)
    start = torch.tensor([tokenizer.midi_to_ids(band(bars=1))])
    for row in model.generate(start, do_sample=False, max_new_tokens=100, **options).tolist():
        assert_nothing_dropped(tokenizer, row)


def test_without_the_grammar_a_random_model_is_not_valid(tokenizer):
    """The guarantee comes from the grammar, and it can be switched off."""
    model = tiny_model(tokenizer, "head", num_hidden_layers=1)
    model.generation_config.midi_grammar = False
    torch.manual_seed(0)
    row = model.generate(torch.tensor([[1]]), do_sample=True, temperature=1.5, max_new_tokens=120, top_k=0)[0].tolist()
    with pytest.raises((AssertionError, IndexError, ValueError, TypeError)):
        assert_nothing_dropped(tokenizer, row)


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_the_grammar_allows_all_real_music(tokenizer, bpe_tokenizer, kind):
    chosen = {"plain": tokenizer, "bpe": bpe_tokenizer}[kind]
    grammar = MidiGrammarLogitsProcessor(tiny_model(chosen).config)
    ids = torch.tensor([*chosen.midi_to_ids(band(bars=3, seed=7)), chosen.eos_token_id])[None]
    for step in range(1, ids.shape[1]):
        assert grammar.allowed(ids[:, :step])[0, ids[0, step]], chosen.convert_ids_to_tokens(
            ids[0, : step + 1].tolist()
        )


def test_the_grammar_keeps_positions_in_the_bar(tokenizer):
    grammar = MidiGrammarLogitsProcessor(tiny_model(tokenizer).config)
    tokens = ["BOS_None", "Bar_None", "TimeSig_2/4", "Position_5", "Program_-1"]
    vocabulary = tokenizer.get_vocab()
    ids = torch.tensor([[vocabulary[token] for token in tokens]])
    allowed = {t for t, i in vocabulary.items() if grammar.allowed(ids)[0, i]}
    assert {t.split("_")[0] for t in allowed} == {"PitchDrum"}
    ids = torch.cat(
        [ids, torch.tensor([[vocabulary[t] for t in ("PitchDrum_36", "Velocity_63", "Duration_0.6.12")]])], 1
    )
    allowed = {t for t, i in vocabulary.items() if grammar.allowed(ids)[0, i]}
    positions = sorted(int(t.split("_")[1]) for t in allowed if t.startswith("Position"))
    assert positions == list(range(6, 24))  # two beats of twelve


def test_bar_count_stops_each_row_and_min_bars_holds_off_the_end(tokenizer):
    model = tiny_model(tokenizer, "head", num_hidden_layers=1, initializer_range=0.05)
    stop, hold = BarCountCriteria(model.config, 3), MinBarsLogitsProcessor(model.config, 3)
    bar = tokenizer.get_vocab()["Bar_None"]

    def eager_for_bars(input_ids, scores):  # a random model would take its time
        scores[:, bar] += 6
        return scores

    torch.manual_seed(0)
    rows = model.generate(
        torch.full((8, 1), 1),
        do_sample=True,
        max_new_tokens=400,
        stopping_criteria=[stop],
        logits_processor=[hold, eager_for_bars],
    )
    for row in rows.tolist():
        row = [token for token in row if token != 0]
        assert stop.count(torch.tensor([row])).item() == 4
        assert row[-1] == tokenizer.get_vocab()["Bar_None"]


@pytest.mark.parametrize(
    ("text", "doubled"),
    [
        ("Position_0 Program_0 Pitch_60 Velocity_79 Duration_1.0.12 Pitch_64 Velocity_79 Duration_1.0.12", {60, 64}),
        ("Position_0 Program_0 Pitch_60 Velocity_79 Duration_1.0.12 Program_5", set()),
        (
            "Program_0 Pitch_60 Velocity_79 Duration_1.0.12 Program_5 Pitch_61 Velocity_79 Duration_1.0.12 Program_0",
            {60},
        ),
        ("Program_0 Position_0 Pitch_60 Velocity_79 Duration_1.0.12 Position_6", set()),
        ("Program_0 Position_0 Pitch_60 Velocity_79 Duration_1.0.12 Program_5 Pitch_62 Velocity_79 Program_0", {60}),
        ("Program_5 Position_0 Pitch_60 Velocity_79 Duration_1.0.12 Program_0 Pitch_62", {62}),
    ],
)
def test_a_pitch_that_sounds_is_not_struck_again(tokenizer, text, doubled):
    processor = NoDoubledNotesLogitsProcessor(tiny_model(tokenizer).config)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    scores = processor(ids, torch.zeros(1, tokenizer.vocab_size))
    forbidden = tokenizer.convert_ids_to_tokens(torch.isinf(scores[0]).nonzero().flatten().tolist())
    assert {int(token.split("_")[1]) for token in forbidden} == doubled


NOTE = "Velocity_79 Duration_1.0.12"
ALL = " ".join(f"PitchDrum_{pitch} {NOTE}" for pitch in range(128))
FIRST, REST = (" ".join(f"PitchDrum_{pitch} {NOTE}" for pitch in some) for some in (range(100), range(100, 128)))


@pytest.mark.parametrize(
    ("text", "full"),
    [
        (f"Position_0 Program_-1 {ALL}", True),
        (f"Position_0 Program_-1 {FIRST} Program_-1 {REST}", True),
        (f"Program_-1 Position_0 {ALL}", True),
        (f"Program_-1 Position_0 {FIRST} Program_0 Pitch_60 {NOTE} Program_-1 {REST} Program_0 Pitch_61 {NOTE}", True),
        (f"Position_0 Program_-1 {FIRST}", False),
        (f"Position_0 Program_-1 {ALL} Position_6", False),
        (f"Program_0 Position_0 Pitch_60 {NOTE} Program_-1 {FIRST}", False),
    ],
)
def test_a_program_that_has_struck_every_pitch_is_not_named_again(tokenizer, text, full):
    """After its token no pitch would be left, and nothing could be sampled."""
    processor = NoDoubledNotesLogitsProcessor(tiny_model(tokenizer).config)
    scores = processor(torch.tensor([tokenizer(text)["input_ids"]]), torch.zeros(1, tokenizer.vocab_size))
    assert torch.isinf(scores[0, tokenizer.convert_tokens_to_ids("Program_-1")]) == full
    assert not torch.isinf(scores[0, tokenizer.convert_tokens_to_ids("Program_0")])


def test_a_grammar_for_another_vocabulary_is_refused(tokenizer):
    config = tiny_model(tokenizer).config
    config.grammar = {**config.grammar, "first_type": [0, 1]}
    with pytest.raises(ValueError, match="vocabulary"):
        MidiGrammarLogitsProcessor(config)


def test_the_grammar_remembers_only_what_still_holds(tokenizer, bpe_tokenizer):
    """Ids that grow, fall back, change their past, swap rows: the answer is that of a processor that saw nothing."""
    for chosen in (tokenizer, bpe_tokenizer):
        config = tiny_model(chosen).config
        grammar = MidiGrammarLogitsProcessor(config)
        rows = torch.tensor([chosen.midi_to_ids(band(seed=seed))[:90] for seed in (1, 2, 3)])
        rng = torch.Generator().manual_seed(0)
        length = 5
        for _ in range(150):
            length = min(max(length + int(torch.randint(-6, 9, (), generator=rng)), 1), rows.shape[1])
            if torch.rand((), generator=rng) < 0.1:
                rows = rows[torch.randperm(3, generator=rng)]
            if torch.rand((), generator=rng) < 0.1:  # in place, as beam search does
                rows[:, int(torch.randint(length, (), generator=rng))] = int(rows[0, 30])
            fresh = MidiGrammarLogitsProcessor(config)
            expected = fresh._follow(*fresh._read(rows[:, :length]))
            assert torch.equal(grammar.allowed(rows[:, :length]), expected)


def last_program(tokens):
    return next((token for token in reversed(tokens) if "Program" in token), None)


@pytest.mark.parametrize("kind", ["plain", "bpe"])
def test_a_shared_state_answers_as_rows_read_from_their_beginning_do(tokenizer, bpe_tokenizer, kind):
    """As long as rows grow, are cut, change places as beams do, or become other rows."""
    chosen = {"plain": tokenizer, "bpe": bpe_tokenizer}[kind]
    config = tiny_model(chosen).config
    running = RunningState(config)
    shared, alone = NoDoubledNotesLogitsProcessor(config, running), NoDoubledNotesLogitsProcessor
    counter = BarCountCriteria(config, 2, running)
    rows = torch.tensor([chosen.midi_to_ids(band(bars=6, seed=seed))[:120] for seed in (1, 2, 3)])
    names = chosen.convert_ids_to_tokens(range(chosen.vocab_size))
    rng = torch.Generator().manual_seed(0)
    length = 5
    for step in range(120):
        length = min(max(length + int(torch.randint(-6, 9, (), generator=rng)), 0), rows.shape[1])
        if step % 10 == 3:
            rows = rows[torch.randint(3, (3,), generator=rng)]
        if step % 30 == 29:
            rows = torch.randint(5, chosen.vocab_size, rows.shape, generator=rng)
        ids = rows[:, :length].clone()
        texts = [[names[token] for token in row] for row in ids.tolist()]
        assert counter.count(ids).tolist() == [sum(text.count("Bar") for text in row) for row in texts]
        assert [None if state.program is None else names[state.program] for state in running.rows(ids)] == [
            last_program(row) for row in texts
        ]
        scores = torch.zeros(3, chosen.vocab_size)
        assert torch.equal(shared(ids, scores), alone(config)(ids, scores))


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}, {"use_mtp": True}])
def test_processors_that_share_a_state_write_the_same(tokenizer, options):
    model = tiny_model(tokenizer, num_hidden_layers=1, num_mtp_layers=3)
    start = torch.tensor([tokenizer.midi_to_ids(band(bars=1))])
    written = []
    for running in (None, RunningState(model.config)):
        torch.manual_seed(0)
        processors = [
            MinBarsLogitsProcessor(model.config, 3, running),
            NoDoubledNotesLogitsProcessor(model.config, running),
        ]
        stop = [BarCountCriteria(model.config, 3, running)]
        rules = {"logits_processor": processors, "stopping_criteria": stop}
        written.append(model.generate(start, max_new_tokens=150, **rules, **options))
    assert torch.equal(*written)
    assert running.rows(written[0])[0].bars == BarCountCriteria(model.config, 0).count(written[0])
