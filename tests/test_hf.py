"""The adapter for `transformers`: the same logits and tokens, saved, loaded, generated, trained, exported."""

import os
import shutil
import subprocess
import sys
from dataclasses import MISSING, asdict, fields, replace

import pytest
import torch

from conftest import random_gpt, small_specs
from data.tokenizer import Bytes, Chars, Tiktoken, train_bpe
from hierarchy import HierarchyConfig
from model import GPT, GPTConfig
from runs import checkpoint

transformers = pytest.importorskip('transformers')
pytest.importorskip('accelerate')

import hf  # noqa: E402
from hf import LeapConfig, LeapForCausalLM, ReflexConfig, ReflexForCausalLM  # noqa: E402
from modeling_reflex import CACHE_NAME, ReflexCache, one_file  # noqa: E402

TINY = GPTConfig(
    block_size=32,
    vocab_size=64,
    vocab_used=50,
    n_layer=3,
    n_head=4,
    n_embd=32,
    attention='reflex(2-1-1)',
)
KINDS = {
    **{spec: {'attention': spec} for spec in small_specs()},
    'three lags': {'attention': 'reflex(2-1-1)'},
    'first layer, values apart': {'attention': 'layer0_residual(4/2-1-1)'},
    'all that is new': {'x0_skip': True, 'softcap': 5.0, 'tied': False, 'mlp': 'relu2', 'mlp_hidden': 80},
    'keys and values apart': {'attention': 'reflex(4/2-1-1)'},
    'no own key': {'attention': 'reflex(2-2/4)', 'n_layer': 2},
    'windows': {'attention': 'vanilla(window=3)*2 reflex(2-1-1, window=5)'},
    'leap without end': {'attention': 'leap(2-5-0)', 'position': 'rotary'},
    'leap below reflex': {'attention': 'leap*2 reflex(2-2)*2', 'n_layer': 4},
    'modern': {'norm': 'rmsnorm', 'mlp': 'swiglu', 'position': 'rotary', 'qk_norm': True, 'bias': True},
    'leap with windows': {'attention': 'leap(2-5-0)'},
    'leap and vanilla': {'attention': 'vanilla leap*2', 'position': 'none'},
    'no positions': {'position': 'none', 'mlp': 'gelu_tanh'},
}


def make(**changes) -> GPT:
    return random_gpt(replace(TINY, **changes), std=0.25)


