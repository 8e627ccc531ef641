"""The batches of training and the windows of evaluation: pure functions (files: test_data_reader.py)."""

import numpy as np
import pytest

from data.tokendata import batch_starts, eval_batch, eval_starts, get_batch

# ---- batches


def test_a_batch_is_a_function_of_its_arguments_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    x, y = get_batch(tokens, seed=1, step=2, micro=3, batch_size=4, block_size=16)
    np.random.seed(0)
    get_batch(tokens, 1, 7, 0, 4, 16)
    again = get_batch(tokens.copy(), 1, 2, 3, 4, 16)
    assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
    assert x.shape == y.shape == (4, 16) and x.dtype == y.dtype == np.int64
    assert np.array_equal(x[:, 1:], y[:, :-1]) and np.array_equal(y, x + 1)  # tokens in a row, one ahead
    assert np.array_equal(tokens, np.arange(1000))  # and no one's tokens are touched


def test_batches_are_the_same_for_ever():
    """A saved run resumes with them: another numpy or another version of this file must not change them."""
    assert batch_starts(10_000, 1337, 5, 2, 4, 64).tolist() == [5802, 4890, 334, 9024]


@pytest.mark.parametrize('name, value', [('seed', 2), ('step', 3), ('micro', 4)])
def test_seed_step_and_micro_batch_each_change_the_batch(name, value):
    arguments = {'n_tokens': 10**6, 'seed': 1, 'step': 2, 'micro': 3, 'batch_size': 8, 'block_size': 16}
    one, other = batch_starts(**arguments), batch_starts(**{**arguments, name: value})
    assert not set(one) & set(other)


@pytest.mark.parametrize('world', [1, 2, 4])
def test_any_number_of_ranks_share_the_same_total_batch(world):
    tokens, total = np.arange(5000, dtype=np.uint16), 8
    shares = [[j * world + rank for j in range(total // world)] for rank in range(world)]  # as in train.py
    rows = [get_batch(tokens, 0, 9, micro, 2, 16)[0] for share in shares for micro in share]
    alone = [get_batch(tokens, 0, 9, micro, 2, 16)[0] for micro in range(total)]
    assert sorted(np.concatenate(rows).tolist()) == sorted(np.concatenate(alone).tolist())


def test_batches_cover_the_split_evenly_and_never_leave_it():
    n, block = 40, 8
    starts = np.concatenate([batch_starts(n, 0, step, 0, 64, block) for step in range(100)])
    counts = np.bincount(starts, minlength=n - block)
    assert len(counts) == n - block  # the last window ends with the last token as its target
    expected = len(starts) / len(counts)
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 62.5  # chi-squared, 31 degrees of freedom: p = 0.0007


def test_the_shortest_split_has_one_window():
    x, y = get_batch(np.arange(9, dtype=np.uint16), 0, 0, 0, 2, 8)
    assert x.tolist() == [list(range(8))] * 2 and y.tolist() == [list(range(1, 9))] * 2


# ---- evaluation


@pytest.mark.parametrize('n_tokens', [17, 18, 32, 33, 34, 100, 161])
@pytest.mark.parametrize('batch_size', [1, 3, 64])
def test_a_whole_evaluation_counts_every_target_once(n_tokens, batch_size):
    tokens, block = np.arange(n_tokens, dtype=np.uint16), 16
    starts, skip = eval_starts(n_tokens, block, n_windows=0)
    counted = []
    for index in range(-(-len(starts) // batch_size)):
        x, y = eval_batch(tokens, starts, skip, index, batch_size, block)
        assert x.shape == y.shape == (batch_size, block)
        assert np.array_equal(y[y != -1], x[y != -1] + 1)
        counted += y[y != -1].tolist()
    assert sorted(counted) == list(range(1, n_tokens))


def test_some_windows_are_spread_from_end_to_end_without_overlap():
    starts, skip = eval_starts(1000, 16, n_windows=10)
    assert starts[0] == 0 and starts[-1] == 1000 - 1 - 16 and not skip.any()
    assert np.diff(starts).min() >= 16 and np.ptp(np.diff(starts)) <= 1
    assert eval_starts(1000, 16, 1)[0].tolist() == [0]


def test_more_windows_than_there_are_is_the_whole_split():
    for n in (63, 64, 10_000):
        starts, skip = eval_starts(1000, 16, n)
        whole = eval_starts(1000, 16, 0)
        assert np.array_equal(starts, whole[0]) and np.array_equal(skip, whole[1])
