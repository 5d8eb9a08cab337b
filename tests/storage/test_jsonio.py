from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_divguard.storage.jsonio import (
    encode_json,
    from_strict,
    parse_json,
    read_json,
    to_strict,
    write_json_atomic,
)
from hf_divguard.storage.sidecar import Sidecar, read_sidecar, write_sidecar

LIMITS = {"max_bytes": 1 << 20}

REFUSED = {
    "empty": (b"", "complete JSON"),
    "cut off": (b'{"step": 1', "complete JSON"),
    "not an object": (b"[1]", "JSON object, found a list"),
    "bare NaN": (b'{"a": NaN}', "not a JSON number"),
    "bare Infinity": (b'{"a": -Infinity}', "not a JSON number"),
    "float out of range": (b'{"a": 1e999}', "too large"),
    "same key twice": (b'{"a": 1, "b": 2, "a": 3}', "'a' stands twice"),
    "too deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested so deeply"),
    "too deep and cut": (b'{"a": ' + b"[" * 500_000, "nested so deeply"),
    "huge integer": (b'{"a": ' + b"9" * 100_000 + b"}", "100000 digits"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', "UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "two values": (b"{} {}", "complete JSON"),
    "control character": (b'{"a": "\x01"}', "complete JSON"),
    "larger than allowed": (b'{"a": "' + b"x" * (1 << 20) + b'"}', "at most 1048576 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_strict_json_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    data, words = REFUSED[name]
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_json(path, **LIMITS)


def test_a_link_to_a_file_is_read_through_and_one_to_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to("real.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    assert read_json(tmp_path / "link.json", **LIMITS) == {"a": 1}
    with pytest.raises(ValueError, match="a socket or device"):
        read_json(tmp_path / "device.json", **LIMITS)


def test_a_fifo_is_refused_at_once_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    started = time.monotonic()
    with pytest.raises(ValueError, match="a FIFO"):
        read_json(tmp_path / "fifo.json", **LIMITS)
    assert time.monotonic() - started < 1


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=r"folder|directory"):
        read_json(tmp_path, **LIMITS)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing.json", **LIMITS)


def test_trainer_state_may_hold_nan_tokens_when_asked_for() -> None:
    value = parse_json(b'{"loss": NaN, "best": -Infinity}', what="it", allow_nan=True)
    assert math.isnan(value["loss"])
    assert value["best"] == -math.inf


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**4000), 2**4000) | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.sampled_from(["__float__", "__dict__"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(JSON_VALUES)
def test_every_value_comes_back_as_it_was(value: object) -> None:
    data = encode_json({"value": to_strict(value)})
    back = from_strict(parse_json(data, what="it")["value"])
    assert repr(back) == repr(value)


def test_tuples_come_back_as_lists() -> None:
    assert from_strict(to_strict((1, (2, 3)))) == [1, [2, 3]]


def test_numpy_scalars_and_tensors_without_dimension_become_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    value = {
        "f32": numpy.float32(0.5),
        "f64": numpy.float64("nan"),
        "i64": numpy.int64(7),
        "bool": numpy.bool_(True),
        "array": numpy.array(3.0),
        "tensor": torch.tensor(2.5, requires_grad=True),
        "inf": torch.tensor(float("inf")),
    }
    strict = to_strict(value)
    json.dumps(strict, allow_nan=False)
    back = from_strict(strict)
    assert (back["f32"], back["i64"], back["bool"], back["array"], back["tensor"]) == (0.5, 7, True, 3.0, 2.5)
    assert math.isnan(back["f64"])
    assert back["inf"] == math.inf


class _Broken:
    def item(self) -> object:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [1, {2}]}, r"`value\['a'\]\[1\]` .* got set"),
        ({"a": b"x"}, "got bytes"),
        ({1: "x"}, "strings as keys, got 1"),
        ({"a": {"b": object()}}, r"`value\['a'\]\['b'\]`"),
        ([1j], "got complex"),
        ([_Broken()], r"`value\[0\]` .* not a single number"),
        (1 << 5000, "4096 bits"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(value: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        to_strict(value)


def test_a_list_that_holds_itself_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(TypeError, match="does it hold itself"):
        to_strict(loop)


def test_a_written_file_is_read_back_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"x": 1}, flush=True)
    write_json_atomic(tmp_path / "a.json", {"x": 2})
    assert read_json(tmp_path / "a.json", **LIMITS) == {"x": 2}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_written_file_has_the_mode_of_a_normal_one(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_json_atomic(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "a.json").st_mode) == 0o666 & ~mask


def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json_atomic(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(tmp_path / "a.json", {"x": 2})
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_folder_that_cannot_be_flushed_does_not_fail_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise PermissionError(13, "Permission denied")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json_atomic(tmp_path / "a.json", {"x": 1}, flush=True)
    assert read_json(tmp_path / "a.json", **LIMITS) == {"x": 1}


def test_what_is_not_strict_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "a.json", {"x": math.nan})
    assert os.listdir(tmp_path) == []


_WRITER = """
import resource, sys
from hf_divguard.storage.sidecar import Sidecar, write_sidecar
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_sidecar(sys.argv[1], Sidecar(step=2, run_id="b", sequence=2, callbacks={"big": ["x" * 100] * 100}))
except OSError as error:
    print(error.strerror)
"""


def test_a_real_limit_of_the_file_size_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_sidecar(tmp_path, Sidecar(step=1, run_id="a", sequence=1))
    done = subprocess.run([sys.executable, "-c", _WRITER, tmp_path], capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert os.listdir(tmp_path) == ["divguard_state.json"]
    assert read_sidecar(tmp_path).step == 1
