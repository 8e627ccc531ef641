"""GPT-2-shaped checkpoints of `transformers`: the same logits, and nothing half-loaded in silence."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import tiny
from configurator import ConfigError, UserError
from data.tokenizer import GPT2_URL, Bytes, Chars, Tiktoken, load
from model import GPT, GPTConfig
from runs.pretrained import (
    Pretrained,
    PretrainedError,
    copy_table,
    copy_weights,
    from_pretrained,
    read,
    token_difference,
)

transformers = pytest.importorskip('transformers')
safetensors = pytest.importorskip('safetensors')

RUGPT = {  # the published instruction model's proportions
    'n_layer': 6,
    'n_head': 8,
    'attention': 'reflex_all',
    'norm': 'rmsnorm',
    'mlp': 'swiglu',
}


def ids(B=2, T=64):
    return torch.randint(280, (B, T), generator=torch.Generator().manual_seed(1))


def edited(folder: Path, tmp_path: Path, **changes) -> Path:
    """A copy of folder whose config.json says something else."""
    copy = shutil.copytree(folder, tmp_path / 'edited')
    config = json.loads((copy / 'config.json').read_text(encoding='utf-8'))
    (copy / 'config.json').write_text(json.dumps({**config, **changes}), encoding='utf-8')
    return copy


def small(tmp_path, **changes) -> tuple:
    """A GPT-2 of transformers with random weights, and the folder that it is saved in."""
    sizes = {'vocab_size': 90, 'n_positions': 32, 'n_embd': 32, 'n_layer': 2, 'n_head': 4}
    config = transformers.GPT2Config(**{**sizes, 'bos_token_id': 0, 'eos_token_id': 0, **changes})
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(tmp_path / 'small')
    return model, tmp_path / 'small'


def test_the_same_shape_computes_the_same_logits(gpt2_folder):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    model, rows = from_pretrained(gpt2_folder)
    with torch.no_grad():
        wanted, (found, _) = theirs(ids()).logits, model.eval()(ids())
    assert wanted.std() > 0.5  # not the near-zero logits of a fresh model
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert {row.how for row in rows} == {'copied'}
    assert sum(row.copied for row in rows) == model.num_params(non_embedding=False)


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu', 'gelu_pytorch_tanh'])
def test_activations_are_told_apart(activation, tmp_path):
    theirs, folder = small(tmp_path, activation_function=activation)
    x = ids(2, 32) % 90
    with torch.no_grad():
        wanted = theirs(x).logits
        same, other = (
            from_pretrained(folder, **overrides)[0].eval()(x)[0]
            for overrides in ({}, {'mlp': 'gelu_tanh' if activation == 'gelu' else 'gelu'})
        )
    torch.testing.assert_close(same, wanted, rtol=1e-5, atol=1e-5)
    assert (other - wanted).abs().max() > 1e-4


def test_shards_bin_and_half_precision_read_the_same(gpt2_folder, tmp_path):
    whole = read(gpt2_folder).weights
    theirs = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder)
    folders = {kind: tmp_path / kind for kind in ('shards', 'bin', 'bin_shards', 'old', 'half')}
    theirs.save_pretrained(folders['shards'], max_shard_size='1MB')
    assert len(list(folders['shards'].glob('*.safetensors'))) > 3
    state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    for kind in ('bin', 'bin_shards', 'old', 'half'):
        folders[kind].mkdir()
        shutil.copy(gpt2_folder / 'config.json', folders[kind])
    torch.save(state, folders['bin'] / 'pytorch_model.bin')
    names, where = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2])):
        torch.save({k: state[k] for k in part}, folders['bin_shards'] / f'pytorch_model-{i}.bin')
        where.update(dict.fromkeys(part, f'pytorch_model-{i}.bin'))
    (folders['bin_shards'] / 'pytorch_model.bin.index.json').write_text(
        json.dumps({'weight_map': where}), encoding='utf-8'
    )
    # as the first GPT-2 files are: no prefix, no head, the causal mask as a buffer
    bare = {k.removeprefix('transformer.'): v for k, v in state.items() if k != 'lm_head.weight'}
    bare |= {f'h.{l}.attn.bias': torch.ones(1, 1, 64, 64) for l in range(24)}
    torch.save(bare, folders['old'] / 'pytorch_model.bin')
    torch.save({k: v.half() for k, v in state.items()}, folders['half'] / 'pytorch_model.bin')
    for kind, folder in folders.items():
        found = read(folder).weights
        assert found.keys() == whole.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, whole[name].half() if kind == 'half' else whole[name]), (kind, name)
    model, _ = from_pretrained(folders['half'])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_another_plan_depth_norm_and_mlp_take_what_fits(gpt2_folder):
    """Row by row: a copied tensor is the checkpoint's, any other is what a fresh model starts with."""
    overrides = {**RUGPT, 'vocab_size': 320, 'vocab_used': 300, 'block_size': 128, 'qk_norm': True}
    checkpoint = read(gpt2_folder)
    model, rows = from_pretrained(gpt2_folder, seed=5, **overrides)
    fresh = dict(GPT(model.config, seed=5).named_parameters())
    plan, hs = model.config.head_plan(), model.config.head_size
    by_name = {row.name: row for row in rows}
    assert by_name.keys() >= fresh.keys()
    for name, p in model.named_parameters():
        row, source = by_name[name], checkpoint.weights.get(name)
        wanted = fresh[name].clone()
        with torch.no_grad():
            if '.c_attn.' in name:  # queries, then the keys and values that the plan reads, head by head
                layer = int(name.split('.')[2])
                parts = [*source.split(hs)]  # q0 … q7, k0 … k7, v0 … v7
                heads = (
                    list(range(8)) + [8 + h for h in plan.keys[layer]] + [16 + h for h in plan.values[layer]]
                )
                wanted.copy_(torch.cat([parts[h] for h in heads]))
                assert f'except {2 * layer} dead heads' in row.how or layer == 0
                assert row.how.endswith('16 heads of 6 as 8 heads of 12')
            elif name in ('transformer.wte.weight', 'transformer.wpe.weight'):
                wanted[: len(source)] = source
                assert f'the first {len(source)} rows copied' in row.how
            elif row.copied:
                wanted.copy_(source)
        assert torch.equal(p, wanted), name
        assert bool(row.copied) != row.how.startswith('initialised'), row
    initialised = {row.name.split('.', 3)[-1] for row in rows if row.how.startswith('initialised')}
    assert initialised == {
        'attn.q_norm.weight',
        'attn.k_norm.weight',
        *(
            f'mlp.{part}'
            for part in ('c_gate.weight', 'c_gate.bias', 'c_fc.weight', 'c_fc.bias', 'c_proj.weight')
        ),
    }
    left = [row.name for row in rows if row.shape is None]
    assert {f'transformer.h.{l}' for l in range(6, 24)} | {'transformer.ln_f.bias'} <= set(left)


