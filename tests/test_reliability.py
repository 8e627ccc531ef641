"""One process: whatever happens to a run, it resumes bit for bit; what cannot work is told in one line."""

import errno
import io
import json
import math
import os
import re
import signal
import stat
import sys
import threading
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import pytest
import torch

import kill_runs
import runs.start
import runs.step
import sample
import tiny
import train
from configurator import ConfigError, UserError
from data.tokendata import DataError, open_data
from data.tokenizer import Chars, TokenizerError
from runs import checkpoint, files, metrics, ranks, system
from runs.checkpoint import BEST, LAST, PREVIOUS, CheckpointError
from runs.diagnostics import FACTORS, SpikeWatch
from runs.files import FileError
from runs.models import load_model
from runs.pretrained import PretrainedError
from runs.records import read_pack
from tiny import assert_same_run, flags, happening, kill_me, lines, resume, start, status, write_tokens


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp('tokens'))


@pytest.fixture(scope='module')
def straight(tmp_path_factory, data):
    """A run of 12 steps that nothing happened to."""
    out = tmp_path_factory.mktemp('straight')
    assert start(out, data) == 0
    return out


# ---- resume


def test_n_steps_and_n_more_are_2n_steps(tmp_path, data, straight):
    start(tmp_path, data, max_iters=5, lr_decay_iters=12)  # 5 is an evaluation of the long run too
    resume(tmp_path, max_iters=12)
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize('number', [getattr(signal, name) for name in ranks.STOPPING], ids=lambda n: n.name)
def test_a_signal_saves_after_the_step_in_hand(tmp_path, data, straight, number, capsys, request):
    if signal.getsignal(number) is signal.SIG_IGN:  # the tests run under nohup, which a run would respect
        request.addfinalizer(partial(signal.signal, number, signal.SIG_IGN))
        signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with happening(6, partial(kill_me, number)):
        assert start(tmp_path, data) == 0
    assert checkpoint.load(tmp_path / LAST)['iter'] == 7  # no evaluation there, nor in the straight run
    assert status(tmp_path) == 'stopped' and lines(tmp_path)[-1]['iter'] == 7
    assert (
        f'stopped by {number.name} at iteration 7; go on with --init_from=resume' in capsys.readouterr().out
    )
    assert signal.getsignal(number) is before
    resume(tmp_path)
    assert_same_run(straight, tmp_path)


def test_a_second_ctrl_c_does_not_wait(tmp_path, data):
    def twice():
        kill_me(signal.SIGINT)
        kill_me(signal.SIGINT)

    with happening(6, twice), pytest.raises(KeyboardInterrupt):
        start(tmp_path, data)
    assert checkpoint.load(tmp_path / LAST)['iter'] == 5 and status(tmp_path) == 'failed'


