"""Which process something belongs to, and whether it is still open.

Neither OpenMP's threads nor CUDA survive `fork`, and a lock that another thread held stays locked.
What a process has loaded is therefore refused in its children, before anything could wait.
"""

import os
from typing import TYPE_CHECKING, Any

from mimo_fast.errors import ClosedError

FORKED = (
    "this process was forked after the model had been loaded, and lacks its threads: start it by "
    "multiprocessing.get_context('spawn') and load the model there"
)
LATE = (
    "this process was forked from one that had loaded a model, whose threads it lacks: start it by "
    "multiprocessing.get_context('spawn')"
)

_generation = 0
_loaded = False
_late = False


def _forked() -> None:
    global _generation, _late
    _generation += 1
    _late |= _loaded


os.register_at_fork(after_in_child=_forked)


def check_may_load() -> None:
    """Raises ClosedError in a child of a process that had loaded a model: it would hang."""
    if _late:
        raise ClosedError(LATE)


class Owner:
    """The process that made something, and whether that has been closed since."""

    def __init__(self) -> None:
        global _loaded
        check_may_load()
        _loaded = True
        self._generation, self.closed = _generation, False

    def __reduce__(self) -> tuple[type["Owner"], tuple[()]]:
        # A copy, maybe sent to another process, belongs to whoever unpickles it.
        return type(self), ()

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that made it."""
        return self._generation != _generation

    def check(self) -> None:
        """Raises ClosedError unless this is the owner's process and it is open."""
        if self._generation != _generation:
            raise ClosedError(FORKED)
        if self.closed:
            raise ClosedError("the model has been closed: load it again")


class FreedWhenClosed:
    """Something with an `owner`, whose `close` deletes the attributes that hold memory.

    Another thread can close it between any check and the use of such an attribute, which then
    raises ClosedError.
    """

    owner: Owner

    # Type checkers would take any name for an attribute.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name != "owner" and not name.startswith("__"):
                self.owner.check()
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
