"""sample.py: which checkpoint it reads, what it refuses, and that a prompt is read as it is meant."""

import math
from dataclasses import replace

import pytest
import torch

import sample
from configurator import ConfigError
from data.tokendata import open_data
from data.tokenizer import Chars
from runs import checkpoint
from runs.checkpoint import BEST, LAST, PREVIOUS, CheckpointError
from runs.knobs import Knobs
from runs.text import finite_logits, print_sample, stream_text
from tiny import start, write_tokens

LETTERS = Chars('\n !abcdefghijklmnopqrstuvwxyz')


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sample')
    data = write_tokens(folder / 'tokens', vocab_size=29, tokenizer=LETTERS)
    start(folder / 'run', data, max_iters=15)
    return folder / 'run'


def run(out, capsys, *flags):
    status = sample.main([f'--out_dir={out}', '--device=cpu', '--max_new_tokens=8', *flags])
    return status, capsys.readouterr().out


def test_a_checkpoint_is_named_by_its_file_or_by_its_path(out, capsys, monkeypatch):
    long = '--max_new_tokens=60'
    texts = {name: run(out, capsys, long, f'--checkpoint={name}') for name in (BEST, LAST, PREVIOUS)}
    assert len(set(texts.values())) > 1
    for name, text in texts.items():
        assert run(out, capsys, long, f'--checkpoint={out / name}') == text
    monkeypatch.chdir(out.parent)
    assert run('nothing', capsys, long, f'--checkpoint={out.name}/{LAST}') == texts[LAST]


def test_a_checkpoint_that_is_not_there_is_one_line_with_those_that_are(out, capsys):
    with pytest.raises(CheckpointError) as e:
        run(out, capsys, '--checkpoint=bets.pt')
    whole = ', '.join(f'{out / name} (iteration {i})' for name, i in ((LAST, 15), (PREVIOUS, 10), (BEST, 15)))
    assert (
        str(e.value) == f'{out / "bets.pt"} does not exist; whole: {whole}: take one with --checkpoint={LAST}'
    )
    with pytest.raises(CheckpointError, match=r'^elsewhere/last\.pt does not exist$'):
        run(out, capsys, '--checkpoint=elsewhere/last.pt')


@pytest.mark.parametrize(
    'flag, line',
    [
        ('--seed=1e30', 'seed=1e+30: must be at least 0 and below 2**63'),
        ('--seed=-1', 'seed=-1: must be at least 0'),
        ('--temperature=1e-300', 'temperature=1e-300: at least 1e-6, or 0 for always the likeliest token'),
        ('--temperature=-1', 'temperature=-1: at least 1e-6, or 0'),
        ('--top_k=-1', 'top_k=-1: must be at least 0'),
        ('--top_p=0', 'top_p=0.0: must be above 0 and at most 1'),
        ('--threads=5000000000', 'threads=5e+09: from 1 to 1024'),
        ('--max_new_tokens=0', 'max_new_tokens=0: must be at least 1'),
        ('--start=FILE:nowhere.txt', 'nowhere.txt cannot be read as UTF-8 text'),
        (f'--checkpoint={300 * "x"}', "checkpoint='xxx"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(out, capsys, flag, line):
    with pytest.raises(ConfigError) as e:
        run(out, capsys, flag)
    assert line in str(e.value) and '\n' not in str(e.value)


def test_the_smallest_temperature_draws_the_likeliest_token(out, capsys):
    assert run(out, capsys, '--temperature=1e-6') == run(out, capsys, '--temperature=0')


def test_a_byte_order_mark_is_no_part_of_the_prompt(out, capsys, tmp_path):
    texts = []
    for name, mark in (('plain', b''), ('marked', b'\xef\xbb\xbf')):
        (tmp_path / name).write_bytes(mark + b'a cat')
        texts.append(run(out, capsys, f'--start=FILE:{tmp_path / name}'))
    assert texts[0] == texts[1] and texts[0][1].startswith('a cat')


def test_logits_that_are_no_numbers_are_one_line(out, capsys, monkeypatch):
    """At temperature 0 the likeliest of nan is token 0: a page of line breaks that looks like an answer."""
    real = sample.load_model

    def broken(*args):
        model, state = real(*args)
        model.transformer.ln_f.register_forward_hook(lambda module, args, y: y * math.nan)
        return model, state

    monkeypatch.setattr(sample, 'load_model', broken)
    for temperature in (0, 0.8):
        with pytest.raises(ConfigError, match='logits that are inf or nan; try --dtype=float32'):
            run(out, capsys, f'--temperature={temperature}')


def test_nothing_is_left_on_the_model_by_the_watch_of_its_logits(out):
    model, state = sample.load_model(out)
    with finite_logits(model):
        list(stream_text(model, LETTERS, torch.zeros(1, 1, dtype=torch.long), 2))
    assert not model.lm_head._forward_hooks
    assert checkpoint.load(out / BEST)['iter'] == state['iter']


def test_the_sample_at_the_end_of_a_training(out, capsys):
    """Begins as it is told to, ends after so many tokens, and is no page of nan."""
    model, _ = sample.load_model(out)
    data = open_data(out.parent / 'tokens')
    k = Knobs(sample_tokens=5)
    print_sample(model, data, k, 'cpu')
    assert len(capsys.readouterr().out) == 5 + 1
    print_sample(model, data, replace(k, sample_start='a cat'), 'cpu')
    text = capsys.readouterr().out
    assert text.startswith('a cat') and len(text) == 5 + 5 + 1
    assert sample.main([f'--out_dir={out}', '--start=a cat', '--max_new_tokens=5', '--device=cpu']) == 0
    assert capsys.readouterr().out + '\n' == text  # as sample.py goes on, by the same seed
    model.transformer.ln_f.register_forward_hook(lambda module, args, y: y * math.inf)
    with pytest.raises(ConfigError, match='inf or nan'):
        print_sample(model, data, k, 'cpu')


def test_compiled_it_writes_the_same_text_and_a_model_that_cannot_is_told(out, capsys, monkeypatch, tmp_path):
    own = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, options, **rest: own(f, backend='eager', **rest))
    flags = ['--dtype=float32', '--num_samples=2', '--lookup=0', '--max_new_tokens=40']
    wanted = run(out, capsys, *flags)
    assert run(out, capsys, *flags, '--compile=true') == wanted
    data = write_tokens(tmp_path / 'tokens', vocab_size=29, tokenizer=LETTERS)
    start(tmp_path / 'run', data, max_iters=1, attention='leap')
    with pytest.warns(UserWarning, match='a layer that takes no step of fixed shapes'):
        assert run(tmp_path / 'run', capsys, '--compile=true')[0] == 0
