"""What only speed explains changes no result; Muon does what it says, and resumes."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import test_model
import test_peers
from configurator import ConfigError
from layers.heads import DROPOUT_BLOCK, attend
from layers.plans import HeadPlan, Shape, reflex
from layers.registry import ATTENTIONS
from model import GPT, GPTConfig
from runs import metrics
from runs.optimizer import Muon, Together, hidden_matrices, iterate, iterate_gram, make_optimizer, orthogonal
from runs.system import keep_memory
from tiny import assert_same_run, resume, start, write_tokens

PLANNED = [(test_model, name) for name in test_model.VARIANTS] + [
    (test_peers, name) for name in test_peers.VARIANTS
]


def build(module, variant):
    if module is test_peers:
        return test_peers.build(variant).eval()
    return GPT(test_model.config(variant), seed=2).double().eval()


@pytest.mark.parametrize('head_size', [16, 32, 64])
@pytest.mark.parametrize('masked', [False, True])
def test_attention_in_bf16_is_as_exact_as_torchs(head_size, masked):
    generator = torch.Generator().manual_seed(1)
    q, k, v, upstream = torch.randn(4, 2, 3, 20, head_size, generator=generator).bfloat16()
    mask = torch.ones(20, 20, dtype=torch.bool).tril(-3) | torch.eye(20, dtype=torch.bool) if masked else None

    def run(attention, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = attention(*inputs)
        return y, *torch.autograd.grad(y, inputs, upstream.to(dtype))

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked)

    exact = run(theirs, torch.float64)
    with torch.autocast('cpu', torch.bfloat16):
        ours = run(lambda *qkv: attend(*qkv, mask), torch.bfloat16)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize(
    'name, peak',
    [
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA GH200 480GB', 989e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA A10G', 70e12),
        ('Tesla T4', 65e12),
        ('NVIDIA RTX A4000', None),
        ('NVIDIA RTX A1000 Laptop GPU', None),
        ('NVIDIA T400 4GB', None),
    ],
)
def test_mfu_is_measured_against_the_peak_of_that_very_card(name, peak, monkeypatch):
    monkeypatch.setattr(metrics, 'device_name', lambda device: name)
    assert metrics.peak_flops('cuda:0') == peak


@pytest.mark.parametrize('peak, mfu', [(1e9, [0.25, 0.125]), (None, [None, None])])
def test_speed_is_of_the_steps_since_it_was_read_last(peak, mfu, monkeypatch):
    """Of a run that goes on at iteration 10 too, and with all ranks' devices counted."""
    monkeypatch.setattr(metrics, 'peak_flops', lambda device: peak)
    run = {'tokens_per_step': 1000, 'model': {'flops_per_token': 5000}, 'device': {'ranks': 2}}
    speed = metrics.Speed(run, 'cuda:0', it=10, seconds=7.0)
    read = [speed.read(20, 7.1), speed.read(40, 7.5)]
    assert [r['tokens_per_s'] for r in read] == pytest.approx([100_000, 50_000])
    assert [r['mfu'] for r in read] == (pytest.approx(mfu) if peak else mfu)


