"""Compound tokens: nothing is lost on the way, the loss is a probability, and what is generated is music."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import DATA, band, needs_data, notes_of
from symusic import Score, TimeSignature
from transformers import Trainer, TrainingArguments

from sage_music import MidiGrammarLogitsProcessor, NoDoubledNotesLogitsProcessor, SageMusicConfig, SageMusicTokenizer
from sage_music.augmentation import SageMusicAugmentation
from sage_music.data import BlockDataset, WindowDataset
from sage_studio.corpus import encode_file
from sage_studio.experiments.compound import (
    BAR,
    BOS,
    EMPTY_BAR,
    EOS,
    FIELDS,
    CompoundBlockDataset,
    CompoundMusicConfig,
    CompoundMusicForCausalLM,
    CompoundTokens,
    CompoundWindowDataset,
    collate,
    compound_parts,
)
from sage_studio.experiments.compound_generation import CompoundWriter, continue_score_compound
from sage_studio.families import SAGE_MUSIC
from sage_studio.train.arguments import parse
from sage_studio.train.command import main

N = -100
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module", params=[True, False], ids=["program on change", "program on every note"])
def tokens(request) -> CompoundTokens:
    return CompoundTokens(SageMusicTokenizer(program_changes=request.param))


@pytest.fixture(scope="module")
def plain() -> CompoundTokens:
    return CompoundTokens(SageMusicTokenizer())


def build(tokens: CompoundTokens, seed: int = 0, **options) -> CompoundMusicForCausalLM:
    """Large weights, so that a slip changes what is written."""
    torch.manual_seed(seed)
    config = CompoundMusicConfig(**tokens.config_fields(), **{**SHAPE, "initializer_range": 0.3, **options})
    return CompoundMusicForCausalLM(config).eval()


def pieces_of(tokenizer: SageMusicTokenizer, seeds=(0, 1, 2), bars: int = 8) -> list[np.ndarray]:
    return [
        np.array([*tokenizer.midi_to_ids(band(bars=bars, seed=seed)), tokenizer.eos_token_id], np.uint16)
        for seed in seeds
    ]


def test_a_short_piece_by_hand(plain):
    text = (
        "BOS_None Bar_None TimeSig_4/4 Position_0 Tempo_120.0 Program_0 Pitch_60 Velocity_67 Duration_1.0.12 "
        "Pitch_64 Velocity_67 Duration_1.0.12 Position_12 Program_-1 PitchDrum_36 Velocity_3 Duration_0.1.12 "
        "Bar_None TimeSig_3/4 Bar_None TimeSig_4/4 Position_3 Tempo_60.0 EOS_None"
    )
    ids = plain.tokenizer.convert_tokens_to_ids(text.split())
    compounds = plain.compounds([*ids, plain.tokenizer.pad_token_id])
    # Values count from 1 within a field, in the vocabulary's order: meter 3/4 is the third, Position_0 the first,
    # Pitch_60 the 61st, PitchDrum_36 the 37th after 128 pitches, Velocity_67 the 17th (3, 7, 11 ...), Program_-1 the
    # first, Duration_1.0.12 the twelfth; BOS, EOS, Bar, empty bar are 1 to 4. Programs and tempos: looked up.
    order = [t for t in plain.tokenizer.get_vocab() if t.startswith("Program")]
    piano, drums = order.index("Program_0") + 1, order.index("Program_-1") + 1
    slow, fast = (int(plain.value_of[plain.tokenizer.convert_tokens_to_ids(t)]) for t in ("Tempo_60.0", "Tempo_120.0"))
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [3, 4, 1, fast, piano, 61, 17, 12],
        [0, 0, 0, 0, 0, 65, 17, 12],
        [0, 0, 13, 0, drums, 165, 1, 1],
        [4, 3, 0, 0, 0, 0, 0, 0],
        [3, 4, 4, slow, 0, 0, 0, 0],
        [2, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert compounds.tolist() == expected
    assert plain.ids(compounds) == ids
    assert plain.labels(compounds).tolist() == [
        [1, N, N, N, N, N, N, N],
        [3, 4, 1, fast, piano, 61, 17, 12],
        [0, N, 0, N, 0, 65, 17, 12],  # no bar line, so no meter; no position, so no tempo
        [0, N, 13, 0, drums, 165, 1, 1],
        [4, 3, N, N, N, N, N, N],  # the bar is empty: nothing else can be said
        [3, 4, 4, slow, 0, 0, N, N],  # a tempo without a note: neither program nor pitch
        [2, N, N, N, N, N, N, N],
    ]


def test_any_ids_come_back(tokens):
    ids = tokens.tokenizer.midi_to_ids(band(seed=3))
    for start, stop in ((0, len(ids)), (7, 40), (8, 9), (5, 5)):  # from the middle of a note, too
        assert tokens.ids(tokens.compounds(ids[start:stop])) == ids[start:stop]
    compounds = tokens.compounds(ids)
    assert len(compounds) - 1 == band(seed=3).note_num()  # BOS, then one row a note
    assert notes_of(tokens.tokenizer.decode_midi(tokens.ids(compounds))) == notes_of(band(seed=3))


@needs_data()
@pytest.mark.data
@pytest.mark.filterwarnings("ignore:no token for the meter")
def test_real_pieces_come_back_and_every_stated_value_is_paid_for(plain):
    files = [
        path for kind in ("multitrack", "piano", "drums") for path in sorted((DATA / kind / "test").glob("*"))[::30]
    ]
    records = [encode_file(path, plain.tokenizer) for path in files]
    pieces = [record["input_ids"] for record in records if not record["error"]]
    assert len(pieces) > 15
    for ids in pieces:
        compounds = plain.compounds(ids)
        assert plain.ids(compounds) == ids.tolist()
        assert (plain.labels(compounds)[compounds > 0] > 0).all()
        assert np.array_equal(plain.compounds(plain.ids(compounds)), compounds)


def test_bad_input_is_named(plain, bpe_tokenizer):
    with pytest.raises(ValueError, match="BPE"):
        CompoundTokens(bpe_tokenizer)
    with pytest.raises(ValueError, match=r"\(n, 8\), not \(3, 7\)"):
        plain.ids(np.zeros((3, 7), int))
    with pytest.raises(ValueError, match="outside its field"):
        plain.ids(np.full((1, 8), 40))
    with pytest.raises(ValueError, match="field_sizes has 2"):
        CompoundMusicConfig(field_sizes=[4, 4])
    with pytest.raises(ValueError, match=r"\(B, T, 8\)"):
        build(plain)(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size 8"):
        CompoundWindowDataset(pieces_of(plain.tokenizer, [0]), plain.tokenizer, 8)


def test_everything_that_can_be_said_adds_up_to_a_probability(plain):
    """Over all compounds in fields of few values, exp(-nats) sums to one: nats compare with any other model's."""
    sizes = [5, 3, 3, 2, 2, 2, 2, 3]
    model = CompoundMusicForCausalLM(CompoundMusicConfig(field_sizes=sizes, **SHAPE))
    rows = []
    for row in itertools.product(*map(range, sizes)):
        structure, meter, position, tempo, _, pitch, velocity, duration = row
        # What can be said, in the module's words.
        if structure in (BOS, EOS) and any(row[1:]):
            continue
        if structure == EMPTY_BAR and any(row[2:]):
            continue
        if (meter and structure not in (BAR, EMPTY_BAR)) or (tempo and not position):
            continue  # a meter only at a bar line, a tempo only at a stated position
        if (structure == BAR and not position) or (not pitch and (velocity or duration)):
            continue
        rows.append(row)
    first = [BOS] + [0] * 7
    labels = torch.from_numpy(np.stack([plain.labels(np.array([first, row])) for row in rows]))
    torch.manual_seed(0)
    logits = torch.randn(1, 2, sum(sizes)).mul(3).expand(len(rows), -1, -1)
    assert float(model.sum_of_nats(logits, labels).neg().exp().sum()) == pytest.approx(1, rel=1e-5)


