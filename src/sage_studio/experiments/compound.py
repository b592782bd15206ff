"""Compound tokens ("embedding pooling"): a whole note is one position, the rival of one token per attribute.

**Tokens.** The ids of `SageMusicTokenizer` (REMI+), regrouped without loss: a compound is a row of eight values

    structure  time_signature  position  tempo  program  pitch  velocity  duration

each 0 where that attribute is not stated ("nothing": the same bar, position, tempo or program goes on). `structure` is
a bar line, the line of an empty bar, BOS or EOS. An empty bar, and a tempo without a note, are compounds without a
pitch. Read row by row, left to right, the stated values are the ids again.

**Model.** A stock `LlamaModel`. In: the embeddings of the eight values, nothings included, are added up (as in the
Multitrack Music Transformer, Dong et al. 2023; a concatenation with a linear layer, as in Compound Word, Hsiao et al.
2021, computes a sum of this form too). Out: eight softmaxes on one hidden state, so that the values of a
compound are independent of each other, given the past. That is the price of pooling; a quarter of the positions is
what it buys. The heads are tied to the embeddings, as the flat models' are.

**Nats.** A compound costs the sum of its heads' cross-entropies, less what the values to its left leave no choice in:
a time signature only at a bar line; a tempo only at a stated position; velocity and duration only of a note; nothing
else with BOS, EOS or an empty bar; and a bar's first note has a position for certain. The heads so make up one
probability of the ids (a product in the order of the fields; all that can be said adds up to 1), and nats per note are
comparable with the flat models', which learn these rules from the tokens before. "Nothing" is paid for where something
was possible: there the flat model pays as well, in the choice of its next token's type. Beyond that neither kind of
model has its probabilities restricted to valid music in training or evaluation.

*Known differences* from the cited models: attributes are stated where they change, as in the flat tokens (there:
absolute for every note); there is no family or type field (what is stated says it).

Train one with `python -m sage_studio.experiments.compound`, with the options of `python -m sage_studio.train`.

Shapes: B batch, T compounds, F = 8 fields, V values of all fields together.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel, TrainingArguments
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from sage_music import SageMusicTokenizer
from sage_music.arguments_sage_music import CACHE_NAME, PASSED_THROUGH, check_arguments, one_cache
from sage_music.augmentation import SageMusicAugmentation
from sage_music.data import BlockDataset
from sage_studio.train.arguments import DataArguments, ModelArguments
from sage_studio.train.command import main
from sage_studio.train.parts import BLOCK_SIZE, Parts, config_changes, new_fields, read_pieces

# The fields, in the order in which the tokenizer writes their tokens, and the token types of each.
FIELDS = {
    "structure": ("BOS", "EOS", "Bar"),
    "time_signature": ("TimeSig",),
    "position": ("Position",),
    "tempo": ("Tempo",),
    "program": ("Program",),
    "pitch": ("Pitch", "PitchDrum"),
    "velocity": ("Velocity",),
    "duration": ("Duration",),
}
STRUCTURE, METER, POSITION, TEMPO, PROGRAM, PITCH, VELOCITY, DURATION = range(len(FIELDS))
# Values of `structure`; 0 is "nothing" in every field. An empty bar is its own value: as a bar whose position is
# nothing it would be as likely, at every bar line, as a chord's next note, since the two are drawn independently.
BOS, EOS, BAR, EMPTY_BAR = 1, 2, 3, 4


class CompoundTokens:
    """Between the ids of a `SageMusicTokenizer` and compounds, arrays `(n, 8)` int64.

    Args:
        tokenizer: its `program_changes` may be on or off.

    Attributes:
        sizes: number of values of each field, "nothing" included.
        field_of, value_of: (vocab_size,) field and value of each token id; PAD has field -1.

    Raises:
        ValueError: a BPE vocabulary, whose tokens are no single attributes.
    """

    def __init__(self, tokenizer: SageMusicTokenizer):
        if tokenizer.miditok.is_trained:
            raise ValueError("compound tokens need one attribute per token: use a tokenizer without BPE.")
        self.tokenizer = tokenizer
        types = np.array([text.split("_")[0] for text in tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))])
        self.field_of = np.full(tokenizer.vocab_size, -1)
        self.value_of = np.zeros(tokenizer.vocab_size, np.int64)
        by_field = []
        for field, kinds in enumerate(FIELDS.values()):
            ids = np.concatenate([np.flatnonzero(types == kind) for kind in kinds])
            self.field_of[ids], self.value_of[ids] = field, np.arange(1, len(ids) + 1)
            by_field.append(np.concatenate([[-1], ids]))
        by_field[STRUCTURE] = np.append(by_field[STRUCTURE], by_field[STRUCTURE][BAR])  # EMPTY_BAR: the same token
        self.sizes = [len(ids) for ids in by_field]
        self.ids_of = np.full((len(FIELDS), max(self.sizes)), -1)  # (F, largest size)
        for row, ids in zip(self.ids_of, by_field, strict=True):
            row[: len(ids)] = ids

    def compounds(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, 8) compounds of ids (T,), PAD left out: a new one wherever the order of the fields begins anew.

        Any ids come back from `ids`, complete notes or not.
        """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        ids = ids[self.field_of[ids] >= 0]
        field, value = self.field_of[ids], self.value_of[ids]
        special = (field == STRUCTURE) & (value != BAR)
        begins = np.ones(len(ids), bool)
        begins[1:] = (field[1:] <= field[:-1]) | special[:-1]
        rows = np.cumsum(begins) - 1
        compounds = np.zeros((int(begins.sum()), len(FIELDS)), np.int64)
        compounds[rows, field] = value
        compounds[(compounds[:, STRUCTURE] == BAR) & (compounds[:, POSITION] == 0), STRUCTURE] = EMPTY_BAR
        return compounds

    def ids(self, compounds: np.ndarray) -> list[int]:
        """Token ids of compounds (n, 8), in the tokenizer's order.

        Raises:
            ValueError: not (n, 8), or a value outside its field.
        """
        compounds = np.asarray(compounds)
        if compounds.ndim != 2 or compounds.shape[1] != len(FIELDS):
            raise ValueError(f"compounds have the shape (n, {len(FIELDS)}), not {compounds.shape}.")
        if ((compounds < 0) | (compounds >= self.sizes)).any():
            raise ValueError(f"a value of the compounds is outside its field; the fields have {self.sizes} values.")
        rows, field = np.nonzero(compounds)
        return self.ids_of[field, compounds[rows, field]].tolist()

    def labels(self, compounds: np.ndarray) -> np.ndarray:
        """(n, 8) what a model pays for: the values, and -100 where nothing else was possible (see the module)."""
        structure, stated = compounds[:, STRUCTURE], compounds > 0
        bar_line = (structure == BAR) | (structure == EMPTY_BAR)
        music, note = (structure == 0) | (structure == BAR), stated[:, PITCH]
        always = np.ones(len(compounds), bool)
        paid = np.stack([always, bar_line, music, stated[:, POSITION], music, music, note, note], axis=1)
        return np.where(paid | stated, compounds, -100)

    def config_fields(self) -> dict:
        """Keyword arguments for `CompoundMusicConfig`."""
        return {"field_sizes": self.sizes, "grammar": self.tokenizer.config_fields()["grammar"]}


