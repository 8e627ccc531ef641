"""The hierarchical transformer against a reference of single positions; causality, cache, FLOPs, runs."""

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hierarchy
from configurator import ConfigError, configure
from conftest import random_gpt
from hierarchy import Block, Hierarchy, HierarchyConfig
from runs import checkpoint
from runs.knobs import Knobs, check, model_config
from runs.models import MODELS, load_model
from tiny import assert_same_run, resume, start, write_tokens

SMALL = {
    'block_size': 24,
    'groups': 3,
    'latents': '4-2',
    'widths': '8-8-16',
    'n_embd': 16,
    'n_layer': 2,
    'n_head': 4,
    'vocab_size': 64,
}
LEVELS = {
    1: {'latents': '3', 'widths': '8-16'},
    2: {},
    3: {'latents': '6-3-1', 'widths': '8-8-16-16'},
    4: {'latents': '7-4-3-1', 'widths': '4-8-8-16-16'},
}
OPTIONS = {
    'plain': {},
    'transformer': {'compression': 'transformer'},
    'attention': {'upsample': 'attention'},
    'interpolate': {'skip': 'interpolate', 'compression': 'transformer', 'upsample': 'attention'},
    'serial': {'block_order': 'serial', 'local_blocks': '2', 'global_blocks': '2-1-2'},
    'dense': {'dense': True, 'n_layer': 3},
    'channels': {'channels': 4},
    'channels shared': {'channels': 2, 'channel_shared_kv': True, 'channel_shared_mlps': 2, 'bias': True},
    'channels max': {'channels': 4, 'channel_merge': 'max', 'channel_mlp': 2.0},
    'channels mean': {'channels': 2, 'channel_merge': 'mean', 'channel_every': 2, 'n_layer': 4},
    'reflex': {'attention': 'reflex', 'head_split': '2-1-1', 'n_layer': 4},
    'reflex and channels': {'attention': 'reflex', 'head_split': '2-2', 'n_layer': 4}
    | {'channels': 2, 'channel_every': 2},
    'reflex_all': {'attention': 'reflex_all', 'n_layer': 3, 'dense': True},
    'leap': {'attention': 'leap reflex*2', 'head_split': '2-2', 'n_layer': 3},
    'rotary': {'position': 'rotary', 'upsample': 'attention', 'qk_norm': True, 'widths': '8-16-16'},
    'no position': {'position': 'none', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': True},
    'one group': {'groups': 1, 'latents': '10-3'},
    'groups of 2': {'groups': 12, 'latents': '1', 'widths': '8-16'},
    'no blocks': {'local_blocks': '0', 'global_blocks': '0-1-0'},
}
GRID = dict(OPTIONS)
for _values in itertools.product(hierarchy.COMPRESSIONS, ('repeat', 'attention'), ('sum', 'interpolate')):
    for _n, _level in LEVELS.items():
        _names = dict(zip(('compression', 'upsample', 'skip'), _values, strict=True))
        GRID[f'{_n} {" ".join(_values)}'] = {**_names, **_level}


def make(seed=1, std=0.3, **changes):
    """A model in float64 whose attention is far from uniform."""
    return random_gpt(HierarchyConfig(**{**SMALL, **changes}), seed, std).double()


def tokens(seed=0, B=2, T=24):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# The reference: a stream is {(group, position in its length): vector (B, C)}; who sees whom is written down
# from the specification, and every softmax is over a list.


def ask(q, keys, values, n_head):
    """One query (B, C) over lists of keys and values (B, C)."""
    hs = q.size(1) // n_head
    heads = []
    for h in range(n_head):
        cut = slice(h * hs, (h + 1) * hs)
        scores = torch.stack([(q[:, cut] * k[:, cut]).sum(1) / math.sqrt(hs) for k in keys])  # (S, B)
        heads.append((scores.softmax(0)[..., None] * torch.stack([v[:, cut] for v in values])).sum(0))
    return torch.cat(heads, dim=1)


def everywhere(there, here):
    return there <= here


def in_the_group(there, here):
    return there[0] == here[0] and there[1] <= here[1]


def plain_block(block, x, sees, n_head):
    weights = block.attn.c_attn.weight.chunk(3)
    q, k, v = ({at: block.ln_1(a) @ w.T for at, a in x.items()} for w in weights)
    out = {}
    for here in x:
        seen = [there for there in x if sees(there, here)]
        y = ask(q[here], [k[there] for there in seen], [v[there] for there in seen], n_head)
        y = x[here] + y @ block.attn.c_proj.weight.T
        out[here] = y + block.mlp(block.ln_2(y))
    return out


def stage(module, x, n_head, serial):
    blocks = [(j, 0, b, in_the_group) for j, b in enumerate(module.local_h)]
    blocks += [(j, 1, b, everywhere) for j, b in enumerate(module.global_h)]
    for *_, block, sees in blocks if serial else sorted(blocks, key=lambda b: b[:2]):
        x = plain_block(block, x, sees, n_head)
    return x


def cross(attn, queries, source, tokens_seen, n_head):
    """queries {at: (B, d_in)}, source {at: (B, d_in)}, tokens_seen(at): where in source; -> {at: (B, C)}"""
    wk, wv = attn.c_kv.weight.chunk(2)
    out = {}
    for at, x in queries.items():
        seen = [source[there] for there in tokens_seen(at)]
        y = ask(x @ attn.c_q.weight.T, [s @ wk.T for s in seen], [s @ wv.T for s in seen], n_head)
        out[at] = y @ attn.c_proj.weight.T
    return out


def channel_block(block, x, merge, shared_kv, n_head):
    s, C = block.channels, next(iter(x.values())).size(1)
    rows = block.attn.c_attn.weight.split(C)  # C rows are one channel's queries, keys or values
    out = {at: [] for at in x}
    for c in range(s):
        wq, wk, wv = rows[c], rows[s if shared_kv else s + c], rows[s + 1 if shared_kv else 2 * s + c]
        q, k, v = ({at: block.ln_1(a) @ w.T for at, a in x.items()} for w in (wq, wk, wv))
        c_proj, c_fc, c_mlp = (
            m.weight.chunk(s)[c] for m in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        )
        for here in x:
            seen = [there for there in x if there <= here]
            y = ask(q[here], [k[there] for there in seen], [v[there] for there in seen], n_head)
            y = x[here] + y @ c_proj.T
            normed = block.ln_2(y)
            z = y + F.gelu(normed @ c_fc.T) @ c_mlp.T
            out[here].append(z if block.shared_mlp is None else z + block.shared_mlp(normed))
    if merge == 'max':
        return {at: torch.stack(y).max(dim=0).values for at, y in out.items()}
    shares = [
        [torch.full_like(a, 1 / s) for a in y] if merge == 'mean' else torch.stack(y).softmax(0)
        for y in out.values()
    ]
    return {
        at: sum(w * a for w, a in zip(of, y, strict=True))
        for of, (at, y) in zip(shares, out.items(), strict=True)
    }


def reference(model, idx):
    """Token ids (B, T), any T -> (what the head reads (B, T, d_0), latents before the stack, after it)"""
    c, t = model.config, model.transformer
    serial, n_head, K = c.block_order == 'serial', c.n_head, c.lengths

    def embed(x, r):
        return {(g, j): a + t.wpe[r].weight[g * K[r] + j] for (g, j), a in x.items()}

    x = embed({divmod(p, K[0]): t.wte.weight[idx[:, p]] for p in range(idx.size(1))}, 0)
    skips = []
    for i, encoder in enumerate(t.encoder.values(), 1):
        skips.append(x)
        cut, compress = K[i - 1] - K[i], encoder.compress
        if c.compression == 'transformer':
            for block in compress.h:
                x = plain_block(block, x, in_the_group, n_head)
            x = {(g, j - cut): a @ compress.widen.weight.T for (g, j), a in x.items() if j >= cut}
        else:
            normed = {at: compress.ln_1(a) for at, a in x.items()}
            queries = {(g, j - cut): a for (g, j), a in normed.items() if j >= cut}

            def up_to_itself(at, cut=cut):
                return [(at[0], j) for j in range(at[1] + cut + 1)]

            y = cross(compress.attn, queries, normed, up_to_itself, n_head)
            y = {(g, j): a + x[g, j + cut] @ compress.widen.weight.T for (g, j), a in y.items()}
            x = {at: a + compress.mlp(compress.ln_2(a)) for at, a in y.items()}
        x = stage(encoder.stage, embed(x, i), n_head, serial)
    latents, outputs = x, [x]
    for b, block in enumerate(t.h):
        if isinstance(block, hierarchy.ChannelBlock):
            x = channel_block(block, x, c.channel_merge, c.channel_shared_kv, n_head)
        else:
            x = plain_block(block, x, everywhere, n_head)
        outputs.append(x)
        if c.dense:
            x = {at: sum(w * o[at] for w, o in zip(t.dense[b], outputs, strict=True)) for at in x}
    thought = x
    for i, decoder in reversed([*enumerate(t.decoder.values(), 1)]):
        skip, cut, repeats = skips[i - 1], K[i - 1] - K[i], -(-(K[i - 1] - K[i]) // K[i])
        own = {at: a @ decoder.c_narrow.weight.T for at, a in x.items()}

        def brought(g, j, own=own, cut=cut, repeats=repeats, decoder=decoder, i=i):
            if j >= cut:
                return own[g, j - cut]
            nearest_last = [k for k in range(K[i]) for _ in range(repeats)][-cut:]
            if g == 0:
                return decoder.first.weight[nearest_last[j]].expand(idx.size(0), -1)
            return own[g - 1, nearest_last[j]]

        x = embed({at: brought(*at) for at in skip}, i - 1)
        if c.upsample == 'attention':
            queries = {at: decoder.ln_q(skip[at] + a) for at, a in x.items()}
            source = {at: decoder.ln_kv(a) for at, a in x.items()}
            y = cross(
                decoder.attn, queries, source, lambda at: [(at[0], j) for j in range(at[1] + 1)], n_head
            )
            x = {at: a + y[at] for at, a in x.items()}
        x = {at: a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt() for at, a in x.items()}
        x = {at: a * decoder.ln_up.weight for at, a in x.items()}
        if c.skip == 'interpolate':
            share = torch.sigmoid(decoder.share)
            x = {at: share * a + (1 - share) * skip[at] for at, a in x.items()}
        else:
            x = {at: a + skip[at] for at, a in x.items()}
        x = stage(decoder.stage, x, n_head, serial)
    hidden = torch.stack([t.ln_f(a) for a in x.values()], dim=1)
    return hidden, [*latents.values()], [*thought.values()]


MAIN = ('plain', 'transformer', 'attention', 'interpolate', 'serial', 'dense', 'channels', 'channels shared')
REFERENCED = [*MAIN, 'channels max', 'channels mean', 'one group', 'groups of 2', 'no blocks']
REFERENCED += ['4 perceiver attention interpolate', '3 transformer repeat sum']


@pytest.mark.parametrize('option', REFERENCED)
def test_outputs_and_gradients_equal_the_reference_of_single_positions(option):
    changes = {**GRID[option], 'bias': False}  # which the reference has not
    model = make(
        **{'block_size': 12 if 'latents' not in changes else 24, **{'latents': '2-1', 'n_head': 2}, **changes}
    )
    T = model.config.block_size
    idx, targets = tokens(T=T), tokens(1, T=T)
    hidden, _, _ = reference(model, idx)
    loss = F.cross_entropy((hidden @ model.lm_head.weight.T).flatten(0, 1), targets.flatten())
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.testing.assert_close(model.hidden(idx), hidden, rtol=1e-9, atol=1e-9)
    _, found = model(idx, targets)
    torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-9)
    found.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, wanted[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f'{n}: {m}'
        )


@pytest.mark.parametrize('position', ['learned', 'rotary', 'none'])
@pytest.mark.parametrize('changes', [{'skip': 'sum'}, {'skip': 'interpolate'}, {'channels': 2}], ids=str)
def test_the_stream_is_not_rounded_by_autocast(position, changes):
    model = make(position=position, **changes).float()
    types = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda module, inputs, y: types.append(y.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        model(tokens(T=model.config.block_size))
    assert len(types) > 4 and set(types) == {torch.float32}


@pytest.mark.parametrize('T', [1, 3, 5, 7, 10])
def test_a_text_that_ends_within_a_group_equals_the_reference(T):
    """Positions and latents that are not there yet are not in the reference at all."""
    model = make(block_size=12, latents='2-1', upsample='attention')
    torch.testing.assert_close(
        model.hidden(tokens(T=T)), reference(model, tokens(T=T))[0], rtol=1e-9, atol=1e-9
    )


def test_the_latent_stack_is_the_gpts():
    """Its blocks compute what a GPT of the same plan makes of the same latents."""
    from layers.contract import Memory
    from model import GPT

    model = make(**OPTIONS['reflex'])
    piece = hierarchy.Piece(model.config, 0, 24, 'cpu', None)
    _, latents, thought = model.run(model.transformer.wte(tokens()), piece)
    gpt = GPT(model.config.stack(), seed=0).double()
    gpt.transformer.h.load_state_dict(model.transformer.h.state_dict())
    memory = Memory()
    for block in gpt.transformer.h:
        latents = block(latents, memory)
    assert torch.equal(latents, thought)
    assert [b.attn.describe() for b in gpt.transformer.h] == [b.attn.describe() for b in model.transformer.h]


def test_the_latent_loss_is_that_of_the_reference():
    model = make(latent_loss=0.5, block_size=12, latents='2-1')
    idx, targets = tokens(T=12), tokens(1, T=12)
    hidden, latents, thought = reference(model, idx)
    plain = F.cross_entropy((hidden @ model.lm_head.weight.T).flatten(0, 1), targets.flatten())
    cosines = []
    for here, after in zip(thought, latents[1:], strict=False):
        a, b = here @ model.transformer.predict.weight.T, after
        cosines.append((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1))
    latent = 1 - torch.cat(cosines).mean()
    for progress, share in ((0.0, 0.0), (0.05, 0.25), (0.2, 1.0), (0.9, 1.0)):
        _, loss = model(idx, targets, torch.tensor(progress))
        torch.testing.assert_close(loss, plain + 0.5 * share * latent, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(idx, targets)[1], model(idx, targets)[1])
    torch.testing.assert_close(model(idx, targets)[1], plain)
    # the latents to be predicted are held fixed: they must not move to where they are predicted easily
    (_, loss), (_, tokens_only) = model(idx, targets, torch.tensor(1.0)), model(idx, targets)
    fixed = []
    for here, after in zip(thought, latents[1:], strict=False):
        fixed.append(F.cosine_similarity(here @ model.transformer.predict.weight.T, after.detach(), dim=1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(0.5 * (1 - torch.cat(fixed).mean()), parameters, allow_unused=True)
    found = torch.autograd.grad(loss - tokens_only, parameters, allow_unused=True)
    for name, a, b in zip(names, found, wanted, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f'{n}: {m}')
    with pytest.raises(ValueError, match='no whole groups of 4'):
        model(idx[:, :7], targets[:, :7], torch.tensor(1.0))


# -----------------------------------------------------------------------------
# Causality, cache, FLOPs over the grid


def test_the_grid_is_large_enough():
    assert len({json.dumps(changes, sort_keys=True) for changes in GRID.values()}) >= 40


@pytest.mark.parametrize('option', GRID)
def test_a_token_changes_nothing_before_it(option):
    """And everything from itself on."""
    model = make(**GRID[option])
    idx = tokens(B=1).expand(25, -1).clone()
    each = torch.arange(24)
    idx[each, each] = (idx[each, each] + 1) % 64  # row t: token t is another one; row 24: none is
    with torch.no_grad():
        hidden = model.hidden(idx)
    change = (hidden[:24] - hidden[24]).abs().amax(-1)  # (changed token, position)
    assert change.tril(-1).max() < 1e-12
    if option != 'no blocks':  # where tokens of other groups have no blocks to meet in
        assert change[each[:, None] <= each].min() > 1e-9, 'masked too much'


@pytest.mark.parametrize('option', GRID)
def test_gradients_reach_no_later_token(option):
    model = make(**GRID[option])
    embedded = []
    hook = model.transformer.wte.register_forward_hook(lambda m, args, out: embedded.append(out))
    hidden = model.hidden(tokens(B=1).expand(24, -1))  # row t is asked for position t
    hook.remove()
    each = torch.arange(24)
    (grad,) = torch.autograd.grad(hidden[each, each].square().sum(), embedded)
    grad = grad.abs().amax(-1)  # (asked position, token)
    assert grad.triu(1).max() == 0
    if option != 'no blocks':
        assert grad[each[:, None] >= each].min() > 0, 'masked too much'


@pytest.mark.parametrize('option', GRID)
def test_logits_of_a_cached_pass_equal_the_full_pass(option):
    """In calls that begin and end anywhere in groups, and with rows chosen in between (beam search)."""
    model = make(**GRID[option])
    idx = tokens(B=3)
    with torch.no_grad():
        wanted = model.hidden(idx)
        for cuts in ((5, 1, 10, 8), (16, 1, 1, 6)):
            cache, at, rows = model.new_cache(3), 0, torch.arange(3)
            for n in cuts:
                found = model.hidden(idx[rows, at : at + n], cache)
                torch.testing.assert_close(found, wanted[rows, at : at + n], rtol=1e-9, atol=1e-9)
                at, rows = at + n, rows[[2, 0, 1]]
                cache.select(torch.tensor([2, 0, 1]))
            assert cache.length == 24


@pytest.mark.parametrize('option', OPTIONS)
def test_generation_with_cache_equals_without(option):
    """Beyond block_size too, for prompts of any length, one of them longer than that."""
    model = make(**OPTIONS[option])
    for prompt, n in ((tokens(B=2, T=1), 9), (tokens(B=1, T=17), 12), (tokens(B=1, T=29), 9)):
        cached = model.generate(prompt, n, temperature=0)
        assert torch.equal(cached, model.generate(prompt, n, temperature=0, use_cache=False))
        assert torch.equal(cached, model.generate(prompt, n, temperature=0, lookup=8))
        assert torch.equal(cached[:, : prompt.size(1)], prompt)


def test_a_text_means_the_same_whatever_comes_after_it():
    model = make()
    whole = model.hidden(tokens())
    for T in (1, 7, 8, 9, 23):
        torch.testing.assert_close(model.hidden(tokens()[:, :T]), whole[:, :T], rtol=1e-12, atol=1e-12)


def test_only_the_group_at_hand_is_kept_by_token():
    """What is kept beside the latents of finished groups does not grow with them."""
    model = make()
    cache = model.new_cache(1)
    model.hidden(tokens(B=1, T=16), cache)
    assert not cache.of_group
    model.hidden(tokens(B=1, T=1), cache)
    assert cache.of_group and cache.latents
    assert {latents.size(1) for latents in cache.latents.values()} <= {2, 4}


COUNTED = ('transformer', 'channels', 'channels shared', 'reflex and channels', 'leap')


@pytest.mark.parametrize('option', [*COUNTED, '1 perceiver attention sum', '3 perceiver repeat interpolate'])
def test_flops_are_those_that_torch_counts(option):
    with torch.device('meta'):
        model = Hierarchy(HierarchyConfig(**{**SMALL, 'latent_loss': 0.1, **GRID[option]}), seed=0)
        idx, progress = torch.zeros(3, 24, dtype=torch.long), torch.ones(())
    with FlopCounterMode(display=False) as counter:
        model(idx[:, :13])
    assert counter.get_total_flops() == pytest.approx(3 * 13 * model.flops_per_token(13, backward=False))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx, progress)[1].backward()
    assert counter.get_total_flops() == 3 * 24 * model.flops_per_token()


def test_parts_add_up():
    model = make(dense=True, latent_loss=0.1, upsample='attention', skip='interpolate')
    assert sum(model.parts().values()) == model.num_params(non_embedding=False)
    tables = 3 * (8 * 8 + 4 * 8 + 2 * 16)
    assert model.num_params() == model.num_params(non_embedding=False) - tables
    assert sum(model.flops_by_part().values()) == model.flops_per_token()
    assert 'down 2' in model.parts() and 'up 1' in model.flops_by_part()


def test_generation_state_is_counted():
    """Of all keys and values that a cache holds at most: by token, and what stays the same."""
    model = make(upsample='attention', local_blocks='2-1-1')
    cache = model.new_cache(1)
    model.hidden(tokens(B=1, T=23), cache)  # the last group is one token short

    def elements(states):
        return sum(state.k.numel() + state.v.numel() for state in states.values())

    assert 24 * model.cache_bytes_per_token(itemsize=1) == elements(cache.of_all)
    latents = 2 * (4 * 8 + 2 * 8)  # two groups' worth for each decoder
    assert model.state_bytes(itemsize=1) == elements(cache.of_group) + latents


# -----------------------------------------------------------------------------
# Initial values, refusals, weights


def test_models_share_the_initial_values_of_what_they_share():
    plain = dict(Hierarchy(HierarchyConfig(**SMALL), seed=7).named_parameters())
    for option in ('transformer', 'interpolate', 'attention', 'dense', 'serial', 'channels'):
        changes = {**OPTIONS[option], 'n_layer': 2}
        other = dict(Hierarchy(HierarchyConfig(**{**SMALL, **changes}), seed=7).named_parameters())
        shared = [name for name, p in plain.items() if name in other and other[name].shape == p.shape]
        assert len(shared) > 20
        assert all(torch.equal(plain[name], other[name]) for name in shared)
    again = dict(Hierarchy(HierarchyConfig(**SMALL), seed=8).named_parameters())
    assert not torch.equal(again['transformer.wte.weight'], plain['transformer.wte.weight'])


def test_densely_averaged_blocks_begin_as_the_plain_chain():
    plain, dense = (Hierarchy(HierarchyConfig(**SMALL, dense=dense), seed=1) for dense in (False, True))
    torch.testing.assert_close(plain(tokens())[0], dense(tokens())[0])


def test_weights_of_another_hierarchy_do_not_load():
    state = make().state_dict()
    for changes in ({'block_order': 'serial'}, {'groups': 6, 'block_size': 48}, {'upsample': 'attention'}):
        with pytest.raises((ValueError, RuntimeError)):
            make(**changes).load_state_dict(state)
    with pytest.raises(ValueError, match='group_size'):  # no tensor has that size
        make(position='rotary', block_size=48).load_state_dict(make(position='rotary').state_dict())
    make(seed=2).load_state_dict(state)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'block_size': 25}, ['block_size=25', 'groups=3']),
        ({'groups': 0}, ['groups=0']),
        ({'latents': '8-2'}, ["'8-2'", '8, then 8, then 2', 'block_size=24']),
        ({'latents': '4-4'}, ["'4-4'", '8, then 4, then 4']),
        ({'latents': '4-0'}, ["latents='4-0'"]),
        ({'latents': 'two'}, ["latents='two'"]),
        ({'widths': '8-16'}, ["'8-16'", "'4-2'", '3 widths']),
        ({'widths': '8-10-16'}, ["'8-10-16'", '10', 'n_head=4']),
        ({'widths': '16-8-16'}, ["'16-8-16'", 'shrink']),
        ({'widths': '8-8-32'}, ["'8-8-32'", 'n_embd=16']),
        ({'local_blocks': '1-2'}, ["local_blocks='1-2'", '2 lengths', '3']),
        ({'global_blocks': '-1'}, ["global_blocks='-1'"]),
        ({'compression': 'perciever'}, ["'perciever'", 'transformer']),
        ({'upsample': 'linear'}, ["'linear'", 'repeat']),
        ({'channels': 3}, ['channels=3', 'n_embd=16', '21.3333']),
        ({'channels': 2, 'channel_every': 3}, ['channel_every=3', 'n_layer=2']),
        ({'channels': 2, 'attention': 'reflex(2-2)'}, ["'reflex(2-2)'", 'n_layer=2', 'channels=2']),
        ({'attention': 'reflex_all', 'n_layer': 5}, ['n_layer=5', 'n_head=4']),
        ({'attention': 'reflex', 'head_split': '8-8'}, ["'8-8'", 'n_head=4']),
        ({'position': 'rotary', 'widths': '4-8-16'}, ['rotary', 'heads of 1']),
        ({'latent_loss': -1.0}, ['latent_loss=-1.0']),
        ({'dropout': 1.0}, ['dropout=1.0']),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(changes, words):
    with pytest.raises(ValueError) as e:
        HierarchyConfig(**{**SMALL, **changes})
    assert all(word in str(e.value) for word in words), e.value


def test_too_many_tokens_and_padding_before_are_refused():
    with pytest.raises(ValueError, match='25 tokens do not fit block_size=24'):
        make()(tokens(T=25))
    with pytest.raises(ValueError, match='padding goes to the right'):
        make().hidden(tokens(), real=torch.ones(2, 24, dtype=torch.bool))


# -----------------------------------------------------------------------------
# The programs

TRAINED = {
    'model': 'hierarchy',
    'groups': 4,
    'latents': '2',
    'widths': '16-32',
    'upsample': 'attention',
    'latent_loss': 0.1,
    'n_layer': 3,
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(data, the folder of a finished run)"""
    folder = tmp_path_factory.mktemp('hierarchy')
    data = write_tokens(folder / 'data')
    start(folder / 'run', data, **TRAINED)
    return data, folder / 'run'


def test_a_resumed_run_is_bit_identical(trained, tmp_path):
    data, run = trained
    start(tmp_path, data, **{**TRAINED, 'max_iters': 12, 'eval_interval': 5, 'checkpoint_interval': 7})
    for name in (checkpoint.LAST, checkpoint.BEST):
        (tmp_path / name).unlink()
    (tmp_path / checkpoint.PREVIOUS).rename(tmp_path / checkpoint.LAST)
    resume(tmp_path, checkpoint_interval=0)
    assert_same_run(tmp_path, run, names=(checkpoint.LAST,))


def test_the_model_is_loaded_again(trained):
    _, run = trained
    model, state = load_model(run)
    assert type(model) is Hierarchy and asdict(model.config) == state['model_args']
    told = json.loads((run / 'run.json').read_text(encoding='utf-8'))['model']
    assert told['flops_per_token'] == model.flops_per_token()
    assert sum(told['params_by_part'].values()) == told['params_total']


def test_the_validation_loss_is_that_of_the_tokens(trained):
    import eval as evaluation
    from data.tokendata import eval_batch, eval_starts, open_data

    data, run = trained
    model, state = load_model(run, checkpoint.LAST)
    records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    told = [r for r in records if 'val/loss' in r][-1]['val/loss']
    splits = open_data(data).splits
    k = Knobs(**state['config'])
    starts, skip = eval_starts(len(splits['val']), 16, k.eval_iters * k.batch_size)
    x, y = eval_batch(splits['val'], starts, skip, 0, len(starts), 16)
    with torch.no_grad():
        logits = model(torch.from_numpy(x))[0]
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten(), ignore_index=-1)
    assert loss.item() == pytest.approx(told, abs=1e-5)
    windows = evaluation.loss_on(model, splits['val'], 13, 5, 4, 'cpu', lambda: torch.inference_mode(False))
    assert windows == pytest.approx(told, abs=0.3)


def test_it_is_sampled_and_not_explained(trained, capsys):
    import explain
    import sample

    texts = []
    for use_cache in ('true', 'false'):
        flags = ['--start=ab', '--max_new_tokens=20', '--temperature=1.5', f'--use_cache={use_cache}']
        assert sample.main([f'--out_dir={trained[1]}', '--device=cpu', *flags]) == 0
        texts.append(capsys.readouterr().out.splitlines()[:-1])  # the last line tells the speed
    assert texts[0] == texts[1]
    with pytest.raises(ConfigError, match='holds a Hierarchy: views are of single tokens'):
        explain.main([f'--out_dir={trained[1]}', '--text=ab'])


def test_another_model_does_not_go_on(trained):
    _, run = trained
    with pytest.raises(ConfigError, match="model='gpt', but the checkpoint"):
        resume(run, model='gpt', max_iters=20)


def test_only_a_gpt_starts_from_pretrained_weights():
    with pytest.raises(ConfigError, match=r"init_from='gpt2': only model=gpt"):
        check(Knobs(model='hierarchy', init_from='gpt2'))


def test_every_option_is_a_knob_with_the_same_default():
    knobs = Knobs()
    for name, default in asdict(HierarchyConfig()).items():
        if name not in ('vocab_size', 'vocab_used'):
            assert getattr(knobs, name) == default, name
    with pytest.raises(ConfigError, match='groups=5'):
        check(Knobs(model='hierarchy', groups=5))


def test_the_configs_are_whole(root):
    """Of both sizes: the authors' and that for a laptop; options are put behind them."""
    sizes = [['hierarchy.py'], ['hierarchy/hierarchy_cpu.py', 'sizes/size_cpu.py']]
    names = {f'hierarchy/{path.name}' for path in (root / 'config/hierarchy').glob('*.py')}
    for option in sorted(names - {'hierarchy/hierarchy_cpu.py'}):
        for size in sizes:
            knobs = configure(Knobs, [str(root / 'config' / name) for name in [*size, option]]).knobs
            check(knobs)
            plain = configure(Knobs, [str(root / 'config' / name) for name in size]).knobs
            assert knobs.model == 'hierarchy' and knobs != plain, option
    vanilla, here = (
        MODELS[k.model](model_config(k, 4096, 4096), seed=0).num_params()
        for k in (replace(plain, model='gpt', n_layer=6), plain)
    )
    assert here == pytest.approx(vanilla, rel=0.05), 'hierarchy_cpu is as large as vanilla'
