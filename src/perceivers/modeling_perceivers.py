"""PerceiverS: cross-attention over a long context at several scales, then a decoder over the last N positions.

Perceiver AR (Hawthorne et al. 2022) with the multi-scale cross-attention of PerceiverS (arXiv 2411.08307).

Shapes: B batch, T tokens given, n latents: the last min(N, T) positions, the only ones that are computed.
"""

from functools import wraps

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .arguments_perceivers import (
    CACHE_NAME,
    PASSED_THROUGH,
    check_arguments,
    check_flex_attention,
    one_cache,
    rename_cache,
    warn_untested,
)
from .attention_perceivers import AttentionPlan, PerceiverSCrossAttention, PerceiverSSelfAttention, plan_cross
from .cache_perceivers import PerceiverSCache
from .configuration_perceivers import PerceiverSConfig
from .generation_perceivers import PerformanceGrammarLogitsProcessor
from .layers_perceivers import Context, PerceiverSCrossLayer, PerceiverSLayer, PerceiverSRotaryEmbedding, make_norm


class PerceiverSPreTrainedModel(PreTrainedModel):
    config: PerceiverSConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PerceiverSCrossLayer", "PerceiverSLayer"]  # noqa: RUF012 (class variables of the base class)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": PerceiverSLayer,
        "attentions": PerceiverSSelfAttention,
        "cross_attentions": PerceiverSCrossAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PerceiverSRotaryEmbedding):
            inv_freq, _ = module.rope_init_fn(module.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)


