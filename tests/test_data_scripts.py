"""Every prepare.py run as a user runs it, on a small file in its original form, and the tools beside them."""

import bz2
import gzip
import importlib.util
import json
import lzma
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data.files import CorpusError
from data.scripts import options
from data.tokendata import DataError, open_data
from data.tokenizer import from_spec, train_bpe
from fake_hub import COMMIT, serving

SCRIPTS = (
    'openwebtext',
    'fineweb',
    'stdlib',
    'shakespeare',
    'shakespeare_char',
    'wikitext',
    'enwik8',
    'russian_instructions',
)
TEXT = 'To be, or not to be, that is the question:\nWhether ’tis nobler in the mind to suffer\n\n'


def run(root, script, *arguments, status=0, **environment):
    """Runs data/SCRIPT with these arguments -> its output and errors."""
    command = [sys.executable, str(root / 'data' / script), *map(str, arguments)]
    environment = {**os.environ, 'HF_HUB_DISABLE_TELEMETRY': '1', **environment}
    done = subprocess.run(
        command, capture_output=True, text=True, encoding='utf-8', env=environment, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def module_of(root, name):
    """data/NAME/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location(f'prepare_{name}', root / 'data' / name / 'prepare.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def decoded(folder, split):
    data = open_data(folder)
    return from_spec(data.tokenizer_spec).decode(data.splits[split])


def write_jsonl(path, rows):
    path.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
    return path


def write_parquet(path, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({'text': texts}), path, row_group_size=10)
    return path


PROGRAMS = ('prepare.py', 'peek.py', 'bench_encode.py', 'bench_readers.py')


@pytest.mark.parametrize('name', [*(f'{name}/prepare.py' for name in SCRIPTS), *PROGRAMS])
def test_help(root, name):
    assert '--help' in run(root, name, '--help')[0]


def test_no_script_is_left_out(root):
    generated = ['diagnostics']  # has a test file of its own
    names = sorted([*SCRIPTS, *generated])
    assert sorted(p.parent.name for p in (root / 'data').glob('*/prepare.py')) == names
    for name in names:
        assert (root / 'data' / name / 'readme.md').is_file()


def test_every_option_takes_its_value_both_ways():
    parser = options(Path('data/x'), '', 'gpt2', hub=('owner/name', None), val_fraction=0.1)
    names = [action.option_strings[0] for action in parser._actions if action.dest != 'help']
    assert len(names) == 11
    numbers = {'--val_fraction': '0.5', '--num_proc': '3', '--split_seed': '3', '--shard_tokens': '9'}
    for name in names:
        value = numbers.get(name, 'a.txt')
        one, other = parser.parse_args([name, value]), parser.parse_args([f'{name}={value}'])
        assert one == other != parser.parse_args([]), name
    both = parser.parse_args(['--files=a.txt', '--files', 'b.txt', 'c.txt', '--files=d.txt'])
    assert both.files == ['a.txt', 'b.txt', 'c.txt', 'd.txt']


@pytest.mark.parametrize(
    ('arguments', 'wanted'),
    [
        (['--val_fraction=nan'], "argument --val_fraction: 'nan' is not a number between 0 and 1"),
        (['--val_fraction', '1'], "'1' is not a number between 0 and 1"),
        (['--split_seed=-1'], "argument --split_seed: '-1' is not a whole number of at least 0"),
        (['--num_proc=0'], "argument --num_proc: '0' is not a whole number of at least 1"),
        (['--file', 'a.txt'], 'unrecognized arguments: --file a.txt'),
        (['--files'], 'argument --files: expected at least one argument'),
    ],
)
def test_an_option_that_cannot_be_used_is_one_line(arguments, wanted):
    parser = options(Path('data/x'), '', 'gpt2', val_fraction=0.1)
    with pytest.raises(CorpusError, match=re.escape(wanted)) as error:
        parser.parse_args(arguments)
    assert '\n' not in str(error.value)
    assert '--help' in str(error.value)


def test_openwebtext_from_the_hub_and_from_its_cache(root, tmp_path, gpt2):
    texts = [f'Document {i}. {TEXT}' for i in range(50)]
    for i in range(2):
        write_parquet(
            tmp_path / f'repo/plain_text/train-0000{i}-of-00002.parquet', texts[i * 25 : i * 25 + 25]
        )
    files = '  data_files:\n  - split: train\n    path: plain_text/train-*\n'
    card = f'---\nconfigs:\n- config_name: plain_text\n{files}---\n'
    (tmp_path / 'repo' / 'README.md').write_text(card, encoding='utf-8')
    ask = ['--repo', 'owner/name', '--revision', 'a-branch', '--val_fraction', '0.04', '--num_proc', '1']
    with serving(tmp_path / 'repo', 'owner/name') as (address, requests):
        hub = {'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'home')}
        run(root, 'openwebtext/prepare.py', *ask, '--out_dir', tmp_path / 'set', **hub)
        fetch = 'import huggingface_hub as h; h.snapshot_download("owner/name", repo_type="dataset", **{})'
        fetch = fetch.format({'revision': 'a-branch'})
        subprocess.run([sys.executable, '-c', fetch], env={**os.environ, **hub}, check=True)
    assert any('revision/a-branch' in request for request in requests)
    streamed = [r for r in requests if '.parquet' in r and 'bytes=' in r]
    assert streamed
    assert all(COMMIT in request for request in streamed)
    data = open_data(tmp_path / 'set')
    assert data.meta['source'] == {'repo': 'owner/name', 'revision': COMMIT}
    assert [data.meta['splits'][s]['documents'] for s in ('train', 'val')] == [48, 2]
    order = np.random.default_rng(2357).permutation(50)[:2].tolist()
    assert decoded(tmp_path / 'set', 'val') == ''.join(f'{texts[i]}<|endoftext|>' for i in order)
    offline = {'HF_HUB_OFFLINE': '1', 'HF_HOME': hub['HF_HOME']}
    run(root, 'openwebtext/prepare.py', *ask, '--out_dir', tmp_path / 'again', **offline)
    again = open_data(tmp_path / 'again')
    assert again.fingerprint == data.fingerprint
    assert again.meta['source'] == data.meta['source']


def write_fineweb(path, texts):
    """Rows as those of FineWeb-Edu."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(texts)
    columns = {
        'text': texts,
        'id': [f'<urn:uuid:{i}>' for i in range(n)],
        'dump': ['CC-MAIN-2024-10'] * n,
        'url': [f'http://example.org/{i}' for i in range(n)],
        'language_score': [0.9] * n,
        'token_count': list(range(n)),
        'int_score': [3] * n,
    }
    pq.write_table(pa.table(columns), path, row_group_size=7, compression='snappy')
    return path


def test_fineweb_from_the_hub_and_from_its_files(root, tmp_path, gpt2):
    """Of a repository with several subsets the one that is asked for; the same tokens from local files."""
    texts = [f'Document {i}. {TEXT}' * (1 + i % 3) for i in range(60)]
    card = '---\nconfigs:\n'
    for subset, folder, some in (('sample-10BT', '10BT', texts), ('sample-100BT', '100BT', texts[::-1])):
        files = [
            write_fineweb(tmp_path / f'repo/sample/{folder}/00{i}_00000.parquet', some[20 * i : 20 * i + 20])
            for i in range(3)
        ]
        card += f'- config_name: {subset}\n  data_files:\n  - split: train\n    path: sample/{folder}/*\n'
    (tmp_path / 'repo' / 'README.md').write_text(card + '---\n', encoding='utf-8')
    ask = ['--val_fraction=0.05', '--shard_tokens=1000', '--num_proc=1']
    with serving(tmp_path / 'repo', 'owner/name') as (address, requests):
        hub = {'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'home')}
        out = tmp_path / 'hub'
        run(root, 'fineweb/prepare.py', '--repo=owner/name', *ask, '--out_dir', out, **hub)
    assert any('bytes=' in request for request in requests)  # read as it is encoded
    files = sorted((tmp_path / 'repo/sample/10BT').iterdir())
    run(root, 'fineweb/prepare.py', '--files', *files, *ask, '--out_dir', tmp_path / 'local')
    data = open_data(tmp_path / 'hub')
    assert data.fingerprint == open_data(tmp_path / 'local').fingerprint
    assert data.meta['source'] == {'repo': 'owner/name', 'revision': COMMIT, 'config': 'sample-10BT'}
    assert len(data.meta['splits']['train']['shards']) > 2
    order = np.random.default_rng(2357).permutation(60)[:3].tolist()
    assert decoded(tmp_path / 'hub', 'val') == ''.join(f'{texts[i]}<|endoftext|>' for i in order)
    rest = [text for i, text in enumerate(texts) if i not in order]
    tokenizer = from_spec(data.tokenizer_spec)
    assert tokenizer.decode(data.splits['train'][:]) == ''.join(f'{text}<|endoftext|>' for text in rest)


@pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals')
def test_fineweb_killed_and_run_again(root, tmp_path):
    """The same files as of a run that was not killed, and what was encoded is not encoded again."""
    texts = [f'Document {i}. {TEXT}' * (1 + i % 3) for i in range(60)]
    files = [write_fineweb(tmp_path / f'00{i}_00000.parquet', texts[20 * i : 20 * i + 20]) for i in range(3)]
    code = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from data import chunks

chunks.CHUNK = 500
real, count = chunks.encode_chunk, []

def encode(*arguments):
    count.append(1)
    if len(count) > {most}:
        os.kill(os.getpid(), signal.SIGKILL)
    print('encoded')
    return real(*arguments)

chunks.encode_chunk = encode
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    flags = ['--tokenizer=bytes', '--val_fraction=0.05', '--shard_tokens=4000', '--num_proc=1']
    made = {}
    for name, most in (('whole', 999), ('killed', 4), ('again', 999)):
        out = tmp_path / ('set' if name != 'whole' else 'whole')
        script = [
            str(root / 'data/fineweb/prepare.py'),
            *flags,
            f'--out_dir={out}',
            '--files',
            *map(str, files),
        ]
        command = [sys.executable, '-c', code.format(root=str(root), most=most), *script]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == (-9 if name == 'killed' else 0), done.stderr
        made[name] = done.stdout.count('encoded')
    assert made['killed'] == 4
    assert made['killed'] + made['again'] == made['whole'] > 10
    assert open_data(tmp_path / 'set').fingerprint == open_data(tmp_path / 'whole').fingerprint


def test_openwebtext_from_files(root, tmp_path, gpt2):
    rows = [{'body': f'{TEXT} {i}', 'id': i} for i in range(12)]
    train, val = (
        write_jsonl(tmp_path / 'train.jsonl', rows[:10]),
        write_jsonl(tmp_path / 'val.jsonl', rows[10:]),
    )
    out = tmp_path / 'set'
    output, _ = run(
        root,
        'openwebtext/prepare.py',
        '--files',
        train,
        '--val_files',
        val,
        '--field',
        'body',
        '--out_dir',
        out,
    )
    assert '10 documents' in output
    meta = open_data(out).meta
    assert meta['command'].startswith('python data/openwebtext/prepare.py --files')
    assert decoded(out, 'val') == ''.join(f'{row["body"]}<|endoftext|>' for row in rows[10:])
    _, errors = run(root, 'openwebtext/prepare.py', '--files', train, '--out_dir', tmp_path / 'no', status=2)
    assert errors.startswith(f"prepare.py: {train}, line 1 has no field 'text', only body, id: say which")


def test_openwebtext_with_a_bpe_of_its_own(root, tmp_path):
    train = write_jsonl(tmp_path / 'train.jsonl', [{'text': f'{TEXT} {i}'} for i in range(40)])
    out = tmp_path / 'set'
    run(
        root,
        'openwebtext/prepare.py',
        '--files',
        train,
        '--tokenizer',
        'bpe:300',
        '--val_fraction',
        0.1,
        '--out_dir',
        out,
    )
    data = open_data(out)
    assert data.vocab_size <= 300
    assert data.meta['splits']['val']['documents'] == 4


COMPRESS = {
    'gz': gzip.compress,
    'xz': lzma.compress,
    'bz2': bz2.compress,
    'zst': zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize('form', ['jsonl', *COMPRESS, 'json', 'parquet', 'zip', 'folder', 'files'])
def test_own_text_in_every_form(root, tmp_path, form):
    """Ten documents, one of which is held out."""
    texts = [f'{TEXT} {i}' for i in range(10)]
    files = [tmp_path / (f'rows.jsonl.{form}' if form in COMPRESS else f'rows.{form}')]
    rows = [{'text': text, 'number': i} for i, text in enumerate(texts)]
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    if form == 'parquet':
        write_parquet(files[0], texts)
    elif form in ('zip', 'folder', 'files'):
        files = [tmp_path / 'texts' / f'{i}.txt' for i in range(10)]
        for path, text in zip(files, texts, strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding='utf-8')
        if form == 'zip':
            with zipfile.ZipFile(tmp_path / 'texts.zip', 'w') as archive:
                archive.writestr('__MACOSX/._0.txt', b'\xff')
                archive.writestr('picture.png', b'\xff')
                for path in files:
                    archive.write(path, f'inside/{path.name}')
        files = {'zip': [tmp_path / 'texts.zip'], 'folder': [tmp_path / 'texts'], 'files': files}[form]
    else:
        content = (json.dumps(rows, indent=1) if form == 'json' else lines).encode('utf-8')
        files[0].write_bytes(COMPRESS[form](content) if form in COMPRESS else content)
    flags = ['--tokenizer', 'bytes', '--val_fraction', 0.1, '--num_proc', 1, f'--out_dir={tmp_path / "set"}']
    shown, _ = run(root, 'prepare.py', '--files', *files, *flags)
    assert ('1 of 11 files are neither text nor records' in shown) == (form == 'zip')
    meta = open_data(tmp_path / 'set').meta
    assert [meta['splits'][split]['documents'] for split in ('train', 'val')] == [9, 1]
    assert meta['command'].startswith('python data/prepare.py --files')
    held = int(np.random.default_rng(2357).permutation(10)[0])
    assert decoded(tmp_path / 'set', 'val') == texts[held] + '<|endoftext|>'
    assert decoded(tmp_path / 'set', 'train') == ''.join(
        text + '<|endoftext|>' for text in texts if text != texts[held]
    )


@pytest.mark.parametrize('tokenizer', ['bpe:270', 'bytes', 'chars'])
def test_one_own_text_is_divided_by_position(root, tmp_path, tokenizer):
    text = ''.join(f'{i} {TEXT}' for i in range(20))
    (tmp_path / 'book.txt').write_text('\ufeff' + text, encoding='utf-8')
    out = tmp_path / 'set'
    run(root, 'prepare.py', f'--files={tmp_path / "book.txt"}', '--tokenizer', tokenizer, '--out_dir', out)
    found = [decoded(out, split) for split in ('train', 'val')]
    assert ''.join(found).removeprefix('\ufeff') == text
    assert 0.04 < len(found[1]) / len(text) < 0.06


def test_own_text_with_validation_text_of_its_own(root, tmp_path):
    for name in ('a', 'b', 'c'):
        (tmp_path / f'{name}.txt').write_text(f'{TEXT} {name}', encoding='utf-8')
    rows = write_jsonl(tmp_path / 'rows.jsonl', [{'my text': 'd', 'text': 7}])
    flags = [f'--files={tmp_path / "a.txt"}', f'--files={rows}', f'--val_files={tmp_path / "b.txt"}']
    flags += [f'--test_files={tmp_path / "c.txt"}', '--field=my text', '--tokenizer=bytes']
    run(root, 'prepare.py', *flags, f'--out_dir={tmp_path / "set"}')
    found = [decoded(tmp_path / 'set', split) for split in ('train', 'val', 'test')]
    assert found == [
        f'{TEXT} a<|endoftext|>d<|endoftext|>', f'{TEXT} b<|endoftext|>', f'{TEXT} c<|endoftext|>',
    ]  # fmt: skip


def test_an_unfinished_preparation_names_its_command(root, tmp_path):
    out = tmp_path / 'set'
    train = write_jsonl(tmp_path / 'train.jsonl', [{'text': TEXT}, {'text': 7}])
    flags = ['--files', train, '--tokenizer', 'bytes', '--val_fraction', '0.5', '--out_dir', out]
    _, errors = run(root, 'openwebtext/prepare.py', *flags, status=2)
    assert 'line 2: field' in errors
    command = ' '.join(['python', 'data/openwebtext/prepare.py', *map(str, flags)])
    with pytest.raises(DataError, match=re.escape(f'unfinished preparation: run {command}; it goes on')):
        open_data(out)


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char'])
def test_shakespeare(root, shared, tmp_path, gpt2, name):
    """The counts of nanoGPT's data of the same names."""
    out = tmp_path / 'set'
    text = shared / 'data' / 'tinyshakespeare.txt'
    run(root, f'{name}/prepare.py', '--files', text, '--out_dir', out)
    data = open_data(out)
    counts = {split: len(tokens) for split, tokens in data.splits.items()}
    if name == 'shakespeare':
        assert counts == {'train': 301_966, 'val': 36_059}
    else:
        assert counts == {'train': 1_003_854, 'val': 111_540}
        assert data.vocab_size == 65
    assert decoded(out, 'train') + decoded(out, 'val') == text.read_text(encoding='utf-8')


@pytest.mark.parametrize('form', ['parquet', 'raw'])
def test_wikitext(root, tmp_path, gpt2, form):
    rows = ['', ' = Title = \n', '', ' Some text , with @-@ signs . \n', ' More of it . \n']
    files = {}
    for split in ('train', 'validation', 'test'):
        if form == 'parquet':
            files[split] = write_parquet(
                tmp_path / f'{split}-00000-of-00001.parquet', [*rows, f' {split}\n'] * 9
            )
        else:
            files[split] = tmp_path / f'wiki.{split}.raw'
            files[split].write_text(''.join([*rows, f' {split}\n'] * 9), encoding='utf-8', newline='\n')
    out = tmp_path / 'set'
    flags = ['--files', files['train'], '--val_files', files['validation'], '--test_files', files['test']]
    run(root, 'wikitext/prepare.py', *flags, '--out_dir', out)
    for split, name in (('train', 'train'), ('val', 'validation'), ('test', 'test')):
        assert decoded(out, split) == ''.join([*rows, f' {name}\n'] * 9)
    assert open_data(out).meta['splits']['test']['documents'] == 1


def test_wikitext_from_the_hub_needs_its_configuration(root, tmp_path, gpt2):
    card = '---\nconfigs:\n'
    for size in ('2', '103'):
        for split in ('train', 'validation', 'test'):
            write_parquet(
                tmp_path / f'repo/wikitext-{size}-raw-v1/{split}-00000-of-00001.parquet',
                [f' {split} {size}\n'] * 9,
            )
        card += f'- config_name: wikitext-{size}-raw-v1\n  data_files:\n'
        for split in ('train', 'validation', 'test'):
            card += f'  - split: {split}\n    path: wikitext-{size}-raw-v1/{split}-*\n'
    (tmp_path / 'repo' / 'README.md').write_text(card + '---\n', encoding='utf-8')
    with serving(tmp_path / 'repo', 'owner/name') as (address, _):
        hub = {'HF_ENDPOINT': address, 'HF_HOME': str(tmp_path / 'home')}
        run(
            root,
            'wikitext/prepare.py',
            '--repo',
            'owner/name',
            '--size',
            2,
            '--out_dir',
            tmp_path / 'set',
            **hub,
        )
    assert decoded(tmp_path / 'set', 'val') == ' validation 2\n' * 9
    assert open_data(tmp_path / 'set').meta['source']['config'] == 'wikitext-2-raw-v1'


@pytest.mark.parametrize('form', ['zip', 'plain'])
def test_enwik8(root, tmp_path, form):
    content = ('<page>\n<text>Ünïcödé &amp; 日本</text>\n' * 300).encode('utf-8')[
        :9_999
    ]  # ends within a character
    path = tmp_path / ('enwik8.zip' if form == 'zip' else 'enwik8')
    if form == 'zip':
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr('enwik8', content)
    else:
        path.write_bytes(content)
    out = tmp_path / 'set'
    run(root, 'enwik8/prepare.py', '--files', path, '--out_dir', out)
    splits = open_data(out).splits
    assert [len(splits[name]) for name in ('train', 'val', 'test')] == [8_999, 500, 500]
    together = np.concatenate([splits[name] for name in ('train', 'val', 'test')])
    assert together.astype(np.uint8).tobytes() == content


def test_russian_instructions(root, tmp_path):
    """Beginning of text, question, answer, end of text, in the tokens of a folder as the checkpoint's is."""
    rows = [
        {'question': f'Сколько будет {i} и {i}?', 'answer': f'Будет {2 * i}.', 'n': i} for i in range(200)
    ]
    model = json.loads(train_bpe([row['question'] + row['answer'] for row in rows], 320).text)['model']
    names = {'bos_token': '<s>', 'eos_token': '</s>'}
    vocabulary = {**model['vocab'], '<s>': 320, '</s>': 321}
    folder = tmp_path / 'checkpoint'
    folder.mkdir()
    (folder / 'vocab.json').write_text(json.dumps(vocabulary), encoding='utf-8')
    merges = [' '.join(pair) for pair in model['merges']]
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']), encoding='utf-8')
    (folder / 'special_tokens_map.json').write_text(json.dumps(names), encoding='utf-8')
    path, out = write_jsonl(tmp_path / 'rows.jsonl', rows), tmp_path / 'set'
    run(root, 'russian_instructions/prepare.py', '--files', path, '--tokenizer', folder, '--out_dir', out)
    meta = open_data(out).meta
    assert [meta['splits'][s]['documents'] for s in ('train', 'val')] == [199, 1]
    held = rows[int(np.random.default_rng(2357).permutation(200)[0])]
    assert decoded(out, 'val') == f'<s>{held["question"]}\n{held["answer"]}</s>'
    assert decoded(out, 'train').startswith(f'<s>{rows[0]["question"]}\n{rows[0]["answer"]}</s><s>')


def test_stdlib_takes_the_sources_and_not_the_tests(root, tmp_path):
    stdlib = module_of(root, 'stdlib')
    for i in range(150):
        (tmp_path / f'module{i}.py').write_text(f'x = {i}\n', encoding='utf-8')
    (tmp_path / 'latin.py').write_bytes('# -*- coding: latin-1 -*-\n# caf\xe9\n'.encode('latin-1'))
    for name in (
        'test/a.py',
        'json/tests/b.py',
        'site-packages/c.py',
        '_sysconfigdata_x.py',
        'config-3/d.py',
        'readme.txt',
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('left out', encoding='utf-8')
    splits = stdlib.library_splits(tmp_path)
    assert stdlib.library_splits(tmp_path) == splits
    assert sum(map(len, splits.values())) == 151
    assert 1 <= len(splits['val']) <= 20
    texts = [
        b''.join(p for p, _ in s.pieces()).decode('utf-8') for sources in splits.values() for s in sources
    ]
    assert '# -*- coding: latin-1 -*-\n# café\n' in texts
    assert not any('left out' in text for text in texts)


def test_stdlib_of_this_python(root):
    splits = module_of(root, 'stdlib').library_splits(Path(sysconfig.get_path('stdlib')))
    assert len(splits['train']) > 300
    assert len(splits['val']) > 10
    source = next(s for s in splits['train'] + splits['val'] if Path(s.path).name == 'argparse.py')
    text = b''.join(piece for piece, _ in source.pieces()).decode('utf-8')
    assert text == Path(source.path).read_text(encoding='utf-8')


def test_stdlib_without_sources_is_one_line(root, tmp_path):
    stdlib = module_of(root, 'stdlib')
    (tmp_path / 'only.py').write_text('x = 1\n', encoding='utf-8')
    with pytest.raises(stdlib.CorpusError, match='holds 1 source files'):
        stdlib.library_splits(tmp_path)


def test_stdlib_on_files(root, tmp_path):
    for name in ('train', 'val'):
        (tmp_path / f'{name}.py').write_text(TEXT * 50 + name, encoding='utf-8')
    flags = [
        '--files',
        tmp_path / 'train.py',
        '--val_files',
        tmp_path / 'val.py',
        '--out_dir',
        tmp_path / 'set',
    ]
    run(root, 'stdlib/prepare.py', *flags)
    assert decoded(tmp_path / 'set', 'val') == TEXT * 50 + 'val<|endoftext|>'
    assert '--val_files' in run(root, 'stdlib/prepare.py', *flags[:2], status=2)[1]


OWN_ROWS = ['prepare.py', '--tokenizer=bytes', '--val_fraction=0.05', '--files', '{here}/rows.jsonl']


@pytest.mark.parametrize(
    ('arguments', 'wanted'),
    [
        (['shakespeare/prepare.py', '--files', '{here}/none.txt'], 'none.txt does not exist'),
        (['shakespeare/prepare.py', '--val_files', '{here}/a.txt'], '--files, which is missing'),
        (['shakespeare/prepare.py', '--files', '{here}/a.txt', '{here}/a.txt'], 'not 2 files'),
        (
            ['shakespeare/prepare.py', '--files', '{here}/cut.txt.gz'],
            'cut.txt.gz is truncated: its .gz data has no end',
        ),
        (
            ['shakespeare/prepare.py', '--files', '{here}/a.txt', '--test_files', '{here}/a.txt'],
            '--val_files',
        ),
        (['wikitext/prepare.py', '--files', '{here}/a.txt'], '--files needs --val_files'),
        (['openwebtext/prepare.py', '--files', '{here}/a.txt', '--tokenizer', 'bytes'], '--val_files'),
        (
            ['openwebtext/prepare.py', '--files', '{here}/*.txt', '{here}/*.txt', '--tokenizer', 'gpt22'],
            "no encoding 'gpt22'",
        ),
        (['openwebtext/prepare.py', '--files', '{here}/a.csv'], '.csv is not read here'),
        (
            ['prepare.py', '--files', '{here}/a.txt', '--tokenizer=bytes'],
            '4 bytes of text, of which 0 are for validation',
        ),
        (['prepare.py', '--files', '{here}/none'], 'none does not exist'),
        (['prepare.py', '--files', '{here}/*.txt.xz'], 'no text in'),
        (['prepare.py', '--files', '{here}/pictures.zip'], 'no text in'),
        (['prepare.py', '--files', '{here}/broken.zip'], 'broken.zip cannot be read: BadZipFile'),
        (['prepare.py', '--files', '{here}/a.tar.gz'], '.tar is not read here; unpack it'),
        ([*OWN_ROWS], "rows.jsonl, line 1 has no field 'text', only a.b"),
        ([*OWN_ROWS, '--field='], "--field: '' is not the name of a field"),
        ([*OWN_ROWS, '--field', '{{a'], "'{a' is not the name of a field"),
        (['russian_instructions/prepare.py', '--template', '{{'], "template '{': "),
        (['russian_instructions/prepare.py', '--template', 'a'], "'a' names no field"),
        (['peek.py', '{here}'], 'meta.json is missing'),
    ],
)
def test_mistakes_are_one_line(root, tmp_path, arguments, wanted):
    for name in ('a.txt', 'a.csv'):
        (tmp_path / name).write_text('text', encoding='utf-8')
    (tmp_path / 'a.tar.gz').write_bytes(b'')
    (tmp_path / 'broken.zip').write_bytes(b'PK')
    write_jsonl(tmp_path / 'rows.jsonl', [{'a.b': TEXT}])
    with zipfile.ZipFile(tmp_path / 'pictures.zip', 'w') as archive:
        archive.writestr('a.png', '')
        archive.writestr('b.png', '')
    (tmp_path / 'cut.txt.gz').write_bytes(gzip.compress(b'text ' * 1000)[:-20])
    arguments = [a.format(here=tmp_path) for a in arguments]
    if arguments[0] != 'peek.py':
        arguments += ['--out_dir', tmp_path / 'set']
    _, errors = run(root, *arguments, status=2)
    assert errors.startswith(f'{Path(arguments[0]).name}: ')
    assert errors.count('\n') == 1
    assert wanted in errors
    assert not (tmp_path / 'set' / 'meta.json').exists()


def test_without_a_network_the_message_says_what_to_do(root, tmp_path):
    hub = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path)}  # nothing answers there
    flags = ['--tokenizer', 'bytes', '--out_dir', tmp_path / 'set']
    _, errors = run(root, 'openwebtext/prepare.py', *flags, status=2, **hub)
    assert errors.startswith(
        'prepare.py: cannot reach https://huggingface.co/datasets/Skylion007/openwebtext ('
    )
    assert 'hf download Skylion007/openwebtext --repo-type dataset --revision' in errors
    assert 'HF_HUB_OFFLINE=1' in errors
    assert '--files' in errors
    assert errors.count('\n') == 1


def test_a_download_is_checked(tmp_path):
    import hashlib

    from data.sources import download

    archive = tmp_path / 'enwik8.zip'
    with zipfile.ZipFile(archive, 'w') as file:
        file.writestr('enwik8', TEXT)
    digest = hashlib.sha256(TEXT.encode('utf-8')).hexdigest()
    url, folder = archive.as_uri(), tmp_path / 'download'
    assert download(url, digest, folder) == str(folder / 'enwik8.zip')
    archive.unlink()
    assert download(url, digest, folder) == str(folder / 'enwik8.zip')  # not asked for again
    with pytest.raises(CorpusError, match=r'cannot download file://.*put it at') as error:
        download(url, '0' * 64, folder)
    assert '\n' not in str(error.value)
    archive.write_bytes((folder / 'enwik8.zip').read_bytes())
    (folder / 'enwik8.zip').write_text('<html>not found</html>', encoding='utf-8')
    assert download(url, digest, folder) == str(folder / 'enwik8.zip')  # fetched again
    with pytest.raises(CorpusError, match='its SHA-256 is not 0000'):
        download(url, '0' * 64, folder)


def test_peek(root, tmp_path):
    for name, text in (('train', 'abca'), ('val', 'cbaa')):
        (tmp_path / f'{name}.txt').write_text(text * 100, encoding='utf-8')
    flags = [
        '--files',
        tmp_path / 'train.txt',
        '--val_files',
        tmp_path / 'val.txt',
        '--out_dir',
        tmp_path / 'set',
    ]
    run(root, 'shakespeare_char/prepare.py', *flags)
    shown, _ = run(root, 'peek.py', tmp_path / 'set', '--tokens', 7, '--at', 1, '--top', 1)
    assert '400 tokens' in shown
    assert '1.000 bytes per token' in shown
    assert 'tokens 1 to 8 of 400\nbcaabca\n' in shown
    assert '3 of 3 ids occur, entropy 1.500 bits per token' in shown
    assert "0           200  50.00 %  'a'" in shown
    (tmp_path / 'set' / 'meta.json').unlink()
    shown, _ = run(root, 'peek.py', tmp_path / 'set', '--vocab_size', 300, '--tokens', 4)
    assert 'of 400\n0 1 2 0\n' in shown


@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='needs smaps_rollup')
def test_readers_share_the_token_files(root):
    """Of 8 MB each of two processes has half of its own in PSS, and all of it in RSS."""
    flags = ['--tokens=4000000', '--readers', 1, 2, '--batches=200']
    shown, _ = run(root, 'bench_readers.py', *flags)
    one, two = ([float(cell) for cell in line.split('|')[1:-1]] for line in shown.splitlines()[-2:])
    assert (one[0], two[0]) == (1, 2)
    assert one[1] - 8 < two[1] < one[1] + 8  # RSS
    assert two[2] < one[2] - 2  # PSS
    assert two[3] < one[3] + 4  # own: not the tokens


def test_the_benchmark_runs(root, tmp_path, gpt2):
    (tmp_path / 'a.txt').write_text(TEXT * 200, encoding='utf-8')
    shown, _ = run(root, 'bench_encode.py', '--files', tmp_path / 'a.txt', '--rounds', 1)
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ['prepare', 'map', 'encode']
    assert all(float(number) >= 0 for line in lines[-3:] for number in line.split()[1:])
