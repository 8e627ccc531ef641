"""Text to token files: every kind of source, the same files however they were made, what a kill leaves."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data import chunks, corpus, sources
from data.chunks import chunks_of
from data.corpus import prepare
from data.files import CorpusError, WholeFile, open_bytes, raw_blocks
from data.join import Holdout
from data.sources import ENDS, STARTS, Joined, Records, TextFile, file_source, in_pieces, paths, read_text
from data.tokendata import DataError, open_data
from data.tokenizer import Bytes, Tiktoken, TokenizerError, from_spec, train_bpe

DOCUMENTS = [
    'First document.\nTwo lines.',
    'Ünïcödé 日本 👍',
    '',
    ' spaces  and\ttabs ',
    '<|endoftext|> as text',
    'last',
]


def write_jsonl(path, documents, field='text'):
    lines = [json.dumps({'id': i, field: text}) for i, text in enumerate(documents)]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return str(path)


def write_parquet(path, documents, field='text'):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({'id': range(len(documents)), field: documents}), path, row_group_size=2)
    return str(path)


def words(seed, count):
    """Random text of English letters, digits, punctuation and other scripts."""
    draw = random.Random(seed)
    kinds = [
        'the',
        'Fox',
        '12345',
        "it's",
        '日本語',
        'ёжик',
        '👍🏽',
        '...',
        '--',
        '_x_',
        '\n',
        '\n\n',
        '  ',
        '\t',
        '\u00a0',
        'é',
    ]
    return ''.join(draw.choice(kinds) + draw.choice(['', ' ', ' ', '\n']) for _ in range(count))


def documents_of(source):
    """The texts of the documents that a source yields, put together from its pieces."""
    found = []
    for piece, flags in source.pieces():
        if flags & STARTS:
            found.append(b'')
        found[-1] += piece
    return [text.decode('utf-8') for text in found]


def decoded(data, split):
    """The documents in a split of token files that end with the end-of-text token."""
    tokenizer = from_spec(data.tokenizer_spec)
    tokens = data.splits[split].tolist()
    found, document = [], []
    for token in tokens:
        if token == tokenizer.eot:
            found.append(tokenizer.decode(document))
            document = []
        else:
            document.append(token)
    assert not document
    return found


@pytest.fixture
def small(monkeypatch):
    """Pieces, chunks and batches so small that a short text has many."""
    monkeypatch.setattr(sources, 'PIECE', 50)
    monkeypatch.setattr(chunks, 'CHUNK', 300)
    monkeypatch.setattr(chunks, 'BATCH', 100)


# Sources --------------------------------------------------------------------


def test_every_kind_of_records_reads_the_same(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', DOCUMENTS)
    content = (tmp_path / 'a.jsonl').read_bytes()
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(content))
    (tmp_path / 'a.jsonl.xz').write_bytes(lzma.compress(content))
    (tmp_path / 'a.jsonl.bz2').write_bytes(bz2.compress(content))
    (tmp_path / 'a.jsonl.zst').write_bytes(zstandard.ZstdCompressor().compress(content))
    with zipfile.ZipFile(tmp_path / 'a.jsonl.zip', 'w') as archive:
        archive.writestr('inside.jsonl', content)
    (tmp_path / 'a.json').write_text(
        json.dumps([{'text': text} for text in DOCUMENTS], indent=1), encoding='utf-8'
    )
    (tmp_path / 'bom.jsonl').write_bytes(b'\xef\xbb\xbf' + content.replace(b'\n', b'\r\n') + b'\r\n\n')
    write_parquet(tmp_path / 'a.parquet', DOCUMENTS)
    found = sorted(tmp_path.iterdir())
    assert len(found) == 9
    for path in found:
        assert documents_of(file_source(str(path))) == DOCUMENTS, path.name


def test_text_is_one_document_byte_for_byte(tmp_path):
    text = 'one\r\ntwo\n\nthrée\x00\x1a end'
    (tmp_path / 'a.txt').write_bytes(text.encode('utf-8'))
    (tmp_path / 'bom.txt').write_bytes(b'\xef\xbb\xbf' + text.encode('utf-8'))
    (tmp_path / 'a.txt.xz').write_bytes(lzma.compress(text.encode('utf-8')))
    for path in tmp_path.iterdir():
        assert documents_of(file_source(str(path))) == [text], path.name


def test_rows_with_fields_that_come_late_or_change_their_type(tmp_path):
    rows = [{'text': 'a', 'n': 1}] * 3000 + [{'n': 'x', 'extra': {'deep': [1]}, 'text': 'b'}] * 2
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    assert documents_of(Records(str(tmp_path / 'a.jsonl')))[-3:] == ['a', 'b', 'b']


def test_a_template_makes_the_text_and_null_is_empty(tmp_path):
    rows = [{'q': 'why {x}?', 'a': 'because'}, {'q': None, 'a': 'so'}]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    assert documents_of(Records(str(tmp_path / 'a.jsonl'), '{q}\n{a}')) == ['why {x}?\nbecause', '\nso']


def test_names_of_fields_may_hold_anything_but_braces(tmp_path):
    (tmp_path / 'a.jsonl').write_text(json.dumps({'a.b[0]': 'x', 'my text': 'y'}), encoding='utf-8')
    assert documents_of(Records(str(tmp_path / 'a.jsonl'), '{{{my text}}} {a.b[0]}')) == ['{y} x']
    for bad in ('{', '{}', '{a!r}', '{a:>9}'):
        with pytest.raises(CorpusError, match=r'^template') as error:
            list(Records(str(tmp_path / 'a.jsonl'), bad).texts())
        assert '\n' not in str(error.value)


def test_joined_rows_are_one_document(tmp_path):
    parts = [
        Records(write_jsonl(tmp_path / f'{i}.jsonl', ['= A =\n', '', f' text {i}.\n'])) for i in range(2)
    ]
    assert documents_of(Joined(tuple(parts))) == ['= A =\n text 0.\n= A =\n text 1.\n']


def test_folders_patterns_and_files(tmp_path, capsys):
    prepared = ('made/train.bin', 'made/meta.json', 'made/tokenizer.json')
    hidden = ('.hidden.txt', '.venv/lib/junk.py')
    for name in ('b.txt', 'a.md', 'sub/c.jsonl', 'picture.png', *hidden, *prepared):
        path = tmp_path / 'set' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}', encoding='utf-8')
    below = [str(tmp_path / 'set' / name) for name in ('a.md', 'b.txt', str(Path('sub') / 'c.jsonl'))]
    assert paths([tmp_path / 'set']) == below
    assert '2 of 5 files are neither' in capsys.readouterr().out
    assert paths([str(tmp_path / 'set' / '*.txt')]) == below[1:2]
    assert paths([str(tmp_path / 'set' / 'picture.png')]) == [
        str(tmp_path / 'set' / 'picture.png')
    ]  # as asked
    with pytest.raises(CorpusError, match=f'{os.devnull} is neither a file nor a folder'):
        paths([os.devnull])
    for bad in (tmp_path / 'none', tmp_path / '*.csv'):
        with pytest.raises(CorpusError, match=r'does not exist|no text in'):
            paths([bad])


@pytest.mark.parametrize('raw', [False, True])
def test_parts_of_a_text_are_the_text(tmp_path, small, raw):
    text = words(1, 60)
    whole = text.encode('utf-8')
    (tmp_path / 'a.txt').write_bytes(whole)
    for percent in range(0, 101, 7):
        at = len(whole) * percent // 100
        ends = [(0, at), (at, len(whole))]
        parts = [
            b''.join(p for p, _ in TextFile(str(tmp_path / 'a.txt'), *end, raw).pieces()) for end in ends
        ]
        assert b''.join(parts) == whole
        assert abs(len(parts[0]) - at) <= (0 if raw else 3)
        if not raw:
            [part.decode('utf-8') for part in parts]  # whole characters


@pytest.mark.parametrize('suffix', ['txt', 'txt.gz', 'jsonl', 'parquet'])
def test_reading_takes_little_memory(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(sources, 'PIECE', 1 << 16)
    monkeypatch.setattr(chunks, 'CHUNK', 1 << 19)
    line, count, path = 'the quick brown fox jumps over the lazy dog\n' * 200, 1000, tmp_path / f'a.{suffix}'
    if suffix == 'parquet':
        write_parquet(path, [line] * count)
    else:
        with (
            gzip.open(path, 'wt', encoding='utf-8')
            if suffix == 'txt.gz'
            else path.open('w', encoding='utf-8') as file
        ):
            for _ in range(count):
                file.write(json.dumps({'text': line}) + '\n' if suffix == 'jsonl' else line)
    size = 0
    tracemalloc.start()
    for pieces, _, _ in chunks_of([file_source(str(path))]):
        size += sum(map(len, pieces))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == count * len(line) > 16 * chunks.CHUNK
    assert peak < 6 * chunks.CHUNK


@pytest.mark.parametrize(
    ('name', 'content', 'wanted'),
    [
        ('a.txt', b'good\nbad \xe9 latin', 'is not UTF-8: byte 0xe9 at 9'),
        ('a.txt', 'utf-16'.encode('utf-16'), 'is not UTF-8: byte 0xff at 0'),
        ('a.txt', b'cut short \xe2\x82', 'is not UTF-8: byte 0xe2 at 10'),
        ('a.jsonl', b'{"text": "a"}\n{"text": ', 'line 2, is not JSON'),
        (
            'a.jsonl',
            b'{"text": "a"}\n\n{"body": "a", "id": 1}\n',
            "line 3 has no field 'text', only body, id",
        ),
        ('a.jsonl', b'{"text": 7}\n', "line 1: field 'text' is not text but int"),
        ('a.jsonl', b'["a"]\n', "row 1 has no field 'text', only none"),
        ('a.jsonl', b'17\n', "line 1 has no field 'text', only none"),
        ('a.json', b'[{"text": "a"}, ', 'is not JSON'),
        ('a.parquet', b'PAR1 no', 'cannot be read'),
        ('a.txt.gz', b'no gzip', '.gz data is damaged'),
        ('a.txt.zip', b'no zip', 'cannot be read'),
    ],
)
def test_text_that_cannot_be_read_is_one_line(tmp_path, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=wanted) as error:
        list(chunks_of([file_source(str(tmp_path / name))]))
    assert '\n' not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def in_zip(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('inside.txt', content)
    return file.getvalue()


COMPRESS = {
    'gz': gzip.compress,
    'bz2': bz2.compress,
    'xz': lzma.compress,
    'zst': zstandard.ZstdCompressor(write_checksum=True).compress,
}
LINES = ''.join(f'line {i} of the text\n' for i in range(4000)).encode('ascii')


def read_file(path):
    return b''.join(raw_blocks(path))


@pytest.mark.parametrize('suffix', COMPRESS)
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, suffix):
    """Each reader gives the whole text, or an error: never a part of it."""
    path = tmp_path / f'a.txt.{suffix}'
    one, two = COMPRESS[suffix](LINES), COMPRESS[suffix](b'the second stream')
    path.write_bytes(one + two)
    assert read_file(path) == LINES + b'the second stream'
    ends = {0, 1, 5, *range(11, len(one), len(one) // 9), len(one) - 1}
    ends |= {len(one) + n for n in (1, 4, 10, 20, len(two) - 1)}
    for end in ends:
        path.write_bytes((one + two)[:end])
        with pytest.raises(CorpusError, match=f'a.txt.{suffix} is truncated: its .{suffix} data has no end'):
            read_file(path)
    path.write_bytes(one)  # a whole stream is a whole file: nothing tells that a second one is missing
    assert read_file(path) == LINES


@pytest.mark.parametrize('suffix', COMPRESS)
def test_a_damaged_stream_after_a_whole_one_is_refused(tmp_path, suffix):
    path = tmp_path / f'a.txt.{suffix}'
    one, two = COMPRESS[suffix](LINES), bytearray(COMPRESS[suffix](LINES))
    for at in (0, 1, 2, len(two) // 2):
        damaged = two.copy()
        damaged[at] ^= 0xFF
        path.write_bytes(one + damaged)
        with pytest.raises(CorpusError, match=f'its .{suffix} data is damaged|is truncated'):
            read_file(path)
    path.write_bytes(one + b'not compressed')
    with pytest.raises(CorpusError, match='damaged, or followed by other data'):
        read_file(path)


def test_zero_bytes_may_follow_where_the_format_says_so(tmp_path):
    for suffix in COMPRESS:
        path = tmp_path / f'a.txt.{suffix}'
        streams = [COMPRESS[suffix](text) for text in (b'one ', b'two')]
        path.write_bytes(streams[0] + bytes(512) + streams[1] + bytes(1024))
        if suffix in ('gz', 'xz'):
            assert read_file(path) == b'one two'
        else:
            with pytest.raises(CorpusError, match='followed by other data'):
                read_file(path)


def test_a_skippable_frame_of_zstandard_is_skipped(tmp_path):
    frame = b'\x50\x2a\x4d\x18' + (4).to_bytes(4, 'little') + b'note'
    path = tmp_path / 'a.txt.zst'
    path.write_bytes(frame + COMPRESS['zst'](LINES) + frame)
    assert read_file(path) == LINES


def test_little_memory_for_what_is_nothing_but_repetition(tmp_path):
    content = bytes(60_000_000)
    for suffix in COMPRESS:
        path = tmp_path / f'a.txt.{suffix}'
        path.write_bytes(COMPRESS[suffix](content))
        assert path.stat().st_size < 60_000
        with open_bytes(str(path)) as file:
            tracemalloc.start()
            assert file.read(1) == b'\0'
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 24e6, suffix


def test_a_damaged_zip_is_refused(tmp_path):
    path, content = tmp_path / 'a.zip', in_zip(LINES)
    path.write_bytes(content)
    assert read_file(path) == LINES
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    for bad in (content[: len(content) // 2], content[:-1], bytes(damaged)):
        path.write_bytes(bad)
        with pytest.raises(CorpusError, match=r'a\.zip cannot be read'):
            read_file(path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    """Whether it is text or rows, and whether it becomes shorter or longer."""
    for name in ('a.txt', 'a.jsonl'):
        for size in (30_000, 50_000):
            path = tmp_path / name
            path.write_bytes(b'{"text": "a line"}\n' * 2000)  # 38,000 bytes
            blocks = WholeFile(path.open('rb', buffering=0), path.stat().st_size, str(path))
            assert blocks.read(1000)
            os.truncate(path, size)
            with pytest.raises(CorpusError, match='of 38,000 bytes: it changed while it was read'):
                blocks.readall()
    with pytest.raises(CorpusError, match=r'a\.txt ends before byte 60,000: it changed'):
        list(TextFile(str(tmp_path / 'a.txt'), 10, 60_000).pieces())


def test_a_truncated_parquet_file_is_refused(tmp_path):
    path = Path(write_parquet(tmp_path / 'a.parquet', DOCUMENTS))
    content = path.read_bytes()
    for end in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(CorpusError, match=r'a\.parquet cannot be read'):
            list(chunks_of([file_source(str(path))]))
    packed = tmp_path / 'a.parquet.gz'
    packed.write_bytes(gzip.compress(content))
    assert documents_of(file_source(str(packed))) == DOCUMENTS
    packed.write_bytes(gzip.compress(content)[:-10])
    with pytest.raises(CorpusError, match='is truncated'):
        list(chunks_of([file_source(str(packed))]))


def test_a_text_file_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / 'prompt.txt'
    for content in ('Zeile 1\r\nZwölf', ''):
        for mark in (b'', b'\xef\xbb\xbf'):
            path.write_bytes(mark + content.encode('utf-8'))
            assert read_text(path) == content
    path.write_bytes('\ufeffa\ufeffb'.encode())
    assert read_text(path) == 'a\ufeffb'  # elsewhere it is a character
    path.write_bytes(b'good \xff')
    with pytest.raises(CorpusError, match=r'prompt\.txt is not UTF-8: byte 0xff at 5'):
        read_text(path)
    with pytest.raises(CorpusError, match=r'missing\.txt cannot be read: FileNotFoundError'):
        read_text(tmp_path / 'missing.txt')


def test_where_a_wrong_byte_is_in_a_long_text(tmp_path, small):
    content = ('é' * 99 + ' ').encode('utf-8') * 20
    (tmp_path / 'a.txt').write_bytes(content + b'\xff' + content)
    with pytest.raises(CorpusError, match=re.escape(f'byte 0xff at {len(content):,};')):
        list(TextFile(str(tmp_path / 'a.txt')).pieces())


def test_a_zip_is_a_folder(tmp_path, capsys):
    def archive(name, *inside):
        with zipfile.ZipFile(tmp_path / name, 'w') as file:
            for path in inside:
                file.writestr(path, '' if path.endswith('/') else json.dumps({'text': f'of {path}'}))
        return paths([tmp_path / name])

    here = str(tmp_path)
    assert archive('a.zip', 'notes/', 'notes/b.txt', 'a.jsonl', '.hidden.txt', 'x.png') == [
        f'{here}/a.zip/a.jsonl',
        f'{here}/a.zip/notes/b.txt',
    ]
    assert '1 of 3 files are neither' in capsys.readouterr().out
    one, two = (file_source(path) for path in paths([tmp_path / 'a.zip']))
    assert documents_of(one) == ['of a.jsonl']
    assert documents_of(two) == ['{"text": "of notes/b.txt"}']
    size, time_ns = sources.identity(one)[2]
    assert (size, time_ns) == ((tmp_path / 'a.zip').stat().st_size, (tmp_path / 'a.zip').stat().st_mtime_ns)
    assert sources.stored_files([one, two]) == [[one.path, 22], [two.path, 26]]
    # of a single file the archive's name may tell the format
    assert archive('rows.jsonl.zip', 'inside') == [f'{here}/rows.jsonl.zip']
    assert archive('enwik8.zip', 'enwik8') == [f'{here}/enwik8.zip']
    assert archive('b.zip', 'rows.jsonl') == [f'{here}/b.zip/rows.jsonl']
    with pytest.raises(CorpusError, match='no text in'):
        archive('c.zip')


def test_a_zip_is_one_file(tmp_path):
    path = tmp_path / 'a.txt.zip'

    def archive(*names):
        with zipfile.ZipFile(path, 'w') as file:
            for name in names:
                file.writestr(name, '' if name.endswith('/') else f'text of {name}')
        return TextFile(str(path))

    assert ''.join(archive('notes/', 'notes/a.txt', '__MACOSX/._a.txt').texts()) == 'text of notes/a.txt'
    for names, n in ((['a.txt', 'b.txt'], 2), (['notes/'], 0)):
        with pytest.raises(CorpusError, match=f'holds {n} files, not one: unpack it'):
            list(archive(*names).texts())


@pytest.mark.parametrize('name', ['a.csv', 'a.tar.gz', 'a.pdf'])
def test_formats_that_are_not_read_are_named(name):
    with pytest.raises(CorpusError, match='is not read here'):
        file_source(name)


def test_a_parquet_column_that_is_missing(tmp_path):
    path = write_parquet(tmp_path / 'a.parquet', ['a'], field='body')
    with pytest.raises(CorpusError, match="row 1 has no field 'text', only id, body"):
        list(Records(path).pieces())


# Dividing -------------------------------------------------------------------


def test_dividing_a_text_does_not_change_its_tokens(monkeypatch, gpt2):
    monkeypatch.setattr(sources, 'PIECE', 150)
    bpe = train_bpe([words(0, 2000)], 600)
    for seed in range(12):
        text = words(seed, 500)
        pieces = list(in_pieces([text]))
        assert ''.join(pieces) == text
        assert max(map(len, pieces)) <= 150
        for tokenizer in (Tiktoken('gpt2'), bpe):
            whole = tokenizer.encode(text)
            assert [i for ids in tokenizer.encode_batch(pieces) for i in ids] == whole, (tokenizer.kind, seed)


def test_the_division_depends_on_the_text_alone(monkeypatch):
    monkeypatch.setattr(sources, 'PIECE', 64)
    text = words(3, 500)
    expected = list(in_pieces([text]))
    assert len(expected) > 10
    for step in (1, 7, 63, 64, 65, 500):
        assert list(in_pieces(text[i : i + step] for i in range(0, len(text), step))) == expected
    assert ''.join(in_pieces(['x' * 1000])) == 'x' * 1000  # no boundary: divided all the same
    assert list(in_pieces([])) == list(in_pieces([''])) == []


# Prepare --------------------------------------------------------------------


def test_documents_counts_and_bytes(tmp_path):
    splits = {
        'train': [
            Records(write_jsonl(tmp_path / 'a.jsonl', DOCUMENTS)),
            Records(write_jsonl(tmp_path / 'b.jsonl', ['more'])),
        ],
        'val': [Records(write_jsonl(tmp_path / 'c.jsonl', [*DOCUMENTS[::-1], 'of val alone']))],
        'test': [Records(write_jsonl(tmp_path / 'd.jsonl', ['x', 'y']))],
    }
    meta = prepare(tmp_path / 'set', 'bpe:280', splits, num_proc=1)
    data = open_data(tmp_path / 'set')
    texts = [text for text in DOCUMENTS if text]
    assert decoded(data, 'train') == [*texts, 'more']
    assert decoded(data, 'val') == [*texts[::-1], 'of val alone']
    assert decoded(data, 'test') == ['x', 'y']
    assert [meta['splits'][s]['documents'] for s in ('train', 'val', 'test')] == [6, 6, 2]
    assert [meta['splits'][s]['empty'] for s in ('train', 'val', 'test')] == [1, 1, 0]
    assert meta['splits']['train']['bytes'] == sum(len(d.encode('utf-8')) for d in [*DOCUMENTS, 'more'])
    assert meta['splits']['train']['tokens'] == len(data.splits['train'])
    assert meta['source']['files']['train'][1] == [
        str(tmp_path / 'b.jsonl'),
        (tmp_path / 'b.jsonl').stat().st_size,
    ]
    assert sorted(p.name for p in (tmp_path / 'set').iterdir() if p.name[0] != '.') == [
        'meta.json', 'test.bin', 'tokenizer.json', 'train.bin', 'val.bin',
    ]  # fmt: skip
    assert not (tmp_path / 'set' / '.prepare').exists()


@pytest.mark.parametrize('tokenizer', ['gpt2', 'bytes', 'bpe:300', 'folder'])
def test_special_tokens_in_a_document_are_text(tmp_path, gpt2, gpt2_folder, tokenizer):
    """A text cannot end its own document, nor begin another, whatever it says."""
    texts = ['a <|endoftext|> b', '</s><s>', '<pad>', '<|endoftext|><|endoftext|>']
    splits = {
        'train': [Records(write_jsonl(tmp_path / 'train.jsonl', texts))],
        'val': [Records(write_jsonl(tmp_path / 'val.jsonl', ['<s>c</s>']))],
    }
    name = str(gpt2_folder) if tokenizer == 'folder' else tokenizer
    prepare(tmp_path / 'set', name, splits, num_proc=1)
    data = open_data(tmp_path / 'set')
    assert decoded(data, 'train') == texts
    assert decoded(data, 'val') == ['<s>c</s>']
    ids = data.splits['train'].tolist()
    assert ids.count(from_spec(data.tokenizer_spec).eot) == len(texts)
    if tokenizer == 'folder':
        assert not {0, 1} & set(ids)  # <pad> and <s>


def test_documents_without_text_are_left_out(tmp_path, capsys):
    """They would leave two end-of-text tokens in a row, and one at the start."""
    rows = [None, '', 'a', None, '', 'b', ' ', None]
    splits = {
        'train': [Records(write_jsonl(tmp_path / 'train.jsonl', rows))],
        'val': [Records(write_jsonl(tmp_path / 'val.jsonl', ['c', None]))],
    }
    meta = prepare(tmp_path / 'set', 'bytes', splits, num_proc=1)
    assert open_data(tmp_path / 'set').splits['train'].tolist() == [97, 256, 98, 256, 32, 256]
    counts = {s: (entry['documents'], entry['empty']) for s, entry in meta['splits'].items()}
    assert counts == {'train': (3, 5), 'val': (1, 1)}
    said = capsys.readouterr().out
    assert '5 more documents without text were left out' in said
    assert '1 more documents without text were left out' in said
    holdout = Holdout(0.3, 18)  # of the eight rows, with text or without
    meta = prepare(tmp_path / 'held', 'bytes', {'train': splits['train']}, holdout=holdout, num_proc=1)
    assert [rows[number] for number in holdout.documents(8)] == ['a', ' ', None]
    assert decoded(open_data(tmp_path / 'held'), 'val') == ['a', ' ']
    assert decoded(open_data(tmp_path / 'held'), 'train') == ['b']
    assert [meta['splits'][split]['empty'] for split in ('train', 'val')] == [4, 1]


@pytest.mark.parametrize('num_proc', [1, 2])
def test_documents_that_splits_share_are_counted(tmp_path, small, monkeypatch, capsys, num_proc):
    """Whatever pieces and chunks they are in, and however often."""
    monkeypatch.setattr(chunks, 'SMALL', 0)
    long, also_long = words(1, 200), words(2, 200)
    texts = {
        'train': ['a', 'b', long, 'c', 'c', '', also_long, *(words(i, 9) for i in range(10, 50))],
        'val': [words(3, 200), 'c', long, '', 'b', 'b', 'd', long + '.'],
        'test': ['e', 'd', 'f', words(10, 9)],
    }
    splits = {s: [Records(write_jsonl(tmp_path / f'{s}.jsonl', rows))] for s, rows in texts.items()}
    meta = prepare(tmp_path / 'set', 'bytes', splits, num_proc=num_proc)
    assert meta['splits']['val']['also_in'] == {'train': 4}  # c, the long one, b and b
    assert meta['splits']['test']['also_in'] == {'train': 1, 'val': 1}
    assert 'also_in' not in meta['splits']['train']
    said = capsys.readouterr().out
    assert '4 of its documents are in train too' in said
    assert '1 of its documents are in val too' in said
    assert open_data(tmp_path / 'set').meta == meta


def test_documents_held_out_that_are_in_train_too_are_counted(tmp_path, small):
    texts = [words(i // 2, 30) for i in range(100)]  # each twice
    splits = {'train': [Records(write_jsonl(tmp_path / 'a.jsonl', texts))]}
    holdout = Holdout(0.1, 2)
    held = {int(number) for number in holdout.documents(100)}
    both = sum(number ^ 1 in held for number in held)  # with both copies in val
    meta = prepare(tmp_path / 'set', 'bytes', splits, holdout=holdout, num_proc=1)
    assert meta['splits']['val']['also_in'] == {'train': 10 - both}
    assert both == 2


def test_validation_that_is_training_text_is_refused(tmp_path, two):
    copy = tmp_path / 'copy.jsonl'
    copy.write_bytes(Path(two['train'][0].path).read_bytes())
    more = [*two['train'], Records(write_jsonl(tmp_path / 'b.jsonl', ['b']))]
    for split in ('val', 'test'):
        with pytest.raises(CorpusError, match=f'all of --{split}_files are among --files'):
            prepare(tmp_path / 'set', 'bytes', {**two, 'train': more, split: two['train']}, num_proc=1)
        assert not list((tmp_path / 'set').rglob('*.npz'))  # seen before the work
    for split in ('val', 'test'):
        with pytest.raises(CorpusError, match=rf'all 9 document\(s\) of {split} are in train too'):
            prepare(tmp_path / 'set', 'bytes', {**two, split: [Records(str(copy))]}, num_proc=1)
        assert not (tmp_path / 'set' / 'meta.json').exists()
    texts = Records(write_jsonl(tmp_path / 'same.jsonl', ['a', 'b'] * 50))
    with pytest.raises(CorpusError, match=r'all 10 document.* of val are in train too.*remove the rep'):
        prepare(tmp_path / 'held', 'bytes', {'train': [texts]}, holdout=Holdout(0.1, 4), num_proc=1)


def test_beginning_and_end_of_documents(tmp_path, small):
    text = words(5, 60)
    last = {'train': 'b', 'val': 'c'}
    splits = {s: [Records(write_jsonl(tmp_path / f'{s}.jsonl', [text, '', b]))] for s, b in last.items()}
    for begin, end, wanted in (
        (True, True, '{0}{1}{0}{0}{2}{0}'),
        (False, True, '{1}{0}{2}{0}'),
        (False, False, '{1}{2}'),
    ):
        prepare(tmp_path / 'set', 'bytes', splits, begin=begin, end=end, num_proc=1)
        shown = Bytes().decode(open_data(tmp_path / 'set').splits['train'])
        assert shown == wanted.format('<|endoftext|>', text, 'b')


def test_any_bytes_with_the_bytes_tokenizer(tmp_path):
    content = bytes(range(256)) * 40
    (tmp_path / 'a.bin').write_bytes(content)
    (tmp_path / 'b.bin').write_bytes(content[::-1])
    one, other = (file_source(str(tmp_path / f'{name}.bin'), raw=True) for name in 'ab')
    splits = {'train': [one], 'val': [other]}
    prepare(tmp_path / 'set', 'bytes', splits, end=False, num_proc=1)
    assert open_data(tmp_path / 'set').splits['train'].astype(np.uint8).tobytes() == content


def test_a_large_vocabulary_is_written_as_uint32(tmp_path):
    characters = [chr(i) for i in range(0x4E00, 0x4E00 + 70000) if not 0xD800 <= i < 0xE000]
    for split, text in (('train', characters), ('val', characters[60000:])):
        (tmp_path / f'{split}.txt').write_text(''.join(text), encoding='utf-8')
    splits = {split: [TextFile(str(tmp_path / f'{split}.txt'))] for split in ('train', 'val')}
    meta = prepare(tmp_path / 'set', 'chars', splits, num_proc=1)
    assert (meta['dtype'], meta['vocab_size']) == ('uint32', len(characters))
    data = open_data(tmp_path / 'set')
    assert data.splits['train'].dtype == np.uint32
    assert from_spec(data.tokenizer_spec).decode(data.splits['val'][-3:]) == ''.join(characters[-3:])


def test_gpt2_tokens_are_those_of_the_documents(tmp_path, gpt2, small):
    texts = [words(i, 40) for i in range(20)]
    splits = {'train': [Records(write_jsonl(tmp_path / 'train.jsonl', texts))]}
    splits['val'] = [Records(write_jsonl(tmp_path / 'val.jsonl', [words(99, 40)]))]
    prepare(tmp_path / 'set', 'gpt2', splits, num_proc=1)
    expected = [i for text in texts for i in [*Tiktoken('gpt2').encode(text), 50256]]
    assert open_data(tmp_path / 'set').splits['train'].tolist() == expected


def test_the_held_out_documents_are_those_of_datasets(tmp_path, small, monkeypatch):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    from datasets import Dataset

    texts = [f'{i} {words(i, i % 9)}' for i in range(300)]
    split = Dataset.from_dict({'text': texts}).train_test_split(test_size=0.02, seed=2357, shuffle=True)
    sources_ = [
        Records(write_jsonl(tmp_path / f'{i}.jsonl', texts[i * 100 : i * 100 + 100])) for i in range(3)
    ]
    meta = prepare(tmp_path / 'set', 'bytes', {'train': sources_}, holdout=Holdout(0.02, 2357), num_proc=1)
    data = open_data(tmp_path / 'set')
    assert decoded(data, 'val') == list(split['test']['text'])  # the same documents in the same order
    held = set(split['test']['text'])
    assert decoded(data, 'train') == [text for text in texts if text not in held]
    for name, documents in (('train', split['train']['text']), ('val', split['test']['text'])):
        assert meta['splits'][name]['documents'] == len(documents)
        assert meta['splits'][name]['bytes'] == sum(len(text.encode('utf-8')) for text in documents)


def test_holding_out_leaves_a_test_split_alone_and_needs_two_documents(tmp_path):
    texts = Records(write_jsonl(tmp_path / 'a.jsonl', ['a', 'b', 'c']))
    one = Records(write_jsonl(tmp_path / 'b.jsonl', ['only']))
    prepare(tmp_path / 'set', 'bytes', {'train': [texts], 'test': [one]}, holdout=Holdout(0.1, 1), num_proc=1)
    assert decoded(open_data(tmp_path / 'set'), 'test') == ['only']
    with pytest.raises(CorpusError, match=r'0.1 of 1 document.* --val_files'):
        prepare(tmp_path / 'one', 'bytes', {'train': [one]}, holdout=Holdout(0.1, 1), num_proc=1)


def test_a_bpe_does_not_see_what_is_held_out(tmp_path):
    texts = ['common words'] * 50
    for number in Holdout(0.1, 3).documents(50):
        texts[number] = 'zyzzyva' * 50
    splits = {'train': [Records(write_jsonl(tmp_path / 'a.jsonl', texts))]}
    prepare(tmp_path / 'set', 'bpe:300', splits, holdout=Holdout(0.1, 3), num_proc=1)
    tokenizer = from_spec(open_data(tmp_path / 'set').tokenizer_spec)
    assert len(tokenizer.encode('words')) < len(tokenizer.encode('zyzzyva')) == len('zyzzyva')


def test_the_same_files_however_many_processes(tmp_path, monkeypatch, small):
    monkeypatch.setattr(chunks, 'SMALL', 0)
    splits = {s: [Records(write_jsonl(tmp_path / f'{s}.jsonl', [words(i, 30) for i in seeds]))]
              for s, seeds in (('train', range(60)), ('val', range(60, 70)))}  # fmt: skip
    metas = [prepare(tmp_path / str(n), 'bpe:300', splits, num_proc=n) for n in (1, 2, 3)]
    for meta in metas[1:]:
        assert meta == metas[0]
    for name in ('train.bin', 'val.bin', 'tokenizer.json'):
        assert len({(tmp_path / n / name).read_bytes() for n in '123'}) == 1


def test_chunks_do_not_change_the_files(tmp_path, monkeypatch):
    splits = {s: [TextFile(str(tmp_path / f'{s}.txt'))] for s in ('train', 'val')}
    for seed, split in enumerate(splits):
        (tmp_path / f'{split}.txt').write_text(words(seed, 3000), encoding='utf-8')
    metas = []
    for size in (1 << 22, 500):
        monkeypatch.setattr(chunks, 'CHUNK', size)
        monkeypatch.setattr(sources, 'PIECE', size // 4)
        metas.append(prepare(tmp_path / f'{size}', 'bpe:500', splits, num_proc=1))
    assert metas[0]['splits'] == metas[1]['splits']


# Kill and go on -------------------------------------------------------------

posix = pytest.mark.skipif(os.name == 'nt', reason='needs POSIX signals')
DRIVER = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    from data import chunks, corpus, join, sources

    sources.PIECE, chunks.CHUNK, chunks.SMALL = 50, 300, 0

    def die(*arguments, **more):
        os.kill(os.getpid(), signal.SIGKILL)

    {fault}
    splits = {{s: [sources.Records(s + '.jsonl')] for s in ('train', 'val')}}
    if __name__ == '__main__':
        holdout = None
        if {holdout!r}:
            splits, holdout = {{'train': splits['train']}}, join.Holdout(0.1, 7)
        corpus.prepare(
            'set', 'bpe:300', splits, holdout=holdout, num_proc={num_proc}, shard_tokens={shard_tokens}
        )
"""
COUNT = """
    real = chunks.encode_chunk
    def counted(*arguments):
        print('encoded')
        return real(*arguments)
    chunks.encode_chunk = counted"""
