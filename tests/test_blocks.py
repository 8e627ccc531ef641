"""Norms, MLPs, positions and qk_norm: against formulas written out, and in every combination."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import random_gpt
from layers.mlps import MLPS
from layers.norms import NORMS, RMSNorm
from layers.positions import POSITIONS, RotaryPosition
from model import GPT, GPTConfig

TINY = GPTConfig(
    block_size=16, vocab_size=40, n_layer=3, n_head=4, n_embd=32, attention='reflex', head_split='2-1-1'
)
COMBINATIONS = [
    {'norm': norm, 'mlp': mlp, 'position': position, 'qk_norm': qk_norm}
    for norm, mlp, position, qk_norm in product(NORMS, MLPS, POSITIONS, [False, True])
]


def name(blocks):
    return '-'.join(map(str, blocks.values()))


def make(**changes) -> GPT:
    return random_gpt(replace(TINY, **changes))


def tokens(B=2, T=12):
    return torch.randint(40, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('blocks', COMBINATIONS, ids=name)
def test_every_combination_is_causal_caches_and_trains(blocks):
    model = make(**blocks)
    idx = tokens()
    model.eval()
    with torch.no_grad():
        full, _ = model(idx)
        changed = idx.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 40
        other, _ = model(changed)
        assert torch.equal(full[:, :7], other[:, :7])
        assert all((full[:, t] != other[:, t]).any() for t in range(7, 12))
        cache = model.new_cache(2)  # a prompt of 5, a chunk of 3, then single tokens
        parts = [model.hidden(part, cache) for part in idx.split([5, 3, 1, 1, 1, 1], dim=1)]
        torch.testing.assert_close(model.lm_head(torch.cat(parts, dim=1)), full, rtol=1e-4, atol=1e-4)
        prompt = idx[:, :5]  # 30 tokens outgrow block_size=16: the window moves and positions start anew
        cached = model.generate(prompt, 30, temperature=0)
        assert torch.equal(cached, model.generate(prompt, 30, temperature=0, use_cache=False))
    model.train()
    _, loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still, f'no gradient reaches {still}'
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), 'cpu')
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        _, new = model(idx, idx.roll(-1, 1))
        new.backward()
    assert new < loss - 0.1


@pytest.mark.parametrize('blocks', COMBINATIONS, ids=name)
def test_flops_are_what_torch_counts(blocks):
    with torch.device('meta'):
        model = GPT(replace(TINY, bias=True, attention='reflex_all', **blocks), seed=0)
        idx = torch.zeros(2, 16, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            _, loss = model(idx, idx)
            forward = counter.get_total_flops()
            loss.backward()
    assert forward == 2 * 16 * model.flops_per_token(16, backward=False)
    assert counter.get_total_flops() == 2 * 16 * model.flops_per_token(16)


def test_defaults_are_gpt2_blocks_and_shared_tensors_start_alike():
    assert (TINY.norm, TINY.mlp, TINY.position, TINY.qk_norm) == ('layernorm', 'gelu', 'learned', False)
    default = GPT(TINY, seed=3).state_dict()
    assert 'transformer.h.0.mlp.c_fc.weight' in default and 'transformer.wpe.weight' in default
    for blocks in COMBINATIONS:
        other = GPT(replace(TINY, **blocks), seed=3).state_dict()
        for key in default.keys() & other.keys():
            if torch.is_tensor(default[key]) and default[key].shape == other[key].shape:
                assert torch.equal(default[key], other[key]), (key, blocks)


def test_rmsnorm_is_its_formula_in_every_type():
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)) * 7
    norm = RMSNorm(32)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    wanted = x.double() / (x.double() ** 2).mean(-1, keepdim=True).add(1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), wanted, rtol=1e-5, atol=1e-6)
    half = norm(x.bfloat16())  # a bf16 activation with fp32 weights, as qk_norm meets under autocast
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), wanted, rtol=2e-2, atol=2e-2)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_swiglu_is_its_formula_and_matches_parameters():
    mlp = make(mlp='swiglu', bias=True).transformer.h[0].mlp
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    gate = F.linear(x, mlp.c_gate.weight, mlp.c_gate.bias)
    up = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    wanted = F.linear(gate / (1 + (-gate).exp()) * up, mlp.c_proj.weight, mlp.c_proj.bias)
    torch.testing.assert_close(mlp(x), wanted, rtol=1e-5, atol=1e-5)
    for n_embd, difference in [(512, 0.016), (768, 0.0), (1536, 0.0), (2048, 0.004)]:  # 21, 32, 64, 85 x 64
        with torch.device('meta'):
            count = {
                mlp: sum(p.numel() for p in MLPS[mlp](replace(TINY, n_embd=n_embd)).parameters())
                for mlp in MLPS
            }
        assert abs(count['swiglu'] / count['gelu'] - 1) <= difference


def test_gelu_is_exact_and_gelu_tanh_is_gpt2s():
    x = torch.linspace(-4, 4, 101)
    exact, approximate = (make(mlp=mlp).transformer.h[0].mlp.gelu(x) for mlp in ('gelu', 'gelu_tanh'))
    torch.testing.assert_close(exact, x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    tanh = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    torch.testing.assert_close(approximate, x * 0.5 * (1 + tanh))


def complex_rotation(x, pos):
    """Rotary embedding as multiplication of complex numbers, in fp64: x (B, heads, T, hs), pos (T,)."""
    half = x.size(-1) // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    angle = pos[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def test_rotary_is_a_complex_rotation_and_sees_distance_only():
    q, k = torch.randn(2, 1, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    position = RotaryPosition(TINY)
    x = torch.zeros(1, 12, 32)
    pos = torch.arange(12)
    same, rotate = position(x, pos[None])
    assert same is x
    torch.testing.assert_close(rotate(q).double(), complex_rotation(q, pos), rtol=1e-5, atol=1e-5)
    _, later = position(x, pos[None] + 100)
    near, far = (r(q) @ r(k).transpose(-1, -2) for r in (rotate, later))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert rotate(q.bfloat16()).dtype == torch.bfloat16
    with torch.autocast('cpu', dtype=torch.bfloat16):  # angles stay fp32: bf16 would merge neighbours
        _, rotate = position(x, pos[None] + 1000)
    torch.testing.assert_close(rotate(q).double(), complex_rotation(q, pos + 1000), rtol=1e-3, atol=1e-3)
    assert not list(position.state_dict()) and not list(position.buffers())


@pytest.mark.parametrize('position', POSITIONS)
@pytest.mark.parametrize('qk_norm', [False, True])
def test_heads_read_normed_and_rotated_keys(position, qk_norm):
    """The attention of three lagged layers, head by head, with projections and products written out."""
    model = make(position=position, qk_norm=qk_norm, bias=True).eval()
    config, plan = model.config, model.config.head_plan()
    hs, pos = config.head_size, torch.arange(12)
    turn = (lambda x: complex_rotation(x, pos).float()) if position == 'rotary' else (lambda x: x)
    captured = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda _, args, y: captured.append((args[0], y)))
    model(tokens())
    keys, values = {}, {}
    for l, (block, (x, y)) in enumerate(zip(model.transformer.h, captured, strict=True)):
        attn = block.attn
        rows = attn.c_attn(x)  # (2, 12, heads * hs)
        q, k, v = rows.split([4 * hs, attn.n_key * hs, attn.n_value * hs], dim=-1)
        for i, h in enumerate(plan.keys[l]):
            keys[l, h] = turn(attn.k_norm(k[..., i * hs : (i + 1) * hs]))
        for i, h in enumerate(plan.values[l]):
            values[l, h] = v[..., i * hs : (i + 1) * hs]
        heads = []
        for h, read in enumerate(plan.heads[l]):
            query = turn(attn.q_norm(q[..., h * hs : (h + 1) * hs]))
            scores = query @ keys[read.key].transpose(-1, -2) / hs**0.5
            scores = scores.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf)
            heads.append(scores.softmax(-1) @ values[read.value])
        torch.testing.assert_close(y, attn.c_proj(torch.cat(heads, dim=-1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('position', ['rotary', 'none'])
def test_without_a_table_there_is_no_table(position):
    model = GPT(replace(TINY, position=position), seed=0)
    assert not [key for key in model.state_dict() if 'wpe' in key]
    assert model.num_params() == model.num_params(non_embedding=False)
    learned = GPT(TINY, seed=0)
    assert model.num_params() == learned.num_params()
    assert learned.num_params(non_embedding=False) - learned.num_params() == 16 * 32


@pytest.mark.parametrize(
    'changes', [{'norm': 'rmsnorm'}, {'mlp': 'gelu_tanh'}, {'position': 'none'}], ids=str
)
def test_weights_of_one_kind_do_not_load_into_another_of_the_same_shapes(changes):
    if 'position' in changes:
        source, target = replace(TINY, position='rotary'), replace(TINY, position='none')
    else:
        source, target = TINY, replace(TINY, **changes)
    with pytest.raises(ValueError, match='kind of block'):
        GPT(target, seed=0).load_state_dict(GPT(source, seed=0).state_dict())


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'norm': 'batchnorm'}, "norm='batchnorm' is unknown: one of layernorm, rmsnorm"),
        ({'mlp': 'relu'}, "mlp='relu' is unknown: one of gelu, gelu_tanh, relu2, swiglu"),
        ({'position': 'alibi'}, "position='alibi' is unknown: one of learned, rotary, none"),
        ({'position': 'rotary', 'n_embd': 36}, 'n_embd=36 / n_head=4 gives heads of 9: choose an even'),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_compiles_into_one_graph():
    """No graph break where positions are handed on (Dynamo alone: no compiler needed)."""
    model = make(norm='rmsnorm', mlp='swiglu', position='rotary', qk_norm=True)
    idx = tokens()
    _, wanted = model(idx, idx)
    _, loss = torch.compile(model, backend='eager', fullgraph=True)(idx, idx)
    torch.testing.assert_close(loss, wanted)
