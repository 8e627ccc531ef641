"""diagnose.py: each of its measures against one that is written out, on models of known content."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

import diagnose
import tiny
from configurator import ConfigError
from conftest import random_gpt
from data.diagnostics import prepare as diagnostics
from data.tokendata import DataError, Examples, open_data
from diagnose import Probe, Subject, Swap, seen_before, swapped, swaps
from model import GPT, GPTConfig
from runs.system import autocast_for
from test_eval import save_run

SHAPE = {'block_size': 16, 'vocab_size': 64, 'vocab_used': 50, 'n_layer': 3, 'n_head': 4, 'n_embd': 32}


def subject(model, rows=12, seed=0) -> Subject:
    tokens = torch.randint(50, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return Subject(
        model, tokens[:, :-1].clone(), tokens[:, 1:].clone(), 5, partial(autocast_for, 'cpu', 'float32')
    )


# ---- losses


def test_losses_are_those_of_the_real_tokens_one_by_one():
    s = subject(random_gpt(GPTConfig(**SHAPE)))
    s.y[0, :5] = -1
    losses, right = diagnose.predict(s)
    with torch.no_grad():
        logits = s.model(s.x)[0][..., :50].double()
    wanted = -logits.log_softmax(-1).gather(2, s.y.clamp(min=0)[..., None])[..., 0]
    wanted[0, :5] = 0
    torch.testing.assert_close(losses.double(), wanted, rtol=0, atol=1e-5)
    assert torch.equal(right, logits.argmax(-1) == s.y) and not right[0, :5].any()
    loss, accuracy = diagnose.mean_loss(s)
    assert loss == pytest.approx(wanted.sum().item() / (12 * 16 - 5), abs=1e-5)
    assert accuracy == right.sum().item() / (12 * 16 - 5)


def test_what_a_target_repeats():
    #       a  b  c  a  b  c  a  b  d  a
    tokens = [1, 2, 3, 1, 2, 3, 1, 2, 4, 1]
    lengths, distances = seen_before(tokens)
    assert lengths == [0, 0, 1, 2, 3, 4, 4, 0, 1]
    assert distances == [0, 0, 3, 3, 3, 3, 3, 0, 3]
    assert seen_before([7, 7, 7, 7])[0] == [1, 2, 3]  # n-grams may overlap
    assert seen_before([7, 7, 8, 7])[1] == [1, 0, 2]


def test_numbers_are_classed_by_doubling():
    assert [diagnose.doubling(n) for n in (1, 2, 3, 4, 7, 8, 1023, 1024)] == [
        *('1', '2-3', '2-3', '4-7', '4-7', '8-15', '512-1023', '1024-2047')
    ]


def test_the_classes_of_a_kind_hold_every_token_once():
    s = subject(random_gpt(GPTConfig(**SHAPE)), rows=30)
    s.x[:, 8:], s.y[:, 7:] = (
        s.x[:, :8].clone(),
        torch.cat([s.x[:, :8], s.x[:, :1]], 1),
    )  # the second half repeats
    losses, _ = diagnose.predict(s)
    found = diagnose.loss_by_class(s, losses)
    for classes in found.values():
        assert sum(entry['tokens'] for entry in classes.values()) == 30 * 16
        total = sum(entry['tokens'] * entry['loss'] for entry in classes.values())
        assert total / (30 * 16) == pytest.approx(losses.mean().item(), abs=1e-5)
    assert [*found['place']] == ['1', '2-3', '4-7', '8-15', '16-31']
    assert found['place']['16-31']['loss'] == pytest.approx(losses[:, 15].mean().item(), abs=1e-5)
    assert [*found['repeats']] == ['new token', '1 token', '2 tokens', '3 tokens', '4 tokens or more']
    assert found['repeats']['4 tokens or more']['tokens'] >= 30 * 6
    assert [*found['last seen']] == ['never', '1 back', '2-3 back', '4-7 back', '8-15 back']


def test_copying_is_seen_where_there_is_some():
    class Copies(torch.nn.Module):
        """Knows that the second half repeats the first."""

        config = GPTConfig(**SHAPE)

        def hidden(self, x):
            hidden = torch.zeros(*x.shape, 64)
            hidden[:, 8:].scatter_(2, x[:, 1:8, None], 20.0)  # what followed eight places before
            return hidden

        def logits(self, hidden):
            return hidden

    found = diagnose.copying(subject(Copies()))
    assert found['first'] == pytest.approx(math.log(50), abs=1e-3)
    assert found['again'] < 1e-3


# ---- accuracy


def test_the_step_at_which_half_was_right():
    def curve(name, *values):
        return [{'iter': 100 * i, name: value} for i, value in enumerate(values)]

    def both(*values):
        parts = zip(curve('val/accuracy', *values), curve('val/accuracy/far', *values[::-1]), strict=True)
        return [{'iter': 1, 'loss': 3.0}, *(a | b for a, b in parts)]

    assert diagnose.onset(both(0.0, 0.25, 0.75, 0.9)) == {'all': 150.0, 'far': 0}
    assert diagnose.onset(both(0.0, 0.5, 0.4)) == {'all': 100.0, 'far': 50 / 0.5}
    assert diagnose.onset(both(0.0, 0.1)) == {'all': None, 'far': None}
    assert diagnose.onset([{'iter': 0, 'val/loss': 1.0}]) == {}


@pytest.mark.parametrize('task', diagnostics.TASKS)
def test_the_places_that_answers_are_fetched_from(task):
    made = diagnostics.examples(task, 0, 0, 20)
    tokens = Examples(made.rows.ravel(), made.rows.shape[1], made.asked)
    asked = sorted(place for places in made.asked.values() for place in places)
    found = diagnose.asked_later(
        torch.from_numpy(made.rows[:, :-1]), torch.from_numpy(made.rows[:, 1:]), tokens
    )
    for row, chosen in zip(made.rows, found.numpy(), strict=True):
        answers = set(row[asked])
        wanted = [p for p in range(len(row) - 1) if p not in asked and row[p] in answers]
        assert np.flatnonzero(chosen).tolist() == wanted and len(wanted) >= len(answers)
    if task == 'mqar':
        assert found[:, 2:33:2].all() and found.sum() == 20 * 16


# ---- probes


def gaussians(n, d=6, classes=5, seed=0):
    """Vectors of classes that are the farther apart the less the direction varies."""
    random = np.random.default_rng(seed)
    scale = np.array([20.0, 10.0] + [1.0] * (d - 2))
    means = np.random.default_rng(99).normal(size=(classes, d)) * 4
    ids = random.integers(classes, size=n)
    vectors = means[ids] + random.normal(size=(n, d)) * scale
    return torch.tensor(vectors, dtype=torch.float32), torch.tensor(ids) * 3 + 1


def test_a_probe_is_bayes_rule_for_normal_classes():
    fitted, held_out = gaussians(4000), gaussians(1500, seed=1)
    random = np.random.default_rng(99)
    means, scale = random.normal(size=(5, 6)) * 4, np.array([20.0, 10.0, 1, 1, 1, 1])
    distances = (((held_out[0].numpy()[:, None] - means) / scale) ** 2).sum(2)
    best = (distances.argmin(1) * 3 + 1 == held_out[1].numpy()).mean()
    nearest = ((held_out[0].numpy()[:, None] - means) ** 2).sum(2).argmin(1) * 3 + 1
    found = Probe(*fitted, ridge=1e-6).accuracy(*held_out)
    assert found == pytest.approx(best, abs=0.01) and best > (nearest == held_out[1].numpy()).mean() + 0.2


def test_a_probe_finds_nothing_where_nothing_is():
    vectors, ids = gaussians(3000)
    assert Probe(torch.randn_like(vectors), ids).accuracy(vectors, ids) < 0.3
    assert Probe(vectors, ids).accuracy(vectors, ids + 1000) == 0  # classes that it has not seen


def test_states_are_the_stream_and_the_values_as_they_are_read():
    model = random_gpt(GPTConfig(**SHAPE, attention='layer0(4/2-2)'))
    s = subject(model)
    chosen = torch.zeros_like(s.x, dtype=torch.bool)
    chosen[1:, [3, 7]] = True
    found = diagnose.states(s, chosen)
    assert [*found] == ['stream 0', 'values 0', 'stream 1', 'values 1', 'stream 2', 'values 2', 'stream 3']
    t = model.transformer
    with torch.no_grad():
        start = t.wte(s.x) + t.wpe.weight[:16]
        v0 = t.h[0].attn.c_attn(t.h[0].ln_1(start))[..., 64:]
        end = t.ln_f(found['stream 3'])
        v1 = t.h[1].attn.c_attn(t.h[1].ln_1(found['stream 1']))[..., 64:]
        torch.testing.assert_close(found['stream 0'], start[chosen])
        torch.testing.assert_close(found['values 0'], v0[chosen])
        torch.testing.assert_close(found['values 1'], torch.cat([v1, v0[chosen][:, 16:]], 1))
        torch.testing.assert_close(end, model.hidden(s.x)[chosen])
    assert 'read' not in vars(t.h[1].attn)


def test_the_token_is_known_before_the_first_layer():
    s = subject(random_gpt(GPTConfig(**SHAPE)), rows=400)
    found = diagnose.probe_layers(s, torch.ones_like(s.x, dtype=torch.bool))
    assert found['stream 0']['token'] > 0.99
    assert all(0 <= state['token'] <= 1 for state in found.values()) and len(found) == 7
    with torch.no_grad():
        start = s.model.transformer.wte(s.x) + s.model.transformer.wpe.weight[:16]
    assert found['stream 0']['size'] == pytest.approx(start.square().mean().sqrt().item())


def test_directions_are_counted():
    vectors = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    assert diagnose.directions(vectors + 100) == pytest.approx(8, rel=0.01)  # around the mean
    vectors[:, 2:] = 0
    assert diagnose.directions(vectors) == pytest.approx(2, rel=0.01)
    vectors[:, 0] *= 1000
    assert diagnose.directions(vectors) == pytest.approx(1, rel=0.01)


# ---- reads of other layers


def as_vanilla(model: GPT) -> GPT:
    """A model of the same weights whose heads read their own layer; what is not projected is zero."""
    other = GPT(GPTConfig(**{**vars(model.config), 'attention': 'vanilla'}), seed=0).eval()
    weights = {**other.state_dict(), **{n: w for n, w in model.state_dict().items() if 'own_share' not in n}}
    for l, block in enumerate(model.transformer.h):
        full = torch.zeros(3 * 32, 32)
        full[block.attn.c_attn.rows] = block.attn.c_attn.weight.detach()
        weights[f'transformer.h.{l}.attn.c_attn.weight'] = full
    del weights['_extra_state']
    other.load_state_dict(weights, strict=False)
    return other


@pytest.mark.parametrize(
    'attention, own, zeros',
    [
        # of its two lagged heads, layer 2 has one of its own, which layer 3 reads; layer 3 has none
        ('reflex(2-1-1)', 2, 6),
        ('layer0(4/2-2)', 0, 6),
        ('layer0(2-2)', 0, 12),
        ('reflex_all', 0, 12),
        ('value_residual', 12, 0),
    ],
)
def test_swapped_heads_read_their_own_layer_or_zeros(attention, own, zeros):
    model = random_gpt(GPTConfig(**{**SHAPE, 'n_layer': 4}, attention=attention))
    s = subject(model)
    with torch.no_grad():
        before, plain = model.hidden(s.x), as_vanilla(model).hidden(s.x)
        assert not torch.allclose(before, plain, atol=0.1)
        swap = swaps(model)[-1]
        assert swap.what == 'all layers'
        with swapped(model, swap) as counts:
            torch.testing.assert_close(model.hidden(s.x), plain, rtol=0, atol=1e-5)
        assert counts == (own, zeros)
        assert torch.equal(model.hidden(s.x), before)


def test_keys_and_values_are_swapped_apart():
    model = random_gpt(GPTConfig(**{**SHAPE, 'n_layer': 4}, attention='reflex(2-1-1)'))
    s, usual = subject(model), {}
    names = [f'layer {l}{what}' for l in (2, 3) for what in ('', ', keys', ', values')]
    assert [swap.what for swap in swaps(model)] == [*names, 'all layers']
    with torch.no_grad():
        for swap in swaps(model)[:3]:
            with swapped(model, swap) as counts:
                usual[swap.what] = model.hidden(s.x)
            assert counts == ((2, 2) if swap.what == 'layer 2' else (1, 1))
        outputs = [model.hidden(s.x), *usual.values()]
    assert not any(torch.allclose(a, b, atol=0.01) for i, a in enumerate(outputs) for b in outputs[:i])
    worth = {entry['swapped']: entry for entry in diagnose.worth_of_reads(s)}
    with swapped(model, swaps(model)[1]):
        worse = diagnose.mean_loss(s)
    loss, accuracy = diagnose.mean_loss(s)
    assert worth['layer 2, keys']['loss'] == pytest.approx(worse[0] - loss)
    assert worth['layer 2, keys']['accuracy'] == pytest.approx(worse[1] - accuracy)


def test_a_model_is_as_before_when_a_swap_fails():
    model = random_gpt(GPTConfig(**SHAPE, attention='value_residual'))
    share = model.transformer.h[1].attn.own_share.item()
    with pytest.raises(ZeroDivisionError), swapped(model, Swap('layer 1', [1], True, True)):
        assert model.transformer.h[1].attn.own_share == 1
        raise ZeroDivisionError
    assert model.transformer.h[1].attn.own_share.item() == share
    assert 'read' not in vars(model.transformer.h[1].attn)


@pytest.mark.parametrize('attention', ['vanilla', 'leap', 'lime', 'leap*1 reflex(2-2)*2'])
def test_attentions_of_every_kind_can_be_looked_at(attention):
    model = random_gpt(GPTConfig(**SHAPE, attention=attention))
    assert [swap.what for swap in swaps(model)] == (['layer 2'] if 'reflex' in attention else [])[:1] + (
        ['layer 2, keys', 'layer 2, values'] if 'reflex' in attention else []
    )
    found = diagnose.probe_layers(subject(model), torch.ones(12, 16, dtype=torch.bool))
    assert sum(name.startswith('stream') for name in found) == 4


# ---- the program


def run_program(out_dir, *flags):
    assert diagnose.main([f'--out_dir={out_dir}', '--device=cpu', '--threads=1', *flags]) == 0
    return json.loads((out_dir / diagnose.REPORT).read_text(encoding='utf-8'))


def test_a_run_on_a_diagnostic(tmp_path, capsys):
    data = tmp_path / 'depth'
    diagnostics.main(['depth', '--examples=64', '--val_examples=64', f'--out_dir={data}'])
    knobs = {'block_size': 72, 'n_layer': 3, 'attention': 'reflex(2-1-1)', 'max_iters': 4, 'eval_iters': 0}
    assert tiny.start(tmp_path / 'run', data, **knobs, dropout=0.0) == 0
    report = run_program(tmp_path / 'run', '--windows=0', '--checkpoint=last.pt')
    last = tiny.lines(tmp_path / 'run')[-1]
    assert (report['iter'], report['windows'], report['attention']) == (4, 64, 'reflex(2-1-1)')
    assert report['accuracy']['alias'] == pytest.approx(last['val/accuracy/alias'])
    assert report['accuracy']['all'] == pytest.approx(last['val/accuracy'])
    assert report['half right at step'] == {'all': None, 'direct': None, 'alias': None}
    assert [entry['swapped'] for entry in report['reads']] == ['layer 2', 'layer 2, keys', 'layer 2, values']
    assert 'loss by class' not in report and report['probe'].keys() >= {'stream 3', 'values 2'}
    out = capsys.readouterr().out
    assert 'half right at step' in out and 'what is lost if heads read their own layer' in out


def test_a_run_on_text(tmp_path, capsys):
    data = tiny.write_tokens(tmp_path / 'data')
    assert tiny.start(tmp_path / 'run', data, attention='vanilla') == 0
    report = run_program(tmp_path / 'run', '--windows=20', '--batch_size=7')
    assert report['windows'] == 20 and 'reads' in report and report['reads'] == []
    classes = report['loss by class']['place']
    total = sum(entry['tokens'] * entry['loss'] for entry in classes.values())
    assert total / (20 * 16) == pytest.approx(report['loss'], abs=1e-5)
    assert report['copying'].keys() == {'10', '12'}  # those of previous.pt and last.pt
    out = capsys.readouterr().out
    assert 'repeats' in out and 'copying of random tokens' in out and 'asked for' in out


def test_what_cannot_be_diagnosed_is_refused(tmp_path):
    data = tiny.write_tokens(tmp_path / 'data')
    other = tiny.write_tokens(tmp_path / 'other', tokenizer=diagnostics.Chars('abcdefgh'), vocab_size=8)
    run = save_run(
        tmp_path / 'run',
        random_gpt(GPTConfig(**{**SHAPE, 'vocab_size': 320, 'vocab_used': 257})),
        tiny.Bytes(),
        data,
    )
    start = [f'--out_dir={run}', '--device=cpu']
    for flag, message in {
        '--windows=3': '3 windows of 16 tokens: at least 4',
        '--windows=-1': 'windows=-1: must be at least 0',
        '--batch_size=0': 'must be at least 1',
        '--split=test': 'has train, val',
        f'--dataset={other}': 'has other tokens than',
    }.items():
        with pytest.raises(ConfigError, match=message):
            diagnose.main([*start, flag])
    with pytest.raises(DataError, match='does not exist'):
        diagnose.main([*start, '--dataset=nowhere'])
    assert open_data(data).vocab_size == 257


def test_only_a_gpt_can_be_diagnosed(tmp_path):
    data = tiny.write_tokens(tmp_path / 'data')
    shape = {'model': 'hierarchy', 'groups': 4, 'latents': '1', 'widths': '16-32', 'attention': 'vanilla'}
    assert tiny.start(tmp_path / 'run', data, **shape, max_iters=1) == 0
    with pytest.raises(ConfigError, match='holds a Hierarchy'):
        diagnose.main([f'--out_dir={tmp_path / "run"}', '--device=cpu'])
