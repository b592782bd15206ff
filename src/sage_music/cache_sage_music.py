"""Key-value caches of SAGE-Music: growing buffers, and the cache compacted by attribute of `kv_routing="head"`.

A decode step writes its rows in place. Stock dynamic caches concatenate, which copies the whole cache for every token.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer


@dataclass
class AttributeRoute:
    """Where the `n` new tokens of one forward pass go in the compacted cache, and what they read. Shared by all layers.

    Attributes:
        slots: (B, A, n) int64, the row each token's keys and values take in each attribute's buffer. Rows of another
            attribute are scratch rows behind the stored ones: the token reads itself there, the next pass overwrites.
        visible: (B, A, n, length) bool, the rows each token reads.
        length: rows in use, scratch rows included; the buffers hold at least so many.
    """

    slots: torch.Tensor
    visible: torch.Tensor
    length: int


class GrowingLayer(DynamicLayer):
    """Keys and values `(B, heads, capacity, head_dim)` of one layer; `capacity` doubles, `length` rows are in use."""

    def __init__(self, **kwargs):
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (states[:, :, :0].clone() for states in (key_states, value_states))
        self.is_initialized = True

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows, copying the old ones only when capacity doubles."""
        capacity = self.keys.shape[2]
        if rows > capacity:
            grown = max(rows, 2 * capacity, 64)
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_zeros(*old.shape[:2], grown, old.shape[3])
                new[:, :, :capacity] = old
                setattr(self, name, new)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append `(B, heads, n, head_dim)`; returns views of all rows in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.reserve(self.length)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes 0 or minus the number of tokens to remove.")
        self.length += max(tokens_to_remove, -self.length)

    def reset(self) -> None:
        super().reset()
        self.length = 0


