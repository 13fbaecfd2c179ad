"""Arguments of public functions: their names, and their values by the annotations.

A name that is not known is an error that names the nearest known one; a value of another type is
one that names the argument. Both are TypeErrors, before the function begins. Integers and numbers
of other libraries (numpy's, tensors of one value) become Python's. Ranges are the functions' own.
"""

import inspect
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from functools import cache, cached_property, wraps
from numbers import Real
from types import NoneType, UnionType
from typing import (
    Any,
    BinaryIO,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

Target = TypeVar("Target", bound=Callable[..., Any])
Convert = Callable[[Any], Any]
"""A value -> the value to use, or `UNFIT`."""

UNFIT = object()
"""In place of a value that is not of a type."""

WORDS = {
    NoneType: "None",
    bool: "True or False",
    int: "an int",
    float: "a number",
    str: "a str",
    bytes: "bytes",
    os.PathLike: "a path",
    Callable: "callable",
}
"""How a message calls a type; others by their name."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, else all of them."""
    names = sorted(known)
    parts = [each for each in names if each.startswith(name) or name.startswith(each)]
    near = get_close_matches(name, names, 1, cutoff=0.5) or parts
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {', '.join(names)}" if names else "it takes none"


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises TypeError, as Python does, if a name given to `where` is not among those known."""
    names = set(known)
    for name in given:
        if name not in names:
            raise TypeError(f"{where} has no argument {_shown(name)}: {suggestion(name, names)}")


@cache
def names_of(function: Callable[..., Any], bound: bool = False) -> frozenset[str] | None:
    """Names that a function takes as keywords, `Unpack`ed ones too; None if it takes any.

    bound: leaves out its first parameter, which whoever calls it does not give.
    """
    names = set[str]()
    for parameter in list(inspect.signature(function).parameters.values())[bound:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            options = next(iter(get_args(parameter.annotation)), None)
            if not hasattr(options, "__annotations__"):
                return None
            names |= options.__annotations__.keys()
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            names.add(parameter.name)
    return frozenset(names)


def checked(target: Target) -> Target:
    """A function, or a class with its constructor and public methods, that checks its arguments.

    A function that takes any name (`**options: Any`) checks the names, and the values of those,
    itself: see `check_call`.
    """
    if not inspect.isclass(target):
        return _checked(target, target.__qualname__, bound=False)
    for name, member in list(vars(target).items()):
        public = not name.startswith("_") or name == "__init__"
        where = target.__name__ if name == "__init__" else f"{target.__name__}.{name}"
        if public and inspect.isfunction(member):
            setattr(target, name, _checked(member, where, bound=True))
        elif public and isinstance(member, classmethod):
            setattr(target, name, classmethod(_checked(member.__func__, where, bound=True)))
    return target


def _checked(function: Any, where: str, bound: bool) -> Any:
    rules = _Rules(function, where, bound)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return function(*rules.positional(arguments, named), **rules.named(named))

    return call


def check_call(
    function: Callable[..., Any], arguments: Sequence[Any], named: Mapping[str, Any], where: str
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a call of `function`, without its first one, as `checked` passes them on.

    function: lives as long as the process; its rules are kept.
    """
    rules, given = _rules(function, where), dict(named)
    return list(rules.positional([None, *arguments], given))[1:], rules.named(given)


def as_type(hint: Any, value: Any, name: str) -> Any:
    """A value that is no argument, converted as one of that annotation is.

    Raises:
        TypeError: it is of another type; the message calls it by its name.
    """
    convert = _converter(hint)
    return value if convert is None else _fitting(convert, hint, value, name)


def _fitting(convert: Convert, hint: Any, value: Any, name: str) -> Any:
    found = convert(value)
    if found is UNFIT:
        raise TypeError(f"{name} must be {_described(hint)}, not {_shown(value)}")
    return found


class _Rules:
    """What a function takes. Annotations are read at its first call: they may name later classes.

    Args:
        where: what messages call the function.
        bound: its first parameter is not given by whoever calls it, and not looked at.
    """

    def __init__(self, function: Callable[..., Any], where: str, bound: bool) -> None:
        self.function, self.where, self.bound = function, where, bound
        self.names = names_of(function, bound)
        parameters = list(inspect.signature(function).parameters.values())
        takes = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        self.order = [each.name for each in parameters if each.kind in takes]
        variable = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        self.most = None if variable else len(self.order)
        self.required = {
            each.name
            for each in parameters
            if each.default is each.empty
            and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        }

    @cached_property
    def converters(self) -> dict[str, tuple[Convert, Any]]:
        """Converter and annotation by the name of an argument; none where anything goes."""
        scope = getattr(inspect.unwrap(self.function), "__globals__", {})
        parameters = list(inspect.signature(self.function).parameters.values())[self.bound :]
        hints = dict[str, Any]()
        for each in parameters:
            if each.kind is each.VAR_KEYWORD:
                options = next(iter(get_args(each.annotation)), None)
                hints |= get_type_hints(options) if is_typeddict(options) else {}
            elif each.kind is not each.VAR_POSITIONAL and each.annotation is not each.empty:
                text = isinstance(each.annotation, str)
                hints[each.name] = eval(each.annotation, scope) if text else each.annotation
        converters = ((name, _converter(hint), hint) for name, hint in hints.items())
        return {name: (convert, hint) for name, convert, hint in converters if convert is not None}

    def positional(self, arguments: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
        """Positional arguments, converted; with the named ones they are as many as are needed."""
        if self.names is not None and not named.keys() <= self.names:
            refuse_unknown(named, self.names, self.where)
        given = self.order[: len(arguments)]
        if (
            (self.most is not None and len(arguments) > self.most)
            or not self.required <= {*given, *named}
            or not named.keys().isdisjoint(given)
        ):
            try:
                inspect.signature(self.function).bind(*arguments, **named)
            except TypeError as error:
                raise TypeError(f"{self.where}: {error}") from None
        converters, changed = self.converters, list(arguments)
        for i, name in enumerate(given):
            if name in converters:
                changed[i] = self._converted(name, arguments[i])
        return changed

    def named(self, named: dict[str, Any]) -> dict[str, Any]:
        converters = self.converters
        for name, value in named.items():
            if name in converters:
                named[name] = self._converted(name, value)
        return named

    def _converted(self, name: str, value: Any) -> Any:
        return _fitting(*self.converters[name], value, f"{self.where}: {name}")


@cache
def _rules(function: Callable[..., Any], where: str) -> _Rules:
    return _Rules(function, where, bound=True)


def _converter(hint: Any) -> Convert | None:
    """What checks and converts a value of an annotation; None where anything goes.

    Files are left to whoever reads or writes them, and iterators are not read.
    """
    if hint in _CONVERTERS:
        return _CONVERTERS[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _any_of([_converter(part) for part in parts])
    if origin is Literal:
        # By type first: arrays of other libraries have no one answer to `==`.
        kinds = tuple({type(part) for part in parts})
        return lambda value: value if isinstance(value, kinds) and value in parts else UNFIT
    kind = origin or hint
    if hint is Any or kind is BinaryIO or not isinstance(kind, type):
        return None
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return None
    if is_typeddict(kind) or kind is dict:
        return _collection(Mapping, parts)
    if kind in (set, frozenset):
        return _collection(Set, parts)
    if kind is tuple:
        return _collection(tuple, parts[:1] if parts[1:] == (...,) else ())
    if kind is list:
        return _collection(Sequence, parts)
    if kind in (Mapping, Set, Sequence, Iterable):
        return _collection(kind, parts)
    return lambda value: value if isinstance(value, kind) else UNFIT


def _any_of(converters: list[Convert | None]) -> Convert | None:
    if None in converters:
        return None

    def convert(value: Any) -> Any:
        for each in converters:
            found = each(value) if each is not None else value
            if found is not UNFIT:
                return found
        return UNFIT

    return convert


def _collection(kind: Any, parts: Sequence[Any]) -> Convert:
    """Checks each item: of a mapping, keys and values."""
    items = [_converter(part) for part in parts]

    def convert(value: Any) -> Any:
        if not isinstance(value, kind):
            return UNFIT
        if not any(items) or not isinstance(value, Collection):
            return value
        try:
            columns = (value, value.values()) if isinstance(value, Mapping) else (value,)
            for item, column in zip(items, columns, strict=False):
                if item is not None and any(item(each) is UNFIT for each in column):
                    return UNFIT
        except Exception:  # a tensor that has no values, for one
            return UNFIT
        return value

    return convert


def _to_int(value: Any) -> Any:
    if isinstance(value, int):
        return value
    try:
        # A tensor of one truth value has an index too, and is no integer.
        return UNFIT if "bool" in str(getattr(value, "dtype", "")) else operator.index(value)
    except Exception:  # Any library's, of its own kinds.
        return UNFIT


def _to_float(value: Any) -> Any:
    if isinstance(value, float | int):
        return value
    if isinstance(value, Real):
        return float(value)
    return _to_int(value)


def _to_bool(value: Any) -> Any:
    if value is True or value is False:
        return value
    number = value.item() if type(value).__module__ == "numpy" and not value.shape else value
    return bool(number) if isinstance(number, int) and number in (0, 1) else UNFIT


_CONVERTERS: dict[Any, Convert | None] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    None: lambda value: None if value is None else UNFIT,
    NoneType: lambda value: None if value is None else UNFIT,
}


def _described(hint: Any) -> str:
    """An annotation, in a message."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = list(dict.fromkeys(_described(part) for part in parts))
        return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    kind = origin or hint
    if kind in WORDS:
        return WORDS[kind]
    name = kind.__name__
    word = f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
    items = [part for part in parts if part not in (Any, ...)]
    return f"{word} of {', '.join(map(_name, items))}" if items else word


def _name(hint: Any) -> str:
    """An annotation of the items of a collection, in a message."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_name, get_args(hint)))
    return (get_origin(hint) or hint).__name__


def _shown(value: Any) -> str:
    """A value that is of the wrong type: itself if it is short, else its type."""
    plain = value is None or isinstance(value, bool | float | complex)
    if plain or isinstance(value, str) or (isinstance(value, int) and abs(value) < 10**20):
        return f"{value!r:.60}"
    name = type(value).__name__
    word = f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
    if isinstance(value, list | tuple | Set | Mapping) and value:
        kinds = dict.fromkeys(type(each).__name__ for each in value)
        return f"{word} of {', '.join([*kinds][:4])}"
    return word
