"""Kill runs at random moments, resume each to the end, and hold it against one that was never killed.

    python tests/kill_runs.py --runs=50 --report=results/kill

Half of the kills strike anywhere in a run's life, by the clock; the others strike inside a save, at a random
byte of the file or between two of the steps that put it in place. A killed run is started again with
--init_from=auto, as a cluster's queue would do, and may be killed again. After every kill each checkpoint of
the folder must load; at the end metrics, weights and optimizer must be those of the reference, bit for bit.
POSIX only.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')

import tiny  # noqa: E402
from runs import checkpoint, files, metrics  # noqa: E402

KNOBS = {**tiny.TINY, 'max_iters': 40, 'eval_interval': 10, 'checkpoint_interval': 4, 'lr_decay_iters': 40}
SAVES = 10  # that a run makes


class CountedFile:
    """Kills the process once `limit` bytes of a file are written."""

    def __init__(self, file, limit):
        self.file, self.left = file, limit

    def write(self, chunk):
        self.file.write(bytes(chunk)[: self.left])
        self.file.flush()
        self.left -= len(chunk)
        if self.left <= 0:
            tiny.kill_me()
        return len(chunk)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def kill_in_save(number, moment):
    """Fault of a process: SIGKILL in its save `number`, at byte `moment`, or before system call -moment."""
    save, calls = checkpoint.save, []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == -moment:
                tiny.kill_me()
            return function(*args, **kwargs)

        return call

    def opened(path, mode='r', **kwargs):
        file = open(path, mode, **kwargs)
        return CountedFile(file, moment) if moment >= 0 and mode == 'wb' else file

    def the_save(*args):
        nonlocal number
        number -= 1
        if number == 0:
            files.open = opened
            for name in ('fsync', 'link', 'unlink', 'replace'):
                setattr(files.os, name, counted(getattr(os, name)))
        save(*args)

    checkpoint.save = the_save


def iteration(out):
    """How far a run's metrics go."""
    path = out / metrics.METRICS
    records = metrics.read_jsonl(path) if path.exists() else []
    return records[-1]['iter'] if records else 0


def kill_and_resume(number, reference, data, folder, moments, seconds, size) -> dict:
    """One run, killed one to three times. moments: random.Random; seconds, size: of the reference."""
    out, kills, saved, stale = folder / f'run{number}', [], 0, set()
    argv = tiny.flags(out, dataset=data, init_from='auto', **KNOBS)
    wanted = moments.randint(1, 3)
    while len(kills) < wanted:
        if (number + len(kills)) % 2:
            limit, fault, kind = moments.uniform(0, seconds), None, 'by the clock'
        else:
            moment = moments.choice([moments.randrange(size), -moments.randint(1, 12)])
            limit, kind = 60, f'in a save, at byte {moment}' if moment >= 0 else f'in a save, call {-moment}'
            fault = partial(kill_in_save, moments.randint(1, SAVES // 2), moment)
        program = tiny.Program(argv, folder / f'run{number}.log', fault=fault)
        program.process.join(limit)
        program.process.kill()
        if program.end() == 0:  # it was done before its moment came
            if kills:
                break
            shutil.rmtree(out)
            continue
        before, lost = saved, []
        for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST):
            if (out / name).exists():
                try:
                    state = checkpoint.load(out / name)
                    saved = state['iter'] if name == checkpoint.LAST else saved
                except checkpoint.CheckpointError as e:
                    lost.append(str(e))
            elif name == checkpoint.LAST and before:
                lost.append(f'{name} is gone')
        if saved < before:
            lost.append(f'{checkpoint.LAST} went back from iteration {before} to {saved}')
        torn = set(out.glob(f'{checkpoint.LAST}.tmp-*'))
        kills.append(
            {
                'kind': kind,
                'half_written': sum(path.stat().st_size for path in torn - stale) if torn - stale else None,
                'iteration': iteration(out),
                'checkpoint': saved,
                'lost': lost,
            }
        )
        stale = torn
    program = tiny.Program(argv, folder / f'run{number}-end.log')
    assert program.end(120) == 0, program.text()
    try:
        tiny.assert_same_run(reference, out)
        identical = True
    except AssertionError as e:
        identical = str(e) or False
    return {'run': number, 'kills': kills, 'identical': identical}


def main(argv) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--runs', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--report', type=Path, help='folder for report.json and README.md')
    options = parser.parse_args(argv)
    moments, began = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = tiny.write_tokens(folder / 'tokens')
        for name in ('warm', 'reference'):  # the first one also starts the process that the others fork from
            started = time.monotonic()
            program = tiny.Program(tiny.flags(folder / name, dataset=data, **KNOBS), folder / f'{name}.log')
            assert program.end() == 0, program.text()
        seconds = time.monotonic() - started
        reference = folder / 'reference'
        size = (reference / checkpoint.LAST).stat().st_size
        results = []
        for number in range(options.runs):
            results.append(kill_and_resume(number, reference, data, folder, moments, seconds, size))
            print(json.dumps(results[-1]), flush=True)
    kills = [kill for result in results for kill in result['kills']]
    report = {
        'runs': len(results),
        'kills': len(kills),
        'kills_while_a_file_was_written': sum(kill['half_written'] is not None for kill in kills),
        'runs_bit_identical': sum(result['identical'] is True for result in results),
        'checkpoints_lost': sum(len(kill['lost']) for kill in kills),
        'most_steps_repeated': max(kill['iteration'] - kill['checkpoint'] for kill in kills),
        'steps_per_run': KNOBS['max_iters'],
        'checkpoint_interval': KNOBS['checkpoint_interval'],
        'checkpoint_bytes': size,
        'minutes': round((time.monotonic() - began) / 60, 1),
        'seed': options.seed,
        'commit': metrics.commit(),
        'device': metrics.device_name('cpu'),
        'versions': metrics.versions(),
    }
    if options.report:
        write(options.report, report, results)
    print(json.dumps(report, indent=1))
    return report


def write(folder, report, results):
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report, 'results': results}, indent=1) + '\n'
    (folder / 'report.json').write_text(text, encoding='utf-8')
    command = (
        f'python tests/kill_runs.py --runs={report["runs"]} --seed={report["seed"]} --report=results/kill'
    )
    what = (
        f'`{command}`: tiny runs on CPU, with dropout, each killed with SIGKILL one to three times, started '
        'again with `--init_from=auto` and compared with one that was never killed: metrics, weights, '
        'optimizer, best loss. Half of the kills strike by the clock, the others in a save. `report.json` '
        'has every kill: its kind, the bytes of the file that was being written, the iteration that the run '
        'had come to and that of its last checkpoint.'
    )
    rows = [f'| {name.replace("_", " ")} | {report[name]} |' for name in list(report)[:9]]
    where = (
        f'Commit {report["commit"][:12]}, {report["device"]}, torch {report["versions"]["torch"]}, '
        f'{report["minutes"]} minutes.'
    )
    parts = ['# Runs that were killed', fill(what, 110), '\n'.join(['| | |', '| --- | --- |', *rows]), where]
    (folder / 'README.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')


if __name__ == '__main__':
    found = main(sys.argv[1:])
    sys.exit(found['runs'] != found['runs_bit_identical'] or found['checkpoints_lost'] > 0)
