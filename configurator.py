"""
Knobs of a program: defaults from a frozen dataclass, then config files, then --key=value, all checked.

    python train.py config/baseline.py config/small.py --max_iters=1e3 --compile
    python compare.py out/a out/b --baseline a

A program declares its knobs as a frozen dataclass of int, float, bool and str (or one of them | None), one
knob a line. The comment that ends the line is its help text; a comment on a line of its own opens a section:

    @dataclass(frozen=True)
    class Knobs:
        # optimizer
        learning_rate: float = 6e-4  # peak of the schedule

Checks that concern several knobs belong in `Knobs.__post_init__` and raise ConfigError too.
A config file is a Python program: naming it on the command line runs its code.
"""

import ast
import difflib
import inspect
import io
import math
import os
import shlex
import sys
import textwrap
import tokenize
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

_WANTED = {
    int: 'a whole number (int)',
    float: 'a number (float)',
    bool: 'true or false (bool)',
    str: 'text (str)',
}
_USAGE = (
    'Config files (*.py) and --key=value (or --key value) go in any order. The command line wins over files, '
    'later over earlier. --key alone sets a bool to true. Every knob with its default, type and meaning:'
)
_USAGE_OF_WORDS = (
    '{words} and --key=value (or --key value) go in any order; later wins over earlier. --key alone sets a '
    'bool to true. Every knob with its default, type and meaning:'
)


class UserError(Exception):
    """What the user can fix: str() is one line that names the thing, what is wrong with it, and the fix.

    Every error of this kind in the project derives from it, so that a program has one thing to catch.
    """


class ConfigError(UserError):
    """A knob, a config file or an argument that cannot be used."""

    def __init__(self, message):
        super().__init__(' '.join(message.split()))  # an error raised inside a config file may span lines


class Configured(typing.NamedTuple):
    knobs: typing.Any  # an instance of the dataclass
    given: dict  # name -> value of every knob that a file or the command line set, be it to its default
    files: list  # the config files as pathlib.Path, in the order they were applied; or the words, as they are


def run_program(main: Callable[[list[str]], int | None]) -> None:
    """Run main(arguments) as the program that was started, and end the process with the status it returns.

    A UserError is one line on stderr and status 2; Ctrl-C is 130; that the reader has gone away (`| head`) is
    no error.
    """
    sys.exit(_status_of(lambda: main(sys.argv[1:])))


