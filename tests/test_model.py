"""The model against a plain per-head reference, for every plan; causality, cache, FLOPs, initial values."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from generation import Repeats, Sampling, draw
from layers.plans import Head, HeadPlan
from layers.registry import ATTENTIONS, Kind
from model import GPT, GPTConfig

SMALL = {'block_size': 16, 'vocab_size': 64, 'n_layer': 6, 'n_head': 8, 'n_embd': 32}
VARIANTS = {
    'vanilla': {'attention': 'vanilla'},
    '4-2-2': {'attention': 'reflex', 'head_split': '4-2-2'},
    '5-2-1': {'attention': 'reflex', 'head_split': '5-2-1'},
    '3-3-2': {'attention': 'reflex', 'head_split': '3-3-2'},
    '4-2-1-1': {'attention': 'reflex', 'head_split': '4-2-1-1'},
    'reflex_all': {'attention': 'reflex_all'},
}


def config(variant, **changes):
    return GPTConfig(**{**SMALL, **VARIANTS[variant], **changes})


def tokens(seed=0, B=2, T=16):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


def lags(variant, l):
    """(source layer, head) of every head of layer l, written down from the specification."""
    if variant == 'vanilla':
        return [(l, h) for h in range(8)]
    if variant == 'reflex_all':
        own = 8 - l
        return [(l, h) for h in range(own)] + [(l - d, 8 - 1 - (l - d)) for d in range(1, l + 1)]
    counts = [int(n) for n in variant.split('-')]
    if l < len(counts) - 1:
        return [(l, h) for h in range(8)]
    flat = [d for d, n in enumerate(counts) for _ in range(n)]
    return [(l - d, h) for h, d in enumerate(flat)]


def read_plan(source):
    """What a head reads under a plan: source(l)[h] is a pair of (layer, head), for key and value."""

    def read(l, h, past):
        (key_layer, key_head), (value_layer, value_head) = source(l)[h]
        return past[key_layer][0][:, :, key_head], past[value_layer][1][:, :, value_head]

    return read


def reference_hidden(model, full, idx, read, windows=(0,) * 6):
    """A forward pass head by head: every key and value of every layer is projected, masks are explicit.

    full[l]: the whole (3C, C) projection of layer l, of which the model keeps rows.
    read(l, h, past): what head h of layer l reads, (B, T, hs) each, from the k, v (B, T, n_head, hs) so far.
    """
    t, C = model.transformer, model.config.n_embd
    n_head, hs = model.config.n_head, model.config.head_size
    B, T = idx.shape
    x = t.wte.weight[idx] + t.wpe.weight[:T]
    past = []
    for l, block in enumerate(t.h):
        normed = F.layer_norm(x, (C,), block.ln_1.weight, block.ln_1.bias)
        q, k, v = (normed @ full[l].T).split(C, dim=2)
        q, k, v = (a.view(B, T, n_head, hs) for a in (q, k, v))
        past.append((k, v))
        out = []
        for h in range(n_head):
            keys, values = read(l, h, past)
            scores = q[:, :, h] @ keys.transpose(1, 2) / math.sqrt(hs)  # (B, T, T)
            age = torch.arange(T)[:, None] - torch.arange(T)[None]
            allowed = (age >= 0) & (age < (windows[l] or T))
            out.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ values)
        y = torch.cat(out, dim=2) @ block.attn.c_proj.weight.T
        x = x + y
        x = x + block.mlp(block.ln_2(x))
    return t.ln_f(x)


def check_against_reference(model, read, **options):
    model = model.double()
    C = model.config.n_embd
    full = []
    for block in model.transformer.h:
        w = torch.full((3 * C, C), 0.37, dtype=torch.double)  # dead heads: whatever stands there is not read
        w[block.attn.c_attn.rows] = block.attn.c_attn.weight.detach()
        full.append(w.requires_grad_())
    idx, targets = tokens(), tokens(1)
    x = reference_hidden(model, full, idx, read, **options)
    loss = F.cross_entropy((x @ model.lm_head.weight.T).flatten(0, 1), targets.flatten())
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.testing.assert_close(model(idx)[0], x @ model.lm_head.weight.T, rtol=1e-9, atol=1e-9)
    # the loss itself may be computed in float32
    _, found = model(idx, targets)
    torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=1e-6)
    found.backward()
    for l, (block, w) in enumerate(zip(model.transformer.h, full, strict=True)):
        rows = block.attn.c_attn.rows
        dead = sorted(set(range(3 * C)) - set(rows))
        torch.testing.assert_close(block.attn.c_attn.weight.grad, w.grad[rows], rtol=1e-5, atol=1e-7)
        assert not dead or w.grad[dead].abs().max() == 0, f'layer {l} drops a head that something reads'
    for name, p in model.named_parameters():
        if 'c_attn' not in name:
            torch.testing.assert_close(
                p.grad, wanted[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f'{n}: {m}'
            )


@pytest.mark.parametrize('variant', VARIANTS)
def test_outputs_and_gradients_equal_the_per_head_reference(variant):
    def source(l):
        return [(pair, pair) for pair in lags(variant, l)]

    check_against_reference(GPT(config(variant), seed=3), read_plan(source))


def test_a_window_ends_what_a_layer_reads():
    """Of its own and of earlier layers, and in generation, where the cache holds more."""
    cfg = GPTConfig(**SMALL, attention='vanilla(window=5)*3 reflex(4-2-2, window=3)*2 reflex(4-2-2)')
    model, idx = GPT(cfg, seed=3), tokens()

    def source(l):
        return [(pair, pair) for pair in lags('4-2-2' if l >= 3 else 'vanilla', l)]

    check_against_reference(model, read_plan(source), windows=(5, 5, 5, 3, 3, 0))
    cache = model.new_cache(2)
    parts = [model.hidden(part, cache) for part in idx.split([7, 1, 1, 4, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(idx), rtol=1e-10, atol=1e-10)


def test_a_plan_may_read_keys_and_values_apart(monkeypatch):
    """Own keys with layer 0's values, a key of another head, a layer that produces no value at all."""

    def odd(shape):
        table = []
        for l in range(shape.n_layer):
            heads = [Head((l, h), (0, h)) for h in range(4)] + [
                Head((l // 2, 7 - h), (l, h)) for h in range(4, 8)
            ]
            table.append([Head((0, h), (0, 7 - h)) for h in range(8)] if l == 3 else heads)
        return table

    monkeypatch.setitem(ATTENTIONS, 'odd', Kind(plan=odd))
    cfg = GPTConfig(**SMALL, attention='odd')
    check_against_reference(GPT(cfg, seed=3), read_plan(lambda l: odd(cfg)[l]))
    produced = [block.attn.heads_produced() for block in GPT(cfg, seed=3).transformer.h]
    assert produced[3] == (0, 0), 'layer 3 reads layer 0 alone, and nothing reads layer 3'


@pytest.mark.parametrize('variant', VARIANTS)
def test_heads_produced_are_the_table_of_the_specification(variant):
    wanted = {
        'vanilla': [8, 8, 8, 8, 8, 8],
        '4-2-2': [8, 8, 8, 8, 6, 4],
        '5-2-1': [8, 8, 8, 8, 7, 5],
        '3-3-2': [8, 8, 8, 8, 6, 3],
        '4-2-1-1': [8, 8, 8, 7, 6, 4],
        'reflex_all': [8, 7, 6, 5, 4, 3],
    }[variant]
    model = GPT(config(variant), seed=0)
    assert [block.attn.heads_produced() for block in model.transformer.h] == [(n, n) for n in wanted]
    head, C = 32 * 4, 32
    dead = 2 * (48 - sum(wanted))
    assert GPT(config('vanilla'), seed=0).num_params() - model.num_params() == dead * head
    assert model.cache_bytes_per_token(itemsize=2) == 2 * sum(wanted) * (C // 8) * 2


@pytest.mark.parametrize(
    ('changes', 'layers'),
    [
        ({'attention': 'reflex(4-2-2)', 'n_layer': 2}, 'needs 3'),
        ({'attention': 'reflex(1-1-1-1-1-1-1-1)'}, 'needs 8'),
        ({'attention': 'reflex_all', 'n_layer': 1}, 'needs 2'),
        ({'attention': 'reflex(4-2-2) leap*5'}, 'needs 3'),
        (
            {'attention': 'leap*4 reflex(4-2-2)*2'},
            '2 of n_layer=6 layers have keys and values, and it needs 3',
        ),
        ({'attention': 'reflex(4-2-2)*2 leap reflex(5-2-1)*3'}, r'reflex\(4-2-2\) comes to plain'),
        ({'attention': 'reflex(8)'}, "call it 'vanilla'"),
        ({'attention': 'layer0(8/8)'}, "call it 'vanilla'"),
        ({'attention': 'cla', 'n_layer': 1}, 'needs 2'),
        ({'attention': 'lime', 'n_layer': 1}, 'needs 2'),
        ({'attention': 'value_residual leap*5'}, 'needs 2'),
    ],
)
def test_what_comes_to_vanilla_under_another_name_is_refused(changes, layers):
    with pytest.raises(ValueError, match=layers):
        GPTConfig(**{**SMALL, **changes})


def test_lags_count_all_layers_that_have_keys_and_values():
    """Whatever kind they are; the first two of 4-2-2 are plain only where they have too few before them."""
    plan = GPTConfig(**SMALL, attention='vanilla*2 leap reflex(4-2-2)*3').head_plan()
    assert [head.value[0] for head in plan.heads[2]] == [2, 2, 2, 2, 1, 1, 0, 0]
    assert [head.value[0] for head in plan.heads[4]] == [4, 4, 4, 4, 3, 3, 2, 2]
    ramp = GPTConfig(**SMALL, attention='vanilla layer0(8/6-2) layer0(8/4-4)*2 layer0(8/0-8)*2').head_plan()
    own = [sum(head.value[0] == l for head in heads) for l, heads in enumerate(ramp.heads)]
    assert own == [8, 6, 4, 4, 0, 0] and all(head.key[0] == 5 for head in ramp.heads[5])


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_token_changes_nothing_before_it(variant):
    model = GPT(config(variant), seed=1).double()
    idx = tokens(B=1)
    before = model(idx)[0]
    for t in range(16):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 64
        after = model(changed)[0]
        assert torch.equal(after[:, :t], before[:, :t]), f'position {t} is seen before it'
        assert not torch.equal(after[:, t], before[:, t])
        # and it is seen by everything after it: nothing is masked too much
        assert (after[:, t:] != before[:, t:]).any(-1).all()


@pytest.mark.parametrize('variant', VARIANTS)
def test_generation_with_cache_equals_without(variant):
    """Also where the context outgrows block_size, and for a prompt longer than it."""
    model = GPT(config(variant), seed=2).double()
    for prompt in (tokens(B=2, T=3), tokens(B=1, T=21)):
        cached = model.generate(prompt, 40, temperature=0)
        assert torch.equal(cached, model.generate(prompt, 40, temperature=0, use_cache=False))
        assert cached.shape == (prompt.size(0), prompt.size(1) + 40)
        assert torch.equal(cached[:, : prompt.size(1)], prompt)


@pytest.mark.parametrize('variant', VARIANTS)
def test_guesses_change_no_token_and_save_passes(variant):
    """Greedy and drawn, over crops of the context, for texts that repeat themselves and for others."""
    model = GPT(config(variant), seed=2).double()
    passes = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))

    def generate(prompt, temperature, **options):
        passes.clear()
        generator = torch.Generator().manual_seed(3)
        return model.generate(prompt, 60, temperature=temperature, generator=generator, **options), len(
            passes
        )

    saved = set()
    for prompt in (tokens(B=1, T=1), tokens(B=1, T=5).repeat(1, 3), tokens(B=1, T=21)):
        for temperature in (0, 0.01, 1.0):
            wanted, most = generate(prompt, temperature)
            assert most == 60
            for lookup in (1, 4, 100):
                drawn, n = generate(prompt, temperature, lookup=lookup)
                assert torch.equal(drawn, wanted)
                assert n <= most
                saved.add(most - n)
    assert max(saved) > 20
    several = tokens(B=2, T=3)
    assert torch.equal(generate(several, 0, lookup=4)[0], generate(several, 0)[0])


def test_what_is_guessed_is_what_came_next_the_last_time():
    repeats = Repeats([1, 2, 3, 4, 5, 1, 2, 3, 6, 1, 2, 3])
    assert repeats.guess(0) == []
    assert repeats.guess(3) == [6, 1, 2]
    assert repeats.guess(6) == [6, 1, 2, 3, 6, 1]  # beyond the end: once more around
    repeats.append(9)
    assert repeats.guess(3) == []  # 2, 3, 9 is new
    assert Repeats([7, 7, 7, 7]).guess(4) == [7, 7, 7, 7]
    assert Repeats([7]).guess(4) == Repeats([7, 7]).guess(4) == []


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_cache_forgets_what_it_is_told_to(variant):
    model = GPT(config(variant), seed=2).double().eval()
    idx, other = tokens(), tokens(1)
    cache = model.new_cache(2)
    model.hidden(idx[:, :5], cache)
    model.hidden(other[:, :7], cache)
    cache.rewind(5)
    after = model.lm_head(model.hidden(idx[:, 5:], cache))
    torch.testing.assert_close(after, model(idx)[0][:, 5:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('variant', VARIANTS)
def test_logits_of_a_cached_pass_equal_the_full_pass(variant):
    """In calls of 5, 1, 1 and 9 tokens: prefill, single steps, and a chunk after a past."""
    model = GPT(config(variant), seed=2).double().eval()
    idx = tokens()
    cache, parts, at = model.new_cache(2), [], 0
    for n in (5, 1, 1, 9):
        parts.append(model.lm_head(model.hidden(idx[:, at : at + n], cache)))
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('bias', [False, True])
def test_flops_are_those_that_torch_counts(variant, bias):
    with torch.device('meta'):
        model = GPT(config(variant, bias=bias, n_embd=64), seed=0)
        idx = torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    assert counter.get_total_flops() == 3 * 16 * model.flops_per_token(16, backward=False)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == 3 * 16 * model.flops_per_token()


def test_reflex_costs_less_than_vanilla():
    vanilla, split, every = (
        GPT(config(v), seed=0).flops_per_token() for v in ('vanilla', '4-2-2', 'reflex_all')
    )
    assert every < split < vanilla


def test_models_share_the_initial_values_of_what_they_share():
    vanilla = dict(GPT(config('vanilla'), seed=7).named_parameters())
    reflex = GPT(config('reflex_all'), seed=7)
    for name, p in reflex.named_parameters():
        if 'c_attn' not in name:
            assert torch.equal(p, vanilla[name]), name
    for l, block in enumerate(reflex.transformer.h):
        c_attn = block.attn.c_attn
        assert torch.equal(c_attn.weight, vanilla[f'transformer.h.{l}.attn.c_attn.weight'][c_attn.rows])
    other = dict(GPT(config('vanilla'), seed=8).named_parameters())
    assert not torch.equal(other['transformer.wte.weight'], vanilla['transformer.wte.weight'])


def test_initial_values_depend_on_the_seed_alone():
    torch.manual_seed(0)
    a = GPT(config('vanilla'), seed=1).state_dict()
    torch.manual_seed(1)
    b = GPT(config('vanilla'), seed=1).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a if name != '_extra_state')


def test_initial_scale_is_gpt2s():
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=8, n_embd=128), seed=0)
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    c_proj = model.transformer.h[3].mlp.c_proj.weight
    assert c_proj.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)


