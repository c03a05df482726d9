"""Data flows down the list in AGENTS.md: a module imports only from lines above its own."""

import ast
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "recallzoo"
LOWEST = ("_version",)
HIGHEST = ("__main__",)


def layers(map_text: str) -> list[str]:
    """Names under `src/recallzoo/` in the map, from the bottom layer up."""
    block = map_text.split(f"src/{PACKAGE}/\n", 1)[1].split("```", 1)[0]
    names = re.findall(r"^  ([a-z_]+)(?:\.py|/)", block, flags=re.MULTILINE)
    return [*LOWEST, *names, *HIGHEST]


def components(package: Path) -> dict[str, list[Path]]:
    """Top-level module or folder -> its source files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        first = path.relative_to(package).parts[0].removesuffix(".py")
        if first != "__init__":
            found.setdefault(first, []).append(path)
    return found


def imports(path: Path, package: Path) -> list[tuple[str, int]]:
    """(component, line) of everything of the package that a file imports, wherever it does."""
    inner = (package.name, *path.relative_to(package).with_suffix("").parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inner[: -node.level]) if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            modules = (
                [f"{start}.{alias.name}" for alias in node.names]
                if start == package.name
                else [start]
            )
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == package.name and len(parts) > 1 and not parts[1].startswith("__"):
                found.append((parts[1], node.lineno))
    return found


def upward_imports(package: Path, order: list[str]) -> list[str]:
    """One line for every import that goes up, or that involves a module without a layer."""
    rank = {name: position for position, name in enumerate(order)}
    problems = []
    for component, files in components(package).items():
        if component not in rank:
            problems.append(f"{component} is missing from the map in AGENTS.md")
            continue
        for file in files:
            for target, line in imports(file, package):
                if target != component and rank.get(target, len(order)) > rank[component]:
                    where = file.relative_to(package.parent)
                    problems.append(f"{where}:{line}: {component} imports {target}, which is above")
    return problems


def test_no_module_imports_from_a_layer_above_it():
    order = layers((REPOSITORY / "AGENTS.md").read_text(encoding="utf-8"))
    assert upward_imports(REPOSITORY / "src" / PACKAGE, order) == []


def test_the_map_names_every_layer_once():
    names = layers((REPOSITORY / "AGENTS.md").read_text(encoding="utf-8"))
    assert len(set(names)) == len(names)


def test_an_import_that_goes_up_is_named(tmp_path):
    package = tmp_path / PACKAGE
    (package / "tasks").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "errors.py").write_text("")
    (package / "tasks" / "__init__.py").write_text("from recallzoo.errors import A\n")
    (package / "tasks" / "one.py").write_text(
        "def f():\n    from recallzoo import store\n    from ..report import x\n"
    )
    (package / "store.py").write_text("import recallzoo.tasks.one\n")
    (package / "report.py").write_text("")
    (package / "stray.py").write_text("")
    order = ["errors", "tasks", "store", "report"]
    assert upward_imports(package, order) == [
        "stray is missing from the map in AGENTS.md",
        "recallzoo/tasks/one.py:2: tasks imports store, which is above",
        "recallzoo/tasks/one.py:3: tasks imports report, which is above",
    ]


def test_the_report_does_not_import_torch():
    code = (
        "import importlib, pkgutil, sys, recallzoo.report as report\n"
        "for m in pkgutil.walk_packages(report.__path__, 'recallzoo.report.'):\n"
        "    importlib.import_module(m.name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_does_not_import_torch():
    code = (
        "import sys; from recallzoo.cli import main\n"
        "assert main(['--help']) == 0 and main(['run', '--help']) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert run.returncode == 0


def test_knowing_all_mixers_and_presets_does_not_import_the_compiler():
    code = (
        "import sys; from recallzoo import mixers, presets\n"
        "assert list(mixers.registry.items()) and list(presets.registry)\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
