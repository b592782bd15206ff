"""Layers of PerceiverS: norms, rotary positions, and the blocks of cross-attention and of self-attention.

Shapes: B batch, n latents, H heads, d channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .attention_perceivers import AttentionPlan, PerceiverSCrossAttention, PerceiverSSelfAttention
from .configuration_perceivers import PerceiverSConfig


class PerceiverSRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a learned scale."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight.to(hidden_states.dtype), self.eps)


def make_norm(config: PerceiverSConfig) -> nn.Module:
    """The norm that `config.norm_type` names, over `hidden_size` channels."""
    if config.norm_type == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
    return PerceiverSRMSNorm(config.hidden_size, config.norm_eps)


class PerceiverSRotaryEmbedding(nn.Module):
    """Cosine and sine tables `(B, T, rotary_dim)` of rotary positions."""

    def __init__(self, config: PerceiverSConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self.rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @property
    def rope_init_fn(self) -> Callable:
        return ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)

    @staticmethod
    def compute_default_rope_parameters(config: PerceiverSConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        pairs = config.rotary_dim // 2
        steps = max(pairs - 1, 1) if config.rope_endpoint else pairs
        exponent = torch.arange(pairs, dtype=torch.float, device=device) / steps
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


class PerceiverSMLP(nn.Module):
    """`down(act(up(x)))`."""

    def __init__(self, config: PerceiverSConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


@dataclass
class Context:
    """Rows of a context: `embeddings` (B, rows, hidden_size), and, where they are those of tokens and nothing else, the
    tokens' `ids` (B, rows) and the embeddings of the `vocabulary` (vocab_size, hidden_size)."""

    embeddings: torch.Tensor
    ids: torch.Tensor | None = None
    vocabulary: torch.Tensor | None = None

    def rows(self, start: int, stop: int | None = None) -> "Context":
        ids = None if self.ids is None else self.ids[:, start:stop]
        return Context(self.embeddings[:, start:stop], ids, self.vocabulary)


class PerceiverSCrossLayer(GradientCheckpointingLayer):
    """Cross-attention at one scale and an MLP, each added to the query stream (B, n, hidden_size)."""

    def __init__(self, config: PerceiverSConfig):
        super().__init__()
        self.stream = config.cross_kv_source == "stream"
        self.q_norm = make_norm(config)
        self.kv_norm = make_norm(config)
        self.attention = PerceiverSCrossAttention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = PerceiverSMLP(config)

    def project(self, context: "Context") -> torch.Tensor:
        """Keys and values, not rotated yet, of context rows: (B, rows, 2 * H * d).

        A row's are a function of its token alone, so that many rows are looked up among the vocabulary's. In float32:
        the gradient of a token that occurs a thousand times is a sum of a thousand.
        """
        if context.ids is None or context.ids.numel() < context.vocabulary.shape[0]:
            return self.attention.kv_proj(self.kv_norm(context.embeddings))
        table = self.attention.kv_proj(self.kv_norm(context.vocabulary))
        return F.embedding(context.ids, table.float() if table.requires_grad else table).to(table.dtype)

    def context_keys_values(self, context: "Context", tables) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, H, rows, d) of context rows."""
        return self.attention.keys_values(self.project(context), tables)

    def stream_keys_values(self, hidden_states: torch.Tensor, tables) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the latents themselves (B, n, hidden_size), for `cross_kv_source="stream"`."""
        return self.attention.keys_values(self.attention.kv_proj(self.q_norm(hidden_states)), tables)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: AttentionPlan,
        tables: tuple[torch.Tensor, torch.Tensor],
        keys_values: tuple[torch.Tensor, torch.Tensor] | None = None,
        context: "Context | None" = None,
        context_tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Attend `keys_values` (B, H, plan.keys, d), or those of the `plan.keys` rows of `context`."""
        queries = self.q_norm(hidden_states)
        if keys_values is None:
            if self.stream:
                prefix = self.project(context.rows(0, plan.prefix))
                rows = torch.cat((prefix, self.attention.kv_proj(queries)), dim=1)
            else:
                rows = self.project(context)
            keys_values = self.attention.keys_values(rows, context_tables)
        attended, _ = self.attention(queries, *keys_values, plan, tables, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class PerceiverSLayer(GradientCheckpointingLayer):
    """Causal self-attention over the latents and an MLP, each added to the stream (B, n, hidden_size)."""

    def __init__(self, config: PerceiverSConfig, layer_idx: int):
        super().__init__()
        self.input_norm = make_norm(config)
        self.self_attn = PerceiverSSelfAttention(config, layer_idx)
        self.mlp_norm = make_norm(config)
        self.mlp = PerceiverSMLP(config)

    def forward(self, hidden_states, plan: AttentionPlan, tables, cache_layer=None, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_norm(hidden_states), plan, tables, cache_layer, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


__all__ = ["Context", "PerceiverSCrossLayer", "PerceiverSLayer", "PerceiverSRotaryEmbedding", "make_norm"]
