"""Decoding aids of SAGE-Music: the grammar that keeps every sequence valid, and generation counted in bars."""

import torch
from transformers import LogitsProcessor, StoppingCriteria

UNCHANGED = -2


class MidiGrammarLogitsProcessor(LogitsProcessor):
    """Leaves only tokens after which the sequence still decodes to MIDI with nothing dropped.

    A token may follow when (1) the types table allows its first base token after the last base token before it, (2) its
    first Position lies after the current one and inside the bar of the current meter, and (3) its first note is a drum
    exactly when the current Program is the drums'. The state is read from the ids themselves, so that batches, beams
    and assisted decoding need nothing special.

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

    def _latest(self, name: str, input_ids: torch.LongTensor, default: int) -> torch.Tensor:
        """(B, 1): what the last token that changed this piece of state left."""
        values = self.fields[name][input_ids]  # (B, T)
        steps = torch.arange(1, values.shape[1] + 1, device=values.device)
        last = (steps * (values != UNCHANGED)).amax(-1, keepdim=True)
        return torch.where(last > 0, values.gather(1, (last - 1).clamp(min=0)), default)

    def allowed(self, input_ids: torch.LongTensor) -> torch.BoolTensor:
        """(B, V) bool: tokens that may follow `input_ids` (B, T)."""
        if self.follows.device != input_ids.device:
            self.follows = self.follows.to(input_ids.device)
            self.fields = {name: values.to(input_ids.device) for name, values in self.fields.items()}
        allowed = self.follows[self.fields["last_type"][input_ids[:, -1]]]
        position = self._latest("position_after", input_ids, -1)
        bar_length = self._latest("bar_length_after", input_ids, 2**30)
        drum = self._latest("drum_after", input_ids, -1)
        first, needed = self.fields["first_position"], self.fields["drum_needed"]
        in_bar = (first < 0) | ((first > position) & (self.fields["last_position"] < bar_length))
        return allowed & in_bar & ((needed < 0) | (needed == drum))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] == 0:  # generation from inputs_embeds: nothing is known of what came before
            return scores
        return scores.masked_fill(~self.allowed(input_ids), -torch.inf)


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


class NoDoubledNotesLogitsProcessor(LogitsProcessor):
    """Forbids a pitch that the current program already starts at the current position.

    A MIDI channel has one key per pitch: the first note-off would end both notes. Merged (BPE) tokens that begin with
    another token are not looked into.
    """

    def __init__(self, config):
        grammar = config.grammar
        kinds = [grammar["types"].index(name) for name in ("Bar", "Position", "Program", "Pitch", "PitchDrum")]
        self.first_type = grammar["first_type"]
        self.bar, self.position, self.program, *self.pitches = kinds

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            program, notes, seen = None, [], []
            for token in reversed(ids):  # back to the position's beginning; the latest Program is the current one
                kind = self.first_type[token]
                if kind in (self.bar, self.position):
                    break
                if kind in self.pitches:
                    notes.append(token)
                elif kind == self.program:
                    program = token if program is None else program
                    seen += notes if token == program else []
                    notes = []
            # Notes before the position's first Program belong to the program it took over.
            seen += notes if program is None or self._program_before(ids, program) else []
            scores[row, seen] = -torch.inf
        return scores

    def _program_before(self, ids: list[int], program: int) -> bool:
        """Whether the position began under `program`, named before it."""
        started = False
        for token in reversed(ids):
            kind = self.first_type[token]
            started = started or kind in (self.bar, self.position)
            if started and kind == self.program:
                return token == program
        return False


__all__ = [
    "BarCountCriteria",
    "MidiGrammarLogitsProcessor",
    "MinBarsLogitsProcessor",
    "NoDoubledNotesLogitsProcessor",
]
