"""CEL's compiler, without the rest of its package: `cel/__init__.py` imports a command line with a terminal library. That was nearly half
of what a node's imports cost (0.42 s of a processor with it, 0.23 s without), and a node that starts takes it from the others of its
machine."""
from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder
from typing import Any, Protocol, cast


class Program(Protocol):
    """A compiled expression."""

    def execute(self, variables: dict[str, Any]) -> Any:
        """Its value. Raises what the extension raises, panics included, which are BaseExceptions."""


class _Extension(Protocol):
    def compile(self, text: str) -> Program:
        """A program. Raises ValueError, or a panic of the parser."""


def _extension() -> _Extension:
    name = "cel.cel"
    if name not in sys.modules:  # an extension's module is made once in a process
        package = importlib.util.find_spec("cel")
        found = PathFinder.find_spec(name, package.submodule_search_locations) if package else None
        if found is None or found.loader is None:
            raise ModuleNotFoundError("no module named 'cel': pip install 'spillway[broker]'", name="cel")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        sys.modules[name] = module
    return cast(_Extension, sys.modules[name])


compile_expression = _extension().compile
