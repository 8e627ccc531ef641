"""Perplexity against sums written out, and the lm-evaluation-harness against its own HFLM."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as program
from configurator import ConfigError
from conftest import random_gpt
from data.tokendata import FORMAT, eval_starts
from data.tokenizer import Bytes, Chars, train_bpe
from model import GPT, GPTConfig
from runs import checkpoint

TINY = GPTConfig(
    block_size=32, vocab_size=320, vocab_used=257, n_layer=3, n_head=4, n_embd=32, attention='reflex_all'
)
TEXT = 'The quick brown fox jumps over the lazy dog; ёжик в тумане. ' * 3


def save_run(folder: Path, model: GPT, tokenizer, dataset='') -> Path:
    folder.mkdir()
    state = {
        'model': model.state_dict(),
        'model_args': asdict(model.config),
        'tokenizer': tokenizer and tokenizer.spec,
        'begin': None,
        'iter': 1,
        'config': {'dataset': str(dataset)},
        'data_fingerprint': None,
    }
    checkpoint.save(state, folder)
    return folder


def save_data(folder: Path, tokens, tokenizer, n_bytes) -> Path:
    """Token files as prepare.py leaves them; train and val are the same."""
    import hashlib

    folder.mkdir()
    ids = np.array(tokens, dtype='<u2')
    split = {'tokens': len(ids), 'bytes': n_bytes, 'sha256': hashlib.sha256(ids.tobytes()).hexdigest()}
    for name in ('train', 'val'):
        ids.tofile(folder / f'{name}.bin')
    meta = {
        'format': FORMAT,
        'vocab_size': tokenizer.vocab_size,
        'dtype': 'uint16',
        'splits': {'train': split, 'val': split},
        'tokenizer': tokenizer.spec,
    }
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return folder


@torch.no_grad()
def naive(model, tokens, window, stride) -> float:
    """Token by token: the first window counts whole, each later one its end, the last ends with the text."""
    used = model.config.vocab_used or model.config.vocab_size
    total, n_targets, done, start = 0.0, len(tokens) - 1, 0, 0
    while done < n_targets:
        start = min(start, n_targets - window)
        for target in range(done, start + window):
            logits, _ = model(torch.tensor([tokens[start : target + 1]]))
            total -= logits[0, -1, :used].double().log_softmax(-1)[tokens[target + 1]].item()
        done, start = start + window, start + stride
    return total / n_targets


@pytest.mark.parametrize(
    'n, window, stride', [(60, 16, 16), (60, 16, 5), (61, 32, 1), (33, 32, 32), (34, 32, 7)]
)
def test_loss_is_the_sum_over_tokens(n, window, stride):
    model = random_gpt(TINY)
    tokens = torch.randint(257, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    found = program.loss_on(model, np.array(tokens), window, stride, 3, 'cpu', torch.no_grad)
    assert found == pytest.approx(naive(model, tokens, window, stride), rel=1e-5)


def test_windows_predict_every_token_once_and_the_default_is_train_s():
    for n, window, stride in [(100, 16, 16), (100, 16, 3), (97, 16, 16), (17, 16, 16), (18, 16, 1)]:
        starts, skip = program.windows(n, window, stride)
        counted = np.concatenate([np.arange(s + k, s + window) for s, k in zip(starts, skip, strict=True)])
        assert np.array_equal(counted, np.arange(n - 1))
    for n in (100, 97, 17):
        for ours, theirs in zip(program.windows(n, 16, 16), eval_starts(n, 16, 0), strict=True):
            assert np.array_equal(ours, theirs)


def test_a_run_on_its_own_data_and_on_a_text(tmp_path, capsys):
    model, tokenizer = random_gpt(TINY), Bytes()
    tokens = [*tokenizer.encode(TEXT), tokenizer.eot]
    data = save_data(tmp_path / 'data', tokens, tokenizer, len(TEXT.encode('utf-8')))
    run = save_run(tmp_path / 'run', model, tokenizer, data)
    options = [f'--out_dir={run}', f'--save={tmp_path / "result.json"}', '--dtype=float32', '--threads=1']

    def result(*more):
        assert program.main([*options, *more]) == 0
        said = capsys.readouterr().out
        found = json.loads((tmp_path / 'result.json').read_text(encoding='utf-8'))
        assert f'{found["tokens"]:,} tokens, loss {found["loss"]:.4f} nats' in said
        return found

    found = result()
    assert found['loss'] == pytest.approx(naive(model, tokens, 32, 32), rel=1e-5)
    assert found['perplexity'] == pytest.approx(math.exp(found['loss']))
    per_token = len(TEXT.encode('utf-8')) / len(tokens)
    assert found['bits_per_byte'] == pytest.approx(found['loss'] / per_token / math.log(2))
    strided = result('--stride=8', '--window=16', '--split=train')
    assert strided['loss'] == pytest.approx(naive(model, tokens, 16, 8), rel=1e-5)
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    text = result(f'--text={tmp_path / "text.txt"}')
    assert text['loss'] == pytest.approx(naive(model, [256, *tokenizer.encode(TEXT)], 32, 32), rel=1e-5)
    again = result(f'--init_from={run}', '--out_dir=none', f'--text={tmp_path / "text.txt"}')
    assert again == {**text, 'data': again['data']}  # the same weights, tokenizer and beginning
    (tmp_path / 'windows.txt').write_bytes('\ufeffa\r\nb'.encode())
    assert result(f'--text={tmp_path / "windows.txt"}')['tokens'] == 4  # as it is prepared: without the mark
    # every byte is a token here: bits per byte is the loss in bits
    assert text['bits_per_byte'] == pytest.approx(text['loss'] / math.log(2))
    (tmp_path / 'short.txt').write_text('Ё', encoding='utf-8')
    assert result(f'--text={tmp_path / "short.txt"}')['window'] == 2


def test_without_a_beginning_the_first_character_is_given(tmp_path, capsys):
    tokenizer = Chars('abcё')
    run = save_run(tmp_path / 'run', random_gpt(replace(TINY, vocab_size=64, vocab_used=4)), tokenizer)
    (tmp_path / 'text.txt').write_text('ёabcabё', encoding='utf-8')
    options = [f'--out_dir={run}', f'--text={tmp_path / "text.txt"}', f'--save={tmp_path / "r.json"}']
    assert program.main([*options, '--dtype=float32']) == 0
    found = json.loads((tmp_path / 'r.json').read_text(encoding='utf-8'))
    assert found['tokens'] == 6
    assert found['bits_per_byte'] == pytest.approx(found['loss'] * 6 / 7 / math.log(2))  # ё is 2 bytes


def test_plain_token_files_are_predicted_by_the_run_that_was_trained_on_such(tmp_path, capsys):
    model = random_gpt(replace(TINY, vocab_size=320, vocab_used=300))
    (tmp_path / 'data').mkdir()
    ids = np.arange(200, dtype='<u2') * 7 % 300
    for name in ('train', 'val'):
        ids.tofile(tmp_path / f'data/{name}.bin')
    run = save_run(tmp_path / 'run', model, None, tmp_path / 'data')
    assert program.main([f'--out_dir={run}', f'--save={tmp_path / "r.json"}', '--dtype=float32']) == 0
    found = json.loads((tmp_path / 'r.json').read_text(encoding='utf-8'))
    assert found['loss'] == pytest.approx(naive(model, ids.tolist(), 32, 32), rel=1e-5)


def test_what_cannot_be_predicted_is_one_line(tmp_path):
    bpe = train_bpe([TEXT], 300)
    data = save_data(tmp_path / 'data', Bytes().encode(TEXT), Bytes(), 1)
    run = save_run(tmp_path / 'run', random_gpt(TINY), bpe)

    def message(*options, error=ConfigError):
        with pytest.raises(error) as e:
            program.main([f'--out_dir={run}', *options])
        assert '\n' not in str(e.value)
        return str(e.value)

    assert "cannot be predicted by this model: token 0 is '\\x00' in the data" in message(f'--dataset={data}')
    assert 'is longer than block_size=32' in message('--window=33', f'--dataset={data}')
    assert 'stride=-1: must be at least 0' in message('--stride=-1')
    assert 'cannot be read as UTF-8 text' in message('--text=none.txt')
    plain = save_run(tmp_path / 'plain', random_gpt(TINY), None)
    with pytest.raises(ConfigError, match='no tokenizer is known'):
        program.main([f'--out_dir={plain}', '--text=none.txt'])
    with pytest.raises(ConfigError, match='they need a model with a tokenizer'):
        program.main([f'--out_dir={plain}', '--tasks=any'])


def test_an_evaluation_that_says_nothing_is_refused(tmp_path, monkeypatch):
    """Losses that are no numbers, windows that skip tokens, a result that cannot be written."""
    run = save_run(tmp_path / 'run', random_gpt(TINY), Bytes())
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    options = [f'--out_dir={run}', f'--text={tmp_path / "text.txt"}', '--dtype=float32']

    def message(*more):
        with pytest.raises(ConfigError) as e:
            program.main([*options, *more])
        assert '\n' not in str(e.value)
        return str(e.value)

    assert message('--stride=33') == 'stride=33 is longer than the window of 32: it would skip tokens'
    assert 'stride=9 is longer than the window of 8' in message('--window=8', '--stride=9')
    assert message(f'--save={tmp_path}').endswith('cannot be written: it is a folder')
    assert 'cannot be written: ' in message(f'--save={tmp_path / "text.txt" / "r.json"}')
    assert 'threads=5000: from 1 to 1024' in message('--threads=5000')
    (tmp_path / 'short.txt').write_text('short', encoding='utf-8')  # one window, whatever the stride
    assert program.main([*options, f'--text={tmp_path / "short.txt"}', '--stride=32']) == 0
    monkeypatch.setattr(program, 'loss_on', lambda *args: math.nan)
    assert 'text.txt: the loss is nan; try --dtype=float32' in message()


def test_a_loss_beyond_all_perplexity_is_a_number(tmp_path, monkeypatch, capsys):
    run = save_run(tmp_path / 'run', random_gpt(TINY), Bytes())
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    monkeypatch.setattr(program, 'loss_on', lambda *args: 5000.0)
    options = [f'--out_dir={run}', f'--text={tmp_path / "text.txt"}', f'--save={tmp_path / "r.json"}']
    assert program.main(options) == 0
    assert json.loads((tmp_path / 'r.json').read_text(encoding='utf-8'))['perplexity'] > 1e300


def test_a_long_evaluation_shows_that_it_lives(monkeypatch, capsys):
    shown = []

    class Bar:
        def __init__(self, batches, **options):
            shown.append((len(batches), options['delay'], options['mininterval']))
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

    monkeypatch.setattr(program, 'tqdm', Bar)
    tokens = np.arange(200) % 257
    program.loss_on(random_gpt(TINY), tokens, 16, 16, 3, 'cpu', torch.no_grad)
    assert shown == [(5, 2, 30)]  # 13 windows; a line in 30 s where there is no terminal


def test_a_batch_is_no_larger_than_the_windows_there_are():
    model, tokens = random_gpt(TINY), np.arange(100) % 257
    few = program.loss_on(model, tokens, 16, 16, 3, 'cpu', torch.no_grad)
    one = program.loss_on(model, tokens, 16, 16, 10**12, 'cpu', torch.no_grad)
    assert one == pytest.approx(few, rel=1e-6)


def test_perplexity_of_a_gpt2_checkpoint(gpt2_folder, tmp_path):
    transformers = pytest.importorskip('transformers')
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    options = [
        f'--init_from={gpt2_folder}',
        f'--text={tmp_path / "text.txt"}',
        f'--save={tmp_path / "r.json"}',
    ]
    assert program.main([*options, '--dtype=float32', '--stride=16']) == 0
    found = json.loads((tmp_path / 'r.json').read_text(encoding='utf-8'))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT)['input_ids']]])
    total, done = 0.0, 0  # the usual sliding window of transformers' documentation
    starts = [*range(0, ids.size(1) - 1 - 64, 16), ids.size(1) - 1 - 64]
    for start in starts:
        labels = ids[:, start : start + 65].clone()
        labels[:, : done - start + 1] = -100
        with torch.no_grad():
            logits = theirs(ids[:, start : start + 64]).logits
        loss = torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction='sum', ignore_index=-100)
        total, done = total + loss.item(), start + 64
    assert found['loss'] == pytest.approx(total / (ids.size(1) - 1), rel=1e-5)


TASKS = {
    'choice': """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    'rolling': """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    'generation': """