@strict
class CompoundMusicConfig(LlamaConfig):
    """Configuration of [`CompoundMusicForCausalLM`]: Llama's, with the defaults of `SageMusicConfig`.

    field_sizes: values of each field; `vocab_size` is their sum.
    grammar: data per token id, as in `SageMusicConfig` (composition counts bars and notes with it).
    max_position_embeddings: context length, counted in the tokens that would spell the compounds one attribute at a
        time, so that a compound model hears as much music as a flat one of the same number.

    Raises:
        ValueError: `field_sizes` does not have eight fields.
    """

    model_type = "compound_music"

    field_sizes: list[int] | None = None
    grammar: dict | None = None
    hidden_size: int = 320
    intermediate_size: int = 864
    num_hidden_layers: int = 5
    num_attention_heads: int = 10
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.field_sizes = self.field_sizes or [5] + [2] * (len(FIELDS) - 1)
        if len(self.field_sizes) != len(FIELDS):
            raise ValueError(f"field_sizes has {len(self.field_sizes)} entries, but compounds have {len(FIELDS)}.")
        self.vocab_size = sum(self.field_sizes)
        super().__post_init__(**kwargs)

    @property
    def field_slices(self) -> list[slice]:
        """Where each field's values are in the embedding table and in the logits."""
        ends = np.cumsum(self.field_sizes).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.field_sizes, strict=True)]


