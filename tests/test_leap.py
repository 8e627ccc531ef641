"""Additive attention: the mean and both attentions against naive references; causality, recurrence, cost."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from layers.contract import Memory, Place
from layers.leap import window_of
from layers.windowed_mean import NEVER, RunningMean, mean_flops, windowed_mean
from model import GPT, GPTConfig

SMALL = {'block_size': 96, 'vocab_size': 64, 'n_layer': 4, 'n_head': 4, 'n_embd': 32}
VARIANTS = {
    'leap': {'attention': 'leap'},
    'leap_global': {'attention': 'leap', 'windows': 'global'},
    'leap_odd': {'attention': 'leap', 'windows': '3-17-40-0'},
    'leap_rescaled': {'attention': 'leap(3-17-40-0, rescale=10)'},
    'leap_rotary': {'attention': 'leap', 'position': 'rotary'},
    'leap_none': {'attention': 'leap', 'position': 'none'},
    'additive': {'attention': 'additive'},
    'additive_odd': {'attention': 'additive', 'windows': '1-33-5-0', 'position': 'none'},
    'leap_reflex': {'attention': 'leap*2 reflex*2', 'head_split': '3-1'},
    'vanilla_leap': {'attention': 'vanilla leap*3'},
}
WINDOWED = [name for name in VARIANTS if '_reflex' not in name and 'vanilla' not in name]


def model_of(variant, seed=0, **changes):
    """Larger weights than at the start, so that weights and gates are far from even."""
    model = GPT(GPTConfig(**{**SMALL, **VARIANTS[variant], **changes}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'attn.c_attn' in name or 'attn.w_' in name:
                p.normal_(0, 0.5, generator=generator)
    return model


def tokens(seed=0, B=2, T=77):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


def naive_mean(logits, vectors, window):
    """The definition, as one masked T x T softmax."""
    T = logits.size(-1)
    age = torch.arange(T)[:, None] - torch.arange(T)
    unseen = (age < 0) | (age >= (window or T))
    return logits.unsqueeze(-2).masked_fill(unseen, -math.inf).softmax(-1) @ vectors


def values_and_gradients(mean, logits, vectors, grad):
    logits, vectors = logits.clone().requires_grad_(), vectors.clone().requires_grad_()
    y = mean(logits, vectors)
    y.backward(grad.to(y.dtype))
    return y.detach(), logits.grad, vectors.grad


def inputs(T, spread=50.0, lead=(2, 2), d=8, seed=0):
    """Logits uniform in ±spread, in float32; vectors and upstream gradients normal."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.rand(*lead, T, generator=g) * 2 - 1) * spread
    return logits, torch.randn(*lead, T, d, generator=g), torch.randn(*lead, T, d, generator=g)


def check(logits, vectors, grad, window, mean=None, bound=1e-5):
    """Relative to the size of the sums: for logits the gradient is a difference of sums, which may vanish."""
    mean = mean or (lambda a, x: windowed_mean(a, x, window))
    y, da, dx = values_and_gradients(mean, logits, vectors, grad)
    wide = [t.double() for t in (logits, vectors, grad)]
    want_y, want_da, want_dx = values_and_gradients(lambda a, x: naive_mean(a, x, window), *wide)
    assert y.dtype == vectors.dtype and dx.dtype == vectors.dtype and da.dtype == logits.dtype
    assert (y - want_y).norm() <= bound * want_y.norm()
    assert (y - want_y).abs().max() <= bound * want_y.abs().max()
    assert (dx - want_dx).norm() <= bound * want_dx.norm()
    scale = (want_dx.abs() * wide[1].abs()).sum(-1)  # of the two sums that are subtracted
    assert (da - want_da).norm() <= bound * max(want_da.norm(), scale.norm())
    if logits.size(-1) > 64 and window != 1:
        assert (da - want_da).norm() <= bound * want_da.norm()


@pytest.mark.parametrize('spread', [0.1, 5.0, 50.0])
@pytest.mark.parametrize('T', [1, 2, 15, 16, 17, 33, 100, 257])
def test_mean_and_gradients_equal_the_definition(T, spread):
    """For every window of short sequences, and many of longer ones; in float32."""
    windows = range(T + 2) if T <= 33 else (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 48, 49, 64, 99, T - 1, T)
    for window in windows:
        check(*inputs(T, spread), window)