def test_the_table_says_what_became_of_everything(gpt2_folder):
    model, rows = from_pretrained(gpt2_folder, **RUGPT)
    table = copy_table(rows)
    lines = {line.split()[0]: ' '.join(line.split()) for line in table.splitlines()}
    assert lines['wte.weight'] == 'wte.weight 300 x 96 300 x 96 copied'
    assert lines['h.0-5.ln_1.weight'] == 'h.0-5.ln_1.weight 96 96 copied, layernorm as rmsnorm'
    assert lines['h.0-5.mlp.c_gate.weight'].endswith('256 x 96 - initialised: not in the checkpoint')
    assert lines['h.0-5.mlp.c_fc.weight'].endswith('256 x 96 384 x 96 initialised: another shape')
    assert lines['h.3.attn.c_attn.weight'].endswith(
        '216 x 96 288 x 96 copied except 6 dead heads, 16 heads of 6 as 8 heads of 12'
    )
    assert lines['h.6-23'] == 'h.6-23 - - left out with 12 tensors: the model has 6 layers'
    assert lines['h.0-5.ln_1.bias'] == 'h.0-5.ln_1.bias - 96 left out: the model has no such tensor'
    copied, total = sum(row.copied for row in rows), model.num_params(non_embedding=False)
    assert 0 < copied < total
    assert table.endswith(
        f'{copied:,} of {total:,} parameters copied ({100 * copied / total:.1f} %), the rest initialised'
    )


