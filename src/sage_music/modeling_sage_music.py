"""SAGE-Music: a pre-norm decoder whose key-value heads each belong to one musical attribute (`attention_sage_music`).

Shapes: B batch, T tokens.
"""

from collections.abc import Callable
from copy import copy
from functools import wraps

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import ContinuousBatchingConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments_sage_music import (
    CACHE_NAME,
    PACKING,
    PASSED_THROUGH,
    PASSED_TO_ATTENTION,
    PASSED_WITH_PAGES,
    check_arguments,
    check_flex_attention,
    is_paged,
    one_cache,
    rename_cache,
    warn_untested,
)
from .attention_sage_music import (
    FEW_TOKENS,
    AttributePlan,
    SageMusicAttention,
    check_attention,
    packed_sequences,
    plan_prefill,
    varlen_arguments,
)
from .cache_sage_music import SageMusicCache
from .configuration_sage_music import SageMusicConfig
from .decoding_sage_music import DecodeStep
from .drafting_sage_music import DraftCandidateGenerator, SageMusicDraftHead
from .generation_sage_music import MidiGrammarLogitsProcessor, PlainLogitsProcessorList
from .quantization_sage_music import is_int8


class SageMusicRMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a learned scale."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight.to(hidden_states.dtype), self.eps)


class SageMusicRotaryEmbedding(nn.Module):
    """Cosine and sine tables `(B, T, 1, d)` of rotary positions, as `apply_rotary` takes them."""

    def __init__(self, config: SageMusicConfig):
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
    def compute_default_rope_parameters(config: SageMusicConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        if self.attention_scaling != 1:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class SageMusicMLP(nn.Module):
    """SwiGLU: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: SageMusicConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SageMusicDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream (B, T, hidden_size)."""

    def __init__(self, config: SageMusicConfig, layer_idx: int):
        super().__init__()
        self.self_attn = SageMusicAttention(config, layer_idx)
        self.mlp = SageMusicMLP(config)
        self.input_layernorm = SageMusicRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SageMusicRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        plan: AttributePlan,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), plan, position_embeddings, cache=cache, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SageMusicPreTrainedModel(PreTrainedModel):
    config: SageMusicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SageMusicDecoderLayer"]  # noqa: RUF012 (class variables of the base class)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True  # "token" and the controls; "head" refuses it
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SageMusicDecoderLayer,
        "attentions": SageMusicAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SageMusicAttention):
            init.normal_(module.kv_weight, mean=0.0, std=self.config.initializer_range)
            if module.kv_bias is not None:
                init.zeros_(module.kv_bias)
        elif isinstance(module, SageMusicRotaryEmbedding):
            inv_freq, _ = module.rope_init_fn(module.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)
        elif isinstance(module, SageMusicModel) and module.token_codes is not None:
            init.copy_(module.token_codes, _token_codes(module.config))

    def save_pretrained(self, *args, **kwargs):
        """As in Transformers.

        Raises:
            ValueError: the weights are int8, which no checkpoint holds.
        """
        if is_int8(self):
            raise ValueError("int8 weights are not saved: save the model before quantize_int8, which takes a moment.")
        super().save_pretrained(*args, **kwargs)


def _token_codes(config: SageMusicConfig) -> torch.Tensor:
    """(vocab_size,) int64: the attribute of each token id, plus `num_attributes` for BOS, which every group reads."""
    if config.token_attribute_ids is None:
        raise ValueError(
            f"kv_routing={config.kv_routing!r} needs config.token_attribute_ids, the attribute of every token id. "
            "Build the config from a tokenizer: SageMusicConfig(**tokenizer.config_fields())."
        )
    codes = torch.tensor(config.token_attribute_ids, dtype=torch.int64, device="cpu")
    if config.bos_token_id is not None:
        codes[config.bos_token_id] += config.num_attributes
    return codes


