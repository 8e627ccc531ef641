#!/usr/bin/env bash
# torch.distributed.checkpoint.CheckpointException (torch 2.13.0)
#
# Expected: a save or a load that fails raises something that `except Exception` catches, as errors do.
# Seen: CheckpointException derives from BaseException, as KeyboardInterrupt does. A program that handles a full disk, or
# a thread that hands its error over to the main thread, with `except Exception` does not see it: the thread dies with a
# traceback, and whoever waits for its result goes on as if the checkpoint had been written. A file that is missing is
# enough, in one process.
#
# Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

folder = Path(sys.argv[1]) / 'saved'
dcp.save({'weight': torch.ones(4)}, checkpoint_id=folder, no_dist=True)
next(folder.glob('*.distcp')).unlink()
try:
    dcp.load({'weight': torch.zeros(4)}, checkpoint_id=folder, no_dist=True)
except Exception as e:
    raise SystemExit(f'it is an Exception now, as expected: {type(e).__name__}')
except BaseException as e:
    print(f'torch {torch.__version__}: {type(e).__name__} passes `except Exception`; its bases: {type(e).__mro__[1:]}')
    assert type(e).__name__ == 'CheckpointException' and not isinstance(e, Exception)
else:
    raise SystemExit('a missing file went unnoticed')
PY
echo "as described: an error of a checkpoint is no Exception"
