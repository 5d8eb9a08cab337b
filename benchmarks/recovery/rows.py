"""Planted rows: is the row that made an incident named, and is none named where the data are innocent?

    python -m benchmarks.recovery.rows            # 100 planted rows, 50 innocent incidents
    python -m benchmarks.recovery.rows --write    # the same, and writes docs/recovery/rows.md
    python -m benchmarks.recovery.rows --short    # three planted rows and an innocent incident of each setting

One row of a run is bad: pixels that are NaN, a target a thousand times too large, or a document of random tokens in a
packed row. It is one of 64 rows of a step, in one batch, in four micro-batches or on one of two ranks; packed rows are
16 a step. The innocent incidents are faults of the weights and of the learning rate.

A guard names rows in ``trainer.divguard_suspect_rows``: numbers of dataset rows, or mappings or objects that hold one
as ``dataset_index``, ``index`` or ``row``. Where the attribute does not exist the benchmark is skipped and says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import PrinterCallback, ViTConfig, ViTForImageClassification, set_seed

from benchmarks.recovery.__main__ import DOCS, guard_options
from benchmarks.recovery.data import IMAGE, VOCABULARY, chain, image_pool, walk
from benchmarks.recovery.faults import FAULTS, FaultCallback
from benchmarks.recovery.models import decoder
from benchmarks.recovery.runs import SAVE_EVERY

PAGE = """# Which rows are named

Written by `python -m benchmarks.recovery.rows --write`. Each run has one bad row, or an innocent incident: a fault of the
learning rate, of the weights or of a gradient. "Named alone" is what is right: the number of the bad row in the dataset,
and no other.

{table}
A step has 64 rows: one batch of 64, four micro-batches of 16, or 32 on each of two ranks. A bad row has pixels that are
NaN, or a target that is 1000 too large. Packed rows are 16 a step, of three documents each, of which two are random in a
bad row: that raises the loss of the step by a quarter, which is 2.4 to 6.6 spreads of its noise.
"""

STEPS = 120
FIRST_BAD_STEP = 60
INNOCENT = ("rate_x30", "rate_x100", "weight_noise", "nan_loss", "sign_flip")


@dataclass(frozen=True)
class Setting:
    """How the rows of a step are spread.

    Args:
        name: Short name.
        kinds: What a bad row is, in turn.
        batch: Rows of a micro-batch.
        accumulation: Micro-batches of a step.
        ranks: Processes.
        planted: Runs with a bad row.
        innocent: Runs with an innocent incident.
    """

    name: str
    kinds: tuple[str, ...]
    batch: int
    accumulation: int = 1
    ranks: int = 1
    planted: int = 25
    innocent: int = 15


SETTINGS = (
    Setting("one of 64", ("pixels", "target"), 64),
    Setting("accumulation", ("pixels", "target"), 16, accumulation=4),
    Setting("packing", ("document",), 16),
    Setting("two ranks", ("pixels", "target"), 32, ranks=2, innocent=5),
)


class PlantedRows(Dataset):  # type: ignore[type-arg]
    """Rows of which one is bad: the one that is fetched as number ``bad_fetch``, and the same one ever after.

    Args:
        rows: The sound rows.
        kind: What a bad row is.
        bad_fetch: Number of the fetch, from 0; ``None`` for no bad row.
    """

    def __init__(self, rows: dict[str, torch.Tensor], kind: str, bad_fetch: int | None) -> None:
        self.rows, self.kind, self.bad_fetch = rows, kind, bad_fetch
        self.fetches = 0
        self.bad_index: int | None = None

    def __len__(self) -> int:
        return len(self.rows["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.fetches == self.bad_fetch:
            self.bad_index = index
        self.fetches += 1
        row = {name: value[index] for name, value in self.rows.items()}
        return spoilt(row, self.kind) if index == self.bad_index else row


def spoilt(row: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Return a bad row."""
    if kind == "pixels":
        return {**row, "pixel_values": row["pixel_values"].clone().fill_(float("nan"))}
    if kind == "target":
        return {**row, "labels": row["labels"] + 1000.0}
    tokens = row["input_ids"].clone()
    tokens[14:] = torch.randint(0, VOCABULARY, tokens[14:].shape, generator=torch.Generator().manual_seed(3))
    return {**row, "input_ids": tokens, "labels": tokens}