@pytest.mark.parametrize(
    ('T', 'windows'),
    [(1000, (4, 256, 257, 0)), (4097, (64, 1000)), (8192, (0, 5, 4096)), (8191, (0, 64))],
)
def test_mean_and_gradients_of_long_sequences(T, windows):
    for window in windows:
        check(*inputs(T, lead=(1,), d=4), window)


@pytest.mark.parametrize('window', [0, 1, 5, 16, 40])
def test_gradients_are_those_of_finite_differences(window):
    logits, vectors, _ = inputs(40, spread=2.0, lead=(1,), d=2)
    arguments = (logits.double().requires_grad_(), vectors.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, x: windowed_mean(a, x, window), arguments)


def test_logits_do_not_overflow_whatever_their_size():
    for shift in (-1e4, 1e4, 3e4):
        logits, vectors, _ = inputs(100)
        want = windowed_mean(logits.double(), vectors.double(), 10)
        got = windowed_mean(logits.double() + shift, vectors.double(), 10)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert windowed_mean(logits + shift, vectors, 10).isfinite().all()


@pytest.mark.parametrize('window', [0, 4, 20])
def test_autocast_does_not_lower_the_sums(window):
    """bf16 vectors, logits in fp32: against the naive mean of the very same numbers."""
    logits, vectors, grad = inputs(500)
    vectors, grad = vectors.bfloat16(), grad.bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        y, da, dx = values_and_gradients(lambda a, x: windowed_mean(a, x, window), logits, vectors, grad)
        exact = windowed_mean(logits, vectors.float(), window)
    want, want_da, want_dx = values_and_gradients(
        lambda a, x: naive_mean(a, x, window), logits.double(), vectors.double(), grad.double()
    )
    assert (exact - want).norm() <= 1e-5 * want.norm()
    assert y.dtype == dx.dtype == torch.bfloat16 and torch.equal(y, exact.bfloat16())
    assert (da - want_da).norm() <= 1e-5 * want_da.norm()
    assert (dx - want_dx).norm() <= 3e-3 * want_dx.norm()  # of its rounding to bf16 alone


@pytest.mark.parametrize('window', [0, 36])
def test_compiled_mean_is_the_same(window):
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, x: windowed_mean(a, x, window), fullgraph=True)
    check(*inputs(60, lead=(2,)), window, mean=compiled)


@pytest.mark.parametrize('window', [0, 1, 4, 16, 37])
def test_a_mean_sees_its_window_and_nothing_else(window):
    """By gradient: exactly zero outside. By perturbation: exactly equal outside."""
    logits, vectors, _ = inputs(90, spread=3.0, lead=(1,), d=2)
    before = windowed_mean(logits, vectors, window)
    for t in range(0, 90, 7):
        sees = torch.arange(90) >= t
        if window:
            sees &= torch.arange(90) < t + window
        a, x = logits.clone(), vectors.clone()
        a[:, t] += 1
        x[:, t] += 1
        changed = (windowed_mean(a, x, window) != before).any(-1)[0]
        assert torch.equal(changed, sees)
        a, x = logits.clone().requires_grad_(), vectors.clone().requires_grad_()
        windowed_mean(a, x, window)[:, t].sum().backward()
        seen = torch.arange(90) <= t
        if window:
            seen &= torch.arange(90) > t - window
        assert torch.equal(x.grad.abs().sum(-1)[0] > 0, seen)
        assert (a.grad[0][~seen] == 0).all()


@pytest.mark.parametrize('window', [0, 4, 20])
@pytest.mark.parametrize('shift', [0, 50, 100])
def test_padding_before_the_text_changes_no_gradient(window, shift):
    """Whatever the size of the logits; the padding's own gradients are zero."""
    logits, vectors, upstream = inputs(40)
    logits += shift

    def gradients(a, x, g):
        a, x = a.requires_grad_(), x.requires_grad_()
        windowed_mean(a, x, window).backward(g)
        return a.grad, x.grad

    padded = F.pad(logits, (9, 0), value=NEVER), F.pad(vectors, (0, 0, 9, 0)), F.pad(upstream, (0, 0, 9, 0))
    padded = gradients(*padded)
    alone = gradients(logits, vectors, upstream)
    for cut, whole in zip(padded, alone, strict=True):
        dim = logits.dim() - 1
        torch.testing.assert_close(cut.narrow(dim, 9, 40), whole, rtol=1e-4, atol=1e-5)
        assert cut.narrow(dim, 0, 9).abs().max() < 1e-30  # exp(FLOOR) in place of 0