def test_other_attentions_take_what_means_the_same(gpt2_folder):
    """additive attention's c_attn has GPT-2's shape, but another order and meaning of its rows."""
    for attention in ('additive', 'leap', 'lime'):
        _, rows = from_pretrained(gpt2_folder, n_layer=2, n_head=8, attention=attention)
        how = {row.name.removeprefix('transformer.h.1.'): row.how for row in rows}
        fits = attention == 'lime'
        assert how['attn.c_attn.weight'].startswith('copied' if fits else 'initialised: this attention'), how
        assert how['attn.c_proj.weight'] == how['mlp.c_fc.weight'] == 'copied'
        own = {'additive': 'attn.w_q', 'leap': 'mlp.c_fc.bias', 'lime': 'attn.router'}[attention]
        assert how[own] == ('copied' if attention == 'leap' else 'initialised: not in the checkpoint')


def test_the_published_size_fares_as_the_readme_says(root):
    """config/recipes/rugpt_reflex.py from 24 layers of 16 heads, with shapes alone."""
    names, settings = {f.name for f in fields(GPTConfig)}, {}
    exec((root / 'config/recipes/rugpt_reflex.py').read_text(encoding='utf-8'), settings)
    settings = {name: value for name, value in settings.items() if name in names}
    large = GPTConfig(n_layer=24, n_head=16, n_embd=1536, block_size=2048, vocab_size=50257, bias=True)
    with torch.device('meta'):
        weights = dict(GPT(replace(large, mlp='gelu_tanh'), seed=0).named_parameters())
        model = GPT(GPTConfig(**settings, vocab_size=50304, vocab_used=50257), seed=0)
    checkpoint = Pretrained('large', root, replace(large, mlp='gelu_tanh'), weights)
    table = copy_table(copy_weights(model, checkpoint)).splitlines()
    readme = (root / 'docs/transformers.md').read_text(encoding='utf-8')
    shown = [line for line in table if line in readme]
    assert len(shown) == 6 and shown[-1].startswith('128,176,512 of 241,544,064 parameters copied')


def test_a_model_of_another_width_is_refused(gpt2_folder):
    with pytest.raises(
        PretrainedError, match=r'\(n_embd=96\) fits into this model \(n_embd=64.*take n_embd=96'
    ):
        from_pretrained(gpt2_folder, n_embd=64)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model_type': 'llama'}, "is of model_type 'llama': only 'gpt2' and 'reflex'"),
        ({'model_type': ['gpt2']}, r"is of model_type \['gpt2'\]: only"),
        ({'activation_function': 'relu'}, "activation_function='relu': only 'gelu_new'"),
        ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon=1e-06'),
        ({'n_inner': 100}, 'n_inner=100: only None, 384'),
        ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
        ({'n_layer': 25}, r'transformer.h.24.ln_1.weight is missing'),
        ({'n_positions': 128}, r'transformer.wpe.weight is 64 x 96, not 128 x 96'),
        ({'n_head': 7}, 'config.json: n_embd=96 is not a multiple of n_head=7'),
        ({'n_layer': 0}, 'config.json: n_layer=0: must be at least 1'),
        ({'n_embd': -96, 'n_inner': None}, 'config.json: n_embd=-96: must be at least 1'),
        ({'activation_function': ['gelu']}, r"activation_function=\['gelu'\]: only 'gelu_new'"),
        ({'n_inner': {}}, r'n_inner=\{\}: only None, 384'),
    ],
    ids=str,
)
def test_a_config_that_is_not_computed_here_is_refused(changes, message, gpt2_folder, tmp_path):
    with pytest.raises(PretrainedError, match=message):
        read(edited(gpt2_folder, tmp_path, **changes))


