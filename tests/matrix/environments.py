"""Runs the table of compatibility in an environment for each set of versions, and writes it as a page.

    python tests/matrix/environments.py            # every environment whose Python is on this machine
    python tests/matrix/environments.py --short    # the oldest and the newest versions only
    python tests/matrix/environments.py --table    # write docs/compatibility.md from the results that are there

Environments are made in ``.compat/``. Results go to ``docs/compatibility/<name>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "docs" / "compatibility"
PAGE = PROJECT / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Environment:
    """A set of versions.

    Args:
        name: Name of its folder and of its results.
        python: Version of Python.
        packages: What pip installs beside PyTorch and hf_divguard.
        is_short: Whether ``--short`` runs it.
    """

    name: str
    python: str
    packages: tuple[str, ...]
    is_short: bool = False


OLDEST = ("transformers==4.57.0", "accelerate==1.3.0", "peft==0.17.1")
NEWEST = ("transformers<6", "accelerate", "peft")
ALL = (*NEWEST, "trl", "sentence-transformers")

ENVIRONMENTS = (
    Environment("newest", "3.11", ALL, is_short=True),
    Environment("oldest", "3.11", OLDEST, is_short=True),
    Environment(
        "newest-accelerate-oldest-transformers",
        "3.11",
        ("transformers==4.57.0", "accelerate", "peft==0.17.1"),
    ),
    Environment("python-3.10", "3.10", NEWEST),
    Environment("python-3.12", "3.12", NEWEST),
    Environment("python-3.13", "3.13", NEWEST),
)
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "datasets>=3")


# ---- run


def find_python(version: str) -> str | None:
    """Return an interpreter of a version: on the path, or of pyenv."""
    on_path = shutil.which(f"python{version}")
    candidates = [on_path, *map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))]
    for candidate in filter(None, candidates):
        asked = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.stdout.strip() == version:
            return str(candidate)
    return None


def install(environment: Environment, torch: str) -> Path | None:
    """Make the environment, if it is not there; return its interpreter, ``None`` without such a Python."""
    folder = PROJECT / ".compat" / environment.name
    python, mark = folder / "bin" / "python", folder / "ready.json"
    wanted = json.dumps([torch, *environment.packages])
    if mark.exists() and mark.read_text(encoding="utf-8") == wanted:
        return python
    base = find_python(environment.python)
    if base is None:
        return None
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, torch, *environment.packages, *TOOLS, str(PROJECT)], check=True)
    subprocess.run([str(python), "-m", "pip", "uninstall", "-qq", "-y", "hf-divguard"], check=True)
    mark.write_text(wanted, encoding="utf-8")
    return python


def run(environment: Environment, python: Path) -> int:
    """Run the table in an environment; its results replace the earlier ones."""
    path = RESULTS / f"{environment.name}.json"
    command = [str(python), "-m", "pytest", "-q", "tests/matrix", "-p", "no:cacheprovider"]
    variables = {"MATRIX_RESULTS": str(path), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=PROJECT, env={**os.environ, **variables}).returncode


# ---- table


def read_results() -> dict[str, dict[str, Any]]:
    """Return the results that are there, by the name of the environment, in the order of ``ENVIRONMENTS``."""
    paths = {environment.name: RESULTS / f"{environment.name}.json" for environment in ENVIRONMENTS}
    return {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()
    }


def cell_text(outcomes: dict[int, str]) -> str:
    """Return what a cell of the table says.

    Example:
        >>> cell_text({1: "passed", 2: "passed"}), cell_text({1: "failed"}), cell_text({1: "skipped"})
        ('1, 2', '**fails: 1**', 'not run')
    """
    failed = [str(processes) for processes, outcome in sorted(outcomes.items()) if outcome == "failed"]
    passed = [str(processes) for processes, outcome in sorted(outcomes.items()) if outcome == "passed"]
    if failed:
        return f"**fails: {', '.join(failed)}**"
    return ", ".join(passed) if passed else "not run"


def table_of(result: dict[str, Any], kinds: list[str], features: list[str]) -> str:
    """Return the table of one environment."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for kind, feature, processes, outcome in result["cells"]:
        cells.setdefault((kind, feature), {})[processes] = outcome
    lines = [f"| trainer | {' | '.join(features)} |", "|---" * (len(features) + 1) + "|"]
    for kind in kinds:
        texts = [cell_text(cells.get((kind, feature), {})) for feature in features]
        lines.append(f"| `{kind.split(',')[0]}`{kind[len(kind.split(',')[0]) :]} | {' | '.join(texts)} |")
    return "\n".join(lines)