def _status_of(call):
    """The exit status of call(): what it returns, or that of the exception that it raises."""
    try:
        status = call()
        sys.stdout.flush()
    except UserError as e:
        print(f'{Path(sys.argv[0]).name}: {e}', file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        status = 0
    return status


def configure(cls, argv, doc='', words=''):
    """
    The knobs of dataclass `cls` as set by `argv` (without the program's name).

    argv holds config files (*.py), `--key=value` or `--key value`, and `--key` alone to set a bool to true,
    in any order. The command line wins over files, later wins over earlier. `--help` or `-h` prints `doc` and
    every knob, then exits with 0. words: what the other arguments are called, in a program that has such
    ('FOLDER …'); it then has no config files, and they come back as they are. Returns Configured; raises
    ConfigError.
    """
    if '--help' in argv or '-h' in argv:
        print(help_text(cls, doc, words))
        sys.exit(0)
    options, others = _options_of(argv, _kinds(cls))
    given = {key: _from_text(cls, key, text) for key, text in options}
    if words:
        return Configured(cls(**given), given, [arg for _, arg in others])
    for before, arg in others:
        if not arg.endswith('.py'):
            fix = f'{before}={arg}' if before.startswith('--') and '=' not in before else '--key=value'
            raise ConfigError(f'argument {arg!r} is neither a config file (*.py) nor a knob; write {fix}')
    files = [Path(arg) for _, arg in others]
    for path in files:  # before any of them runs
        _require(path)
    from_files = {}
    for path in files:
        from_files |= _run_config(cls, path)
    given = from_files | given
    return Configured(cls(**given), given, files)


def divide(cls, other, argv):
    """
    One command line for two dataclasses of knobs: (the arguments for `cls`, `--key=value` for the other).
    Names and values of the other's knobs are checked here: ConfigError.
    """
    kinds, others = _kinds(cls), _kinds(other)
    options, words = _options_of([arg for arg in argv if arg not in ('--help', '-h')], others | kinds)
    own, passed = [arg for _, arg in words], []
    for key, text in options:
        if key in kinds:
            own.append(f'--{key}={text}')
        elif key in others:
            _from_text(other, key, text)
            passed.append(f'--{key}={text}')
        else:
            raise _unknown(key, others | kinds, 'the command line')
    return [*own, *(arg for arg in argv if arg in ('--help', '-h'))], passed


def _options_of(argv, kinds):
    """argv as ([(key, text of its value)], [(the argument before, any other argument)])."""
    options, others, rest, before = [], [], list(argv), ''
    while rest:
        arg = rest.pop(0)
        key, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('--'):
            others.append((before, arg))
        elif equals or key not in kinds:
            options.append((key, text))
        elif kinds[key][0] is bool:
            options.append((key, 'true'))
        elif rest and not rest[0].startswith('--'):
            options.append((key, rest.pop(0)))
        else:
            raise ConfigError(f'the command line gives {arg} no value; write {arg}=value')
        before = arg
    return options, others


def _from_text(cls, key, text):
    """The value of a knob that the command line gives as text; ConfigError."""
    kind, optional = _kinds(cls).get(key, (str, False))  # _checked refuses an unknown key
    return _checked(cls, key, _parsed(text, kind, optional), 'the command line')


def from_dict(cls, values, where):
    """
    The knobs of dataclass `cls` from a dict, such as the JSON of a resolved config, checked like a file.

    A knob that `values` lacks keeps its default. `where` (the JSON's path) is named in errors: ConfigError.
    """
    if not isinstance(values, dict):
        raise ConfigError(f'{where} holds a {type(values).__name__}, not the names and values of knobs')
    return cls(**{name: _checked(cls, name, value, where) for name, value in values.items()})


def check_command_line(cls, doc='', words=''):
    """
    Answer --help and refuse wrong flags, as the first act of a program: before it imports what takes seconds.

        if __name__ == '__main__':
            check_command_line(Knobs, __doc__)

        import torch

    No config file is run here: `configure` does that, and everything else, later.
    """

    def parse(argv):
        if '--help' in argv or '-h' in argv:
            configure(cls, argv, doc, words)  # prints it and exits
        for key, text in _options_of(argv, _kinds(cls))[0]:
            _from_text(cls, key, text)

    check_first(parse)


def check_first(parse):
    """Run parse(arguments) as `run_program` would, but return where it raises nothing."""
    status = _status_of(lambda: parse(sys.argv[1:]) and None)
    if status is not None:
        sys.exit(status)


def help_text(cls, doc='', words=''):
    """`doc`, then every knob of `cls` by section: default, type, and the comment that ends its line."""
    comments, section = {}, ''
    for owner in reversed(cls.__mro__[:-1]):  # an inherited knob is documented where it is declared
        section_row = -1
        source = textwrap.dedent(inspect.getsource(owner))
        knobs = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]  # type: ignore[attr-defined]
        names = {row: knob.target.id for knob in knobs for row in range(knob.lineno, knob.end_lineno + 1)}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            (row, column), text = token.start, token.string.lstrip('# ')
            if row in names:
                comments.setdefault(names[row], (section, ''))
                if token.type == tokenize.COMMENT:
                    comments[names[row]] = section, text
            elif token.type == tokenize.COMMENT and not token.line[:column].strip():
                section = f'{section} {text}' if row == section_row + 1 else text
                section_row = row
    usage = _USAGE_OF_WORDS.format(words=words) if words else _USAGE
    lines, section = [doc.strip(), '', *textwrap.wrap(usage, 110)], None
    for f in fields(cls):
        kind, optional = _kinds(cls)[f.name]
        default = shlex.quote(f.default) if isinstance(f.default, str) else str(f.default).lower()
        head = f'  --{f.name}={default}  ({kind.__name__}{" or none" if optional else ""})  '
        if comments[f.name][0] != section:
            section = comments[f.name][0]
            lines += ['', section] if section else ['']
        if len(head) > 44:
            lines.append(head)
            head = ''
        indent = ' ' * 44
        text = head.ljust(44) + comments[f.name][1]
        lines += textwrap.wrap(text, 110, subsequent_indent=indent, break_on_hyphens=False)
    return '\n'.join(line.rstrip() for line in lines).lstrip()