@pytest.mark.parametrize('attention', ['reflex', 'reflex_all'])
def test_compiled_and_distributed_is_the_same_step(attention):
    """As torchrun has it: DDP around the compiled model, cut at several buckets, the loss in chunks."""
    config = GPTConfig(n_layer=3, n_head=8, n_embd=128, block_size=128, vocab_size=8192, attention=attention)
    x, y = torch.randint(8192, (2, 8, 128), generator=torch.Generator().manual_seed(0))  # 1,024 tokens each
    plain, ours = GPT(config, seed=0), GPT(config, seed=0)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        compiled = torch.compile(ours, backend='aot_eager')
        trained = torch.nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=1)
        losses = [model(x, y)[1] for model in (plain, trained)]
        for loss in losses:
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()
        torch.compiler.reset()
    torch.testing.assert_close(losses[0], losses[1])
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('T', [DROPOUT_BLOCK, DROPOUT_BLOCK + 1, 3 * DROPOUT_BLOCK - 5])
def test_attention_with_dropout_in_blocks_is_attention(T):
    """With a dropout so rare that nothing is dropped; then half: on average the values stay."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, upstream = torch.randn(4, 1, 2, T, 8, generator=generator)

    def run(attention):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        y = attention(*inputs)
        return y, *torch.autograd.grad(y, inputs, upstream)

    ours = run(lambda *qkv: attend(*qkv, dropout_p=1e-12))
    for a, b in zip(
        ours, run(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    v = torch.arange(1.0, T + 1).expand(1, 2, T).unsqueeze(-1)
    dropped, exact = attend(q, k, v, dropout_p=0.5), attend(q, k, v)
    assert abs(dropped.mean() / exact.mean() - 1) < 0.05
    assert set(dropped[0, :, 0, 0].tolist()) <= {0.0, 2.0}, 'the first query sees the first value alone'


@pytest.mark.parametrize('T', [1, 2, 3])
def test_the_shortest_sequences_are_causal(T):
    """What a token is does not change when another one follows it."""
    q, k, v = torch.randn(3, 1, 2, T + 1, 8, generator=torch.Generator().manual_seed(1))
    longer, shorter = attend(q, k, v), attend(*(t[:, :, :T] for t in (q, k, v)))
    torch.testing.assert_close(longer[:, :, :T], shorter)


def test_keeping_memory_changes_no_number():
    def losses():
        model = GPT(GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32), seed=1)
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.98), 'cpu')
        idx = torch.randint(65, (4, 33), generator=torch.Generator().manual_seed(2))
        for _ in range(3):
            _, loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    expected = list(losses())
    keep_memory()
    try:
        assert list(losses()) == expected
    finally:
        keep_memory(False)


# ---- decoding from the caches as they lie


@pytest.mark.parametrize(('module', 'variant'), PLANNED)
def test_beams_read_the_caches_of_the_sequences_they_continue(module, variant):
    model, idx = build(module, variant), test_model.tokens(B=3, T=12)
    rows = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        cache = model.new_cache(3)
        model.hidden(idx[:, :8], cache)
        cache.select(rows)
        found = [model.lm_head(model.hidden(idx[rows][:, t : t + 1], cache)) for t in range(8, 12)]
        expected = model(idx[rows])[0][:, 8:]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that is made, not a view of another one's."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
        for made in result if isinstance(result, tuple) else (result,):
            if torch.is_tensor(made) and made.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, made.numel())
        return result


@pytest.mark.parametrize('variant', ['vanilla', 'reflex', 'reflex_all', 'cla', 'first', 'reflex_all_values'])
def test_a_token_copies_no_cache(variant):
    """Whatever a step makes is smaller than the keys of one head that it reads."""
    config = GPTConfig(block_size=2048, vocab_size=64, n_layer=4, n_head=8, n_embd=64, attention=variant)
    model = GPT(config, seed=1).eval()
    idx = torch.randint(64, (1, 1025), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model.new_cache(1)
        model.hidden(idx[:, :1024], cache)
        with Largest() as largest:
            model.hidden(idx[:, 1024:], cache)
    assert 0 < largest.numbers <= 1025 * config.n_head  # the attention weights of a head each


class Calls(TorchDispatchMode):
    """Names of the operations that are called, as often as they are."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(('attention', 'joins'), [('vanilla', 0), ('reflex(4-2-2)', 4)])
def test_the_gradients_of_q_k_and_v_are_joined_once_per_layer(attention, joins):
    """In the order in which the projection's gradient lies: what joins them is not copied again. joins: of
    layers that gather keys and values."""
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=6, n_head=8, n_embd=64, attention=attention)
    model, idx = GPT(config, seed=1), torch.zeros(2, 16, dtype=torch.long)
    with Calls() as forward:
        loss = model(idx, idx)[1]
    with Calls() as backward:
        loss.backward()
    assert forward.names.count('aten::cat') == 2 * joins  # keys, values
    assert 'aten::clone' not in backward.names
    if not joins:
        assert backward.names.count('aten::cat') == config.n_layer


@pytest.mark.parametrize('attention', [name for name, kind in ATTENTIONS.items() if kind.plan])
def test_runs_are_where_both_pieces_stay(attention):
    """Every run lies in one piece of keys and one of values, and together they are all heads, in order."""
    config = GPTConfig(n_layer=6, n_head=8, n_embd=64, attention=attention)
    plan = config.head_plan()
    for l in range(6):
        runs, key_cuts, value_cuts = plan.runs(l)
        assert sum(runs) == 8
        assert [n for cut in key_cuts for n in cut] == [n for cut in value_cuts for n in cut] == runs


def test_runs_of_keys_and_values_that_are_cut_apart():
    plan = HeadPlan(reflex(Shape(3, 8), '6-2/4-2-2'), 8)
    assert plan.runs(2) == ([4, 2, 2], [[4, 2], [2]], [[4], [2], [2]])


# ---- compiled, the loss in chunks