def test_weights_of_one_plan_do_not_load_into_another(monkeypatch):
    def crossed(config):
        """The shapes of vanilla, another meaning: each head reads the value of its mirror image."""
        return [[Head((l, h), (l, 7 - h)) for h in range(8)] for l in range(config.n_layer)]

    monkeypatch.setitem(ATTENTIONS, 'crossed', Kind(plan=crossed))
    other = GPT(GPTConfig(**SMALL, attention='crossed'), seed=0).state_dict()
    with pytest.raises(ValueError, match='another attention plan'):
        GPT(config('vanilla'), seed=0).load_state_dict(other)
    with pytest.raises((RuntimeError, ValueError)):
        GPT(config('4-2-2'), seed=0).load_state_dict(GPT(config('5-2-1'), seed=0).state_dict())


def test_padding_ids_are_never_drawn():
    model = GPT(config('vanilla', vocab_used=3), seed=0)
    with torch.no_grad():
        model.transformer.wte.weight[3:] *= 100
    for temperature in (0, 1.0, 5.0):
        drawn = model.generate(torch.zeros(4, 1, dtype=torch.long), 30, temperature=temperature)
        assert drawn.max() < 3
    assert len(model.generate(torch.zeros(4, 1, dtype=torch.long), 30, temperature=5.0).unique()) == 3


