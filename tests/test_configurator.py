"""Knobs from files and the command line: what is accepted, who wins, and one line for everything refused."""

import json
import math
import sys
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path

import pytest

import configurator
from configurator import ConfigError, configure, from_dict


@dataclass(frozen=True)
class Knobs:
    """Knobs of a pretended trainer."""

    # output
    out_dir: str = ''  # where checkpoints go; '' = out/<names>  # and more
    wandb_run_name: str = 'run #1'  # name of the run
    note: str | None = None  # free text
    # optimizer
    # (AdamW)
    learning_rate: float = 6e-4  # peak of the schedule
    weight_decay: float = 1e-1  # decoupled
    max_iters: int = (
        600000  # training steps, a text long enough that it has to be wrapped to the next line of the help
    )
    decay_lr: bool = True  # cosine decay
    compile: bool = False  # torch.compile
    grad_clip: float = math.inf  # largest norm

    # limits
    max_minutes: float | None = None  # stop after so long
    keep: int | None = 3  # checkpoints kept


@dataclass(frozen=True)
class MoreKnobs(Knobs):
    # more
    bare: int = 2
    extra_long_name_that_leaves_no_room: str = 'and-a-default'  # one more
    extra_long_name_without_a_comment: str = 'and-a-default'
    last: int = 1  # the last


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(name, text) writes config/name in a fresh working directory and returns its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config').mkdir()

    def write(name, text):
        path = Path('config', name)
        path.write_text(text, encoding='utf-8')
        return str(path)

    return write


