"""Runs at the start of each Python process of ``hf-divguard run``: waits for ``transformers.trainer``.

When that module has been imported, ``hf_divguard.cli.guard_script`` puts a guarded class in the place of
its ``Trainer``. Until then nothing is imported that Python has not imported itself.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HOST = "transformers.trainer"
_SETTINGS, _NOTES = "HF_DIVGUARD_RUN", "HF_DIVGUARD_RUN_NOTES"
_OWN_FOLDER = os.path.dirname(os.path.abspath(__file__))


class _Loader:
    """Loads the module as its own loader does, then guards it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            from hf_divguard.cli.guard_script import guard_module
        except ImportError as error:
            if "hf_divguard.hf.trainer" not in sys.modules:
                print(f"hf-divguard run: nothing is guarded, for {sys.executable} cannot import hf_divguard: "
                      f"{error}", file=sys.stderr)  # fmt: skip
            else:
                _note("own")  # the script is just importing our trainer, and uses it itself
            return
        guard_module(module)


class _Finder:
    """Finds the one module where Python's own finder does."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec: Any = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _note(what: str) -> None:
    """Leave a note for the process that will say whether anything was guarded."""
    folder = os.environ.get(_NOTES, "")
    try:  # noqa: SIM105  contextlib would be one import more in each process
        os.close(os.open(os.path.join(folder, f"{what}-{os.getpid()}"), os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        pass


def _run_next() -> None:
    """Run the ``sitecustomize`` that Python would have found without ours."""
    sys.path[:] = [each for each in sys.path if os.path.abspath(each or os.curdir) != _OWN_FOLDER]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


if os.environ.get(_SETTINGS):
    _note("python")
    sys.meta_path.insert(0, _Finder())
_run_next()
