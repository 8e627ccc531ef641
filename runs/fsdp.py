"""A model whose weights, gradients and optimizer state are shared out among the ranks (torch's FSDP2)."""

from __future__ import annotations

from pathlib import Path

import torch

from configurator import ConfigError
from runs.memory import recompute
from runs.optimizer import own_part
from runs.ranks import Ranks

# What runs that share nothing out do without, and what takes a second to import, is imported where it is used


def check_sharding(k, group: Ranks, device: str, dtype: str):
    """Refuse what --shard=true cannot do. ConfigError."""
    if not k.shard:
        return
    if not group.ddp:
        raise ConfigError(
            'shard=True shares a model out among ranks: start them with torchrun --nproc_per_node=N '
            'train.py …, or leave it out'
        )
    if dtype == 'float16':
        raise ConfigError("dtype='float16' needs a loss scaler, which shard=True has none of: use bfloat16")
    if k.sample_tokens:
        raise ConfigError(
            f'sample_tokens={k.sample_tokens}: no rank has the whole model with shard=True; leave it out, '
            'and sample with sample.py afterwards'
        )


def placed(model, k, group: Ranks, device: str, dtype: str):
    """The model where it is trained: on the device, or with shard=True each rank's part of it.

    A block's weights are gathered when it computes, and its gradients are added up over ranks into the parts.
    With dtype 'bfloat16' weights are gathered in bf16; parts, gradients and what the optimizer keeps stay
    fp32, and so do sums over ranks.
    """
    if k.activation_checkpointing:
        recompute(model)
    if not k.shard:
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.split(':')[0], (group.world,))
    policy = MixedPrecisionPolicy()
    if dtype == 'bfloat16':
        # the type of what a block is given is that of what computed it: nothing is cast on the way
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model.to(device)


def own_parts(step, state: dict, path: Path) -> dict:
    """The checkpoint at path, whole or with parts still to be read, with this rank's part in the place of
    every tensor of the model and of its optimizer. Every rank calls it."""
    from torch.distributed.tensor import DTensor

    from runs.shards import fill, map_tensors, tensors_of

    params = {f'model.{name}': value for name, value in step.model.state_dict().items()}
    for where, part in enumerate(getattr(step.optimizer, 'optimizers', [step.optimizer])):
        prefix = f'optimizer.state.{where}' if hasattr(step.optimizer, 'optimizers') else 'optimizer.state'
        in_order = [p for group in part.param_groups for p in group['params']]
        for i, p in enumerate(in_order):
            params[f'{prefix}.{i}'] = p

    def of(name: str, value) -> torch.Tensor | None:
        """The parameter that a tensor of the checkpoint belongs to, where they have one shape."""
        like = params.get(name) if name in params else params.get(name.rpartition('.')[0])
        return like if isinstance(like, DTensor) and value.shape == like.shape else None

    if 'shards' in state:
        places = {}
        for name, value in tensors_of(state):
            like = of(name, value)
            places[name] = torch.empty(value.shape, dtype=value.dtype)
            if like is not None:
                places[name] = torch.zeros_like(like, dtype=value.dtype)
        return fill(state, path, places)

    def share(name, value):
        like = of(name, value)
        if like is None:
            return value
        return own_part(value.to(like.device), like)  # every rank has read the file

    return map_tensors(state, share)
