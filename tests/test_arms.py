"""Arms that are more than a head plan, from their equations head by head; and the tables of new plans."""

import math

import pytest
import torch
from torch.nn import functional as F

from configurator import configure
from conftest import random_gpt
from layers.depth import attend_over_both, scores_of
from layers.heads import HeadPlanAttention, KVCache
from layers.tokens import TokenCache
from model import GPT, GPTConfig
from runs.knobs import Knobs, config_file, model_config
from test_model import SMALL, tokens


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


class Reference:
    """A forward pass with explicit masks and one head at a time. An arm overrides what it changes."""

    def __init__(self, model):
        self.model, self.t, config = model, model.transformer, model.config
        self.C, self.n_head, self.hs = config.n_embd, config.n_head, config.head_size

    def heads(self, x, weight, bias, first, count):
        """Heads first … first + count of a projection of x (B, T, C): (B, T, hs) each."""
        rows = [slice(h * self.hs, (h + 1) * self.hs) for h in range(first, first + count)]
        return [x @ weight[r].T + (0 if bias is None else bias[r]) for r in rows]

    def keys(self, l, x, idx):
        attn = self.t.h[l].attn
        return self.heads(x, attn.c_attn.weight, attn.c_attn.bias, self.n_head, self.n_head)

    def values(self, l, x, idx):
        attn = self.t.h[l].attn
        return self.heads(x, attn.c_attn.weight, attn.c_attn.bias, 2 * self.n_head, self.n_head)

    def read(self, l, h, y, v):
        """What head h takes of its weighted sum y of values v."""
        return y

    def attention(self, l, h, q, k, v):
        """q, k, v (B, T, hs) of head h -> (B, T, hs)"""
        causal = torch.ones(q.size(1), q.size(1), dtype=torch.bool).tril()
        scores = q @ k.transpose(1, 2) / math.sqrt(self.hs)  # (B, T, T)
        return scores.masked_fill(~causal, -math.inf).softmax(-1) @ v

    def logits(self, idx):
        t, (_, T) = self.t, idx.shape
        x = t.wte.weight[idx] + t.wpe.weight[:T]
        self.inputs = []
        for l, block in enumerate(t.h):
            normed = F.layer_norm(x, (self.C,), block.ln_1.weight, block.ln_1.bias)
            self.inputs.append(normed)
            attn = block.attn
            q = self.heads(normed, attn.c_attn.weight, attn.c_attn.bias, 0, self.n_head)
            k, v = self.keys(l, normed, idx), self.values(l, normed, idx)
            out = []
            for h in range(self.n_head):
                out.append(self.read(l, h, self.attention(l, h, q[h], k[h], v[h]), v[h]))
            x = (
                x
                + torch.cat(out, dim=2) @ attn.c_proj.weight.T
                + (attn.c_proj.bias if attn.c_proj.bias is not None else 0)
            )
            x = x + block.mlp(block.ln_2(x))
        return t.ln_f(x) @ self.model.lm_head.weight.T


class Bank(Reference):
    def values(self, l, x, idx):
        if l < 4:
            return super().values(l, x, idx)
        rows = self.t.h[l].attn.bank.weight[idx] * math.sqrt(self.C)  # (B, T, n_head * hs)
        return list(rows.split(self.hs, dim=2))


class EmbeddingValues(Reference):
    def values(self, l, x, idx):
        if l == 0:
            return super().values(l, x, idx)
        attn = self.t.h[l].attn
        own = self.heads(x, attn.c_attn.weight, attn.c_attn.bias, 2 * self.n_head, self.n_head - 3)
        embedded = rms(self.t.wte.weight[idx])
        return own + self.heads(embedded, attn.c_embed.weight, attn.c_embed.bias, 0, 3)


class Midpoint(Reference):
    def keys(self, l, x, idx):
        return super().keys(l, self.inputs[1] if l > 1 else x, idx)

    def values(self, l, x, idx):
        return super().values(l, self.inputs[1] if l > 1 else x, idx)


class Exclusive(Reference):
    def read(self, l, h, y, v):
        along = (y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True)
        return y - along * v


class Depth(Reference):
    """Sources are layers 0, 2, 4 below a layer; what they have mixed, not what they project."""

    def keys(self, l, x, idx):
        self.made = {} if l == 0 else self.made
        self.q = self.heads(x, *self.weights(l), 0, self.n_head)
        self.made[l] = super().keys(l, x, idx), None
        return self.made[l][0]

    def weights(self, l):
        return self.t.h[l].attn.c_attn.weight, self.t.h[l].attn.c_attn.bias

    def values(self, l, x, idx):
        keys, own = self.made[l][0], super().values(l, x, idx)
        self.made[l] = keys, own
        from_layers, mixed = [*range(0, l, 2), l], []
        for h in range(self.n_head):
            asked = [(self.q[h] * self.made[j][0][h]).sum(-1) / math.sqrt(self.hs) for j in from_layers]
            shares = torch.stack(asked).softmax(0)  # (sources, B, T)
            parts = zip(shares, from_layers, strict=True)
            mixed.append(sum(share[..., None] * self.made[j][1][h] for share, j in parts))
        self.made[l] = keys, mixed
        return mixed


