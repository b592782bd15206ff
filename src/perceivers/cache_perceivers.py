"""The cache of PerceiverS: decoding that equals a full forward pass, at the price of one token.

Rolling the latents' self-attention cache when the window is full is not exact: every later state has read the oldest
latent, and dropping that one changes them all. Here the window of latents grows from R to N and then starts anew with
the last R positions (a refill), whose states are computed again from the cached keys and values of the cross-attention
layers. Where a window starts depends on the position alone, so that one token at a time, chunks, cropping and assisted
decoding all give the same logits: those of a forward pass over the context with the window's latents.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


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


# Rows a buffer over the whole context has to spare when it is made: a prompt's would otherwise be copied whole for the
# first new token.
HEADROOM = 1024


class ContextLayer(GrowingLayer):
    """A cross-attention layer's keys and values, whose rows may be written again."""

    def reserve(self, rows: int) -> None:
        if rows > self.keys.shape[2]:
            super().reserve(rows + HEADROOM)

    def overwrite(self, start: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Put `(B, heads, n, head_dim)` at rows `start ...`, all in use."""
        rows = slice(start, start + key_states.shape[2])
        self.keys[:, :, rows], self.values[:, :, rows] = key_states, value_states


class PerceiverSCache(DynamicCache):
    """The cache `PerceiverSForCausalLM` builds for itself.

    Args:
        config: the model's config.
        refill_length: latents R a full window starts anew with, 1 to `num_latents`; default half of them. A short one
            refills less often and forgets more of the self-attention's past at once; `num_latents` moves the window at
            every token, which equals decoding without a cache, slowly.

    Columns are those of the padded batch: a row's windows start where the batch's do, so that the padding before a row
    decides where its windows lie. `get_seq_length()` counts columns.

    What is kept, columns counted from the first token:
        layers: per cross-attention layer the rotated keys and values of every column; then per self-attention layer
            those of the current window.
        embeddings (B, T, hidden_size), positions (B, T), valid (B, T): what a refill restarts from.
        latents (B, <= N, hidden_size): the window's states after cross-attention, reused by a refill where they do not
            depend on where the window starts (sliding scales over embeddings, a context that has not moved).

    The context start moves with the window: its last position still has the M tokens before it. Older columns are not
    read; they are kept, so that `crop` can go back to any length. With learned positions, which end at M, all columns
    stay in the context.
    """

    def __init__(self, config, refill_length: int | None = None):
        self.num_latents = config.num_latents
        self.context_length = None if config.absolute_positions else config.max_position_embeddings
        self.refill_length = max(config.num_latents // 2, 1) if refill_length is None else refill_length
        if not 1 <= self.refill_length <= self.num_latents:
            raise ValueError(
                f"refill_length ({self.refill_length}) must lie in 1..num_latents ({self.num_latents}): a full window "
                "starts anew with so many of its latents."
            )
        self.num_cross_layers = len(config.cross_scales)
        self.reusable_latents = config.cross_kv_source == "embeddings" and not (
            config.scale_mask == "static" and any(config.cross_scales)
        )
        layers = [ContextLayer() for _ in range(self.num_cross_layers)]
        layers += [GrowingLayer() for _ in range(config.num_hidden_layers)]
        Cache.__init__(self, layers=layers)
        self._forget()

    def _forget(self) -> None:
        self.tokens_seen = 0
        self._buffers: dict[str, torch.Tensor] = {}
        self.has_padding = False
        # The window whose self-attention states stand: its first column, and the column after its last computed one.
        self.window: int | None = None
        self.computed = 0
        self.latents_from = 0  # column of the first row in `latents`
        self.stream_from = 0  # columns from here on hold keys of the query stream (`cross_kv_source="stream"`)

    @property
    def cross_layers(self) -> list[ContextLayer]:
        return self.layers[: self.num_cross_layers]

    @property
    def self_layers(self) -> list[GrowingLayer]:
        return self.layers[self.num_cross_layers :]

    # ---- where windows and contexts start

    def window_start(self, position: int) -> int:
        """First column of the window in which the token at column `position` is computed."""
        if position < self.num_latents:
            return 0
        turn = self.num_latents - self.refill_length + 1  # tokens a window takes in until the next one starts
        refill = self.num_latents + (position - self.num_latents) // turn * turn
        return refill + 1 - self.refill_length

    def context_start(self, window: int) -> int:
        """First column that the latents of the window starting at `window` see."""
        return 0 if self.context_length is None else max(0, window + self.num_latents - self.context_length)

    # ---- rows

    def append(self, embeddings: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Take in new columns: embeddings (B, q, hidden_size), positions (B or 1, q), valid (B, q) bool or `None`."""
        batch, new, _ = embeddings.shape
        start, self.tokens_seen = self.tokens_seen, self.tokens_seen + new
        self.has_padding = self.has_padding or valid is not None  # padding comes first, or never
        self._write("embeddings", embeddings, start)
        self._write("positions", positions.expand(batch, new), start)
        if self.has_padding:
            self._write("valid", torch.ones_like(positions, dtype=torch.bool) if valid is None else valid, start)

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns `start ... stop` of `embeddings`, `positions` or `valid`."""
        return self._buffers[name][:, start:stop]

    def valid_columns(self, stop: int) -> torch.Tensor | None:
        return self._buffers["valid"][:, :stop] if self.has_padding else None

    def _write(self, name: str, rows: torch.Tensor, start: int) -> None:
        """Put `rows` (B, q, ...) at `start` of the named buffer, whose capacity doubles."""
        buffer, stop = self._buffers.get(name), start + rows.shape[1]
        if buffer is None or stop > buffer.shape[1]:
            capacity = stop + HEADROOM if buffer is None else max(stop, 2 * buffer.shape[1])
            grown = rows.new_zeros(rows.shape[0], capacity, *rows.shape[2:])
            if buffer is not None:
                grown[:, : buffer.shape[1]] = buffer
            self._buffers[name] = buffer = grown
        buffer[:, start:stop] = rows

    def start_window(self, window: int) -> torch.Tensor | None:
        """Forget the self-attention states of the old window and begin one at column `window`.

        Returns the cross-attended latents (B, k, hidden_size) of the columns from `window` on that can be kept.
        """
        kept = None
        same_context = self.window is not None and self.context_start(window) == self.context_start(self.window)
        if self.reusable_latents and same_context and self.latents_from <= window < self.computed:
            kept = self._buffers["latents"][:, window - self.latents_from : self.computed - self.latents_from].clone()
        for layer in self.self_layers:
            layer.length = 0
        self.window = self.computed = self.latents_from = window
        return kept

    def keep_latents(self, latents: torch.Tensor, start: int) -> None:
        """Remember the cross-attended latents (B, n, hidden_size) of the columns from `start` on."""
        if self.reusable_latents:
            self._write("latents", latents, start - self.latents_from)

    # ---- what generate() asks for

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.tokens_seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (0 or negative); a window left behind is computed anew."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes 0 or minus the number of tokens to remove.")
        removed = min(-tokens_to_remove, self.tokens_seen)
        self.tokens_seen -= removed
        for layer in self.cross_layers:
            layer.crop(-removed)
        if self.window is not None and self.computed > self.tokens_seen:
            kept = max(self.tokens_seen - self.window, 0)
            self.computed = self.window + kept
            for layer in self.self_layers:
                layer.length = kept
            if not kept:
                self.window = None

    def reset(self) -> None:
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._on_batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._on_batch(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._on_batch(lambda rows: rows[indices, ...])

    def _on_batch(self, select) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = select(layer.keys), select(layer.values)
        self._buffers = {name: select(rows) for name, rows in self._buffers.items()}


__all__ = ["PerceiverSCache"]