def test_loss_is_the_sum_of_the_fields_by_hand(plain):
    model = build(plain)
    ids = [
        torch.from_numpy(plain.compounds(plain.tokenizer.midi_to_ids(band(seed=s)))[:n]) for s, n in ((0, 9), (1, 6))
    ]
    items = [{"input_ids": rows, "labels": torch.from_numpy(plain.labels(rows.numpy()))} for rows in ids]
    batch = collate(items)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 9, 8)
    assert (batch["labels"][1, 6:] == N).all()
    with torch.no_grad():
        output = model(**batch)
        alone = [model(item["input_ids"][None]).logits[0] for item in items]
    assert output.logits.shape == (2, 9, sum(plain.sizes))
    ends = np.cumsum(plain.sizes)
    sums, counted = [], 0
    for logits, item in zip(alone, items, strict=True):
        nats = 0.0
        for step, row in enumerate(item["labels"][1:].tolist()):
            for field, value in enumerate(row):
                if value != N:
                    scores = logits[step, ends[field] - plain.sizes[field] : ends[field]].double()
                    if field == 2 and row[0] == BAR:  # a bar's first note has a position
                        scores[0] = -torch.inf
                    nats -= float(scores[value] - scores.logsumexp(0))
                    counted += 1
        sums.append(nats)
    assert model.sum_of_nats(output.logits, batch["labels"]).tolist() == pytest.approx(sums, rel=1e-5)
    assert float(output.loss) == pytest.approx(sum(sums) / counted, rel=1e-5)


