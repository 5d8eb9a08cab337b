"""Manifests, sidecars and weight headers of a stranger: any bytes end in a verdict or a declared error.

``DIVGUARD_FUZZ_EXAMPLES`` sets how many examples each target gets.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_divguard.storage.checkpoints import best_checkpoints, find_checkpoints, verify_checkpoint
from hf_divguard.storage.manifest import ManifestError, read_manifest
from hf_divguard.storage.manifest_check import check_manifest
from hf_divguard.storage.names import MANIFEST_NAME, SIDECAR_NAME
from hf_divguard.storage.quarantine import quarantine
from hf_divguard.storage.record import sealed
from hf_divguard.storage.sidecar import SidecarError, read_sidecar, write_sidecar
from hf_divguard.storage.verdict import Status

from .conftest import certify, records_of, sidecar_of, small_checkpoint, tree

EXAMPLES = int(os.environ.get("DIVGUARD_FUZZ_EXAMPLES", "600"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=5000,
    database=None,
    derandomize=EXAMPLES <= 600,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NAMES = [
    "../../outside/secret",
    "/etc/passwd",
    "..",
    "a/../../../outside/secret",
    "link/secret",
    "C:\\x",
    "\0",
    "a" * 300,
    "a/" * 2000 + "b",
    "weights.dat",
    "weights.dat/x",
    "\udcff",
    "\ud800",
    "rng_state_99999999999.pth",
    "",
    MANIFEST_NAME,
]

ATOMS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [2**63, -1, 10**18, 10**400, 1e308, 0.5, "NaN", {"__float__": "NaN"}, {"__float__": []}]
    )
    | st.text(max_size=8)
    | st.sampled_from(NAMES)
)
# Copied, because what is drawn is changed in place afterwards.
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
).map(copy.deepcopy)


@st.composite
def mutated_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """Draw ``valid`` with pieces flipped, cut out, doubled or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "double", "insert", "end"]))
        length = draw(st.integers(1, 40))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "double":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
        elif kind == "insert":
            tokens = [
                b"[",
                b"{",
                b"}",
                b'"',
                b"\\",
                b"NaN",
                b"1e999",
                b"9" * 5000,
                b'{"a":' * 99,
                b"[" * 9999,
                b"\xff",
                b"\0",
            ]
            data[at:at] = draw(st.sampled_from(tokens) | st.binary(max_size=20))
        else:
            del data[at:]
    return bytes(data)


def _places(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield from _places(entry, (*path, key))


@st.composite
def mutated_structure(draw: st.DrawFn, valid: bytes) -> bytes:
    """Draw ``valid`` with values replaced, removed or added, its own checksum right or wrong."""
    data = json.loads(valid)
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(list(_places(data))))
        if not path:
            data[draw(st.sampled_from(sorted(data)) | st.text(max_size=5))] = draw(VALUES)
            continue
        parent: Any = data
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "remove", "rename"]))
        if action == "replace":
            parent[path[-1]] = draw(VALUES)
        else:
            entry = parent.pop(path[-1])
            if action == "rename" and isinstance(parent, dict):
                parent[draw(st.text(max_size=6) | st.sampled_from(NAMES))] = entry
    if draw(st.integers(0, 4)):
        with contextlib.suppress(ValueError):
            data = sealed(data)
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(data).encode()
    finally:
        sys.set_int_max_str_digits(4300)


