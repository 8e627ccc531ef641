#!/usr/bin/env bash
# Triton's interpreter (TRITON_INTERPRET=1, triton 3.9.0) and bfloat16
#
# Expected: x.to(tl.bfloat16) rounds to the nearest, as it does on a GPU and in torch, so that a kernel's results on a
# CPU are those of the device but for the order of sums.
# Seen: the interpreter cuts the lower 16 bits off. What a kernel stores in bf16 is up to one unit in the last place from
# what it was, twice as far as rounding, and always towards zero. A tolerance that a kernel meets on a GPU may fail in
# the interpreter, and a bias that is seen there is not the kernel's.
#
# Fails if any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat > "$folder/cast.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


x = torch.linspace(1, 2, 1024)
y = torch.empty(1024, dtype=torch.bfloat16)
cast[(1,)](x, y, 1024)
cut = (x.view(torch.int32) & -65536).view(torch.float32)
print(f'triton {triton.__version__}: largest error {(y - x).abs().max():.5f}, rounded {(x.bfloat16() - x).abs().max():.5f}')
assert torch.equal(y.float(), cut) and not torch.equal(y, x.bfloat16())
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/cast.py"
echo "as described: the interpreter cuts bf16 off"
