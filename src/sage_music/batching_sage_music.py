"""The MIDI grammar in Transformers' continuous batching, where requests of any length share one forward pass."""

from collections.abc import Sequence
from copy import copy
from functools import wraps
from itertools import chain

import torch
from transformers.generation import ContinuousBatchingConfig
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


def grammar_options(given: ContinuousBatchingConfig | None, generation_config) -> ContinuousBatchingConfig:
    """A copy of the options for continuous batching, without asynchronous batches.

    Raises:
        ValueError: asynchronous batches are asked for.
    """
    # The generation config may still hold them: deprecated in Transformers, but it works.
    given = given or getattr(generation_config, "continuous_batching_config", None)
    options = copy(given or ContinuousBatchingConfig())
    if options.use_async_batching:
        raise ValueError(
            "use_async_batching does not go with the MIDI grammar: batches begin before the tokens are known that it "
            "reads. Leave it out, or set midi_grammar=False in the generation config."
        )
    options.use_async_batching = False
    return options


def check_kept(manager, grammar: bool) -> None:
    """Refuse a manager kept from an earlier call that keeps the MIDI grammar where this one does not, or the reverse.

    Raises:
        ValueError: it does.
    """
    has = any(isinstance(known, RequestGrammarProcessor) for known in manager.logit_processor.logits_processor)
    if has != grammar:
        raise ValueError(
            f"the manager kept from an earlier call (persistent_manager) has midi_grammar={has}, not {grammar}. Call "
            "model.destroy_cached_continuous_batching_manager() first, or leave midi_grammar as it was."
        )


def add_grammar(manager, config) -> None:
    """Let requests to a new manager keep the MIDI grammar."""
    processors = manager.logit_processor
    processors.logits_processor.insert(0, RequestGrammarProcessor(config))  # first, as in `generate()`
    processors.tensors_required += 1
    processors.do_processing = True


def check_request(ids: Sequence[int], config, name: str) -> None:
    """Refuse at the door what would end the batch with all that runs in it.

    Raises:
        ValueError: no ids, or one outside the vocabulary.
    """
    if len(ids) == 0:
        raise ValueError(f"{name} has no tokens: it needs one at least, BOS.")
    wrong = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"{name} holds the id {wrong}, outside the vocabulary of {config.vocab_size}.")


def check_each_request(manager, config) -> None:
    """Let a new manager take only what `check_request` does."""
    add_request = manager.add_request

    @wraps(add_request)
    def checked(input_ids, request_id=None, *more, **options):
        check_request(input_ids, config, "the request" if request_id is None else f"request {request_id}")
        return add_request(input_ids, request_id, *more, **options)

    manager.add_request = checked


__all__ = [
    "RequestGrammarProcessor",
    "add_grammar",
    "check_each_request",
    "check_kept",
    "check_request",
    "grammar_options",
]
