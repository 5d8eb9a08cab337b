"""The files of sharded checkpoints: which have to be there, and how long they have to be."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from hf_divguard.errors import CheckpointSaveError
from hf_divguard.storage.integrity import verify_checkpoint
from hf_divguard.storage.manifest import build_manifest

TENSORS = {f"layer.{number}.weight": torch.arange(50.0) + number for number in range(3)}
PLACE = {"step": 4, "run_id": "run", "sequence": 1, "world_size": 1}

Damage = Callable[[Path], object]


def write_shards(folder: Path) -> None:
    """Save tensors with ``torch.distributed.checkpoint``, as one rank does."""
    save({"part": dict(TENSORS)}, storage_writer=FileSystemWriter(folder), no_dist=True)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of FSDP with sharded state dicts, of one process."""
    folder = tmp_path / "checkpoint-4"
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        with pytest.warns(UserWarning, match="single process"):
            write_shards(folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    torch.save({"last_epoch": 4}, folder / "scheduler.pt")
    torch.save({"python": 1}, folder / "rng_state.pth")
    return folder


def test_a_sharded_checkpoint_without_a_manifest_is_complete(checkpoint: Path) -> None:
    verdict = verify_checkpoint(checkpoint)
    assert (verdict.status, verdict.loadable, verdict.resumable) == ("complete", True, True)


SHARD = "__0_0.distcp"
CASES: dict[str, tuple[Damage, str, bool]] = {
    "shard of the weights": (
        lambda folder: (folder / "pytorch_model_fsdp_0" / SHARD).unlink(),
        r"`pytorch_model_fsdp_0/__0_0.distcp` \(shard of rank 0\) is missing",
        False,
    ),
    "shard of the optimizer": (
        lambda folder: (folder / "optimizer_0" / SHARD).unlink(),
        r"`optimizer_0/__0_0.distcp` \(shard of rank 0\) is missing",
        True,
    ),
    "shard that is too short": (
        lambda folder: os.truncate(folder / "optimizer_0" / SHARD, 100),
        r"`optimizer_0/__0_0.distcp` \(shard of rank 0\) is too short: 100 bytes instead of at least",
        True,
    ),
    "empty shard": (
        lambda folder: os.truncate(folder / "optimizer_0" / SHARD, 0),
        r"`optimizer_0/__0_0.distcp` \(shard of rank 0\) is empty",
        True,
    ),
    "list of the shards": (
        lambda folder: (folder / "pytorch_model_fsdp_0" / ".metadata").unlink(),
        r"`pytorch_model_fsdp_0/.metadata` is missing, the list of the shards",
        False,
    ),
    "list that is cut": (
        lambda folder: os.truncate(folder / "optimizer_0" / ".metadata", 200),
        r"`optimizer_0/.metadata` (is not complete|names no shards)",
        True,
    ),
    "list of something else": (
        lambda folder: (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        r"`optimizer_0/.metadata` names no shards",
        True,
    ),
    "schedule": (lambda folder: (folder / "scheduler.pt").unlink(), r"`scheduler.pt` is missing", True),
    "random states": (
        lambda folder: (folder / "rng_state.pth").unlink(),
        r"`rng_state.pth` is missing",
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_is_named_with_its_rank(checkpoint: Path, case: str) -> None:
    """Without a manifest, as the stock Trainer saves it."""
    damage, words, loadable = CASES[case]
    damage(checkpoint)
    verdict = verify_checkpoint(checkpoint)
    assert (verdict.status, verdict.loadable, verdict.resumable) == ("incomplete", loadable, False)
    assert len(verdict.problems) == 1
    assert re.search(words, verdict.reason)


@pytest.mark.parametrize("case", ["shard of the weights", "list of the shards", "shard that is too short"])
def test_no_manifest_is_written_for_it(checkpoint: Path, case: str) -> None:
    """A checkpoint with a part that is missing never counts."""
    build_manifest(checkpoint, **PLACE, weights=True, training_state=True)
    CASES[case][0](checkpoint)
    with pytest.raises(CheckpointSaveError, match=r"shard of rank 0|list of the shards"):
        build_manifest(checkpoint, **PLACE, weights=True, training_state=True)


def test_the_list_of_the_shards_is_not_unpickled(checkpoint: Path, tmp_path: Path) -> None:
    """It is a pickle, and a pickle can run anything."""

    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "it ran"),)

    (checkpoint / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    assert verify_checkpoint(checkpoint).status == "incomplete"
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_without_those_of_ranks_on_another_disk_are_no_checkpoint(checkpoint: Path, rank: int) -> None:
    """PyTorch writes the list of the shards once, and every rank needs it: neither disk can be resumed from."""
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        if rank == 1:
            (checkpoint / name / SHARD).rename(checkpoint / name / "__1_0.distcp")
            (checkpoint / name / ".metadata").unlink()
        else:
            (checkpoint / name / SHARD).unlink()
    (checkpoint / "rng_state.pth").rename(checkpoint / f"rng_state_{rank}.pth")
    assert verify_checkpoint(checkpoint).status == "incomplete"
    with pytest.raises(CheckpointSaveError, match=r"shard of rank 0|list of the shards that all ranks write"):
        build_manifest(checkpoint, **{**PLACE, "world_size": 2}, ranks=(rank,), weights=True)


def test_full_state_dicts_are_archives(checkpoint: Path) -> None:
    """One file of all weights, one of the optimizer."""
    for name, path in (("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"), ("optimizer_0", "optimizer.bin")):
        for file in (checkpoint / name).iterdir():
            file.unlink()
        (checkpoint / name).rmdir()
        torch.save(TENSORS, checkpoint / path)
    assert verify_checkpoint(checkpoint).resumable
    os.truncate(checkpoint / "optimizer.bin", 100)
    verdict = verify_checkpoint(checkpoint)
    assert (verdict.status, verdict.loadable) == ("incomplete", True)
    assert "`optimizer.bin` is not a complete archive" in verdict.reason


@pytest.fixture(params=[2, 3])
def deepspeed_checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """A checkpoint of DeepSpeed as two ranks save it, and the stage of ZeRO."""
    stage = request.param
    folder = tmp_path / "checkpoint-4"
    state = folder / "global_step4"
    state.mkdir(parents=True)
    (folder / "latest").write_text("global_step4")
    for rank in range(2):
        torch.save({"optimizer_state_dict": rank}, state / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        weights = (
            f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        )
        torch.save({"module": {}}, state / weights)
        torch.save({"python": 1}, folder / f"rng_state_{rank}.pth")
    (folder / "trainer_state.json").write_text('{"global_step": 4}')
    torch.save({"last_epoch": 4}, folder / "scheduler.pt")
    return folder, stage


def test_a_checkpoint_of_deepspeed_without_a_manifest_is_complete(
    deepspeed_checkpoint: tuple[Path, int],
) -> None:
    verdict = verify_checkpoint(deepspeed_checkpoint[0])
    assert (verdict.status, verdict.resumable) == ("complete", True)


def test_a_missing_part_of_a_rank_of_deepspeed_is_named_with_it(
    deepspeed_checkpoint: tuple[Path, int],
) -> None:
    folder, stage = deepspeed_checkpoint
    parts = {"optim": "the part of rank 1 of the optimizer"}
    if stage == 3:
        parts["model"] = "the part of rank 1 of the weights"
    for kind, what in parts.items():
        file = folder / "global_step4" / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt"
        content = file.read_bytes()
        file.unlink()
        verdict = verify_checkpoint(folder)
        assert not verdict.resumable
        assert what in verdict.reason
        file.write_bytes(content)
    assert verify_checkpoint(folder).resumable