# where the process kills itself: patches of corpus, in the order of a run
FAULTS = {
    'before any chunk': 'chunks.chunks_of = die',
    'while the tokenizer is trained': 'corpus.train_bpe = die',
    'while chunk 3 is written': """
    save, count = chunks.np.savez, []
    def third(file, **arrays):
        count.append(1)
        if len(count) == 3:
            file.write(b'PK half a chunk'); file.flush(); die()
        save(file, **arrays)
    chunks.np.savez = third""",
    'between two chunks': """
    real, count = chunks.encode_chunk, []
    def fifth(*arguments):
        count.append(1)
        return die() if len(count) == 5 else real(*arguments)
    chunks.encode_chunk = fifth""",
    'while the chunks are joined': """
    write, count = join.TokenWriter.write, []
    def second(self, *arguments):
        write(self, *arguments); self.file.flush(); count.append(1)
        if len(count) == 2: die()
    join.TokenWriter.write = second""",
    'between two shards': """
    begin, count = join.TokenWriter._begin_shard, []
    def third(self):
        count.append(1)
        return die() if len(count) == 3 else begin(self)
    join.TokenWriter._begin_shard = third""",
    'before the files are put in place': 'corpus._put_in_place = die',
    'when train.bin is in place': """
    replace = os.replace
    def first(source, target):
        replace(source, target)
        if str(target) == os.path.join('set', 'train.bin'): die()
    os.replace = first""",
    'when train_001.bin is in place': """
    replace = os.replace
    def second(source, target):
        replace(source, target)
        if str(target).endswith('train_001.bin'): die()
    os.replace = second""",
    'before meta.json is in place': """
    replace = os.replace
    def last(source, target):
        return die() if str(target) == os.path.join('set', 'meta.json') else replace(source, target)
    os.replace = last""",
}


