"""Find and make a user's own module, named by its import path, and say what is expected of it."""

import inspect
import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from torch import nn

CONTRACT = (
    "a module of yours is made as Class(num_features=F, num_classes=C, **model.kwargs) and called as forward(blocks, "
    "x), with one block per fanout, those of the input side first, and x [M, F], a row per source of blocks[0]; it "
    "returns scores [B, C], a row per destination of blocks[-1] (docs/models.md)"
)


def make_module(kind: type[nn.Module], options: Mapping[str, Any]) -> nn.Module:
    """Make a user's module; ValueError with the contract where its constructor does not take `options`."""
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} cannot be made with {', '.join(options)}: {error}; {CONTRACT}") from error
    return kind(**options)


def _import_parent(name: str) -> Any:
    """Import module `name`, or say which part of it is not there and what is there of a similar name."""
    done: Any = None
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        try:
            done = import_module(".".join(parts[:n]))
        except ModuleNotFoundError as error:
            if error.name != ".".join(parts[:n]):
                raise  # a dependency of the user's module is missing: their traceback says it best
            places = None if done is None else getattr(done, "__path__", [])
            near = get_close_matches(parts[n - 1], [module.name for module in pkgutil.iter_modules(places)], 1)
            hint = f"did you mean {'.'.join([*parts[: n - 1], *near])}? " if near else ""
            raise ValueError(
                f"there is no module {error.name!r}; {hint}It has to be installed, "
                "on PYTHONPATH, or in the folder in which penstock is run"
            ) from error
    return done


def load_class(path: str) -> type[nn.Module]:
    """Import `pkg.mod:Class`; ValueError with the nearest match where it is not there or no nn.Module."""
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"module={path!r} is no import path; write pkg.mod:Class")
    module = _import_parent(module_name)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        classes = [
            key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)
        ]
        near = get_close_matches(name, classes, 1) or classes[:8]
        what = "is no subclass of torch.nn.Module" if found is not None else "does not exist"
        raise ValueError(f"{name!r} in {module_name} {what}; it has {', '.join(near) or 'no nn.Module at all'}")
    return found