class CompactLayer(GrowingLayer):
    """One layer's `(B, A * h, capacity, head_dim)` buffers; `AttributeRoute` says where rows go."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, route: AttributeRoute, *args, **kwargs):
        """Write the keys and values `(B, h, n, head_dim)` of `n` tokens; returns the rows in use, scratch included."""
        batch, heads, new, width = key_states.shape
        attributes = route.slots.shape[1]
        if not self.is_initialized:
            self.lazy_initialization(*(s.repeat(1, attributes, 1, 1) for s in (key_states, value_states)))
        self.reserve(route.length)
        rows = route.slots[:, :, None, :, None].expand(batch, attributes, heads, new, width)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            grouped = buffer.view(batch, attributes, heads, -1, width)
            grouped.scatter_(3, rows, states[:, None].expand_as(rows).to(buffer.dtype))
        return self.keys[:, :, : route.length], self.values[:, :, : route.length]

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take a prefill's compacted keys and values `(B, A * h, length, head_dim)` as they are."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.is_initialized = keys, values, True

    def get_max_length(self) -> int:
        return -1


class StaticCompactLayer(CompactLayer):
    """`CompactLayer` with a fixed capacity, whose addresses `torch.compile` may keep."""

    is_compileable = True
    is_croppable = False

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__()
        self.max_cache_len = max_cache_len

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.max_cache_len, width)
        self.values = value_states.new_zeros(batch, heads, self.max_cache_len, width)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def reserve(self, rows: int) -> None:
        return

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : values.shape[2]] = values

    def reset(self) -> None:
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()

    def get_max_length(self) -> int:
        return self.max_cache_len


class SageMusicCache(DynamicCache):
    """The cache `SageMusicForCausalLM` builds for itself.

    Args:
        config: the model's config; its `kv_routing` decides the layout. `"head"`: `(B, A * h, T_max, head_dim)` per
            layer, where `T_max` is the longest attribute's token count. Otherwise `(B, h, T, head_dim)`.
        max_cache_len: tokens to preallocate for, for `torch.compile`; `None` grows on demand.
        offloading: keep layers on the CPU between uses (accelerators only).

    `get_seq_length()` counts tokens seen, padding included, as `generate()` expects, not rows stored.
    """

    def __init__(self, config, max_cache_len: int | None = None, offloading: bool = False):
        self.routed = config.kv_routing == "head"
        self.num_attributes = config.num_attributes
        self.max_cache_len = max_cache_len
        static = max_cache_len is not None
        if self.routed:
            # Every token may leave a scratch row, so a static buffer has one row more than tokens.
            layers = [
                StaticCompactLayer(max_cache_len + 1) if static else CompactLayer()
                for _ in range(config.num_hidden_layers)
            ]
        else:
            layers = [StaticLayer(max_cache_len) if static else GrowingLayer() for _ in range(config.num_hidden_layers)]
        Cache.__init__(self, layers=layers, offloading=offloading)
        self._forget()

    def _forget(self):
        self.tokens_seen: int | torch.Tensor = 0  # a tensor in a static cache: compiled code must not depend on it
        self.lengths: torch.Tensor | None = None  # (B, A) rows stored for each attribute; `None` before the first
        self._history: list[torch.Tensor] = []  # codes passed to `route`, (B, n) each: what `crop` recounts

    @property
    def history(self) -> torch.Tensor | None:
        """(B, tokens seen) codes of all tokens, joined when somebody asks: a decode step only appends."""
        if len(self._history) > 1:
            self._history = [torch.cat(self._history, dim=1)]
        return self._history[0] if self._history else None

    def _members(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, A, n) bool: which attributes store each token. See `route` for the codes."""
        attributes = torch.arange(self.num_attributes, device=codes.device)[:, None]
        return (codes[:, None] == attributes) | (codes[:, None] >= self.num_attributes)

    def route(self, codes: torch.Tensor) -> AttributeRoute:
        """Assign rows to new tokens. Called once per forward pass, before the layers.

        Args:
            codes: (B, n) int64; the token's attribute, plus `num_attributes` for a token every attribute stores (BOS),
                or negative for padding, which none does.
        """
        new = codes.shape[1]
        members = self._members(codes)
        counts = members.cumsum(-1)
        if self.lengths is not None:
            counts = counts + self.lengths[..., None]
        stored = counts[..., -1]
        scratch = stored[..., None] + torch.arange(new, device=codes.device)
        slots = torch.where(members, counts - 1, scratch)
        length = int(slots.max()) + 1 if self.max_cache_len is None else self.layers[0].max_cache_len
        rows = torch.arange(length, device=codes.device)
        visible = (rows < counts[..., None]) | (rows == slots[..., None])
        self._remember(codes, stored)
        return AttributeRoute(slots, visible, length)

    def remember_prefill(self, codes: torch.Tensor) -> None:
        """Count the tokens of a prefill whose rows the layers take over by `fill`."""
        self._remember(codes, self._members(codes).sum(-1))

    def _remember(self, codes: torch.Tensor, stored: torch.Tensor) -> None:
        if self.max_cache_len is None:
            self.lengths = stored
            self._history.append(codes)
            self.tokens_seen += codes.shape[1]
        elif self.lengths is not None:
            self.lengths.copy_(stored)
            self.tokens_seen.add_(codes.shape[1])
        else:
            self.lengths = stored.clone()
            self.tokens_seen = torch.full((), codes.shape[1], device=codes.device)

    def get_seq_length(self, layer_idx: int = 0) -> "int | torch.Tensor":
        return self.tokens_seen if self.routed else super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (self.tokens_seen + query_length, 0) if self.routed else super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (0 or negative)."""
        if not self.routed:
            return super().crop(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError("crop takes 0 or minus the number of tokens to remove.")
        if self.max_cache_len is not None:
            raise ValueError("a static cache cannot be cropped: use the default cache for assisted decoding.")
        if self._history and tokens_to_remove < 0:
            # Rows are stored in token order, so the first `lengths` rows of what is left are the right ones.
            self.tokens_seen = max(self.tokens_seen + tokens_to_remove, 0)
            self._history = [self.history[:, : self.tokens_seen]]
            self.lengths = self._members(self.history).sum(-1)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _on_batch(self, select):
        if self.lengths is not None:
            self.lengths = select(self.lengths)
            self._history = [select(self.history)] if self._history else []

    def reorder_cache(self, beam_idx: torch.LongTensor):
        if not self.routed:
            return super().reorder_cache(beam_idx)
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = layer.keys.index_select(0, beam_idx.to(layer.keys.device))
                layer.values = layer.values.index_select(0, beam_idx.to(layer.values.device))
        self._on_batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int):
        self._each_tensor(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        self._each_tensor(lambda rows: rows[indices, ...])

    def _each_tensor(self, select):
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = select(layer.keys), select(layer.values)
        self._on_batch(select)


__all__ = ["AttributeRoute", "SageMusicCache"]