def drive(folder, root, fault='', num_proc=1, holdout=False, shard_tokens=0, **options):
    settings = {'num_proc': num_proc, 'holdout': holdout, 'shard_tokens': shard_tokens}
    code = textwrap.dedent(DRIVER).format(root=str(root), fault=textwrap.dedent(fault), **settings)
    (folder / 'driver.py').write_text(code, encoding='utf-8')
    return subprocess.run(
        [sys.executable, 'driver.py'], cwd=folder, capture_output=True, text=True, check=False, **options
    )


@pytest.fixture(scope='module')
def reference(tmp_path_factory, root):
    """What a run that was never killed makes, with and without documents held out."""
    folder = tmp_path_factory.mktemp('reference')
    for split, seeds in (('train', range(40)), ('val', range(40, 48))):
        write_jsonl(folder / f'{split}.jsonl', [words(seed, 30) for seed in seeds])
    made = {}
    for holdout in (False, True):
        shutil.rmtree(folder / 'set', ignore_errors=True)
        run = drive(folder, root, COUNT, holdout=holdout)
        assert run.returncode == 0, run.stderr
        made['chunks', holdout] = run.stdout.count('encoded')
        made[holdout] = {
            p.name: p.read_bytes() for p in (folder / 'set').iterdir() if p.suffix in ('.bin', '.json')
        }
    made['texts'] = {name: (folder / name).read_bytes() for name in ('train.jsonl', 'val.jsonl')}
    return made


