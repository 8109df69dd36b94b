"""Rooms import downwards only, nothing unpickles or evaluates, one file reads the environment."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "quire"
# From the lowest to the highest: a room may import from its own line's earlier rooms and from all
# lines above it in this list, never the other way.
ORDER = [
    ["errors", "garbage", "settings", "params", "outputs", "step", "comm", "formats"],
    ["config", "hardware", "weights", "tokenization"],
    ["kernels"],
    ["quant", "kv"],
    ["layers", "tiers"],
    ["models"],
    ["plan"],
    ["speculative", "grammar"],
    ["runner"],
    ["engine"],
    ["dialects"],
    ["llm"],
    ["parallel"],
    ["server"],
    ["cli"],
]
RANK = {room: (i, j) for i, line in enumerate(ORDER) for j, room in enumerate(line)}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of what a file imports from quire, wherever in the file, with line numbers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno


def at_load(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is loaded: not functions, nor what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_load(child)


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {room(path) for path in FILES} - {"__init__", "__main__", "py"}
    assert not rooms - set(RANK), "give new rooms a place in ORDER"


def test_rooms_import_downwards_only() -> None:
    upwards = []
    for path in FILES:
        here = room(path)
        for name, line in imports(path) if here in RANK else ():
            there = name.split(".")[1] if name.startswith("quire.") else ""
            if there != here and there in RANK and RANK[there] > RANK[here]:
                upwards.append(f"{path}:{line}: {here} imports {name}")
    assert not upwards


def graph() -> dict[str, set[str]]:
    """Which module imports which at run time, when it is loaded."""
    modules = {
        ".".join(["quire", *p.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): p
        for p in FILES
    }
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = set()
        for node in at_load(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in modules else node.module)
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        edges[name] = (found & set(modules)) - {name}
    return edges


def test_there_are_no_import_cycles() -> None:
    edges, done, stack = graph(), set[str](), list[str]()

    def visit(name: str) -> None:
        assert name not in stack, "cycle: " + " -> ".join([*stack[stack.index(name) :], name])
        if name in done:
            return
        stack.append(name)
        for target in sorted(edges[name]):
            visit(target)
        stack.pop()
        done.add(name)

    for name in edges:
        visit(name)


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_NAMES = {"eval", "exec", "compile", "torch.load", "torch.save", "yaml.load"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv"}


def names(path: Path) -> Iterator[tuple[str, int]]:
    """Everything that a file imports or names with dots or alone, with line numbers."""
    yield from imports(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node), node.lineno


def test_nothing_unpickles_or_evaluates() -> None:
    unsafe = [
        f"{path}:{line}: {name}"
        for path in FILES
        for name, line in names(path)
        if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_NAMES
    ]
    assert not unsafe


def test_only_settings_reads_the_environment() -> None:
    readers = [
        f"{path}:{line}: {name}"
        for path in FILES
        for name, line in names(path)
        if name in ENVIRONMENT and path != ROOT / "settings.py"
    ]
    assert not readers


@pytest.mark.parametrize("statement", ["import quire", "from quire import SamplingParams"])
def test_importing_quire_does_not_import_torch(statement: str) -> None:
    code = f"{statement}; import sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    assert done.stdout.strip() == "[]"


def test_an_engine_on_a_cpu_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import quire.engine.startup"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