@pytest.mark.parametrize('window', [0, 64])
def test_memory_grows_with_the_length_alone(window):
    """Twice the tokens, twice the bytes kept for the backward pass; nothing of size T x CHUNK among them."""

    def kept(T):
        sizes = {}

        def keep(t):  # of a view, all that it keeps alive
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        logits, vectors, _ = inputs(T, lead=(1,), d=8)
        logits.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            windowed_mean(logits, vectors.requires_grad_(), window)
        return sum(sizes.values())

    assert kept(2048) == 2 * kept(1024) == 4 * 1024 * (1 + 8 + 1 + 1 + 8) * 2


@pytest.mark.parametrize('window', [0, 64, 1000])
def test_work_grows_with_the_length_alone(window):
    """Matrix products per token: no more at a million tokens than at 65536, and for any window fewer than
    twice those of a window of one chunk."""
    per_token = [mean_flops(T, window, 32) / T for T in (2**16, 2**20)]
    assert per_token[1] == pytest.approx(per_token[0], rel=0.03)
    assert per_token[1] <= 2 * mean_flops(2**20, 16, 32) / 2**20


@pytest.mark.parametrize('window', [0, 1, 2, 16, 23])
def test_running_mean_equals_the_parallel_form(window):
    logits, vectors, _ = inputs(120)
    running, parts, at = RunningMean(window), [], 0
    for n in (1, 1, 5, 30, 1, 1, 20, *[1] * 61):
        parts.append(running.mean(logits[..., at : at + n], vectors[..., at : at + n, :]))
        at += n
    want = windowed_mean(logits, vectors, window)
    assert at == 120 and (torch.cat(parts, dim=-2) - want).norm() <= 1e-6 * want.norm()


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match=r'\(2, 5\).*\(2, 6, 3\)'):
        windowed_mean(torch.zeros(2, 5), torch.zeros(2, 6, 3))
    with pytest.raises(ValueError, match='window=-1'):
        windowed_mean(torch.zeros(2, 5), torch.zeros(2, 5, 3), -1)


def reference(model, block, x):
    """One attention as its docstring says it, head by head, in float64."""
    c, attn = model.config, block.attn
    n_head, hs, T = c.n_head, c.head_size, x.size(1)
    projections = (x @ attn.c_attn.weight.T).view(*x.shape[:2], n_head, -1, hs)  # (B, T, n_head, 3 or 4, hs)
    heads = []
    for h in range(n_head):
        if attn.name == 'leap':
            q, f, k, v = projections[:, :, h].unbind(2)  # (B, T, hs) each
            scale = 1 / math.sqrt(hs)
            if attn.rescale:  # leap-transformer 1.0.1
                q, f, k, v = ((t - t.mean(-1, True)) / (t.std(-1, keepdim=True) + 1e-5) for t in (q, f, k, v))
                scale = attn.rescale / hs
            a = (f * k).sum(-1) * scale
            if c.position == 'rotary':
                _, rotate = model.transformer.wpe(x, torch.arange(T)[None])
                q, k = (rotate(t[:, None])[:, 0] for t in (q, k))
            K, V = naive_mean(a, k, attn.window), naive_mean(a, v, attn.window)
            heads.append(torch.sigmoid((q * K).sum(-1, keepdim=True) * scale) * V)
        else:
            q, k, v = projections[:, :, h].unbind(2)
            p = naive_mean((attn.w_q[h, 0] * q).sum(-1) / math.sqrt(hs), q, attn.window) * k
            heads.append(naive_mean((attn.w_k[h, 0] * p).sum(-1) / math.sqrt(hs), p, attn.window) * v)
    return torch.cat(heads, dim=2) @ attn.c_proj.weight.T