task: generation
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/generation.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["o"], do_sample: false, max_gen_toks: 8}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """A folder with three local tasks, one of each kind of question."""
    folder = tmp_path_factory.mktemp('tasks')
    words = TEXT.split()
    rows = {
        'choice': [
            {
                'question': ' '.join(words[i : i + 4]),
                'choices': ['fox', 'the dog', words[i + 4]],
                'answer': i % 3,
            }
            for i in range(12)
        ],
        'rolling': [{'text': TEXT[: 10 + 40 * i]} for i in range(4)],  # up to several windows
        'generation': [{'question': ' '.join(words[i : i + 5]), 'answer': 'fox'} for i in range(5)],
    }
    for name, text in TASKS.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[name]]
        (folder / f'{name}.jsonl').write_text('\n'.join(lines), encoding='utf-8')
        (folder / f'{name}.yaml').write_text(text.replace('FOLDER', folder.as_posix()), encoding='utf-8')
    return folder


def test_the_harness_agrees_with_its_own_hflm(tasks, tmp_path, monkeypatch, capsys):
    """Request by request: the same model, once through our LM class, once exported and through HFLM."""
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    lm_eval = pytest.importorskip('lm_eval')
    pytest.importorskip('transformers')
    import contextlib

    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import harness
    import hf
    from harness import HarnessLM

    def without_defaults(include_path, include_defaults=False):  # thousands of files
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness, 'TaskManager', without_defaults)
    monkeypatch.setattr('lm_eval.evaluator.add_env_info', lambda results: None)  # runs pip

    tokenizer = train_bpe([TEXT], 300)
    model = random_gpt(replace(TINY, vocab_used=tokenizer.vocab_size))
    hf.export(model, tokenizer, tmp_path / 'exported')
    ours = HarnessLM(model, tokenizer, [tokenizer.eot], 4, 'cpu', contextlib.nullcontext)
    theirs = HFLM(pretrained=str(tmp_path / 'exported'), device='cpu', batch_size=4, max_length=32)
    pad = torch.tensor([tokenizer.vocab_size])  # the export's own token for padding, which ours does not have
    theirs.model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, pad, -math.inf)
    )
    options = {
        'tasks': list(TASKS),
        'task_manager': TaskManager(include_path=str(tasks), include_defaults=False),
        'bootstrap_iters': 0,
    }
    found, wanted = (lm_eval.simple_evaluate(model=lm, **options) for lm in (ours, theirs))
    for task in TASKS:
        for a, b in zip(found['samples'][task], wanted['samples'][task], strict=True):
            assert a['arguments'] == b['arguments']
            for (x,), (y,) in zip(a['resps'], b['resps'], strict=True):
                if task == 'choice':
                    assert x[0] == pytest.approx(y[0], abs=1e-3) and x[1] == y[1]
                if task == 'rolling':
                    assert x == pytest.approx(y, rel=1e-4)
                if task == 'generation':
                    assert x == y and 'o' not in x
        for metric, value in wanted['results'][task].items():
            if isinstance(value, float):
                assert found['results'][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    # and through the program
    run = save_run(tmp_path / 'run', model, tokenizer)
    options = [
        f'--out_dir={run}',
        f'--include_path={tasks}',
        f'--save={tmp_path / "r.json"}',
        '--dtype=float32',
    ]
    assert program.main([*options, '--tasks=choice,rolling']) == 0
    assert '|choice' in capsys.readouterr().out
    saved = json.loads((tmp_path / 'r.json').read_text(encoding='utf-8'))
    assert saved['choice']['acc,none'] == wanted['results']['choice']['acc,none']
    with pytest.raises(ConfigError, match='the harness knows no nothing; add include_path'):
        program.main([*options, '--tasks=choice,nothing'])


class Words:
    """A tokenizer whose tokens do not end where a question ends: 'Ans' + 'wer' is one token, 'Answer'."""

    eot, vocab = 0, ['', 'Answer', 'Ans', ' world', ' wor', 'hello', 'A', '::', ':', ' yes', ' ']

    def encode(self, text):
        ids = []
        while text:
            best = max((w for w in self.vocab[1:] if text.startswith(w)), key=len)
            ids, text = [*ids, self.vocab.index(best)], text[len(best) :]
        return ids


@pytest.fixture
def words():
    """The harness's view of a model of such tokens, with a context of 8 and capped logits."""
    pytest.importorskip('lm_eval')
    import contextlib

    from harness import HarnessLM

    model = random_gpt(replace(TINY, block_size=8, vocab_size=64, vocab_used=11, softcap=2.0))
    return HarnessLM(model, Words(), [Words.eot], 4, 'cpu', contextlib.nullcontext)


def likelihoods(lm, pairs):
    from lm_eval.api.instance import Instance

    kind = 'loglikelihood'
    return lm.loglikelihood([Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)


@torch.no_grad()
def log_probability(model, ids, n):
    """Of the last n of ids, each after all before it."""
    logits = model(torch.tensor([ids[:-1]]))[0][0, -n:, : model.config.vocab_used]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[-n:])[:, None]).sum().item()


