#!/usr/bin/env bash
# A stock Llama with PEFT's prompt tuning, generate(): with transformers 5.24.0 and peft 0.21.2, the newest on PyPI, the
# virtual tokens are put in again before every new token, and the cached text is another than the uncached one. PEFT looks
# for the cache among the model's inputs as `past_key_values`; from 5.24 on it is called `cache`. With 5.23.0 they agree.
#
# Expected: the same tokens with and without a cache, or an error. Seen: other tokens, no error.
# Versions: transformers 5.23.0 and 5.24.0, peft 0.21.2, torch 2.13.0, Python 3.11; run on 2026-12-01. Output seen:
#   5.23.0: 11 of 11 passes after the prompt's are of one token; cached and uncached tokens are the same
#   5.24.0: 0 of 11 passes after the prompt's are of one token; cached and uncached tokens differ
# Ends with 1 if that changes, with 2 if it could not be run.
set -euo pipefail
trap 'echo "not run to its end: see above" >&2; exit 2' ERR
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
cat >tuned.py <<'PYTHON'
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
base = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.5, eos_token_id=None, pad_token_id=0))
model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
lengths = []


def count(module, args, given):
    states = given["inputs_embeds"] if given.get("inputs_embeds") is not None else given["input_ids"]
    lengths.append(states.shape[1])


prompt = torch.arange(1, 21)[None]
options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
uncached = model.generate(input_ids=prompt, use_cache=False, **options)
base.register_forward_pre_hook(count, with_kwargs=True)
cached = model.generate(input_ids=prompt, use_cache=True, **options)
ones = sum(length == 1 for length in lengths[1:])
same = "are the same" if torch.equal(cached, uncached) else "differ"
print(f"{transformers.__version__}: {ones} of {len(lengths) - 1} passes after the prompt's are of one token; "
      f"cached and uncached tokens {same}")
PYTHON
python3 -m venv .venv
.venv/bin/pip install -q torch==2.13.0
.venv/bin/pip install -q transformers==5.23.0 peft==0.21.2
for version in 5.23.0 5.24.0; do
    .venv/bin/pip install -q "transformers==$version"
    .venv/bin/python tuned.py 2>/dev/null | tee -a seen
done
diff seen - <<'SEEN' || exit 1
5.23.0: 11 of 11 passes after the prompt's are of one token; cached and uncached tokens are the same
5.24.0: 0 of 11 passes after the prompt's are of one token; cached and uncached tokens differ
SEEN
