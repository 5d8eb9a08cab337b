"""The package as a user gets it: its names, what importing it costs, wheel and source archive."""

from __future__ import annotations

import ast
import configparser
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import hf_divguard

PROJECT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numpy", "accelerate")


def run_python(*command: str, python: str = sys.executable, cwd: Path | None = None) -> str:
    """Run Python in a process of its own; return what it printed, fail with what it said."""
    done = subprocess.run([python, *command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- names


def type_checked_names() -> set[str]:
    """Return the names that a type checker sees in ``hf_divguard/__init__.py``."""
    tree = ast.parse(Path(hf_divguard.__file__).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_divguard")
        for alias in node.names
    }


def test_all_names_are_there_and_no_other_is_exported() -> None:
    """What ``__all__`` lists, ``dir`` shows and a type checker sees is one and the same."""
    assert dir(hf_divguard) == sorted(set(hf_divguard.__all__))
    assert type_checked_names() == set(hf_divguard.__all__)
    assert all(hasattr(hf_divguard, name) for name in hf_divguard.__all__)


def test_each_name_is_public_in_the_module_it_comes_from() -> None:
    """A name at the top is the same object as in its module, which lists it too."""
    for name in set(hf_divguard.__all__) - {"__version__"}:
        thing = getattr(hf_divguard, name)
        module = inspect.getmodule(thing)
        assert module is not None
        assert getattr(module, name) is thing
        assert name in module.__all__


def test_each_name_has_a_docstring() -> None:
    """Whatever a user can import says what it does."""
    missing = [name for name in hf_divguard.__all__ if not inspect.getdoc(getattr(hf_divguard, name))]
    assert missing == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as in any module."""
    with pytest.raises(AttributeError, match="DivGaurdTrainer"):
        hf_divguard.DivGaurdTrainer  # noqa: B018


# ---- what importing costs


def heavy_modules_after(code: str) -> list[str]:
    """Run ``code`` in a fresh interpreter; return which of the heavy packages it loaded."""
    report = f"\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return run_python("-c", code + report).split()


@pytest.mark.parametrize(
    "code",
    [
        "import hf_divguard; hf_divguard.__version__, dir(hf_divguard)",
        "import hf_divguard; hf_divguard.find_checkpoints('.'), hf_divguard.verify_checkpoint('.')",
        "from hf_divguard import Finding, TrainingDivergedError, latest_complete_checkpoint, best_checkpoints",
        "import hf_divguard.core.detection.registry, hf_divguard.core.retention, hf_divguard.core.detection.adaptive",
        "import hf_divguard.storage.staging, hf_divguard.storage.deletion, hf_divguard.storage.quarantine",
    ],
)
def test_importing_loads_neither_torch_nor_transformers(code: str) -> None:
    """The package, its core and its functions on checkpoints do without torch and transformers."""
    assert heavy_modules_after(code) == []


def test_the_first_use_of_the_trainer_loads_them() -> None:
    """The check above can fail: the trainer needs both."""
    assert {"torch", "transformers"} <= set(
        heavy_modules_after("import hf_divguard; hf_divguard.DivGuardTrainer")
    )


# ---- wheel and source archive


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build wheel and source archive from a copy of the project; return the folder they are in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("hf_divguard", "tests"):
        shutil.copytree(PROJECT / name, source / name, ignore=ignored)
    run_python("-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=source)
    return source / "dist"


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    """Every module, the files of the page, the mark of typed code and the licence; no tests."""
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        [metadata_name] = [name for name in files if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    package = {name for name in files if not name.split("/")[0].endswith(".dist-info")}
    here = {
        path.relative_to(PROJECT).as_posix()
        for path in (PROJECT / "hf_divguard").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert package == here
    assert any(name.endswith("/LICENSE") for name in files - package)
    assert metadata["Name"] == "hf-divguard"
    assert metadata["Version"] == hf_divguard.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License"] == "Apache-2.0"
    assert "transformers<6,>=4.57" in metadata.get_all("Requires-Dist", [])
    assert metadata.get_payload().startswith("# hf_divguard")


def test_the_conda_recipe_has_the_requirements_of_the_package() -> None:
    """The names differ on conda-forge: PyTorch is ``pytorch``, xxhash ``python-xxhash``."""
    text = (PROJECT / "docs" / "packaging" / "meta.yaml").read_text(encoding="utf-8")
    version = re.search(r'set version = "(.+)"', text)[1]  # type: ignore[index]
    text = re.sub(r"\{%.*%\}", "", text).replace("{{ version }}", version).replace("{{ PYTHON }}", "python")
    recipe = yaml.safe_load(text)
    settings = configparser.ConfigParser()
    settings.read(PROJECT / "setup.cfg", encoding="utf-8")
    options, console = settings["options"], settings["options.entry_points"]["console_scripts"]
    names = {"torch": "pytorch", "xxhash": "python-xxhash"}
    wanted = {f"python {options['python_requires']}"}
    for line in options["install_requires"].split():
        name, bound = re.fullmatch(r"([\w-]+)(.+)", line).groups()  # type: ignore[union-attr]
        wanted.add(f"{names.get(name, name)} {bound}")
    assert set(recipe["requirements"]["run"]) == wanted
    assert recipe["build"]["entry_points"] == [console.strip()]
    assert recipe["about"]["home"] == settings["metadata"]["url"]
    assert hf_divguard.__version__.removesuffix(".dev0") == version


def test_the_source_archive_holds_what_it_takes_to_build(built: Path) -> None:
    """Code, settings, licence and the page that introduces it."""
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {name.split("/", 1)[-1] for name in tar.getnames()}
    assert {
        "setup.cfg",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "hf_divguard/py.typed",
        "hf_divguard/cli/skill.md",
    } <= files


TRAIN = """
import logging, sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel
import hf_divguard
from hf_divguard import DivGuardTrainer, DivGuardTrainingArguments, find_checkpoints

data = [{"input_ids": [i % 5, 1, 2, 3], "labels": [i % 5, 1, 2, 3]} for i in range(8)]
args = DivGuardTrainingArguments(
    "out", max_steps=4, save_steps=2, save_total_limit=1, eval_on_save=True, preserve_best_model=True,
    use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=8, n_layer=1, n_head=1,
                                   bos_token_id=0, eos_token_id=0))
trainer = DivGuardTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
trainer.train()
print("PLACE", hf_divguard.__file__)
print("CHECKPOINTS", *[f"{info.step}:{info.verdict.status}" for info in find_checkpoints("out")])
"""


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_trains_there(built: Path, tmp_path: Path) -> None:
    """Only what the wheel requires is lent from outside; the package itself comes from the wheel."""
    [wheel] = built.glob("*.whl")
    environment = tmp_path / "environment"
    run_python("-m", "venv", "--without-pip", str(environment))
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = str(environment / scripts / "python")
    run_python("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    [site_packages] = environment.glob("**/site-packages")
    (site_packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    printed = run_python("-I", "-W", "ignore", "-c", TRAIN, python=python, cwd=tmp_path)
    [place] = [line.split(" ", 1)[1] for line in printed.splitlines() if line.startswith("PLACE ")]
    assert Path(place).is_relative_to(site_packages)
    assert "CHECKPOINTS 4:complete" in printed


def test_version_changelog_and_citation_belong_together(tmp_path: Path) -> None:
    """The check before a release holds at every commit, and refuses a version without a date or an address."""
    script = PROJECT / "docs" / "release_check.py"
    assert hf_divguard.__version__ in run_python(str(script))
    refused = subprocess.run(
        [sys.executable, str(script), "--release"], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 1
    assert "make address" in refused.stderr