@posix
@pytest.mark.parametrize(
    ('fault', 'holdout'),
    [
        *((fault, False) for fault in FAULTS if 'shards' not in fault and '_001' not in fault),
        ('between two chunks', True),
        ('while the chunks are joined', True),
    ],
)
def test_killed_and_run_again(tmp_path, root, reference, fault, holdout):
    for name, content in reference['texts'].items():
        (tmp_path / name).write_bytes(content)
    killed = drive(tmp_path, root, FAULTS[fault], holdout=holdout)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(DataError, match='unfinished preparation'):
        open_data(tmp_path / 'set')
    assert not (tmp_path / 'set' / 'meta.json').exists()
    made = len(list((tmp_path / 'set').rglob('*.npz')))
    again = drive(tmp_path, root, COUNT, holdout=holdout)
    assert again.returncode == 0, again.stderr
    assert 'going on' in again.stdout
    # what was there is not made again
    assert made + again.stdout.count('encoded') == reference['chunks', holdout] > 10
    for name, content in reference[holdout].items():
        if name != 'meta.json':  # it holds the times of the source files
            assert (tmp_path / 'set' / name).read_bytes() == content, name
    ours, theirs = (
        json.loads(c)
        for c in ((tmp_path / 'set' / 'meta.json').read_bytes(), reference[holdout]['meta.json'])
    )
    assert {**ours, 'job': ''} == {**theirs, 'job': ''}
    assert not (tmp_path / 'set' / '.prepare').exists()
    assert len(open_data(tmp_path / 'set').splits) == 2


