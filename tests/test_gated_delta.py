"""The gated delta rule against its recurrence, token by token."""

import pytest
import torch
from torch.nn import functional as F

from layers.gated_delta import delta_rule, delta_rule_flops, inverse


def naive(q, k, v, beta, log_alpha, state):
    """The equation as it is published: S_t = α S_{t-1} (I - β k kᵀ) + β v kᵀ, y_t = S_t q_t."""
    out, eye = [], torch.eye(q.size(-1), dtype=q.dtype)
    for t in range(q.size(2)):
        q_t, k_t, v_t = (a[:, :, t].unsqueeze(-1) for a in (q, k, v))  # (B, H, hs, 1)
        alpha, b = (a[:, :, t, None, None] for a in (log_alpha.exp(), beta))
        state = alpha * state @ (eye - b * k_t @ k_t.mT) + b * v_t @ k_t.mT
        out.append(state @ q_t)
    return torch.cat(out, dim=-1).mT, state


def inputs(T, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 3, T, 8, generator=generator, dtype=dtype)
    beta, forget = torch.rand(2, 2, 3, T, generator=generator, dtype=dtype)
    state = torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype)
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, -0.3 * forget, state]


@pytest.mark.parametrize('T', [1, 2, 5, 64, 100, 130])
def test_outputs_state_and_gradients_equal_the_recurrence(T):
    given = [a.requires_grad_() for a in inputs(T)]
    upstream = torch.randn(2, 3, T, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def run(rule):
        y, state = rule(*given)
        return y, state, *torch.autograd.grad((y * upstream).sum() + state.sum(), given)

    for a, b in zip(run(delta_rule), run(naive), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_in_fp32_it_stays_exact_where_all_keys_are_the_same():
    """The triangular matrix is far from the identity there: sums of its powers would cancel."""
    q, k, v, beta, log_alpha, state = inputs(256, torch.float32)
    k = k[:, :, :1].expand_as(k)
    given = q, k, v, torch.ones_like(beta), torch.zeros_like(log_alpha), state
    wanted = naive(*(a.double() for a in given))
    for a, b in zip(delta_rule(*given), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_a_text_may_come_in_pieces():
    given = inputs(90)
    whole, end = delta_rule(*given)
    state, parts = given[-1], []
    for start, stop in ((0, 7), (7, 8), (8, 80), (80, 90)):
        y, state = delta_rule(*(a[:, :, start:stop] for a in given[:-1]), state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize('n', [1, 2, 16, 64])
def test_inverse_of_a_unit_triangular_matrix(n):
    strict = (
        torch.randn(3, n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tril(-1) / n
    )
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(inverse(strict) @ (eye + strict), eye.expand(3, n, n))


def test_its_cost_is_linear_in_the_length():
    costs = [delta_rule_flops(T, 16) / T for T in (64, 640, 64000)]
    assert costs[0] == costs[1] == costs[2]
