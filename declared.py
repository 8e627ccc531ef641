"""JSON that comes from outside, compared with a declared shape: its fields, their types, their ranges.

    RUN = Object({'status': OneOf('running', 'finished'), 'seconds': Number(0)}, optional={'note': Text()})
    run = read_json(path, RUN)

What does not fit is a ShapeError: one line that names the file, the field, what it holds and what was
expected. A shape is declared once, beside the program that writes the file, and every reader uses it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from configurator import UserError


class ShapeError(UserError):
    """A file that is not JSON, or not of its declared shape."""


class Shape(Protocol):
    """What a JSON value may be."""

    @property
    def expected(self) -> str:
        """The words for it."""

    def fault(self, value: Any, where: str) -> str:
        """'' if the value fits; else what is wrong with it. `where` is its place in the file, '' for all."""


def read_json(path: str | Path, shape: Shape) -> Any:
    """The content of a JSON file of that shape; ShapeError if it cannot be read, or is of another one."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ShapeError(f'{path} cannot be read ({error.strerror or error})') from error
    return parse_json(content, shape, str(path))


def parse_json(text: str | bytes, shape: Shape, source: str) -> Any:
    """The value of a JSON text of that shape; ShapeError, which names `source`."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ShapeError(f'{source} is nested too deeply') from error
    except ValueError as error:  # also numbers of too many digits, and text that is not UTF-8
        raise ShapeError(f'{source} is not JSON ({error})') from error
    check(value, shape, source)
    return value


def check(value: Any, shape: Shape, source: str) -> None:
    """ShapeError unless the value is of that shape; it names `source` and the place in it."""
    if fault := shape.fault(value, ''):
        raise ShapeError(f'{source}: {fault}')


def wrong(value: Any, where: str, expected: str) -> str:
    """The words for a value that is not what was expected at that place."""
    kinds = {dict: 'an object', list: 'a list', type(None): 'null', bool: str(value is True).lower()}
    shown = kinds.get(type(value)) or repr(value)
    shown = shown if len(shown) <= 60 else f'{shown[:57]}...'
    return f'{where or "its content"} is {shown}, not {expected}'


def place(where: str, name: str) -> str:
    """The place of a field in an object at `where`."""
    shown = name if name.isidentifier() else json.dumps(name[:60])
    return f'{where}.{shown}' if where else shown


@dataclass(frozen=True)
class Anything:
    """Any value."""

    expected: str = 'any value'

    def fault(self, value: Any, where: str) -> str:
        return ''


@dataclass(frozen=True)
class Null:
    """null"""

    expected: str = 'null'

    def fault(self, value: Any, where: str) -> str:
        return '' if value is None else wrong(value, where, self.expected)


@dataclass(frozen=True)
class Flag:
    """true or false"""

    expected: str = 'true or false'

    def fault(self, value: Any, where: str) -> str:
        return '' if isinstance(value, bool) else wrong(value, where, self.expected)


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`; None is no bound."""

    low: float | None = None
    high: float | None = None
    kinds: ClassVar[tuple[type, ...]] = (int, float)
    name: ClassVar[str] = 'a number'

    @property
    def expected(self) -> str:
        low, high = (None if bound is None else f'{bound:,}' for bound in (self.low, self.high))
        if low and high:
            return f'{self.name} from {low} to {high}'
        return self.name + (f' of at least {low}' if low else f' of at most {high}' if high else '')

    def fault(self, value: Any, where: str) -> str:
        fits = isinstance(value, self.kinds) and not isinstance(value, bool)
        fits = fits and -math.inf < value < math.inf  # nan compares false
        fits = fits and (self.low is None or self.low <= value) and (self.high is None or value <= self.high)
        return '' if fits else wrong(value, where, self.expected)


@dataclass(frozen=True)
class Whole(Number):
    """A whole number from `low` to `high`; None is no bound."""

    kinds: ClassVar[tuple[type, ...]] = (int,)
    name: ClassVar[str] = 'a whole number'


@dataclass(frozen=True)
class Text:
    """Text; all of it matches `pattern`, which errors call `expected`."""

    pattern: str = r'(?s:.*)'
    expected: str = 'text'

    def fault(self, value: Any, where: str) -> str:
        fits = isinstance(value, str) and re.fullmatch(self.pattern, value)
        return '' if fits else wrong(value, where, self.expected)


LINE = Text(r'[^\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]*', 'one line of text')
SHA256 = Text(r'[0-9a-f]{64}', 'a SHA-256 in hexadecimal digits')


class OneOf:
    """One of these texts or whole numbers."""

    def __init__(self, *values: str | int) -> None:
        self.values = values
        self.expected = ' or '.join(map(repr, values))

    def fault(self, value: Any, where: str) -> str:
        fits = any(type(value) is type(one) and value == one for one in self.values)
        return '' if fits else wrong(value, where, self.expected)


class Either:
    """What fits one of these shapes."""

    def __init__(self, *shapes: Shape) -> None:
        self.shapes = shapes
        self.expected = ' or '.join(shape.expected for shape in shapes)

    def fault(self, value: Any, where: str) -> str:
        faults = [shape.fault(value, where) for shape in self.shapes]
        if not all(faults):
            return ''
        own = [wrong(value, where, shape.expected) for shape in self.shapes]
        within = [fault for fault, mine in zip(faults, own, strict=True) if fault != mine]
        return within[0] if within else wrong(value, where, self.expected)


@dataclass(frozen=True)
class List:
    """A list of at least `least` values of one shape."""

    item: Shape
    least: int = 0

    @property
    def expected(self) -> str:
        return f'a list of at least {self.least}' if self.least else 'a list'

    def fault(self, value: Any, where: str) -> str:
        if not isinstance(value, list) or len(value) < self.least:
            return wrong(value, where, self.expected)
        return next((f for i, v in enumerate(value) if (f := self.item.fault(v, f'{where}[{i}]'))), '')


@dataclass(frozen=True)
class Table:
    """An object whose names are all of one shape, and whose values are of another."""

    name: Shape
    value: Shape
    expected: str = 'an object'

    def fault(self, value: Any, where: str) -> str:
        if not isinstance(value, dict):
            return wrong(value, where, self.expected)
        for name, content in value.items():
            fault = self.name.fault(name, f'a name in {where or "its content"}')
            if fault := fault or self.value.fault(content, place(where, name)):
                return fault
        return ''


@dataclass(frozen=True)
class Object:
    """An object with these fields, and perhaps the `optional` ones; with no others if it is `closed`."""

    fields: Mapping[str, Shape] = field(default_factory=dict)
    optional: Mapping[str, Shape] = field(default_factory=dict)
    closed: bool = False
    expected: str = 'an object'

    def fault(self, value: Any, where: str) -> str:
        if not isinstance(value, dict):
            return wrong(value, where, self.expected)
        known = {**self.fields, **self.optional}
        for name in [*self.fields, *value]:
            if name not in value:
                return f'{place(where, name)} is missing'
            if name not in known and self.closed:
                return f'{place(where, name)} is not known'
            if name in known and (fault := known[name].fault(value[name], place(where, name))):
                return fault
        return ''
