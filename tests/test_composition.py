"""The composed model against a reference of single tokens; its start, causality, cache, gates, costs."""

import math
import time
from dataclasses import asdict, fields, replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from composition import Composed, ComposedConfig, Expert, ExpertHead, parse_reads
from configurator import ConfigError
from model import GPT, GPTConfig
from runs.text import finite_logits

BASE = GPTConfig(block_size=24, vocab_size=64, n_layer=4, n_head=4, n_embd=32)
EXPERTS = {  # of other widths, depths, positions and attentions than the base
    'wide': replace(BASE, n_embd=48, n_layer=3, position='rotary', block_size=32),
    'deep': replace(BASE, n_embd=16, n_layer=6),
    'split': replace(BASE, attention='reflex(2-2)', n_head=4),
}
KINDS = {
    'all': {},
    'one per token': {'top_k': 1},
    'one per text': {'top_k': 1, 'route': 'text'},
    'two per token': {'top_k': 2},
    'threshold': {'threshold': 0.6},
    'high threshold': {'threshold': 0.9},
    'both, per text': {'top_k': 2, 'threshold': 0.4, 'route': 'text'},
    'modern base': {'position': 'rotary', 'qk_norm': True, 'bias': True, 'norm': 'rmsnorm', 'top_k': 1},
    'reflex base': {'attention': 'reflex(2-2)', 'reads': '1(heads=4, depth=2) 3', 'top_k': 2},
    'windows': {'attention': 'vanilla(window=5)', 'top_k': 1},
    'shares of the embedding': {'x0_skip': True, 'softcap': 5.0, 'tied': False},
    'lowest layer': {'reads': '0(heads=1, depth=1)', 'top_k': 1},
    'voices': {'voice': True},
    'voices, one per text': {'voice': True, 'top_k': 1, 'route': 'text'},
    'voices, threshold': {'voice': True, 'threshold': 0.6, 'tied': False, 'softcap': 5.0},
}


def composed_config(experts=EXPERTS, **changes) -> ComposedConfig:
    own = {name: value for name, value in changes.items() if name in {f.name for f in fields(GPTConfig)}}
    rest = {name: value for name, value in changes.items() if name not in own}
    base = {f.name: getattr(replace(BASE, **own), f.name) for f in fields(GPTConfig)}
    members = tuple(Expert(name, f'print of {name}', config) for name, config in experts.items())
    return ComposedConfig(**base, experts=members, **rest)


def make(std=0.2, seed=1, **changes) -> Composed:
    """A model in float64 whose weights are all random, and whose gates differ among tokens."""
    model = Composed(composed_config(**changes), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.empty_like(p).normal_(0.0, std, generator=generator))
        if model.config.voice:  # shares whose sum is more than 1 for some tokens, and less for others
            for i, joint in enumerate(model.joints.values()):
                joint.strength.fill_(0.4 + 0.3 * i)
    return model.double()


def tokens(B=3, T=24, seed=0):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


def gates_of(model, *args, **options):
    """What the router keeps in one pass, (B, T, experts)."""
    kept = []
    handle = model.router.register_forward_hook(lambda module, inputs, gates: kept.append(gates))
    with torch.no_grad():
        model.hidden(*args, **options)
    handle.remove()
    return kept[0]


# -----------------------------------------------------------------------------
# What it computes


def states_of(gpt, row):
    """The stream of a GPT for ids (T,): [after 0 blocks, after 1, …], each (T, C)."""
    x, memory = gpt.embed(row[None])
    states = [x[0]]
    for i in range(len(gpt.transformer.h)):
        x = gpt.block(i, x, memory)
        states.append(x[0])
    return states


