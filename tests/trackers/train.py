"""One run that is reported to trackers: a warning, then a stop. Arguments: output folder, names of trackers."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments
from hf_divguard.hf.detectors import DivergenceDetector
from tests.hf.faults import ScriptedRule
from tests.tiny import TokenRows, base_arguments, tiny_model

WARNED, STOPPED = 5, 9


def main(folder: str, trackers: list[str]) -> None:
    """Train."""
    torch.set_num_threads(1)
    options: dict[str, Any] = {"divguard_compare": "off", "divguard_check_steps": 1, "logging_steps": 1}
    alerts = [name for name in trackers if name in ("wandb", "trackio")]
    options |= {"divguard_alerts": ",".join(alerts) or "none"}
    trainer = DivGuardTrainer(
        model=tiny_model(),
        args=DivGuardTrainingArguments(
            **base_arguments(folder, max_steps=16, run_name="night", **options | {"report_to": trackers})
        ),
        train_dataset=TokenRows(),
        callbacks=[
            DivergenceDetector(ScriptedRule({WARNED: WARNED - 1}), action="warn", name="warns"),
            DivergenceDetector(ScriptedRule({STOPPED: STOPPED - 2}), action="stop", name="stops"),
        ],
    )
    trainer.train()
    print("LOG", json.dumps([each for each in trainer.state.log_history if "train_runtime" not in each]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
