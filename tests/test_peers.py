"""Plans beyond the published three and the closest published peers, against the per-head reference."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layers.mixes import ValueResidualAttention
from layers.plans import Head
from layers.registry import ATTENTIONS, Kind
from model import GPT, GPTConfig
from test_model import SMALL, check_against_reference, read_plan, tokens

VARIANTS = {
    'own keys, values 4-2-2': {'attention': 'reflex', 'head_split': '8/4-2-2'},
    'keys 5-2-1, own values': {'attention': 'reflex', 'head_split': '5-2-1/8'},
    'keys 6-2, values 4-2-1-1': {'attention': 'reflex', 'head_split': '6-2/4-2-1-1'},
    'lag 3': {'attention': 'reflex', 'head_split': '4-2-1-1'},
    'first 6-2': {'attention': 'first', 'head_split': '6-2'},
    'first 4-2-2': {'attention': 'first', 'head_split': '4-2-2'},
    'SkipV1Former': {'attention': 'first', 'head_split': '8/4-4'},
    'SVFormer': {'attention': 'layer0(8/0-8)'},
    'no own head above layer 1': {'attention': 'reflex(0-4-4)'},
    'CLA': {'attention': 'cla'},
    'reflex_all oldest': {'attention': 'reflex_all_oldest'},
    'reflex_all values': {'attention': 'reflex_all_values'},
    'value residual': {'attention': 'value_residual'},
    'SkipV1Former, value residual': {'attention': 'first_residual', 'head_split': '8/4-4'},
    'first 8/4-2-2, value residual': {'attention': 'first_residual', 'head_split': '8/4-2-2'},
    'LIMe': {'attention': 'lime'},
    'learned split': {'attention': 'learned_split'},
}


def build(variant, seed=3, **changes):
    """The model in float64; λ, routers and shares are moved off their initial values, so that they show."""
    model = GPT(GPTConfig(**{**SMALL, **VARIANTS[variant], **changes}), seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(('own_share', 'router', 'allocation')):
            p.data += 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def split(keys, values):
    """The source of every head, from its lags: numbers, or FIRST for layer 0."""

    def source_layers(lags, l):
        deep_enough = l >= max((lag for lag in lags if lag != FIRST), default=0)
        return [0 if lag == FIRST else l - lag if deep_enough else l for lag in lags]

    def source(l):
        layers = zip(source_layers(keys, l), source_layers(values, l), strict=True)
        return [((k, h), (v, h)) for h, (k, v) in enumerate(layers)]

    return source


FIRST = 'first'
OWN = [0] * 8
SOURCES = {
    'own keys, values 4-2-2': split(OWN, [0, 0, 0, 0, 1, 1, 2, 2]),
    'keys 5-2-1, own values': split([0, 0, 0, 0, 0, 1, 1, 2], OWN),
    'keys 6-2, values 4-2-1-1': split([0] * 6 + [1, 1], [0, 0, 0, 0, 1, 1, 2, 3]),
    'lag 3': split([0, 0, 0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 1, 1, 2, 3]),
    'first 6-2': split([0] * 6 + [FIRST] * 2, [0] * 6 + [FIRST] * 2),
    'first 4-2-2': split([0] * 4 + [1] * 2 + [FIRST] * 2, [0] * 4 + [1] * 2 + [FIRST] * 2),
    'SkipV1Former': split(OWN, [0] * 4 + [FIRST] * 4),
    'SVFormer': split(OWN, [FIRST] * 8),
    'no own head above layer 1': split([1] * 4 + [2] * 4, [1] * 4 + [2] * 4),
    'CLA': lambda l: [((l - l % 2, h),) * 2 for h in range(8)],
    'reflex_all oldest': lambda l: (
        [((l, h),) * 2 for h in range(8 - l)] + [((j, 7 - j),) * 2 for j in range(l)]
    ),
    'reflex_all values': lambda l: (
        [((l, h),) * 2 for h in range(8 - l)]
        + [((l, 8 - l + i), (l - 1 - i, 7 - (l - 1 - i))) for i in range(l)]
    ),
}


def read_value_residual(model, source):
    def read(l, h, past):
        (key_layer, _), (value_layer, _) = source(l)[h]
        keys, values = past[key_layer][0][:, :, h], past[value_layer][1][:, :, h]
        if value_layer == 0:
            return keys, values
        share = model.transformer.h[value_layer].attn.own_share  # of the layer that made the value
        return keys, share * values + (1 - share) * past[0][1][:, :, h]

    return read


def read_lime(model):
    def read(l, h, past):
        if l == 0:
            return past[0][0][:, :, h], past[0][1][:, :, h]
        router = model.transformer.h[l].attn.router.view(8, l + 1, 8)  # reader, layer, head that is read
        mixed = []
        for what in (0, 1):
            terms = [router[h, j, i] * past[j][what][:, :, i] for j in range(l + 1) for i in range(8)]
            mixed.append(torch.stack(terms).sum(0))
        return tuple(mixed)

    return read


def read_learned_split(model):
    def read(l, h, past):
        if l == 0:
            return past[0][0][:, :, h], past[0][1][:, :, h]
        logits = model.transformer.h[l].attn.allocation.view(2, l + 1, 8)
        mixed = []
        for what in (0, 1):
            weights = logits[what, :, h].exp() / logits[what, :, h].exp().sum()
            mixed.append(sum(weights[j] * past[j][what][:, :, h] for j in range(l + 1)))
        return tuple(mixed)

    return read


# what the plan alone would read; own values are mixed
RESIDUAL = {
    'value residual': split(OWN, OWN),
    'SkipV1Former, value residual': SOURCES['SkipV1Former'],
    'first 8/4-2-2, value residual': split(OWN, [0] * 4 + [1] * 2 + [FIRST] * 2),
}
MIXED = {
    **{variant: partial(read_value_residual, source=source) for variant, source in RESIDUAL.items()},
    'LIMe': read_lime,
    'learned split': read_learned_split,
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_outputs_and_gradients_equal_the_per_head_reference(variant):
    model = build(variant)
    check_against_reference(model, MIXED[variant](model) if variant in MIXED else read_plan(SOURCES[variant]))


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_parameter_has_a_gradient(variant):
    model = build(variant, qk_norm=True, bias=True)
    model(tokens(), tokens(1))[1].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_token_changes_nothing_before_it_and_all_after_it(variant):
    model, idx = build(variant), tokens(B=1)
    before = model(idx)[0]
    for t in (0, 7, 15):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 64
        differs = (model(changed)[0] != before).any(-1)[0]
        assert not differs[:t].any() and differs[t:].all(), t


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('position', ['learned', 'rotary'])
def test_cached_passes_equal_the_full_pass(variant, position):
    """In calls of 5, 1, 1 and 9 tokens: prefill, single steps, and a chunk after a past."""
    model = build(variant, position=position).eval()
    idx, cache, parts, at = tokens(), model.new_cache(2), [], 0
    for n in (5, 1, 1, 9):
        parts.append(model.lm_head(model.hidden(idx[:, at : at + n], cache)))
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=1e-10, atol=1e-10)
    prompt = tokens(B=1, T=3)
    greedy = model.generate(prompt, 30, temperature=0)
    assert torch.equal(greedy, model.generate(prompt, 30, temperature=0, use_cache=False))
    assert torch.equal(greedy, model.generate(prompt, 30, temperature=0, lookup=8))


@pytest.mark.parametrize('variant', VARIANTS)
def test_flops_are_those_that_torch_counts(variant):
    with torch.device('meta'):
        model = GPT(GPTConfig(**{**SMALL, **VARIANTS[variant], 'n_embd': 64}), seed=0)
        idx = torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    assert counter.get_total_flops() == 3 * 16 * model.flops_per_token(16, backward=False)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == 3 * 16 * model.flops_per_token()


def test_heads_produced():
    def produced(variant):
        return [block.attn.heads_produced() for block in build(variant).transformer.h]

    assert produced('SkipV1Former') == [(8, 8)] + [(8, 4)] * 5
    assert produced('SkipV1Former, value residual') == produced('SkipV1Former')
    assert produced('CLA') == [(8, 8), (0, 0)] * 3
    assert produced('first 6-2') == [(8, 8)] + [(6, 6)] * 5
    assert produced('own keys, values 4-2-2') == [(8, 8)] * 4 + [(8, 6), (8, 4)]
    assert produced('reflex_all values') == [(8, n) for n in (8, 7, 6, 5, 4, 3)]


def test_oldest_first_is_reflex_all_with_its_heads_in_another_order():
    """Permuting the queries' rows and c_proj's columns turns one into the other: a control that must tie."""
    oldest = build('reflex_all oldest')
    nearest = GPT(GPTConfig(**SMALL, attention='reflex_all'), seed=0).double()
    state = copy.deepcopy(oldest.state_dict())
    for l in range(6):
        order = [*range(8 - l), *range(7, 7 - l, -1)]  # heads of `oldest` in the order of `nearest`
        rows = [h * 4 + i for h in order for i in range(4)]
        name = f'transformer.h.{l}.attn.'
        state[name + 'c_attn.weight'][:32] = state[name + 'c_attn.weight'][rows].clone()
        state[name + 'c_proj.weight'] = state[name + 'c_proj.weight'][:, rows]
    state['_extra_state'] = nearest.get_extra_state()
    nearest.load_state_dict(state)
    torch.testing.assert_close(nearest(tokens())[0], oldest(tokens())[0], rtol=1e-10, atol=1e-10)


def test_shared_initial_values_and_published_starting_points():
    vanilla = dict(GPT(GPTConfig(**SMALL), seed=7).named_parameters())
    for attention in ('value_residual', 'lime', 'learned_split'):
        model = GPT(GPTConfig(**SMALL, attention=attention), seed=7)
        own = {name: p for name, p in model.named_parameters() if name not in vanilla}
        assert len(own) == 5 and all(
            torch.equal(p, vanilla[n]) for n, p in model.named_parameters() if n in vanilla
        )
        again = dict(GPT(GPTConfig(**SMALL, attention=attention), seed=7).named_parameters())
        assert all(torch.equal(p, again[name]) for name, p in own.items())
    lime = GPT(GPTConfig(**SMALL, attention='lime'), seed=7).transformer.h[5].attn.router
    assert torch.equal(lime[:, -8:], torch.eye(8))
    assert lime[:, :-8].std().item() == pytest.approx(48**-0.5, rel=0.15)
    shares = GPT(GPTConfig(**SMALL, attention='learned_split'), seed=7).transformer.h[3].attn.shares()
    torch.testing.assert_close(shares[:, 3], torch.full((2, 8), 0.5))
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 8))
    other = GPT(GPTConfig(**SMALL, attention='lime'), seed=8).transformer.h[5].attn.router
    assert not torch.equal(other, lime)


def test_weight_decay_does_not_even_out_what_is_learned_per_layer():
    """λ and the shares are no matrices, so they do not decay. LIMe's router is one and does."""
    for attention, decays in (('value_residual', False), ('learned_split', False), ('lime', True)):
        model = GPT(GPTConfig(**SMALL, attention=attention), seed=0)
        decayed = {
            id(p) for p in model.configure_optimizers(0.1, 1e-3, (0.9, 0.98), 'cpu').param_groups[0]['params']
        }
        own = [p for n, p in model.named_parameters() if n.endswith(('own_share', 'allocation', 'router'))]
        assert [id(p) in decayed for p in own] == [decays] * 5


