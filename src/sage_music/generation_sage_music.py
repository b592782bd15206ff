"""Decoding aids of SAGE-Music: the grammar that keeps every sequence valid, and generation counted in bars."""

from itertools import islice
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

UNCHANGED = -2
# What the grammar keeps in mind besides the last token's type, and how a sequence begins.
STATE = {"position_after": -1, "bar_length_after": 2**30, "drum_after": -1}
# Assisted decoding goes back by as many tokens as were drafted: states of so many lengths are kept.
KEPT_STATES = 32


class RowState(NamedTuple):
    """What the tokens of one row leave behind.

    Attributes:
        grammar: the type of the last token, and position, bar length and drum as they stand.
        bars: bar lines.
        program: the last token that names a program.
        struck: the Program token under which the position began, and the Programs and pitches since, in order. Merged
            (BPE) tokens count as what they begin with.
    """

    grammar: tuple[int, int, int, int] = (-1, *STATE.values())
    bars: int = 0
    program: int | None = None
    struck: tuple[int | None, ...] = (None,)


class RunningState:
    """The states of the rows of a batch, carried on from token to token.

    Processors and criteria of one `generate()` call may share one, which then reads every token once. Ids are compared
    with those seen before, not trusted to go on from there: batches, left padding, beams and assisted decoding need
    nothing special.

    Args:
        config: a config with a `grammar`; see `MidiGrammarLogitsProcessor`.
    """

    def __init__(self, config):
        grammar = config.grammar
        kinds = [grammar["types"][kind] for kind in grammar["first_type"]]
        self._begins = [kind in ("Bar", "Position") for kind in kinds]
        self._leads = [kind == "Program" for kind in kinds]
        self._strikes = [kind in ("Program", "Pitch", "PitchDrum") for kind in kinds]
        self._bars, self._bos = grammar["bars"], config.bos_token_id
        self._changes = list(zip(*(grammar[name] for name in ("last_type", *STATE)), strict=True))
        # (B, capacity) the longest ids seen of late, and the states of their rows at some lengths, rising.
        self._seen: torch.Tensor | None = None
        self._states: dict[int, list[RowState]] = {}

    def rows(self, input_ids: torch.LongTensor) -> list[RowState]:
        """The state after each row of `input_ids` (B, T)."""
        batch, length = input_ids.shape
        if self._seen is None or len(self._seen) != batch or self._seen.device != input_ids.device:
            self._seen, self._states = input_ids.new_empty(batch, 0), {}
        known = begin = self._known(input_ids)
        if known == length:
            return self._states[length]
        if known is None:
            known, states = self._moved(input_ids)
            begin, self._states = 0, {}
        else:
            states = self._states[known]
            while (latest := next(reversed(self._states))) > known:  # of another continuation
                del self._states[latest]
            if len(self._states) > KEPT_STATES:
                del self._states[next(iter(self._states))]
        for tokens in input_ids[:, known:].T.tolist():
            states = list(map(self._after, states, tokens))
        if length > self._seen.shape[1]:
            self._seen, begin = input_ids.new_empty(batch, 2 * length + KEPT_STATES), 0
        self._seen[:, begin:length] = input_ids[:, begin:]
        self._states[length] = states
        return states

    def _known(self, input_ids: torch.LongTensor) -> int | None:
        """A length at which the states are known and these ids begin as those before them did."""
        lengths = islice((n for n in reversed(self._states) if n <= input_ids.shape[1]), 3)
        return next((n for n in lengths if torch.equal(self._seen[:, :n], input_ids[:, :n])), None)

    def _moved(self, input_ids: torch.LongTensor) -> tuple[int, list[RowState]]:
        """A length and the states at it where every row begins as one of those before did, as beams do; or none."""
        length = next((n for n in reversed(self._states) if n <= input_ids.shape[1]), 0)
        old, new = self._seen[:, :length], input_ids[:, :length]
        for begin in (max(length - 64, 0), 0):  # the last tokens mostly tell the rows apart, all of them always
            same = (old[:, begin:] == new[:, None, begin:]).all(-1)  # (B, B)
            if not length or not same.any(-1).all():
                break
            source = same.int().argmax(-1)
            if torch.equal(old[source], new):
                return length, [self._states[length][row] for row in source.tolist()]
        return 0, [RowState()] * len(input_ids)

    def _after(self, state: RowState, token: int) -> RowState:
        """The state after one more token."""
        (_, position, bar_length, drum), bars, program, struck = state
        kind, new_position, new_length, new_drum = self._changes[token]
        if new_position != UNCHANGED:
            position = new_position
        if new_length != UNCHANGED:
            bar_length = new_length
        if new_drum != UNCHANGED:
            drum = new_drum
            program = program if token == self._bos else token
        if self._strikes[token]:
            struck = (*struck, token)
        elif self._begins[token] and len(struck) > 1:
            struck = (next((old for old in reversed(struck[1:]) if self._leads[old]), struck[0]),)
        return RowState((kind, position, bar_length, drum), bars + self._bars[token], program, struck)


