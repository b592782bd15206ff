#!/usr/bin/env bash
# transformers 5.24.0 hands the cache of generate() to a model's forward() as `cache`; until 5.23.0 it was
# `past_key_values`. A model outside of the library whose forward() has past_key_values and **kwargs, as the library's
# own guides had them, swallows the new name and computes every token after the prompt from the last token alone.
#
# Expected of a minor release: the old name still works (as it does on the library's own models, with a deprecation),
# or an error. Seen: other tokens, no error and no warning; the log says once that `past_key_values` is deprecated, as of a
# name that still works.
# Versions: transformers 5.23.0 and 5.24.0, torch 2.13.0, Python 3.11; run on 2026-12-01. Output seen:
#   5.23.0: cached and uncached tokens are the same
#   5.24.0: cached and uncached tokens differ, warnings: 0
# Ends with 1 if that changes, with 2 if it could not be run.
set -euo pipefail
trap 'echo "not run to its end: see above" >&2; exit 2' ERR
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
cat >model.py <<'PYTHON'
import warnings

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class Config(PreTrainedConfig):
    model_type = "one-layer"
    vocab_size: int = 64
    hidden_size: int = 32
    num_hidden_layers: int = 1
    num_attention_heads: int = 1


class OneLayer(PreTrainedModel, GenerationMixin):
    """Embedding, one attention layer, head."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, **kwargs):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        query, key, value = self.qkv(self.embed(input_ids))[:, None].chunk(3, dim=-1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        new, seen = query.shape[2], key.shape[2]
        mask = torch.ones(new, seen, dtype=torch.bool).tril(seen - new)
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)[:, 0]
        return CausalLMOutputWithPast(logits=self.head(states), past_key_values=past_key_values)


torch.manual_seed(0)
model = OneLayer(Config()).eval()
for parameter in model.parameters():
    nn.init.normal_(parameter)
prompt = torch.arange(1, 21)[None]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    cached, uncached = (model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=u) for u in (True, False))
if torch.equal(cached, uncached):
    print(f"{transformers.__version__}: cached and uncached tokens are the same")
else:
    print(f"{transformers.__version__}: cached and uncached tokens differ, warnings: {len(caught)}")
PYTHON
python3 -m venv .venv
.venv/bin/pip install -q torch==2.13.0
for version in 5.23.0 5.24.0; do
    .venv/bin/pip install -q "transformers==$version"
    .venv/bin/python model.py 2>/dev/null | tee -a seen
done
diff seen - <<'SEEN' || exit 1
5.23.0: cached and uncached tokens are the same
5.24.0: cached and uncached tokens differ, warnings: 0
SEEN