def test_mixers_do_not_load_into_one_another():
    """Nor into the plan that they stand on, whose weights are the same except what mixes."""
    plans = {
        'value_residual': 'vanilla',
        'first_residual': 'first',
        'lime': 'vanilla',
        'learned_split': 'vanilla',
    }
    for attention, plan in plans.items():
        alone = GPT(GPTConfig(**SMALL, attention=plan), seed=0)
        with pytest.raises((RuntimeError, ValueError)):
            alone.load_state_dict(GPT(GPTConfig(**SMALL, attention=attention), seed=0).state_dict())


def test_a_value_residual_mixes_the_same_head_of_layer_0(monkeypatch):
    """Here the first half of the heads take layer 0's values: those of the second half are a layer's own."""

    def skip_first(shape):
        half = shape.n_head // 2
        return [
            [Head((l, h), (l if h >= half else 0, h)) for h in range(shape.n_head)]
            for l in range(shape.n_layer)
        ]

    monkeypatch.setitem(ATTENTIONS, 'skip_first', Kind(ValueResidualAttention, skip_first))
    monkeypatch.setitem(VARIANTS, 'skip_first', {'attention': 'skip_first'})
    model = build('skip_first')
    assert model.transformer.h[1].attn.first == [4, 5, 6, 7]
    check_against_reference(model, read_value_residual(model, split(OWN, [FIRST] * 4 + [0] * 4)))


def test_a_value_residual_refuses_to_mix_with_a_head_that_is_not_made(monkeypatch):
    """All of layer 0 reads head 0."""

    def one_head(shape):
        return [[Head((l, h), (l, h if l else 0)) for h in range(shape.n_head)] for l in range(shape.n_layer)]

    monkeypatch.setitem(ATTENTIONS, 'one_head', Kind(ValueResidualAttention, one_head))
    with pytest.raises(ValueError, match=r'layer 0 makes no values for heads \[1, 2, 3, 4, 5, 6, 7\]'):
        GPTConfig(**SMALL, attention='one_head')


@pytest.mark.parametrize('head_split', ['8/', '/8', '8/4-2-1', '4-4/8/8', '8/4--4'])
def test_a_split_of_keys_and_values_that_does_not_fit_is_refused(head_split):
    with pytest.raises(ValueError, match='head split'):
        GPTConfig(**SMALL, attention='reflex', head_split=head_split)
