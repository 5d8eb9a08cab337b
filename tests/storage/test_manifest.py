from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_divguard.errors import CheckpointSaveError
from hf_divguard.storage.manifest import (
    FileEntry,
    Manifest,
    ManifestError,
    build_manifest,
    read_manifest,
    write_manifest,
)
from hf_divguard.storage.manifest_check import check_manifest
from hf_divguard.storage.names import INCOMPLETE_NAME, MANIFEST_NAME
from hf_divguard.storage.record import sealed

PLACE = {"step": 20, "run_id": "run", "sequence": 1, "world_size": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-20"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345678")
    (folder / "sub" / "deep" / "shard.bin").write_bytes(b"123")
    return folder


def test_a_manifest_names_every_file_by_its_posix_path_but_itself_and_unfinished_ones(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text("{}")
    (folder / "_divguard_tmp-x").write_text("")
    (folder / INCOMPLETE_NAME).write_text("in progress")
    manifest = build_manifest(folder, **PLACE)
    assert manifest.files == {"model.safetensors": FileEntry(8), "sub/deep/shard.bin": FileEntry(3)}


@pytest.mark.parametrize("checksums", [False, True])
def test_everything_in_a_manifest_comes_back(folder: Path, checksums: bool) -> None:
    manifest = build_manifest(
        folder,
        **PLACE,
        metric_name="eval_loss",
        metric=float("inf"),
        greater_is_better=False,
        checksums=checksums,
    )
    write_manifest(folder, manifest, flush=True)
    assert read_manifest(folder) == manifest
    assert check_manifest(folder, manifest) == {}


def test_a_name_that_is_not_text_comes_back(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.bin")).write_bytes(b"1")
    write_manifest(folder, build_manifest(folder, **PLACE))
    assert check_manifest(folder, read_manifest(folder)) == {}


@pytest.mark.parametrize("kind", ["link to a folder", "link to nothing", "fifo"])
def test_what_is_not_a_file_is_not_certified(folder: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(folder / "odd")
    else:
        (folder / "odd").symlink_to("/etc" if kind == "link to a folder" else "/no/such/file")
    with pytest.raises(CheckpointSaveError, match="'odd'"):
        build_manifest(folder, **PLACE)


def test_a_missing_random_state_of_one_rank_is_not_certified(folder: Path) -> None:
    for rank in (0, 1, 3):
        (folder / f"rng_state_{rank}.pth").write_bytes(b"1")
    with pytest.raises(CheckpointSaveError, match=r"rng_state_2.pth` \(random state of rank 2\)"):
        build_manifest(folder, **{**PLACE, "world_size": 4})
    assert build_manifest(folder, **{**PLACE, "world_size": 4}, ranks=(0, 1, 3)).ranks == (0, 1, 3)


@pytest.mark.parametrize("flush", [False, True])
def test_the_manifest_is_the_last_thing_written(
    folder: Path, flush: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_replace, real_fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b).name), real_replace(a, b))[1])
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), real_fsync(fd))[1],
    )
    write_manifest(folder, build_manifest(folder, **PLACE), flush=flush)
    at = done.index(MANIFEST_NAME)
    if flush:
        assert {"model.safetensors", "shard.bin", "deep", "sub"} <= set(done[:at])
        assert done[-1] == "checkpoint-20"
    else:
        assert done == [MANIFEST_NAME]


def test_each_kind_of_damage_is_described_in_words(folder: Path) -> None:
    for name in ("gone", "short", "long", "empty", "changed", "link", "dir"):
        (folder / name).write_bytes(b"abcd")
    for rank in (0, 1):
        (folder / f"rng_state_{rank}.pth").write_bytes(b"1")
    manifest = build_manifest(folder, **{**PLACE, "world_size": 2}, checksums=True)
    (folder / "gone").unlink()
    (folder / "short").write_bytes(b"abc")
    (folder / "long").write_bytes(b"abcde")
    (folder / "empty").write_bytes(b"")
    (folder / "changed").write_bytes(b"abcD")
    (folder / "link").unlink()
    (folder / "link").symlink_to("nowhere")
    (folder / "dir").unlink()
    (folder / "dir").mkdir()
    (folder / "rng_state_1.pth").unlink()
    assert list(check_manifest(folder, manifest).values()) == [
        "`changed` has other contents than when it was saved: its xxh3_128_64m differs",
        "`dir` is a folder instead of a file",
        "`empty` is empty: 0 bytes instead of 4",
        "`gone` is missing",
        "`link` is missing",
        "`long` is too long: 5 bytes instead of 4",
        "`rng_state_1.pth` (random state of rank 1) is missing",
        "`short` is too short: 3 bytes instead of 4",
    ]
    assert "changed" not in check_manifest(folder, manifest, checksums=False)


def test_a_shard_that_is_missing_is_named_with_its_rank(folder: Path) -> None:
    files = {
        "global_step20/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt": FileEntry(1),
        "pytorch_model_fsdp_0/__2_0.distcp": FileEntry(1),
    }
    words = " ".join(check_manifest(folder, Manifest(**PLACE, files=files)).values())
    assert "shard of rank 3" in words
    assert "shard of rank 2" in words


def test_a_manifest_of_another_step_is_a_problem(folder: Path) -> None:
    write_manifest(folder, replace(build_manifest(folder, **PLACE), step=10))
    assert check_manifest(folder, read_manifest(folder)) == {
        MANIFEST_NAME: "`divguard_manifest.json` is of step 10, not of checkpoint-20"
    }


