"""``python -m hf_divguard.cli``."""

from __future__ import annotations

import sys

from hf_divguard.cli.main import main

sys.exit(main())