def test_the_input_is_the_sum_of_eight_embeddings_and_the_heads_are_tied(plain):
    model = build(plain)
    row = torch.tensor([[[3, 4, 1, 5, 2, 61, 17, 12]]])
    starts = np.cumsum([0, *plain.sizes[:-1]])
    table = model.model.embed_tokens.weight
    summed = sum(table[start + value] for start, value in zip(starts.tolist(), row.flatten().tolist(), strict=True))
    with torch.no_grad():
        expected = model.lm_head(model.model(inputs_embeds=summed[None, None]).last_hidden_state)
        assert torch.allclose(model(row).logits, expected, atol=1e-5)
    assert model.lm_head.weight is table


def test_cached_logits_are_the_uncached_ones(plain):
    model = build(plain).double()
    rows = torch.from_numpy(plain.compounds(plain.tokenizer.midi_to_ids(band(seed=5))))[None, :40]
    with torch.no_grad():
        whole = model(rows).logits
        cache, parts = None, []
        for chunk in rows.split([17, 1, 1, 20, 1], dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        last = model(rows, logits_to_keep=1).logits
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)  # rotary tables are float32
    assert torch.allclose(last, whole[:, -1:], atol=1e-8)
    earlier = rows.clone()
    earlier[0, 20, 5] = 70
    with torch.no_grad():
        changed = model(earlier).logits
    assert torch.equal(changed[:, :20], whole[:, :20]) and not torch.allclose(changed[:, 20:], whole[:, 20:])


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_logits_say_the_writer_writes_music(tokens, seed):
    """Checked by the flat models' own grammar, token for token."""
    rng = np.random.default_rng(seed)
    tokenizer = tokens.tokenizer
    vocabulary = tokenizer.get_vocab()
    # Few pitches and much "nothing" at one position: doubled notes would come at once.
    melodic = [vocabulary[f"Pitch_{pitch}"] for pitch in range(128) if pitch not in (60, 64, 67)]
    drums = [vocabulary[f"PitchDrum_{pitch}"] for pitch in range(128) if pitch not in (36, 38)]
    writer = CompoundWriter(tokens, rng, [*melodic, *drums, tokenizer.eos_token_id], temperature=1.3, top_p=0.99)
    rows = [tokens.compounds([tokenizer.bos_token_id])[0]]
    for _ in range(150):
        logits = rng.normal(scale=2, size=sum(tokens.sizes)).astype(np.float32)
        logits[np.cumsum([0, *tokens.sizes[:-1]])] += 4  # nothing, in every field
        rows.append(writer.draw(logits))
        writer.follow(rows[-1])
    rows = np.array(rows)
    assert {BAR, EMPTY_BAR, 0} == set(rows[1:, 0].tolist()) and (rows[:, 5] > 0).sum() > 20
    ids = tokens.ids(rows)
    assert np.array_equal(tokens.compounds(ids), rows)
    config = SageMusicConfig(**tokenizer.config_fields())
    grammar, doubled = MidiGrammarLogitsProcessor(config), NoDoubledNotesLogitsProcessor(config)
    zeros = torch.zeros(1, config.vocab_size)
    for n in range(1, len(ids)):
        before = torch.tensor([ids[:n]])
        assert doubled(before, grammar(before, zeros))[0, ids[n]] == 0, tokenizer.convert_ids_to_tokens(ids[: n + 1])
    assert tokenizer.decode_midi(ids).note_num() == (rows[:, 5] > 0).sum()