class Moda(Reference):
    """One softmax over T tokens and the layers below, a token at a time."""

    def logits(self, idx):
        self.below = []
        return super().logits(idx)

    def attention(self, l, h, q, k, v):
        T, hs = q.shape[1:]
        if h == 0:
            self.below.append(([], []))
        out = []
        for t in range(T):
            depth_k = [keys[h][:, t] for keys, _ in self.below[:-1]]
            depth_v = [values[h][:, t] for _, values in self.below[:-1]]
            keys = torch.cat([k[:, : t + 1], *[d[:, None] for d in depth_k]], dim=1)  # (B, t + 1 + l, hs)
            values = torch.cat([v[:, : t + 1], *[d[:, None] for d in depth_v]], dim=1)
            weights = (keys @ q[:, t, :, None] / math.sqrt(hs)).softmax(1)  # (B, t + 1 + l, 1)
            out.append((weights * values).sum(1))
        self.below[-1][0].append(k)
        self.below[-1][1].append(v)
        return torch.stack(out, dim=1)


class Gain(Reference):
    """Layer 0's values in the last four heads of layers 1, 2, …, each times its gain."""

    def values(self, l, x, idx):
        if l == 0:
            self.first = super().values(l, x, idx)
            return self.first
        attn = self.t.h[l].attn
        return self.heads(x, attn.c_attn.weight, attn.c_attn.bias, 2 * self.n_head, 4) + self.first[4:]

    def read(self, l, h, y, v):
        if l == 0 or h < 4:
            return y
        gain = self.t.h[l].attn.gain
        return y * gain[h - 4 if len(gain) > 1 else 0]


ARMS = {
    'vanilla*4 bank*2': Bank,
    'vanilla embedding_values(3)*5': EmbeddingValues,
    'midpoint(1)': Midpoint,
    'exclusive': Exclusive,
    'depth_attention(2)': Depth,
    'moda': Moda,
    'layer0(8/4-4, gain=head)': Gain,
    'layer0(8/4-4, gain=layer)': Gain,
}


