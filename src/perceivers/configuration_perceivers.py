"""Configuration of PerceiverS: model shape, context scales, and the switches other Perceiver AR checkpoints need."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class PerceiverSConfig(PreTrainedConfig):
    r"""Configuration of [`PerceiverSModel`] and [`PerceiverSForCausalLM`].

    Shape (sizes in channels, layers, heads or tokens):
        vocab_size, hidden_size, intermediate_size, num_attention_heads, head_dim: as everywhere; `head_dim` defaults to
            `hidden_size // num_attention_heads`.
        num_hidden_layers: causal self-attention layers over the latents, after the cross-attention layers.
        num_latents: query length `N`: at most so many of the last positions are computed, and trained.
        max_position_embeddings: context length `M`.

    Multi-scale cross-attention (PerceiverS, arXiv 2411.08307), one cross-attention layer per entry, in cascade:
        cross_scales: how many tokens back each layer sees; `None` sees the whole context. Default `[None, 1024]`.
        scale_mask: `"sliding"`: a latent at position p sees keys k > p - W. `"static"`: all latents of a window see the
            same keys k >= s + N - W, where s is the window's first position (Eq. 16 of the paper, where the window
            ends with the context).
        cross_kv_source: `"embeddings"`: keys and values come from the normed embeddings of all positions. `"stream"`:
            at the latents' own positions they come from the layer's normed query stream instead, as in ports of
            Perceiver AR that feed the previous layer's output back.
        latent_projection: the query stream starts from a linear map (with a bias) of the embeddings, as in Perceiver
            AR itself; keys and values come from the embeddings as they are.

    Positions:
        rope_parameters: rotary positions; `partial_rotary_factor` (default 0.5) is the rotated share of a head.
        rope_endpoint: spread the frequencies over 1 to 1 / rope_theta, both ends included.
        num_rotary_layers: how many of the self-attention layers rotate (`None`: all); cross-attention always does.
        absolute_positions: add learned position embeddings too. Such a model cannot go on past `M` tokens.
        position_offset: the position of the first token that is not padding.

    Matrices:
        norm_type (`"rms"` or `"layer"`), norm_eps, hidden_act, and a bias switch for each group of matrices:
        attention_bias (queries, keys, values), attention_output_bias, mlp_bias, lm_head_bias. `final_norm` norms the
        latents before the head.

    Decoding:
        grammar: id ranges of the events, as `PerformanceGrammarLogitsProcessor` reads them; from
            `PerceiverSTokenizer.config_fields()`. `None` leaves generation unconstrained.

    Raises:
        ValueError: where two fields contradict each other, naming both.
    """

    model_type = "perceivers"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (class variable of the base class)

    vocab_size: int = 391
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    head_dim: int | None = None
    num_latents: int = 1024
    cross_scales: list[int | None] | None = None
    scale_mask: Literal["sliding", "static"] = "sliding"
    cross_kv_source: Literal["embeddings", "stream"] = "embeddings"
    latent_projection: bool = False
    max_position_embeddings: int = 32768
    rope_parameters: RopeParameters | dict | None = None
    rope_endpoint: bool = False
    num_rotary_layers: int | None = None
    absolute_positions: bool = False
    position_offset: int = 0
    norm_type: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    hidden_act: str = "relu2"
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    final_norm: bool = True
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    grammar: dict | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 389
    bos_token_id: int | None = 390
    eos_token_id: int | list[int] | None = 388

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.cross_scales is None:
            self.cross_scales = [None, 1024]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        self.rope_parameters.setdefault("partial_rotary_factor", 0.5)
        super().__post_init__(**kwargs)

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of a head."""
        # The small amount: 26 / 46 * 46 is 25.999999999999996, which is 26 channels.
        return int(self.head_dim * self.rope_parameters["partial_rotary_factor"] + 1e-6)

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` after construction."""
        if self.head_dim < 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"head_dim ({self.head_dim}) with partial_rotary_factor "
                f"{self.rope_parameters['partial_rotary_factor']} rotates {self.rotary_dim} channels: it must be an "
                "even number and positive, since rotary positions turn pairs of channels."
            )
        if not self.cross_scales or any(scale is not None and scale < 1 for scale in self.cross_scales):
            raise ValueError(
                f"cross_scales {self.cross_scales} must hold at least one entry, each None (the whole context) or a "
                "positive number of tokens."
            )
        if self.num_latents < 1 or self.num_latents > self.max_position_embeddings:
            raise ValueError(
                f"num_latents ({self.num_latents}) must lie in 1..max_position_embeddings "
                f"({self.max_position_embeddings})."
            )
        too_short = [scale for scale in self.cross_scales if scale is not None and scale < self.num_latents]
        if self.scale_mask == "static" and too_short:
            raise ValueError(
                f"scale_mask='static' with num_latents ({self.num_latents}) above the scale {too_short[0]} of "
                "cross_scales leaves latents without a key: raise the scale, lower num_latents or use 'sliding'."
            )


__all__ = ["PerceiverSConfig"]
