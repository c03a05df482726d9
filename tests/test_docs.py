"""Every command in README.md and docs/ works.

Each line of a fenced `sh` or `console` block that starts with `recallzoo` or `make` (after `$ `
in a `console` block) is run, in an empty folder that the blocks of one file share. A comment
before the block changes that:

    <!-- docs: parse -->    only its options are checked: the command needs a GPU, or minutes
    <!-- docs: exit 2 -->   it is expected to fail with this exit code

A fenced `python` block whose first line is a comment with a file's name, as `# my_mixer.py`, is
written to that file for the commands after it. `python my_mixer.py` then runs it. The folder
also has a copy of the tables in results/recipes.
"""

import re
import runpy
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from recallzoo.cli import main

REPOSITORY = Path(__file__).resolve().parents[1]
PUBLISHED = Path("results") / "recipes"
PAGES = [p for p in (REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md")) if p.exists()]
BLOCK = re.compile(
    r"(?:^<!-- docs: (?P<marker>[^>]*?) -->\n+)?^```(?P<kind>sh|console|python)\n(?P<body>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
FILE_NAME = re.compile(r"# (\w+\.py)\n")


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    words: tuple[str, ...]
    line: int
    parse_only: bool
    exit_code: int


@dataclass(frozen=True)
class SourceFile:
    """A file that a page shows."""

    name: str
    text: str


def steps_of(text: str) -> list[Command | SourceFile]:
    """The commands and files in a page's fenced blocks. ValueError for an unknown marker."""
    found: list[Command | SourceFile] = []
    shown = set()
    for block in BLOCK.finditer(text):
        if block["kind"] == "python":
            if name := FILE_NAME.match(block["body"]):
                found.append(SourceFile(name[1], block["body"]))
                shown.add(name[1])
            continue
        marker = block["marker"] or ""
        known = re.fullmatch(r"(parse)?|exit (\d+)", marker)
        if known is None:
            raise ValueError(f"unknown marker {marker!r}")
        first_line = text.count("\n", 0, block.start("body")) + 1
        body = block["body"].replace("\\\n", " " * 2)
        for number, line in enumerate(body.splitlines()):
            if block["kind"] == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            words = tuple(shlex.split(line, comments=True))
            runs_shown = words[:1] == ("python",) and words[1:2] and words[1] in shown
            if words and (words[0] in ("recallzoo", "make") or runs_shown):
                code = int(known[2] or 0)
                found.append(Command(words, first_line + number, bool(known[1]), code))
    return found


def _arguments(command: Command) -> list[str]:
    """What follows `recallzoo`, so that a command whose options alone are checked runs nothing."""
    arguments = list(command.words[1:])
    if command.parse_only:
        arguments.append("--dry-run" if arguments[0] == "run" else "--help")
    return arguments


def _make(command: Command) -> int:
    arguments = ["make", "--dry-run", *command.words[1:]]
    return subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, check=False).returncode


def _python(command: Command) -> int:
    runpy.run_path(command.words[1], run_name="__main__")
    return 0


_RUN = {"make": _make, "python": _python, "recallzoo": lambda command: main(_arguments(command))}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_work(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # for files that import each other
    shutil.copytree(REPOSITORY / PUBLISHED, tmp_path / PUBLISHED)
    for step in steps_of(page.read_text(encoding="utf-8")):
        if isinstance(step, SourceFile):
            Path(step.name).write_text(step.text)
            continue
        code = _RUN[step.words[0]](step)
        where = f"{page.name}:{step.line}: {shlex.join(step.words)}"
        assert code == step.exit_code, f"{where}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_to_files(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_commands_and_files_are_found_with_their_markers_and_lines():
    page = """# Title
```sh
cd somewhere
recallzoo run quickstart --out "a b"  # three minutes
make test
```
<!-- docs: parse -->
```sh
recallzoo run figure2 \\
  --device cuda
```
<!-- docs: exit 2 -->

```console
$ recallzoo list mixer
recallzoo says no
```
```python
recallzoo = 1
```
```python
# mine.py
x = 1
```
"""
    assert steps_of(page) == [
        Command(("recallzoo", "run", "quickstart", "--out", "a b"), 4, False, 0),
        Command(("make", "test"), 5, False, 0),
        Command(("recallzoo", "run", "figure2", "--device", "cuda"), 9, True, 0),
        Command(("recallzoo", "list", "mixer"), 15, False, 2),
        SourceFile("mine.py", "# mine.py\nx = 1\n"),
    ]


def test_an_unknown_marker_is_an_error():
    with pytest.raises(ValueError, match="skip"):
        steps_of("<!-- docs: skip -->\n```sh\nmake\n```\n")
