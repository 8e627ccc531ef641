"""A model that ranks share out (--shard=true): the curve of whole models, and checkpoints that survive."""

import errno
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tiny
import train
from configurator import ConfigError
from runs import checkpoint, shards
from runs.checkpoint import BEST, LAST, PREVIOUS, CheckpointError
from runs.fsdp import check_sharding
from runs.knobs import Knobs
from runs.models import load_model
from runs.ranks import Ranks
from tiny import TINY, assert_same_run, flags, kill_me, lines, run_ranks, status, write_tokens

# Twelve sequences, which 1, 2, 3 and 4 ranks share alike; dropout would differ with their number
SMALL = {**TINY, 'batch_size': 12, 'gradient_accumulation_steps': 1, 'dropout': 0.0, 'sample_tokens': 0}
SMALL |= {'max_iters': 8, 'lr_decay_iters': 8, 'eval_interval': 4, 'eval_iters': 3}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp('tokens'))


@pytest.fixture(scope='module')
def made(tmp_path_factory, data):
    """made(ranks, **knobs): the folder of a run that nothing happened to, made once."""
    known = {}

    def make(ranks, **knobs):
        key = ranks, *sorted(knobs.items())
        if key not in known:
            known[key] = tmp_path_factory.mktemp('run')
            argv = flags(known[key], dataset=data, **{**SMALL, **knobs})
            assert run_ranks(ranks, argv, tmp_path_factory.mktemp('logs')) == [0] * ranks
        return known[key]

    return make


@pytest.fixture
def half(made, tmp_path):
    """A copy of a run on 4 ranks that ended half way."""
    return shutil.copytree(made(4, shard=True, max_iters=4), tmp_path / 'half')


def assert_alike(one, other, rel=2e-5):
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():  # gradients cancel, so that their norm keeps fewer digits
            assert value == pytest.approx(b[name], rel=10 * rel if name == 'grad_norm' else rel), name


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_shared_model_has_the_curve_of_a_whole_one(made, optimizer):
    """With muon, whose step is that of whole matrices: orthogonal parts would be something else."""
    whole, shared = made(1, optimizer=optimizer), made(2, optimizer=optimizer, shard=True)
    assert_alike(whole, shared)
    one, other = (checkpoint.load(folder / LAST, resume=True) for folder in (whole, shared))
    assert one['model'].keys() == other['model'].keys()
    for name, weight in one['model'].items():
        if torch.is_tensor(weight):
            torch.testing.assert_close(weight, other['model'][name], rtol=1e-3, atol=1e-4)
    model, _ = load_model(shared)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_in_bf16_it_is_near_that_of_replicas(made):
    assert_alike(made(1, optimizer='adamw'), made(2, dtype='bfloat16', shard=True), rel=3e-2)


def test_it_resumes_bit_for_bit_on_as_many_ranks(made, half, tmp_path):
    assert run_ranks(4, flags(half, init_from='resume', max_iters=8), tmp_path) == [0] * 4
    assert_same_run(made(4, shard=True), half)


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_what_4_ranks_wrote_resumes_on_fewer(made, half, tmp_path, ranks):
    argv = flags(half, init_from='resume', max_iters=8)
    assert run_ranks(ranks, argv, tmp_path) == [0] * ranks
    assert_alike(made(4, shard=True), half)


def test_a_shared_run_goes_on_whole_and_a_whole_one_shared(made, half, tmp_path):
    assert tiny.resume(half, max_iters=8, shard=False) == 0
    assert_alike(made(1, optimizer='adamw'), half)
    assert len(list((half / 'shards').iterdir())) == 1  # those of previous.pt
    assert tiny.resume(half, max_iters=9) == 0
    assert not list((half / 'shards').iterdir()), 'nothing names them any more'
    whole = shutil.copytree(made(1, max_iters=4), tmp_path / 'whole')
    assert run_ranks(2, flags(whole, init_from='resume', shard=True, max_iters=8), tmp_path) == [0, 0]
    assert_alike(made(1, optimizer='adamw'), whole)


def test_the_last_two_and_the_best_are_kept(made):
    folder = made(4, shard=True)
    iters = {name: checkpoint.load(folder / name)['iter'] for name in (LAST, PREVIOUS, BEST)}
    assert iters == {LAST: 8, PREVIOUS: 4, BEST: 8}
    assert sorted(path.name[:7] for path in (folder / 'shards').iterdir()) == ['0000004', '0000008']
    parts = [path.stat().st_size for path in (folder / 'shards').glob('0000008-*/__*')]
    assert len(parts) == 4 and max(parts) < 0.5 * sum(parts), 'each rank wrote its part'


