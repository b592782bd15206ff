"""Decoding aids of SAGE-Music: the grammar that keeps every sequence valid, and generation counted in bars."""

from collections.abc import Iterator

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

UNCHANGED = -2
# What the grammar keeps in mind besides the last token's type, and how a sequence begins.
STATE = {"position_after": -1, "bar_length_after": 2**30, "drum_after": -1}
# Assisted decoding goes back by as many tokens as were drafted: states of so many lengths are kept.
KEPT_STATES = 32
# Tokens fetched at a time where a sequence is read backwards.
CHUNK = 64


class MidiGrammarLogitsProcessor(LogitsProcessor):
    """Leaves only tokens after which the sequence still decodes to MIDI with nothing dropped.

    A token may follow when (1) the types table allows its first base token after the last base token before it, (2) its
    first Position lies after the current one and inside the bar of the current meter, and (3) its first note is a drum
    exactly when the current Program is the drums'. The state is read from the ids themselves, so that batches, beams
    and assisted decoding need nothing special; on the CPU what was read is kept for ids that go on from there.

    Args:
        config: a config whose `grammar` holds, per token id: `first_type`, `last_type` (indices into `types`),
            `first_position`, `last_position`, `drum_needed` (-1: none), `position_after`, `bar_length_after`,
            `drum_after` (-2: unchanged); and `transitions`, the `types x types` table.

    Raises:
        ValueError: the grammar is missing or does not fit `vocab_size`.
    """

    def __init__(self, config):
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
        self._changes = list(zip(*(grammar[name] for name in ("last_type", *STATE)), strict=True))
        # (B, capacity) the longest ids seen of late, and the states of their rows at some lengths, rising.
        self._seen: torch.Tensor | None = None
        self._states: dict[int, list[tuple[int, int, int, int]]] = {}
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
            rows = [self._mask(state) for state in self._row_states(input_ids)]
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

    def _row_states(self, input_ids: torch.LongTensor) -> list[tuple[int, int, int, int]]:
        """The state of each row; only tokens after the longest beginning that is known are read."""
        rows, length = input_ids.shape
        known = self._known(input_ids)
        if known == length:
            return self._states[length]
        if known is None:
            states = list(zip(*self._read(input_ids)[..., 0].tolist(), strict=True))
            self._seen, self._states = input_ids.new_empty(rows, 2 * length + KEPT_STATES), {}
            known = 0
        else:
            states = self._states[known]
            for tokens in input_ids[:, known:].T.tolist():
                states = [self._after(*pair) for pair in zip(states, tokens, strict=True)]
            # Longer ones belong to another continuation, much shorter ones are out of reach.
            self._states = {n: old for n, old in self._states.items() if length - KEPT_STATES < n <= known}
            while length > self._seen.shape[1]:
                self._seen = torch.cat((self._seen, torch.empty_like(self._seen)), dim=1)
        self._seen[:, known:length] = input_ids[:, known:]
        self._states[length] = states
        return states

    def _known(self, input_ids: torch.LongTensor) -> int | None:
        """A length at which states are known and these ids begin as those before them did: compared, not trusted."""
        if self._seen is None or len(self._seen) != len(input_ids):
            return None
        lengths = [n for n in reversed(self._states) if n <= input_ids.shape[1]]
        return next((n for n in lengths[:3] if torch.equal(self._seen[:, :n], input_ids[:, :n])), None)

    def _after(self, state: tuple[int, int, int, int], token: int) -> tuple[int, int, int, int]:
        kind, *changes = self._changes[token]
        return (kind, *(old if new == UNCHANGED else new for old, new in zip(state[1:], changes, strict=True)))

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

    def __init__(self, config, bars: int):
        self.bar_counts = torch.tensor(config.grammar["bars"])
        self.bars = bars

    def count(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """(B,) bar lines in each sequence."""
        return self.bar_counts.to(input_ids.device)[input_ids].sum(-1)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return self.count(input_ids) > self.bars


class MinBarsLogitsProcessor(LogitsProcessor):
    """Forbids EOS until `bars` bars are complete, so that a piece does not end early."""

    def __init__(self, config, bars: int):
        self.criteria = BarCountCriteria(config, bars)
        eos = config.eos_token_id
        self.eos = eos if isinstance(eos, list) else [eos]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        early = (self.criteria.count(input_ids) <= self.criteria.bars)[:, None]
        scores = scores.clone()
        scores[:, self.eos] = scores[:, self.eos].masked_fill(early, -torch.inf)
        return scores


def _backwards(ids: torch.LongTensor) -> Iterator[int]:
    """The tokens of a row (T,) from the last on; what a step needs is mostly near."""
    for end in range(len(ids), 0, -CHUNK):
        yield from reversed(ids[max(end - CHUNK, 0) : end].tolist())


class NoDoubledNotesLogitsProcessor(LogitsProcessor):
    """Forbids a pitch that the current program already starts at the current position.

    And a program that already starts all its pitches there: after its token no note would be left.

    A MIDI channel has one key per pitch: the first note-off would end both notes. Merged (BPE) tokens that begin with
    another token are not looked into.
    """

    def __init__(self, config):
        grammar = config.grammar
        kinds = [grammar["types"].index(name) for name in ("Bar", "Position", "Program", "Pitch", "PitchDrum")]
        self.first_type = grammar["first_type"]
        self.bar, self.position, self.program, *self.pitches = kinds
        self.pitch_counts = {kind: list(self.first_type).count(kind) for kind in self.pitches}
        self.fewest = min(filter(None, self.pitch_counts.values()))  # a vocabulary may have no PitchDrum

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            notes: list[int] = []
            started: dict[int, list[int]] = {}  # notes of the programs named at this position, the current one first
            for token in _backwards(ids):  # back to the position's beginning
                kind = self.first_type[token]
                if kind in (self.bar, self.position):
                    break
                if kind in self.pitches:
                    notes.append(token)
                elif kind == self.program:
                    started[token] = started.get(token, []) + notes
                    notes = []
            current = next(iter(started), None)
            # Notes before the position's first Program belong to the program it took over.
            if notes and (current is not None or len(notes) >= self.fewest):
                before = self._program_before(ids)
                started[before] = started.get(before, []) + notes
                notes = [] if current is not None else notes
            scores[row, notes + started.get(current, [])] = -torch.inf
            full = [program for program, held in started.items() if len(held) >= self.fewest and self._is_all(held)]
            scores[row, [program for program in full if program is not None]] = -torch.inf
        return scores

    def _program_before(self, ids: torch.LongTensor) -> int | None:
        """The program under which the position began, named before it."""
        started = False
        for token in _backwards(ids):
            kind = self.first_type[token]
            started = started or kind in (self.bar, self.position)
            if started and kind == self.program:
                return token
        return None

    def _is_all(self, notes: list[int]) -> bool:
        """Whether these are all pitches of their kind."""
        return len(set(notes)) == self.pitch_counts[self.first_type[notes[0]]]


__all__ = [
    "BarCountCriteria",
    "MidiGrammarLogitsProcessor",
    "MinBarsLogitsProcessor",
    "NoDoubledNotesLogitsProcessor",
    "PlainLogitsProcessorList",
]
