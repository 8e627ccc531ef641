"""What a run tells about itself: metrics.jsonl and run.json in its folder, and the same to wandb if asked."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from runs import files
from runs.records import METRICS, RUN, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
WANDB_SECONDS = 60  # that wandb gets at the end to send what is left

# Dense bf16 (V100, T4: fp16) peak in FLOP/s, by a part of the device's name; the first match counts.
PEAK_FLOPS = {
    'B200': 2250e12,
    'H100 PCIe': 756e12,
    'H100 NVL': 835e12,
    'H100': 989e12,
    'H200': 989e12,
    'GH200': 989e12,
    'A100': 312e12,
    'A10G': 70e12,
    'A10': 125e12,
    'A40': 149.7e12,
    'A6000': 154.8e12,
    'L40S': 362e12,
    'L40': 181e12,
    'L4': 121e12,
    'RTX 4090': 165.2e12,
    'RTX 3090': 71e12,
    'V100': 125e12,
    'T4': 65e12,
}


def device_name(device: str) -> str:
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(device)
    if device == 'cpu' and Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or device


def peak_flops(device: str) -> float | None:
    """FLOP/s that MFU is measured against; None (no MFU is shown) for a device that is not in the table."""
    if not device.startswith('cuda'):
        return None
    name = device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf'\b{part}\b', name)), None)


def peak_memory(device: str) -> int | None:
    """Bytes: the allocator's peak on CUDA, the process's peak resident size on CPU; None if unknown."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == 'win32':
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def commit(root: Path = ROOT) -> str:
    """A checkout's commit, '+changes' if tracked files differ from it, but for what runs write (results,
    charts); 'unknown' outside of git."""

    def git(*args):
        return subprocess.run(['git', '-C', root, *args], capture_output=True, text=True, check=True).stdout

    try:
        outside = ':/', ':(top,exclude)results', ':(top,exclude)charts'
        changes = git('status', '--porcelain', '-uno', '--', *outside)
        return git('rev-parse', 'HEAD').strip() + ('+changes' if changes else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def versions() -> dict[str, str]:
    found = {'python': platform.python_version()}
    for package in ('torch', 'numpy', 'tokenizers', 'tiktoken', 'datasets', 'wandb'):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Metrics:
    """The run's record. One line per call of log(); run.json is rewritten whole by update().

    resume_iter: of the checkpoint that the run goes on from, or None for a new run. Later lines are dropped
    first, since the resumed run writes them again. Raises FileError where nothing can be written.
    """

    def __init__(self, out_dir: str | Path, run: dict, resume_iter: int | None = None):
        self.out_dir, self.run = Path(out_dir), dict(run)
        self.path = self.out_dir / METRICS
        if resume_iter is not None and self.path.exists():
            try:
                kept = [record for record in read_jsonl(self.path) if record['iter'] <= resume_iter]
            except ValueError as e:
                raise files.FileError(str(e)) from None
            files.write_text(self.path, ''.join(json.dumps(record) + '\n' for record in kept))
        self.file = open(self.path, 'w' if resume_iter is None else 'a', encoding='utf-8')
        self.update()

    def log(self, record: dict):
        # JSON has no NaN: a value that is not finite is written as null
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self.file.write(json.dumps(clean) + '\n')
            self.file.flush()
        except OSError as e:
            raise files.FileError(files.write_failed(self.path, e)) from e

    def sync(self):
        """Have what was logged on the disk, so that no power cut leaves a checkpoint without its metrics."""
        os.fsync(self.file.fileno())

    def update(self, **fields):
        self.run.update(fields)
        files.write_text(self.out_dir / RUN, json.dumps(self.run, indent=1) + '\n')

    def close(self):
        self.file.close()


@dataclass
class SpikeWatch:
    """Early warning: tells when a value stands out above the recent ones. The state is saved and resumed.

    It does where it is 10 % and 8 standard deviations above the median of the last 20 values. The deviation
    is taken from the steps between neighbours among the last 100, by their median (von Neumann, 1941, made
    robust): a falling loss does not widen it, nor does an earlier spike. A spike is told once, until a value
    is back below.
    """

    recent: list[float] = field(default_factory=list)
    high: bool = False

    def look(self, value: float) -> float | None:
        """The usual value (the median), if this one stands out and the one before it did not."""
        if not math.isfinite(value):
            return None  # a step that the loss scaler skips
        was_high, usual = self.high, None
        if len(self.recent) >= 20:
            usual = median(self.recent[-20:])
            steps = [abs(a - b) for a, b in pairwise(self.recent)]
            deviation = 1.4826 * median(steps) / math.sqrt(2)
            self.high = value > usual + max(8 * deviation, 0.1 * abs(usual))
        self.recent = [*self.recent[-99:], value]
        return usual if self.high and not was_high else None


class Wandb:
    """wandb, where it is wanted and works. Whatever it raises is told once; training goes on."""

    def __init__(self, on: bool, project: str, name: str, group: str, out_dir, config: dict):
        self.run = None
        if not on:
            return
        try:
            import wandb

            os.environ.setdefault('WANDB_SILENT', 'true')
            self.run = wandb.init(
                project=project, name=name, group=group or None, dir=str(out_dir), config=config
            )
            self.run.define_metric('iter')
            self.run.define_metric('*', step_metric='iter')
        except Exception as e:
            self._give_up(e)

    def _call(self, call):
        if self.run is None:
            return
        try:
            call(self.run)
        except Exception as e:
            self._give_up(e)

    def _give_up(self, e):
        self.run = None
        reason = f'{type(e).__name__}: {e}'.splitlines()[0]
        print(
            f'warning: wandb is off for the rest of this run ({reason}); {METRICS} has everything', flush=True
        )

    def log(self, record: dict):
        self._call(lambda run: run.log(record))

    def summary(self, record: dict):
        self._call(lambda run: run.summary.update(record))

    def finish(self, exit_code: int = 0):
        finish = threading.Thread(
            target=self._call, args=(lambda run: run.finish(exit_code=exit_code),), daemon=True
        )
        finish.start()
        finish.join(WANDB_SECONDS)
        if finish.is_alive():
            print(
                f'warning: wandb is still sending after {WANDB_SECONDS} s and is left to itself; '
                f'"wandb sync" sends what is missing, {METRICS} has everything',
                flush=True,
            )
