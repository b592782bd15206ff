"""What `sage-music info` says of a model beside its size; a function a family."""


def of_sage_music(model, tokenizer) -> dict:
    """Vocabulary, attribute groups and cache of a SAGE-Music."""
    config = model.config
    types: dict[str, int] = {}
    for token in tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size)):
        kind = token.split("_")[0] if "+" not in token else "merged"
        types[kind] = types.get(kind, 0) + 1
    heads = config.query_heads_per_attribute or [config.num_attention_heads] * len(config.attribute_names)
    row = 2 * config.head_dim * next(model.parameters()).element_size() * config.num_hidden_layers
    return {
        "token_types": types,
        "key_value_heads_per_token": config.num_key_value_heads,
        "kv_routing": config.kv_routing,
        "attribute_groups": {
            name: {"tokens": config.token_attribute_ids.count(index), "query_heads": heads[index]}
            for index, name in enumerate(config.attribute_names)
        },
        "cache_bytes_per_token": config.num_key_value_heads * row,
        "cache_bytes_per_token_full_heads": config.num_attention_heads * row,
    }


def of_perceivers(model, tokenizer) -> dict:
    """Vocabulary, latents, scales and caches of a PerceiverS."""
    from perceivers import PerceiverSCache

    config = model.config
    grammar = tokenizer.config_fields()["grammar"]
    kinds = {kind: grammar[kind][1] - grammar[kind][0] for kind in ("note_on", "note_off", "time_shift", "velocity")}
    # Keys and values of one position in one layer.
    row = 2 * config.num_attention_heads * config.head_dim * next(model.parameters()).element_size()
    return {
        "token_types": {**kinds, "special": tokenizer.vocab_size - sum(kinds.values())},
        "latents": config.num_latents,
        "cross_layers": len(config.cross_scales),
        "cross_scales": config.cross_scales,
        "scale_mask": config.scale_mask,
        "refill_length": PerceiverSCache(config, getattr(model.generation_config, "refill_length", None)).refill_length,
        "cross_cache_bytes_per_token": len(config.cross_scales) * row,
        "latent_cache_bytes": config.num_latents * config.num_hidden_layers * row,
    }
