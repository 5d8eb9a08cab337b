"""What lets FSDP run on CPU: accelerate allows it only for accelerators.

The two methods of accelerate are patched in the running process, never in an installed file. The
table in ``docs/engines.md`` says that its rows were run so.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import textwrap
from typing import Any

import pytest
import transformers

from tests.processes import free_port

NEEDS_TRANSFORMERS_5 = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="Transformers 4 sets FSDP up by the environment, and accelerate then asks for an accelerator",
)
"""For tests of FSDP on CPU."""


def _with_replaced(owner: type, method: str, old: str, new: str) -> None:
    """Compile a method again with one replaced piece of its source, which must be there."""
    function = inspect.unwrap(getattr(owner, method))
    source = textwrap.dedent(inspect.getsource(function))
    if new in source:
        return
    assert old in source, f"{owner.__name__}.{method} of this version of accelerate has no {old!r}"
    code = compile(source.replace(old, new), inspect.getsourcefile(function) or "<patched>", "exec")
    scope: dict[str, Any] = {}
    exec(code, sys.modules[owner.__module__].__dict__, scope)
    setattr(owner, method, scope[method])


@functools.cache
def allow_fsdp_on_cpu() -> None:
    """Let accelerate use FSDP on several CPU processes, in this process only."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    kinds = "DistributedType.MULTI_NEURON,\n"
    _with_replaced(AcceleratorState, "__init__", kinds, f"DistributedType.MULTI_CPU, {kinds}")
    device = '"device_id": self.device,'
    _with_replaced(Accelerator, "prepare_model", device, '"device_id": __import__("torch").device("cpu"),')


def become_the_only_rank() -> None:
    """Make this process the only rank of a run that is distributed all the same."""
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", **port)


def fsdp_options(version: int = 2, state_dict: str = "SHARDED_STATE_DICT", **config: Any) -> dict[str, Any]:
    """Return the arguments of a run under FSDP."""
    return {
        "fsdp": True if version == 2 else "full_shard auto_wrap",
        "fsdp_config": {
            "version": version,
            "transformer_layer_cls_to_wrap": ["GPT2Block"],
            "state_dict_type": state_dict,
            **config,
        },
    }