@posix
@pytest.mark.parametrize(
    ('fault', 'holdout'),
    [
        ('between two shards', False),
        ('between two shards', True),
        ('when train_001.bin is in place', False),
        ('before meta.json is in place', True),
    ],
)
def test_killed_and_run_again_in_shards(tmp_path, root, reference, fault, holdout):
    for name, content in reference['texts'].items():
        (tmp_path / name).write_bytes(content)
    killed = drive(tmp_path, root, FAULTS[fault], holdout=holdout, shard_tokens=500)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(DataError, match='unfinished preparation'):
        open_data(tmp_path / 'set')
    again = drive(tmp_path, root, holdout=holdout, shard_tokens=500)
    assert again.returncode == 0, again.stderr
    shards = sorted(path.name for path in (tmp_path / 'set').glob('train_*.bin'))
    assert shards == [f'train_{i:03d}.bin' for i in range(len(shards))] and len(shards) > 2
    whole = b''.join((tmp_path / 'set' / name).read_bytes() for name in shards)
    assert whole == reference[holdout]['train.bin']
    data = open_data(tmp_path / 'set')
    assert data.splits['train'][:].tobytes() == whole
    # and what was in shards is replaced by what is not
    assert drive(tmp_path, root, holdout=holdout).returncode == 0
    assert sorted(path.name for path in (tmp_path / 'set').glob('*.bin')) == ['train.bin', 'val.bin']
    assert (tmp_path / 'set' / 'train.bin').read_bytes() == whole