def tokens(B=2, T=6, seed=1):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, n=12, **options):
    return model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=0, **options)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """folder and GPT of each kind, exported once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder, model = tmp_path_factory.mktemp('exported'), make(**KINDS[kind])
            hf.export(model, None, folder)
            made[kind] = folder, model
        return made[kind]

    return get


@pytest.mark.parametrize('kind', KINDS)
def test_exported_and_loaded_it_is_the_same_model(exported, kind):
    folder, model = exported(kind)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded) is ReflexForCausalLM and loaded.config.vocab_size == 50
    ids = tokens(2, 32)
    with torch.no_grad():
        wanted = model(ids)[0][..., :50]  # padding rows are gone
        out = loaded(ids, labels=ids)
    assert wanted.std() > 0.3
    torch.testing.assert_close(out.logits, wanted, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-5)
    assert (loaded.gpt.lm_head.weight is loaded.gpt.transformer.wte.weight) == model.config.tied


@pytest.mark.parametrize('kind', KINDS)
def test_generate_gives_the_same_tokens_with_and_without_a_cache(exported, kind):
    folder, model = exported(kind)
    loaded = ReflexForCausalLM.from_pretrained(folder).eval()
    ids = tokens()
    wanted = model.generate(ids, 12, temperature=0)
    outs = [
        greedy(loaded, ids, use_cache=use_cache, output_logits=True, return_dict_in_generate=True)
        for use_cache in (True, False)
    ]
    assert torch.equal(outs[0].sequences, wanted) and torch.equal(outs[1].sequences, wanted)
    cached, full = (torch.stack(out.logits) for out in outs)
    torch.testing.assert_close(cached, full, rtol=1e-4, atol=1e-4)
    assert full.std(dim=0).mean() > 0.05  # the context moves the logits
    for options in ({'do_sample': True, 'top_k': 10}, {'num_beams': 3}, {'num_beams': 2, 'do_sample': True}):
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            drawn.append(
                loaded.generate(ids, max_new_tokens=12, use_cache=use_cache, pad_token_id=0, **options)
            )
        assert torch.equal(*drawn), options


@pytest.mark.parametrize('kind', KINDS)
def test_a_second_turn_goes_on_from_the_cache_of_the_first(exported, kind):
    loaded = ReflexForCausalLM.from_pretrained(exported(kind)[0]).eval()
    options = {'max_new_tokens': 4, 'do_sample': False, 'pad_token_id': 0}
    first = loaded.generate(tokens(1, 8), return_dict_in_generate=True, **options)
    cache = first[CACHE_NAME]
    held = cache.get_seq_length()
    longer = torch.cat([first.sequences, tokens(1, 3, seed=9)], dim=1)
    second = loaded.generate(longer, **{CACHE_NAME: cache}, **options)
    assert torch.equal(second, loaded.generate(longer, **options))
    assert held < longer.size(1) and cache.get_seq_length() == longer.size(1) + 3


@pytest.mark.parametrize('kind', KINDS)
def test_left_padding_changes_nothing(exported, kind):
    loaded = ReflexForCausalLM.from_pretrained(exported(kind)[0]).eval()
    prompts = [tokens(1, T, seed=T) for T in (3, 7, 5)]
    batch = torch.cat([torch.nn.functional.pad(p, (7 - p.size(1), 0), value=9) for p in prompts])
    mask = torch.stack([torch.arange(7) >= 7 - p.size(1) for p in prompts]).long()
    for options in ({}, {'use_cache': False}, {'num_beams': 3}):
        together = greedy(loaded, batch, attention_mask=mask, **options)
        for row, prompt in zip(together, prompts, strict=True):
            assert torch.equal(row[7:], greedy(loaded, prompt, **options)[0, prompt.size(1) :]), options
    with torch.no_grad():  # the other side: padding after the text
        right = torch.cat([torch.nn.functional.pad(p, (0, 7 - p.size(1)), value=9) for p in prompts])
        logits = loaded(right, attention_mask=mask.flip(1)).logits
        for row, prompt in zip(logits, prompts, strict=True):
            alone = loaded(prompt).logits[0]
            torch.testing.assert_close(row[: prompt.size(1)], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_padded_on_the_right_goes_on_or_is_refused(exported, kind):
    loaded = ReflexForCausalLM.from_pretrained(exported(kind)[0]).eval()
    ids = tokens(2, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]])
    start = loaded(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)

    def go_on():
        options = {'attention_mask': mask, 'past_key_values': start.past_key_values}
        return loaded(ids[:, 5:], **options).logits[1]

    if loaded.gpt.padding == 'left':
        with pytest.raises(ValueError, match='padding stands between tokens'):
            go_on()
    else:
        alone = loaded(torch.cat([ids[1:, :3], ids[1:, 5:]], dim=1)).logits[0, 3:]
        torch.testing.assert_close(go_on(), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_what_stands_in_the_padding_does_not_matter_in_training(kind):
    config = config_of(replace(TINY, **KINDS[kind]))
    model = ReflexForCausalLM(ReflexConfig(**config))
    weights = {**make(**KINDS[kind]).state_dict(), '_extra_state': model.gpt.get_extra_state()}
    model.gpt.load_state_dict(weights)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    losses, grads = [], []
    for filler in (9, 33):
        ids = torch.tensor([[9, 9, 1, 2, 3], [4, 5, 6, 7, 8], [9, 3, 2, 1, 4]]).masked_fill(mask == 0, filler)
        model.zero_grad()
        # a label is predicted from the place before it: the first real one would be, from padding
        before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        labels = ids.masked_fill((mask == 0) | (before == 0), -100)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*losses)
    for name, grad in grads[0].items():
        assert torch.isfinite(grad).all(), name
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def config_of(config: GPTConfig) -> dict:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name != 'vocab_used'}


def test_the_config_is_gptconfig_and_checks_like_it():
    ours = {f.name: f.default for f in fields(GPTConfig) if f.name != 'vocab_used'}
    theirs = {f.name: f.default for f in fields(ReflexConfig) if f.default is not MISSING}
    assert {name: theirs.get(name) for name in ours} == ours, (
        'a field of GPTConfig is not one of ReflexConfig'
    )
    named = ReflexConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, n_positions=16)
    assert (named.n_embd, named.n_layer, named.n_head, named.block_size) == (64, 2, 4, 16)
    assert named.max_position_embeddings == 16 and named.hidden_size == 64
    with pytest.raises(Exception, match="head split '4-2-2' adds up to 8 heads, but n_head=4"):
        ReflexConfig(n_head=4, attention='reflex')
    for untied in (ReflexConfig(tie_word_embeddings=False), ReflexConfig(tied=False)):
        assert not untied.tied and not untied.tie_word_embeddings and not untied.gpt_config().tied


def test_a_new_model_starts_as_gpt_does():
    """GPT's own initialisation survives: no other reaches it."""
    torch.manual_seed(3)
    model = ReflexForCausalLM(ReflexConfig(**config_of(TINY)))
    torch.manual_seed(3)
    plain = GPT(replace(TINY, vocab_used=0))
    for (name, p), (_, q) in zip(model.gpt.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    'change',
    [{'attention': 'vanilla'}, {'position': 'rotary'}, {'position': 'none'}, {'norm': 'rmsnorm'}],
    ids=str,
)
def test_weights_do_not_load_into_another_model(exported, change):
    with pytest.raises(ValueError, match='another attention plan or kind of block'):
        ReflexForCausalLM.from_pretrained(exported('reflex(2-2)')[0], **change)


