"""Every attention of the registry against all that layers/contract.py asks of it: a new one is tested by
being there. What an attention computes is held against a reference in a test file of its own."""

import copy
import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import explain
from conftest import random_gpt, small_specs
from decoding import Decoder
from hierarchy import Hierarchy, HierarchyConfig
from layers.contract import PADDING, Attention
from layers.positions import POSITIONS
from layers.registry import ATTENTIONS
from layers.spec import canonical, parse
from model import GPT, GPTConfig
from runs import checkpoint
from tiny import assert_same_run, resume, start, write_tokens

SPECS = small_specs()
SIZE = {'block_size': 24, 'vocab_size': 64, 'n_layer': 4, 'n_head': 4, 'n_embd': 32}


def layer_class(spec) -> type[Attention]:
    return ATTENTIONS[parse(canonical(spec))[0].name].layer


def positions(spec):
    """The kinds of position that the attention may be used with."""
    return [name for name, position in POSITIONS.items() if layer_class(spec).rotates or not position.turns]


def model_of(spec, **changes) -> GPT:
    """In float64, with weights far from their start."""
    return random_gpt(GPTConfig(**{**SIZE, 'attention': spec, **changes}), std=0.2).double()


def tokens(B=2, T=24, seed=1):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=SPECS)
def spec(request):
    return request.param


def test_every_member_of_the_contract_is_there(spec):
    for block in model_of(spec).transformer.h:
        attn = block.attn
        assert isinstance(attn, Attention) and attn.padding in PADDING
        assert isinstance(attn.describe(), str) and '\n' not in attn.describe()
        assert attn.flops_per_token(24) >= 0 and attn.backward_flops_per_token(24) >= 0
        assert attn.cache_bytes_per_token(2) >= 0 and attn.state_bytes(2) >= 0
        assert len(attn.heads_produced()) == 2
    assert inspect.getdoc(layer_class(spec))


def test_causal(spec):
    """A token changes nothing before it, and something at every place from itself on."""
    model, idx = model_of(spec), tokens(B=1)
    before = model(idx)[0]
    for t in (0, 1, 11, 23):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 64
        differs = (model(changed)[0] != before).any(-1)[0]
        assert not differs[:t].any() and differs[t], t


