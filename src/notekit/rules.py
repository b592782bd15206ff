"""What a piece of SAGE-Music may hold: the instruments, meters and tempos that its prompt or its user allows."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LogitsProcessor


class LeaveProgram(LogitsProcessor):
    """No note until the sequence has left a program that must not be used (Program tokens on change only).

    Args:
        forbidden: ids that must not be used, for each row.
    """

    def __init__(self, config, forbidden: Sequence[Sequence[int]]):
        changes = np.array(config.grammar["drum_after"]) != -2
        self.programs = set(np.flatnonzero(changes).tolist()) - {config.bos_token_id}
        self.forbidden = [self.programs & set(ids) for ids in forbidden]
        self.notes = torch.tensor(config.grammar["drum_needed"]) >= 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for row, forbidden in enumerate(self.forbidden):
            if not forbidden:
                continue
            current = next((token for token in reversed(input_ids[row].tolist()) if token in self.programs), None)
            if current in forbidden:
                scores = scores.clone()
                scores[row] = scores[row].masked_fill(self.notes.to(scores.device), -torch.inf)
        return scores


def program_tokens(programs: list[int]) -> set[str]:
    """Tokens of General MIDI programs (-1: drums).

    Raises:
        ValueError: one that there is not, or none at all.
    """
    wrong = [program for program in programs if not -1 <= program <= 127]
    if wrong or not programs:
        raise ValueError(f"programs are 0-127, or -1 for drums; got {wrong or 'none'}.")
    return {f"Program_{program}" for program in programs}


def forbidden_ids(tokenizer, allowed: dict[str, set[str]]) -> list[int]:
    """Ids with a base token of one of the kinds in `allowed` that is not among the allowed ones."""

    def wrong(token: str) -> bool:
        kind = token.split("_")[0]
        return kind in allowed and token not in allowed[kind]

    return [i for i in range(tokenizer.vocab_size) if any(map(wrong, tokenizer.base_tokens([i])))]
