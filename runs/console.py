"""What a training run shows while it works: lines, and a bar where there is a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its default takes a semaphore, which ranks.leave would leave behind


def say(*args):
    """Print on rank 0, above the bar. A terminal or a pipe that has gone away does not stop the training."""
    if os.environ.get('RANK', '0') == '0':
        with contextlib.suppress(OSError):
            tqdm.write(' '.join(str(a) for a in args))
            sys.stdout.flush()


def warn(text: str):
    """Print on stderr, on rank 0: for programs whose output is the text of a model."""
    if os.environ.get('RANK', '0') == '0':
        with contextlib.suppress(OSError):
            tqdm.write(text, file=sys.stderr)


class Progress:
    """A bar of all iterations on a terminal; elsewhere a line wherever metrics are logged."""

    def __init__(self, max_iters: int, it: int, on: bool):
        """it: iterations that are done already; on: false on ranks that show nothing."""
        self.max_iters, self.on = max_iters, on
        self.bar = tqdm(total=max_iters, initial=it, unit='it', disable=not (on and sys.stderr.isatty()))

    def step(self):
        self.bar.update()

    def show(self, values: dict, seconds: float):
        """values: as they are logged; seconds: of training so far."""
        it, loss, mfu = values['iter'], values['loss'], values['mfu']
        speed = f'{values["tokens_per_s"]:,.0f} tokens/s' + (f', MFU {mfu:.1%}' if mfu else '')
        self.bar.set_postfix_str(f'loss {loss:.4f}, {speed}')
        if self.on and self.bar.disable:
            left = (self.max_iters - it) * (seconds / max(1, it))
            say(f'iter {it:>6}: loss {loss:.4f}, lr {values["lr"]:.2e}, {speed}, {left / 60:.1f} min left')

    def close(self):
        self.bar.close()
