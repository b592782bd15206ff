"""Attention of SAGE-Music: attribute-specialized key-value heads, in token order, compacted by attribute, and cached.

Attribute-specialized key-value head sharing (SAGE-Music, arXiv 2510.00395): a token of attribute `a` has one small set
of keys and values, projected by `a`'s own weights, and all query heads share them. The cache holds `h` heads for a
token instead of `H`.

Shapes: B batch, T query tokens, H query heads, A attributes, h key-value heads per attribute, d channels per head,
S stored rows of the longest attribute, G query heads of one key-value head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .arguments_sage_music import CACHE_NAME, is_paged
from .cache_sage_music import HIDDEN, AttributeRoute
from .configuration_sage_music import SageMusicConfig

# Queries scored at a time in a prefill or training pass: a block reads only the rows stored up to its last token.
QUERY_BLOCK = 512
# The same where a row holds several sequences: a block begins to read where its first token's sequence begins, and the
# shorter the block, the less it reads of sequences that are over.
PACKED_BLOCK = 256
# Up to so many tokens at a time a decode step saves operations rather than arithmetic.
FEW_TOKENS = 16


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `(B, T, heads, d)` by tables `(B, T, 1, d)`; channel pairs are `(i, i + d/2)`, as in Llama.

    The first half of `sin` is negative: then rolling by `d/2` is all the turning there is.
    """
    if cos.dtype != states.dtype:  # autocast: stay in its dtype
        cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def norm_heads(states: torch.Tensor, norm: nn.RMSNorm | None) -> torch.Tensor:
    """Each head's channels (..., d) normed, in their own dtype, which autocast may have chosen; no norm: unchanged."""
    if norm is None:
        return states
    # Called as a module, of which a serving engine has its own, and in the dtype of its weight.
    return norm(states.to(norm.weight.dtype)).to(states.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Reference attention. query (B, H, T, d), key and value (B, h, S, d), additive mask; returns (B, T, H, d)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


@dataclass
class AttributePlan:
    """What one forward pass computes once and every layer reads.

    Attributes:
        attribute_ids: (B, T) attribute of each token.
        attribute: the attribute of a lone token (B = T = 1), `None` otherwise and where it is not on the host.
        order, sizes: tokens of the flattened batch sorted by attribute, and how many each attribute has, so that each
            token is projected once; `None` for a few tokens and under `torch.compile`.
        route: rows of new tokens in a compacted cache that already holds some; `None` without one.
        gather: (B, A, S) prefill: positions of each attribute's tokens; rows past their number point anywhere. For
            packed rows, what each block reads, block after block.
        blocks: prefill: per block of queries its slice, the slice of the rows it may see, their visibility
            (B, A, T_block, rows), and whether a token must read itself separately, (B, A, T_block), because the
            attribute's rows do not hold it. `None` where `mask` is used instead.
        mask: the mask of the attention interface.
        varlen: what tells FlashAttention, which takes no such mask, where packed sequences begin.
    """

    attribute_ids: torch.Tensor | None
    attribute: int | None = None
    order: torch.Tensor | None = None
    sizes: list[int] | None = None
    route: AttributeRoute | None = None
    gather: torch.Tensor | None = None
    blocks: list[tuple[slice, slice, torch.Tensor, torch.Tensor]] | None = None
    mask: torch.Tensor | None = None
    varlen: dict = field(default_factory=dict)
    _biases: dict[torch.dtype, list[torch.Tensor]] = field(default_factory=dict)

    def biases(self, dtype: torch.dtype, kv_heads: int) -> list[torch.Tensor]:
        """Per block the additive mask (B, A * h, T_block, rows); made once, in the dtype the layers compute in."""
        if dtype not in self._biases:
            biases = [torch.zeros_like(v, dtype=dtype).masked_fill_(~v, HIDDEN) for _, _, v, _ in self.blocks]
            if kv_heads > 1:
                biases = [bias.repeat_interleave(kv_heads, dim=1) for bias in biases]
            self._biases[dtype] = biases
        return self._biases[dtype]


def packed_sequences(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """(B or 1, T) which sequence of its row each token belongs to, or `None` where every row is one sequence.

    Transformers' convention: without an `attention_mask`, a step of `position_ids` (B or 1, T) other than +1 begins a
    new sequence. `torch.compile` cannot ask for the values, so there the answer is never `None` without a mask.

    Raises:
        ValueError: positions restart between two tokens that `attention_mask` (B, tokens) shows.
    """
    if attention_mask is None:
        return find_packed_sequence_indices(position_ids)
    length = position_ids.shape[1]
    if attention_mask.ndim == 2 and length > 1 and not torch.compiler.is_compiling():
        shown = attention_mask[:, -length:] != 0
        if ((position_ids.diff(dim=-1) <= 0) & shown[:, 1:] & shown[:, :-1]).any():
            raise ValueError(
                "position_ids restart in the middle of a row, so it holds several sequences: pass such rows without "
                "attention_mask (padding at a row's end is one more sequence, with labels of -100)."
            )
    return None


def sequence_starts(sequences: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: which tokens are the first of their sequence, of the numbers (B, T) of `packed_sequences`."""
    return F.pad(sequences.diff(dim=-1) != 0, (1, 0), value=True)


def varlen_arguments(sequences: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """What FlashAttention's interface takes for the sequences (B, T) of a batch, laid end to end."""
    starts = sequence_starts(sequences).flatten()
    ends = F.pad(starts.nonzero().flatten(), (0, 1), value=len(starts)).int()
    longest = int(ends.diff().max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def check_attention(config) -> None:
    """
    Raises:
        ValueError: `kv_routing="head"` with an attention implementation that cannot run it.
    """
    implementation = config._attn_implementation
    if config.kv_routing == "head" and implementation not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"kv_routing='head' runs with attn_implementation 'sdpa', 'eager' or 'flex_attention', not "
            f"{implementation!r}: its mask differs from head to head. A model with kv_routing='token' runs with any."
        )


def plan_prefill(
    config,
    plan: AttributePlan,
    codes: torch.Tensor,
    dtype: torch.dtype,
    keep: bool,
    sequences: torch.Tensor | None = None,
) -> None:
    """Fill in the rows and masks of a `kv_routing="head"` pass with nothing stored before it.

    Args:
        codes: (B, T) as for `SageMusicCache.route`.
        dtype: of the mask that the attention interface gets.
        keep: find the rows even where attention does not need them, because a cache will take them over.
        sequences: (B, T) of `packed_sequences`: a token then reads only its own sequence. No cache takes such rows.
    """
    device, length = codes.device, codes.shape[1]
    implementation = config._attn_implementation
    attributes = torch.arange(config.num_attributes, device=device)
    members = (codes[:, None] == attributes[:, None]) | (codes[:, None] >= config.num_attributes)  # (B, A, T)
    tokens = torch.arange(length, device=device)
    compact = implementation == "sdpa" and not torch.compiler.is_compiling()
    if compact or keep:
        counts = members.cumsum(-1)
        longest = max(int(counts[..., -1].max()), 1)
        # Tokens of other attributes all land in the column after the last, which is cut off.
        gather = counts.new_zeros(*counts.shape[:2], longest + 1)
        gather.scatter_(2, torch.where(members, counts - 1, longest), tokens.expand_as(counts))
        plan.gather = gather[..., :longest]
    if compact and sequences is not None:
        _plan_packed_blocks(plan, members, counts, sequences)
        return
    if compact:
        plan.blocks = []
        for start in range(0, length, QUERY_BLOCK):
            part = slice(start, start + QUERY_BLOCK)
            rows = max(int(counts[..., part].max()), 1)
            visible = torch.arange(rows, device=device) < counts[:, :, part, None]
            plan.blocks.append((part, slice(rows), visible, ~members[:, :, part]))
        return

    sizes = config.query_heads_per_attribute
    check_attention(config)
    group_of = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)], device=device)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        def reads(b, h, q, kv):
            earlier = (kv <= q) & members[b, group_of[h], kv]
            if sequences is not None:
                earlier = earlier & (sequences[b, q] == sequences[b, kv])
            return earlier | (kv == q)

        plan.mask = create_block_mask(reads, codes.shape[0], len(group_of), length, length, device=device)
    else:
        causal = tokens[:, None] >= tokens
        if sequences is not None:
            causal = (causal & (sequences[:, :, None] == sequences[:, None]))[:, None]
        visible = (members[:, :, None] & causal) | (tokens[:, None] == tokens)  # (B, A, T, T)
        bias = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        plan.mask = bias[:, group_of]


