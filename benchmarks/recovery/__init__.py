"""Faults, data switches and healthy runs: what a guard does to a run, judged against an oracle.

``python -m benchmarks.recovery --help`` lists the options. The kinds are split into two halves: constants of the
guard may be chosen on the *design* half, figures are reported on the *judge* half. The halves share no model, no
fault, no switch and no healthy kind, so a good figure on the second half is not a fit to the first.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