class SageMusicModel(SageMusicPreTrainedModel):
    """The decoder without its language-model head."""

    # The draft head, of which this part of a checkpoint knows nothing.
    _keys_to_ignore_on_load_unexpected = [r"^draft\."]  # noqa: RUF012

    def __init__(self, config: SageMusicConfig):
        super().__init__(config)
        warn_untested()
        check_attention(config)  # a serving engine would compile before it hears of it in `forward`
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([SageMusicDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = SageMusicRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = SageMusicRotaryEmbedding(config)
        codes = None if config.kv_routing == "none" else _token_codes(config)
        # On the default device: a serving engine builds the model there and moves nothing afterwards.
        self.token_codes = None if codes is None else nn.Buffer(codes.to(torch.get_default_device()), persistent=False)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attribute_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, T), or `inputs_embeds` (B, T, hidden_size) with `attribute_ids`.
            attention_mask: (B, tokens seen + T), 0 for padding on the left.
            position_ids: (B, T), counted from the first token that is not padding by default. With neither
                attention_mask nor cache, a step other than +1 begins another sequence of a packed row, as everywhere in
                Transformers: a token reads its own sequence alone, with that sequence's BOS, and every sequence gets
                what it would get alone. No cache is made of packed rows (under `torch.compile`, which does not know
                their values, of no position_ids that come with neither).
            attribute_ids: (B, T) attribute of each token, plus `config.num_attributes` for tokens that every head group
                reads (BOS). With `input_ids` they come from `config.token_attribute_ids`, and these are not read:
                `generate()` goes on passing those of the embedded prompt.
            cache, past_key_values: the cache, by its name from Transformers 5.24 on or the one before; give one.
            kwargs: what callers pass to any model (`PASSED_THROUGH`), or to an attention interface.

        Raises:
            TypeError: any other argument.
            ValueError: ids outside the vocabulary, `inputs_embeds` without `attribute_ids`, a cache of another kind or
                beside gradient checkpointing, a mask that is not 2D under `kv_routing="head"`, packed rows with an
                attention_mask, or lengths of packed sequences without position_ids.
        """
        cache = one_cache(cache, past_key_values)
        self._check_arguments(kwargs, cache, position_ids)
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("gradient checkpointing computes layers twice, which a cache would count: give no cache.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        check_flex_attention(self.config, inputs_embeds.device)
        length = inputs_embeds.shape[1]

        sequences = None
        past = None if is_paged(cache) else cache  # pages come with positions and a mask of their own
        if position_ids is not None and past is None:
            sequences = packed_sequences(position_ids, attention_mask)
        if use_cache and cache is None and sequences is None:
            cache = past = SageMusicCache(self.config)
        seen = past.get_seq_length() if past is not None else 0
        if position_ids is None:
            position_ids = self._positions(attention_mask, seen, length, inputs_embeds.device)

        plan = self._plan(input_ids, attribute_ids, inputs_embeds, attention_mask, position_ids, past, sequences)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, plan, position_embeddings, cache=cache, **kwargs)
        return BaseModelOutputWithPast(self.norm(hidden_states), cache)

    def _check_arguments(self, given: dict, cache, position_ids) -> None:
        """Refuse what this model would not read: arguments, and caches of another kind."""
        routing = self.config.kv_routing
        if routing == "head":
            # Attention is causal in any case: a config may say so.
            known = PASSED_THROUGH | {"is_causal"} if given.get("is_causal") else PASSED_THROUGH
        else:
            known = PASSED_WITH_PAGES if is_paged(cache) else PASSED_TO_ATTENTION
        check_arguments(self, given, known)
        packing = [name for name in PACKING if given.get(name) is not None]
        if packing and position_ids is None:
            raise ValueError(f"{packing[0]} without position_ids: packed rows need positions that begin anew.")
        if cache is None:
            return
        if routing == "head" and not getattr(cache, "routed", False):
            raise ValueError(
                f"kv_routing='head' keeps a cache compacted by attribute: pass SageMusicCache(model.config) or no "
                f"cache, not {type(cache).__name__}."
            )
        if routing != "head" and (getattr(cache, "routed", False) or hasattr(cache, "window_start")):
            raise ValueError(
                f"kv_routing={routing!r} keeps keys and values in token order: pass SageMusicCache(model.config), a "
                f"cache of Transformers' own, or none, not a {type(cache).__name__} of another model."
            )

    @staticmethod
    def _positions(attention_mask, seen, length: int, device) -> torch.LongTensor:
        """(B or 1, T) positions of the new tokens, counted from the first that is not padding."""
        if attention_mask is None or attention_mask.ndim != 2:
            return (torch.arange(length, device=device) + seen)[None]
        if isinstance(seen, int) and attention_mask.shape[1] != seen + length:
            raise ValueError(f"attention_mask has {attention_mask.shape[1]} columns, not {seen} cached + {length} new.")
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]

    def _check_ids(self, input_ids: torch.LongTensor) -> None:
        # An accelerator would stall for this check, and an embedding raises a device error there anyway.
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
            low, high = torch.aminmax(input_ids)
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids run from {int(low)} to {int(high)}, outside the vocabulary of {self.config.vocab_size}."
                )

    def _plan(
        self, input_ids, attribute_ids, inputs_embeds, attention_mask, position_ids, past, sequences=None
    ) -> AttributePlan:
        config = self.config
        length = inputs_embeds.shape[1]
        if sequences is not None:
            sequences = sequences.expand(inputs_embeds.shape[:2])
        codes = None
        if config.kv_routing != "none":
            if input_ids is not None:
                codes = self.token_codes[input_ids]
            elif attribute_ids is not None and attribute_ids.shape == inputs_embeds.shape[:2]:
                codes = attribute_ids
            else:
                raise ValueError(
                    f"kv_routing={config.kv_routing!r} needs attribute_ids (batch, tokens) with inputs_embeds: "
                    "the attribute of each token decides which key-value heads it owns."
                )
        plan = AttributePlan(attribute_ids=codes % config.num_attributes if codes is not None else None)
        if codes is None or torch.compiler.is_compiling():
            pass
        elif codes.numel() == 1 and codes.device.type == "cpu":
            plan.attribute = int(plan.attribute_ids)
        elif codes.numel() > FEW_TOKENS:
            flat = plan.attribute_ids.flatten()
            plan.order = flat.argsort(stable=True)
            plan.sizes = torch.bincount(flat, minlength=config.num_attributes).tolist()
        if config.kv_routing != "head":
            plan.mask = create_causal_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **{CACHE_NAME: past},
                # Only of packed rows: compiled, it would look for several sequences in any.
                position_ids=None if sequences is None else position_ids,
            )
            if sequences is not None and is_flash_attention_requested(config):
                plan.varlen = varlen_arguments(sequences)
            return plan

        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError("kv_routing='head' takes a 2D attention_mask: (batch, tokens), 0 for padding.")
            codes = codes.masked_fill(attention_mask[:, -length:] == 0, -1)
        if past is not None and (past.lengths is not None or length == 1 or torch.compiler.is_compiling()):
            plan.route = past.route(codes)
            return plan
        plan_prefill(config, plan, codes, inputs_embeds.dtype, past is not None, sequences)
        if past is not None:
            past.remember_prefill(codes)
        return plan


class SageMusicForCausalLM(SageMusicPreTrainedModel, GenerationMixin):
    """SAGE-Music with its language-model head; `generate()` builds `SageMusicCache` and applies the MIDI grammar."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SageMusicConfig):
        super().__init__(config)
        self.model = SageMusicModel(config)
        self._decode_step = None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.draft = SageMusicDraftHead(config) if config.num_mtp_layers else None
        # With this flag on, loading would drop the entry that is our own: midi_grammar.
        self.generation_config._from_model_config = False
        self.post_init()
        self._keys_to_ignore_on_load_unexpected = set()  # not the base model's: a draft head must have its place here

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attribute_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_last_hidden_state: bool = False,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `SageMusicModel.forward`, with `labels` (B, T) for the shifted loss in nats per token (-100: ignored; in a
        packed row every sequence's first label should be).

        Returns logits (B, T or `logits_to_keep`, vocab_size). With `return_last_hidden_state`, which drafting asks for,
        `hidden_states` holds the last ones (B, T, hidden_size), after the final norm.
        """
        cache = one_cache(cache, past_key_values)
        step = getattr(cache, "step", None)
        if step is not None and labels is None and inputs_embeds is None and step.takes(input_ids, cache, kwargs):
            check_arguments(self, kwargs, PASSED_THROUGH)
            hidden_states = step(input_ids, attention_mask, position_ids, cache)
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
            hidden_states = (hidden_states,) if return_last_hidden_state else None
            return CausalLMOutputWithPast(None, logits, cache, hidden_states)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            attribute_ids=attribute_ids,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            drafts = self.draft is not None and next(self.draft.parameters()).requires_grad  # not beside adapters
            if drafts and self.training and input_ids is not None:
                sequences = None
                if position_ids is not None and cache is None:
                    sequences = packed_sequences(position_ids, attention_mask)
                loss = loss + self.draft.loss(
                    outputs.last_hidden_state,
                    input_ids,
                    labels,
                    logits,
                    self,
                    kwargs.get("num_items_in_batch"),
                    sequences,
                )
        hidden_states = outputs.hidden_states
        if return_last_hidden_state and hidden_states is None:
            hidden_states = (outputs.last_hidden_state,)
        # By position: the third is named by the version of Transformers.
        return CausalLMOutputWithPast(loss, logits, getattr(outputs, CACHE_NAME), hidden_states, outputs.attentions)

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        if generation_config.use_mtp and generation_config.prompt_lookup_num_tokens is None:
            return DraftCandidateGenerator(self, generation_config, kwargs["logits_processor"])
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        rename_cache(kwargs)
        return super().generate(*args, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As in Transformers. The cache goes by its older name, under which PEFT's prompt tuning looks for it."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        implementation = generation_config.cache_implementation
        given = model_kwargs.get(CACHE_NAME) is not None
        if given and generation_config.use_cache is False:
            raise ValueError("a cache was given, and use_cache=False: leave one of them out.")
        if (
            given
            or generation_config.use_cache is False
            or implementation not in (None, "dynamic", "offloaded", "static")
        ):
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if implementation == "static":
            longest = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            if self.config.kv_routing == "head":
                cache = SageMusicCache(self.config, max_cache_len=longest)
            else:
                cache = StaticCache(self.config, max_cache_len=longest)
        else:
            cache = SageMusicCache(self.config, offloading=implementation == "offloaded")
            if implementation != "offloaded":
                options = self._compile_options(generation_config)
                self._decode_step = cache.step = DecodeStep.of(self.model, self._decode_step, options)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache

    def _compile_options(self, generation_config) -> dict | None:
        """Arguments of `torch.compile` for the decode step, where `generate(compile_config=...)` asks for it."""
        chosen = generation_config.compile_config
        if chosen is None or generation_config.disable_compile or self.device.type != "cpu":
            return None
        # Lengths change with every token; a wrapper in C++ saves as much again as the fused kernels do.
        options = chosen.options or ({"cpp_wrapper": True} if chosen.backend == "inductor" else None)
        return {"dynamic": True, "fullgraph": chosen.fullgraph, "backend": chosen.backend, "options": options}

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        """Not with the decode step: it compiles itself."""
        if getattr(model_kwargs.get(CACHE_NAME), "step", None) is not None:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def __getstate__(self) -> dict:
        """Without the decode step: a copy must not decode with the modules of its original."""
        return {**self.__dict__, "_decode_step": None}

    @staticmethod
    def create_masks_for_generate(config, attention_mask=None, **kwargs):
        """Masks for a compileable cache: the compacted one reads the 2D mask itself."""
        if config.kv_routing == "head":
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    def init_continuous_batching(
        self,
        generation_config=None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        **kwargs,
    ):
        """As in Transformers, whose `generate_batch` begins here; every request keeps the MIDI grammar.

        Raises:
            ValueError: `kv_routing="head"`, whose cache cannot be cut into pages; asynchronous batches, which begin
                before the tokens are known that the grammar reads; or a manager kept from an earlier call with another
                `midi_grammar`.
        """
        if self.config.kv_routing == "head":
            raise ValueError(
                "kv_routing='head' has no continuous batching: its cache is compacted by attribute, and pages are not. "
                "Call generate() with a batch of prompts, or train a model with kv_routing='token'."
            )
        # Not at the top: it rests on a module inside of Transformers, which may move; the model must load all the same.
        from .batching_sage_music import add_grammar, check_each_request, check_kept, grammar_options

        chosen = generation_config if generation_config is not None else self.generation_config
        grammar = self.config.grammar is not None and bool(getattr(chosen, "midi_grammar", True))
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        if kept is not None:
            check_kept(kept, grammar)
            return super().init_continuous_batching(chosen, continuous_batching_config, **kwargs)
        if grammar:
            continuous_batching_config = grammar_options(continuous_batching_config, chosen)
            chosen = copy(chosen)
            chosen.midi_grammar = False  # the usual processor would get the last token of each request alone
        manager = super().init_continuous_batching(chosen, continuous_batching_config, **kwargs)
        check_each_request(manager, self.config)
        if grammar:
            add_grammar(manager, self.config)
        return manager

    def generate_batch(self, inputs, *args, **kwargs):
        """As in Transformers.

        Raises:
            ValueError: a prompt without tokens or with an id that the vocabulary has not; see
                `init_continuous_batching` for more.
        """
        from .batching_sage_music import check_request

        for index, ids in enumerate(inputs):
            check_request(ids, self.config, f"prompt {index}")
        return super().generate_batch(inputs, *args, **kwargs)

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if self.config.grammar is not None and getattr(generation_config, "midi_grammar", True):
            running = next((own.running_state for own in processors if hasattr(own, "running_state")), None)
            # First: a top-k or top-p filter must choose among valid tokens, or it may leave none.
            processors.insert(0, MidiGrammarLogitsProcessor(self.config, running))
        return PlainLogitsProcessorList(processors)


__all__ = ["SageMusicForCausalLM", "SageMusicModel", "SageMusicPreTrainedModel"]
