"""The chunked loss against the plain one: the same loss and the same gradients, and never all the logits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layers import loss as loss_module
from layers.loss import ROWS, linear_cross_entropy
from model import GPT, GPTConfig

N, C, V = 50, 12, 37


def plain(hidden, weight, targets):
    logits = F.linear(hidden, weight).float() if hidden.dtype != torch.float64 else F.linear(hidden, weight)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1)


def problem(dtype=torch.float32, ignored=True):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, N // 2, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (2, N // 2), generator=generator)
    if ignored:
        targets[0, 3:9] = targets[1, -1] = -1
    return hidden, weight, targets


def run(loss, hidden, weight, targets, autocast, **options):
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        value = loss(hidden, weight, targets, **options)
    # as with gradient accumulation: the gradient that arrives is not 1
    return value.detach(), *torch.autograd.grad(value / 3, (hidden, weight))


@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('rows', [1, 7, 25, 1000])
def test_loss_and_gradients_equal_the_plain_path(rows, autocast, function=linear_cross_entropy):
    args = problem()
    ours = run(function, *args, autocast, rows=rows)
    exact = run(plain, *args, False)
    theirs = run(plain, *args, autocast)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.float32
    if not autocast:
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
        return
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)  # the same bf16 logits
    for a, b, c in zip(
        ours[1:], theirs[1:], exact[1:], strict=True
    ):  # no further from fp32 than the plain path
        assert (a - c).norm() < 1.1 * (b - c).norm() < 0.01 * c.norm()


def test_compiled_whole():
    """In one graph, as the trainer compiles it: no break, the same numbers."""
    test_loss_and_gradients_equal_the_plain_path(
        rows=25, autocast=True, function=torch.compile(linear_cross_entropy, fullgraph=True)
    )


def test_gradcheck_in_double():
    hidden, weight, targets = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, rows=7), (hidden, weight)
    )


def test_fp16_keeps_small_gradients():
    """Divided by the number of tokens before the cast, most entries of fp16 logit gradients would be zero."""
    hidden, weight, targets = problem()
    many = hidden.detach().repeat(400, 1, 1).flatten(0, 1)  # (400 N, C)
    labels = targets.repeat(400, 1).flatten()
    exact = torch.autograd.grad(plain(many, weight, labels), weight)[0]
    with torch.autocast('cpu', torch.float16):
        value = linear_cross_entropy(many, weight, labels, rows=100)
    grad = torch.autograd.grad(value, weight)[0]
    assert (grad - exact).norm() < 0.002 * exact.norm()


def test_no_target_counts_is_nan_as_in_torch():
    hidden, weight, targets = problem()
    targets.fill_(-1)
    assert (
        plain(hidden, weight, targets).isnan()
        and linear_cross_entropy(hidden, weight, targets, rows=7).isnan()
    )


def test_without_grad_and_with_frozen_inputs():
    hidden, weight, targets = problem()
    expected = run(plain, hidden, weight, targets, False)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, rows=7), expected[0])
    for frozen, grad in ((0, 2), (1, 1)):
        args = [t.detach() if i == frozen else t for i, t in enumerate((hidden, weight))]
        value = linear_cross_entropy(*args, targets, rows=7)
        (value / 3).backward()
        torch.testing.assert_close(args[1 - frozen].grad, expected[grad], rtol=2e-6, atol=1e-7)
        args[1 - frozen].grad = None


def test_second_derivatives_are_refused():
    hidden, weight, targets = problem()
    (first,) = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, rows=7), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError):
        first.sum().backward()


def use_rows(monkeypatch, rows):
    monkeypatch.setitem(ROWS, 'cpu', rows)
    monkeypatch.setattr(loss_module, 'LOGITS', 0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize('train', [True, False])
def test_the_model_never_holds_all_logits(monkeypatch, train):
    use_rows(monkeypatch, 8)
    model = GPT(GPTConfig(block_size=64, vocab_size=999, n_layer=1, n_head=2, n_embd=4), seed=1)
    idx = torch.randint(999, (2, 64))
    with torch.set_grad_enabled(train), LargestTensor() as largest:
        _, loss = model(idx, idx)
        if train:
            loss.backward()
    assert 8 * 999 <= largest.numel < 16 * 999  # all would be 128 * 999


@pytest.mark.parametrize('autocast', [False, True], ids=['fp32', 'bf16'])
def test_the_model_trains_as_with_the_plain_loss(monkeypatch, autocast):
    """Tied weights: the gradient of the head and that of the embedding meet in one tensor."""
    use_rows(monkeypatch, 8)
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=8), seed=1)
    idx, targets = torch.randint(65, (2, 3, 16), generator=torch.Generator().manual_seed(2))
    targets[1, :5] = -1
    losses, grads = [], []
    for form in ('plain', 'chunked'):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            if form == 'plain':
                logits, _ = model(idx)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)
            else:
                _, loss = model(idx, targets)
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert (grads[1] - grads[0]).norm() < (0.01 if autocast else 1e-6) * grads[0].norm()


def test_the_way_of_the_loss():
    table = {
        ('cpu', torch.bfloat16, True, True): 'chunks',
        ('cpu', torch.float32, False, False): 'chunks',
        ('mps', torch.float32, True, True): 'chunks',
        ('cuda', torch.bfloat16, True, True): 'fused',
        ('cuda', torch.float16, True, False): 'fused',
        ('cuda', torch.float32, True, True): 'whole',
        ('cuda', torch.float32, True, False): 'chunks',
        ('cuda', torch.bfloat16, False, True): 'whole',
        ('cuda', torch.bfloat16, False, False): 'chunks',
    }
    assert {asked: loss_module.way(*asked) for asked in table} == table


# In a process of its own: Triton decides when it is imported whether it interprets. Prints, for each softcap
# and type, how far the loss and both gradients are from float64, and how far the chunks of loss.py are.
FUSED = """
import torch
from torch.nn import functional as F
from layers.loss import _LinearCrossEntropy, soft_capped