def _plan_packed_blocks(plan, members, counts, sequences) -> None:
    """`plan.gather` and `plan.blocks` of packed rows: a block reads from where its first token's sequence begins.

    A sequence's tokens lie side by side in the rows of every attribute, from the number of rows before the sequence to
    the number up to the token. members, counts (B, A, T): whose rows hold a token, and how many they are up to it.
    """
    length, device = sequences.shape[1], sequences.device
    tokens = torch.arange(length, device=device)
    start = torch.where(sequence_starts(sequences), tokens, 0).cummax(-1).values  # (B, T)
    first = (counts - members.long()).gather(2, start[:, None].expand_as(counts))  # (B, A, T) rows before the sequence
    begins = list(range(0, length, PACKED_BLOCK))
    last = torch.tensor([*begins[1:], length], device=device) - 1
    widths = (counts[..., last] - first[..., begins]).amax((0, 1)).clamp(min=1).tolist()
    gathers, plan.blocks, stored = [], [], 0
    for begin, width in zip(begins, widths, strict=True):
        part = slice(begin, begin + PACKED_BLOCK)
        rows = first[:, :, begin, None] + torch.arange(width, device=device)  # (B, A, width)
        gathers.append(plan.gather.gather(2, rows.clamp(max=plan.gather.shape[2] - 1)))
        visible = (rows[:, :, None] >= first[:, :, part, None]) & (rows[:, :, None] < counts[:, :, part, None])
        plan.blocks.append((part, slice(stored, stored + width), visible, ~members[:, :, part]))
        stored += width
    plan.gather = torch.cat(gathers, dim=2)