def test_damaged_parts_are_one_line_with_the_file_to_fall_back_on(made, tmp_path):
    folder = shutil.copytree(made(4, shard=True), tmp_path / 'run')
    (part,) = folder.glob('shards/0000008-*/__2_0.distcp')
    content = part.read_bytes()
    part.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
    with pytest.raises(
        CheckpointError, match=r'last.pt is damaged: its part .*__2_0.distcp has another checksum'
    ):
        checkpoint.load(folder / LAST)
    with pytest.raises(CheckpointError, match=r'whole: .*previous.pt \(iteration 4\): copy one to .*last.pt'):
        checkpoint.load_folder(folder, resume=True)
    part.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r'__2_0.distcp has [\d,]+ bytes of \d+'):
        checkpoint.load(folder / LAST)
    part.unlink()
    with pytest.raises(CheckpointError, match=r'last.pt needs .*__2_0.distcp, which is missing'):
        checkpoint.load(folder / LAST)
    (folder / LAST).write_bytes((folder / PREVIOUS).read_bytes())
    assert checkpoint.load_folder(folder, resume=True)['iter'] == 4


@pytest.mark.parametrize(
    'change',
    [
        lambda index: index.update(folder='../elsewhere'),
        lambda index: index.update(folder='..'),
        lambda index: index['files'].update({'/etc/passwd': [1, 1]}),
        lambda index: index.pop('also'),
        lambda index: next(iter(index['tensors'].values()))['chunks'][0].update(file='../../secret'),
        lambda index: next(iter(index['tensors'].values())).update(dtype='load'),
        lambda index: next(iter(index['tensors'].values()))['chunks'][0].update(offsets=['0']),
    ],
)
def test_an_index_that_names_what_it_must_not_is_refused(half, change):
    state = torch.load(half / LAST, weights_only=True)
    change(state['shards'])
    torch.save(state, half / LAST)
    with pytest.raises(CheckpointError, match=r'last\.pt.* damaged'):
        checkpoint.load(half / LAST)


def test_the_pickle_beside_the_parts_is_never_read(half):
    (pickled,) = half.glob('shards/*/.metadata')
    pickled.write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(half / 'pwned') + b"'\ntR.")
    assert checkpoint.load(half / LAST)['iter'] == 4 and not (half / 'pwned').exists()


def _killed_before_the_name():
    real = checkpoint.save

    def save(state, *rest):
        if state['iter'] == 8:
            kill_me()
        real(state, *rest)

    checkpoint.save = save


def test_a_kill_between_the_parts_and_their_name_leaves_a_whole_checkpoint(made, data, tmp_path):
    out = tmp_path / 'run'
    argv = flags(out, dataset=data, **{**SMALL, 'shard': True, 'dist_timeout': 5})
    ranks = tiny.start_ranks(2, argv, tmp_path, _killed_before_the_name)
    assert ranks[0].end() == -signal.SIGKILL
    assert ranks[1].end() != 0
    assert len(list((out / 'shards').iterdir())) == 2 and checkpoint.load(out / LAST)['iter'] == 4
    assert run_ranks(2, flags(out, init_from='resume'), tmp_path) == [0, 0]
    assert_same_run(made(2, shard=True), out)
    assert len(list((out / 'shards').iterdir())) == 2, 'what the killed save left is gone'


def _full_disk():
    writes, real = [], dcp.FileSystemWriter.write_data

    def write_data(self, *args):
        writes.append(args)
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *args)

    dcp.FileSystemWriter.write_data = write_data


def test_a_part_that_cannot_be_written_ends_the_run_on_all_ranks(data, tmp_path):
    out = tmp_path / 'run'
    argv = flags(out, dataset=data, **{**SMALL, 'shard': True, 'max_iters': 100_000})
    assert run_ranks(2, argv, tmp_path, _full_disk, faulty=1) == [2, 2]
    said = (tmp_path / 'rank0.log').read_text(encoding='utf-8')
    assert 'could not be written: rank 1: [Errno 28] No space left on device; the checkpoint before' in said
    assert checkpoint.load(out / LAST)['iter'] == 4 and status(out) == 'failed'


def test_what_cannot_be_shared_out_is_refused(data, tmp_path):
    with pytest.raises(
        ConfigError, match='shard=True shares a model out among ranks: start them with torchrun'
    ):
        train.main(flags(tmp_path / 'run', dataset=data, **SMALL, shard=True))
    ranks, k = Ranks(ddp=True), Knobs(shard=True)
    with pytest.raises(ConfigError, match="dtype='float16' needs a loss scaler"):
        check_sharding(k, ranks, 'cuda:0', 'float16')
    with pytest.raises(ConfigError, match='sample_tokens=9: no rank has the whole model'):
        check_sharding(replace(k, sample_tokens=9), ranks, 'cpu', 'float32')


def test_the_parts_of_a_run_that_is_started_over_are_gone(half, data):
    assert tiny.start(half, data, overwrite=True, max_iters=0) == 0
    assert not (half / 'shards').exists() and Path(half / LAST).exists()


def test_a_tied_weight_is_written_once(half):
    state = torch.load(half / LAST, weights_only=True)
    assert state['shards']['also'] == {'model.lm_head.weight': 'model.transformer.wte.weight'}
    assert shards.check_index(half / LAST, state['shards']) is None
