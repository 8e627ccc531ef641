"""This process among those that torchrun started: who it is, when it stops, and how it ends."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from configurator import ConfigError, UserError
from runs.checkpoint import LAST
from runs.knobs import Knobs

# What asks a run to stop: a terminal, a queue that preempts it (Slurm sends what --signal names, often USR1),
# a limit on processor time.
STOPPING = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')


class TrainingError(UserError):
    """Training cannot go on; one line says why. All ranks raise it alike."""


class Ranks(NamedTuple):
    """This process among all: its number, its number on its host, and how many there are."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    ddp: bool = False  # whether torchrun started it, be it alone
    torchrun: int = 0  # the process id of torchrun, or 0

    @property
    def main(self) -> bool:
        return self.rank == 0


def ranks() -> Ranks:
    if 'RANK' not in os.environ:
        return Ranks()
    rank, local_rank, world = (int(os.environ[name]) for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
    return Ranks(rank, local_rank, world, ddp=True, torchrun=os.getppid())


@contextlib.contextmanager
def main_rank_first(group: Ranks, k: Knobs, device: str):
    """Joins the ranks. Rank 0 has done what is inside before the others begin it: what is wrong is said
    once, and the others find everything prepared and verified."""

    def join():
        if group.ddp:
            backend = ('nccl' if device.startswith('cuda') else 'gloo') if k.backend == 'auto' else k.backend
            dist.init_process_group(backend, timeout=timedelta(seconds=k.dist_timeout))
            dist.barrier()

    if not group.main:
        join()
    yield
    if group.main:
        join()


def refuse_unlike_ranks(k: Knobs, data, state: dict | None, device: str):
    """Ranks on several hosts may see other files: all must start with the same knobs, data and checkpoint."""
    of_the_host = {'out_dir', 'dataset', 'device', 'threads'}
    start = {name: value for name, value in asdict(k).items() if name not in of_the_host}
    tokens = {name: len(split) for name, split in data.splits.items()}
    saved = state and [state['iter'], state['seconds'], state['best_val_loss']]
    text = json.dumps([start, tokens, data.meta.get('splits'), saved])
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
    both = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    if both[0] != -both[1]:
        raise ConfigError(
            'the ranks do not start alike: every host needs the same code, knobs and data set, and to resume '
            f'the same {Path(k.out_dir) / LAST} (a shared folder, or a copy)'
        )


class StopRequest:
    """Set by a signal, or when torchrun dies: the loop saves after the step in hand and ends.

    torchrun passes on the signals that it gets, and kills ranks that are still there 30 seconds later.
    """

    def __init__(self, torchrun: int, give_up_seconds: float):
        """torchrun: its process id, or 0."""
        self.reason = ''  # why this rank wants to stop
        self.agreed = False  # whether any rank does, as of the last step
        self.torchrun, self.give_up_seconds = torchrun, give_up_seconds
        self.before = {}  # signal -> its handler outside of the loop
        if torchrun:
            threading.Thread(target=self._watch_parent, daemon=True).start()

    def catch_signals(self):
        """From here on; before the loop they end the process as usual."""
        if threading.current_thread() is threading.main_thread():
            for name in STOPPING:
                number = getattr(signal, name, None)  # Windows has not all of them
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    self.before[number] = signal.signal(number, self._on_signal)

    def release_signals(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if self.reason and number == signal.SIGINT and not self.torchrun:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for the step
        self.reason = self.reason or signal.Signals(number).name

    def _watch_parent(self):
        while os.getppid() == self.torchrun:
            time.sleep(0.2)
        self.reason = self.reason or 'the end of torchrun'
        # a rank that waits for another one that is gone never comes back to the loop, if it came there at all
        time.sleep(self.give_up_seconds if self.before else 0)
        os._exit(1)


def run_rank(main, argv: list[str]):
    """Run main(argv) as a program, which may be one rank of several; never returns.

    As configurator.run_program, but the process ends at once, and what all ranks raise alike is said once.
    """
    faulthandler.enable()  # a fault of memory leaves a trace: token files that are cut short raise SIGBUS
    rank = os.environ.get('RANK', '0')
    try:
        leave(main(argv))
    except UserError as e:
        if rank == '0' or not isinstance(e, TrainingError):
            print(f'train.py{f" (rank {rank})" * (rank != "0")}: {e}', file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        leave(130)
    except Exception as e:
        if out_of_memory(e):
            reason = (str(e) or type(e).__name__).splitlines()[0]
            print(f'train.py: the memory is used up ({reason}): {SMALLER}', file=sys.stderr)
            leave(2)
        traceback.print_exc()
        leave(1)


SMALLER = 'take a smaller batch_size and more gradient_accumulation_steps, or a smaller model'


def out_of_memory(e: Exception) -> bool:
    """Whether e says that memory could not be had; torch has no class of its own for that of a CPU."""
    of_the_cpu = isinstance(e, RuntimeError) and 'DefaultCPUAllocator' in str(e)
    return of_the_cpu or isinstance(e, (MemoryError, torch.OutOfMemoryError))


def leave(status: int):
    """End the process at once, whatever still runs or would have to be cleaned up.

    A rank that failed must not linger beside a thread, wandb or a process group whose other ranks are gone:
    torchrun ends those when this one is gone. And a process group of gloo must not be cleaned up: where
    Python lets go of it last, it waits for its thread, which may wait for Python (torch 2.13).
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
