"""Errors as a script meets them."""

from __future__ import annotations

import pytest

from hf_divguard.errors import DIVERGED_EXIT_CODE, TrainingDivergedError, exit_on_divergence
from tests.processes import run_python


def test_a_diverged_script_ends_with_a_code_of_its_own_and_the_sentence_on_stderr() -> None:
    """No traceback; the code is the documented one."""
    script = (
        "from hf_divguard import TrainingDivergedError, exit_on_divergence\n"
        "with exit_on_divergence():\n"
        "    raise TrainingDivergedError('Training was given up at step 590.')\n"
    )
    done = run_python("-c", script)
    assert done.returncode == DIVERGED_EXIT_CODE == 79
    assert done.stderr == "Training was given up at step 590.\n"


def test_other_errors_pass_through() -> None:
    """A crash stays a crash."""
    with pytest.raises(KeyError), exit_on_divergence():
        raise KeyError("loss")


def test_a_run_that_ends_well_goes_on() -> None:
    """Nothing happens where nothing was given up."""
    with exit_on_divergence():
        done = True
    assert done


def test_the_error_behind_the_exit_is_kept() -> None:
    """Whoever catches the exit can still read the finding."""
    error = TrainingDivergedError("Training was given up.")
    with pytest.raises(SystemExit) as caught, exit_on_divergence():
        raise error
    assert caught.value.__cause__ is error
