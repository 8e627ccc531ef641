"""A composed model in `transformers`: one folder with all its parts, of which only the joints are trained."""

import os
import subprocess
import sys
from dataclasses import MISSING, fields, replace

import pytest
import torch

from composition import Composed, ComposedConfig, Expert
from conftest import random_gpt
from model import GPTConfig

transformers = pytest.importorskip('transformers')
pytest.importorskip('accelerate')

import hf  # noqa: E402
from modeling_reflex import CACHE_NAME, ComposedReflexConfig, ReflexCache  # noqa: E402
from test_hf import TINY, greedy, tokens  # noqa: E402

EXPERTS = {  # of other widths, depths, positions and attentions than the base
    'wide': {'n_embd': 48, 'n_layer': 2, 'attention': 'vanilla', 'position': 'rotary', 'block_size': 40},
    'untied': {'n_embd': 16, 'n_layer': 4, 'tied': False},
}
KINDS = {
    'all': {},
    'one per token': {'top_k': 1},
    'one per text': {'top_k': 1, 'route': 'text'},
    'threshold': {'threshold': 0.5},
    'voices': {'voice': True},
    'voices, one per text': {'voice': True, 'top_k': 1, 'route': 'text'},
    'untied base': {'top_k': 1, 'tied': False, 'position': 'rotary', 'norm': 'rmsnorm', 'qk_norm': True},
}


def make(shape=TINY, experts=EXPERTS, **changes) -> Composed:
    """A model whose weights are all random; changes: of the base, or of how it is composed."""
    own = {f.name for f in fields(GPTConfig)}
    base = replace(shape, **{name: value for name, value in changes.items() if name in own})
    members = tuple(Expert(name, f'print of {name}', replace(shape, **e)) for name, e in experts.items())
    given = {name: getattr(base, name) for name in own}
    rest = {name: value for name, value in changes.items() if name not in own}
    return random_gpt(ComposedConfig(**given, base='print', experts=members, **rest), std=0.25)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """folder and Composed of each kind, exported once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder, model = tmp_path_factory.mktemp('exported'), make(**KINDS[kind])
            hf.export(model, None, folder)
            made[kind] = folder, model
        return made[kind]

    return get


class Logits(torch.nn.Module):
    """The model as a function of ids alone, for graphs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_exported_and_loaded_it_is_the_same_model(exported, kind, tmp_path):
    folder, model = exported(kind)
    theirs, ids = loaded(folder), tokens(2, 32)
    assert type(theirs) is hf.ComposedReflexForCausalLM and theirs.config.vocab_size == 50
    wanted = model(ids)[0][..., :50]  # padding rows are gone
    out = theirs(ids, labels=ids)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-5)
    for mine, own in {
        model: theirs.gpt,
        **dict(zip(model.experts.values(), theirs.gpt.experts.values(), strict=True)),
    }.items():
        assert (own.lm_head.weight is own.transformer.wte.weight) == mine.config.tied
    theirs.save_pretrained(tmp_path)
    assert torch.equal(loaded(tmp_path)(ids).logits, out.logits)


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_without_padding_rows_logits_are_those_of_ours_bit_for_bit(kind, tmp_path):
    model, ids = make(replace(TINY, vocab_used=0), **KINDS[kind]), tokens(3, 32)
    hf.export(model, None, tmp_path)
    assert torch.equal(loaded(tmp_path)(ids).logits, model(ids)[0])
    experts = ComposedReflexConfig.from_pretrained(tmp_path).gpt_config().experts
    assert experts == model.config.experts  # with their fingerprints


@pytest.mark.parametrize('kind', KINDS)
def test_generate_gives_the_same_tokens_with_and_without_a_cache(exported, kind):
    folder, model = exported(kind)
    theirs, ids = loaded(folder), tokens()
    wanted = model.generate(ids, 12, temperature=0)
    for use_cache in (True, False):
        assert torch.equal(greedy(theirs, ids, use_cache=use_cache), wanted)
    for options in ({'do_sample': True, 'top_k': 10}, {'num_beams': 3}):
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            drawn.append(
                theirs.generate(ids, max_new_tokens=12, use_cache=use_cache, pad_token_id=0, **options)
            )
        assert torch.equal(*drawn), options
    assert theirs.generation_config.top_k is None  # that of the experts is no option of sampling


@pytest.mark.parametrize('kind', KINDS)
def test_a_second_turn_goes_on_from_the_cache_of_the_first(exported, kind):
    theirs = loaded(exported(kind)[0])
    first = greedy(theirs, tokens(1, 8), 4, return_dict_in_generate=True)
    cache = first[CACHE_NAME]
    longer = torch.cat([first.sequences, tokens(1, 3, seed=9)], dim=1)
    assert torch.equal(greedy(theirs, longer, 4, **{CACHE_NAME: cache}), greedy(theirs, longer, 4))
    assert cache.get_seq_length() == longer.size(1) + 3


@pytest.mark.parametrize('kind', KINDS)
def test_left_padding_changes_nothing(exported, kind):
    theirs = loaded(exported(kind)[0])
    prompts = [tokens(1, T, seed=T) for T in (3, 7, 5)]
    batch = torch.cat([torch.nn.functional.pad(p, (7 - p.size(1), 0), value=9) for p in prompts])
    mask = torch.stack([torch.arange(7) >= 7 - p.size(1) for p in prompts]).long()
    for options in ({}, {'use_cache': False}, {'num_beams': 3}):
        together = greedy(theirs, batch, attention_mask=mask, **options)
        for row, prompt in zip(together, prompts, strict=True):
            assert torch.equal(row[7:], greedy(theirs, prompt, **options)[0, prompt.size(1) :]), options