@posix
def test_workers_end_with_a_killed_parent(tmp_path, root, reference):
    for name, content in reference['texts'].items():
        (tmp_path / name).write_bytes(content)
    fault = """
    real = chunks.encode_split
    def with_workers(folder, sources, spec, executor, *arguments):
        executor.submit(int).result()
        open('workers', 'w').write(' '.join(map(str, executor._processes)))
        chunks.wait = die
        return real(folder, sources, spec, executor, *arguments)
    chunks.encode_split = with_workers"""
    # the pipe of stdout would stay open as long as a worker lives
    killed = drive(tmp_path, root, fault, num_proc=2, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    workers = [int(pid) for pid in (tmp_path / 'workers').read_text().split()]
    assert workers
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    again = drive(tmp_path, root, num_proc=2)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / 'set' / 'train.bin').read_bytes() == reference[False]['train.bin']


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f'/proc/{pid}/stat')
    return not (stat.exists() and stat.read_text().rsplit(')', 1)[1].split()[0] == 'Z')


@posix
def test_a_killed_worker_is_one_line_and_the_run_goes_on(tmp_path, root, reference):
    for name, content in reference['texts'].items():
        (tmp_path / name).write_bytes(content)
    fault = """
    if __name__ == '__mp_main__':
        chunks.encode_chunk = die"""
    killed = drive(tmp_path, root, fault, num_proc=2, timeout=60)
    assert killed.returncode == 1
    assert 'CorpusError: a process that encodes was killed' in killed.stderr
    assert '--num_proc below 2' in killed.stderr
    assert drive(tmp_path, root).returncode == 0
    assert (tmp_path / 'set' / 'train.bin').read_bytes() == reference[False]['train.bin']


