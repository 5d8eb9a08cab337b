"""What a benchmark ran on: versions and machine, for the pages with its results."""

from __future__ import annotations

import os
import platform

import torch
import transformers

import hf_divguard

__all__ = ["machine"]


def machine() -> str:
    """Return one sentence with the versions and the machine."""
    return (
        f"hf_divguard {hf_divguard.__version__}, Transformers {transformers.__version__}, PyTorch "
        f"{torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()} with "
        f"{os.cpu_count()} cores."
    )