def _require(path):
    """ConfigError with the config files of a like name unless `path` is a file."""
    if not path.is_file():
        there = {p.stem: p.as_posix() for p in sorted(Path('config').rglob('*.py'))}
        close = [there[stem] for stem in difflib.get_close_matches(path.stem, there)]
        fix = f'did you mean {" or ".join(close)}?' if close else 'those of this project lie in config/'
        raise ConfigError(f'no config file {path} (seen from {Path.cwd()}); {fix}')


def _run_config(cls, path):
    """Run the config file `path` in a namespace of its own: {name: value} of the knobs it sets."""
    namespace = {'__name__': '__config__', '__file__': str(path.absolute())}
    try:
        tree = ast.parse(path.read_bytes(), str(path))
        exec(compile(tree, str(path), 'exec'), namespace)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        rows = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            rows.append(error.lineno)
        message = getattr(error, 'msg', error)  # a SyntaxError's str repeats file and line
        raise ConfigError(f'{_at(path, rows)}: {type(error).__name__}: {message}') from error
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.value is None:
            name = ast.unparse(node.target)
            raise ConfigError(f"{_at(path, [node.lineno])}: '{name}: ...' sets nothing; write {name} = value")
    values = {}
    for name, value in namespace.items():
        a_module = isinstance(value, types.ModuleType) and name not in _kinds(cls)
        if not (name.startswith('_') or a_module):
            rows = sorted(node.lineno for node in ast.walk(tree) if name in _bound(node))  # type: ignore[attr-defined]
            values[name] = _checked(cls, name, value, _at(path, rows))
    return values


def _bound(node):
    """The names that a node of a syntax tree itself binds: by assignment, import, def or class."""
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Store) else []
    return [getattr(node, 'asname', None) or getattr(node, 'name', None)]


def _at(path, rows):
    return f'{path}:{rows[-1]}' if rows else str(path)


def _kinds(cls):
    """{name: (int, float, bool or str, whether None is allowed)} from the annotations of the dataclass."""
    kinds, hints = {}, typing.get_type_hints(cls)
    for f in fields(cls):
        hint = hints[f.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        choices = [*typing.get_args(hint)] if union else [hint]
        optional = types.NoneType in choices
        kind, *others = [choice for choice in choices if choice is not types.NoneType]
        if others or kind not in _WANTED:
            raise TypeError(f'{cls.__name__}.{f.name} must be int, float, bool or str, or one of them | None')
        kinds[f.name] = kind, optional
    return kinds


def _parsed(text, kind, optional):
    """The value that `text` of the command line spells for a knob of that kind; if none, the text itself."""
    if optional and text.lower() == 'none':
        return None
    if kind is bool:
        return {'true': True, '1': True, 'false': False, '0': False}.get(text.lower(), text)
    for number in (int, float) if kind in (int, float) else ():
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _unknown(name, kinds, where):
    """The ConfigError for a name that is no knob."""
    close = difflib.get_close_matches(name.lower().replace('-', '_'), kinds, n=1)
    free = "--help lists them (a config file's own names begin with _)"
    fix = f"did you mean '{close[0]}'?" if close else free
    return ConfigError(f"{where} sets '{name}', which is no knob; {fix}")


def _checked(cls, name, value, where):
    """`value` as the type that knob `name` declares; ConfigError for an unknown name or an unfit value."""
    kinds = _kinds(cls)
    if name not in kinds:
        raise _unknown(name, kinds, where)
    kind, optional = kinds[name]
    wanted = _WANTED[kind] + (' or none' if optional else '')
    if value is None and optional:
        return None
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if kind is int and value % 1 == 0:  # inf and nan: nan
            return int(value)
        default = getattr(cls, name, None)
        endless = isinstance(default, float) and not math.isfinite(default) and isinstance(value, float)
        if kind is float and (endless or abs(value) <= sys.float_info.max):  # nan compares false
            return float(value)
        wanted = wanted.replace('a number', 'a finite number')
    elif kind in (bool, str) and isinstance(value, kind):
        return kind(value)
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + '...'
    raise ConfigError(f'{where} sets {name} to {shown}, but {name} wants {wanted}')