@pytest.mark.parametrize('variant', WINDOWED)
def test_attentions_and_their_gradients_equal_the_definition(variant):
    """Layer by layer in float64; rotary angles are fp32, hence its wider bound."""
    model = model_of(variant).double()
    bound = 1e-5 if variant == 'leap_rotary' else 1e-9
    x = torch.randn(2, 50, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    for block in model.transformer.h:
        _, rotate = model.transformer.wpe(x, torch.arange(50)[None])
        results = []
        for run in (lambda x: block.attn(x, Memory(rotate)), lambda x: reference(model, block, x)):  # noqa: B023
            model.zero_grad()
            fresh = x.clone().requires_grad_()
            y = run(fresh)
            y.square().sum().backward()
            results.append([y.detach(), fresh.grad, *(p.grad.clone() for p in block.attn.parameters())])
        for got, want in zip(*results, strict=True):
            assert (got - want).norm() <= bound * want.norm()
            assert want.norm() > 0 or block.attn.window == 1, 'a mean of one token has no use for its logit'


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_token_changes_nothing_before_it(variant):
    model = model_of(variant).eval()
    idx = tokens(B=1, T=40)
    before = model(idx)[0]
    for t in range(0, 40, 3):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 64
        after = model(changed)[0]
        assert torch.equal(after[:, :t], before[:, :t]), f'position {t} is seen before it'
        assert (after[:, t:] != before[:, t:]).any(-1).all(), 'and by everything after it: the last is global'


@pytest.mark.parametrize('variant', VARIANTS)
@torch.no_grad()
def test_generation_as_a_recurrence_equals_the_parallel_form(variant):
    """Logits of prefill, single steps and a chunk after a past; then the tokens drawn."""
    model = model_of(variant).double().eval()
    idx = tokens()
    cache, parts, at = model.new_cache(2), [], 0
    for n in (20, 1, 1, 30, 1, 24):
        parts.append(model.lm_head(model.hidden(idx[:, at : at + n], cache)))
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=1e-8, atol=1e-8)
    drawn = model.generate(idx[:, :3], 110, temperature=0)  # beyond block_size: cropped where it has to be
    assert torch.equal(drawn, model.generate(idx[:, :3], 110, temperature=0, use_cache=False))
    one = model.generate(idx[:1, :3], 110, temperature=0, lookup=8)  # a running mean takes no guess back
    assert torch.equal(one, drawn[:1])


@pytest.mark.parametrize('variant', ['leap_none', 'leap_rotary', 'additive_odd'])
@torch.no_grad()
def test_contexts_are_endless_where_positions_allow_it(variant):
    """Beyond block_size nothing is cropped: the next token depends on the first through the global layer."""
    model = model_of(variant).double().eval()
    assert model.context_limit == math.inf
    idx = tokens(B=1, T=300)
    cache = model.new_cache(1)
    steps = torch.cat([model.hidden(idx[:, t : t + 1], cache) for t in range(300)], dim=1)
    torch.testing.assert_close(steps, model.hidden(idx), rtol=1e-8, atol=1e-8)
    changed = idx.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 64
    assert not torch.equal(model.hidden(changed)[:, -1], model.hidden(idx)[:, -1])
    for bounded in ('leap', 'leap_reflex'):
        with pytest.raises(ValueError, match='97 tokens do not fit block_size=96'):
            model_of(bounded)(tokens(T=97))


def held_bytes(cache):
    past = [past for layer in cache.layers for past in layer.means]
    return sum(t.untyped_storage().nbytes() for p in past for t in (p.logits, p.vectors))


@pytest.mark.parametrize('variant', ['leap', 'leap_global', 'leap_odd', 'additive', 'additive_odd'])
@torch.no_grad()
def test_state_is_as_small_as_it_says_and_does_not_grow(variant):
    model = model_of(variant, position='none').eval()
    cache = model.new_cache(2)
    for n in (60, 1, 1, 40, 1):
        model.hidden(tokens(T=n), cache)
        assert held_bytes(cache) == 2 * model.state_bytes(itemsize=4)
    assert model.cache_bytes_per_token() == 0
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        cache = model.new_cache(1)
        model.hidden(tokens(B=1, T=80), cache)
        if variant.startswith('leap'):
            assert held_bytes(cache) == model.state_bytes(itemsize=2)


