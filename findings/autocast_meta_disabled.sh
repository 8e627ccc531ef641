#!/usr/bin/env bash
# torch.autocast('meta', enabled=False) (torch 2.13.0)
#
# Expected: a region in which autocast is switched off does nothing, on any device; layers that switch it off around an
# fp32 recurrence or a loss then run on the meta device as well, where models are built and counted without memory.
# Seen: RuntimeError('unsupported scalarType'), since the context asks for the device's autocast type before it looks at
# `enabled`. torch.amp.is_autocast_available('meta') says False and is the way to find out first.
#
# Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch

with torch.autocast('cpu', enabled=False):
    pass
assert not torch.amp.is_autocast_available('meta')
try:
    with torch.autocast('meta', enabled=False):
        pass
except RuntimeError as e:
    print(f"torch {torch.__version__}: autocast('meta', enabled=False) raises {e!r}")
    assert 'unsupported scalarType' in str(e)
else:
    raise SystemExit('it does nothing now, as expected')
PY
echo "as described: switched off, autocast still raises on meta"
