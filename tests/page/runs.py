"""Output folders for the page: a long run with every kind of trouble, under a name that would break a careless page."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = """<img src=x onerror=alert(1)>"'&<svg onload=alert(2)>"""
HOSTILE_TEXT = (
    """</script><script>alert(3)</script><img src="http://127.0.0.1:9/x" onerror=alert(4)>\x1b[31m"""
)


def write_run(root: Path, *, steps: int = 3000, name: str = HOSTILE, every: int = 600) -> Path:
    """Write a run that spikes, is NaN for two steps, and jumps for good at four fifths."""
    rng = random.Random(0)
    folder = root / name
    folder.mkdir(parents=True)
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 2.0 + 2.0 * math.exp(-step / 400) + rng.gauss(0.0, 0.05)
        loss += 30.0 if step == steps // 3 else 3.0 if step >= steps * 4 // 5 else 0.0
        loss = math.nan if step in (steps // 2, steps // 2 + 1) else loss
        log.append(
            {
                "loss": loss,
                "grad_norm": abs(rng.gauss(1.0, 0.2)),
                "learning_rate": 1e-3 * (1 - step / steps),
                "step": step,
                HOSTILE_TEXT: 1.0,
            }
        )
        if step % every == 0:
            log.append(
                {"eval_loss": loss + 0.1, f"eval_{HOSTILE_TEXT}": 0.5, "eval_runtime": 1.0, "step": step}
            )
            checkpoint = folder / f"checkpoint-{step}"
            checkpoint.mkdir()
            content = {"global_step": step, "max_steps": steps, "log_history": log[-2:]}
            (checkpoint / "trainer_state.json").write_text(json.dumps(content))
            (checkpoint / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    content = {"global_step": steps, "max_steps": steps, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(content))
    return folder
