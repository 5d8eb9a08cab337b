"""The documentation matches the project: options, commands, files, links, and code that runs as pasted."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from hf_divguard import DivGuardArgumentsMixin, DivGuardTrainingArguments
from tests.processes import run_python

sys.path.append(str(Path(__file__).parents[1] / "docs"))
from project_address import files_with_the_address, read_address

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
REFERENCE = (PROJECT / "docs" / "arguments.md").read_text(encoding="utf-8")
QUICK_START = (PROJECT / "docs" / "quickstart.md").read_text(encoding="utf-8")
MAKEFILE = (PROJECT / "Makefile").read_text(encoding="utf-8")
GENERATED = (PROJECT / "docs" / "reference", PROJECT / "docs" / "_build")
PAGES = sorted(
    page
    for page in [
        *PROJECT.glob("*.md"),
        *(PROJECT / "docs").rglob("*.md"),
        *(PROJECT / "examples").glob("*.md"),
    ]
    if not any(page.is_relative_to(folder) for folder in GENERATED)
)
OPTIONS = fields(DivGuardArgumentsMixin)


def page_id(page: Path) -> str:
    """Return the path of a page inside the project."""
    return page.relative_to(PROJECT).as_posix()


def described_defaults(page: str) -> dict[str, str]:
    """Return the options in the tables of a page, each with the default the table gives."""
    tables = re.findall(r"^\| option \| default \|.*\n((?:\|.*\n)+)", page, flags=re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", "".join(tables), flags=re.MULTILINE)
    return {name: default.strip().strip("`") for name, default in rows}


def code_blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def test_every_option_is_described_with_its_default() -> None:
    """The tables list every field of the arguments mixin with its default, and nothing else."""
    assert described_defaults(REFERENCE) == {
        option.name: "none" if option.default is None else str(option.default).lower() for option in OPTIONS
    }


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_says_what_it_does(option: object) -> None:
    """Each field has a help text of at least a sentence."""
    assert option.metadata["help"].endswith((".", ").")), option  # type: ignore[attr-defined]


def make_targets() -> set[str]:
    """Return the targets of the Makefile that have a description."""
    return set(re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, flags=re.MULTILINE))


def test_every_command_of_make_that_a_page_names_exists() -> None:
    """No page names a target that does not exist."""
    named = {
        (page.name, target)
        for page in PAGES
        for target in re.findall(
            r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE
        )
    }
    assert ("README.md", "demo") in named
    assert ("CONTRIBUTING.md", "test") in named
    assert {target for _, target in named} <= make_targets()


def test_every_target_of_make_has_a_description() -> None:
    """``make`` alone lists every target."""
    listed = re.search(r"^\.PHONY: (.*?[^\\])\n", MAKEFILE, flags=re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert set(listed[1].replace("\\\n", " ").split()) == make_targets()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    """Links and images point to files of the project."""
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_to_a_heading_leads_somewhere(page: Path) -> None:
    """Links with an anchor name a heading of their page."""
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [
        (path, name) for path, name in links if name not in anchors(page.parent / path if path else page)
    ]
    assert missing == []


# ---- code


CONTINUES = "continues the [quick start](quickstart.md)"
"""A page with this sentence continues the code of the quick start."""


def code_of(page: Path) -> list[str]:
    """Return the Python blocks that a reader of ``page`` pastes, in order."""
    text = page.read_text(encoding="utf-8")
    quick_start = QUICK_START if CONTINUES in text else ""
    return code_blocks(quick_start, "python") + code_blocks(text, "python")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if code_blocks(page.read_text("utf-8"), "python")], ids=page_id
)
def test_all_code_on_a_page_runs_as_pasted(page: Path, tmp_path: Path) -> None:
    """The Python blocks of a page run one after the other, in a fresh process and an empty folder."""
    script = tmp_path / "pasted.py"
    script.write_text("\n\n".join(code_of(page)), encoding="utf-8")
    done = run_python("-W", "ignore", script, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for printed in re.findall(
        r"^It prints:\n\n```text\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    ):
        assert printed in done.stdout


def test_code_that_fails_is_noticed(tmp_path: Path) -> None:
    """The check above can fail: a page whose second block uses a wrong name."""
    page = tmp_path / "page.md"
    page.write_text("```python\nsteps = 3\n```\n\n```python\nprint(step)\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="NameError: name 'step' is not defined"):
        test_all_code_on_a_page_runs_as_pasted(page, tmp_path)


# ---- command lines


def command_lines(page: str) -> list[str]:
    """Return the commands of the shell blocks of a page, without comments."""
    blocks = "".join(code_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [command for command in (line.split(" #")[0].strip() for line in blocks) if command]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_flag_on_a_command_line_is_known(page: Path) -> None:
    """Command lines of training scripts use flags that exist, with values that are accepted."""
    parser = HfArgumentParser(DivGuardTrainingArguments)
    for command in command_lines(page.read_text(encoding="utf-8")):
        program, *words = shlex.split(command)
        if Path(program).name == "python" and Path(words[0]).name in ("train.py", "train_lm.py"):
            *_, unknown = parser.parse_args_into_dataclasses(
                ["--output_dir", "out", *words[1:]], return_remaining_strings=True
            )
            assert [word for word in unknown if word.startswith("--")] == [], command


SMALL = "--text_limit 60000 --vocabulary 300 --block 16 --eval_blocks 8 --hidden 32 --layers 1"


def run_command_line(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``hf-divguard`` with ``words``; the example takes the place of the reader's ``train.py``."""
    if "train.py" in words:
        example = (PROJECT / "examples" / "train_lm.py").as_posix()
        script = shlex.split("--output_dir out --max_steps 20 --use_cpu --save_steps 10 --logging_steps 1")
        words = [*words[: words.index("--") + 1], sys.executable, example, *script, *SMALL.split()]
    return run_python("-W", "ignore", "-m", "hf_divguard.cli", *words, cwd=cwd, timeout=300)


