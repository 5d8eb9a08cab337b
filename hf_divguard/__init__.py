"""Keeps Hugging Face ``Trainer`` runs alive.

The names below load on first use: importing this package alone imports neither torch
nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_divguard._version import __version__

if TYPE_CHECKING:
    from hf_divguard.core.findings import Finding
    from hf_divguard.errors import (
        CheckpointError,
        CheckpointSaveError,
        DivGuardError,
        FolderInUseError,
        HistoryError,
        MetricNotFoundError,
        NoCompleteCheckpointError,
        TrainingDivergedError,
        exit_on_divergence,
    )
    from hf_divguard.hf.adaptive_detectors import AdaptiveDivergenceDetector, NonFiniteDetector
    from hf_divguard.hf.arguments import DivGuardArgumentsMixin, DivGuardTrainingArguments
    from hf_divguard.hf.detectors import DivergenceDetector
    from hf_divguard.hf.dual_detectors import DualTimeScaleDivergenceDetector, DualWindowDivergenceDetector
    from hf_divguard.hf.guard import guard
    from hf_divguard.hf.trainer import DivGuardMixin, DivGuardTrainer
    from hf_divguard.replays import replay
    from hf_divguard.storage.checkpoints import (
        Checkpoint,
        Verdict,
        best_checkpoints,
        find_checkpoints,
        latest_complete_checkpoint,
        verify_checkpoint,
    )

_HOME = {
    "exit_on_divergence": "errors",
    "replay": "replays",
    "NonFiniteDetector": "hf.adaptive_detectors",
    "AdaptiveDivergenceDetector": "hf.adaptive_detectors",
    "Checkpoint": "storage.checkpoints",
    "CheckpointError": "errors",
    "CheckpointSaveError": "errors",
    "DivGuardArgumentsMixin": "hf.arguments",
    "DivGuardError": "errors",
    "DivGuardMixin": "hf.trainer",
    "DivGuardTrainer": "hf.trainer",
    "DivGuardTrainingArguments": "hf.arguments",
    "DivergenceDetector": "hf.detectors",
    "DualTimeScaleDivergenceDetector": "hf.dual_detectors",
    "DualWindowDivergenceDetector": "hf.dual_detectors",
    "Finding": "core.findings",
    "FolderInUseError": "errors",
    "HistoryError": "errors",
    "MetricNotFoundError": "errors",
    "NoCompleteCheckpointError": "errors",
    "TrainingDivergedError": "errors",
    "Verdict": "storage.checkpoints",
    "best_checkpoints": "storage.checkpoints",
    "find_checkpoints": "storage.checkpoints",
    "guard": "hf.guard",
    "latest_complete_checkpoint": "storage.checkpoints",
    "verify_checkpoint": "storage.checkpoints",
}

__all__ = [
    "AdaptiveDivergenceDetector",
    "Checkpoint",
    "CheckpointError",
    "CheckpointSaveError",
    "DivGuardArgumentsMixin",
    "DivGuardError",
    "DivGuardMixin",
    "DivGuardTrainer",
    "DivGuardTrainingArguments",
    "DivergenceDetector",
    "DualTimeScaleDivergenceDetector",
    "DualWindowDivergenceDetector",
    "Finding",
    "FolderInUseError",
    "HistoryError",
    "MetricNotFoundError",
    "NoCompleteCheckpointError",
    "NonFiniteDetector",
    "TrainingDivergedError",
    "Verdict",
    "__version__",
    "best_checkpoints",
    "exit_on_divergence",
    "find_checkpoints",
    "guard",
    "latest_complete_checkpoint",
    "replay",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