def reference(model, row):
    """Ids (T,) -> what the head reads (T, C), token by token and head by head, for a base that is vanilla
    with learned positions."""
    c, t, hs, T = model.config, model.transformer, model.config.head_size, len(row)
    experts = [states_of(expert, row) for expert in model.experts.values()]
    x = t.wte.weight[row] + t.wpe.weight[:T]
    gates = None
    for l, block in enumerate(t.h):
        if l == c.read_list()[0].layer:
            normed = x / (x.square().mean(1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
            gates = torch.stack(
                [torch.sigmoid(normed @ j.gate.weight + j.gate.bias) for j in model.joints.values()], dim=1
            )
            scores = gates
            if c.route == 'text':
                scores = torch.stack([gates.logit()[: i + 1].mean(0) for i in range(T)]).sigmoid()
            for i in range(T):
                best = sorted(range(len(experts)), key=lambda e, i=i: -scores[i, e])
                for place, e in enumerate(best):
                    if scores[i, e] < c.threshold or (c.top_k and place >= c.top_k):
                        gates[i, e] = 0
        rows = block.attn.c_attn.weight.chunk(3)
        q, k, v = (block.ln_1(x) @ w.T for w in rows)
        y = torch.zeros_like(x)
        for i in range(T):
            for h in range(c.n_head):
                cut = slice(h * hs, (h + 1) * hs)
                weights = (q[i, cut] @ k[: i + 1, cut].T / math.sqrt(hs)).softmax(0)
                y[i, cut] = weights @ v[: i + 1, cut]
        x = x + y @ block.attn.c_proj.weight.T
        x = x + block.mlp(block.ln_2(x))
        read = next((r for r in c.read_list() if r.layer == l), None)
        if read is None:
            continue
        for e, joint in enumerate(model.joints.values()):
            own = len(experts[e]) - 1
            s = experts[e][read.depth or max(1, round((l + 1) * own / c.n_layer))]
            s = s / (s.square().mean(1, keepdim=True) + torch.finfo(s.dtype).eps).sqrt()
            reading = joint.reads[str(l)]
            wk, wv = reading.c_kv.weight.chunk(2)
            for i in range(T):
                heads = []
                for n, h in enumerate(range(c.n_head - read.heads, c.n_head)):
                    own = slice(n * hs, (n + 1) * hs)
                    keys, values = s[: i + 1] @ wk[own].T, s[: i + 1] @ wv[own].T
                    weights = (q[i, h * hs : (h + 1) * hs] @ keys.T / math.sqrt(hs)).softmax(0)
                    heads.append(weights @ values)
                found = reading.c_proj.weight @ torch.cat(heads) + reading.c_same.weight @ s[i]
                x[i] = x[i] + gates[i, e] * found
    return t.ln_f(x)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'top_k': 1},
        {'top_k': 1, 'route': 'text'},
        {'threshold': 0.6, 'top_k': 2},
        {'reads': '0(heads=1) 2(heads=3, depth=2)', 'top_k': 2},
        {'voice': True, 'top_k': 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_it_equals_the_reference_of_single_tokens(changes):
    model = make(**changes)
    idx = tokens(2, 12)
    wanted = torch.stack([reference(model, row) for row in idx])
    torch.testing.assert_close(model.hidden(idx)[..., :32], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_new_one_computes_what_its_base_computes_bit_for_bit(kind, dtype):
    config = composed_config(**KINDS[kind])
    model = Composed(config, seed=3).eval()
    base = GPT(GPTConfig(**{f.name: getattr(config, f.name) for f in fields(GPTConfig)}), seed=3).eval()
    idx = tokens()
    with torch.no_grad(), torch.autocast('cpu', dtype, enabled=dtype == torch.bfloat16):
        wanted = base.logits(base.hidden(idx))
        assert torch.equal(model.logits(model.hidden(idx)), wanted)
        cache, own = model.new_cache(3), base.new_cache(3)
        for i in range(24):
            one, wanted = (m.logits(m.hidden(idx[:, i : i + 1], c)) for m, c in ((model, cache), (base, own)))
            assert torch.equal(one, wanted)
    with torch.no_grad():
        for p in model.joints.parameters():
            p.add_(0.1)
        for joint in model.joints.values():
            joint.gate.bias.fill_(5)
        assert not torch.equal(model(idx)[0], base(idx)[0])


VOICES = [kind for kind, changes in KINDS.items() if 'voice' in changes]


@pytest.mark.parametrize('vocab', [None, 50])
@pytest.mark.parametrize('kind', VOICES)
@torch.no_grad()
def test_voices_are_a_mixture_of_probabilities(kind, vocab):
    """Token by token, against the models by themselves."""
    model, idx = make(**KINDS[kind]), tokens(2, 12)
    gates, hidden, sums = gates_of(model, idx), model.hidden(idx), []
    same = Composed(replace(model.config, top_k=0, threshold=0.0), seed=0).double()
    same.load_state_dict({**model.state_dict(), '_extra_state': same.get_extra_state()})
    of_all = gates_of(same, idx)
    found = model.logits(hidden, vocab).softmax(2)
    for b, t in [(b, t) for b in range(2) for t in range(12)]:
        p = GPT.logits(model, hidden[b, t, :32], vocab).softmax(0)
        strengths = [joint.strength for joint in model.joints.values()]
        shares = [g * s for g, s in zip(gates[b, t], strengths, strict=True)]
        whole = sum(g * s for g, s in zip(of_all[b, t], strengths, strict=True))
        sums.append(whole)
        if sum(shares):  # what the others would have had goes to those that are chosen
            shares = [share / sum(shares) * min(1, whole) for share in shares]
        mixed = (1 - sum(shares)) * p
        for share, expert in zip(shares, model.experts.values(), strict=True):
            mixed += share * expert.logits(expert.hidden(idx[b : b + 1]), vocab)[0, t].softmax(0)
        torch.testing.assert_close(found[b, t], mixed, rtol=1e-9, atol=1e-12)
    assert kind != 'voices' or min(sums) < 1 < max(sums)


@pytest.mark.parametrize('kind', VOICES)
@pytest.mark.parametrize('new', [False, True])
def test_the_loss_of_voices_is_that_of_their_logits_with_its_gradient(kind, new, monkeypatch):
    """Also in pieces, and where no expert has a share yet."""
    model, idx = make(**{**KINDS[kind], 'threshold': 0.0} if new else KINDS[kind]), tokens()
    if new:
        model.init_joints(3)
    targets = tokens(seed=4).masked_fill(tokens(seed=5) < 9, -1)

    def gradients(loss):
        given = torch.autograd.grad(loss, list(model.joints.parameters()))
        return dict(zip(dict(model.joints.named_parameters()), given, strict=True))

    log_p = model.logits(model.hidden(idx)).log_softmax(2)
    wanted = F.nll_loss(log_p.flatten(0, 1), targets.flatten(), ignore_index=-1)
    of_logits = gradients(wanted) if not new else None
    for rows in (512, 7):
        monkeypatch.setattr('layers.loss.LOGITS', 0)
        monkeypatch.setattr('layers.loss.ROWS', {'cpu': rows, 'cuda': rows})
        found = model(idx, targets)[1]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
        for name, gradient in gradients(found).items():
            if of_logits:
                torch.testing.assert_close(gradient, of_logits[name], rtol=1e-7, atol=1e-12, msg=name)
            elif name.endswith('strength') and gates_of(model, idx).any():
                assert gradient != 0, name


def test_logits_that_are_not_finite_are_seen_in_experts_too():
    model, idx = make(voice=True), tokens()
    with torch.no_grad(), finite_logits(model):
        model(idx)
        model.experts['deep'].lm_head.weight[3] = math.inf
        with pytest.raises(ConfigError, match='inf or nan'):
            model(idx)


def test_a_strength_below_zero_counts_as_zero_and_finds_its_way_back():
    model, idx = make(voice=True), tokens()
    with torch.no_grad():
        model.joints['deep'].strength.fill_(-0.3)
        out = model(idx)[0]
    model(idx, tokens(seed=1))[1].backward()
    assert model.joints['deep'].strength.grad != 0
    with torch.no_grad():
        model.joints['deep'].strength.fill_(0)
        assert torch.equal(model(idx)[0], out)


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_tokens_depend_on_those_before_alone(kind):
    model, idx = make(**KINDS[kind]), tokens()
    other = idx.clone()
    other[:, 15:] = (other[:, 15:] + 7) % 64
    one, changed = model.hidden(idx), model.hidden(other)
    assert torch.equal(one[:, :15], changed[:, :15]) and not torch.allclose(one[:, 15], changed[:, 15])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sizes', [[1] * 24, [5, 1, 1, 14, 3], [24]], ids=len)
@torch.no_grad()
def test_a_cache_changes_nothing(kind, sizes):
    model, idx = make(**KINDS[kind]), tokens()
    wanted, cache, found, at = model.hidden(idx), model.new_cache(3), [], 0
    for n in sizes:
        found.append(model.hidden(idx[:, at : at + n], cache))
        at += n
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-9, atol=1e-9)
    assert cache.length == 24 and all(state.length <= 24 for state in cache.experts.values())


@torch.no_grad()
def test_a_cache_is_rewound_and_its_rows_are_chosen():
    model, idx = make(top_k=1), tokens()
    cache = model.new_cache(3)
    model.hidden(idx[:, :20], cache)
    assert cache.rewinds
    cache.rewind(11)
    torch.testing.assert_close(model.hidden(idx[:, 11:], cache), model.hidden(idx)[:, 11:])
    cache = model.new_cache(3)
    model.hidden(idx[:, :20], cache)
    rows = torch.tensor([2, 2, 0, 1])
    cache.select(rows)
    torch.testing.assert_close(model.hidden(idx[rows, 20:], cache), model.hidden(idx[rows])[:, 20:])
    # not even before the expert has run: a guess that is taken back may be what asks for it
    assert not make(experts={'leap': replace(BASE, attention='leap')}).new_cache(1).rewinds


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(kind):
    model = make(**KINDS[kind])
    assert model.padding in ('left', 'anywhere')
    texts = [tokens(1, T, seed=T) for T in (9, 14, 4)]
    batch = torch.cat([F.pad(text, (14 - text.size(1), 0), value=5) for text in texts])
    real = torch.stack([torch.arange(14) >= 14 - text.size(1) for text in texts])
    pos = (real.cumsum(1) - 1).clamp(min=0)
    cache, found = model.new_cache(3), []
    for at, n in ((0, 10), (10, 1), (11, 3)):
        found.append(model.hidden(batch[:, at : at + n], cache, pos[:, at : at + n], real[:, : at + n]))
    for name, hidden in {'full': model.hidden(batch, None, pos, real), 'cache': torch.cat(found, 1)}.items():
        for row, text in zip(hidden, texts, strict=True):
            wanted = model.hidden(text)[0]
            torch.testing.assert_close(row[-len(wanted) :], wanted, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize('kind', ['all', 'one per token', 'both, per text', *VOICES])
def test_generation_is_the_same_with_and_without_a_cache_and_guesses(kind):
    model = make(**KINDS[kind]).float()
    prompt = tokens(1, 5)
    texts = [
        model.generate(prompt, 40, temperature=0, use_cache=cache, lookup=lookup)  # beyond the context
        for cache, lookup in ((True, 0), (False, 0), (True, 8))
    ]
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


# -----------------------------------------------------------------------------
# Gates


@torch.no_grad()
def test_the_router_keeps_what_it_says():
    idx = tokens()
    plain = gates_of(make(), idx)
    assert (plain > 0).all() and plain.std() > 0.1
    for k in (1, 2):
        kept = gates_of(make(top_k=k), idx)
        assert ((kept > 0).sum(2) == k).all()
        assert torch.equal(kept[kept > 0], plain[kept > 0])
        least, most_of_others = (
            kept.masked_fill(kept == 0, 2).amin(2),
            plain.masked_fill(kept > 0, -1).amax(2),
        )
        assert (least > most_of_others).all()
    kept = gates_of(make(threshold=0.6), idx)
    assert torch.equal(kept > 0, plain >= 0.6) and len((kept > 0).sum(2).unique()) > 1  # the number varies
    means = plain.logit().cumsum(1) / torch.arange(1, 25)[:, None]  # of scores, whose sigmoids are the gates
    kept = gates_of(make(top_k=1, route='text'), idx)
    assert torch.equal(kept.argmax(2), means.argmax(2)) and torch.equal(
        kept.amax(2), plain.gather(2, means.argmax(2, keepdim=True)).squeeze(2)
    )


@torch.no_grad()
def test_experts_that_no_token_asks_for_are_not_run(monkeypatch):
    model, idx = make(top_k=1, route='text'), tokens(6)
    ran = {}

    def noted(self, name, T, ids, *others):
        ran.setdefault(name, []).append(tuple(ids.shape))
        return real_run(self, name, T, ids, *others)

    real_run = Composed.run
    monkeypatch.setattr(Composed, 'run', noted)
    asked = (gates_of(model, idx) > 0).any(1)  # (B, experts)
    assert not asked.all() and asked.any(0).sum() >= 2, asked
    for e, name in enumerate(model.joints):
        wanted = [(int(asked[:, e].sum()), 24)] if asked[:, e].any() else []
        assert ran.get(name, []) == wanted
    cache, late = model.new_cache(1), []
    for i in range(24):
        ran.clear()
        model.hidden(idx[:1, i : i + 1], cache)
        late += [(i, name, shapes[0][1]) for name, shapes in ran.items()]
    assert len(late) == 24  # one expert per token
    seen = dict.fromkeys(model.joints, 0)
    for i, name, n in late:
        assert n == i + 1 - seen[name]  # all tokens that it has missed
        seen[name] = i + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('kind', ['all', 'one per text'])
@torch.no_grad()
def test_experts_run_on_streams_of_their_own(kind):
    model, idx = make(**KINDS[kind]).cuda(), tokens().cuda()
    with torch.enable_grad():
        wanted = model.hidden(idx).detach()  # one after the other
    for _ in range(20):
        torch.testing.assert_close(model.hidden(idx), wanted, rtol=1e-9, atol=1e-9)
    cache = model.new_cache(3)
    found = [model.hidden(idx[:, i : i + 1], cache) for i in range(24)]
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-9, atol=1e-9)


# -----------------------------------------------------------------------------
# Costs


CPU = GPTConfig(block_size=256, vocab_size=4096, n_layer=6, n_head=8, n_embd=128)  # of size_cpu


def counted(model, *args) -> int:
    """FLOPs of a forward pass, of attention too."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops()


@torch.no_grad()
def seconds(run) -> float:
    """The fastest of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize('kind', ['all', 'reflex base', 'lowest layer', 'voices'])
def test_flops_are_those_that_torch_counts(kind):
    with torch.device('meta'):
        model = Composed(composed_config(**{**KINDS[kind], 'top_k': 0}), seed=0)
        idx = torch.zeros(3, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx)
    assert counter.get_total_flops() == 72 * model.flops_per_token(backward=False)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    # the first layer that reads needs no gradient of its queries, which kernels that fuse attention compute
    first = [joint.reads[str(model.first_read)] for joint in model.joints.values()]
    spared = sum(reading.flops_per_token(24) / 2 for reading in first)
    assert counter.get_total_flops() == 72 * (model.flops_per_token() - spared)


@pytest.mark.parametrize('voice', [True, False])
@pytest.mark.parametrize('k', [1, 2, 4])
def test_composing_k_of_n_costs_little_more_than_the_models_that_run(k, voice):
    """At the size of config/sizes/size_cpu.py; the parts without heads that are not run."""
    experts = dict.fromkeys('abcd', CPU)
    config = composed_config(experts, **{**asdict(CPU), 'top_k': k, 'route': 'text', 'voice': voice})
    model = Composed(config, seed=0).eval()
    for i, joint in enumerate(model.joints.values()):  # all texts ask for the same experts
        torch.nn.init.constant_(joint.gate.bias, -i)
    idx = tokens(2, 256)
    base = GPT(CPU, seed=0).eval()
    alone = counted(base, idx)
    head = 0 if voice else 2 * base.lm_head.weight.numel() * idx.numel()
    found, parts = counted(model, idx), alone + k * (alone - head)
    assert found <= 1.1 * parts
    assert found == idx.numel() * model.flops_per_token(backward=False)
    expert = base if voice else base.hidden
    ratio = seconds(lambda: model(idx)) / (seconds(lambda: base(idx)) + k * seconds(lambda: expert(idx)))
    print(
        f'{k} of 4 experts{" that speak" * voice}: {found / parts:.3f} times the FLOPs, {ratio:.2f} times '
        'the seconds of the parts'
    )


def held_for_backward(model, idx) -> int:
    """Bytes that autograd keeps beside the weights, each once, however many tensors look at them."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        memory = x.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(idx, idx)[1]
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize('voice', [True, False])
def test_training_the_joints_needs_little_of_the_memory_of_fine_tuning(voice):
    """Activations that are kept, and 3 numbers per trained weight: its gradient and two of the optimizer."""
    experts = dict.fromkeys('abcd', CPU)
    config = composed_config(experts, **asdict(CPU), voice=voice)
    model, base = Composed(config, seed=0), GPT(CPU, seed=0)
    idx = tokens(4, 256)
    needs = []
    for m in (model.train(), base):
        trained = sum(p.numel() for p in m.parameters() if p.requires_grad)
        needs.append(held_for_backward(m, idx) + 12 * trained)
    assert needs[0] <= 0.6 * needs[1], needs
    print(
        f'4 experts joined{", voices" * voice}: {needs[0] / needs[1]:.2f} of what fine-tuning the base needs'
    )


@pytest.mark.parametrize('voice', [True, False])
def test_no_frozen_weight_gets_a_gradient(voice):
    model = make(voice=voice).float().train()
    model(tokens(), tokens(seed=1))[1].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.startswith('joints.'), name
    assert all(p.grad.abs().sum() > 0 for p in model.joints.parameters())


def test_dropout_of_the_parts_stays_off():
    model = Composed(composed_config(dropout=0.5), seed=0).train()
    assert torch.equal(model.hidden(tokens()), model.hidden(tokens()))


# -----------------------------------------------------------------------------
# The plan, and what is refused


def test_reads_are_a_head_plan():
    c = composed_config(reads='1(heads=1) 3(depth=2, heads=2)')
    assert c.reads == '1(heads=1) 3(heads=2, depth=2)'
    wide = c.plan(c.experts[0])
    assert wide == {
        1: [None, None, None, ExpertHead(('wide', 2, 0), ('wide', 2, 0))],  # half of 3 blocks, rounded
        3: [None, None, *(ExpertHead(('wide', 2, i), ('wide', 2, i)) for i in range(2))],
    }
    assert [c.plan(e)[1][3].key[1] for e in c.experts] == [2, 3, 2]
    assert [str(read) for read in parse_reads('', 6, 8)] == ['3(heads=4)', '5(heads=4)']
    assert [str(read) for read in parse_reads('', 1, 1)] == ['0(heads=1)']


REFUSED = {
    'reads third': ({'reads': 'third'}, "reads='third': 'third' cannot be read"),
    'reads 9': ({'reads': '9'}, "reads='9': the base has layers 0 to 3"),
    'reads twice': ({'reads': '2 2'}, 'name each layer once, the lowest first'),
    'reads heads': ({'reads': '2(heads=5)'}, 'heads=5, but the base has 1 to 4'),
    'reads option': ({'reads': '2(head=1)'}, "'head' is no option; there are heads and depth"),
    'reads text': ({'reads': '2(heads)'}, "'2(heads)' cannot be read"),
    'reads depth': ({'reads': '2(depth=4)'}, "depth=4, but expert 'wide' has 3 blocks"),
    'no queries': ({'attention': 'leap'}, 'layer 2 of the base is leap(auto), which has no queries'),
    'top_k': ({'top_k': 4}, 'top_k=4: from 1 to 3 experts'),
    'threshold': ({'threshold': 1.0}, 'threshold=1: at least 0 and below 1'),
    'route': ({'route': 'word'}, "route='word' is unknown: one of token, text"),
    'tokens': ({'experts': {'a': replace(BASE, vocab_size=128)}}, 'all parts must have the same tokens'),
    'context': (
        {'experts': {'a': replace(BASE, block_size=12)}},
        "expert 'a' has block_size=12, the base 24",
    ),
    'no experts': ({'experts': {}}, 'a composed model needs experts'),
    'name': ({'experts': {'a.b': BASE}}, "expert 'a.b': a name has letters"),
    'base': ({'experts': {'base': BASE}}, 'is not "base"'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_does_not_fit_together_is_refused(case):
    changes, told = REFUSED[case]
    with pytest.raises(ValueError) as error:
        composed_config(**changes)
    assert told in str(error.value)


def test_a_config_survives_a_checkpoint():
    c = composed_config(top_k=2)
    assert ComposedConfig(**asdict(c)) == c
    twice = {**asdict(c), 'experts': [asdict(c)['experts'][0]] * 2}
    with pytest.raises(ValueError, match="2 experts are called 'wide'"):
        ComposedConfig(**twice)