def test_sampling_knobs():
    model = GPT(config('vanilla'), seed=0)
    prompt = torch.zeros(1, 1, dtype=torch.long)

    def draw(seed, **options):
        return model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), model.generate(prompt, 20, temperature=0))
    with pytest.raises(ValueError, match='empty'):
        model.generate(prompt[:, :0], 1)


def test_only_the_likeliest_are_drawn():
    p = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15], [0.02, 0.9, 0.03, 0.04, 0.01]])
    logits = p.log()
    generator = torch.Generator().manual_seed(0)

    def kinds(**options):
        drawn = torch.cat([draw(logits, Sampling(**options), generator) for _ in range(400)], dim=1)
        return [sorted(set(row)) for row in drawn.tolist()]

    assert kinds() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert kinds(top_p=0.69) == [[1, 3], [1]] and kinds(top_p=0.71) == [[1, 3, 4], [1]]
    assert kinds(top_p=0.01) == [[1], [1]]
    assert kinds(top_k=3) == [[1, 3, 4], [1, 2, 3]]
    assert kinds(top_k=3, top_p=0.8) == [[1, 3], [1]]  # of the three: 0.47, 0.35, 0.18
    # among those, as likely as before
    drawn = [int(draw(logits[:1], Sampling(top_p=0.69), generator)) for _ in range(4000)]
    assert abs(drawn.count(1) / 4000 - 4 / 7) < 0.03