class Watch:
    """Notes every file that is opened, listed or changed outside a folder while it is on."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.inside is None or not event.startswith(("open", "os.", "shutil.")):
            return
        for argument in arguments[:2]:
            if isinstance(argument, (str, bytes, os.PathLike)) and os.sep in os.fsdecode(argument):
                path = os.path.realpath(os.fsdecode(argument))
                if not path.startswith(self.inside) and not path.endswith((".py", ".pyc")):
                    self.outside.append(f"{event} {path}")

    @contextlib.contextmanager
    def on(self, inside: Path) -> Iterator[None]:
        self.inside = os.path.realpath(inside)
        try:
            yield
        finally:
            self.inside = None


WATCH = Watch()


class Guarded:
    """A run folder with one checkpoint, beside a folder that nothing may touch."""

    def __init__(self, root: Path) -> None:
        self.run = root / "run"
        self.folder = certify(
            small_checkpoint(self.run / "checkpoint-20"), checksums=True, records=records_of(10, 20, m10=0.5)
        )
        write_sidecar(
            self.folder,
            sidecar_of(
                20,
                metric_name="eval_loss",
                metric=0.5,
                records=records_of(10, 20, m10=0.7),
                callbacks={"Detector": {"ema": 1.5, "seen": [1, 2, {"__float__": "NaN"}]}},
            ),
        )
        (root / "outside").mkdir()
        (root / "outside" / "secret").write_text("secret")
        (self.folder / "link").symlink_to(root / "outside")
        self.valid = {name: (self.folder / name).read_bytes() for name in (MANIFEST_NAME, SIDECAR_NAME)}
        self.root = root

    def examine(self, name: str, data: bytes, read: Callable[[], object], declared: type[Exception]) -> None:
        (self.folder / name).write_bytes(data)
        before = tree(self.root)
        WATCH.outside.clear()
        with WATCH.on(self.run):
            with contextlib.suppress(declared):
                read()
            verdict = verify_checkpoint(self.folder)
            assert verdict.status in get_args(Status)
            assert verdict.reason
            str(verdict.reason).encode("utf-8", "surrogateescape")
            find_checkpoints(self.run)
            with contextlib.suppress(ValueError):
                best_checkpoints(self.run)
        assert WATCH.outside == []
        assert tree(self.root) == before
        (self.folder / name).write_bytes(self.valid[name])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    return Guarded(tmp_path_factory.mktemp("guarded"))


def test_the_watch_sees_what_happens_outside(guarded: Guarded) -> None:
    WATCH.outside.clear()
    with WATCH.on(guarded.run):
        (guarded.folder / "weights.dat").read_bytes()
        assert WATCH.outside == []
        os.listdir(guarded.folder / "link")
        (guarded.folder / ".." / ".." / "outside" / "secret").read_text()
    assert len(WATCH.outside) == 2


def _read_and_check(folder: Path) -> None:
    check_manifest(folder, read_manifest(folder))


@pytest.mark.parametrize("how", [mutated_bytes, mutated_structure])
@pytest.mark.parametrize("name", [MANIFEST_NAME, SIDECAR_NAME])
def test_a_fuzzed_file_of_ours_ends_in_a_verdict_and_touches_nothing_outside(
    name: str, how: Callable[[bytes], st.SearchStrategy[bytes]], guarded: Guarded
) -> None:
    @fuzzed
    @given(how(guarded.valid[name]))
    def run(data: bytes) -> None:
        if name == MANIFEST_NAME:
            guarded.examine(name, data, lambda: _read_and_check(guarded.folder), ManifestError)
        else:
            guarded.examine(name, data, lambda: read_sidecar(guarded.folder), SidecarError)

    run()


@fuzzed
@given(st.binary(max_size=400) | VALUES.map(lambda value: repr(value).encode("utf-8", "replace")))
def test_random_bytes_as_a_manifest_are_refused(guarded: Guarded, data: bytes) -> None:
    guarded.examine(MANIFEST_NAME, data, lambda: _read_and_check(guarded.folder), ManifestError)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"])
def test_a_fuzzed_file_of_a_stock_checkpoint_ends_in_a_verdict(name: str, run_dir: Path) -> None:
    folder = run_dir / "checkpoint-4"
    valid = (folder / name).read_bytes()

    @settings(fuzzed, max_examples=max(50, EXAMPLES // 3))
    @given(mutated_bytes(valid))
    def run(data: bytes) -> None:
        (folder / name).write_bytes(data)
        for checksums in (False, True):
            assert verify_checkpoint(folder, checksums=checksums).status in ("complete", "incomplete")
        best_checkpoints(run_dir)

    run()


@settings(fuzzed, max_examples=max(50, EXAMPLES // 3))
@given(st.data())
def test_a_fuzzed_checkpoint_can_still_be_quarantined(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("q")
    folder = certify(small_checkpoint(root / "checkpoint-20"))
    for name in (MANIFEST_NAME, SIDECAR_NAME):
        if data.draw(st.booleans()):
            how = data.draw(st.sampled_from([mutated_bytes, mutated_structure]))
            (folder / name).write_bytes(data.draw(how((folder / name).read_bytes())))
    quarantine(folder, reason="It diverged.", onset_step=3)
    verdict = verify_checkpoint(folder)
    assert verdict.status == "quarantined"
    assert not verdict.resumable
    shutil.rmtree(root)