def test_broken_files_are_one_line(gpt2_folder, tmp_path, monkeypatch):
    def message(folder):
        with pytest.raises(PretrainedError) as e:
            read(folder)
        assert '\n' not in str(e.value)
        return str(e.value)

    folder = edited(gpt2_folder, tmp_path)
    weights = folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:5000])
    assert 'model.safetensors is damaged' in message(folder)
    weights.unlink()
    assert 'holds neither model.safetensors nor pytorch_model.bin' in message(folder)
    torch.save({'transformer.wte.weight': Path('code')}, folder / 'pytorch_model.bin')  # a pickled object
    assert 'cannot be read as weights alone' in message(folder)
    torch.save(torch.zeros(3), folder / 'pytorch_model.bin')
    assert 'it holds a Tensor' in message(folder)
    (folder / 'pytorch_model.bin').unlink()
    torch.save({'transformer.wte.weight': torch.zeros(3)}, tmp_path / 'outside.bin')
    index = folder / 'pytorch_model.bin.index.json'
    for shard in (str(tmp_path / 'outside.bin'), '../outside.bin', '..\\outside.bin', 'C:outside.bin', '..'):
        index.write_text(json.dumps({'weight_map': {'a': shard}}), encoding='utf-8')
        assert 'which is not a file beside it' in message(folder)
    index.write_text('{"weight_map": ["a"]}', encoding='utf-8')
    assert 'cannot be read' in message(folder)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    (folder / 'config.json').write_text(json.dumps({**config, 'n_embd': '96'}), encoding='utf-8')
    assert "n_embd='96': that is no size" in message(folder)
    (folder / 'config.json').write_text('[]', encoding='utf-8')
    assert 'config.json holds no object but a list' in message(folder)
    (folder / 'config.json').unlink()
    assert 'config.json cannot be read' in message(folder)
    monkeypatch.setitem(sys.modules, 'safetensors', None)  # as if it were not installed
    assert 'needs the package safetensors: pip install safetensors' in message(gpt2_folder)


def test_an_untied_head_is_refused(tmp_path):
    theirs, folder = small(tmp_path)
    state = theirs.state_dict()
    (folder / 'model.safetensors').unlink()
    torch.save({**state, 'lm_head.weight': state['lm_head.weight'] + 1}, folder / 'pytorch_model.bin')
    with pytest.raises(PretrainedError, match='lm_head is not tied'):
        read(folder)


def hub_cache(folder: Path, cache: Path, repo: str) -> dict:
    """The environment in which `repo` is found in a local cache of the hub, and no network is asked."""
    at = cache / f'models--{repo.replace("/", "--")}'
    shutil.copytree(folder, at / 'snapshots' / ('0' * 40))
    (at / 'refs').mkdir(parents=True)
    (at / 'refs' / 'main').write_text('0' * 40, encoding='utf-8')
    return {**os.environ, 'HF_HUB_CACHE': str(cache), 'HF_HUB_OFFLINE': '1'}


def test_a_name_on_the_hub_is_read_through_its_cache(gpt2_folder, tmp_path, root):
    env = hub_cache(gpt2_folder, tmp_path, 'ai-forever/tiny')
    code = (
        'import sys; sys.path.insert(0, sys.argv[1]); from runs import pretrained\n'
        'for name in sys.argv[2:]:\n'
        '    try:\n'
        '        print(pretrained.read(name).config.n_layer)\n'
        '    except pretrained.PretrainedError as e:\n'
        '        print(e)\n'
    )
    command = [sys.executable, '-c', code, str(root), 'ai-forever/tiny', 'gpt2']
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == '24'
    assert out[1].startswith('gpt2 is no folder, and cannot be had from https://huggingface.co')
    assert 'copy its config.json' in out[1]