@pytest.mark.parametrize('variant', ['leap_none', 'leap_rotary', 'additive_odd'])
def test_a_token_costs_at_32000_what_it_costs_at_1000(variant):
    """By what is computed, operation by operation with its shapes, not by the clock."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [t for t in (*args, result) if torch.is_tensor(t)]
            work.append((str(function), [tuple(t.shape) for t in tensors]))
            return result

    model = model_of(variant).eval()
    cache = model.new_cache(1)
    seen = {}
    with torch.no_grad():
        for n in (1000, 31000):
            model.hidden(tokens(B=1, T=n), cache)
            work = []
            with Record():
                model.hidden(tokens(B=1, T=1), cache)
            seen[cache.length] = work, held_bytes(cache)
    assert list(seen) == [1001, 32002] and seen[1001] == seen[32002] and len(seen[1001][0]) > 100


@pytest.mark.parametrize('attention', ['leap', 'additive'])
def test_state_at_the_published_size_is_64_kb_per_layer(attention):
    """On average over the layers, in bf16: 62 KB; the layer of window 64 alone holds 191 KB."""
    with torch.device('meta'):
        model = GPT(GPTConfig(attention=attention), seed=0)
    assert model.state_bytes(itemsize=2) <= 64 * 1024 * model.config.n_layer


@pytest.mark.parametrize('T', [1, 16, 40, 77, 96])
@pytest.mark.parametrize('variant', VARIANTS)
def test_flops_are_those_that_torch_counts(variant, T):
    with torch.device('meta'):
        model = GPT(GPTConfig(**SMALL, **VARIANTS[variant]), seed=0)
        idx = torch.zeros(3, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    assert counter.get_total_flops() == round(3 * T * model.flops_per_token(T, backward=False))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == round(3 * T * model.flops_per_token(T))


def test_windows_of_the_layers():
    def windows(window, n_layer):
        return [window_of(window, Place(l, n_layer, l, n_layer)) for l in range(n_layer)]

    assert windows('auto', 6) == [4, 8, 16, 32, 64, 0]
    assert windows('auto', 1) == windows('global', 1) == [0]
    assert windows('global', 3) == [0, 0, 0]
    assert windows('7-0-12', 3) == [7, 0, 12]
    assert windows('5', 3) == [5, 5, 5]
    mixed = GPTConfig(**SMALL, attention='leap*2 vanilla*2', windows='3-7-0-0')
    assert mixed == GPTConfig(**SMALL, attention='leap(3-7)*2 vanilla*2')
    described = [block.attn.describe() for block in model_of('leap_odd').transformer.h]
    assert described == [f'leap {w}, 4 heads' for w in ('window 3', 'window 17', 'window 40', 'global')]


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'attention': 'leap', 'windows': '4-8-16'}, ["'4-8-16'", '3 windows for 4 layers']),
        ({'attention': 'leap', 'windows': 'local'}, ["'local'", 'auto']),
        ({'attention': 'leap', 'windows': '4--8-0'}, ["'4--8-0'"]),
        ({'attention': 'leap*3'}, ["'leap(auto)*3'", '3 layers', 'n_layer=4']),
        ({'attention': 'leap*two reflex*2'}, ["'leap*two", 'cannot be read']),
        ({'attention': 'leap(window=3, depth=2)'}, ["no option 'depth'", 'it has window']),
        ({'attention': 'leap(3, window=4)'}, ['window twice']),
        ({'attention': 'leap*2 refelx*2'}, ["'refelx'", 'reflex, ', ', leap']),
        ({'attention': 'leap*3 reflex', 'head_split': '4-1'}, ["'4-1'", 'n_head=4']),
        ({'attention': 'additive', 'position': 'rotary'}, ['rotary', 'none']),
        ({'attention': 'leap', 'qk_norm': True}, ['qk_norm', "'leap'"]),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(changes, words):
    with pytest.raises(ValueError) as e:
        GPTConfig(**{**SMALL, **changes})
    assert all(word in str(e.value) for word in words), e.value


def test_weights_of_other_windows_do_not_load():
    with pytest.raises(ValueError, match='window 17'):
        model_of('leap').load_state_dict(model_of('leap_odd').state_dict())
    with pytest.raises(ValueError, match='2 heads'):
        model_of('leap').load_state_dict(model_of('leap', n_head=2).state_dict())


def test_a_mixed_model_reads_past_the_layers_without_a_plan():
    """Two layers of lag 0 and 1 behind two of LEAP: the plan is that of a model of two layers."""
    model = model_of('leap_reflex')
    kinds = [block.attn.describe() for block in model.transformer.h]
    assert kinds == [
        'leap window 4, 4 heads',
        'leap window 8, 4 heads',
        'head plan 0 0 0 0',
        'head plan 0 0 0 1',
    ]
    model(tokens())[0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
