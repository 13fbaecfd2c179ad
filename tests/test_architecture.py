"""No circles; packages import one way. Imports of types alone and in functions count too."""

import ast
import graphlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import mimo_fast

PACKAGE = Path(__file__).parents[1] / "mimo_fast"

ROOMS = (
    *(
        "_native",
        "errors",
        "arguments",
        "modes",
        "process",
        "json_files",
        "config_reader",
        "architectures",
        "config",
    ),
    *("audio", "marking", "text", "checkpoint", "kernels", "sampling", "quantization"),
    *("runtime.device", "runtime.lm", "runtime.codec", "runtime.engine", "runtime"),
    *(
        "generation",
        "upstream",
        "acceleration",
        "history",
        "mimo_audio",
        "conversion",
        "batches",
        "",
    ),
    *("testing", "bench", "evaluation", "quality", "server", "talk", "cli", "__main__"),
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


def circle(graph: Graph) -> list[str]:
    """Modules of which each imports the next and the last is the first again; empty if none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


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
    assert not circle(graph), f"a circle of imports: {' -> '.join(circle(graph))}"


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
    way = circle(graph_of(sources))
    turn = way.index("p.a")
    assert way[turn:-1] + way[:turn] == ["p.a", "p.b", "p.c"]
    assert way[0] == way[-1]
    assert circle(graph_of(sources | {"p.c": "import torch"})) == []
