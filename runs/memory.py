"""What a training takes of the memory of a device, counted before anything is allocated; how to take less."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from configurator import ConfigError
from runs.optimizer import hidden_matrices
from runs.system import autocast_for, total_memory


class Needs(NamedTuple):
    """Bytes per device, while a step computes."""

    params: int  # of the model; a number, not bytes
    weights: int
    gradients: int
    optimizer: int
    gathered: int  # of a shared model: the weights that are whole at a time, and their gradients
    activations: int  # what the forward pass of one micro-batch leaves for its backward pass

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def needs(k, kind, config, world: int, dtype: str, sequences: int) -> Needs:
    """What a training with the knobs k takes on each of `world` devices.

    kind: the class of the model; dtype: of autocast; sequences: of a micro-batch on one device. Weights,
    gradients and optimizer state are in fp32, and counted exactly, except for the padding of parts.
    Activations are those of the operations that a CPU runs: the pass is computed on tensors without numbers.
    What a step holds for moments only is left out: rows of logits, buffers of libraries, gaps.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device('meta'):
        model = kind(config, seed=0)
    params = size(model)
    matrices = sum(p.numel() for p in hidden_matrices(model)) if k.optimizer == 'muon' else 0
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = world if k.shard else 1
    gathered = 0
    if k.shard and world > 1:
        blocks = [size(block) for block in model.transformer.h]
        width = 2 if dtype == 'bfloat16' else 4
        gathered = 2 * width * (params - sum(blocks) + max(blocks))
    with FakeTensorMode():
        model = kind(config, seed=0)
        if k.shard and dtype == 'bfloat16':
            to_bfloat16(model)  # gathered as such: autocast makes no copies
        if k.activation_checkpointing:
            recompute(model)
        ids = torch.zeros(sequences, k.block_size, dtype=torch.int64)
        with Live() as live, autocast_for('cpu', dtype):
            loss = model.train()(ids, ids, torch.zeros(()))[1]
            activations = live.bytes
        del loss
    return Needs(
        params=params,
        weights=-(-4 * params // share),
        gradients=-(-4 * trained // share),
        optimizer=-(-(8 * trained - 4 * matrices) // share),
        gathered=gathered,
        activations=activations,
    )


def to_bfloat16(model):
    """As model.to(torch.bfloat16), which fails on tensors without numbers (torch 2.13)."""
    changed = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            changed[p] = changed.get(p, torch.nn.Parameter(p.detach().bfloat16()))
            setattr(module, name, changed[p])


def size(module) -> int:
    return sum(p.numel() for p in module.parameters())


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that were made in it and are still there."""

    def __init__(self):
        super().__init__()
        self.bytes, self.sizes = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in inputs and key not in self.sizes:  # a view is no new memory
                    self.sizes[key] = storage.nbytes()
                    self.bytes += self.sizes[key]
                    weakref.finalize(storage, self._drop, key)
        return out

    def _drop(self, key):
        self.bytes -= self.sizes.pop(key)


def refuse_what_cannot_fit(k, kind, config, group, device: str, dtype: str):
    """Refuse a training that takes more memory than the device has. ConfigError names what would help.

    group: the ranks, which share the memory of a CPU.
    """
    memory = total_memory(device)
    if memory is None:
        return
    if device == 'cpu':
        memory //= group.on_host
    sequences = -(-k.batch_size // (1 if k.gradient_accumulation_steps % group.world == 0 else group.world))
    if 2 * roughly(k, config, sequences) < memory:  # to count it exactly takes seconds
        return
    found = needs(k, kind, config, group.world, dtype, sequences)
    if found.total <= memory:
        return
    states = found.weights + found.gradients + found.optimizer
    told = (
        f'{found.params:.3g} parameters and {sequences} x {k.block_size} tokens at a time take '
        f'{gib(found.total)} on {device}, which has {gib(memory)}: weights {gib(found.weights)}, gradients '
        f'{gib(found.gradients)}, optimizer {gib(found.optimizer)}, activations {gib(found.activations)}'
    )
    if states + found.gathered > memory:
        if k.shard:
            fix = 'start more ranks, or make the model smaller'
        else:
            ranks = -(-states // (memory // 2))
            fix = f'share it out among ranks (--shard=true on {ranks} or more), or make it smaller'
    elif sequences > 1:
        fix = 'take a smaller batch_size and more gradient_accumulation_steps'
        fix += '' if k.activation_checkpointing else ', or --activation_checkpointing=true'
    elif not k.activation_checkpointing:
        fix = 'give --activation_checkpointing=true, or a smaller block_size'
    else:
        fix = 'take a smaller block_size' + ('' if k.shard else ', or --shard=true on several ranks')
    raise ConfigError(f'{told}: {fix}')


def gib(n_bytes: int) -> str:
    return f'{n_bytes / 2**30:,.1f} GiB'


def roughly(k, config, sequences: int) -> int:
    """Bytes, more than most models take, by a formula: states in fp32, and 40 numbers per channel, layer and
    token."""
    params = (16 * k.n_layer * k.n_embd + config.vocab_size) * k.n_embd
    return 16 * params + 4 * 40 * sequences * k.block_size * k.n_layer * k.n_embd


def recompute(model):
    """Have the blocks of a model keep nothing but their inputs for the backward pass, where they are computed
    once more (Chen et al., 2016): the same numbers, for less memory and one more forward pass."""
    for block in model.transformer.h:
        block.forward = partial(_computed_twice, block.forward)


def _computed_twice(forward, x, memory, cache=None):
    if cache is not None or not torch.is_grad_enabled():
        return forward(x, memory, cache)
    before = _fork(memory)

    def compute(x):
        own = _fork(before)  # the second time, what this block publishes must not be published twice
        return forward(x, own), own

    y, after = checkpoint(compute, x, use_reentrant=False)
    vars(memory).update(vars(after))
    return y


def _fork(memory):
    """A Memory that can be added to, while this one stays as it is."""
    own = copy.copy(memory)
    own.published, own.inputs = [*memory.published], [*memory.inputs]
    return own
