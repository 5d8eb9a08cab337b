"""Which names a `compute_metrics` returns, read from its source without calling it."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["returned_names"]

_Function = ast.FunctionDef | ast.Lambda


def returned_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the keys of the dict that a function returns; ``None`` where the source does not show all of them.

    They are known where each ``return`` has a dict with nothing but texts as keys. A function with
    a decorator may return others.

    Args:
        function: A function, a method or a ``functools.partial`` of one.

    Example:
        >>> import json
        >>> returned_names(json.loads) is None
        True
    """
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        return None
    code = function.__code__
    try:
        lines, _ = inspect.findsource(code)
        tree = ast.parse("".join(lines))
    except (OSError, SyntaxError, TypeError, ValueError):
        return None
    found = [each for each in ast.walk(tree) if isinstance(each, _Function) and _is_of(each, code)]
    if len(found) != 1:
        return None
    names: set[str] = set()
    for value in _returned(found[0]):
        keys = _keys(value)
        if keys is None:
            return None
        names |= keys
    return frozenset(names) if names else None


def _is_of(node: _Function, code: Any) -> bool:
    """Return whether ``code`` was made from a definition, and nothing stands between the two."""
    name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
    takes = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
    return (
        node.lineno == code.co_firstlineno
        and name == code.co_name
        and takes == list(code.co_varnames[: code.co_argcount])
        and not getattr(node, "decorator_list", ())
    )


def _returned(node: _Function) -> Iterator[ast.expr | None]:
    """Yield what a function returns, not what functions within it do."""
    if isinstance(node, ast.Lambda):
        yield node.body
        return
    waiting: list[ast.AST] = list(node.body)
    while waiting:
        part = waiting.pop()
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(part, ast.Return):
            yield part.value
        elif isinstance(part, (ast.Yield, ast.YieldFrom)):
            yield None
        waiting += ast.iter_child_nodes(part)


def _keys(value: ast.expr | None) -> set[str] | None:
    if not isinstance(value, ast.Dict):
        return None
    keys = {
        each.value for each in value.keys if isinstance(each, ast.Constant) and isinstance(each.value, str)
    }
    return keys if len(keys) == len(value.keys) else None
