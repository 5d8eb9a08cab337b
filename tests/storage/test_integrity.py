"""Real checkpoints of the Trainer, whole and damaged, with and without a manifest."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_divguard.storage.checkpoints import find_checkpoints, latest_complete_checkpoint, verify_checkpoint
from hf_divguard.storage.manifest import read_manifest
from hf_divguard.storage.names import INCOMPLETE_NAME, MANIFEST_NAME, SIDECAR_NAME

from .conftest import certify, damages, said, sidecar_of, small_checkpoint, tree

KINDS = ["full", "only_model", "adapter", "sharded", "bin", "two ranks", "many adapters"]
# Without a manifest it is not known whether these were ever there.
UNKNOWABLE = {("README.md", "removed"), ("README.md", "emptied"), ("README.md", "halved")}
UNKNOWABLE |= {("generation_config.json", "removed")}


def make(kind: str, trained: Path, target: Path) -> Path:
    """Return a run folder with checkpoints 2 and 4 of the kind asked for."""
    source = trained / ("adapter" if "adapter" in kind else "only_model" if kind == "only_model" else "full")
    if not source.exists():
        pytest.skip("needs peft")
    shutil.copytree(source, target)
    for folder in sorted(target.iterdir()):
        if kind == "sharded":
            (folder / "model.safetensors").unlink()
            for file in (trained / "sharded").iterdir():
                shutil.copy(file, folder)
        elif kind == "bin":
            (folder / "model.safetensors").unlink()
            shutil.copy(trained / "pytorch_model.bin", folder)
        elif kind == "two ranks":
            shutil.copy(folder / "rng_state.pth", folder / "rng_state_1.pth")
            (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
        elif kind == "many adapters":
            (folder / "german").mkdir()
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                (folder / name).rename(folder / "german" / name)
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_is_complete(kind: str, trained: Path, tmp_path: Path) -> None:
    run = make(kind, trained, tmp_path / "run")
    for checksums in (None, False, True):
        verdict = verify_checkpoint(run / "checkpoint-4", checksums=checksums)
        assert verdict.status == "complete", verdict
        assert verdict.loadable
        assert verdict.resumable == (kind != "only_model")
        assert not verdict.has_manifest


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_gives_the_same_verdict(kind: str, trained: Path, tmp_path: Path) -> None:
    folder = certify(make(kind, trained, tmp_path / "run") / "checkpoint-4")
    verdict = verify_checkpoint(folder)
    assert (verdict.status, verdict.loadable, verdict.has_manifest) == ("complete", True, True)
    assert verdict.resumable == (kind != "only_model")
    if kind == "only_model":
        assert "no optimizer's state" in verdict.reason


def link_files(folder: Path, blobs: Path, pattern: str) -> None:
    """Move the files of ``folder`` to ``blobs``, and put links in their place, as the Hub's cache does."""
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.glob(pattern))):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), folder))


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("damage", "checksums"),
    [*((damage, True) for damage in damages()), ("removed", False), ("halved", False)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_any_damaged_file_of_a_certified_checkpoint_is_named_and_the_one_before_is_taken(
    kind: str, damage: str, checksums: bool, trained: Path, tmp_path: Path
) -> None:
    run = make(kind, trained, tmp_path / "run")
    certify(run / "checkpoint-2", sequence=1, checksums=checksums)
    whole = certify(run / "checkpoint-4", sequence=2, checksums=checksums)
    for name in files_of(whole):
        broken = run / "checkpoint-6"
        shutil.move(shutil.copytree(whole, tmp_path / "copy"), broken)
        shutil.move(whole, tmp_path / "kept")
        shutil.move(broken, whole)
        damages()[damage](whole / name)
        verdict = verify_checkpoint(whole)
        assert verdict.status == "incomplete", name
        assert not verdict.resumable
        assert name in said(verdict)
        chosen = latest_complete_checkpoint(run)
        assert chosen is not None
        assert chosen.step == 2, name
        shutil.rmtree(whole)
        shutil.move(tmp_path / "kept", whole)


@pytest.mark.parametrize("damage", ["removed", "emptied", "halved"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_damaged_file_of_a_stock_checkpoint_is_named_and_the_one_before_is_taken(
    kind: str, damage: str, trained: Path, tmp_path: Path
) -> None:
    run = make(kind, trained, tmp_path / "run")
    whole = run / "checkpoint-4"
    for name in files_of(whole):
        if (name, damage) in UNKNOWABLE:
            continue
        shutil.copytree(whole, tmp_path / "kept")
        damages()[damage](whole / name)
        verdict = verify_checkpoint(whole)
        assert verdict.status == "incomplete", name
        assert Path(name).name in said(verdict)
        chosen = latest_complete_checkpoint(run)
        assert chosen is not None
        assert chosen.step == 2, name
        shutil.rmtree(whole)
        shutil.move(tmp_path / "kept", whole)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_flipped_bit_in_an_archive_of_a_stock_checkpoint_is_found_when_asked_to_read_it(
    name: str, run_dir: Path
) -> None:
    path = run_dir / "checkpoint-4" / name
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda each: each.file_size)
        data = archive.read(member)
    at = path.read_bytes().index(data) + len(data) // 2
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert verify_checkpoint(run_dir / "checkpoint-4").status == "complete"
    verdict = verify_checkpoint(run_dir / "checkpoint-4", checksums=True)
    assert verdict.status == "incomplete"
    assert name in said(verdict)


def test_a_missing_random_state_is_named_by_rank(trained: Path, tmp_path: Path) -> None:
    run = make("two ranks", trained, tmp_path / "run")
    (run / "checkpoint-4" / "rng_state_1.pth").unlink()
    assert "random state of rank 1" in verify_checkpoint(run / "checkpoint-4").reason


def test_weights_that_are_whole_stay_loadable_when_the_optimizer_is_lost(run_dir: Path) -> None:
    (run_dir / "checkpoint-4" / "optimizer.pt").unlink()
    (run_dir / "checkpoint-2" / "model.safetensors").unlink()
    assert verify_checkpoint(run_dir / "checkpoint-4").loadable
    assert not verify_checkpoint(run_dir / "checkpoint-2").loadable


def test_a_checkpoint_whose_save_was_cut_before_its_manifest_is_incomplete(run_dir: Path) -> None:
    folder = certify(run_dir / "checkpoint-4")
    (folder / MANIFEST_NAME).unlink()
    verdict = verify_checkpoint(folder)
    assert verdict.status == "incomplete"
    assert MANIFEST_NAME in verdict.reason


@pytest.mark.parametrize("certified", [False, True])
def test_the_marker_of_an_unfinished_save_on_sigterm_means_incomplete(certified: bool, run_dir: Path) -> None:
    folder = run_dir / "checkpoint-4"
    if certified:
        certify(folder)
    (folder / INCOMPLETE_NAME).write_text("in progress")
    verdict = verify_checkpoint(folder)
    assert (verdict.status, verdict.resumable) == ("incomplete", False)
    assert INCOMPLETE_NAME in verdict.reason


def _layout(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


LAYOUTS = {
    "torch.distributed.checkpoint": [".metadata", "__0_0.distcp"],
    "SageMaker": ["optimizer.pt_0_1_2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_way_of_saving_is_recognised_and_never_called_complete(layout: str, run_dir: Path) -> None:
    folder = run_dir / "checkpoint-4"
    _layout(folder, LAYOUTS[layout])
    verdict = verify_checkpoint(folder)
    assert (verdict.status, verdict.resumable) == ("unknown", False)
    assert layout in verdict.reason
    (folder / "model.safetensors").unlink()
    assert verify_checkpoint(folder).status == "unknown"
    (folder / "trainer_state.json").unlink()
    assert verify_checkpoint(folder).status == "incomplete"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_way_of_saving_counts_with_a_manifest_that_names_every_part(
    layout: str, run_dir: Path
) -> None:
    folder = run_dir / "checkpoint-4"
    _layout(folder, LAYOUTS[layout])
    certify(folder)
    assert verify_checkpoint(folder).status == "complete"
    (folder / LAYOUTS[layout][-1]).unlink()
    verdict = verify_checkpoint(folder)
    assert verdict.status == "incomplete"
    assert LAYOUTS[layout][-1] in verdict.reason


def test_a_folder_of_unknown_files_is_unknown_and_an_empty_one_incomplete(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    _layout(tmp_path / "checkpoint-2", ["whatever.dat"])
    assert verify_checkpoint(tmp_path / "checkpoint-1").status == "incomplete"
    assert verify_checkpoint(tmp_path / "checkpoint-2").status == "unknown"


def test_a_checkpoint_of_another_step_than_its_name_says_is_incomplete(run_dir: Path) -> None:
    (run_dir / "checkpoint-4").rename(run_dir / "checkpoint-9")
    verdict = verify_checkpoint(run_dir / "checkpoint-9")
    assert verdict.status == "incomplete"
    assert "of step 4, not of checkpoint-9" in verdict.reason


def test_a_checkpoint_under_another_name_and_behind_a_link_can_be_verified(run_dir: Path) -> None:
    (run_dir / "checkpoint-4").rename(run_dir / "released")
    (run_dir / "link").symlink_to("released")
    assert verify_checkpoint(run_dir / "released").status == "complete"
    assert verify_checkpoint(run_dir / "link").status == "complete"


def test_a_path_that_is_no_checkpoint_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "loop").symlink_to("loop")
    for path, words in {
        tmp_path / "missing": "There is no folder",
        tmp_path / "checkpoint-5": "is a file, not a folder",
        tmp_path / "checkpoint-5" / "inner": "There is no folder",
        tmp_path / "loop": "cannot be read",
        "nul\0byte": "cannot be read",
    }.items():
        verdict = verify_checkpoint(path)
        assert (verdict.status, verdict.loadable, verdict.resumable) == ("incomplete", False, False)
        assert words in verdict.reason


@pytest.mark.parametrize("name", [MANIFEST_NAME, SIDECAR_NAME])
def test_our_files_of_a_newer_version_make_a_checkpoint_unknown_and_say_upgrade(
    name: str, run_dir: Path
) -> None:
    (run_dir / "checkpoint-4" / name).write_text('{"format": 7}')
    verdict = verify_checkpoint(run_dir / "checkpoint-4")
    assert verdict.status == "unknown"
    assert "upgrade" in verdict.reason


@pytest.mark.parametrize("pattern", ["*", "*.safetensors"])
@pytest.mark.parametrize("certified", [False, True])
def test_files_that_are_links_as_in_the_cache_of_the_hub_are_read_through(
    certified: bool, pattern: str, run_dir: Path, tmp_path: Path
) -> None:
    folder = run_dir / "checkpoint-4"
    if certified:
        certify(folder, checksums=True)
    link_files(folder, tmp_path / "blobs", pattern)
    verdict = verify_checkpoint(folder, checksums=True)
    assert (verdict.status, verdict.resumable) == ("complete", True), verdict
    (folder / "model.safetensors").resolve().unlink()
    verdict = verify_checkpoint(folder)
    assert verdict.status == "incomplete"
    assert "model.safetensors" in said(verdict)


def test_a_link_to_a_folder_beside_the_files_does_not_matter(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoint-4" / "data").symlink_to(tmp_path)
    assert verify_checkpoint(run_dir / "checkpoint-4").status == "complete"


def test_a_json_file_of_someone_else_may_have_its_own_form(run_dir: Path) -> None:
    (run_dir / "checkpoint-4" / "events.json").write_text("{}\n{}\n")
    assert verify_checkpoint(run_dir / "checkpoint-4").status == "complete"


def test_a_file_name_cannot_write_into_the_log(run_dir: Path) -> None:
    (run_dir / "checkpoint-4" / "x\n\x1b[2J.safetensors").write_bytes(b"")
    assert verify_checkpoint(run_dir / "checkpoint-4").reason.isprintable()


def test_a_fifo_in_a_checkpoint_does_not_hang(run_dir: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (run_dir / "checkpoint-4" / name).unlink()
        os.mkfifo(run_dir / "checkpoint-4" / name)
    assert verify_checkpoint(run_dir / "checkpoint-4").status == "incomplete"
    os.mkfifo(run_dir / "checkpoint-2" / MANIFEST_NAME)
    assert verify_checkpoint(run_dir / "checkpoint-2").status == "incomplete"


def _header(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    "data",
    [
        b"1234567",
        _header(b"{}", length=2**63),
        _header(b"[]"),
        _header(b"{"),
        _header(b"[" * 1_000_000),
        _header(b'{"a": {"data_offsets": [0, 8]}}', data=b"1234567"),
        _header(b'{"a": {"data_offsets": [0, 8]}}', data=b"123456789"),
        _header(b'{"a": {"data_offsets": [8, 0]}}'),
        _header(b'{"a": {"data_offsets": [-1, 0]}}'),
        _header(b'{"a": {"data_offsets": ["0", 8]}}'),
        _header(b'{"a": {}}'),
        _header(b'{"a": 7}'),
        _header(b'{"a": {"data_offsets": [0, ' + b"9" * 5000 + b"]}}"),
    ],
    ids=range(13),
)
def test_a_malformed_safetensors_file_is_a_problem_and_no_crash(data: bytes, run_dir: Path) -> None:
    (run_dir / "checkpoint-4" / "model.safetensors").write_bytes(data)
    verdict = verify_checkpoint(run_dir / "checkpoint-4")
    assert (verdict.status, verdict.loadable) == ("incomplete", False)
    assert "model.safetensors" in verdict.reason


@pytest.mark.parametrize(
    "shards",
    [{"w": "../../secret.safetensors"}, {"w": "/etc/passwd"}, {"w": 3}, {}, [], {"w": "gone.safetensors"}],
)
def test_an_index_that_names_no_shards_or_such_outside_is_a_problem(
    shards: object, trained: Path, tmp_path: Path
) -> None:
    folder = make("sharded", trained, tmp_path / "run") / "checkpoint-4"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    verdict = verify_checkpoint(folder)
    assert (verdict.status, verdict.loadable) == ("incomplete", False)
    assert "model.safetensors.index.json" in said(verdict)


def test_trainer_state_with_nan_tokens_is_whole(run_dir: Path) -> None:
    path = run_dir / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"].append({"step": 4, "loss": float("nan"), "grad_norm": float("inf")})
    path.write_text(json.dumps(state))
    assert verify_checkpoint(run_dir / "checkpoint-4").status == "complete"


def test_a_folder_that_may_not_be_read_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_checkpoint(tmp_path / "checkpoint-1")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    verdict = verify_checkpoint(folder)
    assert verdict.status == "unreadable"
    assert "Permission denied" in verdict.reason


def test_files_that_vanish_while_looking_end_in_a_verdict(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_divguard.storage.contents as contents

    real: Callable[..., object] = contents.list_files

    def vanish(folder: Path, **options: int) -> object:
        found = real(folder, **options)
        shutil.rmtree(folder)
        return found

    monkeypatch.setattr(contents, "list_files", vanish)
    verdict = verify_checkpoint(run_dir / "checkpoint-4")
    assert verdict.status == "incomplete"
    assert "missing" in verdict.reason


def test_looking_changes_nothing(run_dir: Path) -> None:
    certify(run_dir / "checkpoint-2", checksums=True)
    before = tree(run_dir)
    verify_checkpoint(run_dir / "checkpoint-4", checksums=True)
    find_checkpoints(run_dir)
    latest_complete_checkpoint(run_dir)
    assert tree(run_dir) == before


def test_the_manifest_of_a_certified_checkpoint_names_the_sidecar(run_dir: Path) -> None:
    assert SIDECAR_NAME in read_manifest(certify(run_dir / "checkpoint-4")).files
    assert sidecar_of(4).manifest_expected
