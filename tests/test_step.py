"""What a training step is made of, held against values written out: rates, clipping, groups, shares."""

import math
from dataclasses import replace

import pytest
import torch

from configurator import ConfigError
from data.tokendata import get_batch
from model import GPT, GPTConfig
from runs.knobs import Knobs
from runs.optimizer import make_optimizer
from runs.ranks import Ranks
from runs.schedule import learning_rate_at
from runs.step import TrainingStep, compiled, dropout_seed, share_of
from tiny import lines, resume, start, write_tokens

RATES = Knobs(learning_rate=1.0, min_lr=0.1, warmup_iters=4, max_iters=14)
WARM_UP = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1.0}


@pytest.mark.parametrize(
    'knobs, rates',
    [
        ({}, {**WARM_UP, 6: 0.9140576, 9: 0.55, 13: 0.1220245, 14: 0.1, 99: 0.1}),
        ({'lr_schedule': 'linear'}, {**WARM_UP, 6: 0.82, 9: 0.55, 13: 0.19, 14: 0.1, 99: 0.1}),
        ({'min_lr': 0.0}, {**WARM_UP, 9: 0.5, 14: 0.0}),
        ({'lr_decay_iters': 9}, {**WARM_UP, 6: 0.6890576, 9: 0.1, 13: 0.1}),  # it ends before the run does
        ({'lr_decay_iters': 24}, {**WARM_UP, 13: 0.6203955, 14: 0.55}),  # the run ends before it does
        ({'max_iters': 24}, {**WARM_UP, 14: 0.55, 24: 0.1}),  # a resumed run that is to go on for longer
        ({'warmup_iters': 0}, {0: 1.0, 7: 0.55, 14: 0.1}),
        ({'warmup_iters': 0, 'lr_schedule': 'linear'}, {0: 1.0, 1: 0.9357143, 7: 0.55}),
        ({'decay_lr': False}, {0: 1.0, 3: 1.0, 9: 1.0, 99: 1.0}),
        ({'lr_decay_iters': 3}, {2: 0.6, 3: 0.8, 4: 0.1}),  # the warm-up comes first
    ],
    ids=str,
)
def test_the_rate_of_every_step(knobs, rates):
    found = {it: learning_rate_at(it, replace(RATES, **knobs)) for it in rates}
    assert found == pytest.approx(rates, abs=1e-6)


def test_a_run_steps_at_the_rates_of_its_schedule(tmp_path):
    """metrics.jsonl has the rate of step n at iter n + 1; a resumed run takes the schedule that is new."""
    data = write_tokens(tmp_path / 'tokens')
    knobs = {'learning_rate': 0.01, 'min_lr': 0.001, 'warmup_iters': 2, 'eval_interval': 100, 'eval_iters': 1}
    start(tmp_path / 'run', data, max_iters=6, lr_schedule='linear', **knobs)
    resume(tmp_path / 'run', max_iters=10)
    rates = {r['iter']: r['lr'] for r in lines(tmp_path / 'run') if 'lr' in r}
    first = {1: 0.01 / 3, 2: 0.02 / 3, 3: 0.01, 4: 0.00775, 5: 0.0055, 6: 0.00325}
    then = {7: 0.0055, 8: 0.004375, 9: 0.00325, 10: 0.002125}
    assert rates == pytest.approx({**first, **then}, rel=1e-6)


# ---- one step


TOKENS = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(0)).numpy().astype('uint16')
SMALL = Knobs(
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=8,
    batch_size=2,
    gradient_accumulation_steps=4,
    compile=False,
    grad_clip=0.0,
)


def small_model() -> GPT:
    return GPT(
        GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, bias=True), seed=1
    ).double()


class Recorder:
    """Stands in for an optimizer: keeps the gradients that it is to step with."""

    def __init__(self, model):
        self.param_groups = [{'params': list(model.parameters())}]
        self.seen = None

    def step(self):
        self.seen = [p.grad.clone() for p in self.param_groups[0]['params']]

    def zero_grad(self, set_to_none):
        for p in self.param_groups[0]['params']:
            p.grad = None


def step_of(k: Knobs, group=Ranks()) -> TrainingStep:  # noqa: B008 (a tuple)
    model = small_model()
    step = TrainingStep(k, group, model, Recorder(model), TOKENS, 'cpu', 'float32')
    step.begin(3)
    return step


def whole_batch(k: Knobs):
    """x, y of all micro-batches of step 3, one under the other."""
    batches = [
        get_batch(TOKENS, k.seed, 3, micro, k.batch_size, k.block_size)
        for micro in range(k.gradient_accumulation_steps)
    ]
    return (torch.cat([torch.from_numpy(b[i]) for b in batches]) for i in range(2))


def test_micro_batches_add_up_to_the_mean_over_all():
    step, model = step_of(SMALL), small_model()
    loss, norm, stopping = step.gradients(3)
    _, wanted = model(*whole_batch(SMALL))
    wanted.backward()
    grads = [p.grad for p in model.parameters()]
    assert loss == pytest.approx(wanted.item(), rel=1e-6) and stopping is False
    assert norm == pytest.approx(math.sqrt(sum(g.pow(2).sum().item() for g in grads)), rel=1e-5)
    step.update(0.1)
    for found, grad in zip(step.optimizer.seen, grads, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in step.model.parameters())  # the next step begins with none


