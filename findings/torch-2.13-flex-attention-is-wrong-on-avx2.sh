#!/usr/bin/env bash
# torch.compile(flex_attention) on a CPU without AVX-512 gives wrong numbers for narrow heads (16 channels) at some
# lengths, differing from call to call, without an error: plain causal attention, no gradient. Heads of 64 channels at the
# same lengths are right. Models of other projects reach it by
# attn_implementation="flex_attention", which Transformers compiles.
#
# Expected: the numbers of scaled_dot_product_attention (to 1e-4), or an error.
# Versions: torch 2.13.0, Python 3.11, g++ 12, x86-64, code for AVX2 (the vector width is set below, so that a processor
# with AVX-512 shows it, too); run on 2026-12-01. Output seen (a wrong result of three calls is enough):
#   heads of 16 channels, 24 tokens: wrong
#   heads of 16 channels, 88 tokens: wrong
#   heads of 16 channels, 64 tokens: right
#   heads of 64 channels, 88 tokens: right
# Ends with 1 if that changes, with 2 if it could not be run.
set -euo pipefail
trap 'echo "not run to its end: see above" >&2; exit 2' ERR
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
cat >attention.py <<'PYTHON'
import torch
import torch._inductor.config
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

torch._inductor.config.cpp.simdlen = 256
torch._dynamo.config.automatic_dynamic_shapes = False
compiled = torch.compile(flex_attention)
for width, length in ((16, 24), (16, 88), (16, 64), (64, 88)):
    worst = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (torch.randn(2, 4, length, width, generator=generator) for _ in range(3))
        mask = create_block_mask(lambda b, h, q, kv: kv <= q, 1, 1, length, length, device="cpu")
        with torch.no_grad():
            got = compiled(query, key, value, block_mask=mask)
            expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        worst = max(worst, (got - expected).abs().nan_to_num(nan=9.9, posinf=9.9).max().item())
    print(f"heads of {width} channels, {length} tokens: {'right' if worst < 1e-4 else 'wrong'}")
PYTHON
python3 -m venv .venv
.venv/bin/pip install -q torch==2.13.0 numpy==2.4.6
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 .venv/bin/python attention.py 2>/dev/null | tee seen
diff seen - <<'SEEN' || exit 1
heads of 16 channels, 24 tokens: wrong
heads of 16 channels, 88 tokens: wrong
heads of 16 channels, 64 tokens: right
heads of 64 channels, 88 tokens: right
SEEN
