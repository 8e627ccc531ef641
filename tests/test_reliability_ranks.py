"""Several ranks on CPU (gloo), as processes of a test or under torchrun: the same curve, and nobody hangs."""

import errno
import os
import re
import signal
import threading
from functools import partial

import pytest

import runs.start
import runs.step
import tiny
import train
from runs import checkpoint
from runs.checkpoint import BEST, LAST
from tiny import (
    TINY,
    Torchrun,
    assert_same_run,
    flags,
    kill_me,
    lines,
    run_ranks,
    start_ranks,
    status,
    write_tokens,
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp('tokens'))


@pytest.fixture(scope='module')
def straight(tmp_path_factory, data):
    """straight(n): a run on n ranks that nothing happened to, made once."""
    made = {}

    def on(n):
        if n not in made:
            made[n] = tmp_path_factory.mktemp(f'ranks{n}')
            argv = flags(made[n], dataset=data, **TINY)
            assert run_ranks(n, argv, tmp_path_factory.mktemp('logs')) == [0] * n
        return made[n]

    return on


@pytest.mark.parametrize('n', [2, 4])
def test_ranks_resume_bit_for_bit(tmp_path, data, straight, n):
    """On 4 ranks a sum depends on its order, which DDP takes from the place of a gradient in its buckets."""
    out = tmp_path / 'run'
    first = flags(out, dataset=data, **{**TINY, 'max_iters': 7, 'lr_decay_iters': 12, 'eval_interval': 100})
    assert run_ranks(n, first, tmp_path) == [0] * n
    again = flags(out, init_from='resume', max_iters=12, eval_interval=5)
    assert run_ranks(n, again, tmp_path) == [0] * n
    one, other = (checkpoint.load(folder / LAST) for folder in (straight(n), out))
    for key in ('model', 'optimizer', 'watches', 'scaler'):
        tiny.assert_equal(one[key], other[key], key)
    one, other = ([r for r in lines(folder) if 'loss' in r] for folder in (straight(n), out))
    assert one == other


@pytest.mark.parametrize('n', [2, 4])
def test_the_same_total_batch_gives_the_same_curve(straight, n, tmp_path_factory, data):
    """With dropout, and in the evaluations: what differs is the rounding of sums over ranks."""
    alone, shared = lines(straight(1)), lines(straight(n))
    assert len(alone) == len(shared) == 12 + 4
    for one, other in zip(alone, shared, strict=True):
        assert one.keys() == other.keys() and one == pytest.approx(other, rel=2e-5)
    first = [next(r for r in records if 'val/loss' in r) for records in (alone, shared)]
    assert first[0] == first[1]  # the same weights are evaluated to the same number, bit for bit


def test_a_signal_to_one_rank_stops_both_and_they_resume_bit_for_bit(tmp_path, data, straight):
    out = tmp_path / 'run'
    fault = partial(tiny.at_step, 6, partial(kill_me, signal.SIGTERM))
    assert run_ranks(2, flags(out, dataset=data, **TINY), tmp_path, fault, faulty=1) == [0, 0]
    assert status(out) == 'stopped' and checkpoint.load(out / LAST)['iter'] == 7
    assert 'stopped by another rank at iteration 7' in (tmp_path / 'rank0.log').read_text(encoding='utf-8')
    assert run_ranks(2, flags(out, init_from='resume'), tmp_path) == [0, 0]
    assert_same_run(straight(2), out)


def test_a_signal_in_an_evaluation_stops_both(tmp_path, data, straight):
    out = tmp_path / 'run'
    assert run_ranks(2, flags(out, dataset=data, **TINY), tmp_path, _signal_in_evaluation, faulty=1) == [0, 0]
    assert checkpoint.load(out / LAST)['iter'] == 5 and 'val/loss' not in lines(out)[-1]
    assert run_ranks(2, flags(out, init_from='resume'), tmp_path) == [0, 0]
    assert_same_run(straight(2), out)


def _signal_in_evaluation():
    batches, real = [], runs.step.eval_batch

    def eval_batch(*args):
        batches.append(args)
        if len(batches) == 3:  # of this rank: one of each split at iteration 0, and the first at 5
            kill_me(signal.SIGTERM)
        return real(*args)

    runs.step.eval_batch = eval_batch


def _nan_at_step(step):
    def poison():
        real = runs.step.get_batch

        def broken(tokens, *args):
            x, y = real(tokens, *args)
            return x, y * 0 - 1  # no target counts: the mean over nothing is nan

        runs.step.get_batch = broken

    tiny.at_step(step, poison)