def refused(call, *args):
    """The error's text, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        call(*args)
    text = str(caught.value)
    assert text and '\n' not in text
    return text


def test_nothing_given_is_the_defaults():
    assert configure(Knobs, []) == (Knobs(), {}, [])


@pytest.mark.parametrize(
    ('arg', 'value'),
    [
        ('--weight_decay=0', 0.0),
        ('--weight_decay=-1e-2', -0.01),
        ('--max_iters=1e3', 1000),
        ('--max_iters=5E3', 5000),
        ('--max_iters=20.0', 20),
        ('--max_iters=9007199254740993', 2**53 + 1),  # not by way of a float
        ('--decay_lr=false', False),
        ('--decay_lr=False', False),
        ('--decay_lr=0', False),
        ('--compile=TRUE', True),
        ('--compile=1', True),
        ('--compile', True),
        ('--wandb_run_name=a=b', 'a=b'),
        ('--wandb_run_name=123', '123'),
        ('--wandb_run_name="q"', '"q"'),
        ('--wandb_run_name=', ''),
        ('--wandb_run_name=none', 'none'),
        ('--wandb_run_name=x.py', 'x.py'),
        ('--note=None', None),
        ('--note=1', '1'),
        ('--max_minutes=none', None),
        ('--max_minutes=5', 5.0),
        ('--keep=None', None),
        ('--keep=1e1', 10),
        ('--grad_clip=inf', math.inf),  # its default is infinite, so it may be
    ],
)
def test_command_line_values(arg, value):
    knobs, given, files = configure(Knobs, [arg])
    name = arg[2:].partition('=')[0]
    got = getattr(knobs, name)
    assert got == value and type(got) is type(value)
    assert given == {name: value} and files == []
    assert asdict(knobs) == asdict(Knobs()) | {name: value}


def test_a_value_may_stand_apart_from_its_knob():
    argv = '--max_iters 1e3 --note x.py --compile --weight_decay -0.5 --max_minutes none'.split()
    knobs, given, files = configure(Knobs, argv)
    wanted = {'max_iters': 1000, 'note': 'x.py', 'compile': True, 'weight_decay': -0.5, 'max_minutes': None}
    assert given == wanted and files == [] and knobs == Knobs(**wanted)


def test_a_program_of_words_gets_them_as_they_are(capsys):
    argv = ['4', '--keep', '7', 'a.py', '--compile', 'x=y', '--note=b.py']
    knobs, given, words = configure(Knobs, argv, words='EXPERIMENT …')
    assert words == ['4', 'a.py', 'x=y'] and knobs == Knobs(keep=7, compile=True, note='b.py')
    assert given == {'keep': 7, 'compile': True, 'note': 'b.py'}
    assert "did you mean 'keep'" in refused(configure, Knobs, ['4', '--kep=1'], '', 'EXPERIMENT …')
    with pytest.raises(SystemExit):
        configure(Knobs, ['--help'], 'Runs.', words='EXPERIMENT …')
    assert 'EXPERIMENT … and --key=value (or --key value) go in any order' in capsys.readouterr().out


def test_a_command_line_is_divided_between_two_programs():
    @dataclass(frozen=True)
    class Own:
        seeds: int = 5
        status: bool = False
        note: str = ''

    argv = '4 --seeds 3 --status --max_iters 20 --compile mine.py --note=own --decay_lr=false'.split()
    own, passed = configurator.divide(Own, Knobs, argv)
    assert own == ['4', 'mine.py', '--seeds=3', '--status=true', '--note=own']
    assert passed == ['--max_iters=20', '--compile=true', '--decay_lr=false']
    assert configure(Own, own, words='X').knobs == Own(3, True, 'own')
    for argv, part in (
        (['--sedes=1'], "which is no knob; did you mean 'seeds'?"),
        (['--max_iter=1'], "which is no knob; did you mean 'max_iters'?"),
        (['--max_iters=x'], "sets max_iters to 'x', but max_iters wants a whole number (int)"),
        (['--seeds'], 'gives --seeds no value; write --seeds=value'),
    ):
        assert part in refused(configurator.divide, Own, Knobs, argv)
    assert configurator.divide(Own, Knobs, ['4', '--seeds=2', '-h']) == (['4', '--seeds=2', '-h'], [])


@pytest.mark.parametrize(
    ('arg', 'parts'),
    [
        ('--weight_decay=abc', ["weight_decay to 'abc'", 'a number (float)']),
        ('--weight_decay=', ["weight_decay to ''", 'a number (float)']),
        ('--weight_decay=none', ["weight_decay to 'none'", 'a number (float)']),
        ('--weight_decay=nan', ['weight_decay to nan', 'a finite number (float)']),
        ('--weight_decay=inf', ['weight_decay to inf', 'a finite number (float)']),
        ('--weight_decay=1e999', ['weight_decay to inf', 'a finite number (float)']),
        ('--max_iters=1.5', ['max_iters to 1.5', 'a whole number (int)']),
        ('--max_iters=inf', ['max_iters to inf', 'a whole number (int)']),
        ('--max_iters=nan', ['max_iters to nan', 'a whole number (int)']),
        ('--max_iters=true', ["max_iters to 'true'", 'a whole number (int)']),
        ('--decay_lr=yes', ["decay_lr to 'yes'", 'true or false (bool)']),
        ('--decay_lr=', ["decay_lr to ''", 'true or false (bool)']),
        ('--max_minutes=soon', ["max_minutes to 'soon'", 'a number (float) or none']),
        ('--max_iters=' + 'x' * 500, ["max_iters to 'xxx", '...', 'a whole number (int)']),
        ('--max_iters=a\nb', [r"max_iters to 'a\nb'", 'a whole number (int)']),
    ],
)
def test_command_line_values_refused(arg, parts):
    text = refused(configure, Knobs, [arg])
    assert all(part in text for part in [*parts, 'the command line']) and len(text) < 250


@pytest.mark.parametrize(
    ('argv', 'part'),
    [
        (['--learing_rate=1'], "sets 'learing_rate', which is no knob; did you mean 'learning_rate'?"),
        (['--Decay-LR=false'], "did you mean 'decay_lr'?"),
        (['--complie'], "did you mean 'compile'?"),
        (['--zzz=1'], '--help lists them'),
        (['--'], "sets '', which is no knob"),
        (['--learning_rate'], 'gives --learning_rate no value; write --learning_rate=value'),
        (['--learning_rate', '--compile'], 'gives --learning_rate no value; write --learning_rate=value'),
        (['--learing_rate', '3'], "sets 'learing_rate', which is no knob; did you mean 'learning_rate'?"),
        (['--max_iters', 'x'], "sets max_iters to 'x', but max_iters wants a whole number (int)"),
        (
            ['--decay_lr', 'false'],
            "'false' is neither a config file (*.py) nor a knob; write --decay_lr=false",
        ),
        (['--keep=2', 'weight_decay=1'], "'weight_decay=1' is neither"),
        (['-compile'], 'write --key=value'),
        ([''], "argument '' is neither"),
    ],
)
def test_command_line_typos(argv, part):
    assert part in refused(configure, Knobs, argv)


def test_command_line_wins_wherever_it_stands(config):
    first = config('first.py', 'learning_rate = 1e-3\nmax_iters = 10\nkeep = 3\n')
    second = config('second.py', 'max_iters = 20\nweight_decay = 0\n')
    expected = {'learning_rate': 1e-4, 'max_iters': 20, 'keep': 3, 'weight_decay': 0.0}
    for argv in (
        ['--learning_rate=1e-4', first, second],
        [first, '--learning_rate=1e-4', second],
        [first, second, '--learning_rate=5', '--learning_rate=1e-4'],
    ):
        knobs, given, files = configure(Knobs, argv)
        assert given == expected  # keep too, though it is set to its default
        assert knobs == Knobs(**expected)
        assert files == [Path(first), Path(second)]
    assert configure(Knobs, [second, first]).given['max_iters'] == 10


def test_a_config_computes_with_its_own_names(config):
    path = config(
        'computed.py',
        'import math\nimport sys as system\n_steps = 250\nmax_iters = _steps * 4.0\n'
        "learning_rate: float = 1 / math.sqrt(4)\nout_dir = __file__\nnote = 'é'\n",
    )
    given = configure(Knobs, [path]).given
    out_dir = str(Path(path).absolute())
    assert given == {'max_iters': 1000, 'learning_rate': 0.5, 'out_dir': out_dir, 'note': 'é'}


def test_a_config_sees_neither_defaults_nor_other_files_nor_the_program(config):
    first = config('first.py', '_hidden = 1\nmax_iters = 10\nnote = None\n')
    second = config('second.py', 'keep = 7\n\nmax_iters = max_iters * 2\n')
    text = refused(configure, Knobs, [first, second])
    assert f'{second}:3' in text and "NameError: name 'max_iters' is not defined" in text
    for name in ('_hidden', 'learning_rate', 'configure', 'path', 'cls', 'ConfigError'):
        reader = config('reader.py', f'keep = 1\n_copy = {name}\n')
        assert f"{reader}:2: NameError: name '{name}'" in refused(configure, Knobs, [first, reader])


def test_running_a_config_leaves_no_trace(config):
    path = config('names.py', 'import math\n_steps = 3\nmax_iters = _steps\ncompile = True\n')
    before = dict(vars(configurator)), dict(globals()), asdict(Knobs()), set(sys.modules)
    configure(Knobs, [path])
    assert (dict(vars(configurator)), dict(globals()), asdict(Knobs()), set(sys.modules)) == before
    assert configure(Knobs, []).knobs == Knobs()  # nor does it linger for the next call


@pytest.mark.parametrize(
    ('text', 'row', 'part'),
    [
        (
            'keep = 1\nlearing_rate = 1\n',
            2,
            "sets 'learing_rate', which is no knob; did you mean 'learning_rate'?",
        ),
        ('from math import pi\n', 1, "sets 'pi', which is no knob; --help lists them"),
        ('keep = 1\ndef helper():\n    pass\n', 2, "sets 'helper', which is no knob"),
        ('import math as keep\n', 1, 'sets keep to <module'),
        ('max_iters = True\n', 1, 'sets max_iters to True, but max_iters wants a whole number (int)'),
        ('weight_decay = True\n', 1, 'but weight_decay wants a number (float)'),
        ('max_iters = 1\n\nmax_iters = 1.5\n', 3, 'sets max_iters to 1.5'),
        ("weight_decay = '0.1'\n", 1, "sets weight_decay to '0.1', but weight_decay wants a number (float)"),
        ('if True:\n    max_iters = 1\nmax_iters = 2.5\n', 3, 'sets max_iters to 2.5'),
        ('weight_decay = 10**400\n', 1, 'wants a finite number (float)'),
        ('weight_decay = None\n', 1, 'sets weight_decay to None'),
        ('decay_lr = 1\n', 1, 'sets decay_lr to 1, but decay_lr wants true or false (bool)'),
        ('out_dir = 3\n', 1, 'sets out_dir to 3, but out_dir wants text (str)'),
        ('learning_rate = 1e-3,\n', 1, 'sets learning_rate to (0.001,)'),
        (
            'keep = 1\nlearning_rate: 1e-3\n',
            2,
            "'learning_rate: ...' sets nothing; write learning_rate = value",
        ),
        ('keep = 1\n\nkeep = = 2\n', 3, 'SyntaxError: invalid syntax'),
        ('keep = 1\nkeep = 1 / 0\n', 2, 'ZeroDivisionError: division by zero'),
        ('def _f():\n    raise ValueError("two\\nlines")\n\n_f()\n', 2, 'ValueError: two lines'),
        ('keep = 1\nexit("no")\n', 2, 'SystemExit: no'),
        ('import json\n_read = json.loads("{")\n', 2, 'JSONDecodeError: Expecting'),
        ('import no_such_module_\n', 1, "ModuleNotFoundError: No module named 'no_such_module_'"),
    ],
)
def test_config_errors_name_file_and_line(config, text, row, part):
    path = config('broken.py', text)
    text = refused(configure, Knobs, [path])
    assert text.startswith((f'{path}:{row}: ', f'{path}:{row} sets ')) and part in text


def test_config_that_is_no_text(config):
    path = Path(config('bytes.py', ''))
    for junk in (b'\x00\x01', b"note = '\xff'"):
        path.write_bytes(junk)
        assert refused(configure, Knobs, [str(path)]).startswith(str(path))


def test_missing_config_file_names_those_that_come_close(config):
    config('train_gpt2.py', '')
    Path('config', 'frontier').mkdir()
    config('frontier/reflex_small.py', '')
    text = refused(configure, Knobs, ['config/train_gtp2.py'])
    assert str(Path('config/train_gtp2.py')) in text and 'did you mean config/train_gpt2.py?' in text
    assert 'did you mean config/frontier/reflex_small.py?' in refused(configure, Knobs, ['reflex_small.py'])
    text = refused(configure, Knobs, ['qqqq.py'])
    assert 'no config file qqqq.py' in text and 'did you mean' not in text and 'config/' in text


def test_missing_config_file_is_noticed_before_any_is_run(config):
    path = config('marks.py', "import pathlib\npathlib.Path('ran').touch()\n")
    refused(configure, Knobs, [path, 'absent.py'])
    assert not Path('ran').exists()


def test_help_documents_every_knob_from_the_source(capsys):
    for argv in (['--help'], ['--learing_rate=1', '-h']):
        with pytest.raises(SystemExit) as caught:
            configure(Knobs, argv, 'Trains.\n')
        assert caught.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == 'Trains.' and all(len(line) <= 110 for line in lines)
        words = [' '.join(line.split()) for line in lines]
        assert [line for line in lines if line and line[0] != ' '][-3:] == [
            'output',
            'optimizer (AdamW)',
            'limits',
        ]
        assert words.index('output') < words.index('optimizer (AdamW)') < words.index('limits')
        section = words[words.index('optimizer (AdamW)') : words.index('limits')]
        assert '--learning_rate=0.0006 (float) peak of the schedule' in section
        assert '--decay_lr=true (bool) cosine decay' in section
        assert "--out_dir='' (str) where checkpoints go; '' = out/<names> # and more" in words
        assert "--wandb_run_name='run #1' (str) name of the run" in words
        assert '--max_minutes=none (float or none) stop after so long' in words
        assert 'wrapped to the next line of the help' in ' '.join(words)
        assert sum(line.startswith('  --') for line in lines) == len(asdict(Knobs()))


def test_help_of_inherited_and_uncommented_knobs():
    lines = configurator.help_text(MoreKnobs).splitlines()
    words = [' '.join(line.split()) for line in lines]
    assert words.index('--keep=3 (int or none) checkpoints kept') < words.index('more')
    assert lines[-6:] == [
        'more',
        '  --bare=2  (int)',
        '  --extra_long_name_that_leaves_no_room=and-a-default  (str)',
        ' ' * 44 + 'one more',
        '  --extra_long_name_without_a_comment=and-a-default  (str)',
        '  --last=1  (int)'.ljust(44) + 'the last',
    ]


def test_knobs_survive_the_trip_through_json():
    knobs = configure(Knobs, ['--max_iters=1e3', '--weight_decay=0', '--note=x', '--max_minutes=2']).knobs
    assert from_dict(Knobs, json.loads(json.dumps(asdict(knobs))), 'config.json') == knobs
    assert from_dict(Knobs, {'keep': 2.0, 'weight_decay': 1}, 'config.json') == Knobs(
        keep=2, weight_decay=1.0
    )


@pytest.mark.parametrize(
    ('values', 'part'),
    [
        ({'wieght_decay': 1}, "sets 'wieght_decay', which is no knob; did you mean 'weight_decay'?"),
        ({'max_iters': '10'}, "sets max_iters to '10', but max_iters wants a whole number (int)"),
        ({'decay_lr': 'false'}, 'wants true or false (bool)'),
        ({'weight_decay': math.nan}, 'wants a finite number (float)'),
        ([1], 'holds a list'),
    ],
)
def test_json_is_checked_like_a_file(values, part):
    text = refused(from_dict, Knobs, values, 'out/config.json')
    assert text.startswith('out/config.json') and part in text


def test_a_knob_of_another_type_is_the_programs_mistake():
    for annotation in (list[int], int | str, dict):
        cls = make_dataclass('Odd', [('odd', annotation, None)], frozen=True)
        with pytest.raises(TypeError, match=r'Odd\.odd must be'):
            configure(cls, [])


def test_annotations_may_be_strings():
    cls = make_dataclass('Late', [('steps', 'int | None', None)], frozen=True)
    assert configure(cls, ['--steps=1e2']).knobs.steps == 100