def test_a_signal_during_the_evaluation_does_not_wait_for_its_end(tmp_path, data, straight, monkeypatch):
    batches, real = [], runs.step.eval_batch

    def eval_batch(*args):
        batches.append(args)
        if len(batches) == 6:  # 4 batches at iteration 0, then 2 of train, 2 of val at 5
            kill_me(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(runs.step, 'eval_batch', eval_batch)
    assert start(tmp_path, data) == 0
    assert len(batches) == 6
    assert checkpoint.load(tmp_path / LAST)['iter'] == 5 and 'val/loss' not in lines(tmp_path)[-1]
    resume(tmp_path)
    assert_same_run(straight, tmp_path)


def test_deterministic_algorithms_are_there_for_all_that_a_step_does(tmp_path, data, straight):
    """CUDA is where the knob makes a difference; CPU can at least run everything under it."""
    start(tmp_path, data, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert_same_run(straight, tmp_path)
    resume(tmp_path, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_evaluation_settings_do_not_change_the_training(tmp_path, data, straight):
    start(tmp_path, data, eval_interval=3, eval_iters=1)
    training = [[r for r in lines(out) if 'loss' in r] for out in (straight, tmp_path)]
    assert len(training[0]) == 12 and training[0] == training[1]


def test_the_last_steps_are_saved_and_best_is_the_minimum(tmp_path, data):
    # the rate rises from a good one to one that ruins the model
    start(tmp_path, data, max_iters=33, eval_interval=4, learning_rate=3.0, warmup_iters=100)
    evaluations = {r['iter']: r['val/loss'] for r in lines(tmp_path) if 'val/loss' in r}
    last, best = (checkpoint.load(tmp_path / name) for name in (LAST, BEST))
    assert last['iter'] == 33 and checkpoint.load(tmp_path / PREVIOUS)['iter'] == 32
    assert best['iter'] == min(evaluations, key=evaluations.get) < 33
    assert best['best_val_loss'] == last['best_val_loss'] == min(evaluations.values())


def test_resume_of_a_finished_run_makes_no_step(tmp_path, data, capsys):
    start(tmp_path, data)
    before = {name: (tmp_path / name).read_bytes() for name in (LAST, PREVIOUS, BEST, metrics.METRICS)}
    steps = []
    with happening(12, lambda: steps.append(12)):
        assert resume(tmp_path) == 0
    assert not steps and before == {name: (tmp_path / name).read_bytes() for name in before}
    assert status(tmp_path) == 'finished'
    assert 'all 12 iterations of this run are done: a higher --max_iters goes on' in capsys.readouterr().out


def test_training_knobs_of_a_resume_are_told_and_applied(tmp_path, data, capsys):
    start(tmp_path, data, max_iters=5)
    resume(tmp_path, max_iters=6, weight_decay=0.3, beta2=0.9, dropout=0.0)
    out = capsys.readouterr().out
    for line in (
        'weight_decay is now 0.3, was 0.1',
        'beta2 is now 0.9, was 0.98',
        'dropout is now 0.0, was 0.1',
    ):
        assert f'resume: {line}' in out
    saved = checkpoint.load(tmp_path / LAST)
    groups = saved['optimizer']['param_groups']
    assert [g['weight_decay'] for g in groups] == [0.3, 0.0] and groups[0]['betas'] == (0.9, 0.9)
    assert saved['config']['weight_decay'] == 0.3
    resume(tmp_path, max_iters=7)  # they stay
    assert checkpoint.load(tmp_path / LAST)['config']['weight_decay'] == 0.3


@pytest.mark.parametrize(
    'knobs, line',
    [
        ({'n_embd': 64}, 'n_embd=64, but the checkpoint in {out} was trained with n_embd=32'),
        (
            {'attention': 'reflex(3-1)'},
            "attention='reflex(3-1)', but the checkpoint in {out} was trained with attention='reflex(2-2)'",
        ),
        ({'dataset': 'other tokens'}, 'the data set is '),
        ({'dataset': 'other tokenizer'}, 'the tokenizer is '),
        (
            {'optimizer': 'muon'},
            "optimizer='muon', but the checkpoint in {out} was trained with optimizer='adamw'",
        ),
    ],
    ids=['n_embd', 'attention', 'data', 'tokenizer', 'optimizer'],
)
def test_another_architecture_tokenizer_or_data_set_is_refused(
    tmp_path, data, straight, knobs, line, monkeypatch
):
    monkeypatch.setattr(train, 'build', None)  # refused before the model is built
    if 'dataset' in knobs:
        same = {'seed': 0, 'tokenizer': Chars([chr(i + 33) for i in range(257)])}
        other = {'seed': 1} if knobs['dataset'] == 'other tokens' else same
        knobs = {'dataset': write_tokens(tmp_path / 'data', **other)}
    with pytest.raises(ConfigError, match='start another run in another --out_dir') as error:
        resume(straight, **knobs)
    assert str(error.value).startswith(line.format(out=straight)) and '\n' not in str(error.value)
    assert status(straight) == 'finished'


def test_fewer_iterations_than_are_done_are_refused(tmp_path, data):
    """Else run.json would say "5 steps" beside the loss of step 12."""
    start(tmp_path, data)
    before = {name: (tmp_path / name).read_bytes() for name in (LAST, metrics.RUN, metrics.METRICS)}
    with pytest.raises(ConfigError, match=r'max_iters=11, but the checkpoint in .* is of iteration 12: give'):
        resume(tmp_path, max_iters=11)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert resume(tmp_path, max_iters=12) == 0


@pytest.mark.parametrize('knobs, windows', [({'eval_iters': 3}, 6), ({'batch_size': 4}, 8)], ids=str)
def test_another_validation_set_starts_the_best_loss_anew(tmp_path, data, knobs, windows, capsys):
    start(tmp_path, data, max_iters=10)
    state = checkpoint.load(tmp_path / LAST)
    state['best_val_loss'] = 0.5  # which the windows of before had, and none will reach
    torch.save(state, tmp_path / LAST)
    resume(tmp_path, max_iters=15, **knobs)
    assert f'measured on {windows} windows of val, before on 4:' in capsys.readouterr().out
    events = [r for r in lines(tmp_path) if r.get('event') == 'eval_changed']
    changed = {'iter': 10, 'event': 'eval_changed', 'windows': windows, 'windows_before': 4}
    assert events == [changed] and lines(tmp_path).index(changed) > lines(tmp_path).index(
        next(r for r in lines(tmp_path) if r['iter'] == 10 and 'val/loss' in r)
    )
    loss = next(r['val/loss'] for r in lines(tmp_path) if r['iter'] == 15 and 'val/loss' in r)
    assert checkpoint.load(tmp_path / BEST)['iter'] == 15
    assert checkpoint.load(tmp_path / LAST)['best_val_loss'] == loss


def test_the_same_windows_in_other_batches_are_the_same_validation_set(tmp_path, data, capsys):
    start(tmp_path, data, max_iters=10)
    best = checkpoint.load(tmp_path / LAST)['best_val_loss']
    resume(tmp_path, max_iters=11, eval_iters=1, batch_size=4, eval_interval=100)
    assert checkpoint.load(tmp_path / LAST)['best_val_loss'] <= best
    resume(tmp_path, eval_iters=3)  # nothing is left to do, and nothing changes
    resume(tmp_path, eval_iters=3, max_iters=20, eval_only=True)
    assert 'measured on' not in capsys.readouterr().out
    assert not [r for r in lines(tmp_path) if 'event' in r]


def test_a_rate_that_jumps_where_a_run_goes_on_is_told(tmp_path, data, capsys):
    """A schedule that was at its end begins to fall from higher up where more iterations are asked for."""
    start(tmp_path, data, max_iters=10, min_lr=1e-4)
    resume(tmp_path, max_iters=14)
    rates = {r['iter']: r['lr'] for r in lines(tmp_path) if 'lr' in r}
    assert rates[10] < 6e-4 and rates[11] > 2e-3  # of steps 9 and 10
    told = f'resume: the learning rate is {rates[11]:.3g} from here on; the last step had {rates[10]:.3g}'
    assert told in capsys.readouterr().out
    resume(tmp_path, max_iters=15, lr_decay_iters=14)
    assert 'the learning rate is' not in capsys.readouterr().out  # it is what it would have been


def test_the_checkpoint_does_not_choose_what_is_read(tmp_path, data, straight):
    start(tmp_path, data, max_iters=5, lr_decay_iters=12)
    state = checkpoint.load(tmp_path / LAST)
    state['config']['dataset'] = '/somewhere/else'
    torch.save(state, tmp_path / LAST)
    resume(tmp_path, max_iters=12)
    assert_same_run(straight, tmp_path)


def test_auto_starts_or_resumes(tmp_path, data, straight):
    out = tmp_path / 'run'
    with happening(2, partial(kill_me, signal.SIGTERM)):
        start(out, data, init_from='auto')  # nothing is there
    with happening(7, partial(kill_me, signal.SIGTERM)):
        start(out, data, init_from='auto')
    assert start(out, data, init_from='auto') == 0
    assert_same_run(straight, out)
    assert start(out, data, init_from='auto') == 0  # a requeue of the finished run
    assert_same_run(straight, out)


def test_auto_starts_over_where_nothing_was_saved(tmp_path, data, straight):
    with happening(2, _raise(RuntimeError)), pytest.raises(RuntimeError):
        start(tmp_path, data)
    assert lines(tmp_path) and not (tmp_path / LAST).exists()
    with pytest.raises(ConfigError, match='ended before its first save: start over with --overwrite'):
        resume(tmp_path)
    start(tmp_path, data, init_from='auto')
    assert_same_run(straight, tmp_path)


def test_auto_starts_as_the_config_file_says(tmp_path, data):
    """Else a queue that adds --init_from=auto to a fine-tuning would train from random weights."""
    config = tmp_path / 'finetune.py'
    config.write_text(f'init_from = {str(tmp_path / "weights")!r}\n', encoding='utf-8')
    (tmp_path / 'weights').mkdir()
    argv = [str(config), *flags(tmp_path / 'run', dataset=data, init_from='auto', **tiny.TINY)]
    with pytest.raises(PretrainedError, match='weights'):
        train.main(argv)
    config.write_text('init_from = "auto"\n', encoding='utf-8')
    assert train.main(argv) == 0


def test_the_record_says_how_the_run_began(tmp_path, data):
    start(tmp_path, data, max_iters=5, init_from='auto')
    resume(tmp_path, max_iters=6)
    run = json.loads((tmp_path / metrics.RUN).read_text(encoding='utf-8'))
    assert run['config']['init_from'] == 'scratch' and run['config']['max_iters'] == 6
    assert '--init_from=resume' in run['command']


def test_the_loss_scaler_resumes(tmp_path, data, monkeypatch):
    """fp16 is for CUDA; here CPU plays its part, with so large a scale that the first steps overflow."""
    monkeypatch.setattr(system, 'pick_dtype', lambda dtype, device: 'float16')
    scaler = torch.amp.GradScaler
    grow = {'init_scale': 2.0**24, 'growth_interval': 3}
    monkeypatch.setattr(
        torch.amp, 'GradScaler', lambda device, enabled: scaler(device, enabled=enabled, **grow)
    )
    start(tmp_path / 'a', data)
    norms = [r['grad_norm'] for r in lines(tmp_path / 'a') if 'grad_norm' in r]
    assert None in norms and None not in norms[-1:]  # skipped at first, and it learned in the end
    start(tmp_path / 'b', data, max_iters=5, lr_decay_iters=12)
    resume(tmp_path / 'b', max_iters=12)
    assert_same_run(tmp_path / 'a', tmp_path / 'b')
    assert checkpoint.load(tmp_path / 'a' / LAST)['scaler']['scale'] < 2.0**24


def test_a_run_goes_on_in_fp16_that_began_without_a_loss_scaler(tmp_path, data, monkeypatch):
    start(tmp_path, data, max_iters=5, lr_decay_iters=12)
    monkeypatch.setattr(system, 'pick_dtype', lambda dtype, device: 'float16')
    resume(tmp_path, max_iters=12)
    assert status(tmp_path) == 'finished' and checkpoint.load(tmp_path / LAST)['scaler']


def test_a_loss_scaler_that_finds_no_scale_stops(tmp_path, data, monkeypatch):
    monkeypatch.setattr(system, 'pick_dtype', lambda dtype, device: 'float16')
    scaler, real = torch.amp.GradScaler, train.build
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: scaler(device, init_scale=2.0**-10))

    def broken(*args, **kwargs):
        model = real(*args, **kwargs)
        model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient + float('inf'))
        return model

    monkeypatch.setattr(train, 'build', broken)
    with pytest.raises(ranks.TrainingError) as error:
        start(tmp_path, data)
    line = str(error.value)  # after four halvings of the scale; it does not skip steps for ever
    assert line.startswith('iteration 4: loss ') and 'the gradient of transformer.h.0.mlp.c_fc.weight' in line


def test_auto_does_not_start_over_where_only_the_last_checkpoint_is_missing(tmp_path, data):
    start(tmp_path, data)
    (tmp_path / LAST).unlink()
    with pytest.raises(
        CheckpointError, match=r'last\.pt does not exist; whole: .*previous\.pt \(iteration 10\)'
    ):
        start(tmp_path, data, init_from='auto')


def test_a_used_folder_is_refused_unless_told(tmp_path, data, straight):
    start(tmp_path, data, max_iters=7, dropout=0.0)
    with pytest.raises(ConfigError) as error:
        start(tmp_path, data)
    assert str(error.value) == (
        f'{tmp_path} holds a finished run (7 of 7 iterations): go on with --init_from=resume, '
        'start over with --overwrite, or give another --out_dir'
    )
    for init_from in ('resume', 'auto'):
        with pytest.raises(ConfigError, match=f'init_from={init_from} goes on: give one of them'):
            start(tmp_path, data, init_from=init_from, overwrite=True)
    start(tmp_path, data, overwrite=True)
    assert_same_run(straight, tmp_path)


def test_a_second_run_in_the_folder_is_refused(tmp_path, data):
    refused = []

    def second():
        with pytest.raises(FileError) as error:
            start(tmp_path, data, init_from='auto')
        refused.append(str(error.value))

    with happening(6, second):
        assert start(tmp_path, data) == 0
    assert refused[0].startswith(f'{tmp_path} is in use by another run (process {os.getpid()} on ')
    assert refused[0].endswith('wait for it, stop it, or give another --out_dir')
    assert resume(tmp_path) == 0  # the lock is gone with its run


def test_the_lock_dies_with_its_process(tmp_path, data):
    argv = flags(tmp_path, dataset=data, **tiny.TINY)
    assert (
        tiny.Program(argv, tmp_path / 'log', fault=partial(tiny.at_step, 6, kill_me)).end() == -signal.SIGKILL
    )
    with files.FolderLock(tmp_path):
        pass


# ---- saving


class TornWriter(io.RawIOBase):
    """A file that lets `limit` bytes pass and then does `action`, once or at every further write."""

    def __init__(self, path, limit, action):
        super().__init__()
        self.file, self.left, self.action = open(path, 'wb'), limit, action

    def write(self, chunk):
        if len(chunk) > self.left:
            self.file.write(bytes(chunk)[: self.left])
            self.file.flush()
            self.left = 0
            self.action()
            self.left = 2**60
        self.left -= len(chunk)
        self.file.write(chunk)
        self.file.flush()
        return len(chunk)

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()
        super().close()


def _raise(error, *args):
    def action():
        raise error(*args)

    return action


def _kill_in_save(point):
    """Fault for a process: SIGKILL within the save of iteration 10, at a byte of the file or a later step."""
    saves, write, link, replace = [], checkpoint.save, files.link, os.replace

    def second_save():
        return len(saves) == 2

    def save(*args):
        saves.append(args)
        write(*args)

    def opened(path, mode='r', **kwargs):
        if second_save() and mode == 'wb' and isinstance(point, int):
            return TornWriter(path, point, kill_me)
        return open(path, mode, **kwargs)

    def linked(source, target):
        link(source, target)
        if second_save() and target.name == point:
            kill_me()

    def replaced(source, target):
        if second_save() and point == 'before replace' and Path(target).name == LAST:
            kill_me()
        replace(source, target)
        if second_save() and point == 'after replace' and Path(target).name == LAST:
            kill_me()

    checkpoint.save, files.open, files.link = save, opened, linked
    files.os.replace = replaced


@pytest.mark.parametrize('point', [0, 5000, 100_000, BEST, PREVIOUS, 'before replace', 'after replace'])
def test_a_kill_within_a_save_leaves_a_whole_checkpoint(tmp_path, data, straight, point):
    out = tmp_path / 'run'
    program = tiny.Program(
        flags(out, dataset=data, **tiny.TINY), tmp_path / 'log', fault=partial(_kill_in_save, point)
    )
    assert program.end() == -signal.SIGKILL, program.text()
    assert checkpoint.load(out / LAST)['iter'] == (10 if point == 'after replace' else 5)
    assert checkpoint.load(out / BEST)['iter'] in (5, 10)
    assert bool(list(out.glob('*.tmp-*'))) == (point != 'after replace')
    resume(out)
    assert not list(out.glob('*.tmp-*'))
    assert_same_run(straight, out)


def test_a_full_disk_leaves_the_checkpoint_and_stops_the_run(tmp_path, data, straight, monkeypatch):
    saves = []

    def opened(path, mode='r', **kwargs):
        if mode == 'wb':
            saves.append(path)
            if len(saves) == 2:
                return TornWriter(path, 5000, _raise(OSError, errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return open(path, mode, **kwargs)

    monkeypatch.setattr(files, 'open', opened, raising=False)
    with pytest.raises(CheckpointError) as error:
        start(tmp_path, data, max_iters=1000, lr_decay_iters=12, checkpoint_interval=400)
    line = str(error.value)
    assert line.startswith(f'{tmp_path / LAST} could not be written: the disk is full (') and '\n' not in line
    assert line.endswith('the checkpoint before it is whole: make room and go on with --init_from=resume')
    assert lines(tmp_path)[-1]['iter'] < 100  # it did not wait for the next save to notice
    assert len(saves) == 2 and not list(tmp_path.glob('*.tmp-*'))
    assert checkpoint.load(tmp_path / LAST)['iter'] == 5 and status(tmp_path) == 'failed'
    monkeypatch.undo()
    resume(tmp_path, max_iters=12)
    assert_same_run(straight, tmp_path)


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """Else a power cut leaves the name of a file whose content was never written."""
    calls, sync, replace = [], os.fsync, os.replace

    def synced(number):
        calls.append('folder' if stat.S_ISDIR(os.fstat(number).st_mode) else 'file')
        sync(number)

    def replaced(source, target):
        calls.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', synced)
    monkeypatch.setattr(os, 'replace', replaced)
    for i in range(2):
        checkpoint.save({'iter': i}, tmp_path, best=i == 0)
    first, second = ['file', BEST, 'file', LAST, 'folder'], ['file', PREVIOUS, 'file', LAST, 'folder']
    assert calls == first + second


def test_metrics_are_on_the_disk_before_the_checkpoint_of_their_iteration(tmp_path, data, monkeypatch):
    """A power cut must not leave one whose metrics are gone: a resumed run does not write them again."""
    calls, sync, save = [], metrics.Metrics.sync, checkpoint.save
    monkeypatch.setattr(metrics.Metrics, 'sync', lambda log: (calls.append('metrics'), sync(log)))
    monkeypatch.setattr(checkpoint, 'save', lambda *args: (calls.append('checkpoint'), save(*args)))
    start(tmp_path, data)
    assert calls == ['metrics', 'checkpoint'] * 3


def test_a_write_that_failed_ends_the_run_long_before_the_next_one(tmp_path, data, monkeypatch):
    def fail(state, *args):
        raise CheckpointError('no room')

    monkeypatch.setattr(checkpoint, 'save', fail)
    with pytest.raises(CheckpointError, match='no room'):
        start(tmp_path, data, max_iters=1000, eval_interval=1000, checkpoint_interval=20)
    assert 20 <= lines(tmp_path)[-1]['iter'] < 40 and status(tmp_path) == 'failed'


def _limit_file_size():
    import resource  # POSIX has it

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the kernel's own refusal

    tiny.at_step_after_saves(6, limit)


def test_a_file_size_limit_leaves_the_checkpoint(tmp_path, data):
    out = tmp_path / 'run'
    program = tiny.Program(flags(out, dataset=data, **tiny.TINY), tmp_path / 'log', fault=_limit_file_size)
    assert program.end() == 2
    assert 'last.pt could not be written: it would pass the limit on file sizes (ulimit -f)' in program.text()
    assert 'Traceback' not in program.text()
    assert checkpoint.load(out / LAST)['iter'] == 5 and not list(out.glob('*.tmp-*'))


def test_a_folder_that_is_moved_away_is_one_line_and_goes_on_where_it_is(tmp_path, data, straight):
    out, moved = tmp_path / 'run', tmp_path / 'moved'
    with happening(7, lambda: out.rename(moved)), pytest.raises(CheckpointError) as error:
        start(out, data)
    assert str(error.value) == (
        f'{out / LAST} could not be written: its folder is gone; if it was moved, go on where it is now with '
        '--init_from=resume'
    )
    resume(moved)
    assert_same_run(straight, moved)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_metrics_on_a_full_disk_say_so(tmp_path):
    log = metrics.Metrics(tmp_path, {})
    log.file = open('/dev/full', 'w', encoding='utf-8')
    with pytest.raises(FileError, match=r'metrics\.jsonl could not be written: the disk is full'):
        log.log({'iter': 1, 'loss': 2.0})
    log.file = io.StringIO()


def test_training_goes_on_while_a_write_hangs(tmp_path, data, monkeypatch):
    """It waits for a copy of the weights only: 4 more steps are made before the disk takes the first byte."""
    go_on, write, saved = threading.Event(), checkpoint.save, []

    def save(state, *args):
        assert go_on.wait(60)
        saved.append(float(state['model']['lm_head.weight'].sum()))
        write(state, *args)

    monkeypatch.setattr(checkpoint, 'save', save)
    seen = []
    with happening(9, lambda: (seen.append(len(saved)), go_on.set())):
        start(tmp_path, data, checkpoint_interval=5)
    assert seen == [0]
    kept = checkpoint.load(tmp_path / PREVIOUS)  # of iteration 10; the copy was not touched by later steps
    assert kept['iter'] == 10 and saved[1] == float(kept['model']['lm_head.weight'].sum()) != saved[0]


def test_the_copy_is_exact_private_and_reused():
    saver = checkpoint.Saver('.')
    weight = torch.randn(4, 3)
    state = {'tied': weight, 'again': weight, 'nest': [{'step': torch.tensor(3.0)}, (1, 'x')], 'n': None}
    one = saver._copy(state)
    tiny.assert_equal(one, state)
    assert one['tied'] is one['again'] and one['tied'].data_ptr() != weight.data_ptr()
    weight.add_(1)
    assert not torch.equal(one['tied'], weight)
    memory = one['tied'].data_ptr()
    two = saver._copy(state)
    assert two['tied'].data_ptr() == memory and torch.equal(two['tied'], weight)


def test_saves_by_iterations_and_by_time(tmp_path, data, monkeypatch):
    saved, write = [], checkpoint.save
    monkeypatch.setattr(checkpoint, 'save', lambda s, *args: (saved.append(s['iter']), write(s, *args)))
    start(tmp_path / 'a', data, checkpoint_interval=3)
    assert saved == [3, 5, 6, 9, 10, 12]
    saved.clear()
    clock = iter(range(0, 100_000, 20))  # a look at it takes 20 s
    monkeypatch.setattr(train.time, 'monotonic', lambda: next(clock))
    start(tmp_path / 'b', data, eval_interval=100, checkpoint_minutes=1.5)
    assert saved == [4, 9, 12]  # more than 90 s after the save before, and at the end


def test_a_run_of_no_steps_is_saved(tmp_path, data, straight):
    start(tmp_path, data, max_iters=0, lr_decay_iters=12)
    assert checkpoint.load(tmp_path / LAST)['iter'] == 0
    resume(tmp_path, max_iters=12)
    assert lines(tmp_path) == lines(straight)


def test_a_whole_evaluation_is_the_mean_over_every_target(tmp_path):
    data = write_tokens(tmp_path / 'tokens', train=300, val=101)  # 7 windows of 16, the last one overlaps
    start(tmp_path / 'run', data, max_iters=0, eval_iters=0)
    model, _ = load_model(tmp_path / 'run')
    tokens = torch.from_numpy(open_data(data).splits['val'].astype('int64'))
    with torch.no_grad():
        windows = [tokens[i : i + 17] for i in range(0, 100, 16)]
        losses = [model(w[None, :-1], w[None, 1:])[1].item() * (len(w) - 1) for w in windows[:-1]]
        end = tokens[-17:]  # with the context that the overlap gives it
        targets = end[None, 1:].clone()
        targets[:, :12] = -1
        losses.append(model(end[None, :-1], targets)[1].item() * 4)
    assert lines(tmp_path / 'run')[0]['val/loss'] == pytest.approx(sum(losses) / 100, abs=1e-6)


def test_evaluation_only_leaves_the_run_as_it_is(tmp_path, data, capsys):
    start(tmp_path, data)
    shown = [line for line in capsys.readouterr().out.splitlines() if 'val' in line][-1]
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != '.lock'}
    assert resume(tmp_path, eval_only=True) == 0
    assert shown in capsys.readouterr().out
    assert files == {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != '.lock'}


def test_runs_killed_at_random_moments_lose_nothing():
    """The short form of the report in results/kill."""
    report = kill_runs.main(['--runs=4'])
    assert report['kills'] >= 4 and report['kills_while_a_file_was_written'] > 0
    assert (report['runs_bit_identical'], report['checkpoints_lost']) == (4, 0)
    assert report['most_steps_repeated'] < 2 * report['checkpoint_interval']  # one under way, one to come


# ---- reading


def test_every_flipped_bit_is_found_or_harmless(tmp_path, straight):
    whole = (straight / LAST).read_bytes()
    state, path = checkpoint.load(straight / LAST), tmp_path / LAST
    found = 0
    for i, place in enumerate(
        [*range(0, len(whole), len(whole) // 200), *range(len(whole) - 60, len(whole), 7)]
    ):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << i % 8
        path.write_bytes(damaged)
        try:
            tiny.assert_equal(checkpoint.load(path), state)  # padding between the records
        except CheckpointError as e:
            assert str(path) in str(e) and '\n' not in str(e)
            found += 1
    assert found > 150


@pytest.mark.parametrize('kind', ['truncated', 'empty', 'HTML', 'flipped bit', 'another program'])
def test_a_damaged_checkpoint_is_one_line_with_the_file_to_fall_back_on(tmp_path, straight, kind):
    for name in (LAST, PREVIOUS, metrics.RUN):
        (tmp_path / name).write_bytes((straight / name).read_bytes())
    whole = (straight / LAST).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    text = io.BytesIO()
    torch.save({'model_state_dict': {}}, text)
    content, why = {
        'truncated': (
            whole[: len(whole) // 2],
            r'\([\d,]+ bytes, beginning .* is cut short or no checkpoint',
        ),
        'empty': (b'', 'is empty'),
        'HTML': (b'<!DOCTYPE html><title>404</title>', r"beginning b'<!DOCTYPE html>.*no checkpoint at all"),
        'flipped bit': (bytes(flipped), 'is damaged: the checksum of its record .* does not match'),
        'another program': (
            text.getvalue(),
            'is not a checkpoint of this project: it has no model, model_args',
        ),
    }[kind]
    (tmp_path / LAST).write_bytes(content)
    with pytest.raises(CheckpointError, match=why) as error:
        resume(tmp_path)
    fallback = tmp_path / PREVIOUS
    fix = f'; whole: {fallback} (iteration 10): copy one to {tmp_path / LAST} to go on from there'
    assert str(error.value).startswith(str(tmp_path / LAST)) and str(error.value).endswith(fix)
    assert '\n' not in str(error.value)


def _edited(straight, tmp_path, edit) -> Path:
    """A copy of the straight run whose last checkpoint is edited; there is no other one."""
    state = checkpoint.load(straight / LAST)
    edit(state)
    for name in (metrics.RUN, metrics.METRICS):
        (tmp_path / name).write_bytes((straight / name).read_bytes())
    torch.save(state, tmp_path / LAST)
    return tmp_path


WEIGHT = 'transformer.h.1.mlp.c_fc.weight'


@pytest.mark.parametrize(
    'edit, line',
    [
        (lambda s: s.update(iter=-3), 'its iter is -3'),
        (lambda s: s.update(iter='12'), 'its iter is of type str, not int'),
        (lambda s: s.update(config=['model']), 'its config is of type list, not dict'),
        (lambda s: s.pop('model_args'), 'it has no model_args'),
        (lambda s: s['model'].pop(WEIGHT), f'{WEIGHT} is not in the checkpoint'),
        (lambda s: s['model'].update(extra=torch.zeros(3)), 'extra is not in the model'),
        (
            lambda s: s['model'].update({WEIGHT: torch.zeros(128, 31)}),
            f'{WEIGHT} is 128 x 31, and 128 x 32 is',
        ),
        (
            lambda s: s['model'].update({WEIGHT: torch.zeros(128, 32).int()}),
            'is of type torch.int32, and 128',
        ),
        (lambda s: s['model'].update({WEIGHT: 'zeros'}), f'{WEIGHT} is of type str, and 128 x 32 is needed'),
        (lambda s: s['model'][WEIGHT].fill_(math.nan), 'holds weights that are inf or nan'),
        (lambda s: s['model'].update(_extra_state='another'), 'another attention plan or kind of block'),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path, straight, edit, line):
    """For train.py and for whoever reads the model: sample.py, eval.py, hf.py, explain.py."""
    out = _edited(straight, tmp_path, edit)
    for read in (lambda: resume(out, max_iters=13), lambda: load_model(out)):
        with pytest.raises(CheckpointError) as error:
            read()
        assert str(error.value).startswith(str(out / LAST)) and line in str(error.value)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'edit, line',
    [
        (lambda s: s.pop('optimizer'), 'it has no optimizer'),
        (lambda s: s.update(seconds=None), 'its seconds is of type NoneType, not float'),
        (lambda s: s.update(optimizer={}), 'the state of the optimizer has another form'),
        (lambda s: s['optimizer']['state'].pop(3), 'the optimizer has a state of 14 tensors, not of 15'),
        (
            lambda s: s['optimizer']['state'][1].update(exp_avg=torch.zeros(3, 3)),
            'exp_avg of the optimizer is [3, 3] where a weight is [',
        ),
        (lambda s: s['watches'].pop('loss'), "a training cannot go on from it: KeyError: 'loss'"),
        (lambda s: s['watches'].update(loss={'recent': 'x'}), 'a training cannot go on from it: TypeError'),
        (lambda s: s.update(config={'n_layer': 'two'}), "last.pt sets n_layer to 'two'"),
    ],
)
def test_a_checkpoint_that_no_training_goes_on_from_is_one_line(tmp_path, straight, edit, line):
    out = _edited(straight, tmp_path, edit)
    with pytest.raises(UserError) as error:
        resume(out, max_iters=13)
    assert line in str(error.value) and str(out / LAST) in str(error.value) and '\n' not in str(error.value)
    load_model(out)  # its weights can be read


def test_a_model_of_another_kind_is_one_line(tmp_path, straight):
    for change in ({'n_head': 5}, {'n_layer': 'two'}, {'attention': None}, {'of the future': 1}):
        out = _edited(straight, tmp_path, lambda s, change=change: s['model_args'].update(change))
        with pytest.raises(CheckpointError, match=r'last\.pt does not fit this version of the models: '):
            load_model(out)
    out = _edited(straight, tmp_path, lambda s: s['config'].update(model='mamba'))
    with pytest.raises(CheckpointError, match="of the models: 'mamba'"):
        load_model(out)


class Malice:
    def __reduce__(self):
        return os.putenv, ('OWNED_BY_A_CHECKPOINT', '1')


def test_a_checkpoint_runs_no_code(tmp_path, straight):
    state = checkpoint.load(straight / LAST)
    torch.save({**state, 'iter': Malice()}, tmp_path / LAST)
    with pytest.raises(CheckpointError, match=r'last\.pt is not a checkpoint of this project') as error:
        checkpoint.load(tmp_path / LAST)
    assert '\n' not in str(error.value)
    torch.save(Malice(), tmp_path / LAST, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r'last\.pt .* is cut short or no checkpoint at all'):
        checkpoint.load(tmp_path / LAST)


def test_a_checkpoint_of_another_tokenizer_is_not_read(tmp_path, straight):
    state = checkpoint.load(straight / LAST)
    state['tokenizer']['fingerprint'] = 'f' * 64
    torch.save(state, tmp_path / LAST)
    with pytest.raises(TokenizerError, match='fingerprint'):
        sample.main([f'--out_dir={tmp_path}'])


# ---- values that are not finite


@pytest.mark.parametrize('where', ['output', 'gradient', 'weight', 'inf'])
def test_a_value_that_is_not_finite_stops_before_the_update(tmp_path, data, straight, where, monkeypatch):
    built, real = [], train.build
    monkeypatch.setattr(
        train, 'build', lambda *args, **kwargs: built.append(real(*args, **kwargs)) or built[-1]
    )

    def poison():
        block = built[0].transformer.h[1]
        if where == 'output':
            block.mlp.gelu.register_forward_hook(lambda module, args, output: output * float('nan'))
        elif where == 'inf':
            block.ln_2.register_forward_hook(lambda module, args, output: output + float('inf'))
        elif where == 'gradient':
            block.attn.c_proj.weight.register_hook(lambda gradient: gradient * float('nan'))
        else:
            with torch.no_grad():
                built[0].transformer.h[0].mlp.c_fc.weight[3, 1] = float('nan')

    with happening(6, poison), pytest.raises(ranks.TrainingError) as error:
        start(tmp_path, data)
    first = {
        'output': 'the output of transformer.h.1.mlp.gelu',
        'inf': 'the output of transformer.h.1.ln_2',
        'gradient': 'the gradient of transformer.h.1.attn.c_proj.weight',
        'weight': 'weight transformer.h.0.mlp.c_fc.weight',
    }[where]
    line = str(error.value)
    assert (
        line.startswith('iteration 6: loss ')
        and f'first not finite: {first}. The update was not made' in line
    )
    assert f'{tmp_path / LAST} is of iteration 5; a lower learning_rate' in line and '\n' not in line
    assert status(tmp_path) == 'failed' and lines(tmp_path) == [r for r in lines(straight) if r['iter'] <= 6]
    monkeypatch.undo()
    resume(tmp_path)
    assert_same_run(straight, tmp_path)


def test_weights_that_the_last_update_ruined_are_not_saved(tmp_path, data, monkeypatch):
    rate = train.learning_rate_at
    monkeypatch.setattr(train, 'learning_rate_at', lambda it, k: 1e38 if it == 9 else rate(it, k))
    with pytest.raises(ranks.TrainingError, match=r'iteration 10: .*last\.pt is of iteration 5'):
        start(tmp_path, data)
    monkeypatch.setattr(train, 'evaluate', lambda *args: {'train': 1.0, 'val': 1.0})
    with pytest.raises(ranks.TrainingError, match='iteration 10: the last update made weights inf or nan'):
        resume(tmp_path)
    assert checkpoint.load(tmp_path / LAST)['iter'] == 5


def test_the_process_exits_with_an_error(tmp_path, data):
    argv = flags(tmp_path / 'run', dataset=data, **{**tiny.TINY, 'learning_rate': 1e38, 'warmup_iters': 0})
    program = tiny.Program(argv, tmp_path / 'log')
    assert program.end() == 2
    assert program.text().splitlines()[-1].startswith('train.py: iteration ')


def test_spikes_are_logged_and_a_resume_logs_the_same(tmp_path, data, monkeypatch, capsys):
    real = runs.step.get_batch

    def get_batch(tokens, seed, step, *args):
        x, y = real(tokens, seed, step, *args)
        return (x, (y + 31) % 64) if step in (30, 31, 36) else (x, y)  # targets that make no sense

    monkeypatch.setattr(runs.step, 'get_batch', get_batch)
    knobs = {'max_iters': 40, 'eval_interval': 100, 'learning_rate': 3e-3}
    start(tmp_path / 'a', data, **knobs)
    told = [r for r in lines(tmp_path / 'a') if r.get('event') == 'spike']
    losses = [r for r in told if r['what'] == 'loss']
    assert [r['iter'] for r in losses] == [
        31,
        37,
    ]  # the step after 30 is number 31; told once for two in a row
    assert all(r['value'] > 1.1 * r['usual'] for r in told)
    out = capsys.readouterr().out
    assert (
        f'warning: iter 31: loss {losses[0]["value"]:.4g} stands out, {losses[0]["usual"]:.4g} is usual'
        in out
    )
    with happening(30, partial(kill_me, signal.SIGTERM)):
        start(tmp_path / 'b', data, **knobs)
    resume(tmp_path / 'b')
    assert_same_run(tmp_path / 'a', tmp_path / 'b')


def test_a_spike_stands_out_of_noise_and_a_lasting_change_becomes_usual():
    random = torch.Generator().manual_seed(0)
    noise = (3 + 0.1 * torch.randn(2000, generator=random)).tolist()
    watch = SpikeWatch()
    assert [watch.look(v, 1.1) for v in noise] == [None] * 2000
    assert watch.look(4.0, 1.1) == pytest.approx(3, abs=0.05) and watch.look(4.0, 1.1) is None
    assert watch.look(float('inf'), 1.1) is None
    told = [watch.look(v + 2, 1.1) for v in noise[:300]]
    assert [t is not None for t in told].count(True) <= 1 and not watch.high


def kept_runs(root):
    """(folder, run.json, lines of metrics.jsonl) of every run in results/."""
    studies = sorted((root / 'results').glob('*.jsonl'))
    return [(r.folder, r.run, r.metrics) for study in studies for r in read_pack(study)]


def test_what_is_told_of_recorded_runs_is_unusual(root):
    """On the curves of results/, at every tenth step: next to nothing stands out after the warm-up, but a
    value that is put in does, but where values differ by as much from one to the next (a text of which some
    batches are much easier than others)."""
    told, curves, found = [], 0, {(name, part): 0 for name in FACTORS for part in (0.8, 1.5)}
    noisy = dict.fromkeys(FACTORS, 0)
    for path, run, lines_kept in kept_runs(root):
        config, records = run['config'], [r for r in lines_kept if 'loss' in r]
        if len(records) < 40:
            continue
        curves += 1
        for name, factor in FACTORS.items():
            watch = SpikeWatch()
            for r in records:
                if r[name] is not None and watch.look(r[name], factor) and r['iter'] > config['warmup_iters']:
                    told.append((path, name, r['iter']))
            before = asdict(watch)
            for part in (0.8, 1.5):
                usual = sorted(watch.recent[-20:])[10]
                is_told = watch.look(part * factor * usual, factor) is not None
                found[name, part] += is_told
                watch = SpikeWatch(**before)
                if part == 1.5 and not is_told:
                    deviation = stdev(b - a for a, b in pairwise(watch.recent)) / math.sqrt(2)
                    assert (part * factor - 1) * usual < 8 * deviation, (path, name)
                    noisy[name] += 1
    assert curves > 100 and len(told) < 0.03 * curves
    assert all(noisy[name] + found[name, 0.8] < 0.03 * curves for name in FACTORS), (noisy, found)


def test_few_of_the_spikes_that_were_recorded_are_told_now(root):
    """Their value and what was usual are in metrics.jsonl; gradients several times as large did no harm."""
    spikes, told = 0, []
    for path, run, lines_kept in kept_runs(root):
        config = run['config']
        for r in lines_kept:
            if r.get('event') == 'spike':
                spikes += 1
                if r['iter'] > config['warmup_iters'] and r['value'] > FACTORS[r['what']] * r['usual']:
                    told.append(path)
    assert spikes > 1000 and len(told) < 50 and len(set(told)) < 30


def test_nothing_is_told_during_the_warm_up(tmp_path, data, monkeypatch):
    real = runs.step.get_batch

    def get_batch(tokens, seed, step, *args):
        x, y = real(tokens, seed, step, *args)
        return (x, (y + 31) % 64) if step in (30, 36) else (x, y)

    monkeypatch.setattr(runs.step, 'get_batch', get_batch)
    start(tmp_path, data, max_iters=40, eval_interval=100, learning_rate=5e-2, warmup_iters=33)
    assert {r['iter'] for r in lines(tmp_path) if r.get('event') == 'spike'} == {37}


# ---- wandb


class FakeWandb:
    """Stands in for the module: raises in the call named `broken`, or hangs in finish."""

    def __init__(self, broken, run_id='abc'):
        self.broken, self.calls, self.summary, self.id = broken, [], self, run_id
        self.arguments = []  # of the calls

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            self.arguments.append((args, kwargs))
            if name == self.broken:
                raise ConnectionError(f'{name}: no route to host\nsecond line')
            return self

        return call


@pytest.mark.parametrize('broken', ['init', 'define_metric', 'log', 'update', 'finish', None])
def test_wandb_that_fails_is_a_warning(tmp_path, data, straight, broken, monkeypatch, capsys):
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    assert start(tmp_path, data, wandb_log=True) == 0
    assert_same_run(straight, tmp_path)
    warnings = [line for line in capsys.readouterr().out.splitlines() if 'warning' in line]
    if broken is None:
        assert not warnings and fake.calls.count('log') == 12 + 4 and fake.calls[-1] == 'finish'
    else:
        assert warnings == [
            f'warning: wandb is off for the rest of this run (ConnectionError: {broken}: no route to host); '
            'metrics.jsonl has everything'
        ]


def test_a_preempted_run_is_one_run_to_wandb(tmp_path, data, monkeypatch):
    """By its id, which run.json keeps, and with steps that are ours: offline, its own begin at 0 again. Also
    where a part of the run went without it."""
    first, second = FakeWandb(None), FakeWandb(None, run_id='a new one, were it asked for one')

    def begin(fake):
        monkeypatch.setitem(sys.modules, 'wandb', fake)
        monkeypatch.setattr(fake, 'init', lambda **given: fake.arguments.append(given) or fake, raising=False)

    begin(first)
    with happening(6, partial(kill_me, signal.SIGTERM)):
        start(tmp_path, data, wandb_log=True)
    with happening(8, partial(kill_me, signal.SIGTERM)):
        resume(tmp_path, wandb_log=False)
    begin(second)
    second.id = 'abc'  # as wandb has it: the id that was asked for
    resume(tmp_path, wandb_log=True)
    inits = [given for fake in (first, second) for given in fake.arguments if isinstance(given, dict)]
    assert [given['id'] for given in inits] == [None, 'abc'] and inits[1]['resume'] == 'allow'
    assert json.loads((tmp_path / metrics.RUN).read_text(encoding='utf-8'))['wandb_id'] == 'abc'
    logged = [given for given in (*first.arguments, *second.arguments) if isinstance(given, tuple)]
    steps = [(args[0]['iter'], kwargs['step']) for args, kwargs in logged if 'step' in kwargs]
    assert all(it == step for it, step in steps)
    assert [step for _, step in steps] == [0, 1, 2, 3, 4, 5, 5, 6, 7, 10, 10, 11, 12, 12]
    begin(first)
    start(tmp_path, data, wandb_log=True, overwrite=True)  # another run
    assert [given['id'] for given in first.arguments if isinstance(given, dict)] == [None, None]


def test_wandb_itself_knows_a_resumed_run_by_its_id(tmp_path, data, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    with happening(6, partial(kill_me, signal.SIGTERM)):
        start(tmp_path, data, wandb_log=True)
    resume(tmp_path)
    run_id = json.loads((tmp_path / metrics.RUN).read_text(encoding='utf-8'))['wandb_id']
    names = [path.name for path in (tmp_path / 'wandb').glob('offline-run-*')]
    assert len(names) == 2 and all(name.endswith(f'-{run_id}') for name in names)


def test_wandb_that_hangs_at_the_end_is_left_behind(tmp_path, data, monkeypatch, capsys):
    never = threading.Event()
    fake = FakeWandb(None)
    fake.finish = lambda exit_code: never.wait(60)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.setattr(metrics, 'WANDB_SECONDS', 0.01)
    assert start(tmp_path, data, wandb_log=True) == 0
    never.set()
    assert 'warning: wandb is still sending after 0.01 s and is left to itself' in capsys.readouterr().out


# ---- before anything is built


@pytest.mark.parametrize(
    'knobs, line',
    [
        ({'eval_interval': 0}, 'eval_interval=0: must be at least 1'),
        ({'init_from': 'resmue'}, "init_from='resmue': did you mean 'resume'?"),
        ({'n_head': 5}, 'n_embd=32 is not a multiple of n_head=5'),
        ({'attention': 'reflex(2-2-1)'}, '2-2-1'),
        ({'dtype': 'float16'}, "dtype='float16' needs CUDA, the device is cpu: use bfloat16 or float32"),
        ({'device': 'cuda'}, "device='cuda', but torch sees no CUDA device here: use --device=cpu"),
        ({'device': 'gpu'}, "device='gpu': auto, cpu, mps, cuda or one of several, such as cuda:1"),
        ({'learning_rate': 1e-6, 'min_lr': 1e-5}, 'min_lr=1e-05 is above learning_rate=1e-06'),
        (
            {'optimizer': 'muon', 'learning_rate': 0, 'min_lr': 0, 'muon_learning_rate': 0.1},
            'learning_rate=0: then muon_learning_rate=0.1 has no schedule',
        ),
        ({'beta2': 1}, 'beta2=1.0: must be in [0, 1)'),
        ({'cuda_graphs': True}, 'it needs compile=true and 1, for gradients of several'),
        ({'dist_timeout': 0}, 'dist_timeout=0.0: must be positive'),
        ({'dropout': 1}, 'dropout=1.0: must be in [0, 1)'),
        ({'threads': 5e9}, 'threads=5e+09: from 1 to 1024, or 0 for the choice of torch'),
        ({'seed': 1e30}, 'seed=1e+30: must be at least 0 and below 2**63'),
        ({'out_dir': '/tmp/' + 300 * 'x'}, "out_dir='/tmp/xxx"),
        ({'init_from': 300 * 'x'}, "init_from='xxx"),
        ({'init_from': 'resume'}, 'holds no run to resume: start one with --init_from=scratch (the default)'),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else '',
)
def test_what_cannot_work_is_refused_before_anything_is_built(tmp_path, data, knobs, line, monkeypatch):
    if knobs.get('device') == 'cuda' and torch.cuda.is_available():
        pytest.skip('CUDA is here')
    monkeypatch.setattr(train, 'build', None)
    monkeypatch.setattr(runs.start, 'open_data', None)
    with pytest.raises(ConfigError) as error:
        start(**{'out_dir': tmp_path / 'run', 'data': data, **knobs})
    assert line in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'knobs, line',
    [
        (
            {'n_embd': 2**18},
            r'parameters \(n_layer=2, n_embd=262144\) take at least [\d,]+ GiB, but cpu has',
        ),
        ({'n_embd': 2**62}, r'n_embd=4611686018427387904: at most 1,048,576'),
        (
            {'batch_size': 10**12},
            r'batch_size=10{12} sequences of block_size=16 tokens take at least [\d,]+ GiB',
        ),
    ],
    ids=['n_embd', 'n_embd of 2**62', 'batch_size'],
)
def test_what_no_memory_holds_is_refused_before_anything_is_built(tmp_path, data, knobs, line, monkeypatch):
    monkeypatch.setattr(train, 'build', None)
    with pytest.raises(ConfigError, match=line):
        start(tmp_path, data, **knobs)


def test_memory_that_is_used_up_is_one_line(tmp_path, data):
    argv = flags(tmp_path / 'run', dataset=data, **tiny.TINY)
    program = tiny.Program(argv, tmp_path / 'log', fault=partial(tiny.at_step, 6, _take_all_memory))
    assert program.end() == 2
    line = program.text().splitlines()[-1]
    assert line.startswith('train.py: the memory is used up (') and line.endswith('or a smaller model')
    assert 'Traceback' not in program.text()
    assert status(tmp_path / 'run') == 'failed' and checkpoint.load(tmp_path / 'run' / LAST)['iter'] == 5


def _take_all_memory():
    torch.empty(2**60)


def test_a_warm_up_that_leaves_no_time_is_told(tmp_path, data, capsys):
    start(tmp_path / 'a', data, warmup_iters=1e9)
    told = 'warning: warmup_iters=1e+09 leaves no time: the learning rate comes to 1.2e-10 in 12 iterations'
    assert told in capsys.readouterr().out
    start(tmp_path / 'b', data, warmup_iters=11)
    start(tmp_path / 'c', data, warmup_iters=1e9, decay_lr=False)
    assert 'leaves no time' not in capsys.readouterr().out


def test_bf16_on_a_processor_without_it_is_told(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(system, 'cpu_has_bf16', lambda: False)
    assert system.pick_dtype('auto', 'cpu') == system.pick_dtype('float32', 'cpu') == 'float32'
    assert capsys.readouterr().err == ''
    assert system.pick_dtype('bfloat16', 'cpu') == 'bfloat16'
    assert 'warning: dtype=bfloat16, but this processor has no instructions for it' in capsys.readouterr().err
    monkeypatch.setattr(system, 'cpu_has_bf16', lambda: True)
    assert system.pick_dtype('bfloat16', 'cpu') == system.pick_dtype('auto', 'cpu') == 'bfloat16'
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('ids', ['of the vocabulary', 'beyond it'])
def test_data_that_are_overwritten_end_the_run_and_nothing_is_saved_of_them(tmp_path, straight, ids):
    """In place, so that the run reads the new tokens: no checkpoint may say that it is of the old ones."""
    tokens = write_tokens(tmp_path / 'tokens')
    before = (tokens / 'train.bin').read_bytes()

    def overwrite():
        (tokens / 'train.bin').write_bytes(bytes(len(before)) if ids == 'of the vocabulary' else before[::-1])

    with happening(7, overwrite), pytest.raises(DataError) as error:
        start(tmp_path / 'run', tokens)
    line = str(error.value)
    assert line.startswith(f'{tokens / "train.bin"} changed since it was opened: ') and '\n' not in line
    assert f'{tmp_path / "run" / LAST} is of iteration 5; put the file back' in line
    assert status(tmp_path / 'run') == 'failed' and checkpoint.load(tmp_path / 'run' / LAST)['iter'] == 5
    (tokens / 'train.bin').write_bytes(before)
    resume(tmp_path / 'run')
    assert_same_run(straight, tmp_path / 'run')


@pytest.mark.skipif(not hasattr(signal, 'SIGBUS'), reason='needs POSIX')
def test_data_that_are_cut_short_leave_a_trace(tmp_path):
    tokens = write_tokens(tmp_path / 'tokens')
    argv = flags(tmp_path / 'run', dataset=tokens, **tiny.TINY)
    fault = partial(tiny.at_step_after_saves, 7, partial(os.truncate, tokens / 'train.bin', 0))
    program = tiny.Program(argv, tmp_path / 'log', fault=fault)
    assert program.end() == -signal.SIGBUS
    assert 'Fatal Python error: Bus error' in program.text() and 'get_batch' in program.text()
    assert checkpoint.load(tmp_path / 'run' / LAST)['iter'] == 5


def test_a_missing_data_set_is_refused_first_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'build', None)
    with pytest.raises(DataError, match='does not exist: make it with'):
        start(tmp_path / 'run', tmp_path / 'nothing')


def test_bf16_on_cpu_is_bf16(tmp_path, data):
    start(tmp_path / 'a', data, dtype='bfloat16')
    start(tmp_path / 'b', data, dtype='float32')
    a, b = ([r['loss'] for r in lines(tmp_path / x) if 'loss' in r] for x in 'ab')
    assert a != b and a == pytest.approx(b, abs=0.05)
    assert checkpoint.load(tmp_path / 'a' / LAST)['model']['lm_head.weight'].dtype == torch.float32


def test_output_that_has_gone_away_stops_nothing(tmp_path, data, straight):
    reading, writing = os.pipe()
    os.close(reading)
    shown = os.dup(1)
    os.dup2(writing, 1)
    try:
        assert start(tmp_path, data) == 0
    finally:
        os.dup2(shown, 1)
    assert_same_run(straight, tmp_path)


def test_the_record_survives_a_torn_line(tmp_path):
    path = tmp_path / metrics.METRICS
    path.write_text('{"iter": 1, "loss": 2.0}\n{"iter": 2, "lo', encoding='utf-8')
    assert metrics.read_jsonl(path) == [{'iter': 1, 'loss': 2.0}]
    path.write_text('{"iter": 1, "loss": 2.0}\n{"iter": 2, "lo\n{"iter": 3}\n', encoding='utf-8')
    with pytest.raises(FileError, match=r'metrics\.jsonl, line 2 is not JSON .*: delete the line'):
        metrics.Metrics(tmp_path, {}, resume_iter=3)
    for line in ('{"loss": 2.0}', '7', '{"iter": "one"}'):
        path.write_text(f'{{"iter": 1}}\n{line}\n{{"iter": 3}}\n', encoding='utf-8')
        with pytest.raises(
            FileError, match=r'metrics\.jsonl, line 2 is no record of a run \(.*\): delete the line'
        ):
            metrics.Metrics(tmp_path, {}, resume_iter=3)


def test_the_table_of_faults_names_tests_that_exist(root):
    table = (root / 'docs/reliability.md').read_text(encoding='utf-8')
    sources = ''.join(path.read_text(encoding='utf-8') for path in (root / 'tests').glob('test_*.py'))
    named = set(re.findall(r'`(test_[a-z0-9_]+)`', table))
    assert len(named) > 60 and not [name for name in named if f'def {name}(' not in sources]