def test_a_token_is_drawn_as_torch_draws_it_and_none_from_what_is_no_number():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    ours, torchs = (torch.Generator().manual_seed(2) for _ in range(2))
    for _ in range(20):
        wanted = torch.multinomial(logits.softmax(-1), 1, generator=torchs)
        assert torch.equal(draw(logits, Sampling(), ours), wanted)
    logits[0, 3], logits[2, 4] = math.nan, math.inf
    for temperature in (0, 1.0):
        drawn = draw(logits, Sampling(temperature), ours)[:, 0].tolist()
        assert drawn[0] == drawn[2] == -1 and 0 <= drawn[1] < 50


def test_generation_leaves_the_mode_of_the_model():
    model = GPT(config('vanilla', dropout=0.5), seed=0)
    model.train()
    a = model.generate(tokens(B=1, T=4), 10, temperature=0)
    assert model.training
    assert torch.equal(a, model.generate(tokens(B=1, T=4), 10, temperature=0)), (
        'dropout was on while sampling'
    )


def test_streams_side_by_side_leave_each_module_its_mode():
    model = GPT(config('vanilla', dropout=0.5), seed=0).train()
    model.transformer.h[1].eval()
    before = [m.training for m in model.modules()]
    wanted = model.generate(tokens(B=1, T=4), 10, temperature=0)[0, 4:].tolist()
    short, long = (model.stream(tokens(B=1, T=4), n, temperature=0) for n in (3, 10))
    found = [int(next(long))]
    assert [int(token) for token in short] == wanted[:3]
    assert model.training, 'a step of training may come between two tokens'
    assert found + [int(token) for token in long] == wanted
    assert [m.training for m in model.modules()] == before


