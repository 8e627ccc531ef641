"""What people do with a model in `transformers` beside generating: look inside, adapt, train, take graphs."""

import os
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from data.tokenizer import Bytes, train_bpe
from test_hf import HIERARCHIES, KINDS, TINY, config_of, greedy, make, tokens

transformers = pytest.importorskip('transformers')
pytest.importorskip('accelerate')

import hf  # noqa: E402
from hf import HierarchicalConfig, HierarchicalForCausalLM, LeapConfig, ReflexConfig, ReflexForCausalLM  # noqa: E402
from modeling_reflex import ReflexCache  # noqa: E402

LEVELS = {'attention': 'vanilla', 'groups': 4, 'latents': '3-1', 'widths': '16-16-32'}
ALL = [*KINDS, *(f'hierarchy, {name}' for name in HIERARCHIES)]


def new(kind: str = 'three lags', **changes):
    """A model of one of ALL, whose weights are no longer the small ones of a start."""
    torch.manual_seed(0)
    own = KINDS.get(kind) or {}
    config = config_of(replace(TINY, vocab_used=0, **{**own, **changes}))
    if kind in ALL and kind not in KINDS:
        options = HIERARCHIES[kind.removeprefix('hierarchy, ')]
        model = HierarchicalForCausalLM(HierarchicalConfig(**{**config, **LEVELS, **options}))
    else:
        model = ReflexForCausalLM(ReflexConfig(**config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def reads_ids(model) -> bool:
    return any(kind.layer.reads_tokens for kind in model.gpt._kinds())


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_hidden_states_are_what_the_blocks_read(kind):
    model, ids, read = new(kind, x0_skip=False), tokens(), []
    for block in model.gpt.transformer.h:
        block.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    out = model(ids, output_hidden_states=True)
    n = len(read)
    assert len(out.hidden_states) == n + 1
    for state, wanted in zip(out.hidden_states, read, strict=False):
        assert torch.equal(state, wanted)
    assert torch.equal(model.gpt.logits(out.hidden_states[-1]), out.logits)
    assert model(ids).hidden_states is None
    some = model(ids, output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in some] == [False, *[True] * (n - 1), False]


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_attentions_are_the_weights_that_were_used(kind):
    model, ids = new(kind), tokens()
    if not all(k.layer.has_scores for k in model.gpt._kinds()):
        with pytest.raises(ValueError, match=r'output_attentions: attention=.* has layers in which no token'):
            model(ids, output_attentions=True)
        return
    plain, mask = model(ids), torch.ones_like(ids)
    mask[1, :2] = 0
    out = model(ids, output_attentions=True)
    torch.testing.assert_close(out.logits, plain.logits, rtol=1e-4, atol=1e-5)
    padded = model(ids, attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(
        padded.logits[1, 2:], model(ids, attention_mask=mask).logits[1, 2:], rtol=1e-4, atol=1e-5
    )
    assert len(out.attentions) == model.config.n_layer
    for weights, others in zip(out.attentions, padded.attentions, strict=True):
        assert weights.shape == (2, model.config.n_head, 6, 6)
        sums = weights.sum(-1)
        if kind == 'moda':  # the rest goes to other layers
            assert (sums < 1 + 1e-5).all() and (sums > 0).all()
        else:
            torch.testing.assert_close(sums, torch.ones(2, model.config.n_head, 6))
        assert (weights.triu(1) == 0).all() and (others[1, :, 2:, :2] == 0).all()
    model.set_attn_implementation('eager')  # step by step, without being asked for the weights
    torch.testing.assert_close(model(ids).logits, plain.logits, rtol=1e-4, atol=1e-5)
    cache = ReflexCache(model, 2)
    first = model(ids[:, :4], past_key_values=cache, output_attentions=True)
    last = model(ids[:, 4:], past_key_values=cache, output_attentions=True)
    torch.testing.assert_close(torch.cat([first.logits, last.logits], 1), plain.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.attentions[-1], out.attentions[-1][:, :, 4:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('kind', ALL)
def test_embeddings_may_be_given_in_place_of_ids(kind):
    model, ids = new(kind), tokens()
    embeds = model.get_input_embeddings()(ids)
    if reads_ids(model):
        with pytest.raises(ValueError, match=r'inputs_embeds: attention=.* reads token ids'):
            model(inputs_embeds=embeds)
        return
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    made = model.generate(inputs_embeds=embeds, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(made[:, -5:], greedy(model, ids, 5)[:, 6:])
    for arguments in ({}, {'input_ids': ids, 'inputs_embeds': embeds}):
        with pytest.raises(ValueError, match='give either input_ids or inputs_embeds'):
            model(**arguments)


@pytest.mark.parametrize('kind', ALL)
def test_gradient_checkpointing_changes_no_gradient(kind):
    model, ids, found = new(kind), tokens(2, 12), []
    parts = [m for m in model.modules() if type(m).__name__ in ('Block', 'Encoder')]
    times = []
    parts[0].register_forward_pre_hook(lambda *_: times.append(1))
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({'use_reentrant': False})
        model.train()
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(times) == 1 + 2 and len(found[0]) > 10
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)
    with pytest.raises(ValueError, match='would fill the cache twice'):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match='use_reentrant=True would lose gradients'):
        model.gradient_checkpointing_enable({'use_reentrant': True})


@pytest.mark.parametrize('kind', ALL)
def test_with_a_cache_gradients_reach_the_tokens_of_the_call(kind):
    model = new(kind)
    if reads_ids(model):
        pytest.skip('embeddings cannot be given to it')
    if isinstance(model, HierarchicalForCausalLM):  # what a call leaves to the next may be of the same group
        out = model.base_model(tokens(2, 12), use_cache=True)
        assert not out.last_hidden_state.requires_grad and model(tokens()).logits.requires_grad
        return
    embeds = model.get_input_embeddings()(tokens(2, 12)).detach()
    late, weight = embeds[:, 7:].clone().requires_grad_(), torch.randn(2, 5, 64)
    whole = model(inputs_embeds=torch.cat([embeds[:, :7], late], dim=1)).logits[:, 7:]
    wanted = torch.autograd.grad((whole * weight).sum(), late)
    cache = model(inputs_embeds=embeds[:, :7], use_cache=True).past_key_values
    part = model(inputs_embeds=late, past_key_values=cache).logits
    torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad((part * weight).sum(), late), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kind', ['three lags', 'modern', 'hierarchy, plain', 'leap'])
def test_decoding_that_takes_tokens_back(kind):
    model, ids, helper = new(kind), tokens(1), new('vanilla')
    for options in ({'prompt_lookup_num_tokens': 3}, {'assistant_model': helper}):
        if not ReflexCache(model, 1).is_croppable:  # a recurrence: transformers refuses
            with pytest.raises(ValueError, match='requires a cache that can be cropped'):
                greedy(model, ids, **options)
        else:
            assert torch.equal(greedy(model, ids, **options), greedy(model, ids)), options


def test_what_cannot_end_well_is_refused_before_the_first_token():
    model, ids = new(), tokens()
    started = []
    model.gpt.register_forward_pre_hook(lambda *_: started.append(1))
    with pytest.raises(ValueError, match=r'33 tokens would have to be read, but .* block_size=32'):
        greedy(model, ids, n=28)
    for kind in ('static', 'quantized', 'offloaded'):
        with pytest.raises(ValueError, match=f"cache_implementation='{kind}' is not offered"):
            greedy(model, ids, cache_implementation=kind)
    assert not started
    assert greedy(model, ids, n=27).shape == (2, 33)  # the last token is not read
    assert greedy(new('leap without end'), ids, n=60).shape == (2, 66)


@pytest.mark.parametrize('kind', ALL)
def test_the_model_below_the_head_is_called_like_others(kind):
    model, ids = new(kind), tokens()
    out = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    torch.testing.assert_close(model.gpt.logits(out.last_hidden_state), model(ids).logits)
    again = model.base_model(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    assert again.last_hidden_state.shape[1] == 1 and out.past_key_values.get_seq_length() == 7
    with pytest.raises(ValueError, match='token_type_ids would change nothing'):
        model(ids, token_type_ids=torch.zeros_like(ids))


def test_label_smoothing_shifts_the_labels(tmp_path):
    rows = {'input_ids': tokens(4, 20), 'labels': tokens(4, 20)}
    for kind in ('three lags', 'hierarchy, plain'):
        model = new(kind)
        losses = []
        for factor in (0.0, 1e-7):
            arguments = transformers.TrainingArguments(
                str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=factor
            )
            losses.append(transformers.Trainer(model, arguments).compute_loss(model, dict(rows)))
        torch.testing.assert_close(*losses)
        logits = model(rows['input_ids']).logits
        unshifted = F.cross_entropy(logits.flatten(0, 1), rows['labels'].flatten())
        assert abs(unshifted - losses[0]) > 0.01


@pytest.mark.parametrize(
    ('given', 'told'),
    [
        ({'rope_theta': 5e5}, r'rope_theta=500000.0\): it is 10000 in all these models'),
        ({'initializer_range': 0.1}, r'initializer_range=0.1\): it is 0.02 in all'),
        ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon=1e-06'),
        ({'hidden_act': 'relu'}, "hidden_act='relu'.* would change nothing"),
        ({'num_key_value_heads': 2}, 'num_key_value_heads=2.* would change nothing'),
        ({'head_splits': '4-2-2'}, 'head_splits=.*did you mean head_split'),
        ({'n_layers': 3}, 'n_layers=3.*did you mean n_layer'),
        ({'rescale': 10}, 'rescale=10'),
    ],
    ids=str,
)
def test_a_config_takes_nothing_that_it_does_not_honour(given, told):
    for config_class in (ReflexConfig, HierarchicalConfig):
        with pytest.raises(ValueError, match=told):
            config_class(**given)


def test_what_does_not_differ_may_be_named_and_a_saved_config_may_have_more(tmp_path, caplog):
    assert ReflexConfig(rope_theta=10000.0, initializer_range=0.02).n_embd == ReflexConfig().n_embd
    config = ReflexConfig(**config_of(TINY))
    config.left_by_a_program = 3
    config.save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    assert ReflexConfig.from_pretrained(tmp_path).gpt_config() == config.gpt_config()
    assert 'left_by_a_program=3: it changes nothing' in caplog.text


def test_leap_config_speaks_of_version_1_too():
    """leap-transformer 1.0.1's example, and its default windows: every fourth layer is global."""
    config = LeapConfig(
        hidden_size=128,
        vocab_size=50,
        n_positions=64,
        n_layer=6,
        use_local_att=True,
        window_sizes=None,
        n_head=4,
        initializer_range=None,
        hidden_dropout_prob=0.1,
        rescale=10,
    )
    assert config.attention == 'leap(0-4-8-16-0-4, rescale=10)'
    attn = ReflexForCausalLM(config).gpt.transformer.h[1].attn
    assert (attn.rescale, attn.window, attn.divisor) == (10, 4, 32 / 10)
    assert LeapConfig(n_layer=2, rescale=None, window_sizes=[4, 8]).attention == 'leap(4-8)'


BPE = train_bpe(['the quick brown fox, Ёжик в тумане ' * 9], 290)


@pytest.fixture
def exported(tmp_path):
    """A GPT with a tokenizer, its folder, and both as transformers loads them."""
    gpt = make(vocab_size=320, vocab_used=290, attention='vanilla')
    hf.export(gpt, BPE, tmp_path / 'to')
    load = transformers.AutoTokenizer.from_pretrained
    return gpt, tmp_path / 'to', transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'to'), load


def test_a_batch_of_the_standard_collator_still_learns_to_stop(exported):
    gpt, folder, model, load = exported
    tokenizer = load(folder)
    assert tokenizer.pad_token_id == 290 == model.config.pad_token_id != tokenizer.eos_token_id == BPE.eot
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [[*BPE.encode(text), BPE.eot] for text in ('the fox', 'the quick brown fox')]
    batch = collator([{'input_ids': row} for row in rows])
    for row, labels in zip(rows, batch['labels'].tolist(), strict=True):
        assert [label for label in labels if label != -100] == row
    with torch.no_grad():
        logits, wanted = model(**{**batch, 'labels': None}).logits, gpt(batch['input_ids'])[0]
    real = batch['attention_mask'].bool()
    torch.testing.assert_close(logits[real][:, :290], wanted[real][:, :290], rtol=1e-4, atol=1e-4)
    assert 0 < logits.softmax(-1)[..., 290].max() <= 1 / 291  # what the pad token takes from the others


def test_a_text_holds_no_special_tokens(exported):
    _, folder, _, load = exported
    text = 'the <|endoftext|> fox<|pad|>'
    assert load(folder)(text)['input_ids'] == BPE.encode(text)
    asked = load(folder, split_special_tokens=False)(text)['input_ids']
    assert asked.count(BPE.eot) == 1 and asked[-1] == 290


def test_an_export_is_whole_or_as_it_was(exported, tmp_path, monkeypatch):
    gpt, folder, _, _ = exported
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fails(self, new, **kwargs):
        (new / 'model.safetensors').write_bytes(b'a part')
        raise OSError(28, 'No space left on device')

    with (
        monkeypatch.context() as patch,
        pytest.raises(hf.ExportError, match='could not be written: the disk is'),
    ):
        patch.setattr(ReflexForCausalLM, 'save_pretrained', fails)
        hf.export(gpt, BPE, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    hf.export(gpt, Bytes() if gpt.config.vocab_used == 257 else BPE, folder)  # its own export is replaced
    assert [path.name for path in tmp_path.iterdir()] == ['to']
    (folder / 'notes.txt').write_text('mine', encoding='utf-8')
    with pytest.raises(hf.ExportError, match=r'notes.txt is not as hf.py has written it: .*--overwrite=true'):
        hf.export(gpt, BPE, folder)
    hf.export(gpt, BPE, folder, overwrite=True)
    os.utime(folder / 'config.json', ns=(1, 1))  # a training has saved its own there
    with pytest.raises(hf.ExportError, match=r'config.json is not as hf.py has written it'):
        hf.export(gpt, BPE, folder)
    (tmp_path / 'foreign').mkdir()
    (tmp_path / 'foreign' / 'config.json').write_text('{}', encoding='utf-8')
    with pytest.raises(hf.ExportError, match=r'config.json is not as'):
        hf.export(gpt, BPE, tmp_path / 'foreign')


def test_linear_layers_may_be_quantized_as_they_run():
    model, ids = new('modern'), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch moves it elsewhere
        small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    wanted = model(ids).logits
    assert 0 < (small(ids).logits - wanted).abs().max() < 0.2 * wanted.std()
    assert greedy(small, ids).shape == (2, 18)


# graphs


class Logits(torch.nn.Module):
    """The logits alone, by position: graphs have no dataclasses."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits


SHAPES = ((3, 31), (1, 1), (2, 32), (2, 2))
GRAPHS = ['three lags', 'windows', 'leap', 'gated_delta', 'hierarchy, plain']  # of every way to compute


@torch.no_grad()
@pytest.mark.parametrize('kind', ALL)
def test_a_traced_graph_holds_for_other_sizes(kind):
    model = Logits(new(kind))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        graph = torch.jit.trace(model, (tokens(2, 12),), check_trace=False)
    for shape in SHAPES:
        torch.testing.assert_close(graph(tokens(*shape)), model(tokens(*shape)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('kind', GRAPHS[:4])
def test_an_exported_graph_holds_for_other_sizes(kind):
    model = Logits(new(kind, n_layer=3))
    sizes = {0: torch.export.Dim('B', max=64), 1: torch.export.Dim('T', min=2, max=32)}
    graph = torch.export.export(model, (tokens(2, 12),), dynamic_shapes=(sizes,)).module()
    for shape in SHAPES[2:]:
        torch.testing.assert_close(graph(tokens(*shape)), model(tokens(*shape)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('kind', GRAPHS)
def test_a_graph_in_onnx_holds_for_other_sizes(kind, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = Logits(new(kind))
    sizes = ({0: 'B', 1: 'T'},)
    torch.onnx.export(
        model, (tokens(2, 12),), tmp_path / 'm.onnx', dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / 'm.onnx')
    for shape in SHAPES[:1] + SHAPES[2:]:
        (found,) = session.run(None, {session.get_inputs()[0].name: tokens(*shape).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(tokens(*shape)), rtol=1e-4, atol=1e-4)


# packages of others; none is in requirements-dev.txt


def test_lora_on_the_projections_and_a_table_trained_with_it(tmp_path):
    peft = pytest.importorskip('peft')
    ids = tokens()
    for changes in ({}, {'modules_to_save': ['wte']}):  # the table: then the head is no longer tied to it
        config = peft.LoraConfig(task_type='CAUSAL_LM', target_modules=['c_attn', 'c_proj'], r=2, **changes)
        model = peft.get_peft_model(new(), config)
        before = model(input_ids=ids, labels=ids).loss
        before.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        model.eval()
        wanted = model(input_ids=ids, labels=ids)
        assert wanted.loss < before
        model.save_pretrained(tmp_path / 'adapter')
        again = peft.PeftModel.from_pretrained(new(), tmp_path / 'adapter').eval()
        torch.testing.assert_close(again(input_ids=ids).logits, wanted.logits)
        model.merge_and_unload().save_pretrained(tmp_path / 'merged')
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'merged').eval()
        torch.testing.assert_close(merged(ids).logits, wanted.logits, rtol=1e-4, atol=1e-4)
        assert merged.config.tied is not bool(changes)


def test_trl_trains_on_texts_and_on_preferences(exported, tmp_path):
    trl = pytest.importorskip('trl')
    datasets = pytest.importorskip('datasets')
    _, folder, model, load = exported
    tokenizer = load(folder, split_special_tokens=False)  # trl writes the end of a text as text
    rows = {'prompt': ['the'] * 8, 'chosen': [' quick'] * 8, 'rejected': [' fox'] * 8}
    options = {
        'max_steps': 2,
        'per_device_train_batch_size': 4,
        'report_to': [],
        'use_cpu': True,
        'bf16': False,
    }
    options |= {'disable_tqdm': True, 'output_dir': str(tmp_path / 'trl')}
    sft = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**options),
        train_dataset=datasets.Dataset.from_dict({'text': ['the quick'] * 8}),
        processing_class=tokenizer,
    )
    batch = next(iter(sft.get_train_dataloader()))
    assert batch['labels'][0].tolist() == [*BPE.encode('the quick'), BPE.eot]
    sft.train()
    dpo = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**options),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    dpo.train()


def test_a_gpt2_is_read_by_ctranslate2(tmp_path):
    ctranslate2 = pytest.importorskip('ctranslate2')
    gpt = make(vocab_size=320, vocab_used=290, attention='vanilla')
    hf.export(gpt, BPE, tmp_path / 'to', as_gpt2=True)
    ctranslate2.converters.TransformersConverter(str(tmp_path / 'to')).convert(str(tmp_path / 'ct2'))
    tokenizer, ids = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / 'to'),
        BPE.encode('the quick brown'),
    )
    found = ctranslate2.Generator(str(tmp_path / 'ct2')).forward_batch([tokenizer.convert_ids_to_tokens(ids)])
    found = torch.tensor(found.__array__() if hasattr(found, '__array__') else found)[..., :290]
    torch.testing.assert_close(found, gpt(torch.tensor([ids]))[0][..., :290], rtol=1e-4, atol=1e-5)
