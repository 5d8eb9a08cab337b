"""What is measured: the series of the table, the counts of a row, the aim of a kill."""

from __future__ import annotations

import dataclasses

STEPS = 60
SAVE_STEPS = 3
LIMIT = 2
BEST = 2


@dataclasses.dataclass(frozen=True)
class Series:
    """One row of the table."""

    trainer: str  # "stock", "staged" or "in_place"; staged is the default
    ranks: int = 1
    size: str = "small"

    @property
    def is_ours(self) -> bool:
        return self.trainer != "stock"

    @property
    def reference(self) -> str:
        return f"{self.ranks}-{self.size}"

    @property
    def label(self) -> str:
        name = {"stock": "stock", "staged": "ours, staged (default)", "in_place": "ours, in place"}[
            self.trainer
        ]
        return f"{name}, {self.ranks} process{'es' if self.ranks > 1 else ''}"


@dataclasses.dataclass
class Counts:
    """What a series has seen so far."""

    kills: int = 0
    inside_save: int = 0
    inside_publish: int = 0
    inside_delete: int = 0
    broken_newest: int = 0
    resume_failed: int = 0
    wrong_place: int = 0
    best_lost: int = 0
    partial_under_name: int = 0
    runs: int = 0
    equal: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Counts) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Aim:
    """When a life ends: some time after an event, or before a certain file operation of a phase."""

    kind: str  # "anywhere", "write", "publish", "delete"
    delay: float = 0.0
    skip: int = 0
    operation: int = 0