def test_tokens_must_mean_the_same(gpt2_folder):
    checkpoint = read(gpt2_folder)
    assert token_difference(load(str(gpt2_folder)), checkpoint) == ''
    assert token_difference(Bytes(), checkpoint).startswith('token 0 is ')
    other = "token 0 is 'a' in the data and '<pad>' in the checkpoint"
    assert token_difference(Chars('abc'), checkpoint) == other
    nowhere = checkpoint._replace(folder=gpt2_folder / 'none')
    assert 'the tokenizer of the checkpoint is not known' in token_difference(Bytes(), nowhere)
    model = GPT(replace(checkpoint.config, n_layer=1), seed=0)
    start = model.transformer.wte.weight.clone()
    rows = copy_weights(model, checkpoint, other_tokens='token 0 is another')
    assert torch.equal(model.transformer.wte.weight, start)
    assert next(row for row in rows if 'wte' in row.name).how == 'initialised: token 0 is another'
    torch.testing.assert_close(model.transformer.wpe.weight, checkpoint.weights['transformer.wpe.weight'])


def test_gpt2s_two_tokenizers_are_the_same_tokens(shared, tmp_path, monkeypatch):
    """tiktoken's gpt2, which prepares data, and the files of a GPT-2 folder: all 50257 ids agree."""
    cache = shared / 'tiktoken_cache'
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(shutil.copytree(cache, tmp_path / 'cache')))
    names = {'encoder.json': 'vocab.json', 'vocab.bpe': 'merges.txt'}  # GPT-2's own, and those of the hub
    for source, name in names.items():
        digest = hashlib.sha1(f'{GPT2_URL}{source}'.encode()).hexdigest()
        shutil.copyfile(cache / digest, tmp_path / name)
    gpt2 = Tiktoken('gpt2')
    assert gpt2.vocab_size == 50257 and token_difference(gpt2, Pretrained('', tmp_path, None, {})) == ''


