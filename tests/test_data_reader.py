"""What the reader of token files refuses, with which words, and what it remembers."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from data import tokendata
from data.corpus import prepare
from data.sources import TextFile
from data.tokendata import DataError, open_data
from data.tokenizer import Chars, fingerprint, from_spec

BLOCK = 8
TICK = 0.02  # seconds: the file system's clock may stand still for less


@pytest.fixture
def folder(tmp_path):
    """A small data set of characters, 900 and 100 tokens, made by `prepare`."""
    for name, size in (('train', 900), ('val', 100)):
        text = ('abcdefghij' * size)[:size]
        (tmp_path / f'{name}.txt').write_text(text, encoding='utf-8')
    splits = {name: [TextFile(str(tmp_path / f'{name}.txt'))] for name in ('train', 'val')}
    prepare(tmp_path / 'set', 'chars', splits, num_proc=1)
    return tmp_path / 'set'


@pytest.fixture
def plain(tmp_path):
    """The files of nanoGPT: no meta.json."""
    folder = tmp_path / 'plain'
    folder.mkdir()
    for name, size in (('train', 900), ('val', 100)):
        (np.arange(size) % 1000).astype('<u2').tofile(folder / f'{name}.bin')
    return folder


def refused(folder, *wanted, **arguments):
    """open_data says no in one line that has all of `wanted`."""
    with pytest.raises(DataError) as error:
        open_data(folder, **{'block_size': BLOCK, **arguments})
    message = str(error.value)
    assert '\n' not in message
    for part in wanted:
        assert part in message, (part, message)


def edit_meta(folder, **changes):
    path = folder / 'meta.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    path.write_text(json.dumps({**meta, **changes}), encoding='utf-8')


def test_what_is_read(folder):
    data = open_data(folder, BLOCK)
    assert {name: len(tokens) for name, tokens in data.splits.items()} == {'train': 900, 'val': 100}
    assert data.splits['train'].dtype == np.uint16
    assert not data.splits['train'].flags.writeable
    assert data.vocab_size == 10
    assert from_spec(data.tokenizer_spec).decode(data.splits['val'][:12]) == 'abcdefghijab'
    assert data.meta['splits']['train']['bytes'] == 900
    assert len(data.fingerprint) == 64
    assert open_data(folder, BLOCK, verify=False).fingerprint == data.fingerprint


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / 'nothing', str(tmp_path / 'nothing'), 'does not exist', '--out_dir')


def test_the_fix_is_the_command_that_made_it(folder, root):
    edit_meta(folder, command='python data/x/prepare.py --files a')
    (folder / 'val.bin').unlink()
    refused(folder, 'val.bin is missing', 'run python data/x/prepare.py --files a')
    refused(root / 'data' / 'enwik8', f'run python {root / "data" / "enwik8" / "prepare.py"}')


@pytest.mark.parametrize('name', ['train', 'val'])
def test_a_missing_file(folder, name):
    (folder / f'{name}.bin').unlink()
    refused(folder, f'{name}.bin is missing')


@pytest.mark.parametrize('name', ['train', 'val'])
def test_an_empty_file(folder, name):
    (folder / f'{name}.bin').write_bytes(b'')
    refused(folder, f'{name}.bin is empty')


def test_an_odd_number_of_bytes(folder):
    with (folder / 'train.bin').open('ab') as file:
        file.write(b'\x00')
    refused(folder, 'train.bin holds 1,801 bytes', '2-byte uint16', 'truncated')


def test_a_truncated_file(folder):
    os.truncate(folder / 'train.bin', 1000)
    refused(folder, 'train.bin holds 500 tokens', 'says 900', 'truncated')


def test_a_file_that_grew(folder):
    with (folder / 'val.bin').open('ab') as file:
        file.write(b'\x00\x00')
    refused(folder, 'val.bin holds 101 tokens', 'says 100', 'grew')


@pytest.mark.parametrize(('dtype', 'name'), [('<u4', 'uint32'), ('<i8', 'int64')])
def test_a_file_of_another_dtype(folder, dtype, name):
    np.fromfile(folder / 'train.bin', '<u2').astype(dtype).tofile(folder / 'train.bin')
    refused(folder, f'looks like {name}', 'says 900')


def test_a_changed_token_is_seen(folder):
    tokens = np.fromfile(folder / 'train.bin', '<u2')
    tokens[17] += 1
    tokens.tofile(folder / 'train.bin')
    refused(folder, 'train.bin has SHA-256', 'it changed')


def test_a_token_outside_the_vocabulary_is_placed(folder, monkeypatch):
    monkeypatch.setattr(tokendata, 'SCAN_BYTES', 256)  # several blocks
    tokens = np.fromfile(folder / 'train.bin', '<u2')
    tokens[[700, 800]] = 10, 11
    tokens.tofile(folder / 'train.bin')
    refused(folder, 'token id 10 at position 700', 'the vocabulary has 10 ids')


@pytest.mark.parametrize(('block_size', 'first'), [(100, 'val.bin holds 100'), (900, 'train.bin holds 900')])
def test_too_short_for_the_block_size(folder, block_size, first):
    wanted = f'{first} tokens, block_size {block_size} needs at least {block_size + 1}'
    refused(folder, wanted, 'smaller block_size', block_size=block_size)
    assert len(open_data(folder, 99).splits['val']) == 100


def test_an_unfinished_preparation(folder):
    (folder / 'meta.json').unlink()
    (folder / '.prepare').mkdir()
    refused(folder, 'unfinished preparation', 'goes on where it stopped')
    refused(folder, 'unfinished preparation', vocab_size=10)  # nor as plain files


@pytest.mark.parametrize(
    ('changes', 'wanted'),
    [
        ({'format': 99}, 'format is 99, not 1'),
        ({'format': None}, 'format is null, not 1'),
        ({'vocab_size': '10'}, "vocab_size is '10', not a whole number from 1 to 4,294,967,296"),
        ({'vocab_size': 0}, 'vocab_size is 0, not a whole number from 1'),
        ({'vocab_size': True}, 'vocab_size is true, not a whole number'),
        ({'vocab_size': 145}, 'has vocab_size 145, its tokenizer has 10 ids'),
        ({'vocab_size': 9}, 'has vocab_size 9, its tokenizer has 10 ids'),
        ({'dtype': 'float16'}, "dtype is 'float16', not 'uint16' or 'uint32'"),
        ({'begin': 10}, 'begin 10, the vocabulary has 10 ids'),
        ({'begin': -1}, 'begin is -1, not a whole number'),
        ({'command': 'a\nb'}, "command is 'a\\nb', not one line of text"),
        ({'splits': []}, 'splits is a list, not an object'),
        ({'splits': {}}, 'train.bin is missing'),
        ({'tokenizer': None}, 'tokenizer is null, not an object'),
        ({'tokenizer': {'kind': 'bytes'}}, 'eot is missing'),
        ({'tokenizer': {'kind': 'pickle'}}, "kind is 'pickle', not 'bytes' or"),
    ],
)
def test_a_broken_meta(folder, changes, wanted):
    edit_meta(folder, **changes)
    refused(folder, str(folder), wanted, '--out_dir')


@pytest.mark.parametrize(
    ('changes', 'wanted'),
    [
        ({'tokens': 0}, 'splits.val.tokens is 0, not a whole number of at least 1'),
        ({'tokens': 100.0}, 'splits.val.tokens is 100.0, not a whole number'),
        ({'sha256': 7}, 'splits.val.sha256 is 7, not a SHA-256'),
        ({'sha256': ''}, "splits.val.sha256 is '', not a SHA-256"),
        ({'bytes': '100'}, "splits.val.bytes is '100', not a whole number of at least 0"),
        ({'documents': -1}, 'splits.val.documents is -1, not a whole number'),
        ({'path': '/etc/passwd'}, 'splits.val.path is not known'),
    ],
)
def test_a_broken_split_in_the_meta(folder, changes, wanted):
    splits = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))['splits']
    edit_meta(folder, splits={**splits, 'val': {**splits['val'], **changes}})
    refused(folder, f'meta.json: {wanted}')
    edit_meta(folder, splits={**splits, '../val': splits['val']})
    refused(folder, "meta.json: a name in splits is '../val', not 'train' or 'val' or 'test'")


@pytest.mark.parametrize(
    ('changes', 'wanted'),
    [
        ({'kind': 'tiktoken', 'name': '../../gpt2'}, "name is '../../gpt2', not the name of an encoding"),
        ({'kind': 'tiktoken', 'name': 'gpt22'}, "tiktoken has no encoding 'gpt22'"),
        ({'kind': 'tiktoken', 'name': 'gpt2'}, 'has vocab_size 10, its tokenizer has 50,257 ids'),
        ({'kind': 'chars', 'characters': []}, 'characters is a list, not a list of at least 1'),
        ({'kind': 'chars', 'characters': ['a', 7]}, 'characters[1] is 7, not a single character'),
        ({'kind': 'chars', 'characters': ['a'], 'eot': 'a'}, "eot is 'a', not a whole number"),
        ({'kind': 'chars', 'characters': ['a', 'b']}, 'the tokens were made with 000000000000'),
        ({'kind': 'bytes'}, 'has fingerprint'),
    ],
)
def test_a_broken_tokenizer_in_the_meta(folder, changes, wanted):
    edit_meta(folder, tokenizer={'eot': None, 'bos': None, 'fingerprint': '0' * 64, **changes})
    refused(folder, str(folder), wanted)


@pytest.mark.parametrize('which', ['eot', 'bos'])
def test_a_special_token_beyond_the_vocabulary(folder, which):
    spec = Chars('abcdefghij').spec | {which: 10}
    edit_meta(folder, tokenizer={**spec, 'fingerprint': fingerprint(spec)})
    refused(folder, str(folder), 'its ids mean other text')
    spec = {'kind': 'tiktoken', 'name': 'gpt2', 'eot': None, 'bos': None, 'fingerprint': '0' * 64}
    edit_meta(folder, vocab_size=50257, tokenizer={**spec, which: 50257})
    refused(folder, f'has {which} 50257, the vocabulary has 50,257 ids')
    edit_meta(folder, vocab_size=50257, tokenizer={**spec, which: 50256})
    assert open_data(folder, BLOCK).vocab_size == 50257


def test_a_vocabulary_is_that_of_its_tokenizer(tmp_path):
    """Ids that cannot occur would be trained too, and cost memory and loss."""
    for name in ('train', 'val'):
        (tmp_path / f'{name}.txt').write_text(f'some words of {name} to learn from ' * 40, encoding='utf-8')
    splits = {name: [TextFile(str(tmp_path / f'{name}.txt'))] for name in ('train', 'val')}
    size = prepare(tmp_path / 'set', 'bpe:280', splits, num_proc=1)['vocab_size']
    assert open_data(tmp_path / 'set', BLOCK).vocab_size == size
    edit_meta(tmp_path / 'set', vocab_size=size + 135)
    refused(tmp_path / 'set', f'has vocab_size {size + 135}, its tokenizer has {size} ids')


@pytest.mark.parametrize(
    'content',
    [b'', b'{"format": 1', b'[]', b'\x80\x04\x95pickle', b'[' * 100_000 + b']' * 100_000, b'1' * 5000],
)
def test_a_meta_that_is_not_json(folder, content):
    (folder / 'meta.json').write_bytes(content)
    refused(folder, 'meta.json')
    (folder / 'meta.json').unlink()
    (folder / '.prepare').mkdir()
    (folder / '.prepare' / 'job.json').write_bytes(content)
    refused(folder, 'unfinished preparation')


def test_the_vocabulary_given_must_agree(folder):
    refused(folder, 'a vocabulary of 10', 'vocab_size=12', vocab_size=12)
    assert open_data(folder, BLOCK, vocab_size=10).vocab_size == 10


def test_a_changed_tokenizer_is_seen(tmp_path):
    for name in ('train', 'val'):
        text = f'{name}: ' + 'some words to learn from ' * 40
        (tmp_path / f'{name}.txt').write_text(text, encoding='utf-8')
    splits = {name: [TextFile(str(tmp_path / f'{name}.txt'))] for name in ('train', 'val')}
    prepare(tmp_path / 'set', 'bpe:280', splits, num_proc=1)
    path = tmp_path / 'set' / 'tokenizer.json'
    spec = open_data(tmp_path / 'set', BLOCK).tokenizer_spec
    assert from_spec(spec).decode(from_spec(spec).encode('words')) == 'words'  # whole, without the folder
    path.write_text(path.read_text(encoding='utf-8').replace('words', 'wards'), encoding='utf-8')
    refused(tmp_path / 'set', 'the tokenizer in', 'the tokens were made with')
    path.unlink()
    refused(tmp_path / 'set', 'tokenizer.json cannot be read')


def test_plain_files_need_the_vocabulary(plain):
    refused(plain, 'meta.json is missing', 'vocab_size')
    for bad in (-1, 1 << 33):
        refused(plain, f'vocab_size={bad}: a vocabulary has from 1 to', vocab_size=bad)
    data = open_data(plain, BLOCK, vocab_size=1000)
    assert (data.vocab_size, data.tokenizer_spec, data.meta) == (1000, None, {})
    assert len(data.fingerprint) == 64
    assert data.splits['train'][:3].tolist() == [0, 1, 2]


def test_plain_files_are_checked_too(plain):
    refused(plain, 'token id 500 at position 500', vocab_size=500)
    refused(plain, 'val.bin holds 100 tokens', vocab_size=1000, block_size=100)
    os.truncate(plain / 'val.bin', 99)
    refused(plain, 'not a whole number', vocab_size=1000)


def test_plain_files_of_another_kind(plain):
    tokens = np.arange(900) % 1000
    tokens.astype('<u4').tofile(plain / 'train.bin')
    refused(plain, '4 or 8 bytes', vocab_size=1000)
    tokens.astype('<i8').tofile(plain / 'train.bin')
    refused(plain, '4 or 8 bytes', vocab_size=1000)
    with (plain / 'train.bin').open('wb') as file:
        np.save(file, tokens.astype('<u2'))
    refused(plain, '.npy file', vocab_size=50257)
    (plain / 'train.bin').write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:000\n')
    refused(plain, 'Git LFS', vocab_size=50257)


def test_a_large_vocabulary_is_read_as_uint32(plain):
    for name in ('train', 'val'):
        (np.arange(200) + 70000).astype('<u4').tofile(plain / f'{name}.bin')
    data = open_data(plain, BLOCK, vocab_size=70200)
    assert data.splits['train'].dtype == np.uint32
    assert int(data.splits['train'][199]) == 70199


def test_a_file_is_read_once(folder, monkeypatch):
    scanned = []
    scan = tokendata._scan

    def counting(path, *arguments):
        scanned.append(path.name)
        return scan(path, *arguments)

    monkeypatch.setattr(tokendata, '_scan', counting)
    open_data(folder, BLOCK)
    assert sorted(scanned) == ['train.bin', 'val.bin']
    open_data(folder, BLOCK)
    open_data(folder, BLOCK, verify=False)
    assert len(scanned) == 2  # the stamp beside it remembers
    np.fromfile(folder / 'val.bin', '<u2')[::-1].tofile(folder / 'val.bin')
    stat = (folder / 'val.bin').stat()
    os.utime(folder / 'val.bin', ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    refused(folder, 'val.bin has SHA-256')
    assert scanned[2:] == ['val.bin']


@pytest.mark.parametrize(
    'content', ['', '{', '[]', '[' * 100_000, '{"train.bin": 1}', '{"train.bin": {"sha256": "00"}}']
)
def test_a_broken_stamp_is_ignored(folder, content):
    (folder / '.verified.json').write_text(content, encoding='utf-8')
    assert open_data(folder, BLOCK).vocab_size == 10


def test_a_forged_meta_is_not_excused_by_a_stamp(folder):
    open_data(folder, BLOCK)
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    meta['splits']['val']['sha256'] = '0' * 64
    edit_meta(folder, splits=meta['splits'])
    refused(folder, 'val.bin has SHA-256', 'says 000000000000')


def test_a_folder_that_cannot_be_written_to(folder, monkeypatch, capsys):
    """Then even removing the file that was not written fails."""

    def read_only(*arguments, **more):
        raise OSError(30, 'Read-only file system')

    for name in ('pathlib.Path.write_text', 'pathlib.Path.unlink', 'os.replace'):
        monkeypatch.setattr(name, read_only)
    for _ in range(2):
        assert open_data(folder, BLOCK).vocab_size == 10
        said = capsys.readouterr().err.splitlines()
        assert said[-1] == (
            f'{folder} is verified again at every start: .verified.json cannot be written there '
            '(Read-only file system)'
        )
    assert sorted(path.name for path in folder.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/x" 2>/dev/null || exit 77
cd "$2" && "$3" -c '
import sys
from data.tokendata import open_data
print(open_data(sys.argv[1]).vocab_size)' "$1"
"""


