"""Digests of a user's own code, so that weights can say when it is not the one that they were made with.

What counts is the module that defines the class, and what that imports of the same hand: modules of the same package,
and others that are no part of Python, of Penstock or of what was installed. Comments and layout do not count.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import xxhash
from torch import nn

Sources = dict[str, str]  # digest by name of the module

_INSTALLED = tuple(
    Path(path).resolve() for name, path in sysconfig.get_paths().items() if name.endswith(("lib", "stdlib"))
)
_digests: dict[str, tuple[object, str]] = {}  # of a module as it was imported: its file may be another by now


def sources_of(kind: type[nn.Module]) -> Sources:
    """Digests of the code that a class is made of. Modules without a file, as of a notebook, are left out."""
    first, found = sys.modules[kind.__module__], Sources()
    todo = [sys.modules[base.__module__] for base in kind.__mro__ if base.__module__ in sys.modules]
    while todo:
        module = todo.pop()
        path = _own_file(module, first.__name__.partition(".")[0])
        if path is None or module.__name__ in found:
            continue
        found[module.__name__] = _digest(module, path)
        todo += _imported(module)
    return dict(sorted(found.items()))


def _own_file(module: ModuleType, package: str) -> Path | None:
    """The file of a module that the user wrote, where `package` is the one of the class."""
    top, file = module.__name__.partition(".")[0], getattr(module, "__file__", None)
    if file is None or not file.endswith(".py") or top == "penstock" or top in sys.stdlib_module_names:
        return None
    path = Path(file).resolve()
    is_installed = any(path.is_relative_to(folder) for folder in _INSTALLED)
    return path if (top == package or not is_installed) and path.is_file() else None


def _imported(module: ModuleType) -> Iterator[ModuleType]:
    """Modules that a module names, or from which it has a class or function."""
    for value in list(vars(module).values()):
        found = value if isinstance(value, ModuleType) else sys.modules.get(str(getattr(value, "__module__", "")))
        if isinstance(found, ModuleType):
            yield found


def _digest(module: ModuleType, path: Path) -> str:
    known = _digests.get(module.__name__)
    if known is None or known[0] is not module.__spec__:  # a module that is imported again has another one
        data = path.read_bytes()
        try:
            data = ast.dump(ast.parse(data)).encode()
        except (SyntaxError, ValueError):
            pass  # edited since it was imported: it is another for sure
        known = _digests[module.__name__] = (module.__spec__, xxhash.xxh3_64_hexdigest(data))
    return known[1]


def differing(there: Sources, now: Sources) -> list[str]:
    """Names of modules whose code is another, or that are in one only."""
    return sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