@pytest.mark.parametrize("page", [PROJECT / "README.md", PROJECT / "docs" / "flags.md"], ids=page_id)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """Its training commands run as they are, on a smaller model; the other commands exist."""
    for command in command_lines(page.read_text(encoding="utf-8")):
        program, *words = shlex.split(command)
        if words[0] in ("examples/train_lm.py", "train.py"):
            script = PROJECT / "examples" / "train_lm.py"
            quick = [] if words[0] != "train.py" else ["--max_steps", "6", "--use_cpu"]
            done = run_python(
                "-W", "ignore", script, *words[1:], *quick, *SMALL.split(), cwd=tmp_path, timeout=300
            )
            assert done.returncode == 0, done.stderr[-3000:]
            assert "best: " in done.stdout, command
            shutil.rmtree(tmp_path / "out") if words[0] == "train.py" else None
        elif program == "hf-divguard":
            done = run_command_line(words, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert program == "make" or command == "pip install .", f"Add a check for this command: {command}"


SCRIPT_ROWS = re.findall(
    r"^\| .* \| `(test_run\w*\.py)`: `(.+)` \|$",
    (PROJECT / "docs" / "command-line.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)


def test_every_script_that_the_page_of_run_lists_has_its_two_tests() -> None:
    """One compares a healthy run with the script alone, one plants a fault; no tested script is left out."""
    paths = sorted({f"tests/cli/{name}" for name, _ in SCRIPT_ROWS})
    done = run_python("-m", "pytest", "--collect-only", "-q", "--no-header", *paths, cwd=PROJECT)
    found = re.findall(r"^tests/cli/(\S+\.py)::(test_\w+)\[(.+)\]$", done.stdout, flags=re.MULTILINE)
    for kind in ("to_the_last_bit", "rolled_back"):
        tested = {(file, name) for file, test, name in found if test.endswith(kind)}
        assert tested == set(SCRIPT_ROWS)
    assert len(SCRIPT_ROWS) >= 12


# ---- addresses


ADDRESS = re.escape(read_address())


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_address_in_the_repository_leads_somewhere(page: Path) -> None:
    """An absolute link to the repository names a file of the project, and a heading of it."""
    text = page.read_text(encoding="utf-8")
    raw = ADDRESS.replace("github", "raw.githubusercontent", 1)
    for path, name in re.findall(rf"(?:{ADDRESS}/(?:blob|tree)|{raw})/main/([^)#\s]+)(?:#([^)\s]+))?", text):
        assert (PROJECT / path).exists(), path
        assert not name or name in anchors(PROJECT / path), (path, name)


def test_the_readme_has_absolute_links_only() -> None:
    """It is the page of the project on PyPI, where a relative link leads nowhere."""
    assert re.findall(r"\]\((?!https://)[^)]*\)", README) == []
    assert len(re.findall(rf"\]\({ADDRESS}/blob/main/", README)) > 10


def test_one_command_changes_the_address_everywhere(tmp_path: Path) -> None:
    """The address is read from one place; the command writes it into every file that names it."""
    for path in files_with_the_address():
        copied = tmp_path / path.relative_to(PROJECT)
        copied.parent.mkdir(exist_ok=True)
        shutil.copy(path, copied)
    shutil.copy(PROJECT / "docs" / "project_address.py", tmp_path / "docs")
    done = run_python("docs/project_address.py", "https://github.com/someone/divguard", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    texts = "".join(
        path.read_text("utf-8") for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".py"
    )
    assert "someone/divguard" in texts
    assert "OWNER/" not in texts


NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page_id)
def test_every_notebook_opens_in_colab_and_is_listed(path: Path) -> None:
    """It begins with a badge that opens this notebook, and installs from the repository."""
    text = path.read_text(encoding="utf-8")
    place = read_address().removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{path.name})" in text
    assert f"git+{read_address()}" in text
    assert path.name in (PROJECT / "docs" / "colab.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_table_of_contents() -> None:
    """The start page of the documentation lists every page beside it."""
    index = (PROJECT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (PROJECT / "docs").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"^\| \[[^]]*\]\(([\w-]+\.md)\)", index, flags=re.MULTILINE))


# ---- names in the description of the architecture


def test_every_file_and_name_in_the_architecture_exists() -> None:
    """``docs/architecture.md`` names files of the package, and classes and methods that are in them."""
    page = (
        (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Length of the paths")[0]
    )
    files = set(re.findall(r"\b((?:core|storage|hf|cli|alerts)/[\w/]+\.py)\b", page))
    assert len(files) > 20
    assert [file for file in sorted(files) if not (PROJECT / "hf_divguard" / file).exists()] == []
    package = "\n".join(path.read_text("utf-8") for path in (PROJECT / "hf_divguard").rglob("*.py"))
    for owner, member in set(re.findall(r"\b([A-Z]\w+)\.(\w+)(?=\W)", page)):
        if owner in ("Trainer", "README"):
            continue
        assert re.search(rf"^class {owner}\b", package, flags=re.MULTILINE), owner
        assert re.search(rf"(?:def |self\.|^    ){member}\b", package, flags=re.MULTILINE), (
            f"{owner}.{member}"
        )


@pytest.mark.parametrize(
    ("scenario", "path"), [("stop", "a loss"), ("save", "a save"), ("rollback", "a rollback")]
)
def test_the_paths_in_the_architecture_are_those_of_a_real_step(scenario: str, path: str) -> None:
    """Every function in the first block of a path is called, in the file that stands beside it."""
    from benchmarks.trace import trace

    page = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = code_blocks(page.split(f"## The path of {path}\n")[1], "text")[0]
    lines = re.findall(r"^ *([\w.]+) +((?:core|storage|hf)/[\w/]+\.py)\b", block, flags=re.MULTILINE)
    assert len(lines) > 10
    called = trace(scenario).functions()
    assert [f"{file} {name}" for name, file in lines if f"{file} {name}" not in called] == []


# ---- language


NOT_YET = ("detectors.md",)
"""Pages that are still to be rewritten."""

PRIVATE_WORDS = (
    "anew|ordinary|told|tells?|story|mend(?:s|ed)?|doomed|left behind|leaves? behind|owe[sd]?|spoilt|minds?|heals?|healed"
    "|given up|gives? up|goes back|went back|gone back|by lot|passed over|of ours"
)


def prose(path: Path) -> str:
    """Return the text of a page or the cells of a notebook, without code in backticks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return re.sub(r"`[^`\n]+`", "", text)


TEXTS = [
    path
    for path in sorted(
        [*PAGES, *(PROJECT / "notebooks").glob("*.ipynb"), *(PROJECT / "examples").glob("*.py")]
    )
    if path.name not in NOT_YET and "detection" not in path.parts and "recovery" not in path.parts
]


@pytest.mark.parametrize("path", TEXTS, ids=page_id)
def test_the_texts_use_the_terms_of_the_field(path: Path) -> None:
    """No words that only this project used: "skipped" rather than "left behind", "recovers" rather than "heals"."""
    assert re.findall(rf"\b(?:{PRIVATE_WORDS})\b", prose(path), flags=re.IGNORECASE) == []
