"""How many functions and files of the package one training step passes.

    python -m benchmarks.trace                     # a table, and the way of a loss to the decision
    python -m benchmarks.trace --list rollback     # the calls of one scenario: first calls of each function, in order
    python -m benchmarks.trace --package ../before --coordinator hf/run_guard.py

A tiny run is watched with ``sys.setprofile`` from ``on_step_begin`` of one step to
``on_step_begin`` of the next one, or to ``on_train_end`` where the run stops. Only calls of Python
functions whose code is in the package count, in every thread.

- *functions*: distinct code objects that are called, without lambdas and comprehensions.
- *files*: distinct files that these calls are in, those of lambdas included.
- *alternations*: take the calls into the trainer's and the coordinator's file in order, and leave
  out all others. An alternation is a call into one of the two files right after a call into the
  other one. A return does not count.
- *way of a loss*: the files that a NaN loss passes until the state has a ``divguard_finding``. They
  are the files of the open calls, from ``training_step`` on, at four moments: the copy of the loss
  of the micro-batch (the first ``Tensor.detach`` after the host has trained on it); the transfer
  from the device (``Tensor.tolist``); the making of the ``Finding``; the first moment at which the
  state has it. A call that is still open is not listed again. Of the calls from ``core`` to
  ``core`` only the first is listed: what a detector is made of is its own affair. Neighbours in
  one file are one *hop*.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterable
from itertools import groupby, pairwise, takewhile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback

from tests.tiny import TokenRows, base_arguments, tiny_model

TRAINER = "hf/trainer.py"

# The update of the NaN loss is not skipped: it has to reach the weights for the action to be taken.
_NAN = {"divguard_detector": "adaptive", "divguard_skip_nonfinite": False}

SCENARIOS: dict[str, tuple[int, dict[str, Any]]] = {
    "stop": (6, {**_NAN, "divguard_action": "stop"}),
    "rollback": (6, {**_NAN, "divguard_action": "rollback"}),
    # The last step of an epoch, so that the end of an epoch is in it too.
    "save": (8, {"preserve_best_model": True, "eval_on_save": True, "save_total_limit": 1}),
}
"""The step that is traced, and the options. A save is due in each of these steps."""

TITLES = {
    "stop": "NaN, action stop, save",
    "rollback": "NaN, action rollback, save",
    "save": "evaluate, save, prune",
}


class StepTrace(TrainerCallback):
    """Traces the calls inside the package during one step, and makes its loss NaN if asked to.

    Args:
        package: Folder of the package.
        step: The step to trace.
        model: The model that is trained; its losses of the step become NaN. ``None`` for a step without a fault.
    """

    def __init__(self, package: Path, step: int, model: torch.nn.Module | None) -> None:
        self.package, self.step = f"{package}{os.sep}", step
        self.calls: list[CodeType] = []
        self.host_has_trained = False
        self.at_micro_batch: list[CodeType] = []
        self.at_transfer: list[CodeType] = []
        self.at_finding: list[CodeType] = []
        self.at_decision: list[CodeType] = []
        self.state: Any = None
        if model is not None:
            model.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output * float("nan") if self.state is not None else output
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin with the step, and end with the next one."""
        self.end()
        if state.global_step == self.step - 1 and not self.calls:
            self.state = state
            threading.setprofile(self.profile)
            sys.setprofile(self.profile)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End with the training."""
        self.end()

    def end(self) -> None:
        """Trace no more."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        self.state = None

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note a call; what ``sys.setprofile`` takes."""
        if self.state is None:
            return
        code = frame.f_code
        if event == "c_call" and argument.__name__ == "detach" and self.host_has_trained:
            self.at_micro_batch = self.at_micro_batch or self.open_calls(frame)
        if event == "c_call" and argument.__name__ == "tolist" and not self.at_finding:
            self.at_transfer = self.open_calls(frame)
        if event not in ("call", "return"):
            return
        if not code.co_filename.startswith(self.package):
            # The constructor of a dataclass is in no file.
            self.host_has_trained |= event == "return" and code.co_name == "training_step"
            if code.co_name == "__init__" and type(frame.f_locals.get("self")).__name__ == "Finding":
                self.at_finding = self.at_finding or self.open_calls(frame)
            return
        if event == "call":
            self.calls.append(code)
        if not self.at_decision and getattr(self.state, "divguard_finding", None) is not None:
            self.at_decision = self.open_calls(frame)

    def open_calls(self, frame: FrameType | None) -> list[CodeType]:
        """Return the calls inside the package that are open in ``frame``, the outermost first."""
        found = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(self.package):
                found.append(frame.f_code)
            frame = frame.f_back
        return found[::-1]

    def file(self, code: CodeType) -> str:
        """Return the file of a call, relative to the package."""
        return code.co_filename.removeprefix(self.package).replace(os.sep, "/")

    def functions(self) -> list[str]:
        """Return file and name of each function that was called, in the order of the first calls."""
        named = dict.fromkeys(code for code in self.calls if not code.co_name.startswith("<"))
        return [f"{self.file(code)} {getattr(code, 'co_qualname', code.co_name)}" for code in named]

    def files(self) -> list[str]:
        """Return each file that was called into, in the order of the first calls."""
        return list(dict.fromkeys(map(self.file, self.calls)))

    def alternations(self, coordinator: str) -> int:
        """Return how often a call into one of trainer and coordinator follows one into the other."""
        between = [file for file in map(self.file, self.calls) if file in (TRAINER, coordinator)]
        return sum(before != after for before, after in pairwise(between))

    def way_of_loss(self) -> list[str]:
        """Return the files that the loss passes, in order."""
        way: list[str] = []
        names = [call.co_name for call in self.at_micro_batch]
        before_step = self.at_micro_batch[: names.index("training_step")]
        moments = (before_step, self.at_micro_batch, self.at_transfer, self.at_finding, self.at_decision)
        for before, after in pairwise(moments):
            still_open = takewhile(lambda pair: pair[0] is pair[1], zip(before, after, strict=False))
            way += map(self.file, after[len(list(still_open)) :])
        hops = [file for file, _ in groupby(way)]
        return [
            file
            for before, file in pairwise(["", *hops])
            if not (before.startswith("core/") and file.startswith("core/"))
        ]


def trace(scenario: str) -> StepTrace:
    """Train a tiny model and return the trace of the step of ``scenario``."""
    import hf_divguard

    step, options = SCENARIOS[scenario]
    model = tiny_model()
    package = Path(inspect.getfile(hf_divguard)).parent
    traced = StepTrace(package, step, None if scenario == "save" else model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = hf_divguard.DivGuardTrainer(
            model=model,
            args=hf_divguard.DivGuardTrainingArguments(**base_arguments(folder, max_steps=12, **options)),
            train_dataset=TokenRows(),
            eval_dataset=TokenRows(rows=8, seed=1),
            callbacks=[traced],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return traced


def figures(traced: StepTrace, coordinator: str) -> dict[str, int]:
    """Return the row of the table."""
    return {
        "functions": len(traced.functions()),
        "files": len(traced.files()),
        "alternations": traced.alternations(coordinator),
    }


def table(rows: Iterable[tuple[str, dict[str, int]]]) -> str:
    """Return the table as text."""
    lines = ["| one step | functions | files | alternations |", "|---|---|---|---|"]
    lines += [f"| {title} | " + " | ".join(map(str, row.values())) + " |" for title, row in rows]
    return "\n".join(lines)


def main() -> None:
    """Trace the scenarios and print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coordinator", default="hf/run.py", help="file that alternates with the trainer's")
    parser.add_argument("--package", type=Path, help="folder that holds another `hf_divguard` to trace")
    parser.add_argument("--list", choices=SCENARIOS, help="print the functions of this scenario in order")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args()
    if options.package is not None:
        sys.path.insert(0, str(options.package.resolve()))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_divguard").setLevel(logging.CRITICAL)
    if options.list:
        print("\n".join(trace(options.list).functions()))
        return
    traces = {scenario: trace(scenario) for scenario in SCENARIOS}
    way = traces["stop"].way_of_loss()
    if options.json:
        found: dict[str, Any] = {
            name: {
                **figures(traced, options.coordinator),
                "list": {"functions": traced.functions(), "files": traced.files()},
            }
            for name, traced in traces.items()
        }
        print(json.dumps({**found, "way of a loss": way}, indent=1))
        return
    print(table((TITLES[name], figures(traced, options.coordinator)) for name, traced in traces.items()))
    print(f"\nWay of a loss: {len(way)} hops in {len(set(way))} files: {' > '.join(way)}")


if __name__ == "__main__":
    main()
