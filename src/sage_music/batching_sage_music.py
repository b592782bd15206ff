"""The MIDI grammar in Transformers' continuous batching, where requests of any length share one forward pass."""

from itertools import chain

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from .generation_sage_music import STATE, UNCHANGED, MidiGrammarLogitsProcessor

# A request's state in one int32: from the right 11 bits of position + 1, 11 of the bar's length, 2 of drum + 1, then
# the type of the last token. Longer than any bar, such as the length before the first meter, is the largest that fits.
FIELD, LARGEST = 11, 2**11 - 1


class RequestGrammarProcessor(ContinuousBatchingLogitsProcessor):
    """`MidiGrammarLogitsProcessor` for continuous batching: each request keeps the grammar by its own tokens.

    Batches there hand a processor the last token of each request only. So the state is read where the requests are
    known, on the host, and travels with the batch as one number a request.

    Args:
        config: as for `MidiGrammarLogitsProcessor`.

    Raises:
        ValueError: as `MidiGrammarLogitsProcessor`.
    """

    supported_kwargs = {}  # noqa: RUF012 (class variables of the base class)
    ignored_kwargs = ()

    def __init__(self, config):
        self.grammar = MidiGrammarLogitsProcessor(config)
        self.changes = list(zip(*(config.grammar[name] for name in STATE), strict=True))
        self.last_type = config.grammar["last_type"]

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Rows that no request owns are left alone."""
        int32_tensor.fill_(-1)

    def prepare_tensor_args(self, requests_with_new_token: list) -> torch.Tensor:
        """(requests,) int32: the states in which the requests wait for their next token."""
        states = []
        for request in requests_with_new_token:
            tokens = request.state
            states.append(self.pack(tokens.initial_tokens, tokens.generated_tokens))
        return torch.tensor(states, dtype=torch.int32)

    def pack(self, prompt: list[int], generated: list[int]) -> int:
        """The state after these tokens, as one number; read backwards, since what a step needs is mostly near."""
        found = dict.fromkeys(STATE, UNCHANGED)
        last = None
        for token in chain(reversed(generated), reversed(prompt)):
            last = token if last is None else last
            for name, value in zip(STATE, self.changes[token], strict=True):
                if found[name] == UNCHANGED:
                    found[name] = value
            if UNCHANGED not in found.values():
                break
        position, bar_length, drum = (
            start if found[name] == UNCHANGED else found[name] for name, start in STATE.items()
        )
        number = self.last_type[last]
        number = number << 2 | drum + 1
        number = number << FIELD | min(bar_length, LARGEST)
        return number << FIELD | position + 1

    def __call__(self, scores: torch.FloatTensor, tensor_arg: torch.Tensor) -> torch.FloatTensor:
        """scores (requests, V), states (at least requests,)."""
        grammar = self.grammar
        if grammar.follows.device != scores.device:
            grammar.follows = grammar.follows.to(scores.device)
            grammar.fields = {name: values.to(scores.device) for name, values in grammar.fields.items()}
        number = tensor_arg[: len(scores), None].long()
        owned = number >= 0
        number = number.clamp(min=0)
        position, bar_length = (number & LARGEST) - 1, number >> FIELD & LARGEST
        drum, last_type = (number >> 2 * FIELD & 3) - 1, number >> 2 * FIELD + 2
        allowed = grammar._follow(last_type, position, bar_length, drum)
        return scores.masked_fill(owned & ~allowed, -torch.inf)


__all__ = ["RequestGrammarProcessor"]
