"""Configuration of SAGE-Music: model shape, key-value routing, and the token data a checkpoint carries."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class SageMusicConfig(PreTrainedConfig):
    r"""Configuration of [`SageMusicModel`] and [`SageMusicForCausalLM`].

    Shape (all sizes in channels, layers or heads):
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, head_dim: as in Llama;
            `head_dim` defaults to `hidden_size // num_attention_heads`.
        num_key_value_heads: key-value heads *per attribute* (`h`). With `kv_routing="none"` there is one attribute, so
            this is the ordinary count: `num_attention_heads` is MHA, 1 is MQA, anything between is GQA.
        max_position_embeddings: context length in tokens.
        attention_bias, attention_output_bias, mlp_bias: biases of the query, key and value projections, of attention's
            output, and of the MLP's three layers; without any by default. Converted Llama-shaped models may have them.
        qk_norm: an RMS norm over the channels of each query and key head before it is rotated, as in Qwen3.

    Attribute-specialized key-value heads:
        kv_routing: which earlier tokens a query head reads. `"head"`: heads are split into one group per attribute and
            read only that attribute's tokens (plus themselves and BOS). `"token"`: every head reads every token, each
            through its own attribute's projection. `"none"`: one shared projection (the MHA, GQA and MQA controls).
        query_heads_per_attribute: query heads of each attribute's group, for `"head"`; sums to `num_attention_heads`.
            Defaults to an even split, the first groups taking what is left over.
        attribute_names: one name per attribute.
        token_attribute_ids: the attribute of each token id, `vocab_size` values.

    Decoding:
        num_mtp_layers: tokens in a row that the draft head guesses, for `generate(use_mtp=True)`; 0: no draft head.
        grammar: per-token data and the `types x types` table that `MidiGrammarLogitsProcessor` reads (see there). It
            comes from `SageMusicTokenizer.config_fields()`; `None` leaves generation unconstrained.

    Raises:
        ValueError: where two fields contradict each other, naming both.
    """

    model_type = "sage_music"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (class variable of the base class)

    vocab_size: int = 512
    hidden_size: int = 320
    intermediate_size: int = 864
    num_hidden_layers: int = 5
    num_attention_heads: int = 10
    head_dim: int | None = None
    num_key_value_heads: int = 1
    kv_routing: Literal["head", "token", "none"] = "head"
    query_heads_per_attribute: list[int] | None = None
    attribute_names: list[str] | None = None
    token_attribute_ids: list[int] | None = None
    grammar: dict | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    num_mtp_layers: int = 0
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attribute_names is None:
            self.attribute_names = ["structure", "instrument", "pitch", "velocity", "duration"]
        if self.query_heads_per_attribute is None and self.kv_routing == "head":
            share, left_over = divmod(self.num_attention_heads, len(self.attribute_names))
            self.query_heads_per_attribute = [share + (i < left_over) for i in range(len(self.attribute_names))]
        super().__post_init__(**kwargs)

    @property
    def num_attributes(self) -> int:
        """Number of key-value projections a layer owns: one per attribute, or 1 without routing."""
        return 1 if self.kv_routing == "none" else len(self.attribute_names)

    def validate_architecture(self):
        """Cross-field checks, run by `@strict` after construction."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs of channels.")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads}): "
                "each key-value head serves an equal number of query heads."
            )
        if self.num_mtp_layers < 0:
            raise ValueError(f"num_mtp_layers ({self.num_mtp_layers}) must be 0 (no draft head) or a number of tokens.")
        if self.kv_routing == "head":
            groups = self.query_heads_per_attribute
            if len(groups) != len(self.attribute_names) or sum(groups) != heads:
                raise ValueError(
                    f"query_heads_per_attribute {groups} must hold one entry for each of the "
                    f"{len(self.attribute_names)} attributes and sum to num_attention_heads ({heads})."
                )
            if any(size < 1 or size % kv_heads for size in groups):
                raise ValueError(
                    f"query_heads_per_attribute {groups}: every entry must be a positive multiple of "
                    f"num_key_value_heads ({kv_heads})."
                )
        if self.token_attribute_ids is not None and self.kv_routing != "none":
            if len(self.token_attribute_ids) != self.vocab_size:
                raise ValueError(
                    f"token_attribute_ids has {len(self.token_attribute_ids)} entries but vocab_size is "
                    f"{self.vocab_size}. Take both from the same tokenizer: SageMusicTokenizer.config_fields()."
                )
            worst = max(self.token_attribute_ids)
            if min(self.token_attribute_ids) < 0 or worst >= len(self.attribute_names):
                raise ValueError(
                    f"token_attribute_ids holds {worst}, but there are {len(self.attribute_names)} attribute_names."
                )


__all__ = ["SageMusicConfig"]