def test_data_on_a_read_only_mount(folder, root):
    command = ['unshare', '-rm', 'bash', '-c', READ_ONLY, 'bash', folder, root, sys.executable]
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip('needs unshare')
    if done.returncode == 77 or 'unshare' in done.stderr:
        pytest.skip('needs the right to mount')
    assert (done.returncode, done.stdout) == (0, '10\n'), done.stderr
    assert done.stderr.count('\n') == 1
    assert 'Read-only file system' in done.stderr


def test_a_file_that_cannot_be_read_is_one_line(folder, monkeypatch):
    def broken(*arguments):
        raise OSError(5, 'Input/output error', str(folder / 'val.bin'))

    monkeypatch.setattr(tokendata, '_scan', broken)
    refused(folder, f'{folder / "val.bin"} cannot be read (Input/output error)')


def test_a_change_that_keeps_size_and_time_is_seen(folder):
    data = open_data(folder, BLOCK)
    assert data.changed() is None
    time.sleep(TICK)
    stat = (folder / 'val.bin').stat()
    tokens = np.fromfile(folder / 'val.bin', '<u2')
    with (folder / 'val.bin').open('r+b') as file:  # the same inode
        file.write(tokens[::-1].tobytes())
    os.utime(folder / 'val.bin', ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = (folder / 'val.bin').stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert f'{folder / "val.bin"} changed since it was opened: its ctime_ns was' in data.changed()
    refused(folder, 'val.bin has SHA-256')


@pytest.mark.parametrize('verify', [True, False])
@pytest.mark.parametrize(
    ('change', 'wanted'),
    [
        (lambda path: os.truncate(path, 100), 'its size was 200, now it is 100'),
        (lambda path: path.touch(), 'its mtime_ns was'),
        (lambda path: path.chmod(0o600), 'its ctime_ns was'),
        (lambda path: path.unlink(), 'cannot be read any more (No such file or directory)'),
        (lambda path: path.write_bytes(path.read_bytes()), 'was'),
    ],
)
def test_what_changes_under_an_opened_data_set(folder, change, wanted, verify):
    data = open_data(folder, BLOCK, verify=verify)
    time.sleep(TICK)
    change(folder / 'val.bin')
    reason = data.changed()
    assert reason.startswith(str(folder / 'val.bin'))
    assert wanted in reason
    assert '\n' not in reason


def test_a_file_that_is_replaced_is_another_one(folder):
    data = open_data(folder, BLOCK)
    before, stat = data.splits['val'].copy(), (folder / 'val.bin').stat()
    (folder / 'new').write_bytes((folder / 'val.bin').read_bytes()[::-1])
    os.utime(folder / 'new', ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(folder / 'new', folder / 'val.bin')
    assert 'changed since it was opened' in data.changed()
    assert np.array_equal(data.splits['val'], before)  # what is mapped is the file that was verified


def test_a_file_that_changes_while_it_is_verified_is_refused(folder, monkeypatch):
    scan = tokendata._scan

    def slow(path, *arguments):
        found = scan(path, *arguments)
        time.sleep(TICK)
        path.touch()
        return found

    monkeypatch.setattr(tokendata, '_scan', slow)
    refused(folder, 'train.bin changed while it was read')
    assert not (folder / '.verified.json').exists()


@pytest.fixture
def sharded(tmp_path):
    """900 tokens of training in three files, 100 of validation in one."""
    for name, size in (('train', 900), ('val', 100)):
        (tmp_path / f'{name}.txt').write_text(('abcdefghij' * size)[:size], encoding='utf-8')
    splits = {name: [TextFile(str(tmp_path / f'{name}.txt'))] for name in ('train', 'val')}
    prepare(tmp_path / 'shards', 'chars', splits, num_proc=1, shard_tokens=350)
    return tmp_path / 'shards'


def test_shards_are_read_as_one_split(sharded, folder):
    data, one = open_data(sharded, BLOCK), open_data(folder, BLOCK)
    assert [len(shard) for shard in data.splits['train'].files] == [350, 350, 200]
    assert np.array_equal(data.splits['train'][:], one.splits['train'])
    assert len(data.fingerprint) == 64
    assert open_data(sharded, BLOCK, verify=False).fingerprint == data.fingerprint != one.fingerprint
    assert len(open_data(sharded, 99).splits['train']) == 900
    refused(sharded, 'train.bin holds 900 tokens, block_size 900 needs at least 901', block_size=900)
    assert sorted(path.name for path in data.stamps) == [
        'train_000.bin', 'train_001.bin', 'train_002.bin', 'val.bin',
    ]  # fmt: skip


def test_every_shard_is_checked(sharded, monkeypatch):
    content = (sharded / 'train_001.bin').read_bytes()
    data = open_data(sharded, BLOCK)
    os.truncate(sharded / 'train_001.bin', 600)
    refused(sharded, 'train_001.bin holds 300 tokens', 'says 350', 'truncated')
    assert 'train_001.bin changed since it was opened' in data.changed()
    (sharded / 'train_001.bin').write_bytes(content[::-1])
    refused(sharded, 'train_001.bin')
    (sharded / 'train_001.bin').write_bytes(content[2:] + content[:2])
    refused(sharded, 'train_001.bin has SHA-256', 'it changed')
    (sharded / 'train_001.bin').unlink()
    refused(sharded, 'train_001.bin is missing')
    (sharded / 'train_001.bin').write_bytes(content)
    scanned, scan = [], tokendata._scan

    def counting(path, *arguments):
        scanned.append(path.name)
        return scan(path, *arguments)

    monkeypatch.setattr(tokendata, '_scan', counting)
    open_data(sharded, BLOCK)
    assert scanned == ['train_001.bin']  # the others have their stamps


@pytest.mark.parametrize(
    ('change', 'wanted'),
    [
        (lambda split: split['shards'].pop(), 'splits.train.tokens is not the sum of its shards'),
        (lambda split: split.update(shards=split['shards'][:1]), 'a list of at least 2'),
        (lambda split: split.update(sha256='0' * 64), 'splits.train has either sha256 or shards'),
        (lambda split: split.pop('shards'), 'splits.train has either sha256 or shards'),
        (lambda split: split['shards'][1].update(file='/etc/passwd'), 'shards[1].file is not known'),
        (
            lambda split: split['shards'][1].update(tokens='350'),
            "shards[1].tokens is '350', not",
        ),
        (
            lambda split: split['shards'].reverse(),
            'train_000.bin holds 350 tokens of uint16',
        ),
    ],
)
def test_a_broken_list_of_shards(sharded, change, wanted):
    splits = json.loads((sharded / 'meta.json').read_text(encoding='utf-8'))['splits']
    change(splits['train'])
    edit_meta(sharded, splits=splits)
    refused(sharded, wanted)


def test_the_fingerprint_follows_the_content(folder, plain):
    before = open_data(plain, BLOCK, vocab_size=1000).fingerprint
    tokens = np.fromfile(plain / 'val.bin', '<u2')
    tokens[0] = 5
    tokens.tofile(plain / 'val.bin')
    assert open_data(plain, BLOCK, vocab_size=1000).fingerprint != before
    assert open_data(plain, BLOCK, vocab_size=1000, verify=False).fingerprint is None