def test_sampling_follows_temperature_and_top_p(plain):
    """Velocities 0.5, 0.3, 0.2 of what is left: top_p 0.75 keeps the first two, at 5/8 and 3/8."""
    logits = np.full(sum(plain.sizes), -50.0)
    start = sum(plain.sizes[:6])
    logits[start + 1 : start + 4] = np.log([0.5, 0.3, 0.2])
    logits[start] = 9  # nothing, which is not valid for a velocity
    valid = np.arange(plain.sizes[6]) > 0
    writer = CompoundWriter(plain, np.random.default_rng(0), temperature=1.0, top_p=0.75)
    drawn = np.bincount([writer._choose(logits, 6, valid) for _ in range(4000)])
    assert drawn[[1, 2]] / 4000 == pytest.approx([0.625, 0.375], abs=0.03) and len(drawn) == 3
    # At temperature 0.5 the weights are squared: 25, 9 and 4 of 38; top_p 1 keeps all.
    writer = CompoundWriter(plain, np.random.default_rng(0), temperature=0.5, top_p=1.0)
    drawn = np.bincount([writer._choose(logits, 6, valid) for _ in range(4000)])
    assert drawn[1:4] / 4000 == pytest.approx([25 / 38, 9 / 38, 4 / 38], abs=0.03)
    greedy = CompoundWriter(plain, np.random.default_rng(0), temperature=0)
    assert {greedy._choose(logits, 6, valid) for _ in range(9)} == {1}


def test_a_continuation_starts_with_the_prompt_and_keeps_its_rules(tokens, tmp_path):
    path = tmp_path / "prompt.mid"
    prompt = band(bars=6, seed=4, qpm=97)
    prompt.dump_midi(path)
    model = build(tokens, initializer_range=0.02)  # almost uniform: notes and bar lines come equally often
    seen = []
    piece = continue_score_compound(
        model, tokens.tokenizer, path, 4, 16, seed=3, progress=lambda bars, notes: seen.append(bars)
    )
    assert (piece.bars, piece.remarks) == (16, [])
    assert seen == list(range(17))
    end = 4 * 4 * 48  # four bars of 4/4, in 48ths of a beat
    assert [n for n in notes_of(piece.score) if n[1] < end] == [n for n in notes_of(prompt) if n[1] < end]
    new = [n for n in notes_of(piece.score) if n[1] >= end]
    assert len(new) == piece.notes > 8 and max(n[1] for n in new) < 20 * 4 * 48
    assert {n[0] for n in new} <= {-1, 0, 33}
    assert [t.qpm for t in piece.score.tempos] == pytest.approx([97], abs=1e-3)  # exact, not a token's
    assert {(t.numerator, t.denominator) for t in piece.score.time_signatures} == {(4, 4)}
    again = continue_score_compound(model, tokens.tokenizer, path, 4, 16, seed=3)
    other = continue_score_compound(model, tokens.tokenizer, path, 4, 16, seed=4)
    assert again.ids == piece.ids != other.ids
    drums = continue_score_compound(model, tokens.tokenizer, path, 4, 16, seed=3, programs=[-1])
    assert {n[0] for n in notes_of(drums.score) if n[1] >= end} == {-1}


