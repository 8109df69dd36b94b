"""docs/errors.md has every error code of quire/, and none that is gone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(REPOSITORY.glob("quire/**/*.py"))}

Function = ast.FunctionDef | ast.AsyncFunctionDef
# What takes a code: an error type, or a function that hands a parameter of its own on as one.
# Name (of a private one with its file) -> (place among the arguments, name of the parameter).
Takers = dict[str, tuple[int, str]]


def key(path: Path, name: str) -> str:
    return f"{path}:{name}" if name.startswith("_") else name


def calls(path: Path, takers: Takers) -> Iterator[tuple[ast.Call, ast.expr, list[Function]]]:
    """Calls that give a code in a file: the call, the code, the functions around it."""

    def visit(node: ast.AST, around: list[Function]) -> Iterator[tuple[ast.Call, ast.expr, list]]:
        if isinstance(node, Function):
            around = [*around, node]
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else None
            name = node.func.id if isinstance(node.func, ast.Name) else name
            place, parameter = takers.get(key(path, name or ""), (-1, ""))
            found = [k.value for k in node.keywords if parameter and k.arg == parameter]
            if 0 <= place < len(node.args):
                found.append(node.args[place])
            yield from ((node, code, around) for code in found)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, around)

    return visit(TREES[path], [])


def parameters(function: Function) -> list[str]:
    names = [a.arg for a in function.args.args]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def error_types(tree: ast.AST, known: Takers) -> Takers:
    """Classes of a file that derive from known ones, whose __init__ they have or inherit."""
    found: Takers = {}
    for node in ast.walk(tree):
        bases = [ast.unparse(b) for b in node.bases] if isinstance(node, ast.ClassDef) else []
        if isinstance(node, ast.ClassDef) and any(base in known for base in bases):
            found[node.name] = next(known[base] for base in bases if base in known)
            for part in node.body:
                if isinstance(part, Function) and part.name == "__init__":
                    found[node.name] = (parameters(part).index("code"), "code")
    return found


@cache
def find_takers() -> Takers:
    takers: Takers = {"QuireError": (0, "code")}
    while True:
        found: Takers = {}
        for path, tree in TREES.items():
            found |= error_types(tree, takers)
            for _, code, around in calls(path, takers):
                for function in around:
                    if isinstance(code, ast.Name) and code.id in parameters(function):
                        place = parameters(function).index(code.id)
                        found[key(path, function.name)] = (place, code.id)
        if found.keys() <= takers.keys():
            return takers
        takers |= found


def told_without_an_exception(path: Path) -> Iterator[str]:
    """Codes in dictionaries that are told as they are: {"code": "interrupted", ...}."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Dict):
            for name, value in zip(node.keys, node.values, strict=True):
                told = isinstance(name, ast.Constant) and name.value == "code"
                if told and isinstance(value, ast.Constant):
                    yield value.value


@cache
def codes_in_source() -> dict[str, str]:
    """Every code -> a place that gives it. A code must be a literal, so that it can be found."""
    takers, found = find_takers(), dict[str, str]()
    for path in TREES:
        for call, code, around in calls(path, takers):
            handed_on = isinstance(code, ast.Attribute) and code.attr == "code"
            if handed_on or ast.unparse(code) in [p for f in around for p in parameters(f)]:
                continue
            where = f"{path.relative_to(REPOSITORY)}:{call.lineno}"
            for each in (code.body, code.orelse) if isinstance(code, ast.IfExp) else (code,):
                assert isinstance(each, ast.Constant), f"{where}: {ast.unparse(each)} is no literal"
                found.setdefault(each.value, where)
        for code in told_without_an_exception(path):
            found.setdefault(code, str(path.relative_to(REPOSITORY)))
    return found


def documented() -> list[str]:
    text = (REPOSITORY / "docs/errors.md").read_text()
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_a_code_is_found_in_types_functions_and_branches() -> None:
    takers = find_takers()
    assert takers["PlanError"] == (0, "code")
    assert takers["HttpError"] == (1, "code")  # after the status
    assert takers["not_ready"] == (0, "code")
    protocol = REPOSITORY / "quire/server/protocol.py"
    assert takers[key(protocol, "_refuse")] == (1, "reason")
    found = codes_in_source()
    for code in ("draining", "head_size", "port_in_use", "cannot_bind", "invalid_value"):
        assert code in found


def test_every_code_is_documented_once() -> None:
    found, known = codes_in_source(), documented()
    missing = {code: where for code, where in found.items() if code not in known}
    assert not missing, "give these a line in docs/errors.md"
    assert len(known) == len(set(known))


def test_no_documented_code_is_gone() -> None:
    assert not set(documented()) - set(codes_in_source())


def test_codes_are_snake_case_words() -> None:
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes_in_source())
