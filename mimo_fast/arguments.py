"""Keyword arguments by name: one that is not known is an error that names the nearest known one."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, get_args

Target = TypeVar("Target", bound=Callable[..., Any])


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
            raise TypeError(f"{where} has no argument {name!r}: {suggestion(name, names)}")


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
    """A function, or a class with its constructor and public methods, that refuses unknown names.

    A function that takes any name (`**options: Any`) is left alone and checks them itself.
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
    names = names_of(function, bound)
    if names is None:
        return function

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not named.keys() <= names:
            refuse_unknown(named, names, where)
        return function(*arguments, **named)

    return call
