"""Attention of PerceiverS: which keys a latent sees, cross-attention at one scale, and self-attention over the latents.

Perceiver AR (Hawthorne et al. 2022) lets the last N positions of a context attend all M of it; PerceiverS (arXiv
2411.08307) cascades several such layers, each with a scale of its own. No mask of M x M or H x N x M elements is ever
made: the keys before the first latent need none, those of the latents themselves are plainly causal, and the two parts
are merged by their log-sum-exps; a sliding scale is cut into blocks of queries that share one small mask.

Shapes: B batch, n latents, m columns of the context, H heads, d channels per head, r rotated channels. A column is an
index into the batch's padded rows; a position counts from a row's first token that is not padding.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import and_masks, causal_mask_function, flex_attention_mask, sliding_window_overlay
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_perceivers import PerceiverSConfig

# Queries of a sliding scale that are scored at a time: a block reads W - 1 keys before it, its own, and none besides.
QUERY_BLOCK = 256
# Added to the scores of padding, and of keys that come later or lie outside a scale. Finite, and within float16:
# padding among the latents, which may see no key at all, then reads padding before it, not the future, and is not NaN.
PADDING, HIDDEN = -3e4, -6e4


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first r channels of `(B, heads, n, d)` by tables `(B, n, r)`; pairs are `(i, i + r/2)`."""
    rotated = cos.shape[-1]
    half = rotated // 2
    cos, sin = (table[:, None].to(states.dtype) for table in (cos, sin))  # autocast: stay in its dtype
    head, rest = states[..., :rotated], states[..., rotated:]
    turned = torch.cat((-head[..., half:], head[..., :half]), dim=-1)
    head = head * cos + turned * sin
    return torch.cat((head, rest), dim=-1) if rest.shape[-1] else head


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Reference attention. query (B, H, n, d), key and value (B, H, m, d), additive mask; returns (B, n, H, d)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


@dataclass
class AttentionPlan:
    """Which keys the latents of one pass see at one scale: made once, read by the layer and its masks.

    The latents are the last `queries` columns of `start ... start + keys`.

    Attributes:
        start: first column any latent sees.
        keys: columns from there on.
        queries: latents n.
        scale: sliding scale W in columns, or `None` where every latent sees all keys from `start` up to itself.
        valid: (B, keys) bool, False for padding; `None` where there is none.
    """

    start: int
    keys: int
    queries: int
    scale: int | None = None
    valid: torch.Tensor | None = None
    _made: dict = field(default_factory=dict)

    @property
    def prefix(self) -> int:
        """Keys before the first latent."""
        return self.keys - self.queries

    def key_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """(B, 1, 1, keys) additive, or `None` without padding."""
        if self.valid is None:
            return None
        return self._make(("key", dtype), lambda: _bias(self.valid[:, None, None], dtype, PADDING))

    def band(self, start: int, stop: int, first: int, like: torch.Tensor) -> torch.Tensor:
        """(1 or B, 1, stop - start, .) additive mask of latents `start ... stop` over keys `first ...` their last."""

        def make():
            device = like.device
            query = torch.arange(start, stop, device=device)[:, None] + self.prefix
            key = torch.arange(first, self.prefix + stop, device=device)
            visible = key <= query
            if self.scale is not None:
                visible = visible & (key > query - self.scale)
            bias = _bias(visible[None, None], like.dtype, HIDDEN)
            if self.valid is not None:
                padding = self.key_bias(like.dtype)[..., first : self.prefix + stop]
                bias = torch.minimum(bias, padding)
            return bias

        # Without padding all full blocks share one mask: only the distances count.
        name = (
            "band",
            stop - start,
            self.prefix + start - first,
            start if self.valid is not None else None,
            like.dtype,
        )
        return self._make(name, make)

    def mask(self, implementation: str, like: torch.Tensor):
        """The whole mask as an attention interface takes it: (1 or B, 1, n, keys) additive, or a BlockMask."""
        if implementation != "flex_attention":
            return self.band(0, self.queries, 0, like)
        functions = [causal_mask_function]
        if self.scale is not None:
            functions.append(sliding_window_overlay(self.scale))

        def make():
            return flex_attention_mask(
                batch_size=1 if self.valid is None else self.valid.shape[0],
                q_length=self.queries,
                kv_length=self.keys,
                q_offset=self.prefix,
                mask_function=and_masks(*functions),
                attention_mask=self.valid,
                device=like.device,
            )

        return self._make("flex", make)

    def _make(self, name, make):
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def _bias(visible: torch.Tensor, dtype: torch.dtype, hidden: float) -> torch.Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, hidden)