class CompoundMusicForCausalLM(LlamaPreTrainedModel):
    """A stock `LlamaModel` over sums of eight embeddings, with eight softmaxes on its last hidden state."""

    config: CompoundMusicConfig
    config_class = CompoundMusicConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (variable of the base class)
    # The loss is a mean over values paid for; `Trainer`'s own count would be one over (B, T) labels.
    accepts_loss_kwargs = False

    def __init__(self, config: CompoundMusicConfig):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int = 0,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids: (B, T, 8) compounds. Padding goes on the right and needs no mask.
            attention_mask, position_ids, cache (or past_key_values), use_cache: as in Llama, of compounds.
            labels: (B, T, 8), not shifted; -100: not counted (`CompoundTokens.labels`).
            logits_to_keep: compute the logits of the last so many compounds only (0: of all).

        Returns:
            logits (B, T, V), cut into fields by `config.field_slices`, and, with labels, the loss: mean nats of the
            values paid for. (Per value, not per compound: gradients are then of a flat model's size, whose loss is per
            token, and one learning rate and clipping norm suit both.)

        Raises:
            TypeError: an argument that no model knows (`PASSED_THROUGH`).
            ValueError: input_ids that are not (B, T, 8).
        """
        check_arguments(self, kwargs, PASSED_THROUGH)
        if input_ids.ndim != 3 or input_ids.shape[-1] != len(FIELDS):
            raise ValueError(f"input_ids have the shape (B, T, {len(FIELDS)}), not {tuple(input_ids.shape)}.")
        starts = torch.tensor([part.start for part in self.config.field_slices], device=input_ids.device)
        outputs = self.model(
            inputs_embeds=self.model.embed_tokens(input_ids + starts).sum(dim=2),  # (B, T, hidden_size)
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE_NAME: one_cache(cache, past_key_values)},
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.sum_of_nats(logits, labels).sum() / (labels[:, 1:] != -100).sum().clamp(min=1)
        return CausalLMOutputWithPast(loss, logits, getattr(outputs, CACHE_NAME))

    def sum_of_nats(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B,) nats of each row: all fields of all compounds but the first, of logits (B, T, V), labels (B, T, 8)."""
        total = logits.new_zeros(len(logits), dtype=torch.float)
        for field, part in enumerate(self.config.field_slices):
            scores = logits[:, :-1, part].float().transpose(1, 2)  # (B, size, T - 1)
            if field == POSITION:
                nothing = torch.arange(scores.shape[1], device=scores.device)[None, :, None] == 0
                scores = scores.masked_fill(nothing & (labels[:, None, 1:, STRUCTURE] == BAR), -torch.inf)
            losses = F.cross_entropy(scores, labels[:, 1:, field], ignore_index=-100, reduction="none")
            total = total + losses.sum(-1)
        return total


# ---- training


class CompoundBlockDataset(Dataset):
    """The blocks of a `BlockDataset`, cropped and transposed there, as compounds: a step sees the same music.

    A block's last compound is left out, as the block may end inside it; of EOS nothing can be missing. Pieces in a
    block do not see each other: their `position_ids` begin anew.

    Items: `input_ids` and `labels`, each (n, 8) int64, `position_ids` (n,), n differing; `collate` pads them.
    """

    def __init__(self, blocks: BlockDataset, tokenizer: SageMusicTokenizer):
        self.blocks, self.tokens = blocks, CompoundTokens(tokenizer)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        compounds = self.tokens.compounds(self.blocks[index]["input_ids"].numpy())
        compounds = compounds if compounds[-1, STRUCTURE] == EOS else compounds[:-1]
        item, begins = _item(self.tokens, compounds), compounds[:, STRUCTURE] == BOS
        item["labels"][torch.from_numpy(begins)] = -100  # that another piece follows is no music
        starts = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
        return {**item, "position_ids": torch.from_numpy(np.arange(len(begins)) - starts)}

    def set_epoch(self, epoch: int) -> None:
        """Crops and order of that epoch."""
        self.blocks.set_epoch(epoch)