class MidiGrammarLogitsProcessor(LogitsProcessor):
    """Leaves only tokens after which the sequence still decodes to MIDI with nothing dropped.

    A token may follow when (1) the types table allows its first base token after the last base token before it, (2) its
    first Position lies after the current one and inside the bar of the current meter, and (3) its first note is a drum
    exactly when the current Program is the drums'. The state is that of the ids themselves: on the CPU a running one,
    elsewhere read anew, without waiting for the device.

    Args:
        config: a config whose `grammar` holds, per token id: `first_type`, `last_type` (indices into `types`),
            `first_position`, `last_position`, `drum_needed` (-1: none), `position_after`, `bar_length_after`,
            `drum_after` (-2: unchanged); and `transitions`, the `types x types` table.
        running_state: one that others use too; its own by default.

    Raises:
        ValueError: the grammar is missing or does not fit `vocab_size`.
    """

    def __init__(self, config, running_state: RunningState | None = None):
        grammar = config.grammar
        if grammar is None or len(grammar["first_type"]) != config.vocab_size:
            raise ValueError(
                "config.grammar does not describe this vocabulary. Build the config from a tokenizer: "
                "SageMusicConfig(**tokenizer.config_fields())."
            )
        table = torch.tensor(grammar["transitions"], dtype=torch.bool)
        first = torch.tensor(grammar["first_type"])
        self.follows = table[:, first]  # (types, V)
        self.fields = {
            name: torch.tensor(grammar[name])
            for name in (
                "last_type",
                "first_position",
                "last_position",
                "drum_needed",
                "position_after",
                "bar_length_after",
                "drum_after",
            )
        }
        self.running_state = running_state or RunningState(config)
        self._masks: dict[tuple[int, int, int, int], torch.Tensor] = {}

    def _latest(self, name: str, input_ids: torch.LongTensor, default: int) -> torch.Tensor:
        """(B, 1): what the last token that changed this piece of state left."""
        values = self.fields[name][input_ids]  # (B, T)
        steps = torch.arange(1, values.shape[1] + 1, device=values.device)
        last = (steps * (values != UNCHANGED)).amax(-1, keepdim=True)
        return torch.where(last > 0, values.gather(1, (last - 1).clamp(min=0)), default)

    def _read(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """(4, B, 1): the type of each row's last token, and position, bar length and drum as they stand."""
        last_type = self.fields["last_type"][input_ids[:, -1:]]
        return torch.stack([last_type, *(self._latest(name, input_ids, start) for name, start in STATE.items())])

    def _follow(self, last_type, position, bar_length, drum) -> torch.BoolTensor:
        """(B, V) bool: what may follow states (B, 1)."""
        first, needed = self.fields["first_position"], self.fields["drum_needed"]
        in_bar = (first < 0) | ((first > position) & (self.fields["last_position"] < bar_length))
        return self.follows[last_type[:, 0]] & in_bar & ((needed < 0) | (needed == drum))

    def allowed(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """(B, V) bool: tokens that may follow `input_ids` (B, T)."""
        return ~self._forbidden(input_ids)

    def _forbidden(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """(B, V) bool: tokens that must not follow."""
        if input_ids.device.type == "cpu":
            rows = [self._mask(row.grammar) for row in self.running_state.rows(input_ids)]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        if self.follows.device != input_ids.device:
            self.follows = self.follows.to(input_ids.device)
            self.fields = {name: values.to(input_ids.device) for name, values in self.fields.items()}
        return ~self._follow(*self._read(input_ids))

    def _mask(self, state: tuple[int, int, int, int]) -> torch.BoolTensor:
        """(1, V) bool: what must not follow one state."""
        if state not in self._masks:
            self._masks[state] = ~self._follow(*torch.tensor(state)[:, None, None])
        return self._masks[state]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] == 0:  # generation from inputs_embeds: nothing is known of what came before
            return scores
        return scores.masked_fill(self._forbidden(input_ids), -torch.inf)


class PlainLogitsProcessorList(LogitsProcessorList):
    """`LogitsProcessorList` that calls its processors. The stock one reads each one's signature for every token."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.FloatTensor:
        if kwargs:
            return super().__call__(input_ids, scores, **kwargs)
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class BarCountCriteria(StoppingCriteria):
    """Stops a sequence at the bar line that ends bar number `bars`, counted from the start of the sequence.

    The bar line itself (and, under BPE, what its token carries) is the last token:
    `SageMusicTokenizer.decode_midi(ids, bars=bars)` leaves it out.
    """

    def __init__(self, config, bars: int, running_state: RunningState | None = None):
        self.running_state = running_state or RunningState(config)
        self.bar_counts = torch.tensor(config.grammar["bars"])
        self.bars = bars

    def count(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """(B,) bar lines in each sequence."""
        if input_ids.device.type == "cpu":
            return torch.tensor([row.bars for row in self.running_state.rows(input_ids)])
        return self.bar_counts.to(input_ids.device)[input_ids].sum(-1)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return self.count(input_ids) > self.bars


class MinBarsLogitsProcessor(LogitsProcessor):
    """Forbids EOS until `bars` bars are complete, so that a piece does not end early."""

    def __init__(self, config, bars: int, running_state: RunningState | None = None):
        self.criteria = BarCountCriteria(config, bars, running_state)
        self.running_state = self.criteria.running_state
        self.is_eos = torch.zeros(config.vocab_size, dtype=torch.bool)
        self.is_eos[config.eos_token_id] = True

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        early = (self.criteria.count(input_ids) <= self.criteria.bars)[:, None]
        return scores.masked_fill(early & self.is_eos.to(scores.device), -torch.inf)


class NoDoubledNotesLogitsProcessor(LogitsProcessor):
    """Forbids a pitch that the current program already starts at the current position.

    And a program that already starts all its pitches there: after its token no note would be left.

    A MIDI channel has one key per pitch: the first note-off would end both notes. Merged (BPE) tokens that begin with
    another token are not looked into.
    """

    def __init__(self, config, running_state: RunningState | None = None):
        grammar = config.grammar
        self.running_state = running_state or RunningState(config)
        self.first_type = grammar["first_type"]
        self.program, *pitches = [grammar["types"].index(name) for name in ("Program", "Pitch", "PitchDrum")]
        self.pitch_counts = {kind: list(self.first_type).count(kind) for kind in pitches}
        self.fewest = min(filter(None, self.pitch_counts.values()))  # a vocabulary may have no PitchDrum

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows, forbidden = [], []
        for row, state in enumerate(self.running_state.rows(input_ids)):
            program, *tokens = state.struck
            notes: dict[int | None, list[int]] = {}  # of each program that has some at this position
            for token in tokens:
                if self.first_type[token] == self.program:
                    program = token
                else:
                    notes.setdefault(program, []).append(token)
            full = [other for other, held in notes.items() if other is not None and self._is_all(held)]
            forbidden += notes.get(program, []) + full
            rows += [row] * (len(forbidden) - len(rows))
        if forbidden:
            scores = scores.clone()
            scores[rows, forbidden] = -torch.inf
        return scores

    def _is_all(self, notes: list[int]) -> bool:
        """Whether these are all pitches of their kind."""
        return len(notes) >= self.fewest and len(set(notes)) == self.pitch_counts[self.first_type[notes[-1]]]


__all__ = [
    "BarCountCriteria",
    "MidiGrammarLogitsProcessor",
    "MinBarsLogitsProcessor",
    "NoDoubledNotesLogitsProcessor",
    "PlainLogitsProcessorList",
    "RunningState",
]