@pytest.mark.parametrize('clip, factor', [(0.0, 1.0), (0.25, 0.25), (2.0, 1.0)])
def test_gradients_are_clipped_to_the_norm(clip, factor):
    """Before the update, all by the same factor, and only where the norm is above grad_clip."""
    free, clipped = step_of(SMALL), step_of(SMALL)
    norm = free.gradients(3)[1]
    clipped.k = replace(SMALL, grad_clip=clip * norm)
    assert clipped.gradients(3)[1] == norm  # what is told is the norm before clipping
    for step in (free, clipped):
        step.update(0.1)
    for a, b in zip(clipped.optimizer.seen, free.optimizer.seen, strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    'clip, passes', [(2.0, 0), (1.01, 0), (1.0, 1), (0.5, 1), (0.0, 0), (1e-5, 1), (math.inf, 0)]
)
def test_gradients_below_the_norm_are_left_alone(clip, passes, monkeypatch):
    """No pass over them where torch's factor is exactly 1; the optimizer sees the same, bit for bit."""
    ours, always = step_of(SMALL), step_of(SMALL)
    norm = ours.gradients(3)[1]
    always.gradients(3)
    torch.nn.utils.clip_grads_with_norm_(always.model.parameters(), clip * norm or math.inf, always.grad_norm)
    seen, own = [], torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, 'clip_grads_with_norm_', lambda *args: seen.append(own(*args)))
    ours.k, always.k = replace(SMALL, grad_clip=clip * norm), replace(SMALL, grad_clip=0.0)
    for step in (ours, always):
        step.update(0.1)
    assert len(seen) == passes
    for a, b in zip(ours.optimizer.seen, always.optimizer.seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('norm', [math.nan, math.inf])
def test_a_norm_that_is_no_number_is_not_below_the_limit(norm, monkeypatch):
    """As a step with a loss scaler has it, where gradients overflow: the scaler skips the update."""
    step, seen = step_of(SMALL), []
    step.gradients(3)
    step.norm, step.k = norm, replace(SMALL, grad_clip=1.0)
    monkeypatch.setattr(torch.nn.utils, 'clip_grads_with_norm_', lambda *args: seen.append(args))
    step.update(0.1)
    assert len(seen) == 1


def test_every_group_steps_at_its_share_of_the_rate():
    step = step_of(SMALL)
    step.optimizer.param_groups += [{'params': [], 'lr_ratio': 0.5}]
    step.gradients(3)
    step.update(0.2)
    assert [group['lr'] for group in step.optimizer.param_groups] == [0.2, 0.1]


def test_adamw_decays_matrices_and_nothing_else():
    model = small_model()
    k = replace(SMALL, weight_decay=0.3, learning_rate=0.02, beta1=0.8, beta2=0.7)
    decayed, rest = make_optimizer(model, k, 'cpu').param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed['params']} == {n for n, p in model.named_parameters() if p.ndim > 1}
    assert {names[id(p)] for p in rest['params']} == {n for n, p in model.named_parameters() if p.ndim == 1}
    assert (decayed['weight_decay'], rest['weight_decay']) == (0.3, 0.0)
    assert all(g['betas'] == (0.8, 0.7) and g['lr'] == 0.02 for g in (decayed, rest))


def test_dropout_of_a_micro_batch_is_its_own():
    arguments = [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (1, 2, 3, 1), (1, 2, 3, 2)]
    seeds = [dropout_seed(*a) for a in arguments]
    assert len(set(seeds)) == len(seeds) and seeds == [dropout_seed(*a) for a in arguments]
    assert dropout_seed(1, 2, 3) == dropout_seed(1, 2, 3, 0) == 1929679308182158081  # for ever


# ---- the share of a rank


@pytest.mark.parametrize('n, batch_size, world', [(4, 2, 2), (1, 5, 2), (1, 5, 3), (3, 4, 2), (6, 1, 3)])
def test_any_number_of_ranks_share_a_step(n, batch_size, world):
    """Together they take every sequence once, and the mean of their gradients is that of the whole batch."""
    k = replace(SMALL, gradient_accumulation_steps=n, batch_size=batch_size)
    groups = [Ranks(rank, rank, world) for rank in range(world)]
    taken = [
        (micro, row)
        for micros, rows in (share_of(k, group) for group in groups)
        for micro in micros
        for row in range(batch_size)[rows]
    ]
    assert sorted(taken) == [(micro, row) for micro in range(n) for row in range(batch_size)]
    sizes = [len(micros) * (rows.stop - rows.start) for micros, rows in (share_of(k, g) for g in groups)]
    assert max(sizes) - min(sizes) <= n  # one sequence of each micro-batch
    model = small_model()
    _, wanted = model(*whole_batch(k))
    wanted.backward()
    steps = [step_of(k, group) for group in groups]
    losses = [step.gradients(3)[0] for step in steps]  # each has only divided its own by the number of ranks
    assert sum(losses) == pytest.approx(wanted.item(), rel=1e-6)
    for i, p in enumerate(model.parameters()):
        found = sum(list(step.model.parameters())[i].grad for step in steps) / world
        torch.testing.assert_close(found, p.grad, rtol=1e-9, atol=1e-12)


def test_ranks_that_would_have_nothing_to_do_are_refused():
    k = replace(SMALL, gradient_accumulation_steps=3, batch_size=2)
    with pytest.raises(ConfigError, match=r'4 ranks cannot share .*=3 micro-batches of batch_size=2: make'):
        share_of(k, Ranks(0, 0, 4))


def test_graphs_are_asked_for_on_cuda_alone(monkeypatch):
    """What torch.compile is told; graphs themselves need a GPU."""
    asked = []
    monkeypatch.setattr(torch, 'compile', lambda model, mode: asked.append(mode))
    for graphs, device in ((False, 'cuda'), (True, 'cuda:0'), (True, 'cpu')):
        compiled(None, Knobs(cuda_graphs=graphs), device)
    assert asked == [None, 'reduce-overhead', None]