def test_missing_weights_are_refused(exported, tmp_path):
    from safetensors.torch import load_file, save_file

    model = ReflexForCausalLM.from_pretrained(exported('lime')[0])
    for lost in ('gpt.transformer.h.1.attn.router', 'gpt.transformer.h.0.mlp.c_fc.weight'):
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / 'model.safetensors')
        del weights[lost]
        save_file(weights, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
        with pytest.raises(
            ValueError, match=f'{lost.split(".", 1)[1].rpartition(".")[0]} is not in the weights'
        ):
            ReflexForCausalLM.from_pretrained(tmp_path)


def test_bf16_and_more_tokens(exported):
    half = ReflexForCausalLM.from_pretrained(exported('modern')[0], dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert greedy(half, tokens()).shape == (2, 18)
    model = ReflexForCausalLM.from_pretrained(exported('reflex(2-2)')[0])
    before = model(tokens()).logits
    model.resize_token_embeddings(53)
    assert model.config.vocab_size == 53 and model.gpt.lm_head.weight is model.gpt.transformer.wte.weight
    torch.testing.assert_close(model(tokens()).logits[..., :50], before)


def test_what_is_not_offered_says_so(exported):
    model = ReflexForCausalLM.from_pretrained(exported('reflex(2-2)')[0])
    for name in ('past_key_values', 'cache'):  # before transformers 5.24 and since
        with pytest.raises(ValueError, match='the cache is a DynamicCache'):
            model(tokens(), **{name: transformers.DynamicCache()})
    with pytest.raises(ValueError, match='33 tokens do not fit block_size=32'):
        model(tokens(1, 33))
    with pytest.raises(ValueError, match='attention_mask has 4 dimensions'):
        model(tokens(), attention_mask=torch.ones(2, 1, 6, 6))
    cache = ReflexCache(model, 2)
    with pytest.raises(NotImplementedError, match='the model that made this cache fills it'):
        cache.update(1)
    model(tokens(), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 6 and cache.get_max_length() == 32
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    cache.crop(3)  # before transformers 5.24: how many are left
    assert cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.batch_repeat_interleave(2)
    assert model(tokens(4, 1), past_key_values=cache).logits.shape == (4, 1, 50)


def test_trainer_trains_saves_and_resumes(tmp_path):
    text = torch.arange(400) * 3 % 50
    rows = [{'input_ids': row, 'labels': row} for row in text.split(20)]

    def trainer(**changes):
        torch.manual_seed(0)
        settings = {
            'output_dir': str(tmp_path),
            'per_device_train_batch_size': 4,
            'learning_rate': 1e-2,
            'logging_steps': 5,
            'max_steps': 20,
            'save_steps': 10,
            'eval_strategy': 'steps',
            'eval_steps': 10,
            'report_to': [],
            'use_cpu': True,
            'disable_tqdm': True,
        }
        return transformers.Trainer(
            ReflexForCausalLM(ReflexConfig(**config_of(TINY))),
            transformers.TrainingArguments(**{**settings, **changes}),
            train_dataset=rows,
            eval_dataset=rows[:4],
        )

    first = trainer()
    first.train()
    losses = [entry['loss'] for entry in first.state.log_history if 'loss' in entry]
    assert losses[-1] < losses[0] - 1
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-10'))
    ends = [{n: p.detach() for n, p in t.model.named_parameters()} for t in (first, again)]
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, rtol=1e-4, atol=1e-5)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'checkpoint-20').eval()
    first.model.eval()
    torch.testing.assert_close(saved(tokens()).logits, first.model(tokens()).logits)


def test_the_published_leap_example_works_but_for_its_import(tmp_path):
    config = LeapConfig(
        hidden_size=32,
        vocab_size=50,
        n_positions=64,
        n_layer=6,
        n_heads=4,
        use_local_att=True,
        window_sizes=None,
        initializer_range=0.02,
        hidden_dropout_prob=0.1,
    )
    model = LeapForCausalLM(config)
    attentions = [block.attn.describe() for block in model.gpt.transformer.h]
    windows = [*(f'window {w}' for w in (4, 8, 16, 32, 64)), 'global']
    assert attentions == [f'leap {w}, 4 heads' for w in windows]
    assert (model.gpt.config.dropout, model.gpt.config.n_embd, model.gpt.config.block_size) == (0.1, 32, 64)
    rows = [{'input_ids': row, 'labels': row} for row in (torch.arange(800) * 3 % 50).split(40)]
    arguments = {'per_device_train_batch_size': 4, 'learning_rate': 1e-2, 'max_steps': 20, 'logging_steps': 5}
    arguments |= {'output_dir': str(tmp_path), 'use_cpu': True, 'disable_tqdm': True, 'report_to': []}
    trainer = transformers.Trainer(model, transformers.TrainingArguments(**arguments), train_dataset=rows)
    trainer.train()
    losses = [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]
    assert losses[-1] < losses[0] - 1
    trainer.save_model(tmp_path / 'leap')
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'leap').eval()
    assert LeapConfig.from_pretrained(tmp_path / 'leap').attention == 'leap(auto)'
    assert torch.equal(greedy(loaded, tokens()), greedy(model.eval(), tokens()))