class PerceiverSModel(PerceiverSPreTrainedModel):
    """Embeddings, cross-attention layers, latent self-attention layers: without the language-model head."""

    def __init__(self, config: PerceiverSConfig):
        super().__init__(config)
        warn_untested()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = None
        if config.absolute_positions:
            self.embed_positions = nn.Embedding(
                config.max_position_embeddings + config.position_offset, config.hidden_size
            )
        projects = config.latent_projection
        self.latent_proj = nn.Linear(config.hidden_size, config.hidden_size) if projects else nn.Identity()
        self.cross_layers = nn.ModuleList([PerceiverSCrossLayer(config) for _ in config.cross_scales])
        self.layers = nn.ModuleList([PerceiverSLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = make_norm(config) if config.final_norm else nn.Identity()
        self.rotary_emb = PerceiverSRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_latents: int | None = None,
        outputs_to_keep: int = 0,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, T), or `inputs_embeds` (B, T, hidden_size).
            attention_mask: (B, tokens seen + T), 0 for padding on the left.
            position_ids: (B, T), counted from the first token that is not padding by default.
            cache, past_key_values: a `PerceiverSCache`, by its name from Transformers 5.24 on or the one before; give
                one. `use_cache=True` makes one; the default makes none.
            num_latents: positions to compute, without a cache; at most `config.num_latents`, the default.
            outputs_to_keep: with a cache, how many of the new tokens' states to return; 0: those of the last window.
            kwargs: what callers pass to any model (`PASSED_THROUGH`).

        Returns `last_hidden_state` (B, n, hidden_size) of the last n positions. Without a cache n is `num_latents` (or
        T, where that is less). With one, every position is computed in the window that the cache's schedule gives it,
        and the context moves on with the window past `max_position_embeddings`.

        Raises:
            TypeError: any other argument.
            ValueError: ids outside the vocabulary, more than `max_position_embeddings` tokens (without a cache, or with
                learned positions), padding after tokens, a row of padding alone, or a cache of another kind.
        """
        check_arguments(self, kwargs, PASSED_THROUGH)
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        check_flex_attention(self.config, inputs_embeds.device)
        length = inputs_embeds.shape[1]
        if cache is None and use_cache:
            cache = PerceiverSCache(self.config)
        if cache is not None and num_latents is not None:
            raise ValueError("num_latents is for passes without a cache, whose windows decide how many there are.")
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("gradient checkpointing computes layers twice, which a cache would count: give no cache.")
        if cache is not None and not hasattr(cache, "window_start"):
            raise ValueError(f"PerceiverS decodes with PerceiverSCache(model.config), not with {type(cache).__name__}.")
        seen = cache.get_seq_length() if cache is not None else 0
        valid = self._valid_columns(attention_mask, seen, length, cached=cache is not None)
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None]
            if valid is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
            elif seen:
                last = cache.columns("positions", seen - 1, seen) - self.config.position_offset
                position_ids = position_ids + last + 1
        elif position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            turned = position_ids.diff(dim=-1) <= 0
            if valid is not None:
                turned = turned & valid[:, 1:] & valid[:, :-1]
            if bool(turned.any()):
                raise ValueError(
                    "position_ids begin anew in the middle of a row: PerceiverS takes one piece a row, not packed ones."
                )
        position_ids = position_ids + self.config.position_offset
        limit = self.config.max_position_embeddings
        if seen + length > limit and (cache is None or self.embed_positions is not None):
            raise ValueError(
                f"{seen + length} tokens are more than max_position_embeddings ({limit}): give the last {limit}."
            )
        if self.embed_positions is not None:
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)

        context = Context(inputs_embeds)
        # An adapter around the embedding has other vectors than its weight's rows.
        if input_ids is not None and self.embed_positions is None and not hasattr(self.embed_tokens, "base_layer"):
            context = Context(inputs_embeds, input_ids, self.embed_tokens.weight)
        if cache is not None:
            states = self._extend(context, position_ids, valid, cache, outputs_to_keep, **kwargs)
        else:
            latents = min(self.config.num_latents if num_latents is None else num_latents, length)
            if not 1 <= latents <= self.config.num_latents:
                raise ValueError(f"num_latents ({num_latents}) must lie in 1..{self.config.num_latents}.")
            states = self._compute(context, position_ids, valid, latents, **kwargs)
        return BaseModelOutputWithPast(states, cache)

    def _check_ids(self, input_ids: torch.LongTensor) -> None:
        # An accelerator would stall for this check, and an embedding raises a device error there anyway.
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and input_ids.numel():
            low, high = torch.aminmax(input_ids)
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids run from {int(low)} to {int(high)}, outside the vocabulary of {self.config.vocab_size}."
                )

    def _valid_columns(self, attention_mask, seen: int, length: int, cached: bool) -> torch.Tensor | None:
        """(B, T) bool of the new tokens, False for padding; `None` where none of them is."""
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2 or attention_mask.shape[1] != seen + length:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} is not (batch, {seen} cached + {length} new)."
            )
        valid = attention_mask[:, seen:].bool()
        if bool(valid.all()):
            return None
        # With a cache a first chunk may be padding alone; what comes after a token may not.
        ended = (attention_mask[:, 1:] < attention_mask[:, :-1]).any() if cached else ~valid[:, -1].all()
        if bool(ended):
            raise ValueError(
                "attention_mask has padding at the end of a row, or nothing else in it: PerceiverS computes the last "
                "positions. Pad on the left (tokenizer.padding_side = 'left'), and give every row a token."
            )
        return valid

    def _compute(self, context: Context, position_ids, valid, latents: int, **kwargs) -> torch.Tensor:
        """States of the last `latents` positions, without a cache."""
        length = context.embeddings.shape[1]
        first = length - latents
        tables = self.rotary_emb(context.embeddings, position_ids)
        own_tables = tuple(table[:, first:] for table in tables)
        states = self.latent_proj(context.embeddings[:, first:])
        for scale, layer in zip(self.config.cross_scales, self.cross_layers, strict=True):
            plan = plan_cross(self.config, scale, length, latents, window=first, valid=valid)
            states = layer(
                states,
                plan,
                own_tables,
                context=context.rows(plan.start),
                context_tables=tuple(table[:, plan.start :] for table in tables),
                **kwargs,
            )
        plan = AttentionPlan(first, latents, latents, valid=None if valid is None else valid[:, first:])
        for layer in self.layers:
            states = layer(states, plan, own_tables, **kwargs)
        return self.norm(states)

    def _extend(self, context: Context, position_ids, valid, cache: PerceiverSCache, keep: int, **kwargs):
        """States of the last `keep` new tokens (0: of the last window's), each computed in its own window."""
        seen = cache.tokens_seen
        cache.append(context.embeddings, position_ids, valid)
        tables = self.rotary_emb(context.embeddings, position_ids)
        for layer, store in zip(self.cross_layers, cache.cross_layers, strict=True):
            store.update(*layer.context_keys_values(context, tables))
        stop = cache.tokens_seen
        wanted = max(seen, stop - keep if keep else cache.window_start(stop - 1))
        parts = []
        while wanted < stop:
            window = cache.window_start(wanted)
            end = min(stop, window + cache.num_latents)
            parts.append(self._run_window(cache, window, end, **kwargs)[:, wanted - end :])
            wanted = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run_window(self, cache: PerceiverSCache, window: int, end: int, **kwargs) -> torch.Tensor:
        """States of the columns up to `end` that the window starting at `window` has not computed yet."""
        kept = cache.start_window(window) if window != cache.window else None
        start = cache.computed
        states = self._cross(cache, start if kept is None else start + kept.shape[1], end, **kwargs)
        if kept is not None:
            states = torch.cat((kept, states), dim=1)
        cache.keep_latents(states, start)
        tables = self.rotary_emb(states, cache.columns("positions", start, end))
        valid = cache.valid_columns(end)
        valid = None if valid is None else valid[:, window:]
        plan = AttentionPlan(window, end - window, end - start, valid=valid)
        for layer, store in zip(self.layers, cache.self_layers, strict=True):
            states = layer(states, plan, tables, cache_layer=store, **kwargs)
        cache.computed = end
        return self.norm(states)

    def _cross(self, cache: PerceiverSCache, start: int, end: int, **kwargs) -> torch.Tensor:
        """Cross-attended latents of the columns `start ... end` of the cache's window."""
        window = cache.window
        states = self.latent_proj(cache.columns("embeddings", start, end))
        tables = self.rotary_emb(states, cache.columns("positions", start, end))
        stream = self.config.cross_kv_source == "stream"
        if stream:
            self._leave_stream(cache, window)
        for scale, layer, store in zip(self.config.cross_scales, self.cross_layers, cache.cross_layers, strict=True):
            if stream:
                store.overwrite(start, *layer.stream_keys_values(states, tables))
            plan = plan_cross(
                self.config,
                scale,
                end,
                end - start,
                window,
                cache.context_start(window),
                cache.valid_columns(end),
            )
            keys_values = (store.keys[:, :, plan.start : end], store.values[:, :, plan.start : end])
            states = layer(states, plan, tables, keys_values=keys_values, **kwargs)
        return states

    def _leave_stream(self, cache: PerceiverSCache, window: int) -> None:
        """Give columns that were latents and now come before the window the keys and values of context again."""
        if cache.stream_from < window:
            rows = cache.columns("embeddings", cache.stream_from, window)
            tables = self.rotary_emb(rows, cache.columns("positions", cache.stream_from, window))
            for layer, store in zip(self.cross_layers, cache.cross_layers, strict=True):
                store.overwrite(cache.stream_from, *layer.context_keys_values(Context(rows), tables))
        cache.stream_from = window


class PerceiverSForCausalLM(PerceiverSPreTrainedModel, GenerationMixin):
    """PerceiverS with its language-model head; `generate()` builds `PerceiverSCache` and keeps events valid."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PerceiverSConfig):
        super().__init__(config)
        self.model = PerceiverSModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        # With this flag on, loading would drop the entries that are our own: refill_length, midi_grammar.
        self.generation_config._from_model_config = False
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: Transformers' paged cache holds one attention layer's keys and values for every decoder layer.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "PerceiverS has no continuous batching: its cache holds a long context and a window of latents that is "
            "computed anew now and then, and pages hold neither. Call generate() with a batch of prompts."
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_latents: int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """As `PerceiverSModel.forward`, with `labels` (B, T), aligned with the tokens as everywhere (-100: ignored).

        Returns logits (B, n, vocab_size) of the last n positions. With labels and T > N the last token is a target
        only: the N latents before it predict `labels[:, -N:]`, so that T may be `max_position_embeddings + 1`. The loss
        is the mean in nats per token over the latents' targets; set the labels of other tokens to -100, as
        `SegmentDataset` does: `Trainer` counts them.
        """
        shift_labels = None
        if labels is not None:
            latents = num_latents or self.config.num_latents
            if labels.shape[1] > latents:
                shift_labels = labels[:, -latents:].contiguous()
                input_ids, attention_mask, position_ids, inputs_embeds = (
                    None if given is None else given[:, :-1]
                    for given in (input_ids, attention_mask, position_ids, inputs_embeds)
                )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_latents=num_latents,
            outputs_to_keep=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, shift_labels=shift_labels, **kwargs
            )
        # By position: the third is named by the version of Transformers.
        cache = getattr(outputs, CACHE_NAME)
        found = outputs.hidden_states, outputs.attentions, outputs.get("cross_attentions")
        return CausalLMOutputWithCrossAttentions(loss, logits, cache, *found)

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
        given = model_kwargs.get(CACHE_NAME) is not None
        if given and generation_config.use_cache is False:
            raise ValueError("a cache was given, and use_cache=False: leave one of them out.")
        if given or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: PerceiverS decodes with its own "
                "PerceiverSCache; leave cache_implementation out."
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool((mask != 0).any(-1).all()):
            raise ValueError("attention_mask holds a row of padding alone: give every row of the prompt a token.")
        limit = self.config.max_position_embeddings
        if self.config.absolute_positions and max_cache_length > limit:
            raise ValueError(
                f"{max_cache_length} tokens were asked for, but this model has learned {limit} positions "
                "(max_position_embeddings) and cannot go past them: shorten the prompt or max_new_tokens."
            )
        cache = PerceiverSCache(self.config, getattr(generation_config, "refill_length", None))
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            # Its warning at the context's length is wrong here: the cache moves the context on.
            if hasattr(criterion, "max_position_embeddings") and not self.config.absolute_positions:
                criterion.max_position_embeddings = None
        return criteria

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if self.config.grammar is not None and getattr(generation_config, "midi_grammar", True):
            # First: a top-k or top-p filter must choose among valid tokens, or it may leave none.
            processors.insert(0, PerformanceGrammarLogitsProcessor(self.config, generation_config.max_length))
        return processors


__all__ = ["PerceiverSForCausalLM", "PerceiverSModel", "PerceiverSPreTrainedModel"]
