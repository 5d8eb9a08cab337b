"""The scripts here are run by tests, and import what not every environment has."""

from __future__ import annotations

collect_ignore_glob = ["*.py"]