@pytest.mark.parametrize(
    ('given', 'windows'),
    [({'use_local_att': False}, 'global'), ({'window_sizes': [3, 7, None]}, '3-7-0'), ({}, 'auto')],
)
def test_leap_config_speaks_of_windows_as_published(given, windows):
    config = LeapConfig(n_layer=3, hidden_size=32, n_heads=4, **given)
    assert config.attention == f'leap({windows})'
    assert LeapConfig(**config.to_dict()).attention == config.attention
    with pytest.raises(ValueError, match=r'initializer_range=0\.1'):
        LeapConfig(initializer_range=0.1)


def test_the_folder_loads_where_this_project_is_not(exported, tmp_path):
    """In another process, from another folder, by the code in the exported folder alone; and saves again."""
    folder, model = exported('modern')
    ids = tokens()
    code = f"""
import sys, torch, transformers
load = transformers.AutoModelForCausalLM.from_pretrained
model = load({str(folder)!r}, trust_remote_code=True).eval()  # a folder that this test wrote
assert not {{'hf', 'model', 'plans', 'modeling_reflex'}} & sys.modules.keys()
model.save_pretrained('again')
again = load('again', trust_remote_code=True).eval()
ids = torch.tensor({ids.tolist()})
for m in (model, again):
    print(m.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0).tolist())
"""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env |= {'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '1'}
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    wanted = model.generate(ids, 12, temperature=0).tolist()
    assert run.stdout.splitlines() == [str(wanted)] * 2


def test_one_file_refuses_two_meanings_of_a_name(tmp_path):
    (tmp_path / 'a.py').write_text('from b import f\n\n\ndef g():\n    return f()\n', encoding='utf-8')
    (tmp_path / 'b.py').write_text('def f():\n    return 1\n', encoding='utf-8')
    joined = one_file(tmp_path / 'a.py')
    space = {}
    exec(joined, space)
    assert space['g']() == 1 and 'import f' not in joined
    (tmp_path / 'b.py').write_text('def f():\n    return 1\n\n\ng = 2\n', encoding='utf-8')
    with pytest.raises(ValueError, match=r'g is defined in b.py and in a.py'):
        one_file(tmp_path / 'a.py')


@pytest.mark.parametrize('mlp', ['gelu', 'gelu_tanh'])
@pytest.mark.parametrize('bias', [False, True])
def test_vanilla_is_exported_as_a_plain_gpt2(mlp, bias, tmp_path):
    model = make(attention='vanilla', mlp=mlp, bias=bias)
    hf.export(model, None, tmp_path, as_gpt2=True)
    assert not list(tmp_path.glob('*.py'))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.GPT2LMHeadModel
    ids = tokens(2, 32)
    with torch.no_grad():
        wanted = model(ids)[0][..., :50]
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(greedy(loaded, tokens()), model.generate(tokens(), 12, temperature=0))


@pytest.mark.parametrize(
    'change',
    [{'attention': 'reflex(2-2)'}, {'norm': 'rmsnorm'}, {'mlp': 'swiglu'}, {'position': 'rotary'}],
    ids=str,
)
def test_what_is_no_gpt2_is_not_exported_as_one(change, tmp_path):
    name = next(iter(change))
    with pytest.raises(hf.ExportError, match=f'{name}=.* is not GPT-2'):
        hf.export(make(**{'attention': 'vanilla', **change}), None, tmp_path, as_gpt2=True)


HIERARCHIES = {
    'plain': {},
    'options': {'compression': 'transformer', 'upsample': 'attention', 'skip': 'interpolate', 'dense': True}
    | {'channels': 2, 'channel_every': 2, 'attention': 'reflex', 'head_split': '2-2', 'n_layer': 4}
    | {'position': 'rotary', 'latent_loss': 0.1},
}


@pytest.mark.parametrize('options', HIERARCHIES.values(), ids=HIERARCHIES)
def test_a_hierarchy_is_exported_like_a_gpt(options, tmp_path):
    shape = {**asdict(TINY), 'attention': 'vanilla', 'groups': 4, 'latents': '3-1', 'widths': '16-16-32'}
    model = random_gpt(HierarchyConfig(**{**shape, 'widths': '16-16-32', **options}), std=0.25)
    hf.export(model, None, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is hf.HierarchicalForCausalLM and loaded.config.vocab_size == 50
    ids = tokens(2, 30)
    wanted = model(ids)[0][..., :50]
    out = loaded(ids, labels=ids)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    assert all(p.grad is not None for name, p in loaded.named_parameters() if 'predict' not in name)
    for use_cache in (True, False):
        found = greedy(loaded, tokens(), use_cache=use_cache)
        assert torch.equal(found, model.generate(tokens(), 12, temperature=0))
    beams = [greedy(loaded, tokens(), num_beams=3, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*beams)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0  # on the right
    masked = loaded(ids, attention_mask=mask).logits
    torch.testing.assert_close(masked[:, :20], wanted[:, :20], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='padding goes to the right'):
        loaded(ids, attention_mask=mask.flip(1))
    with pytest.raises(hf.ExportError, match='a Hierarchy is not GPT-2'):
        hf.export(model, None, tmp_path, as_gpt2=True)


def test_an_exported_hierarchy_loads_from_its_own_code(tmp_path):
    shape = {**asdict(TINY), 'attention': 'vanilla', 'groups': 4, 'latents': '3-1', 'widths': '16-16-32'}
    model = random_gpt(HierarchyConfig(**shape), std=0.25)
    hf.export(model, None, tmp_path / 'exported')
    code = (
        'import sys, transformers\n'
        "model = transformers.AutoModelForCausalLM.from_pretrained('exported', trust_remote_code=True)\n"
        "assert 'hierarchy' not in sys.modules\n"
        'print(type(model).__name__, sum(p.numel() for p in model.parameters()))'
    )
    environment = {**os.environ, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, '-c', code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    expected = model.num_params(non_embedding=False) - 14 * 16  # padding rows
    assert run.stdout.split() == ['HierarchicalForCausalLM', str(expected)], run.stderr


def test_the_config_of_a_hierarchy_is_hierarchyconfig():
    ours = {f.name: f.default for f in fields(HierarchyConfig) if f.name != 'vocab_used'}
    theirs = {f.name: f.default for f in fields(hf.HierarchicalConfig) if f.default is not MISSING}
    assert {name: theirs.get(name) for name in ours} == ours
    with pytest.raises(Exception, match='block_size=30'):
        hf.HierarchicalConfig(n_embd=32, widths='16-16-32', block_size=30, groups=4)


TOKENIZERS = [Bytes(), Chars('abcdefghij \n'), train_bpe(['the quick brown fox, Ёжик в тумане ' * 9], 290)]


@pytest.mark.parametrize('tokenizer', TOKENIZERS, ids=lambda t: t.kind)
def test_tokenizers_give_the_same_ids(tokenizer, tmp_path):
    hf.export(make(vocab_size=320, vocab_used=tokenizer.vocab_size), tokenizer, tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = 'bad face\nbeg' if tokenizer.kind == 'chars' else 'the quick  brown\n\tfox, Ёжик 日本 <|x|>'
    assert loaded(text)['input_ids'] == tokenizer.encode(text)
    assert loaded.decode(tokenizer.encode(text)) == text
    assert loaded.eos_token_id == tokenizer.eot
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == tokenizer.eot
    assert model.config.vocab_size == tokenizer.vocab_size + 1 == loaded.pad_token_id + 1


def test_gpt2s_encoding_is_converted(gpt2_encoding, shared, tmp_path):
    converted = hf.convert_tokenizer(gpt2_encoding, 1024)
    text = (shared / 'data' / 'tinyshakespeare.txt').read_text(encoding='utf-8')[
        :20000
    ] + ' 日本 🙂  naïve\n\n\t1234567'
    assert converted.backend_tokenizer.encode(text).ids == gpt2_encoding.encode(text)
    assert converted.eos_token_id == 50256 and len(converted) == 50258 == converted.pad_token_id + 1


@pytest.fixture
def gpt2_encoding(shared, tmp_path, monkeypatch):
    cache = shutil.copytree(shared / 'tiktoken_cache', tmp_path / 'cache')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
    return Tiktoken('gpt2')


def test_the_program_exports_a_run(tmp_path, capsys):
    model, tokenizer = make(vocab_size=320, vocab_used=257), Bytes()
    state = {
        'model': model.state_dict(),
        'model_args': asdict(model.config),
        'tokenizer': tokenizer.spec,
        'iter': 1,
        'config': {},
        'data_fingerprint': None,
    }
    (tmp_path / 'run').mkdir()
    checkpoint.save(state, tmp_path / 'run')
    assert hf.main([f'--out_dir={tmp_path / "run"}', f'--to={tmp_path / "to"}']) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'to')
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / 'to')('hello', return_tensors='pt')
    assert torch.equal(
        greedy(loaded, text['input_ids'], eos_token_id=None),
        model.generate(torch.tensor([tokenizer.encode('hello')]), 12, temperature=0),
    )


def test_without_transformers_one_line_says_what_to_install(root, tmp_path):
    (tmp_path / 'transformers.py').write_text(
        "raise ModuleNotFoundError(name='transformers')", encoding='utf-8'
    )
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    command = [sys.executable, str(root / 'hf.py'), '--help']
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == 'hf.py needs transformers: pip install -r requirements-extras.txt\n'