def packed_rows(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Return rows of three documents each, whose positions begin at 0 again."""
    generator = torch.Generator().manual_seed(seed)
    parts, places = [], []
    for length in (14, 22, 20):
        first = torch.randint(0, VOCABULARY, (count,), generator=generator)
        parts.append(walk(chain("easy"), first, length, generator))
        places.append(torch.arange(length).expand(count, -1))
    tokens = torch.cat(parts, 1)
    return {"input_ids": tokens, "labels": tokens, "position_ids": torch.cat(places, 1)}


def regression_rows(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Return images with a number each."""
    pool = image_pool("easy", count, seed)
    return {"pixel_values": pool["pixel_values"], "labels": pool["labels"].float() / 5.0 - 1.0}


def regression_model() -> Any:
    """Return a small ViT that predicts a number."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE,
            patch_size=4,
            num_channels=1,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            problem_type="regression",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def named_rows(trainer: Any) -> set[int] | None:
    """Return the dataset rows that the guard named; ``None`` where it cannot name any."""
    suspects = getattr(trainer, "divguard_suspect_rows", None)
    if suspects is None:
        return None
    return {number for suspect in suspects for number in _numbers(suspect)}


def _numbers(suspect: Any) -> Iterable[int]:
    if isinstance(suspect, int):
        return [suspect]
    for name in ("dataset_index", "index", "row"):
        found = suspect.get(name) if isinstance(suspect, dict) else getattr(suspect, name, None)
        if isinstance(found, int):
            return [found]
    return []


def trainer_of(setting: Setting, number: int, fault: str | None, options: dict[str, Any], folder: str) -> Any:
    """Return the guarded trainer of one run; the last rank has the bad row."""
    from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments

    packs, seed = setting.kinds == ("document",), number + 1
    per_step = setting.batch * setting.accumulation
    bad_step = FIRST_BAD_STEP + number % 40
    is_planted = fault is None and rank() == setting.ranks - 1
    dataset = PlantedRows(
        (packed_rows if packs else regression_rows)(STEPS * per_step * setting.ranks, seed),
        setting.kinds[number % len(setting.kinds)],
        (bad_step - 1) * per_step + 7 * number % per_step if is_planted else None,
    )
    set_seed(seed)
    model = decoder() if packs else regression_model()
    steps = list(range(bad_step, bad_step + FAULTS[fault].lasts)) if fault else []
    args = DivGuardTrainingArguments(
        output_dir=f"{folder}/{number}",
        max_steps=STEPS,
        per_device_train_batch_size=setting.batch,
        gradient_accumulation_steps=setting.accumulation,
        learning_rate=1e-2 if packs else 1e-3,
        warmup_steps=10,
        logging_steps=10,
        save_steps=SAVE_EVERY,
        seed=seed,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **{"divguard_detector": "adaptive", "divguard_action": "rollback", **options},
    )
    callbacks = [FaultCallback(FAULTS[fault], steps, model)] if fault else []
    trainer = DivGuardTrainer(model=model, args=args, train_dataset=dataset, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", "0"))


def train(setting: Setting, number: int, options: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train with a bad row, or with an innocent incident, and return what was named."""
    fault = None if number < setting.planted else INNOCENT[number % len(INNOCENT)]
    trainer = trainer_of(setting, number, fault, options, folder)
    error = ""
    try:
        trainer.train()
    except Exception as raised:  # the other runs go on
        error = f"{type(raised).__name__}: {raised}"
    named = named_rows(trainer)
    return {
        "setting": setting.name,
        "kind": fault or trainer.train_dataset.kind,
        "bad": trainer.train_dataset.bad_index,
        "named": None if named is None else sorted(named),
        "acted": [event.get("event") for event in trainer.divguard_events],
        "error": error,
    }


def run_setting(setting: Setting, options: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Make the runs of a setting; return nothing where the guard cannot name rows."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_divguard").setLevel(logging.CRITICAL)
    results: list[dict[str, Any]] = []
    for number in range(setting.planted + setting.innocent):
        results.append(train(setting, number, options, folder))
        if results[-1]["named"] is None:
            return []
        if rank() == 0:
            print(json.dumps(results[-1]), flush=True)
    return results


def _on_rank(number: int, setting: Setting, options: dict[str, Any], port: int, folder: str) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(setting.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.filterwarnings("ignore")
    results = run_setting(setting, options, folder)
    Path(folder, f"results-{number}.json").write_text(json.dumps(results), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_on_ranks(setting: Setting, options: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Make the runs of a setting, in several processes where it has several ranks."""
    if setting.ranks == 1:
        return run_setting(setting, options, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_on_rank, (setting, options, port, folder), nprocs=setting.ranks)
    found = [
        json.loads(Path(folder, f"results-{number}.json").read_text(encoding="utf-8"))
        for number in range(setting.ranks)
    ]
    for results in zip(*found, strict=True):
        results[0]["bad"] = results[-1]["bad"]
    return found[0]  # type: ignore[no-any-return]


def table(results: list[dict[str, Any]]) -> str:
    """Return what was named, as Markdown."""
    lines = [
        "| setting | planted rows | named alone | named among others | innocent incidents | rows named in them |",
        "|---|---|---|---|---|---|",
    ]
    for name in [*dict.fromkeys(result["setting"] for result in results), "all"]:
        some = [result for result in results if name in (result["setting"], "all")]
        planted = [result for result in some if result["kind"] not in INNOCENT]
        innocent = [result for result in some if result["kind"] in INNOCENT]
        exact = sum(result["named"] == [result["bad"]] for result in planted)
        among = sum(result["bad"] in result["named"] for result in planted) - exact
        wrong = sum(bool(result["named"]) for result in innocent)
        lines.append(f"| {name} | {len(planted)} | {exact} | {among} | {len(innocent)} | {wrong} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery.rows", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--settings", nargs="*", default=[setting.name for setting in SETTINGS])
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the guard"
    )
    parser.add_argument(
        "--short", action="store_true", help="three planted rows and one innocent incident each"
    )
    parser.add_argument("--write", action="store_true", help="write rows.md into docs/recovery")
    parsed = parser.parse_args()
    warnings.filterwarnings("ignore")
    options, results = guard_options(parsed.option), []
    for setting in SETTINGS:
        if parsed.short:
            setting = replace(setting, planted=3, innocent=1)
        if setting.name in parsed.settings:
            with tempfile.TemporaryDirectory(prefix="rows-") as folder:
                found = run_on_ranks(setting, options, folder)
            if not found:
                print("Skipped: this version has no `trainer.divguard_suspect_rows`, so it names no rows.")
                return 0
            results += found
    print(table(results))
    if parsed.write:
        text = PAGE.format(table=table(results))
        (DOCS / "rows.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