INTRODUCTION = """\
# Compatibility

This page is written by `make compat`, from tests that ran (`tests/matrix`). A cell has the numbers of processes in which the feature was run with this trainer and passed: 1, or 2 with DistributedDataParallel on CPU. *not run* means that nothing is known.

| feature | what the test asserts |
|---|---|
| healthy run is the stock one | with all guards on and nothing found, the weights are those of the stock trainer, to the last bit |
| best N, evaluation on save | the last and the best two checkpoints are on disk, complete, each with a metric of its own step |
| stop | NaN in the weights (for `GRPOTrainer` in the gradients) ends the run; the last good checkpoint is from before |
| rollback | NaN in the weights is rolled back, and the run finishes (for `GRPOTrainer` the update with a NaN gradient is skipped) |
| resume | interrupted and resumed, the run ends with the weights of one without the interruption (`GRPOTrainer` and `Trainer, images`, where the stock trainer does not either: it finishes) |
"""

GPU = """\
## Graphics cards

**Not run.** The tests of `tests/gpu` (gradient scaler of fp16, bf16, `torch.compile`, waits for the device, snapshots in the memory of the host, peak memory of a rollback) need CUDA and are skipped elsewhere, with the reason. `make test-gpu` runs them.

Not run either: PyTorch older than the version in the tables, although `torch>=2.4` is accepted; macOS; Windows.
"""


def write_page(kinds: list[str], features: list[str]) -> None:
    """Write the page from all results that are there."""
    parts, results = [INTRODUCTION], read_results()
    for environment in ENVIRONMENTS:
        title = f"## {environment.name.replace('-', ' ').capitalize()}"
        result = results.get(environment.name)
        if result is None:
            parts.append(
                f"{title}\n\n**Not run.** Python {environment.python}, {', '.join(environment.packages)}\n"
            )
            continue
        versions = ", ".join(
            f"{package} {version}" for package, version in result["versions"].items() if version
        )
        parts.append(f"{title}\n\n{versions}\n\n{table_of(result, kinds, features)}\n")
    PAGE.write_text("\n".join([*parts, GPU]), encoding="utf-8")


def names_in(path: Path, pattern: str) -> list[str]:
    """Return the strings that ``pattern`` finds in a file: this script imports nothing but the standard library."""
    return re.findall(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def main() -> int:
    """Make the environments, run the table in each and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="the oldest and the newest versions only")
    parser.add_argument("--table", action="store_true", help="only write the page")
    parser.add_argument("--only", help="name of one environment")
    parser.add_argument("--torch", default="torch", help="what pip installs first")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    failed = 0
    for environment in ENVIRONMENTS:
        is_wanted = environment.is_short or not options.short
        if options.table or not is_wanted or options.only not in (None, environment.name):
            continue
        python = install(environment, options.torch)
        if python is None:
            print(
                f"{environment.name}: not run, there is no Python {environment.python} on this machine",
                flush=True,
            )
            continue
        code = run(environment, python)
        print(f"{environment.name}: {'passed' if code == 0 else 'failed'}", flush=True)
        failed += code != 0
    here = Path(__file__).parent
    write_page(
        names_in(here / "kinds.py", r"^        Kind\(\"([^\"]+)\""),
        names_in(here / "features.py", r"^    \"([^\"]+)\": \w+,$"),
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