# ---- a run of this project, and what hf.py exports of one


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of `reflex` 2-1-1, its data set, and its folder as hf.py exports it."""
    import hf
    from runs.models import load_model

    folder = tmp_path_factory.mktemp('trained')
    data = tiny.write_tokens(folder / 'tokens')
    tiny.start(folder / 'run', data, n_layer=3, max_iters=10)
    model, _ = load_model(folder / 'run')
    hf.export(model, Bytes(), folder / 'exported')
    return folder


@pytest.mark.parametrize('what', ['run', 'run/best.pt', 'exported'])
def test_a_run_is_weights_to_start_from(trained, what):
    """The same computes the same; the tokenizer is known, of a run from the checkpoint itself."""
    from runs.models import load_model

    theirs, _ = load_model(trained / 'run')
    found = read(trained / what)
    model, rows = from_pretrained(trained / what)
    x = ids(2, 16) % 257
    with torch.no_grad():
        wanted, same = theirs(x)[0][..., :257], model.eval()(x)[0][..., :257]
    torch.testing.assert_close(same, wanted, rtol=1e-5, atol=1e-6)
    assert {row.how for row in rows} == {'copied'}
    assert found.config.attention == 'reflex(2-2)' and token_difference(Bytes(), found) == ''


def test_heads_that_the_run_does_not_have_are_initialised(trained):
    """From 2-1-1 to a plan that produces all of them: what both have is copied, head by head."""
    source = read(trained / 'run')
    changed = {'attention': 'vanilla', 'block_size': 8, 'norm': 'rmsnorm'}
    model, rows = from_pretrained(trained / 'run', seed=5, **changed)
    fresh, plans = GPT(model.config, seed=5), (source.config.head_plan(), model.config.head_plan())
    for l, (block, new) in enumerate(zip(model.transformer.h, fresh.transformer.h, strict=True)):
        theirs = source.weights[f'transformer.h.{l}.attn.c_attn.weight'].split(8)
        have, want = (
            [*range(4), *(4 + h for h in plan.keys[l]), *(8 + h for h in plan.values[l])] for plan in plans
        )
        own = new.attn.c_attn.weight.split(8)
        wanted = [theirs[have.index(h)] if h in have else own[i] for i, h in enumerate(want)]
        assert torch.equal(block.attn.c_attn.weight, torch.cat(wanted))
    how = {row.name: row.how for row in rows}
    missing = [len({*b} - {*a}) for a, b in zip(plans[0].keys, plans[1].keys, strict=True)]
    assert max(missing) > 0
    for l, n in enumerate(missing):
        text = how[f'transformer.h.{l}.attn.c_attn.weight']
        assert (f', {2 * n} heads initialised that the checkpoint does not have' in text) == (n > 0), text
    assert how['transformer.wpe.weight'] == 'the first 8 rows copied, the other 8 left out'
    assert how['transformer.h.0.ln_1.weight'] == 'copied, layernorm as rmsnorm'


def test_train_starts_from_the_weights_of_a_run(trained, tmp_path, capsys):
    """In another folder, with another context, plan and type; the table says what became of each tensor."""
    import train

    argv = tiny.flags(tmp_path / 'run', dataset=trained / 'tokens', init_from=trained / 'run', **tiny.TINY)
    of_the_run = ('--n_layer', '--n_head', '--n_embd', '--attention', '--head_split')
    argv = [a for a in argv if not a.startswith(of_the_run)]
    changed = ['--block_size=8', '--attention=reflex_all', '--dtype=bfloat16', '--max_iters=2']
    assert train.main([*argv, *changed]) == 0
    said = capsys.readouterr().out
    assert f'from {trained / "run"}:' in said and 'reflex_all, 3 layers, 4 heads, 32 wide' in said
    assert 'wpe.weight' in said and 'the first 8 rows copied, the other 8 left out' in said
    first = next(r for r in tiny.lines(tmp_path / 'run') if 'val/loss' in r)
    assert first['val/loss'] < 5  # not the log(257) = 5.55 of a fresh model
    again = tiny.flags(tmp_path / 'run', init_from=trained / 'run', dataset=trained / 'tokens')
    with pytest.raises(ConfigError, match='holds a finished run'):
        train.main(again)


def test_what_cannot_be_started_from_is_one_line(trained, tmp_path):
    from runs.checkpoint import CheckpointError

    with pytest.raises(CheckpointError, match=r'nowhere\.pt does not exist'):
        read(tmp_path / 'nowhere.pt')
    tiny.start(tmp_path / 'deep', trained / 'tokens', **DEEP)
    with pytest.raises(PretrainedError, match='deep holds a Hierarchy: no GPT starts from its weights'):
        read(tmp_path / 'deep')
    exported = shutil.copytree(trained / 'exported', tmp_path / 'exported')
    for change, line in {
        'bias': (True, 'transformer.h.0.ln_1.bias is missing'),
        'n_head': (5, 'config.json: n_embd=32 is not a multiple of n_head=5'),
        'attention': (7, 'config.json sets attention to 7, but attention wants text'),
        'model_type': ('reflex_hierarchy', "is of model_type 'reflex_hierarchy'"),
    }.items():
        config = json.loads((trained / 'exported' / 'config.json').read_text(encoding='utf-8'))
        config[change], line = line
        (exported / 'config.json').write_text(json.dumps(config), encoding='utf-8')
        with pytest.raises(UserError, match=line):
            read(exported)


DEEP = {
    'model': 'hierarchy',
    'groups': 4,
    'latents': '2',
    'widths': '16-32',
    'max_iters': 1,
    'attention': 'vanilla',
}