# The folder -----------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    return {
        s: [Records(write_jsonl(tmp_path / f'{s}.jsonl', [words(first + i, 30) for i in range(9)]))]
        for s, first in (('train', 0), ('val', 9))
    }


def interrupt(monkeypatch, module, function, folder, tokenizer, splits):
    """A preparation that Ctrl-C ends where it calls this function of the module."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, function, interrupted)
        prepare(folder, tokenizer, splits, num_proc=1)


def test_what_is_there_already_is_left_alone(tmp_path, two, monkeypatch, capsys):
    first = prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
    monkeypatch.setattr(chunks, 'encode_chunk', lambda *arguments: pytest.fail('encoded again'))
    assert prepare(tmp_path / 'set', 'bytes', two, num_proc=2) == first
    assert 'prepared already' in capsys.readouterr().out
    assert not (tmp_path / 'set' / '.prepare').exists()


def test_other_settings_replace_what_is_there(tmp_path, two):
    prepare(tmp_path / 'set', 'bpe:300', {**two, 'test': two['val']}, num_proc=1)
    prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
    data = open_data(tmp_path / 'set')
    assert (data.vocab_size, list(data.splits)) == (257, ['train', 'val'])
    assert not (tmp_path / 'set' / 'test.bin').exists()
    assert not (tmp_path / 'set' / 'tokenizer.json').exists()


def test_token_files_that_nothing_describes_are_not_replaced(tmp_path, two):
    """nanoGPT's, perhaps: hours of work."""
    (tmp_path / 'set').mkdir()
    for name in ('train.bin', 'train_000.bin'):
        path = tmp_path / 'set' / name
        path.write_bytes(b'12')
        with pytest.raises(CorpusError, match=f'{name} was not made here'):
            prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
        assert path.read_bytes() == b'12'
        path.rename(tmp_path / 'moved.bin')
    prepare(tmp_path / 'set', 'bytes', two, num_proc=1)


