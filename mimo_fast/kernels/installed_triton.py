"""Which Triton is installed, and whether the kernels may use it.

Triton promises no compatibility between its minor versions: kernels that one compiles, the next may
refuse, compile to other results or abort the process on. So only versions from the oldest to the
newest that `make check` runs the compile matrix with are used. With any other, and with one that
does not import, plain torch takes the place of the kernels, and one warning says why. The version
is read from Triton's source, so an unsuitable one is not even imported.

3.10 turns the fusion of multiply and add off by default, which changes results; 3.4 does not
compile the PDL calls that the kernels make, and older ones fail on more.

MIMO_FAST_TRITON=any uses whatever version there is: to try a new one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

OLDEST = (3, 5)
NEWEST = (3, 9)
"""Minor versions of Triton; the `cuda` extra has the same."""

FEW_SPILLS = (3, 7)
"""The ptxas of older versions keeps more loads in flight than there are registers, so there some
kernels have other tiles. The oldest and the newest spill nothing; each between them that was tried
spills a value or two in one kernel of sm_90 (docs/LOG.md)."""

ENVIRONMENT = "MIMO_FAST_TRITON"
ADVICE = "pip install 'mimo-fast[cuda]'"


@dataclass(frozen=True)
class Installed:
    """The installed Triton.

    Args:
        version: as it states it; "" where there is none, "?" where it states none.
        module, language: `triton` and `triton.language`; None where it is not used.
        refusal: why it is not used; "" where it is.
    """

    version: str
    module: Any
    language: Any
    refusal: str

    @property
    def minor(self) -> tuple[int, int]:
        """(major, minor); (0, 0) where it is unknown."""
        return _minor(self.version)

    def line(self) -> str:
        """For `mimo-fast info`."""
        if not self.version:
            return f"{self.refusal}; on a GPU plain torch takes the kernels' place ({ADVICE})"
        if self.refusal:
            return f"not used: {self.refusal}; plain torch takes the kernels' place ({ADVICE})"
        untested = not OLDEST <= self.minor <= NEWEST
        return f"{self.version}, used on GPUs{f', untested ({ENVIRONMENT})' if untested else ''}"


def find() -> Installed:
    """Looks for Triton and imports it if it may be used. Never raises."""
    try:
        version = _stated_version()
        refusal = "Triton is not installed" if version is None else _unsuitable(version)
        if refusal:
            return Installed(version or "", None, None, refusal)
        module = importlib.import_module("triton")
        language = importlib.import_module("triton.language")
        # What of its interface every kernel file needs as it is imported.
        if not callable(module.jit) or language.constexpr is None:
            raise ImportError("it lacks triton.jit")
        return Installed(str(version), module, language, "")
    except Exception as error:
        named = f"Triton {version}" if (version := _version_or_none()) else "Triton"
        return Installed(version or "?", None, None, f"{named} does not import: {one_line(error)}")


def warn(installed: Installed) -> None:
    """One line on standard error about a Triton that is installed and not used, once a process."""
    if installed.version and installed.refusal:
        warn_once(f"{installed.refusal}: plain torch takes the kernels' place ({ADVICE})")


@cache
def warn_once(message: str) -> None:
    """A warning of one line: a place in the source would add a second, and says nothing here."""
    warnings.warn_explicit(message, RuntimeWarning, "mimo_fast", 0, registry={})


def one_line(error: BaseException) -> str:
    """Class and message of an error, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _unsuitable(version: str) -> str:
    if os.environ.get(ENVIRONMENT, "") == "any":
        return ""
    minor = _minor(version)
    if minor == (0, 0):
        return f"Triton of version {version!r:.40} is unknown"
    if minor < OLDEST:
        return f"Triton {version:.40} is older than {_dotted(OLDEST)}"
    if minor > NEWEST:
        return f"Triton {version:.40} is newer than {_dotted(NEWEST)}, the newest that was tested"
    return ""


def _stated_version() -> str | None:
    """What the installed Triton's source states, "?" where it states nothing; None without one.

    Not by the distribution's metadata: builds of torch's own index have other names.
    """
    if "triton" in sys.modules:
        module = sys.modules["triton"]
        return None if module is None else str(getattr(module, "__version__", "?"))
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return None
    # Without one it is a folder that an uninstallation left behind.
    if not spec.origin or not Path(spec.origin).is_file():
        return "?"
    source = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^__version__\s*(?::\s*str\s*)?=\s*['\"]([^'\"]+)['\"]", source, re.M)
    return found[1] if found else "?"


def _version_or_none() -> str | None:
    try:
        return _stated_version()
    except Exception:
        return None


def _minor(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
