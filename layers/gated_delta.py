"""The gated delta rule (Yang et al., 2024, arXiv:2412.06464): a matrix per head that tokens write to and
read.

    S_t = α_t S_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ,    y_t = S_t q_t

A token first takes away what the state says of its key, then writes its value there; α forgets all of it.
Linear in the length, with a state of head_size x head_size numbers per head that does not grow.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from layers.contract import Attention, Memory, Place, captured
from layers.norms import RMSNorm
from layers.windowed_mean import widen, without_autocast

STEP = 64  # tokens that are computed together; what comes before them is one matrix


class StateCache:
    """The state of each head, (B, n_head, head_size, head_size), in fp32 at least."""

    rewinds = False

    def __init__(self, B: int, n_head: int, head_size: int, device, dtype):
        self.state = widen(torch.zeros(B, n_head, head_size, head_size, device=device, dtype=dtype))

    def select(self, rows):
        self.state = self.state[rows]


class GatedDeltaAttention(Attention):
    """Queries and keys are of length 1, β is a sigmoid, α is exp(-exp(a) softplus(x w + b)) as in Mamba 2;
    what is read is normed per head and gated. Published without positions: the recurrence tells order by
    itself."""

    bounded = True
    padding = 'anywhere'

    def __init__(self, config, place: Place):
        super().__init__()
        C, self.n_head, self.head_size = config.n_embd, config.n_head, config.head_size
        self.block_size = config.block_size
        self.c_attn = nn.Linear(C, 4 * C, bias=config.bias)  # q, k, v and the gate of what is read
        self.c_attn.matrix_rows = [C] * 4
        self.c_rates = nn.Linear(C, 2 * self.n_head, bias=config.bias)  # of writing and of forgetting
        self.forget = nn.Parameter(torch.zeros(2 * self.n_head))  # a and b of every head
        self.norm = RMSNorm(self.head_size)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def init_own(self, generator):
        """Half of a state is forgotten after 1 to 100 tokens at first, from head to head."""
        life = torch.logspace(0, 2, self.n_head) / math.log(2)  # tokens
        self.forget.copy_(torch.cat([torch.zeros(self.n_head), (1 / life).expm1().log()]))

    def forward(self, x, memory: Memory, cache: StateCache | None = None):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 4, self.n_head, self.head_size)
        q, k, v, gate = widen(heads).permute(2, 0, 3, 1, 4)  # (B, n_head, T, hs) each
        rates = widen(self.c_rates(x)).view(B, T, 2, self.n_head)
        write, forget = rates.permute(2, 0, 3, 1)  # (B, n_head, T) each
        a, b = widen(self.forget).view(2, self.n_head, 1)
        beta, log_alpha = write.sigmoid(), -a.exp() * F.softplus(forget + b)
        if memory.real is not None:  # padding writes nothing and forgets nothing
            real = memory.real[:, None, -T:]  # (B, 1, T)
            beta, log_alpha = beta * real, log_alpha * real
        with without_autocast(x.device.type):
            state = cache.state if cache is not None else self.new_cache(B, T, x.device, x.dtype).state
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            longest = self.block_size + 1 if captured() else T  # more than T, whatever T is
            y, state = delta_rule(q, k, v, beta, log_alpha, state, longest)
        if cache is not None:
            cache.state = state.detach()  # gradients reach the tokens of this call alone
        y = (self.norm(y) * F.silu(gate)).type_as(x)  # (B, n_head, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def new_cache(self, B, max_len, device, dtype) -> StateCache:
        return StateCache(B, self.n_head, self.head_size, device, dtype)

    def cache_bytes_per_token(self, itemsize: int) -> int:
        return 0

    def state_bytes(self, itemsize: int) -> int:
        return self.n_head * self.head_size**2 * 4  # fp32 whatever the rest is

    def flops_per_token(self, T: int) -> float:
        return self.n_head * delta_rule_flops(T, self.head_size) / T

    def backward_flops_per_token(self, T: int) -> float:
        """Twice those of the forward pass, except that nothing flows into the empty state before the first
        token, nor out of the state after the last one."""
        n, idle = step_of(T), 4  # products that have half of a backward pass, or none
        return 2 * self.flops_per_token(T) - self.n_head * idle * 2 * n * self.head_size**2 / T

    def describe(self) -> str:
        return f'gated delta rule, {self.n_head} heads'


def step_of(T: int) -> int:
    """How many tokens are computed together, of T: a power of 2."""
    return min(STEP, 1 << (T - 1).bit_length())


def delta_rule(q, k, v, beta, log_alpha, state, longest: int = 0):
    """What T tokens read, and the state after them: (B, H, T, hs), (B, H, hs, hs).

    q, k, v (B, H, T, hs), k of length 1 at most; beta, log_alpha (B, H, T), log_alpha <= 0; state (B, H, hs,
    hs), of values by keys. All fp32 or wider. longest: for how many tokens there are steps (0: T), since a
    graph that is taken down has steps for the longest text. In a step of n tokens, with g the sum of
    log_alpha within it, what token t writes is u_t = β_t (v_t - α_t S_{t-1} k_t): the solution of

        u_t + β_t Σ_{j<t} exp(g_t - g_j) (k_t · k_j) u_j = β_t (v_t - exp(g_t) S k_t)

    with S the state before the step: one triangular matrix for all of them (Yang et al., 2024, section 3).
    """
    T, hs = q.shape[2:]
    longest = longest or T
    n = step_of(longest)
    pad = -(-longest // n) * n - T  # tokens that write nothing and forget nothing
    q, k, v = (F.pad(a, (0, 0, 0, pad)).unflatten(2, (-1, n)) for a in (q, k, v))  # (B, H, N, n, hs)
    beta, log_alpha = (F.pad(a, (0, pad)).unflatten(2, (-1, n)) for a in (beta, log_alpha))  # (B, H, N, n)
    g = log_alpha.cumsum(-1)
    lower = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(~lower, -math.inf).exp()  # (B, H, N, n, n)
    beta, g = beta.unsqueeze(-1), g.unsqueeze(-1)
    strict = (k @ k.mT * decay * beta).tril(-1)  # (B, H, N, n, n)
    solved = inverse(strict) @ torch.cat([beta * v, beta * g.exp() * k], dim=-1)  # (B, H, N, n, 2 * hs)
    own, of_state = solved.split(hs, dim=-1)
    scores = q @ k.mT * decay  # (B, H, N, n, n)
    q = q * g.exp()
    left = g[..., -1:, :]  # (B, H, N, 1, 1), of the state at the end of a step
    k = k * (left - g).exp()
    out = []
    for i in range(q.size(2)):
        u = own[:, :, i] - of_state[:, :, i] @ state.mT  # (B, H, n, hs)
        out.append(q[:, :, i] @ state.mT + scores[:, :, i] @ u)
        state = state * left[:, :, i].exp() + u.mT @ k[:, :, i]
    return torch.cat(out, dim=2)[:, :, :T], state


def inverse(strict):
    """The inverse of I + strict, for strictly lower triangular matrices (…, n, n), n a power of 2: that of
    a block matrix, from its diagonal blocks, which double in size. Sums of powers would cancel where keys
    repeat."""
    n = strict.size(-1)
    blocks = torch.ones_like(strict[..., :1, :1]).expand(*strict.shape[:-2], 1, 1).unsqueeze(-3)
    blocks = blocks.expand(
        *strict.shape[:-2], n, 1, 1
    )  # (…, n / s, s, s), the inverses of the diagonal blocks
    s = 1
    while s < n:
        tiles = strict.unflatten(-2, (n // (2 * s), 2, s)).unflatten(-1, (n // (2 * s), 2, s))
        below = tiles[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # (…, n / 2s, s, s)
        first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        corner = -below if s == 1 else -(second @ below @ first)
        above = torch.cat([first, torch.zeros_like(first)], dim=-1)
        blocks = torch.cat([above, torch.cat([corner, second], dim=-1)], dim=-2)  # (…, n / 2s, 2s, 2s)
        s *= 2
    return blocks.squeeze(-3)


def delta_rule_flops(T: int, hs: int) -> int:
    """FLOPs of the matrix products of delta_rule, forward, per sequence and head."""
    n = step_of(T)
    blocks = sum(2 * (n // (2 * s)) * 2 * s**3 for s in (2**i for i in range(1, n.bit_length() - 1)))
    squares = 2 * n * n * hs * (1 + 2 + 1 + 1)  # k · k, solved, q · k, what is read within the step
    return -(-T // n) * (blocks + squares + 3 * 2 * n * hs * hs)
