"""Guards a script that does not use hf_divguard: a guarded class takes the place of ``Trainer``."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_divguard.hf.arguments import DivGuardArgumentsMixin
from hf_divguard.hf.trainer import DivGuardMixin

__all__ = ["SETTINGS_VARIABLE", "guard_arguments", "guard_module", "guarded_trainer"]

SETTINGS_VARIABLE = "HF_DIVGUARD_RUN"
"""Environment variable with the options, as JSON."""

_NOTES_VARIABLE = "HF_DIVGUARD_RUN_NOTES"

_CONVERTS = "_divguard_converts"


def guard_module(module: ModuleType) -> None:
    """Put a guarded class in the place of ``module.Trainer``, for the script and the libraries it uses.

    Args:
        module: ``transformers.trainer``, just imported.
    """
    settings = json.loads(os.environ[SETTINGS_VARIABLE])
    notes = Path(os.environ[_NOTES_VARIABLE])
    _note(notes, "trainer")
    original = module.Trainer
    guarded = guarded_trainer(original, settings["options"], lambda: _note(notes, "made"))
    module.Trainer = guarded  # type: ignore[attr-defined]
    package = sys.modules.get("transformers")
    if package is not None and vars(package).get("Trainer") is original:
        package.Trainer = guarded  # type: ignore[attr-defined]


def _note(folder: Path, what: str) -> None:
    # On another machine there is no such folder; the run itself does not depend on it.
    with contextlib.suppress(OSError):
        (folder / f"{what}-{os.getpid()}").touch()


def guarded_trainer(original: Any, options: dict[str, Any], on_made: Any = None) -> Any:
    """Return ``original`` with the guards, under its own name.

    Args:
        original: The class ``Trainer``.
        options: Options of hf_divguard by name.
        on_made: Called when a trainer was made.
    """

    class TakesOptions(original):  # type: ignore[misc]
        """Gives the arguments of the script the options, as soon as the host has them."""

        args: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.args = guard_arguments(self.args, options)

    class Guarded(DivGuardMixin, TakesOptions):
        @functools.wraps(original.__init__)  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if on_made is not None:
                on_made()

    for each in (TakesOptions, Guarded):
        each.__name__, each.__qualname__, each.__module__ = "Trainer", "Trainer", original.__module__
    Guarded.__doc__ = original.__doc__
    return Guarded


def guard_arguments(args: Any, options: dict[str, Any]) -> Any:
    """Return ``args``, the same object, with the options as fields.

    Raises:
        ValueError: If an option is out of range or contradicts the arguments of the script.
    """
    if isinstance(args, DivGuardArgumentsMixin):
        return args
    stock: Any = type(args)
    args.__class__ = _with_options(stock)
    for name, value in options.items():
        setattr(args, name, copy.deepcopy(value))
    setattr(args, _CONVERTS, True)
    try:
        args.__post_init__()
    finally:
        delattr(args, _CONVERTS)
    return args


@functools.cache
def _with_options(stock: Any) -> Any:
    """Return the class of arguments ``stock`` with the options as further fields."""

    class KeepsHost(stock):  # type: ignore[misc]
        def __post_init__(self) -> None:
            # The host has set up these arguments before they got the options.
            if not hasattr(self, _CONVERTS):
                super().__post_init__()

    class Picklable(type(stock)):  # type: ignore[misc]
        """The class itself is stored as the one of the script, as its objects are."""

    copyreg.pickle(Picklable, lambda _: (copy.copy, (stock,)))

    @dataclass(repr=False, eq=False)
    class WithOptions(DivGuardArgumentsMixin, KeepsHost, metaclass=Picklable):
        def __reduce_ex__(self, protocol: Any) -> Any:
            # `training_args.bin` can be loaded where hf_divguard is not installed.
            return copyreg._reconstructor, (stock, object, None), self.__dict__  # type: ignore[attr-defined]

        def __copy__(self) -> Any:
            twin = type(self).__new__(type(self))
            twin.__dict__.update(self.__dict__)
            return twin

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            twin = memo[id(self)] = type(self).__new__(type(self))
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return twin

    for each in (KeepsHost, WithOptions):
        each.__name__, each.__qualname__, each.__module__ = (
            stock.__name__,
            stock.__qualname__,
            stock.__module__,
        )
    return WithOptions
