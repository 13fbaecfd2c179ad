"""The rooms of the package: no circle of imports, and packages import one way.

What counts is every import statement, of types alone (`TYPE_CHECKING`) and inside functions
included: it is what a reader has to know of a module.
"""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import mimo_fast

PACKAGE = Path(__file__).parents[1] / "mimo_fast"

ROOMS = (
    "_native",
    "errors",
    "config",
    "audio",
    "text",
    "checkpoint",
    "kernels",
    "sampling",
    "quantization",
    "runtime.device",
    "runtime.lm",
    "runtime.codec",
    "runtime.engine",
    "runtime",
    "generation",
    "acceleration",
    "history",
    "mimo_audio",
    "",
    "testing",
    "bench",
    "cli",
    "__main__",
)
"""From the ground up: a room imports itself and those before it. "" is `mimo_fast/__init__.py`."""

Graph = Mapping[str, frozenset[str]]


def imports(name: str, source: str, modules: frozenset[str]) -> set[str]:
    """Modules of the package that a module's source names in its import statements."""
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import in line {node.lineno}"
            base = node.module or ""
            # `from package import module` is an import of the module.
            named = {f"{base}.{alias.name}" for alias in node.names}
            found |= {each if each in modules else base for each in named}
    return {each for each in found if each in modules} - {name}


def graph_of(sources: Mapping[str, str]) -> Graph:
    """Module -> what it imports of the others."""
    modules = frozenset(sources)
    return {name: frozenset(imports(name, text, modules)) for name, text in sources.items()}


def circles(graph: Graph) -> dict[frozenset[str], list[str]]:
    """Every group of modules that import one another, with a way round: a -> b -> a."""
    reached = {start: _reachable(graph, start) for start in graph}
    found = dict[frozenset[str], list[str]]()
    for start in sorted(graph):
        group = frozenset(each for each in reached[start] if start in reached[each])
        if group and group not in found:
            found[group] = _way_round(graph, start)
    return found


def _reachable(graph: Graph, start: str) -> set[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        for each in graph[waiting.pop()] - seen:
            seen.add(each)
            waiting.append(each)
    return seen


def _way_round(graph: Graph, start: str) -> list[str]:
    """The shortest way from a module back to itself."""
    ways = [[start]]
    while ways:
        way = ways.pop(0)
        for each in sorted(graph[way[-1]]):
            if each == start:
                return [*way, start]
            if each not in way:
                ways.append([*way, each])
    raise AssertionError(f"{start} is on no circle")


def room_of(module: str) -> str:
    """The room of a module, the closest where rooms lie in one another."""
    inner = module.removeprefix("mimo_fast").removeprefix(".")
    while inner and inner not in ROOMS:
        inner = inner.rpartition(".")[0]
    return inner


def uphill(graph: Graph) -> Iterable[str]:
    """Imports of a room that comes later."""
    for module, imported in sorted(graph.items()):
        for other in sorted(imported):
            if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module)):
                yield f"{module} -> {other}"


@pytest.fixture(scope="module")
def graph() -> Graph:
    sources = {}
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return graph_of(sources)


def test_no_module_imports_itself_by_way_of_others(graph):
    ways = [" -> ".join(way) for way in circles(graph).values()]
    assert not ways, "circles of imports:\n" + "\n".join(ways)


def test_packages_import_one_way(graph):
    found = list(uphill(graph))
    assert not found, "imports of a later room:\n" + "\n".join(found)


def test_every_module_has_a_room(graph):
    homeless = [name for name in graph if name != "mimo_fast" and not room_of(name)]
    assert not homeless, f"in no room of ROOMS: {', '.join(homeless)}"


def test_public_names_are_where_the_package_says():
    named = {name for names in mimo_fast._HOMES.values() for name in names}
    assert named == set(mimo_fast.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        (node.module.removeprefix("mimo_fast."), alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mimo_fast")
        for alias in node.names
    }
    assert typed == {(home, name) for home, names in mimo_fast._HOMES.items() for name in names}
    for name in mimo_fast.__all__:
        assert getattr(mimo_fast, name) is not None
        assert name in dir(mimo_fast)


def test_a_circle_is_found_and_shown():
    sources = {
        "p.a": "from p.b import x",
        "p.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import c",
        "p.c": "def f():\n    import p.a",
        "p.d": "import p.a",
        "p": "",
    }
    found = graph_of(sources)
    way = ["p.a", "p.b", "p.c", "p.a"]
    assert circles(found) == {frozenset(way): way}
    assert circles(graph_of(sources | {"p.c": "import torch"})) == {}
