"""Every command on what stands in real folders: an answer or a sentence, never a traceback, never an empty answer."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_divguard.cli import plain_text
from tests.processes import run_python

COMMANDS = (
    "status",
    "list",
    "best",
    "latest",
    "verify",
    "replay",
    "tune",
    "compare",
    "report",
    "watch",
    "prune",
)
LOSSES = [2.5 - 0.01 * step for step in range(60)] + [9.0 + 0.01 * step for step in range(40)]
LOG = [{"step": step, "epoch": step / 100, "loss": loss} for step, loss in enumerate(LOSSES, start=1)]
ROWS = "".join(json.dumps(entry) + "\n" for entry in LOG)


def state(log: Any = LOG, **more: Any) -> str:
    return json.dumps({"global_step": 100, "max_steps": 100, "log_history": log, **more}, indent=2)


def words_of(command: str, path: object, tmp_path: Path) -> list[object]:
    extra = {"watch": ["--once"], "report": ["-o", tmp_path / "page.html"]}
    return [command, path, *extra.get(command, [])]


def ask_all(cli: Any, path: object, tmp_path: Path, commands: tuple[str, ...] = COMMANDS) -> dict[str, Any]:
    """Run every command on ``path``; return the answers, each of which is an answer or one sentence."""
    answers = {}
    for command in commands:
        answer = answers[command] = cli(*words_of(command, path, tmp_path))
        said = f"{command}: {answer}"
        assert answer.code in (0, 1, 2, 3), said
        assert "fault of hf-divguard" not in answer.err, said
        if answer.code in (2, 3) and not answer.out:
            assert answer.err.count("\n") == 1, said
            assert answer.err.startswith("hf-divguard: "), said
            assert len(answer.err) > 40, said
        else:
            assert (answer.out + answer.err).strip(), said
        machine = cli(*words_of(command, path, tmp_path), "--json")
        assert machine.err == "", said
        assert machine.json["command"] == command
        assert machine.code == answer.code
    return answers


# ---- trainer states


def cut(text: str) -> bytes:
    return text.encode()[: len(text) // 2]


STATES: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\t\n",
    "cut in half": cut(state()),
    "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12345\n",
    "a config": json.dumps({"model_type": "llama", "hidden_size": 16}).encode(),
    "null": b"null",
    "a number": b"7",
    "a text": b'"loss"',
    "an empty list": b"[]",
    "an empty object": b"{}",
    "no log": json.dumps({"global_step": 3}).encode(),
    "a log of text": json.dumps({"global_step": 3, "log_history": "loss"}).encode(),
    "a log of numbers": json.dumps({"global_step": 3, "log_history": [1, 2, 3]}).encode(),
    "an empty log": state([]).encode(),
    "only the closing entry": state(
        [{"train_runtime": 3.0, "train_loss": 2.0, "step": 9, "epoch": 1.0}]
    ).encode(),
    "only evaluations": state(
        [{"eval_loss": 2.0, "eval_runtime": 1, "step": s, "epoch": s} for s in range(9)]
    ).encode(),
    "epochs only": state([{"epoch": s, "loss": 2.0} for s in range(30)]).encode(),
    "NaN tokens": state(
        [{"step": s, "loss": float("nan"), "grad_norm": float("inf")} for s in range(1, 30)]
    ).encode(),
    "texts for numbers": state(
        [{"step": str(s), "loss": "2,5", "grad_norm": "nan"} for s in range(30)]
    ).encode(),
    "huge integers": state(
        [{"step": 10**400, "loss": 10**400} for _ in range(5)], global_step=10**400
    ).encode(),
    "huge steps": state([{"step": 2**62 + s, "loss": 2.0} for s in range(20)], global_step=2**62).encode(),
    "negative steps": state([{"step": -s, "loss": 2.0} for s in range(20)], global_step=-5).encode(),
    "steps of other types": state(
        [{"step": [1], "loss": 1.0}, {"step": None, "loss": 1.0}, {"loss": {}}]
    ).encode(),
    "odd types": state(LOG, max_steps="many", best_model_checkpoint=7, best_metric={}, epoch=[1]).encode(),
    "digits without end": b'{"global_step": ' + b"9" * 5000 + b', "log_history": []}',
    "deep": b"[" * 200_000,
    "zeros": bytes(4096),
    "random bytes": random.Random(0).randbytes(4096),
    "latin-1": '{"log_history": [{"loss": 1.0, "step": 1, "läuft": 1}]}'.encode("latin-1"),
    "with a byte order mark": b"\xef\xbb\xbf" + state().encode(),
    "in UTF-16": state().encode("utf-16"),
    "with CRLF": state().replace("\n", "\r\n").encode(),
    "twice the same key": b'{"global_step": 1, "global_step": 2, "log_history": [{"loss": 1.0, "step": 1}]}',
}


@pytest.mark.parametrize("kind", STATES)
def test_a_trainer_state_of_any_kind(cli: Any, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "trainer_state.json").write_bytes(STATES[kind])
    ask_all(cli, folder, tmp_path)
    ask_all(cli, folder / "trainer_state.json", tmp_path)
    checkpoint = tmp_path / "other" / "checkpoint-9"
    shutil.copytree(folder, checkpoint)
    ask_all(cli, checkpoint.parent, tmp_path, ("status", "verify", "compare"))


@pytest.mark.parametrize("kind", ["with a byte order mark", "in UTF-16", "with CRLF"])
def test_other_encodings_of_a_state_are_read(cli: Any, tmp_path: Path, kind: str) -> None:
    (tmp_path / "trainer_state.json").write_bytes(STATES[kind])
    answer = cli("replay", tmp_path / "trainer_state.json", "--json")
    assert answer.json["runs"][0]["first_error"]["onset_step"] == 61


# ---- tables


def csv_of(separator: str = ",", decimal: str = ".", *, head: str = "step,loss", index: bool = False) -> str:
    names = [*([""] if index else []), *head.split(",")]
    rows = [separator.join(names)]
    for number, entry in enumerate(LOG):
        cells = [
            *([str(number)] if index else []),
            str(entry["step"]),
            str(entry["loss"]).replace(".", decimal),
        ]
        rows.append(separator.join(cells))
    return "\n".join(rows) + "\n"


GOOD: dict[str, tuple[str, bytes]] = {
    "JSON Lines": ("log.jsonl", ROWS.encode()),
    "JSON Lines with CRLF": ("log.jsonl", ROWS.replace("\n", "\r\n").encode()),
    "JSON Lines with a byte order mark": ("log.jsonl", b"\xef\xbb\xbf" + ROWS.encode()),
    "JSON Lines in UTF-16": ("log.jsonl", ROWS.encode("utf-16")),
    "JSON Lines, cut": ("log.jsonl", ROWS.encode()[:-9]),
    "JSON Lines, compressed": ("log.jsonl.gz", gzip.compress(ROWS.encode())),
    "JSON, compressed": ("trainer_state.json.gz", gzip.compress(state().encode())),
    "JSON, compressed without its suffix": ("trainer_state.json", gzip.compress(state().encode())),
    "CSV": ("log.csv", csv_of().encode()),
    "CSV, compressed": ("log.csv.gz", gzip.compress(csv_of().encode())),
    "CSV with semicolons": ("log.csv", csv_of(";").encode()),
    "CSV with decimal commas": ("log.csv", csv_of(";", ",").encode()),
    "CSV with tabs": ("log.csv", csv_of("\t").encode()),
    "TSV with decimal commas": ("log.tsv", csv_of("\t", ",").encode()),
    "CSV with an index": ("log.csv", csv_of(index=True).encode()),
    "CSV with CRLF": ("log.csv", csv_of().replace("\n", "\r\n").encode()),
    "CSV in UTF-16": ("log.csv", csv_of().encode("utf-16")),
    "CSV with a byte order mark": ("log.csv", b"\xef\xbb\xbf" + csv_of().encode()),
    "CSV of W&B": ("wandb.csv", csv_of(head="Step,my run - train/loss").encode()),
    "CSV of W&B with quotes": ("wandb.csv", csv_of(head='"Step","my run - train/loss"').encode()),
    "CSV of TensorBoard": ("board.csv", csv_of(head="Step,Value").encode()),
    "CSV of MLflow": ("mlflow.csv", csv_of(head="step,loss").encode()),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_table_of_any_kind_is_read(cli: Any, tmp_path: Path, kind: str) -> None:
    name, data = GOOD[kind]
    (tmp_path / name).write_bytes(data)
    answers = ask_all(cli, tmp_path / name, tmp_path)
    assert answers["status"].code == 3
    run = cli("replay", tmp_path / name, "--json").json["runs"][0]
    assert run["first_error"]["onset_step"] == 61


BAD: dict[str, tuple[str, bytes]] = {
    "only a heading": ("log.csv", b"step,loss\n"),
    "no heading": ("log.csv", b"1,2\n3,4\n"),
    "NUL in a CSV": ("log.csv", b"step,loss\n1,\x002\n"),
    "a compressed file cut in half": ("log.csv.gz", gzip.compress(csv_of().encode())[:100]),
    "not compressed": ("log.csv.gz", csv_of().encode()),
    "a picture": ("log.csv", b"\x89PNG\r\n\x1a\n" + bytes(64)),
    "a web page": ("log.jsonl", b"<!DOCTYPE html><html><body>404</body></html>"),
    "a printed log": ("log.txt", b"{'loss': 2.5, 'epoch': 1.0}\n" * 20),
    "event file, empty": ("events.out.tfevents.1.host.1.0", b""),
    "event file of zeros": ("events.out.tfevents.1.host.1.0", bytes(999)),
    "event file of random bytes": ("events.out.tfevents.1.host.1.0", random.Random(1).randbytes(4096)),
    "a .wandb file of zeros": ("run-1.wandb", bytes(999)),
    "a .wandb file of random bytes": ("run-1.wandb", random.Random(2).randbytes(70_000)),
    "a database of zeros": ("project.db", bytes(4096)),
    "a Parquet file of zeros": ("log.parquet", bytes(999)),
    "a pickle": ("training_args.bin", b"\x80\x04K\x01."),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_read_is_a_sentence(cli: Any, tmp_path: Path, kind: str) -> None:
    name, data = BAD[kind]
    (tmp_path / name).write_bytes(data)
    ask_all(cli, tmp_path / name, tmp_path)
    (tmp_path / "in").mkdir()
    shutil.move(tmp_path / name, tmp_path / "in" / name)
    ask_all(cli, tmp_path / "in", tmp_path)


def test_a_compressed_file_that_grows_without_bound_is_refused(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_text, "MAX_BYTES", 1 << 20)
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress(b" " * (2 << 20)))
    answer = cli("replay", tmp_path / "log.jsonl.gz")
    assert (answer.code, answer.err.count("\n")) == (3, 1)
    assert "must have at most" in answer.err


def test_event_files_cut_anywhere(cli: Any, tmp_path: Path) -> None:
    writer = pytest.importorskip("torch.utils.tensorboard", reason="TensorBoard writes the files")
    with writer.SummaryWriter(str(tmp_path / "runs")) as board:
        for entry in LOG:
            board.add_scalar("train/loss", entry["loss"], int(entry["step"]))
    (whole,) = (tmp_path / "runs").iterdir()
    data = whole.read_bytes()
    found = []
    for share in (0.0, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0):
        whole.write_bytes(data[: int(share * len(data))])
        ask_all(cli, tmp_path / "runs", tmp_path, ("status", "replay", "tune"))
        answer = cli("replay", tmp_path / "runs", "--json").json
        found.append(answer["runs"][0]["values"] if "runs" in answer else 0)
    assert found[-1] == 100
    assert 40 < found[3] < 60
    assert found == sorted(found)


# ---- folders


def missing(path: Path) -> Path:
    return path / "none"


def empty(path: Path) -> Path:
    return path


def loop(path: Path) -> Path:
    (path / "self").symlink_to(path / "self")
    return path / "self"


def loop_inside(path: Path) -> Path:
    (path / "again").symlink_to(path)
    (path / "checkpoint-7").symlink_to(path / "checkpoint-7")
    (path / "trainer_state.json").symlink_to(path / "trainer_state.json")
    return path


def dangling(path: Path) -> Path:
    (path / "checkpoint-3").symlink_to(path / "gone")
    return path


def checkpoint_file(path: Path) -> Path:
    (path / "checkpoint-5").write_text("not a folder")
    return path


def empty_checkpoints(path: Path) -> Path:
    for step in (1, 20, 300):
        (path / f"checkpoint-{step}").mkdir()
    return path


def folders_for_files(path: Path) -> Path:
    for name in ("trainer_state.json", "divguard", "divguard/events.jsonl", "divguard/outcome.json"):
        (path / name).mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path / "trainer_state.json")
    return path


def pipe_itself(path: Path) -> Path:
    os.mkfifo(path / "pipe")
    return path / "pipe"


def broken_records(path: Path) -> Path:
    checkpoint = path / "checkpoint-4"
    checkpoint.mkdir()
    for name in ("divguard_manifest.json", "divguard_state.json", "trainer_state.json"):
        (checkpoint / name).write_bytes(b'{"format": 1, "step": ')
    (path / "divguard").mkdir()
    (path / "divguard" / "events.jsonl").write_bytes(
        b'\xff\xfe{}\nnull\n7\n{"event": []}\n{"step": "x"}\n{"ev'
    )
    (path / "divguard" / "outcome.json").write_bytes(b'{"outcome": 7}')
    return path


def many_other_files(path: Path) -> Path:
    for number in range(5000):
        (path / f"page-{number}.txt").touch()
    return path


def device(path: Path) -> Path:
    return Path("/dev/null")


def nul_in_name(path: Path) -> str:
    return f"{path}/a\0b"


def long_name(path: Path) -> Path:
    return path / ("x" * 5000)


FOLDERS: list[Callable[[Path], Path | str]] = [
    missing,
    empty,
    loop,
    loop_inside,
    dangling,
    checkpoint_file,
    empty_checkpoints,
    folders_for_files,
    pipe,
    pipe_itself,
    broken_records,
    many_other_files,
    device,
    nul_in_name,
    long_name,
]
NO_PATH = {
    missing,
    loop,
    nul_in_name,
    long_name,
    empty,
    many_other_files,
    checkpoint_file,
    device,
    pipe_itself,
}


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_a_folder_of_any_kind(cli: Any, tmp_path: Path, make: Callable[[Path], Path | str]) -> None:
    (tmp_path / "out").mkdir()
    answers = ask_all(cli, make(tmp_path / "out"), tmp_path)
    if make in NO_PATH:
        assert {command: answer.code for command, answer in answers.items()} == dict.fromkeys(COMMANDS, 3)


# What another user may not read of Python itself is imported before.
AS_ANOTHER_USER = """
import contextlib, importlib, io, json, os, sys
from hf_divguard.cli.main import main
from hf_divguard.cli.parsers import COMMANDS
import hf_divguard.replays
for module in set(COMMANDS.values()):
    importlib.import_module(f"hf_divguard.cli.{module}")
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(words)  # what it imports on the way
os.geteuid() or os.seteuid(65534)
answers = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        code = main(words)
    answers.append([code, out.getvalue(), error.getvalue()])
print(json.dumps(answers))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
@pytest.mark.parametrize(
    "locked", ["", "checkpoint-4", "checkpoint-4/trainer_state.json", "trainer_state.json"]
)
def test_what_may_not_be_read(made: Path, tmp_path: Path, locked: str) -> None:
    """As a user who is not root, in a process of its own."""
    folder = tmp_path / "out"
    shutil.copytree(made / "stock", folder)
    os.chmod(folder / locked, 0)
    for parent in tmp_path.parents[:-1]:
        if not parent.stat().st_mode & 1:
            os.chmod(parent, parent.stat().st_mode | 0o711)
    lines = [[str(word) for word in words_of(command, folder, tmp_path)] for command in COMMANDS]
    done = run_python("-c", AS_ANOTHER_USER, json.dumps(lines))
    os.chmod(folder / locked, 0o700)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for line, (code, out, error) in zip(lines, answers, strict=True):
        assert code in (0, 1, 3), (line, code, out, error)
        assert "fault of hf-divguard" not in error
        assert (out + error).strip()