def plan_cross(
    config: PerceiverSConfig,
    scale: int | None,
    columns: int,
    queries: int,
    window: int,
    context: int = 0,
    valid: torch.Tensor | None = None,
) -> AttentionPlan:
    """The plan of a cross-attention layer.

    Args:
        scale: the layer's entry of `cross_scales`.
        columns: m, the columns the latents see up to and with the last.
        queries: latents, the last so many columns.
        window: first column of the window of latents that these belong to (some may be cached).
        context: first column of the context.
        valid: (B, m) bool, False for padding, or `None`.
    """
    first = columns - queries
    start, band = context, None
    if scale is not None and config.scale_mask == "static":
        start = max(context, window + config.num_latents - scale)
    elif scale is not None:
        start = max(context, first - scale + 1)
        band = scale if columns - start > scale else None
    valid = None if valid is None else valid[:, start:columns]
    return AttentionPlan(start, columns - start, queries, band, valid)


def attend(module, query, key, value, plan: AttentionPlan, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of latents (B, H, n, d) over keys and values (B, H, plan.keys, d); returns (B, n, H, d), weights."""
    implementation = module.config._attn_implementation
    dropout = module.attention_dropout if module.training else 0.0
    if implementation == "sdpa" and plan.queries == 1:
        bias = plan.key_bias(query.dtype)
        if query.device.type == "cpu" and not dropout:
            # Two products over all heads: a decode step in the fused kernel takes 1.4 times as long.
            scores = torch.matmul(query * module.scaling, key.transpose(2, 3))
            scores = scores if bias is None else scores + bias
            return torch.matmul(scores.softmax(-1), value).transpose(1, 2), None
        output = F.scaled_dot_product_attention(query, key, value, bias, dropout, scale=module.scaling)
        return output.transpose(1, 2), None
    if implementation != "sdpa" or query.device.type != "cpu" or dropout or torch.compiler.is_compiling():
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        mask = plan.mask(implementation, query)
        return interface(
            module, query, key, value, mask, dropout=dropout, scaling=module.scaling, is_causal=False, **kwargs
        )
    if plan.scale is None:
        bias = plan.key_bias(query.dtype)
        own = None if bias is None else plan.band(0, plan.queries, plan.prefix, query)
        if plan.prefix == 0:
            output = F.scaled_dot_product_attention(query, key, value, own, is_causal=own is None, scale=module.scaling)
        else:
            bias = None if bias is None else bias[..., : plan.prefix]
            output = PrefixCausalAttention.apply(query, key, value, plan.prefix, bias, own, module.scaling)
        return output.transpose(1, 2), None
    outputs = []
    for start in range(0, plan.queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, plan.queries)
        first = max(0, plan.prefix + start - plan.scale + 1)
        bias = plan.band(start, stop, first, query)
        seen = slice(first, plan.prefix + stop)
        part = F.scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, seen], value[:, :, seen], bias, scale=module.scaling
        )
        outputs.append(part)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


class PrefixCausalAttention(torch.autograd.Function):
    """Latents over the keys before them (all visible) and over their own (causal), on the CPU's fused kernel.

    The kernel gives each part's output and log-sum-exp; the parts merge by `lse = logaddexp(lse_1, lse_2)`, each output
    weighted with `exp(lse_i - lse)`. Its backward pass recomputes the weights as `exp(score - lse)` from whatever
    log-sum-exp and output it is given: with the merged ones its gradients are exact.

    query (B, H, n, d); key, value (B, H, prefix + n, d); `bias` (B, 1, 1, prefix) and `own` (B, 1, n, n) additive or
    `None` without padding.
    """

    @staticmethod
    def forward(ctx, query, key, value, prefix, bias, own, scaling):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        far, far_lse = kernel(query, key[:, :, :prefix], value[:, :, :prefix], attn_mask=bias, scale=scaling)
        near, near_lse = kernel(
            query, key[:, :, prefix:], value[:, :, prefix:], 0.0, own is None, attn_mask=own, scale=scaling
        )
        lse = torch.logaddexp(far_lse, near_lse)
        output = far * (far_lse - lse).exp_().to(far.dtype)[..., None]
        output = output.addcmul_(near, (near_lse - lse).exp_().to(near.dtype)[..., None])
        ctx.save_for_backward(query, key, value, bias, own, output, lse)
        ctx.prefix, ctx.scaling = prefix, scaling
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, bias, own, output, lse = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        parts = []
        for part, causal, mask in (
            (slice(0, ctx.prefix), False, bias),
            (slice(ctx.prefix, None), own is None, own),
        ):
            parts.append(
                kernel(
                    grad,
                    query,
                    key[:, :, part],
                    value[:, :, part],
                    output,
                    lse,
                    0.0,
                    causal,
                    attn_mask=mask,
                    scale=ctx.scaling,
                )
            )
        (far_query, *far), (near_query, *near) = parts
        d_key, d_value = (torch.cat(pair, dim=2) for pair in zip(far, near, strict=True))
        return far_query + near_query, d_key, d_value, None, None, None, None


class PerceiverSCrossAttention(nn.Module):
    """Latents (B, n, hidden_size) attend the context at one scale; keys and values are projected apart from queries."""

    def __init__(self, config: PerceiverSConfig):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_value_groups = 1  # read by the attention interfaces
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        # sdpa would take no mask with fewer queries than keys for a causal square, and cut the keys.
        self.is_causal = False
        width = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * width, bias=config.attention_bias)  # keys, then values
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)

    def keys_values(self, projected: torch.Tensor, tables) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, (B, H, rows, d) each, of rows (B, rows, 2 * H * d) that `kv_proj` gave."""
        states = projected.view(*projected.shape[:2], 2, self.num_heads, self.head_dim)
        key, value = states.permute(2, 0, 3, 1, 4)
        return apply_rotary(key, *tables), value

    def forward(self, hidden_states, key, value, plan: AttentionPlan, tables, **kwargs):
        """hidden_states (B, n, hidden_size) normed; key, value (B, H, plan.keys, d); tables of the latents."""
        query = self.q_proj(hidden_states).view(*hidden_states.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
        output, weights = attend(self, apply_rotary(query, *tables), key, value, plan, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class PerceiverSSelfAttention(nn.Module):
    """Causal attention among the latents; queries, keys and values come from one product."""

    def __init__(self, config: PerceiverSConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False  # the plan says what is seen
        self.rotary = config.num_rotary_layers is None or layer_idx < config.num_rotary_layers
        width = self.num_heads * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)

    def forward(self, hidden_states, plan: AttentionPlan, tables, cache_layer=None, **kwargs):
        states = self.qkv_proj(hidden_states).view(*hidden_states.shape[:2], 3 * self.num_heads, self.head_dim)
        states = states.transpose(1, 2)
        pair, value = states[:, : 2 * self.num_heads], states[:, 2 * self.num_heads :]
        if self.rotary:
            pair = apply_rotary(pair, *tables)
        query, key = pair.chunk(2, dim=1)
        if cache_layer is not None:
            key, value = cache_layer.update(key, value)
        output, weights = attend(self, query, key, value, plan, **kwargs)
        return self.o_proj(output.flatten(2)), weights


__all__ = ["AttentionPlan", "PerceiverSCrossAttention", "PerceiverSSelfAttention", "plan_cross"]
