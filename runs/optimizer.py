"""What train.py steps with: AdamW, or Muon for the matrices inside the blocks beside AdamW for the rest."""

from __future__ import annotations

import math

import torch
from torch import nn


def make_optimizer(model, k, device_type: str):
    """The optimizer that the knobs name. The trainer sets every group's lr, lr_ratio times the schedule's."""
    adamw = model.configure_optimizers(k.weight_decay, k.learning_rate, (k.beta1, k.beta2), device_type)
    if k.optimizer == 'adamw':
        return adamw
    matrices = hidden_matrices(model)
    ids = {id(p) for p in matrices}
    for group in adamw.param_groups:
        group['params'] = [p for p in group['params'] if id(p) not in ids]
    lr = k.muon_learning_rate or k.learning_rate
    ratio = lr / k.learning_rate if k.learning_rate else 1.0
    blocks = matrix_blocks(model) if k.muon_qkv == 'apart' else {}
    sizes = [blocks.get(id(p)) for p in matrices]
    return Together(Muon(matrices, lr, k.weight_decay, lr_ratio=ratio, sizes=sizes), adamw)


def load_state(optimizer, saved: dict):
    """Give the optimizer the state that one of the same kind and parameters had; rates, decay and betas stay
    those of the knobs as they are now. ValueError where the state is not of these parameters."""
    groups = optimizer.state_dict()['param_groups']
    try:
        optimizer.load_state_dict({**saved, 'param_groups': groups})
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f'the state of the optimizer has another form ({type(e).__name__}: {e})') from None
    for part in getattr(optimizer, 'optimizers', [optimizer]):
        params = [p for group in part.param_groups for p in group['params']]
        if part.state and len(part.state) != len(params):
            raise ValueError(f'the optimizer has a state of {len(part.state)} tensors, not of {len(params)}')
        for p, state in part.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.dim() and value.shape != p.shape:
                    raise ValueError(
                        f'{name} of the optimizer is {list(value.shape)} where a weight is {list(p.shape)}'
                    )


def hidden_matrices(model) -> list[nn.Parameter]:
    """The weights of linear layers inside the blocks; the head is left out, tied or not."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    return [w for w in weights if w.requires_grad]


def matrix_blocks(model) -> dict[int, list[int]]:
    """{id of a weight: row counts} of weights that are several matrices, one above the other: the layer says
    so in `matrix_rows`, as that of queries, keys and values does."""
    return {id(m.weight): m.matrix_rows for m in model.modules() if hasattr(m, 'matrix_rows')}


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal before it is applied (Jordan et al., 2024), with decoupled decay.

    Updates have the root mean square of AdamW's, 0.2 (Liu et al., 2025), so that learning rates compare.
    torch.optim.Muon computes the same in bf16: 14 times as long on a CPU without it (docs/speed.md).

    A matrix that ranks have parts of (fsdp.py) is put together on each of them: orthogonal rows of a part are
    not those of the whole.

    sizes: for each parameter None, or the row counts of the matrices that it consists of: each of those is
    orthogonalised by itself. As one matrix, how much of the update queries and keys get would depend on how
    many rows the values have, which a head plan changes.
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        lr_ratio: float = 1.0,
        sizes: list[list[int] | None] | None = None,
    ):
        params = list(params)
        defaults = {'lr': lr, 'weight_decay': weight_decay, 'momentum': momentum, 'lr_ratio': lr_ratio}
        super().__init__([{'params': params, 'sizes': sizes or [None] * len(params)}], defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group['lr'], group['momentum']
            for p, sizes in zip(group['params'], group['sizes'], strict=True):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state['momentum_buffer'] = torch.zeros_like(p)
                buffer = state['momentum_buffer'].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(buffer, momentum)
                p.mul_(1 - lr * group['weight_decay'])
                rows = [p.size(0)] if sizes is None else sizes
                if hasattr(p, 'placements'):  # ranks have parts of it; its direction is that of all of it
                    whole = update.full_tensor().split(rows)
                    steps = [orthogonal(own) * (-0.2 * lr * math.sqrt(max(own.shape))) for own in whole]
                    p.add_(own_part(torch.cat(steps), p))
                    continue
                for part, own in zip(p.split(rows), update.split(rows), strict=True):
                    part.add_(orthogonal(own), alpha=-0.2 * lr * math.sqrt(max(part.shape)))


def own_part(whole, like):
    """What this rank has of a tensor that is whole on every rank, shared out as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


QUINTIC = 3.4445, -4.775, 2.0315  # x -> 3.4445 x - 4.775 x^3 + 2.0315 x^5 (Jordan et al., 2024)


def orthogonal(matrix):
    """matrix (M, N) -> about the nearest (semi-)orthogonal one: its singular values go to 0.7 to 1.2.

    By Newton-Schulz iterations, in bf16 on CUDA, else in fp32.
    """
    wide = matrix.mT if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    wide = iterate(wide.bfloat16()) if matrix.is_cuda else iterate_gram(wide.float())
    return (wide.mT if matrix.size(0) > matrix.size(1) else wide).type_as(matrix)


def iterate(x, steps: int = 5):
    """Odd polynomials of x (M, N), M <= N, one after the other."""
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT  # (M, M)
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x


def iterate_gram(x, steps: int = 5):
    """The same by (M, M) matrices alone, and one product with x at the end: 1.9 times as fast at 128 x 512.
    Only in fp32: rounding makes small eigenvalues negative, and those grow."""
    a, b, c = QUINTIC
    gram = product = x @ x.mT
    for i in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product if i else factor
        if i < steps - 1:
            gram = factor @ gram @ factor
    return product @ x


class Together:
    """Optimizers that are handled as one: one step, one list of groups, one state to save and to load."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        """As of one optimizer, each value a list with one entry per optimizer."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {name: [state[name] for state in states] for name in ('state', 'param_groups')}

    def load_state_dict(self, saved: dict):
        pairs = zip(saved['state'], saved['param_groups'], strict=True)
        for optimizer, (state, groups) in zip(self.optimizers, pairs, strict=True):
            optimizer.load_state_dict({'state': state, 'param_groups': groups})
