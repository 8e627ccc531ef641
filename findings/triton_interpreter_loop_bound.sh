#!/usr/bin/env bash
# Triton's interpreter (triton 3.6.0, which belongs to torch 2.10 and 2.11) beside numpy 2.4
#
# Expected: a kernel with a loop up to one of its arguments, `for start in range(0, n, BLOCK)`, runs in the interpreter
# (TRITON_INTERPRET=1) as it does on a GPU, with any numpy that pip lets stand beside it: triton does not name numpy
# among what it needs, so pip sees no conflict.
# Seen: with numpy 2.4.6 the loop is a TypeError, "only 0-dimensional arrays can be converted to Python scalars". The
# interpreter holds a scalar as an array of one element and asks numpy to convert it, which numpy deprecated in 1.25 and
# refuses since 2.4. With numpy 2.3.5 the same kernel gives its sum; a kernel without such a loop runs with both.
# triton 3.9.0 runs all of it with numpy 2.4.6.
#
# Fails if any of this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernels.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def looped(x, out, n, BLOCK: tl.constexpr):
    total = 0.0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + at, mask=at < n, other=0.0), 0)
    tl.store(out, total)


@triton.jit
def straight(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + at, mask=at < n, other=0.0), 0))


x, out = torch.arange(10.0), torch.zeros(1)
straight[(1,)](x, out, 10, BLOCK=16)
assert out.item() == 45
out.zero_()
try:
    looped[(1,)](x, out, 10, BLOCK=4)
    print('loop', out.item())
except Exception as e:
    print('loop', 'only 0-dimensional arrays can be converted' in str(e) and 'refused')
PY
run() { # triton, numpy, what the loop comes to
    rm -rf "$folder/venv"
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 "triton==$1" "numpy==$2"
    found="$(TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernels.py")"
    echo "triton $1, numpy $2: $found (expected: $3)"
    test "$found" = "$3"
}
run 3.6.0 2.4.6 'loop refused'
run 3.6.0 2.3.5 'loop 45.0'
run 3.9.0 2.4.6 'loop 45.0'
echo "as described"