generator = torch.Generator().manual_seed(1)
hidden = torch.randn(30, 16, generator=generator, requires_grad=True)
weight = torch.randn(8300, 16, generator=generator, requires_grad=True)  # more than one block of the kernel
targets = torch.randint(8300, (30,), generator=generator)
targets[3:9] = -1
for softcap in (0.0, 5.0):
    logits = soft_capped(hidden.double() @ weight.double().t(), softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=-1)
    exact = [loss, *torch.autograd.grad(loss, (hidden, weight))]
    for dtype in (torch.float32, torch.bfloat16):
        for fused in (True, False):
            found = _LinearCrossEntropy.apply(hidden, weight, targets, -1, 7, dtype, softcap, fused)
            found = [found, *torch.autograd.grad(found, (hidden, weight))]
            print(*(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact)))
"""


def test_the_fused_loss_and_its_gradients():
    pytest.importorskip('triton', reason='triton is not installed: the kernel cannot be interpreted')
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, '-c', FUSED], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if 'InterpreterError' in done.stderr and 'only 0-dimensional arrays' in done.stderr:
        pytest.skip("this Triton's interpreter (3.6 is one) cannot work with this numpy")
    assert done.returncode == 0, done.stderr
    errors = [[float(number) for number in line.split()] for line in done.stdout.splitlines()]
    for i, (fused, chunked) in enumerate(zip(errors[::2], errors[1::2], strict=True)):
        for a, b in zip(fused, chunked, strict=True):
            # the interpreter cuts what it stores in bf16 off, where a GPU rounds: up to twice the error
            assert a < (2 * b + 1e-6 if i % 2 else 2e-6), (i, fused, chunked)


def test_a_kernel_that_does_not_work_costs_a_warning(monkeypatch):
    assert not loss_module.fused_works('cpu')
    if importlib.util.find_spec('triton') is None:
        monkeypatch.setattr(loss_module.importlib.util, 'find_spec', lambda name: name)

    def fails(device):
        raise RuntimeError('no such instruction\nand more')

    monkeypatch.setattr(loss_module, '_kernel_is_right', fails)
    loss_module._tried.cache_clear()
    with pytest.warns(UserWarning, match='does not run here, another way is taken: no such instruction$'):
        assert not loss_module.fused_works('cuda')
    assert not loss_module.fused_works('cuda')  # told once
    loss_module._tried.cache_clear()