@pytest.mark.parametrize(
    ('shard_tokens', 'files'), [(0, 1), (1000, 3), (2000, 2), (2001, 1), (2002, 1), (667, 3)]
)
def test_a_split_of_many_tokens_is_written_in_shards(tmp_path, shard_tokens, files):
    """2,001 tokens of training: a shard is full before the next one begins."""
    for name, text in (('train', 'abcde' * 400), ('val', 'edcba' * 8)):
        write_jsonl(tmp_path / f'{name}.jsonl', [text])
    splits = {s: [Records(str(tmp_path / f'{s}.jsonl'))] for s in ('train', 'val')}
    meta = prepare(tmp_path / 'set', 'bytes', splits, num_proc=1, shard_tokens=shard_tokens)
    shards = meta['splits']['train'].get('shards', [])
    sizes = [shard['tokens'] for shard in shards] or [2001]
    assert len(sizes) == files
    assert sum(sizes) == 2001
    assert set(sizes[:-1]) <= {shard_tokens}
    names = ['train.bin'] if files == 1 else [f'train_{i:03d}.bin' for i in range(files)]
    found = sorted(path.name for path in (tmp_path / 'set').iterdir() if path.name.startswith('train'))
    assert found == names
    data = open_data(tmp_path / 'set')
    assert len(data.splits['train']) == 2001
    assert Bytes().decode(data.splits['train'][:]) == 'abcde' * 400 + '<|endoftext|>'
    assert 'shards' not in meta['splits']['val']


def test_a_changed_or_damaged_set_is_made_again(tmp_path, two):
    before = prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
    os.truncate(tmp_path / 'set' / 'val.bin', 10)
    assert prepare(tmp_path / 'set', 'bytes', two, num_proc=1) == before
    write_jsonl(tmp_path / 'val.jsonl', ['other text'])
    assert prepare(tmp_path / 'set', 'bytes', two, num_proc=1)['splits']['val']['documents'] == 1


def test_the_old_set_serves_until_the_new_one_is_there(tmp_path, two, monkeypatch):
    prepare(tmp_path / 'set', 'bytes', two, num_proc=1)

    interrupt(monkeypatch, chunks, 'encode_chunk', tmp_path / 'set', 'bpe:300', two)
    assert open_data(tmp_path / 'set').vocab_size == 257


def test_chunks_of_another_job_are_not_used(tmp_path, two, monkeypatch):
    prepare(tmp_path / 'clean', 'bpe:300', two, num_proc=1)

    interrupt(monkeypatch, corpus, 'join_chunks', tmp_path / 'set', 'bytes', two)
    assert list((tmp_path / 'set' / '.prepare').rglob('*.npz'))
    prepare(tmp_path / 'set', 'bpe:300', two, num_proc=1)
    assert (tmp_path / 'set' / 'train.bin').read_bytes() == (tmp_path / 'clean' / 'train.bin').read_bytes()


def test_two_at_once_are_refused(tmp_path, two):
    from filelock import FileLock

    (tmp_path / 'set' / '.prepare').mkdir(parents=True)
    with (
        FileLock(tmp_path / 'set' / '.prepare' / 'lock'),
        pytest.raises(CorpusError, match='another prepare is at work'),
    ):
        prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
    prepare(tmp_path / 'set', 'bytes', two, num_proc=1)


def test_a_full_disk_is_seen_before_the_start(tmp_path, two, monkeypatch):
    free = corpus.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(corpus.shutil, 'disk_usage', lambda path: free)
    with pytest.raises(CorpusError, match=r'GB of free disk, about .* GB are needed'):
        prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
    assert not list((tmp_path / 'set').rglob('*.npz'))


def test_a_disk_that_fills_up_leaves_nothing_that_looks_finished(tmp_path, two, monkeypatch):
    def full(file, **arrays):
        file.write(b'some')
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(np, 'savez', full)
        with pytest.raises(CorpusError, match='No space left on device; the same command goes on'):
            prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
    assert not [p for p in (tmp_path / 'set').rglob('*') if '.npz' in p.name]
    with pytest.raises(DataError, match='unfinished'):
        open_data(tmp_path / 'set')
    prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
    open_data(tmp_path / 'set')


def test_a_damaged_chunk_is_named(tmp_path, two, monkeypatch):
    interrupt(monkeypatch, corpus, 'join_chunks', tmp_path / 'set', 'bytes', two)
    chunk = sorted((tmp_path / 'set').rglob('*.npz'))[0]
    os.truncate(chunk, chunk.stat().st_size // 2)
    with pytest.raises(CorpusError, match=re.escape(f'{chunk.name} is damaged')):
        prepare(tmp_path / 'set', 'bytes', two, num_proc=1)
    chunk.unlink()
    prepare(tmp_path / 'set', 'bytes', two, num_proc=1)


@pytest.mark.parametrize(
    ('tokenizer', 'num_proc', 'wanted'),
    [('bpe:many', 1, 'as in bpe:4096'), ('bpe:12', 1, 'at least 257'), ('bytes', 0, '--num_proc 0')],
)
def test_wrong_settings(tmp_path, two, tokenizer, num_proc, wanted):
    with pytest.raises((CorpusError, TokenizerError), match=wanted):
        prepare(tmp_path / 'set', tokenizer, two, num_proc=num_proc)


def test_a_split_without_text_is_refused(tmp_path, two):
    empty = [TextFile(str(tmp_path / 'empty.txt'))]
    (tmp_path / 'empty.txt').write_bytes(b'')
    nulls = [Records(write_jsonl(tmp_path / 'nulls.jsonl', [None, '', None]))]
    for end in (False, True):
        for source in (empty, nulls):
            with pytest.raises(CorpusError, match='split val has no text'):
                prepare(tmp_path / 'set', 'bytes', {**two, 'val': source}, end=end, num_proc=1)
    with pytest.raises(CorpusError, match='no text for validation: give --val_files'):
        prepare(tmp_path / 'set', 'bytes', {'train': two['train'], 'test': two['train']}, num_proc=1)


def test_flags(tmp_path, small):
    path = write_jsonl(tmp_path / 'a.jsonl', ['', 'short', 'long words ' * 30])
    flags = [flag for _, flag in Records(path).pieces()]
    assert flags[:2] == [STARTS | ENDS, STARTS | ENDS]
    assert flags[2] == STARTS
    assert flags[-1] == ENDS
    assert set(flags[3:-1]) == {0}