def test_nan_on_one_rank_stops_all_before_the_update(tmp_path, data, straight):
    out = tmp_path / 'run'
    argv = flags(out, dataset=data, **TINY)
    assert run_ranks(2, argv, tmp_path, partial(_nan_at_step, 6), faulty=1) == [2, 2]
    said = [(tmp_path / f'rank{rank}.log').read_text(encoding='utf-8') for rank in (0, 1)]
    line = said[0].splitlines()[-1]
    assert line.startswith('train.py: iteration 6: loss nan, gradient norm ')
    assert 'first not finite: the loss on rank 1. The update was not made' in line
    assert 'train.py' not in said[1]  # it is said once
    assert status(out) == 'failed' and checkpoint.load(out / LAST)['iter'] == 5
    assert run_ranks(2, flags(out, init_from='resume'), tmp_path) == [0, 0]
    assert_same_run(straight(2), out)


def _full_disk():
    saves, real = [], checkpoint.save

    def save(*args):
        saves.append(args)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    checkpoint.save = save


def test_a_write_that_fails_stops_both_ranks(tmp_path, data):
    out = tmp_path / 'run'
    argv = flags(out, dataset=data, **{**TINY, 'max_iters': 100_000, 'eval_interval': 5})
    assert run_ranks(2, argv, tmp_path, _full_disk) == [1, 0]
    assert checkpoint.load(out / LAST)['iter'] == 5 and status(out) == 'failed'


def _linger_and_fail():
    def fail():
        threading.Thread(target=threading.Event().wait).start()  # no daemon, and it never ends
        raise RuntimeError('out of luck')

    tiny.at_step(6, fail)


@pytest.mark.parametrize('faulty', [0, 1])
def test_an_error_on_one_rank_ends_both_whatever_lingers(tmp_path, data, faulty):
    argv = flags(tmp_path / 'run', dataset=data, **TINY)
    ranks = start_ranks(2, argv, tmp_path, _linger_and_fail, faulty)
    assert [rank.end(20) for rank in ranks] == [1, 1]
    assert 'RuntimeError: out of luck' in ranks[faulty].text()
    assert checkpoint.load(tmp_path / 'run' / LAST)['iter'] == 5


@pytest.mark.parametrize('faulty', [0, 1])
def test_a_frozen_rank_is_given_up(tmp_path, data, faulty):
    argv = flags(tmp_path / 'run', dataset=data, **{**TINY, 'dist_timeout': 8})
    freeze = partial(tiny.at_step_after_saves, 6, partial(kill_me, signal.SIGSTOP))
    ranks = start_ranks(2, argv, tmp_path, freeze, faulty)
    assert ranks[1 - faulty].end(20) == 1
    ranks[faulty].process.kill()  # what torchrun does as soon as the other one has ended
    assert ranks[faulty].end() == -signal.SIGKILL
    assert checkpoint.load(tmp_path / 'run' / LAST)['iter'] == 5


def test_ranks_that_do_not_start_alike_are_refused(tmp_path, data):
    """As where every host has a folder of its own, or another version of the config."""
    ranks = start_ranks(2, flags(tmp_path / 'run', dataset=data, **TINY), tmp_path, _other_seed, faulty=1)
    assert [rank.end() for rank in ranks] == [2, 2]
    assert all(
        'the ranks do not start alike: every host needs the same code' in rank.text() for rank in ranks
    )


def _other_seed():
    kind, check = runs.start.read_knobs.__defaults__
    other = lambda k: (check(k), object.__setattr__(k, 'seed', 7))  # noqa: E731
    runs.start.read_knobs.__defaults__ = (kind, other)


def test_plain_tokens_resume_on_two_ranks(tmp_path, data):
    plain = tmp_path / 'plain'
    plain.mkdir()
    for name in ('train.bin', 'val.bin'):
        (plain / name).write_bytes((data / name).read_bytes())
    argv = flags(tmp_path / 'run', dataset=plain, vocab_size=64, **{**TINY, 'max_iters': 5})
    assert run_ranks(2, argv, tmp_path) == [0, 0]
    argv = flags(tmp_path / 'run', init_from='resume', max_iters=6)
    assert run_ranks(2, argv, tmp_path) == [0, 0]
    assert checkpoint.load(tmp_path / 'run' / LAST)['iter'] == 6


# ---- torchrun


ONE_HOST = ['--standalone', '--nproc_per_node=2']
ENDLESS = {**TINY, 'max_iters': 1_000_000, 'lr_decay_iters': 12}