class SageMusicAttention(nn.Module):
    """Causal attention by `config.kv_routing`; hidden states (B, T, hidden_size) in and out.

    Three ways through, one result: the attention interface in token order (`"token"`, the controls, and `"head"` under
    eager, flex or `torch.compile`); compacted rows of a prefill; and rows of a cache that already holds some.
    """

    def __init__(self, config: SageMusicConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        # What the attention interfaces repeat keys by; routed heads come with their keys already in place.
        self.num_key_value_groups = 1 if config.kv_routing == "head" else self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=config.attention_bias)
        # (A, 2 * h * d, hidden_size): attribute a's keys, then its values; kv_bias (A, 2 * h * d) likewise.
        kv_width = 2 * self.num_key_value_heads * self.head_dim
        self.kv_weight = nn.Parameter(torch.empty(config.num_attributes, kv_width, config.hidden_size))
        self.kv_bias = nn.Parameter(torch.empty(config.num_attributes, kv_width)) if config.attention_bias else None
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_output_bias)
        # One norm for all heads and attributes.
        self.q_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.fold = _HeadFold(config) if config.kv_routing == "head" else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: AttributePlan,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch, length, self.num_heads, self.head_dim)
        query = norm_heads(query, self.q_norm)
        key, value = self.project_kv(hidden_states, plan).unbind(2)  # (B, T, h, d)
        query = apply_rotary(query, *position_embeddings).transpose(1, 2)
        key, value = apply_rotary(key, *position_embeddings).transpose(1, 2), value.transpose(1, 2)  # (B, h, T, d)

        output = weights = None
        if plan.route is not None:
            key, value = cache.update(key, value, self.layer_idx, plan.route)
            output = self._attend_rows(query, key, value, plan.route)
        elif self.fold is not None:
            if plan.gather is not None:
                rows, kept = self._compact(key, plan.gather), self._compact(value, plan.gather)
            if cache is not None:
                cache.layers[self.layer_idx].fill(torch.stack((rows, kept)))
            if plan.blocks is not None:
                output = self._attend_compact(query, rows, kept, key, value, plan)
            else:
                key, value = key[:, self.fold.kv_heads], value[:, self.fold.kv_heads]
        elif is_paged(cache):
            if CACHE_NAME == "cache":
                key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            else:  # before 5.24 the attention interface writes the pages
                kwargs["cache"] = cache
        elif cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if output is None:
            # Written out here, once: engines that bring their own attention look for this call in `forward`.
            attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, weights = attention(
                self,
                query,
                key,
                value,
                plan.mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **{**plan.varlen, **kwargs},
            )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def project_kv(self, hidden_states: torch.Tensor, plan: AttributePlan) -> torch.Tensor:
        """(B, T, 2, h, d) keys, not yet rotated, and values, by each token's own attribute."""
        batch, length, width = hidden_states.shape
        if self.kv_weight.shape[0] == 1:
            states = F.linear(hidden_states, self.kv_weight[0])
        elif plan.order is not None:
            parts = hidden_states.reshape(-1, width)[plan.order].split(plan.sizes)
            states = torch.cat([F.linear(part, weight) for part, weight in zip(parts, self.kv_weight, strict=True)])
            inverse = torch.empty_like(plan.order)
            inverse[plan.order] = torch.arange(len(plan.order), device=plan.order.device)
            states = states[inverse].view(batch, length, -1)
        elif plan.attribute is not None:
            states = F.linear(hidden_states, self.kv_weight[plan.attribute])
        elif batch * length == 1:
            states = F.linear(hidden_states, self.kv_weight.index_select(0, plan.attribute_ids.view(1))[0])
        else:
            every = F.linear(hidden_states, self.kv_weight.flatten(0, 1)).view(batch, length, len(self.kv_weight), -1)
            states = every.gather(2, plan.attribute_ids[..., None, None].expand(-1, -1, 1, every.shape[-1]))[:, :, 0]
        if self.kv_bias is not None:
            added = self.kv_bias.to(states.dtype)
            states = states + (added[0] if len(added) == 1 else F.embedding(plan.attribute_ids, added))
        states = states.view(batch, length, 2, self.num_key_value_heads, self.head_dim)
        if self.k_norm is not None:
            key, value = states.unbind(2)
            states = torch.stack((norm_heads(key, self.k_norm), value), dim=2)
        return states

    @staticmethod
    def _compact(states: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
        """(B, h, T, d) in token order to (B, A * h, S, d), each attribute's rows together."""
        _, heads, _, width = states.shape
        index = gather[:, :, None, :, None].expand(-1, -1, heads, -1, width)
        return states[:, None].expand(-1, gather.shape[1], -1, -1, -1).gather(3, index).flatten(1, 2)

    def _attend_rows(self, query, key, value, route):
        """Attention of new tokens over the compacted cache: key and value (B, A * h, S, d)."""
        batch, _, length, width = query.shape
        folded = self.fold.fold(query)  # (B, A * h, G, T, d): a group's heads share its keys
        groups = folded.shape[2]
        if length <= FEW_TOKENS and query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
            # Two products beat the CPU's fused kernel where there are so few scores. In half precision they would be
            # rounded on the way.
            bias = route.bias(self.num_key_value_heads, groups, query.dtype)
            key, value = key.flatten(0, 1), value.flatten(0, 1)
            scores = torch.baddbmm(
                bias, folded.reshape(len(key), groups * length, width), key.transpose(1, 2), alpha=self.scaling
            )
            output = torch.bmm(scores.softmax(-1), value)
            return self.fold.unfold(output.view(folded.shape)).transpose(1, 2)
        mask = route.visible
        if self.num_key_value_heads > 1:
            mask = mask.repeat_interleave(self.num_key_value_heads, dim=1)
        if length > 1:
            mask = mask.repeat(1, 1, groups, 1)
        output = F.scaled_dot_product_attention(
            folded.reshape(batch, -1, groups * length, width), key, value, attn_mask=mask, scale=self.scaling
        )
        return self.fold.unfold(output.view(folded.shape)).transpose(1, 2)

    def _attend_compact(self, query, key, value, own_key, own_value, plan):
        """Prefill and training over compacted rows: about `1 / A` of the scores of full attention.

        key, value (B, A * h, S, d) hold each attribute's rows; own_key, own_value (B, h, T, d) are what a token of
        another attribute reads of itself.
        """
        dropout = self.attention_dropout if self.training else 0.0
        fused = query.device.type == "cpu" and not dropout
        folded = self.fold.fold(query)  # (B, A * h, G, T, d)
        own_key, own_value = (states.repeat(1, self.config.num_attributes, 1, 1) for states in (own_key, own_value))
        biases = plan.biases(query.dtype, self.num_key_value_heads)
        outputs = []
        for (part, rows, _, own), bias in zip(plan.blocks, biases, strict=True):
            if self.num_key_value_heads > 1:
                own = own.repeat_interleave(self.num_key_value_heads, dim=1)
            states = (key[:, :, rows], value[:, :, rows], own_key[:, :, part], own_value[:, :, part])
            heads = [
                CompactAttention.apply(folded[:, :, group, part], *states, own, bias, self.scaling)
                if fused
                else compact_attention(folded[:, :, group, part], *states, own, bias, self.scaling, dropout)
                for group in range(folded.shape[2])
            ]
            outputs.append(torch.stack(heads, dim=2))
        return self.fold.unfold(torch.cat(outputs, dim=3)).transpose(1, 2)


def compact_attention(query, key, value, own_key, own_value, own, bias, scaling, dropout=0.0):
    """Softmax attention over shared rows and, where `own`, the token itself, in plain operations.

    query, own_key, own_value (B, R, T, d); key, value (B, R, S, d); own (B, R, T) bool; bias (B, R, T, S).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling + bias
    own_scores = ((query * own_key).sum(-1, keepdim=True) * scaling).masked_fill(~own[..., None], HIDDEN)
    weights = F.softmax(torch.cat([scores, own_scores], dim=-1), dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout)
    return torch.matmul(weights[..., :-1], value) + weights[..., -1:] * own_value


class CompactAttention(torch.autograd.Function):
    """`compact_attention` on the CPU's fused kernel, which keeps no scores.

    The kernel attends the shared rows and returns the log-sum-exp of their scores; the token itself joins by
    `lse' = logaddexp(lse, own_score)`. The kernel's backward pass recomputes the weights as `exp(score - lse')` from
    whatever log-sum-exp and output it is given: with the merged ones its gradients are exact.
    """

    @staticmethod
    def forward(ctx, query, key, value, own_key, own_value, own, bias, scaling):
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scaling
        )
        own_scores = ((query * own_key).sum(-1).float() * scaling).masked_fill_(~own, HIDDEN)
        total = torch.logaddexp(lse, own_scores)
        own_weights = (own_scores - total).exp_().to(query.dtype)
        output = output * (lse - total).exp_().to(query.dtype)[..., None] + own_weights[..., None] * own_value
        ctx.save_for_backward(query, key, value, own_key, own_value, bias, output, total, own_weights)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, own_key, own_value, bias, output, total, own_weights = ctx.saved_tensors
        grad = grad.contiguous()
        d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, total, 0.0, False, attn_mask=bias, scale=ctx.scaling
        )
        d_scores = own_weights * (grad * (own_value - output)).sum(-1) * ctx.scaling
        d_query += d_scores[..., None] * own_key
        return d_query, d_key, d_value, d_scores[..., None] * query, own_weights[..., None] * grad, None, None, None


class _HeadFold:
    """Puts each key-value head's query heads on an axis of their own; groups of unequal size are padded by a repeat."""

    def __init__(self, config: SageMusicConfig):
        kv_heads = config.num_key_value_heads
        members, start = [], 0
        for size in config.query_heads_per_attribute:
            per_kv = size // kv_heads
            members += [list(range(start + j * per_kv, start + (j + 1) * per_kv)) for j in range(kv_heads)]
            start += size
        self.kv_heads = [row % kv_heads for row, heads in enumerate(members) for _ in heads]  # each query head's
        self.rows, self.width = len(members), max(map(len, members))
        self.even = all(len(heads) == self.width for heads in members)
        self.take = [heads[min(i, len(heads) - 1)] for heads in members for i in range(self.width)]
        self.put = [row * self.width + i for row, heads in enumerate(members) for i in range(len(heads))]

    def fold(self, query: torch.Tensor) -> torch.Tensor:
        """(B, H, T, d) to (B, A * h, G, T, d)."""
        if not self.even:
            query = query[:, self.take]
        return query.reshape(query.shape[0], self.rows, self.width, *query.shape[2:])

    def unfold(self, output: torch.Tensor) -> torch.Tensor:
        """(B, A * h, G, T, d) to (B, H, T, d)."""
        output = output.flatten(1, 2)
        return output if self.even else output[:, self.put]


__all__ = [
    "AttributePlan",
    "SageMusicAttention",
    "check_attention",
    "norm_heads",
    "packed_sequences",
    "plan_prefill",
    "varlen_arguments",
]
