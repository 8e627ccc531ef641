"""train.py that says when it has come to a step: `torchrun tests/faults.py STEP WHAT_THEN train's arguments`.

WHAT_THEN: 'go on', 'die' (rank 1 is killed), or 'die once' (unless torchrun has started it again).
"""

import os
import sys

import tiny
import train
from runs.ranks import run_rank

if __name__ == '__main__':
    step, then, *argv = sys.argv[1:]

    def action():
        print(f'rank {os.environ["RANK"]} at step {step}', flush=True)
        again = os.environ['TORCHELASTIC_RESTART_COUNT'] != '0'
        if os.environ['RANK'] == '1' and (then == 'die' or (then == 'die once' and not again)):
            tiny.kill_me()

    tiny.at_step_after_saves(int(step), action)
    run_rank(train.main, argv)