@pytest.mark.parametrize(
    'context, continuation, before, scored',
    [
        ('Ans', 'wer', [], ['Answer']),  # one token spans the join: nothing is left of the context
        ('hello wor', 'ld', ['hello'], [' world']),
        ('A:', ':', ['A'], ['::']),
        ('hello', ' world', ['hello'], [' world']),  # no token spans it
        ('hello wor', 'ld yes', ['hello', ' wor'], [' yes']),  # cut as the harness cuts it
        ('hello ', 'world', ['hello'], [' world']),  # the space goes to the continuation
        (' ', 'yes', [], [' yes']),
    ],
)
def test_a_token_that_spans_the_join_is_scored(words, context, continuation, before, scored):
    """Else nothing is, and such an answer, of probability 1, is always the best one."""
    ((found, _),) = likelihoods(words, [(context, continuation)])
    ids = [[Words.vocab.index(w) for w in part] for part in (before, scored)]
    wanted = log_probability(words.model, (ids[0] or [Words.eot]) + ids[1], len(ids[1]))
    assert found == pytest.approx(wanted, abs=1e-4) and found < -0.1


def test_a_continuation_longer_than_the_context_is_cut_on_the_left(words):
    """What is left is scored as far as the model can read; the other questions are not lost."""
    long = [('A', ' yes' * 7), ('A', ' yes' * 8), ('A', ' yes' * 20), ('A', ' yes')]
    found = [log_p for log_p, _ in likelihoods(words, long)]
    a, yes = Words.vocab.index('A'), Words.vocab.index(' yes')
    wanted = [([a] + [yes] * 7, 7), ([a] + [yes] * 8, 8), ([yes] * 9, 8), ([a, yes], 1)]
    assert found == pytest.approx([log_probability(words.model, *w) for w in wanted], abs=1e-4)


def test_what_the_harness_cannot_score_is_one_line(words):
    with pytest.raises(ConfigError, match=r"tasks: '' after 'hello' has no token of its own"):
        likelihoods(words, [('hello', ' yes'), ('hello', '')])
    with torch.no_grad():
        words.model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(ConfigError, match='tasks: the model gives inf or nan'):
        likelihoods(words, [('hello', ' yes')])


def test_without_the_harness_one_line_says_what_to_install(root, tmp_path):
    (tmp_path / 'lm_eval.py').write_text("raise ModuleNotFoundError(name='lm_eval')", encoding='utf-8')
    run = save_run(tmp_path / 'run', random_gpt(TINY), Bytes())
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    command = [sys.executable, str(root / 'eval.py'), f'--out_dir={run}', '--tasks=any']
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == 'eval.py --tasks needs lm_eval: pip install -r requirements-extras.txt\n'
