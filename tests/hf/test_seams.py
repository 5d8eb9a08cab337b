"""A Transformers that was not tested is checked for what the guards need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import Trainer

from hf_divguard import DivGuardError
from hf_divguard.hf import seams
from hf_divguard.hf.seams import NEWEST_TESTED, OLDEST_TESTED, SEAMS, check_host, missing_seams
from hf_divguard.hf.trainer import DivGuardMixin

OPTIONAL = {"_rotate_checkpoints", "_finalize_training", "_sorted_checkpoints"}
"""What only some of the tested versions have; ``hf/host.py`` looks for it."""
PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_memory() -> None:
    seams._check_untested.cache_clear()


def test_the_present_version_has_every_seam_and_is_in_the_tested_range() -> None:
    assert missing_seams(Trainer) == []
    numbers = tuple(int(each) for each in transformers.__version__.split(".")[:2])
    assert OLDEST_TESTED <= numbers <= NEWEST_TESTED


def test_every_method_that_the_mixin_extends_is_checked() -> None:
    extended = {name for name in vars(DivGuardMixin) if callable(getattr(Trainer, name, None))}
    public = {"__init__", "__init_subclass__", "__doc__", "train", "log", "save_model"}
    assert {name for name in extended if not name.startswith("__")} - OPTIONAL - public <= set(SEAMS)


@pytest.mark.parametrize("version", ["5.99.0", "4.12.0.dev0", "6.0.0rc1"])
def test_an_untested_version_that_has_everything_gets_one_warning(version: str, our_log: Any) -> None:
    check_host(version)
    check_host(version)
    assert our_log.text.count(f"found {version}") == 1


def test_a_tested_version_gets_no_line(our_log: Any) -> None:
    check_host(f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1]}.7")
    assert our_log.text == ""


def test_a_version_without_a_seam_is_refused_by_the_name_of_the_method(
    monkeypatch: pytest.MonkeyPatch, make_trainer: Any
) -> None:
    monkeypatch.delattr(Trainer, "_maybe_log_save_evaluate")
    monkeypatch.setattr(seams.check_host, "__defaults__", ("5.99.0",))
    with pytest.raises(DivGuardError, match=r"found 5\.99\.0.*`_maybe_log_save_evaluate`"):
        make_trainer()


def test_a_method_that_is_there_but_never_called_is_missing() -> None:
    assert missing_seams(Trainer, ["_save", "__class__"]) == ["__class__"]


def test_the_range_is_that_of_the_documentation() -> None:
    page = (PROJECT / "docs" / "versions.md").read_text(encoding="utf-8")
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_TESTED, NEWEST_TESTED))
    assert re.search(rf"\| Transformers \| {re.escape(oldest)} to .*{re.escape(newest)}", page)
