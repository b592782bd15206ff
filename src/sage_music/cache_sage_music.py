"""Key-value caches of SAGE-Music: growing buffers, and the cache compacted by attribute of `kv_routing="head"`.

A decode step writes its rows in place. Stock dynamic caches concatenate, which copies the whole cache for every token.
"""

from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

# Added to the scores of hidden rows. Finite, so that a query with no visible row merges to nothing instead of NaN, and
# within float16.
HIDDEN = -3e4


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
    _flat: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _bias: dict[tuple[int, int, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def flat_rows(self, heads: int, capacity: int) -> torch.Tensor:
        """(2 * B * A * h * n,) the slots as rows of a buffer viewed as `(2 * B * A * h * capacity, head_dim)`."""
        rows = self._flat.get((heads, capacity))
        if rows is None:
            batch, attributes, _ = self.slots.shape
            starts = torch.arange(0, 2 * batch * attributes * heads * capacity, capacity, device=self.slots.device)
            rows = (starts.view(2, batch, attributes, heads, 1) + self.slots[:, :, None]).flatten()
            self._flat[heads, capacity] = rows
        return rows

    def bias(self, heads: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """(B * A * h, n or groups * n, length) added to the scores of `groups` query heads of `heads` key-value heads
        an attribute; made once for all layers."""
        bias = self._bias.get((heads, groups, dtype))
        if bias is None:
            bias = (~self.visible).to(dtype).mul_(HIDDEN)
            if heads > 1:
                bias = bias.repeat_interleave(heads, dim=1)
            if bias.shape[2] > 1:
                bias = bias.repeat(1, 1, groups, 1)
            bias = self._bias[heads, groups, dtype] = bias.flatten(0, 1)
        return bias


class GrowingLayer(DynamicLayer):
    """Keys and values `(B, heads, capacity, head_dim)` of one layer, of which `length` rows are in use."""

    def __init__(self, **kwargs):
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (states[:, :, :0].clone() for states in (key_states, value_states))
        self.is_initialized = True

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows; capacity grows by half, so that a row is copied twice on average, however long."""
        capacity = self.keys.shape[2]
        if rows > capacity:
            grown = max(rows, capacity + max(capacity // 2, 64))
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
    """One layer's `(2, B, A * h, capacity, head_dim)` buffer of keys and values; `AttributeRoute` says where rows go.

    `keys` and `values` are its halves, `(B, A * h, capacity, head_dim)` each.
    """

    def __init__(self, **kwargs):
        self.buffer: torch.Tensor | None = None
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self.buffer is None else self.buffer[0]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self.buffer is None else self.buffer[1]

    @keys.setter
    def keys(self, states: None) -> None:
        """The base class begins with `None`; both halves are set together, by `hold`."""

    @values.setter
    def values(self, states: None) -> None:
        """As `keys`."""

    def hold(self, buffer: torch.Tensor) -> None:
        """Take over a buffer `(2, B, A * h, capacity, head_dim)`."""
        self.dtype, self.device = buffer.dtype, buffer.device
        self.buffer, self.is_initialized = buffer, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.hold(torch.stack((key_states, value_states))[..., :0, :])

    def reserve(self, rows: int) -> None:
        capacity = self.buffer.shape[3]
        if rows >= capacity:  # never quite full: a compiled step would take that for a case of its own
            grown = max(rows + 1, capacity + max(capacity // 2, 64))
            grown = self.buffer.new_zeros(*self.buffer.shape[:3], grown, self.buffer.shape[4])
            grown[..., :capacity, :] = self.buffer
            self.buffer = grown

    @staticmethod
    def write(buffer: torch.Tensor, states: torch.Tensor, rows: torch.Tensor) -> None:
        """Put keys and values `(2, B, h, n, head_dim)` of `n` tokens into the rows of a buffer that a route names."""
        _, batch, heads, new, width = states.shape
        attributes = buffer.shape[2] // heads
        states = states[:, :, None].expand(2, batch, attributes, heads, new, width).reshape(-1, width)
        buffer.view(-1, width).index_copy_(0, rows, states.to(buffer.dtype))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, route: AttributeRoute, *args, **kwargs):
        """Write the keys and values `(B, h, n, head_dim)` of `n` tokens; returns the rows in use, scratch included."""
        if not self.is_initialized:
            attributes = route.slots.shape[1]
            self.lazy_initialization(*(s.repeat(1, attributes, 1, 1) for s in (key_states, value_states)))
        self.reserve(route.length)
        rows = route.flat_rows(key_states.shape[1], self.buffer.shape[3])
        self.write(self.buffer, torch.stack((key_states, value_states)), rows)
        return self.keys[:, :, : route.length], self.values[:, :, : route.length]

    def fill(self, states: torch.Tensor) -> None:
        """Take a prefill's compacted keys and values `(2, B, A * h, length, head_dim)` as they are."""
        self.hold(states)

    def on_batch(self, select) -> None:
        """Apply `select` to a tensor whose first axis is the batch; the result replaces keys and values."""
        if self.is_initialized:
            self.buffer = select(self.buffer.transpose(0, 1)).transpose(0, 1).contiguous()

    def offload(self) -> None:
        if self.is_initialized:
            self.buffer = self.buffer.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.is_initialized and self.buffer.device != self.device:
            self.buffer = self.buffer.to(self.device, non_blocking=True)

    def reset(self) -> None:
        if self.is_initialized:
            self.buffer.zero_()

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
        batch, heads, _, width = key_states.shape
        self.hold(key_states.new_zeros(2, batch, heads, self.max_cache_len, width))
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.buffer)

    def reserve(self, rows: int) -> None:
        return

    def fill(self, states: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(*states)
        self.buffer[..., : states.shape[3], :] = states

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
        self.step = None  # what decodes with this cache, where `generate()` built it
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
        self._numbers: torch.Tensor | None = None  # what `_rows` and `route` keep from step to step
        self._stores: torch.Tensor | None = None
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

    def _rows(self, length: int, device: torch.device) -> torch.Tensor:
        """`arange(length)`, kept from step to step."""
        if torch.compiler.is_compiling():
            return torch.arange(length, device=device)
        if self._numbers is None or len(self._numbers) < length or self._numbers.device != device:
            self._numbers = torch.arange(2 * length, device=device)
        return self._numbers[:length]

    def route(self, codes: torch.Tensor) -> AttributeRoute:
        """Assign rows to new tokens. Called once per forward pass, before the layers.

        Args:
            codes: (B, n) int64; the token's attribute, plus `num_attributes` for a token every attribute stores (BOS),
                or negative for padding, which none does.
        """
        new = codes.shape[1]
        if new == 1 and self.lengths is not None and self.max_cache_len is None:
            # A single token takes the next row everywhere, stored or scratch.
            slots = self.lengths[..., None]
            length = int(slots.max()) + 1
            visible = self._rows(length, codes.device) <= slots[..., None]
            if self._stores is None or self._stores.device != codes.device:
                every = torch.arange(2 * self.num_attributes + 1, device=codes.device)[None]
                self._stores = self._members(every)[0].T.long()  # by code; the last row is padding's, code -1
                self._stores[-1] = 0
            self._remember(codes, self.lengths + self._stores[codes[:, 0]])
            return AttributeRoute(slots, visible, length)
        members = self._members(codes)
        counts = members.cumsum(-1)
        if self.lengths is not None:
            counts = counts + self.lengths[..., None]
        stored = counts[..., -1]
        scratch = stored[..., None] + torch.arange(new, device=codes.device)
        slots = torch.where(members, counts - 1, scratch)
        length = int(slots.max()) + 1 if self.max_cache_len is None else self.layers[0].max_cache_len
        rows = self._rows(length, codes.device)
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
            layer.on_batch(lambda states: states.index_select(0, beam_idx.to(states.device)))
        self._on_batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int):
        self._each_tensor(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        self._each_tensor(lambda rows: rows[indices, ...])

    def _each_tensor(self, select):
        for layer in self.layers:
            if isinstance(layer, CompactLayer):
                layer.on_batch(select)
            elif layer.is_initialized:
                layer.keys, layer.values = select(layer.keys), select(layer.values)
        self._on_batch(select)


__all__ = ["AttributeRoute", "SageMusicCache"]
