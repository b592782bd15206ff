#!/usr/bin/env bash
# transformers 5.24.0 with the newest peft there is, 0.21.2: model.load_adapter() takes an adapter and the model computes
# with it, but from then on the model can be neither saved, nor switched, nor asked which adapter is active: each of these
# wants peft 0.22.0 or newer, which PyPI did not have on 2026-12-01. With transformers 5.23.0 all of them work.
#
# Expected: a version of peft that load_adapter() refuses, or one that everything works with.
# Versions: transformers 5.23.0 and 5.24.0, peft 0.21.2, torch 2.13.0, Python 3.11; run on 2026-12-01. Output seen:
#   5.23.0: load_adapter works, active_adapters works, disable_adapters works, save_pretrained works
#   5.24.0: load_adapter works, active_adapters ValueError, disable_adapters ValueError, save_pretrained ValueError
# Ends with 1 if that changes, with 2 if it could not be run.
set -euo pipefail
trap 'echo "not run to its end: see above" >&2; exit 2' ERR
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
cat >adapter.py <<'PYTHON'
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def model():
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**shape))


get_peft_model(model(), LoraConfig(target_modules=["q_proj"])).save_pretrained("adapter")
adapted, said = model(), []
for name, call in (
    ("load_adapter", lambda: adapted.load_adapter("adapter")),
    ("active_adapters", lambda: adapted.active_adapters()),
    ("disable_adapters", lambda: adapted.disable_adapters()),
    ("save_pretrained", lambda: adapted.save_pretrained("saved")),
):
    try:
        call()
        said.append(f"{name} works")
    except Exception as error:
        said.append(f"{name} {type(error).__name__}")
print(f"{transformers.__version__}: {', '.join(said)}")
PYTHON
python3 -m venv .venv
.venv/bin/pip install -q torch==2.13.0
.venv/bin/pip install -q transformers==5.23.0 peft==0.21.2
for version in 5.23.0 5.24.0; do
    .venv/bin/pip install -q "transformers==$version"
    .venv/bin/python adapter.py 2>/dev/null | tee -a seen
done
diff seen - <<'SEEN' || exit 1
5.23.0: load_adapter works, active_adapters works, disable_adapters works, save_pretrained works
5.24.0: load_adapter works, active_adapters ValueError, disable_adapters ValueError, save_pretrained ValueError
SEEN
