"""The options of saving: how a checkpoint becomes complete."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hf_divguard.hf.options.values import check_signals, require_bool, require_choice

__all__ = ["SaveMode", "SavingOptions", "asks_for_safe_saves"]

SaveMode = Literal["auto", "staged", "in_place", "off"]


@dataclass(repr=False, eq=False)
class SavingOptions:
    """How checkpoints are written and checked."""

    divguard_save_mode: SaveMode = field(
        default="auto",
        metadata={
            "help": "How a checkpoint becomes complete. staged: written in a folder of another name and renamed when "
            "complete; in_place: written under its name, complete when its manifest is there; off: as the stock Trainer "
            "writes it; auto: staged where the file system renames folders, else in_place, and off as long as no "
            "other option or callback of hf_divguard is in use."
        },
    )
    divguard_checksums: bool = field(
        default=False,
        metadata={
            "help": "Put a checksum (XXH3) of every file into the manifest, and compare it on resume. Finds flipped "
            "bits; costs one more read of each checkpoint."
        },
    )
    divguard_fsync: bool = field(
        default=False,
        metadata={
            "help": "Flush every file of a checkpoint to the disk (fsync) before it counts as complete. Protects "
            "against power loss, not needed against killed processes; makes saving slower."
        },
    )
    divguard_on_save_error: Literal["raise", "continue"] = field(
        default="raise",
        metadata={
            "help": "What follows when a checkpoint cannot be written (disk full, input/output error). raise: training "
            "ends with the error, the older checkpoints stay; continue: a warning, and training goes on without it."
        },
    )

    divguard_save_on_signal: str = field(
        default="none",
        metadata={
            "help": "Signals, with commas between them (SIGTERM,SIGUSR1), after which the present step is saved and the "
            "process ends with exit code 75, on all ranks, so that a scheduler starts it again; none for no signal."
        },
    )

    def _check_values(self) -> None:
        check_signals(self, "divguard_save_on_signal")
        require_choice("divguard_save_mode", self.divguard_save_mode, SaveMode)
        for name in ("divguard_checksums", "divguard_fsync"):
            require_bool(name, getattr(self, name))
        require_choice("divguard_on_save_error", self.divguard_on_save_error, Literal["raise", "continue"])


def asks_for_safe_saves(options: Any) -> bool:
    """Return whether an option needs checkpoints that are saved by us, and not as the stock Trainer does."""
    return bool(
        options.preserve_best_model
        or options.eval_on_save
        or options.divguard_checksums
        or options.divguard_fsync
        or options.divguard_on_save_error != "raise"
        or options.divguard_save_on_signal != "none"
        or options.divguard_save_mode not in ("auto", "off")
    )
