"""Drafting with the model's own head: nothing but the number of forward passes changes, and the head learns."""

import functools

import pytest
import torch
from conftest import band, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import LogitsProcessor
from transformers.generation import utils

from sage_music import (
    PRETRAINED,
    BarCountCriteria,
    DraftCandidateGenerator,
    SageMusicConfig,
    SageMusicForCausalLM,
    drafting_sage_music,
)

GREEDY = {"do_sample": False, "max_new_tokens": 120}
DRAFT = {"use_mtp": True, "assistant_confidence_threshold": 0.0}


def counted(model):
    """`model`, and a list that its forward passes grow by their number of tokens."""
    passes, forward = [], type(model).forward

    @functools.wraps(forward)
    def count(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape[1])
        return forward(model, *args, **kwargs)

    model.forward = count
    return passes


@pytest.fixture(scope="module")
def drafter(tokenizer, prompts):
    """A tiny model in float64 that knows two pieces nearly by heart, and whose head learned beside it."""
    model = tiny_model(tokenizer, num_mtp_layers=3, initializer_range=0.05).double().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        model(prompts, labels=prompts).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("routing", ["head", "head-uneven", "token", "token-gqa", "mha", "gqa", "mqa"])
@pytest.mark.parametrize("grammar", [True, False])
def test_greedy_output_is_that_of_plain_generation(tokenizer, prompts, routing, grammar):
    model = tiny_model(tokenizer, routing, num_mtp_layers=3).double()
    model.generation_config.midi_grammar = grammar
    with torch.no_grad():  # a head that often agrees: it repeats what the model itself says of the last token
        model.draft.out_proj.weight.zero_()
    options = {**GREEDY, "max_new_tokens": 40}
    assert torch.equal(model.generate(prompts[:1], **options, **DRAFT), model.generate(prompts[:1], **options))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("most", [1, 3])
def test_a_trained_head_saves_passes_and_changes_nothing(drafter, prompts, threshold, most):
    expected = drafter.generate(prompts[:1, :60], **GREEDY)
    passes = counted(drafter)
    options = {"use_mtp": True, "assistant_confidence_threshold": threshold, "num_assistant_tokens": most}
    got = drafter.generate(prompts[:1, :60], **GREEDY, **options)
    del drafter.forward
    assert torch.equal(got, expected)
    assert len(passes) <= 100 and max(passes[1:]) == most + 1


def test_it_stops_where_plain_generation_stops(drafter, prompts, tokenizer):
    prompt = prompts[:1, :60]
    bars = int(BarCountCriteria(drafter.config, 0).count(prompt))
    stop = [BarCountCriteria(drafter.config, bars)]
    for options in (
        {"stopping_criteria": stop},
        {"max_new_tokens": 7},
        {"eos_token_id": drafter.generate(prompt, **GREEDY)[0, -30].item()},
    ):
        options = {**GREEDY, **options}
        expected = drafter.generate(prompt, **options)
        assert expected.shape[1] < prompt.shape[1] + 120
        assert torch.equal(drafter.generate(prompt, **options, **DRAFT), expected)
    for seed in range(20):  # sampled drafts, too, never reach over a bar line
        torch.manual_seed(seed)
        out = drafter.generate(prompt, do_sample=True, max_new_tokens=120, stopping_criteria=stop, **DRAFT)
        assert not stop[0](out[:, :-1], None).any()


def test_bpe_and_a_short_prompt(bpe_tokenizer):
    model = tiny_model(bpe_tokenizer, num_mtp_layers=3).double()
    for prompt in (torch.tensor([[model.config.bos_token_id]]), torch.tensor([bpe_tokenizer.midi_to_ids(band())[:30]])):
        expected = model.generate(prompt, **GREEDY)
        assert torch.equal(model.generate(prompt, **GREEDY, **DRAFT), expected)


class OnlyThese(LogitsProcessor):
    """Leaves a few tokens, so that every continuation can be counted."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_copy(1, self.tokens, scores[:, self.tokens])


def discrepancy(model, prompt, tokens, draws, **options) -> float:
    """Chi-square of `draws` drafted continuations against the model's distribution, over its degrees of freedom."""
    n, length = len(tokens), 3
    continuations = torch.cartesian_prod(*[tokens] * length)
    ids = torch.cat((prompt.expand(len(continuations), -1), continuations), dim=1)
    with torch.no_grad():
        logits = model(ids).logits[:, prompt.shape[1] - 1 : -1, tokens].double()
    chosen = (continuations[..., None] == tokens).long().argmax(-1)
    expected = draws * logits.log_softmax(-1).gather(2, chosen[..., None]).sum((1, 2)).exp()
    assert expected.sum() == pytest.approx(draws)
    counts = torch.zeros(n**length)
    powers = n ** torch.arange(length - 1, -1, -1)
    torch.manual_seed(0)
    for _ in range(draws):
        # One token more than is counted, so that a full draft of the last two fits in.
        out = model.generate(prompt, do_sample=True, top_k=0, max_new_tokens=length + 1, use_mtp=True, **options)
        new = out[0, prompt.shape[1] :][:length]
        counts[((new[:, None] == tokens).long().argmax(-1) * powers).sum()] += 1
    return float(((counts - expected) ** 2 / expected).sum() / (n**length - 1))