def test_decoding_takes_tokens_back_where_no_expert_is_a_recurrence(tmp_path):
    ids = tokens(1)
    theirs = {}
    for attention in ('vanilla', 'leap'):
        # the threshold is so high that the expert has not run yet when generation begins
        model = make(experts={'one': {'attention': attention}}, threshold=0.99)
        hf.export(model, None, tmp_path / attention)
        theirs[attention] = loaded(tmp_path / attention)
    assert torch.equal(
        greedy(theirs['vanilla'], ids, prompt_lookup_num_tokens=3), greedy(theirs['vanilla'], ids)
    )
    with pytest.raises(ValueError, match='requires a cache that can be cropped'):
        greedy(theirs['leap'], ids, prompt_lookup_num_tokens=3)
    assert not ReflexCache(theirs['leap'], 1).is_croppable


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_step_of_training_changes_what_joins_alone(exported, checkpointing, tmp_path):
    theirs = loaded(exported('one per token')[0])
    if checkpointing:
        theirs.gradient_checkpointing_enable({'use_reentrant': False})
    before = {name: p.clone() for name, p in theirs.named_parameters()}
    rows = [{'input_ids': row, 'labels': row} for row in tokens(4, 20)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=0.01,
        report_to=[], use_cpu=True, save_strategy='no', disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(theirs, arguments, train_dataset=rows).train()
    changed = {name for name, p in theirs.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith('gpt.joints.')}


def test_gradient_checkpointing_changes_no_gradient(exported):
    theirs, ids, found = loaded(exported('one per token')[0]), tokens(2, 12), []
    times = []
    theirs.gpt.transformer.h[2].register_forward_pre_hook(lambda *_: times.append(1))
    for checkpoints in (False, True):
        if checkpoints:
            theirs.gradient_checkpointing_enable({'use_reentrant': False})
        theirs.train()
        theirs.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert len(times) == 1 + 2 and len(found[0]) > 10
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)
    with pytest.raises(ValueError, match='would fill the cache twice'):
        theirs(ids, use_cache=True)
    with pytest.raises(ValueError, match='use_reentrant=True would lose gradients'):
        theirs.gradient_checkpointing_enable({'use_reentrant': True})


@torch.no_grad()
@pytest.mark.parametrize('kind', ['one per token', 'voices'])
def test_hidden_states_and_attentions_are_those_of_the_base(exported, kind):
    theirs, ids, read = loaded(exported(kind)[0]), tokens(), []
    for block in theirs.gpt.transformer.h:
        block.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    out = theirs(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and all(map(torch.equal, out.hidden_states, read))
    assert torch.equal(theirs.gpt.logits(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(out.logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(out.attentions) == 3
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6))
        assert (weights.triu(1) == 0).all()


def test_what_is_not_offered_says_so(exported, tmp_path):
    theirs, ids = loaded(exported('one per token')[0]), tokens()
    with pytest.raises(ValueError, match='inputs_embeds: experts have token tables of their own'):
        theirs(inputs_embeds=theirs.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match='every part has a token table of its own'):
        theirs.resize_token_embeddings(60)
    with pytest.raises(ValueError, match='a graph has one way for all'):
        torch.jit.trace(Logits(theirs), ids)
    with pytest.raises(hf.ExportError, match='a Composed is not GPT-2'):
        hf.export(exported('all')[1], None, tmp_path, as_gpt2=True)
    with pytest.raises(Exception, match='a composed model needs experts'):
        ComposedReflexConfig()


def test_the_config_is_composedconfig():
    ours = {f.name: f.default for f in fields(ComposedConfig) if f.name != 'vocab_used'}
    ours['experts_top_k'] = ours.pop('top_k')
    theirs = {f.name: f.default for f in fields(ComposedReflexConfig) if f.default is not MISSING}
    assert {name: theirs.get(name) for name in ours} == ours


@pytest.mark.parametrize('kind', ['all', 'voices'])
def test_where_all_experts_run_a_traced_graph_holds_for_other_sizes(exported, kind):
    theirs = loaded(exported(kind)[0])
    with torch.no_grad():
        traced = torch.jit.trace(Logits(theirs), tokens(2, 9), check_trace=False)
        for B, T in ((2, 9), (3, 5), (1, 32)):
            ids = tokens(B, T)
            torch.testing.assert_close(traced(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_folder_loads_where_this_project_is_not(exported, tmp_path):
    """In another process, from another folder, by the code in the exported folder alone; and saves again."""
    folder, model = exported('one per token')
    ids = tokens()
    code = f"""
import sys, torch, transformers
load = transformers.AutoModelForCausalLM.from_pretrained
model = load({str(folder)!r}, trust_remote_code=True).eval()  # a folder that this test wrote
assert not {{'hf', 'composition', 'modeling_reflex'}} & sys.modules.keys()
model.save_pretrained('again')
again = load('again', trust_remote_code=True).eval()
ids = torch.tensor({ids.tolist()})
for m in (model, again):
    trained = {{name.split('.')[1] for name, p in m.named_parameters() if p.requires_grad}}
    print(trained, m.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0).tolist())
"""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    env |= {'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '1'}
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{{'joints'}} {model.generate(ids, 12, temperature=0).tolist()}"] * 2
