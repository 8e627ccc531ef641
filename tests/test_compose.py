"""compose.py: parts and what joins them in one folder, training that goes on, growth, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import compare
import compose
import eval as evaluation
import explain
import sample
import train
from composition import Composed
from configurator import ConfigError
from data.tokenizer import Chars
from runs import checkpoint
from runs.checkpoint import CheckpointError
from runs.models import load_model
from runs.parts import fingerprint, part_file
from tiny import TINY, assert_same_run, flags, lines, status, write_tokens

SHAPES = {  # of the runs that take part
    'base': {'n_layer': 3},
    'wide': {'n_embd': 48, 'n_layer': 2, 'attention': 'vanilla', 'position': 'rotary'},
    'deep': {'n_embd': 16, 'n_layer': 4, 'seed': 2},
    'late': {'seed': 3, 'block_size': 24},
}
SHAPE_KNOBS = {'n_layer', 'n_head', 'n_embd', 'attention', 'block_size', 'dropout'}
JOINING = {name: value for name, value in TINY.items() if name not in SHAPE_KNOBS}


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """A folder with a data set, and with the runs of SHAPES."""
    folder = tmp_path_factory.mktemp('parts')
    write_tokens(folder / 'data', vocab_size=16)  # of 257: there is something to learn at once
    for name, knobs in SHAPES.items():
        short = {'max_iters': 3, 'eval_interval': 3, 'warmup_iters': 1}
        assert train.main(flags(folder / name, dataset=folder / 'data', **{**TINY, **short, **knobs})) == 0
    return folder


@pytest.fixture(scope='module')
def pair(parts):
    """The run of a base and two experts, joined."""
    assert run(parts, parts / 'pair', 'wide', 'deep', base=parts / 'base') == 0
    return parts / 'pair'


def run(parts, out, *experts, **knobs) -> int:
    """compose.py; experts: runs of `parts`, or folders, maybe with names."""
    words = [str(parts / word) if word in SHAPES else str(word) for word in experts]
    given = {'dataset': parts / 'data', **JOINING, 'max_iters': 5, **knobs}
    return compose.main(flags(out, experts=','.join(words), **given))


def logits(folder, **changes):
    model, _ = load_model(folder)
    idx = torch.arange(2 * 16).view(2, 16)
    with torch.no_grad():
        return model(idx)[0]


def weights(folder) -> dict:
    return checkpoint.load_folder(folder, checkpoint.LAST)['model']


def joint(folder, name: str) -> dict:
    start = f'joints.{name}.'
    return {key.removeprefix(start): w for key, w in weights(folder).items() if key.startswith(start)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -----------------------------------------------------------------------------
# What it leaves


def test_a_run_learns_and_its_checkpoints_hold_what_joins_alone(parts, pair):
    losses = [record['val/loss'] for record in lines(pair) if 'val/loss' in record]
    assert losses[-1] < losses[0] and status(pair) == 'finished'
    assert all(name.startswith('joints.') for name in weights(pair) if name != '_extra_state')
    for name, of in {'base': 'base', 'wide': 'wide', 'deep': 'deep'}.items():
        kept, own = checkpoint.load(part_file(pair, name)), checkpoint.load_folder(parts / of)
        assert fingerprint(kept['model']) == fingerprint(own['model'])
        assert 'optimizer' not in kept and kept['tokenizer'] == own['tokenizer']
    config = json.loads((pair / 'run.json').read_text())['config']
    assert config['model'] == 'composed' and config['train'] == 'wide,deep' and config['block_size'] == 16


@pytest.mark.parametrize('voice', [True, False])
def test_before_training_its_loss_is_that_of_the_base(parts, tmp_path, voice):
    given = {'base': parts / 'base', 'max_iters': 0, 'voice': voice}
    assert run(parts, tmp_path / 'new', 'wide', 'deep', **given) == 0
    assert torch.equal(logits(tmp_path / 'new'), logits(parts / 'base'))
    (found,) = lines(tmp_path / 'new')
    wanted = lines(parts / 'base')[-1]['val/loss']
    # the loss of a mixture is summed in another order
    assert found['val/loss'] == (pytest.approx(wanted, rel=1e-6) if voice else wanted)


def test_the_folder_needs_no_other(parts, pair, tmp_path):
    wanted = logits(pair)
    alone = shutil.copytree(pair, tmp_path / 'elsewhere')
    (parts / 'wide').rename(parts / 'hidden')
    try:
        assert torch.equal(logits(alone), wanted)
    finally:
        (parts / 'hidden').rename(parts / 'wide')


def test_a_resumed_run_is_bit_identical(parts, tmp_path):
    given = {'base': parts / 'base', 'decay_lr': False, 'eval_interval': 3}
    assert run(parts, tmp_path / 'straight', 'wide', 'deep', max_iters=6, **given) == 0
    assert run(parts, tmp_path / 'halves', 'wide', 'deep', max_iters=3, **given) == 0
    assert compose.main(flags(tmp_path / 'halves', init_from='resume', max_iters=6)) == 0
    assert_same_run(tmp_path / 'straight', tmp_path / 'halves', names=[checkpoint.LAST])


# -----------------------------------------------------------------------------
# Growth


def test_an_expert_is_added_and_forgotten_without_the_others(parts, pair, tmp_path):
    grown, less = tmp_path / 'grown', tmp_path / 'less'
    assert run(parts, grown, pair, f'new={parts / "late"}') == 0
    model, _ = load_model(grown)
    assert list(model.experts) == ['wide', 'deep', 'new']
    for name in ('wide', 'deep'):
        assert same(joint(grown, name), joint(pair, name))
        assert part_file(grown, name).read_bytes() == part_file(pair, name).read_bytes()
    assert not torch.equal(logits(grown), logits(pair))
    assert run(parts, less, grown, forget='new', max_iters=0) == 0
    assert torch.equal(logits(less), logits(pair))
    assert not part_file(less, 'new').exists()


def test_what_was_joined_apart_is_put_together(parts, tmp_path):
    for name in ('wide', 'deep'):
        assert run(parts, tmp_path / name, name, base=parts / 'base') == 0
    both = tmp_path / 'both'
    assert run(parts, both, tmp_path / 'wide', tmp_path / 'deep', max_iters=0) == 0
    for name in ('wide', 'deep'):
        assert same(joint(both, name), joint(tmp_path / name, name))
    assert run(parts, tmp_path / 'on', both, train='deep', max_iters=2) == 0
    assert same(joint(tmp_path / 'on', 'wide'), joint(both, 'wide'))
    assert not same(joint(tmp_path / 'on', 'deep'), joint(both, 'deep'))


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize('name', ['base', 'wide'])
def test_a_part_that_changed_on_disk_is_refused(pair, tmp_path, name):
    folder = shutil.copytree(pair, tmp_path / 'changed')
    path = part_file(folder, name)
    state = torch.load(path, weights_only=True)
    w = next(v for v in state['model'].values() if isinstance(v, torch.Tensor))
    w.view(-1)[0] += 1e-3
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f'{name}.pt has changed: its weights have the fingerprint'):
        load_model(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=f'{name}.pt'):
        load_model(folder)


def test_the_parts_have_one_tokenizer(parts, tmp_path):
    other = Chars(map(chr, range(32, 32 + 257)))
    write_tokens(tmp_path / 'data', vocab_size=16, tokenizer=other)
    short = {'max_iters': 1, 'eval_interval': 1, 'warmup_iters': 1}
    assert train.main(flags(tmp_path / 'odd', dataset=tmp_path / 'data', **{**TINY, **short})) == 0
    with pytest.raises(ConfigError, match="expert 'odd' has another tokenizer than the base"):
        run(parts, tmp_path / 'out', tmp_path / 'odd', base=parts / 'base')
    with pytest.raises(ConfigError, match='has another tokenizer than the parts'):
        run(parts, tmp_path / 'out', 'wide', base=parts / 'base', dataset=tmp_path / 'data')


REFUSED = {
    'no base': ({}, ['wide'], "base='': give the folder of a run"),
    'no experts': ({'base': 'base'}, [''], "experts='': give the folders of runs"),
    'a composed base': ({'base': 'pair'}, ['wide'], 'holds a Composed: a base is a GPT'),
    'two names': ({'base': 'base'}, ['wide', 'wide'], "two experts are called 'wide'"),
    'a bad name': ({'base': 'base'}, ['a.b=wide'], "expert 'a.b': a name has letters"),
    'another base': ({'base': 'deep'}, ['pair'], 'have different bases'),
    'other reads': ({'reads': '0'}, ['pair', 'late'], "reads='0', but a composed run among the experts has"),
    'other joints': (
        {'voice': False},
        ['pair', 'late'],
        'has voice=True: what joins experts fits that alone',
    ),
    'unknown to forget': ({'forget': 'law'}, ['pair'], "forget='law': there is no such expert"),
    'none left': ({'forget': 'wide,deep'}, ['pair'], 'a composed model needs experts'),
    'unknown to train': ({'train': 'law'}, ['pair'], "train='law': there is no such expert 'law'"),
    'nothing to train': ({}, ['pair'], 'all experts are joined already: give --train=all'),
    'too long': ({'base': 'base', 'block_size': 17}, ['wide'], 'the base has a context of 16'),
    'another model': ({'base': 'base', 'model': 'gpt'}, ['wide'], "model='gpt': what compose.py makes is"),
    'weights': ({'base': 'base', 'init_from': 'gpt2'}, ['wide'], "init_from='gpt2': scratch, resume or auto"),
    'a threshold': (
        {'base': 'base', 'threshold': 0.5},
        ['wide'],
        'threshold=0.5: gates are 0.5 before training',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_work_is_refused_in_one_line(parts, pair, tmp_path, case):
    knobs, experts, told = REFUSED[case]
    known = {*SHAPES, 'pair'}
    knobs = {name: parts / value if value in known else value for name, value in knobs.items()}
    words = [f'a.b={parts / "wide"}' if '=' in word else parts / word if word else '' for word in experts]
    with pytest.raises(ConfigError) as error:
        run(parts, tmp_path / 'out', *words, **knobs)
    assert told in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'out' / 'parts').exists()


# -----------------------------------------------------------------------------
# The other programs


def test_the_other_programs_take_it(parts, pair, tmp_path, capsys):
    two = tmp_path / 'one'
    assert run(parts, two, pair, top_k=1, max_iters=0) == 0  # another routing of the same weights
    assert isinstance(load_model(two)[0], Composed)
    assert sample.main(flags(two, start='abc', max_new_tokens=5, num_samples=1, device='cpu')) == 0
    assert evaluation.main(flags(two, device='cpu', dataset=parts / 'data')) == 0
    assert 'perplexity' in capsys.readouterr().out
    assert explain.main(flags(two, text='some text')) == 0
    assert 'asks for' in (two / 'explain.html').read_text(encoding='utf-8')
    study = tmp_path / 'study'
    for arm, folder in {'base': parts / 'base', 'composed': pair}.items():
        shutil.copytree(folder, study / arm / 'seed0')
    assert compare.main([str(study), f'--out={tmp_path}']) == 0
    assert 'composed' in capsys.readouterr().out


def test_another_routing_needs_no_training(pair, parts, tmp_path):
    assert run(parts, tmp_path / 'one', pair, top_k=1, route='text', max_iters=0) == 0
    model, _ = load_model(tmp_path / 'one')
    assert (model.config.top_k, model.config.route) == (1, 'text')
    assert same(joint(tmp_path / 'one', 'wide'), joint(pair, 'wide'))
    assert not torch.equal(logits(tmp_path / 'one'), logits(pair))
    assert not Path(tmp_path / 'one' / 'parts' / 'late.pt').exists()


def test_it_is_exported_with_its_parts_in_one_folder(parts, pair, tmp_path):
    transformers = pytest.importorskip('transformers')
    import hf

    assert run(parts, tmp_path / 'one', pair, top_k=1, max_iters=0) == 0
    model, _ = load_model(tmp_path / 'one')
    assert hf.main(flags(tmp_path / 'one', to=tmp_path / 'exported')) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'exported').eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'exported')
    ids = tokenizer('some text', return_tensors='pt')['input_ids']
    with torch.no_grad():
        # exported heads have no padding ids, but a row for a pad token: it gets a part in 257 of what is said
        wanted = model.logits(model.hidden(ids), 257).softmax(-1)
        found = loaded(ids).logits.softmax(-1)[..., :257]
        torch.testing.assert_close(found, wanted, rtol=1 / 257, atol=0)
    made = loaded.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(made, model.generate(ids, 5, temperature=0))