def test_the_sampled_distribution_is_the_models(tokenizer, prompts, monkeypatch):
    """All continuations of three tokens out of three, counted; and the count would find a draft that is always kept."""
    model = tiny_model(tokenizer, num_mtp_layers=2, initializer_range=0.1, num_hidden_layers=1)
    model.generation_config.midi_grammar = False
    with torch.no_grad():
        model.draft.in_proj.weight.mul_(10)  # far from what the model says, yet no token out of reach
        model.draft.out_proj.weight.mul_(10)
    tokens = torch.tensor([5, 80, 200])
    options = {"logits_processor": [OnlyThese(tokens)]}
    # 26 degrees of freedom: 2.1 is passed by one run in a thousand.
    for threshold in (0.0, 0.5):
        options["assistant_confidence_threshold"] = threshold
        assert discrepancy(model, prompts[:1, :20], tokens, 300, **options) < 2.1
    monkeypatch.setattr(utils.torch, "rand_like", torch.zeros_like)
    options["assistant_confidence_threshold"] = 0.0
    assert discrepancy(model, prompts[:1, :20], tokens, 300, **options) > 4


def test_the_loss_reaches_the_head_alone(tokenizer, prompts):
    model = tiny_model(tokenizer, num_mtp_layers=3).train()
    model(prompts, labels=prompts).loss.backward()
    with_head = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(f"draft.{name}" in with_head for name, _ in model.draft.named_parameters())
    plain = tiny_model(tokenizer).train()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("draft.")})
    plain(prompts, labels=prompts).loss.backward()
    for name, p in plain.named_parameters():
        assert torch.equal(p.grad, with_head[name]), name
    with torch.no_grad():  # evaluation reports the model's own loss
        assert model.eval()(prompts, labels=prompts).loss == plain.eval()(prompts, labels=prompts).loss
    model.train()
    labels = prompts.clone()
    labels[:, 3:] = -100  # nothing left to guess
    model.zero_grad()
    model(prompts, labels=labels).loss.backward()
    assert not any(p.grad.any() for p in model.draft.parameters())


def test_the_head_neither_reads_nor_guesses_beyond_a_packed_piece(tokenizer, prompts, monkeypatch):
    monkeypatch.setattr(drafting_sage_music, "TRAINED_SHARE", 3.0)  # every position, several times
    model = tiny_model(tokenizer, num_mtp_layers=3, initializer_range=0.1).double().train()
    end, length = 50, prompts.shape[1]
    sequences = (torch.arange(length) >= end).long()[None]

    def random(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    states, logits = random(2, length, model.config.hidden_size), random(2, length, model.config.vocab_size)

    def loss(states, logits, labels, **options):
        torch.manual_seed(0)
        return model.draft.loss(states, prompts, labels, logits, model, **options)

    beyond = logits.clone()
    beyond[:, end - 1] = beyond[:, end]  # what the model says after a piece's last token: nothing that it learned
    expected = loss(states, logits, prompts, sequences=sequences)
    assert torch.equal(loss(states, beyond, prompts, sequences=sequences), expected)
    assert not torch.equal(loss(states, beyond, prompts), loss(states, logits, prompts))

    labels, others = prompts.clone(), states.clone()
    labels[:, : end + 1] = -100  # only the second piece is trained
    others[:, :end] += 1
    expected = loss(states, logits, labels, sequences=sequences)
    assert torch.equal(loss(others, logits, labels, sequences=sequences), expected)
    assert not torch.equal(loss(others, logits, labels), expected)


def test_the_model_tells_the_head_where_packed_pieces_begin(tokenizer, prompts, monkeypatch):
    model = tiny_model(tokenizer, num_mtp_layers=3).train()
    seen = []
    monkeypatch.setattr(model.draft, "loss", lambda *arguments: seen.append(arguments[-1]) or torch.zeros(()))
    positions = torch.cat([torch.arange(50), torch.arange(70)]).expand(2, -1)
    for options in ({"position_ids": positions}, {"position_ids": torch.arange(120)[None]}, {}):
        model(prompts, labels=prompts, **options)
    assert seen[0].tolist() == 2 * [50 * [0] + 70 * [1]] and seen[1:] == [None, None]


def test_without_a_head_the_error_says_how_to_get_one(tokenizer, prompts, tmp_path):
    model = tiny_model(tokenizer)
    with pytest.raises(ValueError, match="--draft_tokens"):
        model.generate(prompts[:1], use_mtp=True, max_new_tokens=4)
    assert model.draft is None
    model.save_pretrained(tmp_path)  # a checkpoint without a head loads with one that is to be trained, and without
    assert SageMusicForCausalLM.from_pretrained(tmp_path).draft is None
    assert SageMusicForCausalLM.from_pretrained(tmp_path, num_mtp_layers=2).draft.steps == 2
    with pytest.raises(StrictDataclassError, match="num_mtp_layers"):
        SageMusicConfig(**{**tiny_config(tokenizer).to_dict(), "num_mtp_layers": -1})


def test_prompt_lookup_goes_before_the_head(drafter, prompts, monkeypatch):
    monkeypatch.setattr(DraftCandidateGenerator, "get_candidates", None)
    expected = drafter.generate(prompts[:1], **GREEDY)
    assert torch.equal(drafter.generate(prompts[:1], **GREEDY, prompt_lookup_num_tokens=4, use_mtp=True), expected)


def test_the_bundled_checkpoint_drafts_in_fewer_passes():
    model = SageMusicForCausalLM.from_pretrained(PRETRAINED).eval()
    prompt = torch.tensor([[model.config.bos_token_id]])
    torch.manual_seed(0)
    prompt = model.generate(prompt, max_new_tokens=100)
    options = {"max_new_tokens": 150, "min_new_tokens": 150}
    expected = model.generate(prompt, do_sample=False, **options)
    for sample in (False, True):
        passes = counted(model)
        got = model.generate(prompt, do_sample=sample, **options, use_mtp=True)
        del model.forward
        assert sample or torch.equal(got, expected)
        assert len(passes) <= 100
