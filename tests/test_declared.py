"""JSON from outside: what each shape takes, and the words for what it refuses."""

import json
import re

import pytest

from declared import (
    LINE,
    SHA256,
    Anything,
    Either,
    Flag,
    List,
    Null,
    Number,
    Object,
    OneOf,
    ShapeError,
    Table,
    Text,
    Whole,
    check,
    parse_json,
    read_json,
)

SHAPE = Object(
    {
        'count': Whole(1, 9),
        'share': Number(0),
        'name': Text('[a-z]+', 'a lower-case word'),
        'kind': OneOf('bytes', 'chars', 7),
        'done': Flag(),
    },
    optional={
        'end': Either(Whole(0), Null()),
        'files': List(Object({'size': Whole(0)}, closed=True), least=1),
        'splits': Table(OneOf('train', 'val'), Whole()),
        'source': Anything(),
    },
)
GOOD = {'count': 3, 'share': 0.5, 'name': 'abc', 'kind': 'bytes', 'done': False}


@pytest.mark.parametrize(
    'more',
    [
        {},
        {'count': 1},
        {'count': 9},
        {'share': 0},
        {'kind': 7},
        {'done': True},
        {'end': None},
        {'end': 0},
        {'files': [{'size': 0}, {'size': 9}]},
        {'splits': {}},
        {'splits': {'train': -1, 'val': 10**30}},
        {'source': [{'deep': [None]}]},
        {'another program wrote': 'this too'},
    ],
)
def test_what_fits(more):
    check({**GOOD, **more}, SHAPE, 'x.json')


@pytest.mark.parametrize(
    ('more', 'wanted'),
    [
        ({'count': 0}, 'count is 0, not a whole number from 1 to 9'),
        ({'count': 10}, 'count is 10, not a whole number from 1 to 9'),
        ({'count': 3.0}, 'count is 3.0, not a whole number'),
        ({'count': True}, 'count is true, not a whole number'),
        ({'count': '3'}, "count is '3', not a whole number"),
        ({'count': None}, 'count is null, not a whole number'),
        ({'share': -0.1}, 'share is -0.1, not a number of at least 0'),
        ({'share': float('nan')}, 'share is nan, not a number'),
        ({'share': float('inf')}, 'share is inf, not a number'),
        ({'share': [1]}, 'share is a list, not a number'),
        ({'name': 'abC'}, "name is 'abC', not a lower-case word"),
        ({'name': 'abc\n'}, "name is 'abc\\n', not a lower-case word"),
        ({'name': 'a' * 99 + '!'}, 'aaa..., not a lower-case word'),
        ({'kind': True}, "kind is true, not 'bytes' or 'chars' or 7"),
        ({'kind': 'byte'}, "kind is 'byte', not 'bytes' or"),
        ({'done': 0}, 'done is 0, not true or false'),
        ({'end': -1}, 'end is -1, not a whole number of at least 0 or null'),
        ({'files': []}, 'files is a list, not a list of at least 1'),
        ({'files': [{'size': 1}, {'size': -1}]}, 'files[1].size is -1, not a whole number of at least 0'),
        ({'files': [{}]}, 'files[0].size is missing'),
        ({'files': [{'size': 1, 'a b': 2}]}, 'files[0]."a b" is not known'),
        ({'splits': {'tarin': 1}}, "a name in splits is 'tarin', not 'train' or 'val'"),
        ({'splits': {'train': '1'}}, "splits.train is '1', not a whole number"),
        ({'splits': 'train'}, "splits is 'train', not an object"),
    ],
)
def test_what_does_not_fit_is_one_line(more, wanted):
    with pytest.raises(ShapeError, match='^' + re.escape('x.json: ')) as error:
        check({**GOOD, **more}, SHAPE, 'x.json')
    assert wanted in str(error.value)
    assert '\n' not in str(error.value)


def test_a_missing_field_and_a_value_that_is_no_object():
    with pytest.raises(ShapeError, match='x: count is missing'):
        check({'share': 1}, SHAPE, 'x')
    with pytest.raises(ShapeError, match='x: its content is a list, not an object'):
        check([], SHAPE, 'x')


def test_either_tells_what_is_wrong_within_the_one_that_comes_closest():
    shape = Object({'added': Either(List(Object({'id': Whole(0)})), Null())})
    check({'added': None}, shape, 'x')
    with pytest.raises(ShapeError, match=r'added\[0\]\.id is -1, not a whole number of at least 0'):
        check({'added': [{'id': -1}]}, shape, 'x')
    with pytest.raises(ShapeError, match="added is 'a', not a list or null"):
        check({'added': 'a'}, shape, 'x')


def test_texts_of_one_line_and_hashes():
    check('python data/prepare.py --files ünï', LINE, 'x')
    for bad in ('a\nb', '\x1b[2J', 'a\u2028b', '\ud800'):
        with pytest.raises(ShapeError, match='not one line of text'):
            check(bad, LINE, 'x')
    check('0' * 64, SHA256, 'x')
    for bad in ('0' * 63, 'G' * 64, 64 * '0' + '\n', ''):
        with pytest.raises(ShapeError, match='not a SHA-256'):
            check(bad, SHA256, 'x')


@pytest.mark.parametrize(
    ('content', 'wanted'),
    [
        (b'', 'is not JSON'),
        (b'{"a": 1', 'is not JSON'),
        (b'\x80\x04\x95pickle', 'is not JSON'),
        (b'1' * 5000, 'is not JSON'),
        (b'[' * 100_000 + b']' * 100_000, 'is nested too deeply'),
        (b'{"a":' * 100_000 + b'1' + b'}' * 100_000, 'is nested too deeply'),
    ],
)
def test_what_is_not_json_is_one_line(tmp_path, content, wanted):
    path = tmp_path / 'run.json'
    path.write_bytes(content)
    with pytest.raises(ShapeError, match=f'^{re.escape(str(path))} {wanted}') as error:
        read_json(path, Anything())
    assert '\n' not in str(error.value)


def test_a_file_is_read_and_checked(tmp_path):
    path = tmp_path / 'run.json'
    path.write_text('\ufeff' + json.dumps(GOOD), encoding='utf-8')
    assert read_json(path, SHAPE) == GOOD
    assert parse_json('[1, 2]', List(Whole()), 'line 3') == [1, 2]
    with pytest.raises(ShapeError, match=r'line 3: \[1\] is 2.5, not a whole number'):
        parse_json('[1, 2.5]', List(Whole()), 'line 3')
    with pytest.raises(ShapeError, match=r'none\.json cannot be read \(No such file'):
        read_json(tmp_path / 'none.json', SHAPE)
    with pytest.raises(ShapeError, match='cannot be read'):
        read_json(tmp_path, SHAPE)
