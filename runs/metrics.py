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
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from runs import files
from runs.checkpoint import BEST, LAST, PREVIOUS
from runs.datasets import bytes_per_token
from runs.records import METRICS, RUN, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
RUN_FILES = (LAST, PREVIOUS, BEST, METRICS, RUN)  # all that a run leaves in its folder
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
    """A checkout's commit, '+changes' if tracked files differ from it, except what runs write (results,
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


class Wandb:
    """wandb, where it is wanted and works. An error of wandb is reported once, and training goes on."""

    def __init__(self, on: bool, project: str, name: str, group: str, out_dir, config: dict, run_id=None):
        """run_id: by which wandb knows the run that this one goes on with; None for a new one."""
        self.run, self.run_id = None, run_id
        if not on:
            return
        try:
            import wandb

            os.environ.setdefault('WANDB_SILENT', 'true')
            self.run = wandb.init(
                project=project,
                name=name,
                group=group or None,
                dir=str(out_dir),
                config=config,
                id=run_id,
                resume='allow',
            )
            self.run_id = self.run.id
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
        # the step is ours: a run that is resumed offline would count from 0 again
        self._call(lambda run: run.log(record, step=record['iter']))

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


def describe_run(k, argv, model, data, device: str, dtype: str, world: int) -> dict:
    """What run.json says of a run when it begins. world: the number of ranks."""
    return {
        'config': asdict(k),
        'command': ' '.join(argv),
        'commit': commit(),
        'versions': versions(),
        'device': {'type': device, 'name': device_name(device), 'dtype': dtype, 'ranks': world},
        'threads': torch.get_num_threads(),
        'describe': model.describe(),
        'model': {
            'params': model.num_params(),
            'params_total': model.num_params(non_embedding=False),
            'params_by_part': model.parts(),
            'flops_per_token': model.flops_per_token(),
            'cache_bytes_per_token': model.cache_bytes_per_token(),
            'state_bytes': model.state_bytes(),
            'kv_heads': [list(block.attn.heads_produced()) for block in model.transformer.h],
            'vocab_size': model.config.vocab_size,
        },
        'data': {
            'folder': k.dataset,
            'fingerprint': data.fingerprint,
            'tokens': {name: len(tokens) for name, tokens in data.splits.items()},
            'bytes_per_token': bytes_per_token(data),
        },
        'tokens_per_step': k.gradient_accumulation_steps * k.batch_size * k.block_size,
        'status': 'running',
    }


def headline(run: dict, model, resume_iter: int | None, done: bool) -> str:
    """What a run says first. run: see describe_run; done: whether it has no step left to make."""
    k, device = run['config'], run['device']
    said = (
        f'{k["out_dir"]}: {model.summary()}; {run["tokens_per_step"]:,} tokens per step; {device["type"]} '
        f'{device["dtype"]}, {device["ranks"]} rank{"s" * (device["ranks"] > 1)}'
    )
    if resume_iter is not None:
        said += f'; from iteration {resume_iter}'
    if done:
        said += f'\nall {k["max_iters"]} iterations of this run are done: a higher --max_iters goes on'
    return said


def wandb_id(out_dir: Path) -> str | None:
    """By which id wandb knows the run in the folder; None where its run.json does not say one."""
    try:
        found = json.loads((out_dir / RUN).read_text(encoding='utf-8')).get('wandb_id')
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


class Speed:
    """Tokens per second, and the share of the device's peak FLOP/s, since the last reading."""

    def __init__(self, run: dict, device: str, it: int, seconds: float):
        """run: see describe_run; it, seconds: of training so far."""
        self.tokens_per_step, self.flops_per_token = run['tokens_per_step'], run['model']['flops_per_token']
        peak = peak_flops(device)
        self.peak = peak and peak * run['device']['ranks']
        self.it, self.seconds = it, seconds

    def read(self, it: int, seconds: float) -> dict:
        tokens_per_s = (it - self.it) * self.tokens_per_step / (seconds - self.seconds)
        self.it, self.seconds = it, seconds
        mfu = tokens_per_s * self.flops_per_token / self.peak if self.peak else None
        return {'tokens_per_s': round(tokens_per_s, 1), 'mfu': mfu}


class Record:
    """The record of a run in all its places: metrics.jsonl, run.json and wandb. Where `on` is false (on other
    ranks than the first, or where a run is only evaluated) nothing is written."""

    def __init__(self, on: bool, k, run: dict, resume_iter: int | None = None, events: Sequence = ()):
        """run: see describe_run; resume_iter: of the checkpoint that the run goes on from, or None: then what
        the folder holds is deleted; events: to record at once."""
        self.on = on
        if on:
            out_dir = Path(k.out_dir)
            for name in RUN_FILES if resume_iter is None else ():
                (out_dir / name).unlink(missing_ok=True)
            if resume_iter is None:
                files.remove_shards(out_dir)
            files.remove_stale(out_dir)
            run_id = None if resume_iter is None else wandb_id(out_dir)
            self.metrics = Metrics(out_dir, run, resume_iter)
            name = k.wandb_run_name or out_dir.name
            self.wandb = Wandb(k.wandb_log, k.wandb_project, name, k.wandb_group, out_dir, run, run_id)
            if self.wandb.run_id:
                self.metrics.update(wandb_id=self.wandb.run_id)

            for event in events:
                self.event(event)

    def log(self, values: dict, seconds: float):
        """A line of metrics, everywhere. values: 'iter' and more; seconds: of training so far."""
        if self.on:
            tokens = values['iter'] * self.metrics.run['tokens_per_step']
            self.metrics.log({**values, 'tokens': tokens, 'seconds': round(seconds, 3)})
            self.wandb.log({name: value for name, value in values.items() if value is not None})

    def event(self, values: dict):
        """Log a line that is not a metric; its 'event' says what happened."""
        if self.on:
            self.metrics.log(values)

    def sync(self):
        if self.on:
            self.metrics.sync()

    def end(self, status: str, it: int, seconds: float, best_val_loss: float, device: str):
        """Close the record. Called in a `finally`: an exception that is being raised is recorded too."""
        if not self.on:
            return
        memory, error = peak_memory(device), sys.exc_info()[1]
        self.wandb.summary({'status': status, 'best_val_loss': best_val_loss, 'peak_memory_bytes': memory})
        self.wandb.finish(exit_code=int(status == 'failed'))
        told = error and f'{type(error).__name__}: {error}'
        end = {'status': status, 'error': told, 'iter': it, 'seconds': round(seconds, 3)}
        try:
            self.metrics.update(**end, peak_memory_bytes=memory)
        finally:
            self.metrics.close()
