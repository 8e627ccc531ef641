#!/usr/bin/env bash
# torch.utils.flop_counter.FlopCounterMode on a CPU (torch 2.13.0)
#
# Expected: the FLOPs of a call do not depend on the device that computes it.
# Seen: scaled_dot_product_attention counts 4 B H T S hs on the meta device, where it is decomposed, and 0 on a CPU,
# where it is one fused operator that the counter does not know. Triangular solves, solves, inverses and matrix-vector
# products count 0 everywhere. So the FLOPs of a transformer that are counted on a CPU leave its attention out, without
# a word, and those of a layer that solves (the chunked delta rule, say) leave the solves out on any device.
#
# Fails if any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


B, H, T, hs = 1, 4, 128, 16
q = torch.randn(B, H, T, hs)
whole = 4 * B * H * T * T * hs
on_meta, on_cpu = (count(lambda x=x: F.scaled_dot_product_attention(x, x, x)) for x in (q.to('meta'), q))
print(f'torch {torch.__version__}: attention of {whole:,} FLOPs counts {on_meta:,} on meta, {on_cpu:,} on a CPU')
assert (on_meta, on_cpu) == (whole, 0)

a, b = torch.randn(4, 64, 64).tril() + 8 * torch.eye(64), torch.randn(4, 64, 8)
found = {
    'matmul': count(lambda: a @ b),
    'solve_triangular': count(lambda: torch.linalg.solve_triangular(a, b, upper=False)),
    'solve': count(lambda: torch.linalg.solve(a, b)),
    'inv': count(lambda: torch.linalg.inv(a)),
    'mv': count(lambda: torch.mv(a[0], b[0, :, 0])),
}
print(found)
assert found.pop('matmul') == 2 * 4 * 64 * 64 * 8 and set(found.values()) == {0}
PY
echo "as described: FLOPs that are counted on a CPU leave attention and solves out"