@pytest.mark.parametrize('split', [[24], [1] * 24, [5, 1, 1, 9, 8], [17, 1, 6]], ids=str)
def test_cached_passes_equal_the_whole_one(spec, split):
    for position in positions(spec):
        model, idx = model_of(spec, position=position), tokens()
        cache = model.new_cache(2)
        with torch.no_grad():
            parts = [model.hidden(part, cache) for part in idx.split(split, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), model.hidden(idx), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_cache_keeps_the_sequences_that_are_selected(spec):
    model, idx = model_of(spec), tokens(B=3)
    cache = model.new_cache(3)
    model.hidden(idx[:, :10], cache)
    rows = torch.tensor([2, 0, 0])
    cache.select(rows)
    after = model.hidden(idx[rows, 10:], cache)
    torch.testing.assert_close(after, model.hidden(idx[rows])[:, 10:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_cache_that_rewinds_forgets(spec):
    model, idx, other = model_of(spec), tokens(), tokens(seed=2)
    cache = model.new_cache(2)
    if not cache.rewinds:
        assert not hasattr(cache.layers[-1], 'rewind')
        return
    model.hidden(idx[:, :9], cache)
    model.hidden(other[:, :7], cache)
    cache.rewind(9)
    after = model.hidden(idx[:, 9:], cache)
    torch.testing.assert_close(after, model.hidden(idx)[:, 9:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_steps_of_fixed_shapes_equal_the_whole_pass(spec):
    """After a prompt, and again at places that hold other tokens by then."""
    for position in positions(spec):
        model, idx, other = model_of(spec, position=position), tokens(), tokens(seed=2)
        if not model.steps:
            assert not layer_class(spec).publishes
            with pytest.raises(ValueError, match='takes no step of fixed shapes'):
                Decoder(model, 2)
            return
        decoder = Decoder(model, 2)
        model.hidden(other[:, :20], decoder.cache)
        decoder.cache.rewind(0)
        model.hidden(idx[:, :7], decoder.cache)
        parts = [decoder.step(idx[:, t : t + 1], t) for t in range(7, 24)]
        wanted = model.logits(model.hidden(idx))[:, 7:].float()
        torch.testing.assert_close(torch.stack(parts, 1), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('where', ['right', 'left', 'anywhere'])
def test_padding_does_not_count_where_the_layer_says_so(spec, where):
    """Real tokens get what they get without the padding, in one pass and through the cache."""
    model = model_of(spec)
    if PADDING.index(model.padding) < PADDING.index(where):
        pytest.skip(f'it promises {model.padding} alone')
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1] = torch.tensor(
        {
            'right': [1] * 15 + [0] * 9,
            'left': [0] * 9 + [1] * 15,
            'anywhere': [1] * 4 + [0] * 5 + [1] * 8 + [0] * 4 + [1] * 3,
        }[where]
    ).bool()
    pos = (real.cumsum(1) - 1).clamp(min=0)
    idx = tokens()
    alone = model.hidden(idx[1:, real[1]])[0]
    seen = None if where == 'right' else real
    torch.testing.assert_close(model.hidden(idx, None, pos, seen)[1, real[1]], alone, rtol=1e-9, atol=1e-9)
    cache, parts, at = model.new_cache(2), [], 0
    for n in (6, 1, 9, 8):
        part = slice(at, at + n)
        own = None if seen is None else seen[:, : at + n]
        parts.append(model.hidden(idx[:, part], cache, pos[:, part], own))
        at += n
    torch.testing.assert_close(torch.cat(parts, 1)[1, real[1]], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('T', [1, 24])
def test_flops_are_those_that_torch_counts(spec, T):
    with torch.device('meta'):
        model = GPT(GPTConfig(**SIZE, attention=spec), seed=0)
        idx = torch.zeros(3, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    assert counter.get_total_flops() == round(3 * T * model.flops_per_token(T, backward=False))
    if T > 1:
        with FlopCounterMode(display=False) as counter:
            model(idx, idx)[1].backward()
        assert counter.get_total_flops() == round(3 * T * model.flops_per_token(T))


def tensor_bytes(state) -> int:
    """Of all tensors that an object holds."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    if isinstance(state, (list, tuple)):
        return sum(map(tensor_bytes, state))
    return sum(map(tensor_bytes, vars(state).values())) if hasattr(state, '__dict__') else 0


@torch.no_grad()
def test_the_state_is_as_large_as_it_is_said_to_be(spec):
    """Of a context of block_size tokens."""
    model = model_of(spec).float()
    cache = model.new_cache(1)
    model.hidden(tokens(B=1), cache)
    for block, state in zip(model.transformer.h, cache.layers, strict=True):
        said = 24 * block.attn.cache_bytes_per_token(4) + block.attn.state_bytes(4)
        assert tensor_bytes(state) == said, block.attn.describe()


@torch.no_grad()
def test_a_bounded_state_stops_growing_and_its_context_is_endless(spec):
    bounded = layer_class(spec).bounded
    model = model_of(spec, position='none')
    assert (model.context_limit == float('inf')) == bounded
    assert model_of(spec, position='learned').context_limit == 24
    if bounded:
        model, idx = model.float(), tokens(T=90)
        assert all(block.attn.cache_bytes_per_token(2) == 0 for block in model.transformer.h)
        cache = model.new_cache(2)
        parts = [model.hidden(part, cache) for part in idx.split([50, 1, 39], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(idx), rtol=1e-3, atol=1e-4)
        assert tensor_bytes(cache.layers) == 2 * model.state_bytes(4)


def test_every_parameter_has_a_gradient_and_starts_by_the_seed_alone(spec):
    config = GPTConfig(**SIZE, attention=spec, bias=True, qk_norm=layer_class(spec).has_scores)
    torch.manual_seed(0)
    model = GPT(config, seed=5)
    torch.manual_seed(1)
    again = GPT(config, seed=5)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    model(tokens(), tokens(seed=2))[1].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_weights_go_through_a_checkpoint_and_into_no_other_model(spec, tmp_path):
    model = model_of(spec)
    checkpoint.save({'model': model.state_dict()}, tmp_path)
    saved = torch.load(tmp_path / 'last.pt', weights_only=True)['model']
    loaded = GPT(model.config, seed=9).double()
    loaded.load_state_dict(saved)
    assert torch.equal(loaded(tokens())[0], model(tokens())[0])
    other = 'vanilla' if spec != 'vanilla' else 'reflex(3-1)'
    with pytest.raises((RuntimeError, ValueError)):
        GPT(GPTConfig(**SIZE, attention=other), seed=0).load_state_dict(saved)


def test_a_run_resumes_bit_for_bit(spec, tmp_path):
    data = write_tokens(tmp_path / 'tokens')
    knobs = {'attention': spec, 'n_layer': 4, 'max_iters': 6, 'lr_decay_iters': 6, 'eval_interval': 3}
    start(tmp_path / 'straight', data, **knobs)
    start(tmp_path / 'resumed', data, **{**knobs, 'max_iters': 3})
    resume(tmp_path / 'resumed', max_iters=6)
    assert_same_run(tmp_path / 'straight', tmp_path / 'resumed')


@torch.no_grad()
def test_beside_reflex_layers(spec):
    """Below two of them, and where it publishes nothing, above them."""
    mixed = [f'{spec}*2 reflex(3-1)*2']
    if layer_class(spec).publishes and not layer_class(spec).published_past:
        mixed = [f'vanilla*2 {spec}*2']
    elif not layer_class(spec).publishes:
        mixed += [f'reflex(2-2)*2 {spec}*2']
    for attention in mixed:
        model, idx = model_of(attention), tokens()
        cache = model.new_cache(2)
        parts = [model.hidden(part, cache) for part in idx.split([9, 1, 14], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(idx), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_inside_the_hierarchy(spec):
    shape = {'groups': 6, 'latents': '2', 'widths': '32-32', 'local_blocks': '1-0', 'global_blocks': '0'}
    if layer_class(spec).reads_tokens:
        with pytest.raises(ValueError, match='works on latents'):
            HierarchyConfig(**SIZE, **shape, attention=spec)
        return
    config = HierarchyConfig(**SIZE, **shape, attention=spec)
    model, idx = random_gpt(config, std=0.1).double(), tokens()
    assert isinstance(model, Hierarchy)
    cache = model.new_cache(2)
    parts = [model.hidden(part, cache) for part in idx.split([9, 1, 14], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(idx), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_through_transformers_and_back(spec, tmp_path):
    """Same logits; a padded batch generates what its texts generate alone, or says that it does not."""
    pytest.importorskip('transformers')
    import hf

    model = model_of(spec, vocab_used=64).float()
    hf.export(model, None, tmp_path)
    loaded = hf.ReflexForCausalLM.from_pretrained(tmp_path).eval()
    idx = tokens(T=12)
    torch.testing.assert_close(loaded(idx).logits, model(idx)[0], rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    options = {'max_new_tokens': 8, 'do_sample': False, 'pad_token_id': 0}
    if model.padding == 'right':
        with pytest.raises(ValueError, match='padding goes to the right alone'):
            loaded.generate(idx, attention_mask=mask, **options)
    else:
        alone = loaded.generate(idx[1:, 5:], **options)[0, 7:]
        assert torch.equal(loaded.generate(idx, attention_mask=mask, **options)[1, 12:], alone)


def test_explain_opens(spec):
    """It shows views of all layers, or none; it never ends in a traceback."""
    views = explain.look(model_of(spec).float(), list(range(12)))
    assert {view.title.split(':')[0] for view in views} in ({f'layer {l}' for l in range(4)}, set())
    for view in views:
        assert view.weights().shape == (4, 12)


def test_the_spec_travels_as_one_string(spec):
    config = GPTConfig(**SIZE, attention=spec)
    assert canonical(config.attention) == config.attention
    assert GPTConfig(**{**SIZE, 'attention': config.attention}) == config
    assert copy.deepcopy(config) == config and model_of(spec).summary().startswith(config.attention)