class CompoundWindowDataset(Dataset):
    """Evaluation windows: every compound of a piece predicted exactly once, in windows that restart at BOS.

    Args:
        pieces: arrays of token ids, `BOS ... EOS` each.
        tokenizer: the tokenizer that made them.
        block_size: tokens that the compounds of a window would take one by one, at most: as much music as a window of
            `WindowDataset` holds.

    `num_tokens` (of the flat kind) and `num_notes` count what is predicted, as in `WindowDataset`.

    Raises:
        ValueError: a block too small for one compound and BOS.
    """

    def __init__(self, pieces: Sequence[np.ndarray], tokenizer: SageMusicTokenizer, block_size: int):
        self.tokens = CompoundTokens(tokenizer)
        self.windows: list[np.ndarray] = []
        self.num_tokens = self.num_notes = 0
        if block_size < len(FIELDS) + 1:
            raise ValueError(
                f"block_size {block_size} is too small: a compound may take {len(FIELDS)} tokens after BOS."
            )
        for piece in pieces:
            compounds = self.tokens.compounds(piece)
            ends = np.cumsum((compounds > 0).sum(1))  # tokens up to and with each compound
            start = 1
            while start < len(compounds):
                stop = int(np.searchsorted(ends, ends[start - 1] + block_size - 1, side="right"))
                self.windows.append(np.concatenate([compounds[:1], compounds[start:stop]]))
                start = stop
            self.num_tokens += len(piece) - 1
            self.num_notes += int((compounds[:, PITCH] > 0).sum())

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return _item(self.tokens, self.windows[index])


def _item(tokens: CompoundTokens, compounds: np.ndarray) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(compounds), "labels": torch.from_numpy(tokens.labels(compounds))}


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch (B, T, 8) of compounds, padded on the right with nothings and labels of -100."""
    return {
        name: pad_sequence(
            [item[name] for item in items], batch_first=True, padding_value=-100 if name == "labels" else 0
        )
        for name in items[0]
    }


def compound_parts(options: ModelArguments, data: DataArguments, args: TrainingArguments) -> Parts:
    """What training needs of a compound model, from the options of `sage_studio.train` for SAGE-Music.

    `--model` is a compound checkpoint, or a .json file with fields of `CompoundMusicConfig`; fields of other models in
    it are passed over. `--block_size` and `max_position_embeddings` count flat tokens. Nats of a batch come from the
    model's own `sum_of_nats`.

    Raises:
        ValueError: an option that compound models do not have.
    """
    changes, is_new = config_changes(options), options.model.endswith(".json")
    fields_given = {**(new_fields(options.model) if is_new else {}), **changes}
    if fields_given.get("kv_routing", "none") != "none" or options.draft_tokens is not None:
        raise ValueError("a compound model has neither attribute heads (kv_routing) nor a draft head.")
    source = options.tokenizer or (None if is_new else options.model)
    tokenizer = SageMusicTokenizer.from_pretrained(source) if source else SageMusicTokenizer()
    if is_new:
        known = {field.name for field in fields(CompoundMusicConfig)}
        shape = {name: value for name, value in fields_given.items() if name in known and name != "model_type"}
        model = CompoundMusicForCausalLM(CompoundMusicConfig(**CompoundTokens(tokenizer).config_fields(), **shape))
    else:
        model = CompoundMusicForCausalLM.from_pretrained(options.model, **changes)
    pieces, held_out, found = read_pieces(data, tokenizer, args)
    size = data.block_size or BLOCK_SIZE
    augment = SageMusicAugmentation(tokenizer, data.transpose) if data.transpose else None
    blocks = BlockDataset(pieces, tokenizer, size, augment, args.seed, pieces.lengths)
    windows = CompoundWindowDataset(held_out, tokenizer, size)
    return Parts(tokenizer, model, CompoundBlockDataset(blocks, tokenizer), windows, collate, found)


if __name__ == "__main__":
    sys.exit(main(parts=compound_parts))
