"""Drafting: a small head that guesses the next tokens, so that one forward pass of the model can keep several.

`generate(use_mtp=True)` drafts with it. What comes out is what plain generation gives: the same tokens under greedy
decoding, the same distribution under sampling (speculative sampling, Leviathan et al. 2023). Only the number of forward
passes falls.

Shapes: B batch, T tokens, n positions, d hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.generation.candidate_generator import CandidateGenerator

# Positions before the last one whose hidden states the head reads: about the last note, whose velocity and duration
# the next one often repeats, and which the last hidden state, made to predict one token, need not hold.
HISTORY = 4

# Share of a batch's positions that the head is trained on in a step: neighbours teach much the same, and every position
# costs as many products with the vocabulary as there are steps.
TRAINED_SHARE = 0.25


class SageMusicDraftHead(nn.Module):
    """Guesses token after token from the model's last hidden states, without the model.

    A state begins as the hidden state (after the final norm) of the last position the model has seen, plus a projection
    of the `HISTORY` states before it. Each token that follows moves it, with the same weights at every step,

        s <- s + W_out silu(W_in [norm(s); norm(embedding)]),

    and the model's own language-model head reads the guess of the token after that one from `norm(s)`.

    Args:
        config: `num_mtp_layers` is how many tokens it is trained to guess in a row.
    """

    def __init__(self, config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.steps = config.num_mtp_layers
        self.history_proj = nn.Linear(HISTORY * size, size, bias=False)
        self.state_norm = nn.RMSNorm(size, eps)
        self.token_norm = nn.RMSNorm(size, eps)
        self.in_proj = nn.Linear(2 * size, size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)
        self.norm = nn.RMSNorm(size, eps)

    def start(self, window: torch.Tensor) -> torch.Tensor:
        """(n, d) state before the first token, from `window` (n, HISTORY + 1, d): hidden states, the latest last."""
        return window[:, -1] + self.history_proj(window[:, :-1].flatten(1))

    def step(self, state: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """(n, d) state after one more token, of which `embedding` (n, d) is the model's input embedding."""
        inputs = torch.cat((self.state_norm(state), self.token_norm(embedding)), dim=-1)
        return state + self.out_proj(F.silu(self.in_proj(inputs)))

    def loss(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        logits: torch.Tensor,
        model: nn.Module,
        num_items_in_batch: torch.Tensor | int | None = None,
        sequences: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy of the guesses against the model's own distributions, in nats per guessed token.

        The model, not the corpus, is what accepts a guess, and its distributions say more than one token each. No
        gradient reaches the model: neither its hidden states nor its embeddings nor its head.

        Args:
            hidden_states: (B, T, d) after the final norm.
            input_ids, labels: (B, T); guesses of and after a token whose label is -100 are left out.
            logits: (B, T, V) of the model at these positions.
            model: the language model, for its embeddings and its head.
            num_items_in_batch: labels in all batches of an optimiser step, as `Trainer` passes it; the mean is then
                weighted by this batch's share of them.
            sequences: (B or 1, T) which sequence of a packed row each token belongs to: the head neither reads nor
                guesses beyond its own.
        """
        hidden_states, logits = hidden_states.detach(), logits.detach()
        batch, length = input_ids.shape
        positions = length - self.steps - 1  # those that as many known tokens, with logits each, follow as are guessed
        if positions < 1:
            return self.out_proj.weight.sum() * 0.0
        music = labels != -100
        shape = (max(1, round(TRAINED_SHARE * batch * positions)),)
        rows = torch.randint(batch, shape, device=labels.device)
        columns = torch.randint(positions, shape, device=labels.device)
        window = columns[:, None] + torch.arange(HISTORY + 1, device=rows.device)
        states = F.pad(hidden_states, (0, 0, HISTORY, 0))[rows[:, None], window]
        if sequences is not None:
            sequences = sequences.expand(batch, -1)
            own = sequences[rows, columns]
            before = F.pad(sequences, (HISTORY, 0), value=-1)[rows[:, None], window]
            states = states.masked_fill((before != own[:, None])[..., None], 0.0)
        state = self.start(states)
        embeddings = model.get_input_embeddings().weight.detach()
        read = model.get_output_embeddings().weight.detach()
        loss, kept = 0.0, torch.ones_like(rows, dtype=torch.bool)
        for i in range(1, self.steps + 1):
            kept = kept & music[rows, columns + i] & music[rows, columns + i + 1]
            if sequences is not None:
                kept = kept & (sequences[rows, columns + i + 1] == own)
            state = self.step(state, F.embedding(input_ids[rows, columns + i], embeddings))
            guesses = F.linear(self.norm(state), read).float()
            target = logits[rows, columns + i].float().softmax(-1)
            loss = loss + F.cross_entropy(guesses, target, reduction="none")
        loss = (loss * kept).sum() / (kept.sum() * self.steps).clamp(min=1)
        if num_items_in_batch is not None:
            loss = loss * music[:, 1:].sum() / num_items_in_batch
        return loss


class DraftCandidateGenerator(CandidateGenerator):
    """Candidates for assisted decoding from the model's own `SageMusicDraftHead`; batch 1.

    A draft ends after `num_mtp_layers` tokens (or `num_assistant_tokens`, where that is fewer), where its confidence
    (the product of its tokens' largest probabilities) falls below `assistant_confidence_threshold`, and before a bar
    line or an end of the piece: `BarCountCriteria` and its like are asked only between forward passes, and
    nothing must follow what they stop at. These rules look at the draft's distributions and at the tokens drafted
    before, never at the token about to be drafted: otherwise the sampled distribution would be bent.

    Args:
        model: a `SageMusicForCausalLM` with a draft head.
        generation_config: as `generate()` has filled it in.
        logits_processor: what shapes the model's distributions, the grammar among them, shapes the draft's.

    Raises:
        ValueError: the model has no draft head.
    """

    requires_model_outputs = True
    model_kwargs_overrides = {"return_last_hidden_state": True}  # noqa: RUF012 (class variable of the base class)

    def __init__(self, model, generation_config, logits_processor):
        if model.draft is None:
            raise ValueError(
                "use_mtp=True needs a draft head, and this model has none (config.num_mtp_layers is 0). Train one: "
                "sage-music train --model CHECKPOINT --draft_tokens 4 --data MIDI --output RUN."
            )
        self.model, self.head, self.logits_processor = model, model.draft, logits_processor
        self.steps = min(self.head.steps, generation_config.num_assistant_tokens or self.head.steps)
        self.threshold = generation_config.assistant_confidence_threshold or 0.0
        self.max_length, self.do_sample = generation_config.max_length, generation_config.do_sample
        grammar = model.config.grammar
        ends = [] if grammar is None else torch.tensor(grammar["bars"]).nonzero().flatten().tolist()
        eos = generation_config.eos_token_id
        ends += [] if eos is None else eos if isinstance(eos, list) else [eos]
        self.ends = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=model.device)
        self.ends[ends] = True
        self.end_ids = set(ends)
        self.window = None

    def get_candidates(
        self, input_ids: torch.LongTensor, model_outputs=None, n_last_matches=0, is_first_iteration=False, **kwargs
    ) -> tuple[torch.LongTensor, torch.FloatTensor | None]:
        """`input_ids` (1, T) with up to `steps` tokens after them; under sampling the (1, drafted, V) scores they were
        drawn from, else None. Nothing is drafted before the model's first pass."""
        if is_first_iteration:
            return input_ids, None
        self._remember(model_outputs.hidden_states[-1], int(n_last_matches))
        steps = min(self.steps, self.max_length - input_ids.shape[1] - 1)
        ids, drafted, confidence = input_ids, [], 1.0
        state = self.head.start(self.window)
        embed, read = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for _ in range(steps):
            state = self.head.step(state, embed(ids[:, -1]))
            scores = read(self.head.norm(state)).float()
            scores = self.logits_processor(ids, scores)
            token = scores.argmax(-1, keepdim=True)
            if self.threshold:
                confidence *= float(scores.softmax(-1).amax())
            if confidence < self.threshold or int(token) in self.end_ids:
                break
            if self.do_sample:
                scores = scores.masked_fill(self.ends, -torch.inf)
                token = torch.multinomial(scores.softmax(-1), 1)
                drafted.append(scores)
            ids = torch.cat((ids, token), dim=-1)
        return ids, torch.stack(drafted, dim=1) if drafted else None

    def _remember(self, hidden_states: torch.Tensor, matches: int) -> None:
        """Keep the last `HISTORY + 1` hidden states of tokens that stand: all of the first pass, which is over the
        prompt, and the first `matches + 1` of a pass over a draft."""
        if self.window is None:
            self.window = F.pad(
                hidden_states[:, -HISTORY - 1 :], (0, 0, max(0, HISTORY + 1 - hidden_states.shape[1]), 0)
            )
        else:
            self.window = torch.cat((self.window, hidden_states[:, : matches + 1]), dim=1)[:, -HISTORY - 1 :]


__all__ = ["DraftCandidateGenerator", "SageMusicDraftHead"]