def test_a_folder_behind_a_symbolic_link_is_not_looked_into(folder: Path, tmp_path: Path) -> None:
    manifest = build_manifest(folder, **PLACE)
    (folder / "sub").rename(tmp_path / "elsewhere")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    name = "sub/deep/shard.bin"
    assert check_manifest(folder, manifest) == {name: f"`{name}` stands in a folder that is a symbolic link"}


OUTSIDE = [
    "/etc/passwd",
    "../outside",
    "a/../../b",
    "a/./b",
    "",
    "a//b",
    "a/",
    "..",
    "C:/x",
    "c:x",
    "a\\b",
    "\\\\host\\x",
    "a\0b",
    "\ud800",
    "x" * 5000,
    "a/" * 2000 + "b",
    MANIFEST_NAME,
    "_divguard_tmp-1",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_a_path_that_leads_outside_is_refused_on_reading_and_on_checking(folder: Path, name: str) -> None:
    write_manifest(folder, build_manifest(folder, **PLACE))
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["files"][name] = {"size": 1, "digest": None}
    (folder / MANIFEST_NAME).write_text(json.dumps(sealed(data)))
    with pytest.raises(ManifestError, match="file name"):
        read_manifest(folder)
    assert len(check_manifest(folder, Manifest(**PLACE, files={name: FileEntry(1)}))) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", []),
        ("files", {"a": 1}),
        ("files", {"a": {"size": -1}}),
        ("files", {"a": {"size": "1"}}),
        ("files", {"a": {"size": 1, "digest": "xyz"}}),
        ("files", {"a": {"size": 1, "digest": 5}}),
        ("files", {"a": {"size": 1, "digest": "0" * 64}}),
        ("algorithm", "rot13"),
        ("algorithm", None),
        ("ranks", [-1]),
        ("ranks", "0"),
        ("ranks", [True]),
        ("world_size", 2.0),
        ("format", 99),
        ("format", None),
        ("quarantine", []),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(folder: Path, key: str, value: object) -> None:
    write_manifest(folder, build_manifest(folder, **PLACE))
    data = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(sealed({**data, key: value})))
    with pytest.raises(ManifestError):
        read_manifest(folder)


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_of_a_manifest_goes_by_unnoticed(folder: Path, bit: int) -> None:
    manifest = build_manifest(folder, **PLACE, metric_name="eval_loss", metric=0.5, checksums=True)
    write_manifest(folder, manifest)
    data = (folder / MANIFEST_NAME).read_bytes()
    for place in range(len(data)):
        flipped = bytes((*data[:place], data[place] ^ (1 << bit), *data[place + 1 :]))
        (folder / MANIFEST_NAME).write_bytes(flipped)
        try:
            found = read_manifest(folder)
        except ManifestError:
            continue
        assert found == manifest, flipped


RESUMABLE = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")


@pytest.mark.parametrize("gone", [None, *RESUMABLE])
def test_a_checkpoint_is_certified_only_if_it_holds_what_the_save_was_to_hold(
    gone: str | None, tmp_path: Path
) -> None:
    for name in RESUMABLE:
        if name != gone:
            (tmp_path / name).write_bytes(b"1")
    if gone is None:
        build_manifest(tmp_path, **PLACE, weights=True, training_state=True)
        return
    words = "the weights of the model" if gone == "model.safetensors" else f"`{gone}`"
    with pytest.raises(CheckpointSaveError, match=words) as caught:
        build_manifest(tmp_path, **PLACE, weights=True, training_state=True)
    assert "another process" in str(caught.value)
    build_manifest(tmp_path, **PLACE)


@pytest.mark.parametrize(
    "names",
    [
        ["adapter_model.safetensors"],
        ["german/adapter_model.safetensors"],
        ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
        ["my_model.pt"],
        [
            "latest",
            "global_step20/mp_rank_00_model_states.pt",
            "global_step20/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        ],
    ],
    ids=lambda names: names[0],
)
def test_weights_in_files_of_other_names_are_weights(names: list[str], tmp_path: Path) -> None:
    foreign = "latest" in names
    for name in [*names, "trainer_state.json", "rng_state.pth", *(() if foreign else RESUMABLE[1:3])]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
        if foreign and name.endswith("_states.pt"):
            torch.save({}, tmp_path / name)
    if foreign:  # as DeepSpeed writes it: which folder holds the state
        (tmp_path / "latest").write_text("global_step20")
    build_manifest(tmp_path, **PLACE, weights=True, training_state=True)
    (tmp_path / "trainer_state.json").unlink()
    with pytest.raises(CheckpointSaveError, match=r"`trainer_state.json`"):
        build_manifest(tmp_path, **PLACE, weights=True, training_state=True)


def test_a_manifest_with_sha256_is_still_compared(folder: Path) -> None:
    from hf_divguard.storage.checksums import file_digest

    digest = file_digest(folder / "model.safetensors", "sha256")
    manifest = Manifest(**PLACE, files={"model.safetensors": FileEntry(8, digest)}, algorithm="sha256")
    write_manifest(folder, manifest)
    assert check_manifest(folder, read_manifest(folder)) == {}
    (folder / "model.safetensors").write_bytes(b"12345679")
    assert "sha256 differs" in check_manifest(folder, read_manifest(folder))["model.safetensors"]


def test_a_certified_file_that_is_a_link_is_compared_with_what_it_leads_to(
    folder: Path, tmp_path: Path
) -> None:
    manifest = build_manifest(folder, **PLACE, checksums=True)
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert check_manifest(folder, manifest) == {}
    assert build_manifest(folder, **PLACE, checksums=True).files == manifest.files
    (tmp_path / "blob").write_bytes(b"x")
    assert "too short" in check_manifest(folder, manifest)["model.safetensors"]