def test_generation_is_the_uncached_argmax_and_goes_on_beyond_the_context(plain):
    """Compared with a forward pass over everything for each compound."""
    model, tokenizer = build(plain, seed=2), plain.tokenizer
    prompt = band(bars=4, seed=6)
    piece = continue_score_compound(model, tokenizer, prompt, 4, 2, temperature=0)
    rows = plain.compounds(tokenizer.midi_to_ids(prompt, bars=4))
    writer = CompoundWriter(plain, np.random.default_rng(0), _not_of(prompt, tokenizer), temperature=0)
    for row in rows:
        writer.follow(row)
    writer.bar_over = True
    written = 0
    while True:
        with torch.no_grad():
            row = writer.draw(model(torch.from_numpy(rows)[None]).logits[0, -1].numpy())
        written += int(row[0] in (BAR, EMPTY_BAR))
        if written > 2:
            break
        writer.follow(row)
        rows = np.concatenate([rows, row[None]])
    assert plain.ids(rows) == piece.ids
    # A context of a few bars: the oldest are let go, the piece keeps them.
    short = build(plain, seed=2, max_position_embeddings=320)
    longer = continue_score_compound(short, tokenizer, prompt, 4, 120, seed=0)
    assert longer.bars == 120 and len(longer.ids) > 640
    assert longer.remarks == ["the prompt is longer than the context: the model hears its last bars"]
    with pytest.raises(ValueError, match="single bar holds more than the context of 32"):
        continue_score_compound(build(plain, max_position_embeddings=32), tokenizer, prompt, 4, 2)


def _not_of(prompt: Score, tokenizer: SageMusicTokenizer) -> list[int]:
    """Programs and meters that a prompt does not have, all tempos, EOS."""
    found = set(tokenizer.base_tokens(tokenizer.midi_to_ids(prompt)))
    kinds = ("Program_", "TimeSig_")
    return [
        index
        for text, index in tokenizer.get_vocab().items()
        if text.startswith(("Tempo_", "EOS_")) or (text.startswith(kinds) and text not in found)
    ]


def test_meters_and_empty_bars_of_the_prompt(plain):
    prompt = band(bars=6, seed=2)
    prompt.time_signatures = type(prompt.time_signatures)([TimeSignature(0, 4, 4), TimeSignature(2 * 1920, 3, 4)])
    for track in prompt.tracks:  # the last bar of the prompt is silent: 2 bars of 4/4, then one of 3/4, then rests
        track.notes = type(track.notes)([n for n in track.notes if not 2 * 1920 + 1440 <= n.time < 2 * 1920 + 2880])
    piece = continue_score_compound(build(plain), plain.tokenizer, prompt, 4, 4, seed=1)
    assert piece.bars == 4
    found = {(t.numerator, t.denominator) for t in piece.score.time_signatures}
    assert found <= {(4, 4), (3, 4)} and piece.notes > 0


def test_blocks_and_windows_hold_the_flat_models_music(plain):
    tokenizer = plain.tokenizer
    pieces = pieces_of(tokenizer)
    blocks = BlockDataset(pieces, tokenizer, 128, SageMusicAugmentation(tokenizer, 3))
    flat = [blocks[i]["input_ids"].tolist() for i in range(len(blocks))]
    compound = CompoundBlockDataset(blocks, tokenizer)
    for i, ids in enumerate(flat):
        item = compound[i]
        found = plain.ids(item["input_ids"].numpy())
        assert ids[: len(found)] == found and 0 <= len(ids) - len(found) <= 8
        begins = item["input_ids"][:, 0] == BOS
        assert np.array_equal(item["labels"][~begins], plain.labels(item["input_ids"].numpy())[~begins])
        assert (item["labels"][begins] == -100).all() and torch.equal(item["position_ids"] == 0, begins)
    windows, expected = CompoundWindowDataset(pieces, tokenizer, 128), WindowDataset(pieces, tokenizer, 128)
    assert (windows.num_tokens, windows.num_notes) == (expected.num_tokens, expected.num_notes)
    body = [plain.ids(windows[i]["input_ids"][1:].numpy()) for i in range(len(windows))]
    assert [*itertools.chain(*body)] == np.concatenate([piece[1:] for piece in pieces]).tolist()
    assert max(map(len, body)) <= 127 and len(windows) <= 1.1 * len(expected)