@pytest.mark.parametrize('bias', [False, True], ids=['', 'bias'])
@pytest.mark.parametrize('attention', ARMS)
def test_outputs_and_gradients_are_those_of_the_equation(attention, bias):
    model = random_gpt(GPTConfig(**SMALL, attention=attention, bias=bias)).double()
    idx, targets = tokens(), tokens(1)
    wanted = ARMS[attention](model).logits(idx)
    F.cross_entropy(wanted.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = model(idx)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    F.cross_entropy(found.flatten(0, 1), targets.flatten()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize('bias', [False, True], ids=['', 'bias'])
def test_values_of_embeddings_are_not_kept_where_nobody_else_reads_them(bias):
    """In generation the heads' weights meet the embeddings: ids are kept alone, and logits stay."""
    model = random_gpt(
        GPTConfig(**SMALL, attention='vanilla embedding_values(8) embedding_values(3)*4', bias=bias)
    )
    model, idx = model.double(), tokens()
    cache = model.new_cache(2)
    with torch.no_grad():
        parts = [model.hidden(part, cache) for part in idx.split([5, 1, 1, 9], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(idx), rtol=1e-9, atol=1e-9)
    assert [type(state) for state in cache.layers] == [KVCache] + [TokenCache] * 5
    assert [state.v.size(1) for state in cache.layers] == [8, 0, 5, 5, 5, 5]
    per_head = 4 * 2  # head size, bytes of bf16
    heads = [block.attn.cache_bytes_per_token(2) for block in model.transformer.h]
    assert heads == [16 * per_head, 8 * per_head + 4, *[13 * per_head + 4] * 4]
    # half of the heads: SkipV1Former's cache, and an id
    size = {n: GPT(GPTConfig(**SMALL, attention=n), seed=0).cache_bytes_per_token() for n in (EMBEDDED, SKIP)}
    assert size[EMBEDDED] == size[SKIP] + 5 * 4
    # a layer above reads the heads: they are kept
    read = random_gpt(GPTConfig(**SMALL, attention='embedding_values*3 reflex(4-2-2)*3'))
    assert [type(state) for state in read.new_cache(1).layers[:3]] == [TokenCache, KVCache, KVCache]


@pytest.mark.parametrize('above', ['lime', 'learned_split', 'value_residual', 'depth_attention', 'moda'])
def test_values_of_embeddings_are_kept_where_a_layer_above_mixes_them(above):
    model = random_gpt(GPTConfig(**SMALL, attention=f'embedding_values*2 {above}*4')).double()
    idx, cache = tokens(), model.new_cache(2)
    with torch.no_grad():
        parts = [model.hidden(part, cache) for part in idx.split([5, 1, 1, 9], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(idx), rtol=1e-9, atol=1e-9)


def test_one_softmax_over_both_stays_exact_in_bf16():
    """Though what depth weighs, e^60 and more, has passed through the kernel as a query's number."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, *deep = (torch.randn(2, 4, 32, 80, generator=generator).bfloat16() for _ in range(7))
    keys, values = [k, deep[0]], deep[2:]  # what a token finds at itself, it finds below as well
    q = q * 20
    model = GPT(GPTConfig(**{**SMALL, 'n_embd': 640}, attention='moda'), seed=0)
    attn = model.transformer.h[2].attn
    scores = scores_of(q, keys)
    assert scores.abs().max() > 60
    found = attn.attend_at_once(q, k, v, None, 0.0, scores, values)
    exact = [[t.double() for t in given] for given in ((q, k, v), keys, values)]
    wanted = attend_over_both(*exact[0], None, 0.0, scores_of(exact[0][0], exact[1]), exact[2])[0]
    error = (found.double() - wanted).abs().max()
    assert error < 2 * torch.finfo(torch.bfloat16).eps * max(t.abs().max() for t in [v, *values])


EMBEDDED, SKIP = 'vanilla embedding_values(4)*5', 'layer0(8/4-4)'
PLANS = {  # config -> of each layer, whose keys and whose values its eight heads read
    'ramp_up': [('l' * 8, '0' * n + 'l' * (8 - n)) for n in (0, 2, 3, 4, 5, 6)],
    'ramp_steep': [('l' * 8, '0' * n + 'l' * (8 - n)) for n in (0, 0, 2, 4, 6, 8)],
    'ramp_down': [('l' * 8, '0' * n + 'l' * (8 - n)) for n in (0, 6, 5, 4, 3, 2)],
    'svformer': [('l' * 8, '0' * 8)] * 6,
    'skip_v1_last': [('l' * 8, 'l' * 8)] * 4 + [('l' * 8, '0' * 4 + 'l' * 4)] * 2,
    'shared_above': [('l' * 8, 'l' * 8)] * 3 + [('2' * 8, '2' * 8)] * 3,
    'fused_lite': [('l' * 8, 'l' * 8)] * 3 + [('2' * 8, '0' * 8)] * 3,
}


@pytest.mark.parametrize('name', PLANS)
def test_the_table_of_a_plan(name, root):
    knobs = configure(Knobs, [str(root / config_file(name))]).knobs
    plan = model_config(knobs, 64, 64).head_plan()
    for l, (row, wanted) in enumerate(zip(plan.heads, PLANS[name], strict=True)):
        for what, sources in zip(('key', 'value'), wanted, strict=True):
            found = sorted(getattr(head, what)[0] for head in row)
            assert found == sorted(l if s == 'l' else int(s) for s in sources), (l, what)
            assert [getattr(head, what)[1] for head in row] == list(range(8))
    if name.startswith('ramp'):  # at one cache
        model = GPT(model_config(knobs, 64, 64), seed=0)
        skip = configure(Knobs, [str(root / 'config/skip_v1.py')]).knobs
        assert (
            model.cache_bytes_per_token() == GPT(model_config(skip, 64, 64), seed=0).cache_bytes_per_token()
        )


def test_grouped_queries_share_the_first_head_of_their_group():
    plan = GPTConfig(**SMALL, attention='grouped(2)').head_plan()
    assert [[head.key for head in row] for row in plan.heads] == [
        [(l, 0)] * 4 + [(l, 4)] * 4 for l in range(6)
    ]
    assert all(head.key == head.value for row in plan.heads for head in row)


def test_the_first_layer_is_no_plain_one_unless_it_has_nothing_to_mix_with():
    """All heads of all layers, the first one too, where an arm needs no earlier layer."""
    for attention, plain in {
        'exclusive': 0,
        'embedding_values': 0,
        'bank': 0,
        'lime': 1,
        'value_residual': 1,
    }.items():
        model = GPT(GPTConfig(**SMALL, attention=attention), seed=0)
        assert [type(block.attn) for block in model.transformer.h].count(HeadPlanAttention) == plain, (
            attention
        )
    with pytest.raises(
        ValueError, match=r'midpoint\(layer=4\): none of its layers is above it; the last one is 1'
    ):
        GPT(GPTConfig(**SMALL, attention='midpoint(4)*2 vanilla*4'))