def test_targets_of_minus_one_do_not_count():
    model = GPT(config('vanilla'), seed=0)
    x, y = tokens(), tokens(1)
    cut = y.clone()
    cut[:, 8:] = -1
    logits = model(x)[0][:, :8]
    wanted = F.cross_entropy(logits.flatten(0, 1), y[:, :8].flatten())
    torch.testing.assert_close(model(x, cut)[1], wanted)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'n_embd': 30}, ['n_embd=30', 'n_head=8']),
        ({'attention': 'reflex', 'head_split': '4-2-1'}, ["'4-2-1'", '7', 'n_head=8']),
        ({'attention': 'reflex', 'head_split': '4--4'}, ["'4--4'", 'numbers of heads']),
        ({'attention': 'reflex', 'head_split': 'four'}, ["'four'"]),
        ({'attention': 'reflex_all', 'n_layer': 9}, ['n_layer=9', 'n_head=8']),
        ({'attention': 'refelx'}, ["'refelx'", 'reflex_all']),
        ({'dropout': 1.0}, ['dropout=1.0']),
        ({'n_layer': 0}, ['n_layer=0']),
        ({'vocab_used': 65}, ['vocab_used=65', 'vocab_size=64']),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(changes, words):
    with pytest.raises(ValueError) as e:
        GPTConfig(**{**SMALL, **changes})
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize('bad', [(1, 0), (0, 8), (-1, 0)])
def test_a_plan_that_reads_what_is_not_there_is_refused(bad):
    table = [[Head((0, 0), (0, 0))] * 7 + [Head((0, 0), bad)]]
    with pytest.raises(ValueError, match='head 7 of layer 0 reads the value'):
        HeadPlan(table, 8)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match='17 tokens do not fit block_size=16'):
        GPT(config('vanilla'), seed=0)(tokens(T=17))


def test_the_optimizer_decays_matrices_only():
    model = GPT(config('4-2-2', bias=True), seed=0)
    decayed, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.98), 'cpu').param_groups
    assert decayed['weight_decay'] == 0.1 and rest['weight_decay'] == 0
    assert all(p.dim() >= 2 for p in decayed['params']) and all(p.dim() == 1 for p in rest['params'])
    assert sum(p.numel() for g in (decayed, rest) for p in g['params']) == model.num_params(
        non_embedding=False
    )
