"""The options of rollbacks."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_divguard.hf.options.values import require_bool, require_whole

__all__ = ["RollbackOptions"]


@dataclass(repr=False, eq=False)
class RollbackOptions:
    """How often and how far a rollback goes, and what follows it."""

    divguard_max_rollbacks: int = field(
        default=3,
        metadata={
            "help": "Rollbacks allowed for one incident, at least 1; then training ends with an error. An incident is "
            "over when nothing was found for ten times divguard_cooldown_steps."
        },
    )
    divguard_cooldown_steps: int = field(
        default=20,
        metadata={
            "help": "Optimizer steps after a rollback in which findings are ignored, so that the fault can pass. Doubled "
            "with each further rollback of an incident."
        },
    )
    divguard_rollback_margin_steps: int = field(
        default=0,
        metadata={"help": "How many steps further before the onset of the fault a rollback has to go."},
    )
    divguard_rollback_lr_factor: float = field(
        default=1.0,
        metadata={
            "help": "What each rollback multiplies the learning rate with, above 0 and at most 1. The last rollback "
            "that is allowed uses 0.5 or less."
        },
    )
    divguard_rewarm_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps over which the learning rate rises again after a rollback; 0 for none."
        },
    )
    divguard_restore_rng: bool = field(
        default=False,
        metadata={
            "help": "Also put the random number generators back at a rollback. Off, so that dropout and augmentation "
            "do not repeat what went wrong."
        },
    )
    divguard_snapshot_steps: int = field(
        default=0,
        metadata={
            "help": "Keep trainable parameters and optimizer in CPU memory every so many steps (the last three, or "
            "four that are spread out if they are close together, and those of the start), so that a rollback needs "
            "no checkpoint. 0 keeps none."
        },
    )

    def _check_values(self) -> None:
        require_whole("divguard_max_rollbacks", self.divguard_max_rollbacks, "rollbacks", at_least=1)
        for name in ("cooldown_steps", "rollback_margin_steps", "rewarm_steps", "snapshot_steps"):
            require_whole(
                f"divguard_{name}", getattr(self, f"divguard_{name}"), "optimizer steps", at_least=0
            )
        factor = self.divguard_rollback_lr_factor
        if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0.0 < factor <= 1.0:
            raise ValueError(f"`divguard_rollback_lr_factor` must be above 0 and at most 1, got {factor!r}.")
        require_bool("divguard_restore_rng", self.divguard_restore_rng)
