"""What a training takes is counted beforehand, and is what it takes; blocks that are computed twice."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import runs.memory
import tiny
from configurator import ConfigError
from model import GPT
from runs.knobs import Knobs, model_config
from runs.memory import needs, recompute, refuse_what_cannot_fit
from runs.optimizer import make_optimizer
from runs.ranks import Ranks

K = Knobs(n_layer=4, n_embd=128, n_head=4, block_size=128, batch_size=4, device='cpu')
CONFIG = model_config(K, 1024, 1024)
GIB = 2**30


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def allocated(call):
    """(What the call returns, the bytes that it has allocated and not freed), by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        result = call()
    return result, sum(event.self_cpu_memory_usage for event in measured.events())


@pytest.mark.parametrize('knobs', [{}, {'activation_checkpointing': True}, {'attention': 'reflex(2-2)'}])
def test_what_is_counted_is_what_is_measured(knobs):
    """Activations by the profiler's count of a real forward pass, the rest by the tensors of a real step."""
    k = replace(K, **knobs)
    config = model_config(k, 1024, 1024)
    counted = needs(k, GPT, config, 1, 'float32', k.batch_size)
    model = GPT(config, seed=0)
    if k.activation_checkpointing:
        recompute(model)
    optimizer = make_optimizer(model, k, 'cpu')
    x = torch.zeros(k.batch_size, k.block_size, dtype=torch.int64)
    (_, loss), activations = allocated(lambda: model(x, x))
    loss.backward()
    optimizer.step()
    assert counted.activations == pytest.approx(activations, rel=0.02)
    weights = list(model.parameters())
    assert counted.weights == bytes_of(weights) == 4 * counted.params
    assert counted.gradients == bytes_of(p.grad for p in weights)
    states = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert counted.optimizer == bytes_of(states)


def test_muon_keeps_one_moment_of_its_matrices():
    k = replace(K, optimizer='muon', learning_rate=1e-2)
    model = GPT(CONFIG, seed=0)
    optimizer = make_optimizer(model, k, 'cpu')
    x = torch.zeros(1, 8, dtype=torch.int64)
    model(x, x)[1].backward()
    optimizer.step()
    states = [v for part in optimizer.optimizers for state in part.state.values() for v in state.values()]
    counted = needs(k, GPT, CONFIG, 1, 'float32', 1).optimizer
    assert counted == bytes_of(v for v in states if v.dim())


def test_ranks_that_share_a_model_out_have_a_part_of_it_each():
    alone = needs(K, GPT, CONFIG, 8, 'bfloat16', 1)
    shared = needs(replace(K, shard=True), GPT, CONFIG, 8, 'bfloat16', 1)
    for name in ('weights', 'gradients', 'optimizer'):
        assert getattr(shared, name) == pytest.approx(getattr(alone, name) / 8, rel=1e-3)
    block = 12 * 128**2 + 2 * 128
    root = 1024 * 128 + 128 * 128 + 128
    assert shared.gathered == 2 * 2 * (block + root) and alone.gathered == 0
    assert shared.activations < alone.activations  # autocast keeps a copy of the weights in bf16


@pytest.mark.parametrize(
    'spec', ['vanilla', 'reflex_all', 'layer0(4/2-2)', 'midpoint(layer=0)', 'leap', 'additive', 'gated_delta']
)
def test_blocks_that_are_computed_twice_give_the_same_gradients(spec):
    """Bit for bit, with dropout, also where later layers read what a block has published."""
    k = replace(K, n_embd=64, n_layer=3, block_size=32, attention=spec, dropout=0.1)
    config = model_config(k, 128, 128)
    x = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for twice in (False, True):
        model = GPT(config, seed=0)
        if twice:
            recompute(model)
        torch.manual_seed(1)
        loss = model(x, x)[1]
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
        with torch.no_grad():  # generation does not care
            assert torch.isfinite(model.eval().hidden(x[:, :4], model.new_cache(2))).all()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    kept = [
        needs(replace(k, activation_checkpointing=twice), GPT, config, 1, 'float32', 2).activations
        for twice in (False, True)
    ]
    assert kept[1] < 0.5 * kept[0]


def test_a_run_whose_blocks_are_computed_twice_is_the_same_run(tmp_path):
    data = tiny.write_tokens(tmp_path / 'data')
    few = {'max_iters': 4, 'eval_interval': 4}
    for name, twice in {'once': False, 'twice': True}.items():
        assert tiny.start(tmp_path / name, data, activation_checkpointing=twice, **few) == 0
    tiny.assert_same_run(tmp_path / 'once', tmp_path / 'twice')


@pytest.mark.parametrize(
    ('knobs', 'memory', 'fix'),
    [
        ({}, 10 * 2**20, r'share it out among ranks \(--shard=true on 3 or more\)'),
        ({'shard': True}, 8 * 2**20, 'start more ranks, or make the model smaller'),
        ({}, 20 * 2**20, 'smaller batch_size and more gradient_accumulation_steps, or --activation_check'),
        (
            {'batch_size': 1, 'block_size': 512},
            20 * 2**20,
            'give --activation_checkpointing=true, or a smaller',
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_fix(monkeypatch, knobs, memory, fix):
    monkeypatch.setattr(runs.memory, 'total_memory', lambda device: memory)
    k = replace(K, **knobs)
    with pytest.raises(ConfigError, match=f'parameters and .* tokens at a time take .*: .*{fix}'):
        refuse_what_cannot_fit(k, GPT, model_config(k, 1024, 1024), Ranks(), 'cuda:0', 'float32')


def test_ranks_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(runs.memory, 'total_memory', lambda device: GIB)
    k = replace(K, batch_size=64)
    for on_host, fits in ((1, True), (8, False)):
        group = Ranks(world=8, ddp=True, on_host=on_host)
        k = replace(k, gradient_accumulation_steps=8)
        if fits:
            refuse_what_cannot_fit(k, GPT, CONFIG, group, 'cpu', 'float32')
        else:
            with pytest.raises(ConfigError, match=r'on cpu, which has 0\.1 GiB'):
                refuse_what_cannot_fit(k, GPT, CONFIG, group, 'cpu', 'float32')