def test_training_lowers_the_loss_and_is_kept(tmp_path):
    for seed in range(5):
        folder = tmp_path / "data" / ("validation" if seed == 4 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        band(bars=6, seed=seed).dump_midi(folder / f"{seed}.mid")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"max_position_embeddings": 1024, "kv_routing": "none"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    data = ["--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache"), "--block_size", "128"]
    command = [*data, "--output", str(tmp_path / "out"), "--model", str(tmp_path / "config.json")]

    def parts_of(command):
        model, data, _, args = parse(command, lambda model: SAGE_MUSIC)
        return compound_parts(model, data, args)

    tokenizer, model, train, evaluation, collator = parts_of(command)[:5]
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.num_key_value_heads) == (32, 4, 4)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "out"),
            max_steps=40,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        preprocess_logits_for_metrics=model.sum_of_nats,
        compute_metrics=lambda found: {"nats": float(found.predictions.sum()) / evaluation.num_notes},
    )
    before = trainer.evaluate()["eval_nats"]
    # Untrained, every head is about uniform: 3 structures to a bar line's and so on, at most the logs of all sizes.
    assert before < np.log(CompoundTokens(tokenizer).sizes).sum() + 1
    trainer.train()
    after = trainer.evaluate()["eval_nats"]
    assert after < before - 5
    model.save_pretrained(tmp_path / "best")
    tokenizer.save_pretrained(tmp_path / "best")
    again = CompoundMusicForCausalLM.from_pretrained(tmp_path / "best")
    assert again.config.model_type == "compound_music" and again.config.field_sizes == model.config.field_sizes
    with torch.no_grad():
        nats = sum(again(**collate([item])).loss * (item["labels"][1:] != N).sum() for item in evaluation)
    assert float(nats) / evaluation.num_notes == pytest.approx(after, rel=1e-4)
    piece = continue_score_compound(again, SageMusicTokenizer.from_pretrained(tmp_path / "best"), band(4), 2, 2, seed=0)
    assert piece.bars == 2
    trained = ["--model", str(tmp_path / "best"), "--config", "max_position_embeddings=128"]
    parts = parts_of([*command[:-2], *trained])
    assert parts[1].config.max_position_embeddings == 128
    assert torch.equal(parts[1].lm_head.weight, again.lm_head.weight)
    # What a study calls: the command, which reports in nats per note, and whose folder is complete.
    small = "--max_steps 2 --per_device_train_batch_size 2 --learning_rate 0.01 --report_to none".split()
    assert main([*command, *small], parts=compound_parts) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == 2 and after < report["eval_nats_per_note"] < before + 1
    assert continue_score_compound(
        CompoundMusicForCausalLM.from_pretrained(tmp_path / "out" / "best"), tokenizer, band(4), 2, 1, seed=0
    ).bars
    with pytest.raises(ValueError, match="kv_routing"):
        parts_of([*command, "--config", "kv_routing=head"])


def test_a_field_is_a_tokenizer_type():
    """Every type that the tokenizer can write has a field, but PAD."""
    tokenizer = SageMusicTokenizer()
    kinds = {text.split("_")[0] for text in tokenizer.get_vocab()}
    assert kinds == {kind for kinds in FIELDS.values() for kind in kinds} | {"PAD"}