def test_torchrun_passes_a_signal_on_and_all_is_saved(tmp_path, data, straight):
    torchrun = Torchrun(
        ONE_HOST, 'tests/faults.py', ['6', 'go on', *flags(tmp_path, dataset=data, **ENDLESS)]
    )
    torchrun.read_until('at step 6')
    torchrun.process.send_signal(signal.SIGTERM)
    assert torchrun.end() != 0  # torchrun's own status; its ranks ended well
    assert 'stopped by SIGTERM at iteration ' in torchrun.seen and status(tmp_path) == 'stopped'
    assert_resumes(tmp_path, straight)


def test_ranks_notice_that_torchrun_is_gone(tmp_path, data, straight):
    torchrun = Torchrun(
        ONE_HOST, 'tests/faults.py', ['6', 'go on', *flags(tmp_path, dataset=data, **ENDLESS)]
    )
    torchrun.read_until('at step 6')
    torchrun.process.kill()
    assert torchrun.end() == -signal.SIGKILL  # its ranks have ended too, else this would wait for them
    # rank 0 tells its own reason, or that rank 1 was first to notice
    assert re.search(r'stopped by (the end of torchrun|another rank) at iteration \d+;', torchrun.seen)
    assert status(tmp_path) == 'stopped'
    assert_resumes(tmp_path, straight)


def test_torchrun_ends_when_a_rank_is_killed(tmp_path, data, straight):
    torchrun = Torchrun(ONE_HOST, 'tests/faults.py', ['6', 'die', *flags(tmp_path, dataset=data, **ENDLESS)])
    assert torchrun.end() == 1
    assert checkpoint.load(tmp_path / LAST)['iter'] == 5
    assert_resumes(tmp_path, straight)


def test_torchrun_restarts_where_a_rank_was_killed(tmp_path, data, straight):
    argv = flags(tmp_path, dataset=data, init_from='auto', **TINY)
    torchrun = Torchrun([*ONE_HOST, '--max_restarts=1'], 'tests/faults.py', ['7', 'die once', *argv])
    assert torchrun.end() == 0, torchrun.seen
    assert 'from iteration 5' in torchrun.seen
    assert_same_run(straight(2), tmp_path)


def assert_resumes(out, straight):
    """It goes on to the end, or has come further, as a run that nothing happened to."""
    if checkpoint.load(out / LAST)['iter'] < 12:
        assert run_ranks(2, flags(out, init_from='resume', max_iters=12), out) == [0, 0]
        assert_same_run(straight(2), out, [LAST])
    common = [r for r in lines(out) if r['iter'] < 12]
    assert common == [r for r in lines(straight(2)) if r['iter'] < 12]


@pytest.fixture(scope='module')
def alone(tmp_path_factory, data):
    """config/reflex_422.py, made small, on one rank: one micro-batch per step, of 5 sequences."""
    out = tmp_path_factory.mktemp('alone')
    assert train.main([REFLEX_422, *flags(out, dataset=data, **README_RUN)]) == 0
    return out


REFLEX_422 = str(tiny.ROOT / 'config' / 'reflex_422.py')
README_RUN = {k: v for k, v in TINY.items() if k not in ('attention', 'head_split')}
README_RUN |= {'n_layer': 3, 'n_head': 8, 'batch_size': 5, 'gradient_accumulation_steps': 1, 'dropout': 0.0}


@pytest.mark.parametrize('n', [2, 3])
def test_the_line_of_the_readme_trains_on_any_number_of_ranks(tmp_path, data, alone, n):
    """A micro-batch that they cannot share out whole is divided: the same data, the same curve."""
    argv = [REFLEX_422, *flags(tmp_path, dataset=data, **README_RUN)]
    if n == 2:
        torchrun = Torchrun(ONE_HOST, 'train.py', argv)
        assert torchrun.end() == 0, torchrun.seen
    else:
        assert run_ranks(n, argv, tmp_path) == [0] * n
    for one, other in zip(lines(alone), lines(tmp_path), strict=True):
        assert one.keys() == other.keys() and one == pytest.approx(other, rel=2e-5)
    resumed = flags(tmp_path, init_from='resume', max_iters=13)
    assert run_ranks(n, resumed, tmp_path) == [0] * n


def test_two_hosts(tmp_path, data, straight):
    """Two torchrun agents that meet on the loopback, one rank each: what two hosts would do."""
    rendezvous = ['--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d', '--rdzv_id=tiny']
    rendezvous.append(f'--rdzv_endpoint=127.0.0.1:{tiny.free_port()}')
    argv = flags(tmp_path, dataset=data, **TINY)
    agents = [Torchrun(rendezvous, 'train.py', argv) for _ in range(2)]
    assert [agent.end() for agent in agents] == [0, 0]
    assert_same_run(straight(2), tmp_path, [LAST, BEST])