@pytest.mark.parametrize('variant', ['4-2-2', 'reflex_all'])
def test_compiled_whole_it_gives_the_same_loss_and_gradients(variant):
    model, idx = GPT(test_model.config(variant), seed=2), test_model.tokens(B=2, T=16)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')

    def run(forward):
        loss = forward(idx, idx)[1]
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    for a, b in zip(run(compiled), run(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ---- Muon


@pytest.mark.parametrize('shape', [(24, 8), (8, 24), (16, 16)])
def test_the_update_is_about_orthogonal(shape):
    """Singular vectors stay, singular values come near 1; also where they were 100 times apart."""
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    for scale in (1.0, 1e-6):
        matrix = scale * u @ torch.diag(torch.logspace(0, -2, min(shape))) @ v
        values = (u.mT @ orthogonal(matrix) @ v.mT).diagonal()
        assert ((values > 0.6) & (values < 1.25)).all()
        torch.testing.assert_close(u @ torch.diag(values) @ v, orthogonal(matrix), rtol=0, atol=2e-3)
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_the_two_ways_to_iterate_agree():
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    x /= x.norm()
    torch.testing.assert_close(iterate_gram(x), iterate(x), rtol=1e-4, atol=1e-5)
    assert (iterate(x.bfloat16()).float() - iterate(x)).norm() < 0.03 * iterate(x).norm()


def test_the_quintic_is_torchs():
    """As torch.optim.Muon, which computes it in bf16 and without the Gram matrix."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.nn.Parameter(torch.ones(12, 30)) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.1, weight_decay=0.2),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, adjust_lr_fn='match_rms_adamw'),
    ]
    for _ in range(3):
        ours.grad = torch.randn(12, 30, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    change = theirs - torch.ones_like(theirs)
    assert (ours - theirs).norm() < 0.02 * change.norm()


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=True), seed=1)
    knobs = {'weight_decay': 0.1, 'learning_rate': 1e-2, 'beta1': 0.9, 'beta2': 0.98}
    k = SimpleNamespace(optimizer='muon', muon_learning_rate=2e-2, muon_qkv='apart', **knobs)
    optimizer = make_optimizer(model, k, 'cpu')
    muon, *adamw = optimizer.param_groups
    taken = {name for name, p in model.named_parameters() if any(p is q for q in muon['params'])}
    assert taken == {name for name, p in model.named_parameters() if '.h.' in name and p.dim() == 2}
    rest = [p for group in adamw for p in group['params']]
    assert len(rest) + len(taken) == len(list(model.parameters()))
    assert not {id(p) for p in rest} & {id(p) for p in hidden_matrices(model)}
    assert muon['lr_ratio'] == 2.0 and adamw[0]['weight_decay'] == 0.1 and adamw[1]['weight_decay'] == 0.0
    assert isinstance(optimizer, Together)


@pytest.mark.parametrize('plan', [{'attention': 'vanilla'}, {'attention': 'first', 'head_split': '4/2-2'}])
def test_queries_keys_and_values_are_matrices_of_their_own_to_muon(plan):
    """As if they were three parameters; what a plan does to the values' rows does not reach q and k."""
    shape = {'block_size': 16, 'vocab_size': 64, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
    model = GPT(GPTConfig(**shape, **plan), seed=1)
    knobs = {
        'weight_decay': 0.1,
        'learning_rate': 1e-2,
        'beta1': 0.9,
        'beta2': 0.98,
        'muon_learning_rate': 0.0,
    }
    optimizer = make_optimizer(model, SimpleNamespace(optimizer='muon', muon_qkv='apart', **knobs), 'cpu')
    layer = model.transformer.h[1].attn
    whole = layer.c_attn.weight
    rows = [n * 8 for n in (4, *layer.heads_produced())]
    assert sum(rows) == whole.size(0)
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().split(rows)]
    by_themselves = Muon(parts, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for part, grad in zip(parts, whole.grad.split(rows), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        by_themselves.step()
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)


def test_a_run_from_before_the_knob_goes_on_as_it_was(tmp_path):
    """run.json without muon_qkv is of a version that took c_attn as one matrix."""
    data = write_tokens(tmp_path / 'tokens')
    knobs = {'optimizer': 'muon', 'lr_decay_iters': 12}
    start(tmp_path / 'straight', data, muon_qkv='whole', **knobs)
    start(tmp_path / 'resumed', data, muon_qkv='whole', max_iters=5, **knobs)
    path = tmp_path / 'resumed' / 'run.json'
    run = json.loads(path.read_text(encoding='utf-8'))
    del run['config']['muon_qkv']
    path.write_text(json.dumps(run), encoding='utf-8')
    resume(tmp_path / 'resumed', max_iters=12)
    assert_same_run(tmp_path / 'straight', tmp_path / 'resumed')


def test_muon_resumes_bit_for_bit(tmp_path):
    data = write_tokens(tmp_path / 'tokens')
    start(tmp_path / 'straight', data, optimizer='muon', muon_learning_rate=2e-2)
    start(
        tmp_path / 'resumed', data, optimizer='muon', muon_learning_rate=2e-2, max_iters=5, lr_decay_iters=12
    )
    resume(tmp_path / 'resumed', max_iters=12)
    assert_same_run(tmp_path / 'straight', tmp_path / 'resumed')


def test_an_unknown_optimizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="optimizer='adam': one of adamw, muon"):
        start(tmp_path / 'run', tmp_path, optimizer='adam')
