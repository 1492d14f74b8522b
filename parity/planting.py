"""Bugs on purpose: one text replacement in the source of one function, for as long as a `with` block lasts.

The function's code is exchanged inside of the function object itself, so that every module that has imported it by name
runs the mutant, and a wrapper around it (`jax.jit`, flax, a shape checker) calls it as before.
"""

import __future__

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from types import FunctionType

import jax


@dataclass(frozen=True)
class Mutant:
    """A plausible bug, as one edit of one function."""

    bug: str  # what somebody might have written or forgotten
    target: str  # "module:function" or "module:Class.method"
    old: str  # a piece of its source, line breaks and indentation as in the file; occurs once
    new: str

    @property
    def package(self) -> str:
        return self.target.partition(".")[0].partition(":")[0]


@contextmanager
def planted(target: str, old: str, new: str) -> Iterator[None]:
    """Within the block, the function `target` is the one whose source has `new` in place of `old`.

    What JAX has traced and compiled is forgotten on entry and on exit, unless the bug is the twin's; what was called
    before the block and is kept elsewhere (an `lru_cache` of results) is not.
    """
    function, mutant = edited(target, old, new)
    forget = (lambda: None) if target.startswith("ppo_torch_ref") else jax.clear_caches
    parts = ("__code__", "__defaults__", "__kwdefaults__")
    original = {part: getattr(function, part) for part in parts}
    try:
        for part in parts:
            setattr(function, part, getattr(mutant, part))
        forget()
        yield
    finally:
        for part, value in original.items():
            setattr(function, part, value)
        forget()


def edited(target: str, old: str, new: str) -> tuple[FunctionType, FunctionType]:
    """The function that `target` names, and the one of its edited source; ValueError where the text does not fit."""
    function = _resolve(target)
    return function, _edited(function, target, old, new)


def _resolve(target: str) -> FunctionType:
    module, _, path = target.partition(":")
    found = inspect.unwrap(reduce(getattr, path.split("."), import_module(module)))
    function = getattr(found, "__func__", found)
    if not isinstance(function, FunctionType):
        raise TypeError(f"{target} is a {type(function).__name__}; only a Python function has source to edit")
    if function.__closure__ is not None:
        names = ", ".join(function.__code__.co_freevars)
        raise ValueError(f"{target} closes over {names}, which its source alone cannot rebuild; plant at its caller")
    return function


def _edited(function: FunctionType, target: str, old: str, new: str) -> FunctionType:
    """A function of the edited source with the globals of `function`, its decorators left out."""
    if function.__code__.co_filename.startswith("<planted"):
        raise ValueError(f"{target} already is a mutant; one at a time")
    source = inspect.getsource(function)
    if (count := source.count(old)) != 1:
        raise ValueError(f"{old!r} occurs {count} times in the source of {target}; expected once")
    edited = source.replace(old, new)
    # A method is indented: a block around it keeps the text as it is in the file.
    tree = ast.parse(f"if True:\n{edited}" if edited[0].isspace() else edited)
    definition = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    definition.decorator_list = []
    module = ast.Module([definition], type_ignores=[])
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(module, f"<planted in {target}>", "exec", flags=flags, dont_inherit=True)
    made: dict[str, FunctionType] = {}
    exec(code, function.__globals__, made)
    return made[function.__name__]
