"""The directions of the house, and what must not be loaded or written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("bioseq", "training", "serving")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_rules_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout


def circles(imports: dict[str, set[str]]) -> Iterator[set[str]]:
    """Sets of modules that import each other, directly or through others (Tarjan 1972)."""
    place: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[set[str]]:
        place[module] = lowest[module] = len(place)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in place:
                yield from visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], place[other])
        if lowest[module] == place[module]:
            found = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(found) > 1:
                yield found

    for module in sorted(imports):
        if module not in place:
            yield from visit(module)


def test_circles_are_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}})) == [{"b", "c"}]
    assert not list(circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circle(package: str) -> None:
    """Imports inside functions and under TYPE_CHECKING count."""
    graph = grimp.build_graph(package, cache_dir=None)
    imports = {m: graph.find_modules_directly_imported_by(m) & graph.modules for m in graph.modules}
    assert not list(circles(imports))


def folders() -> list[Path]:
    return sorted(file.parent for package in PACKAGES for file in (ROOT / package).rglob("__init__.py"))


def test_rooms_are_small() -> None:
    for folder in folders():
        modules = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(modules) <= 14, folder
        for file in modules:
            assert len(file.read_text().splitlines()) <= 400, file


def test_every_room_says_what_it_is_for_in_five_lines() -> None:
    for folder in folders():
        name = folder.relative_to(ROOT).as_posix()
        if name == "bioseq":  # bioseq's is the package's front page
            continue
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert docstring and len(docstring.splitlines()) <= 5, name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("bioseq", "torch numpy pyarrow ray fastapi"),
        ("bioseq.cli", "torch numpy pyarrow ray fastapi"),
        ("bioseq.backbones.packed.encoder", "pyarrow ray transformers peft Bio matplotlib"),
        ("bioseq.inference.predictor", "ray fastapi pydantic transformers peft Bio matplotlib sklearn scipy"),
        ("bioseq.inference.loading", "torch ray"),
    ],
)
def test_importing_loads_no_more_than_it_must(module: str, absent: str) -> None:
    loaded = run(f"import sys, {module}; print(*[m for m in {absent.split()!r} if m in sys.modules])")
    assert loaded == ""


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from bioseq.cli import main; main(['--help']); "
        "print('HEAVY', *[m for m in ('torch','numpy','pyarrow','ray','fastapi') if m in sys.modules])"
    )
    assert run(code).splitlines()[-1] == "HEAVY"


def test_the_core_runs_in_the_minimal_environment() -> None:
    """Only torch, numpy, safetensors, pyarrow: the GPU environment that has no ray, fastapi or biopython."""
    run(
        "import sys\n"
        "for name in ('ray', 'fastapi', 'pydantic', 'Bio', 'sqlalchemy', 'duckdb', 'sklearn', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "import bioseq, torch\n"
        "from bioseq.backbones.packed.config import CONFIGS\n"
        "from bioseq.backbones.packed.encoder import PackedEncoder\n"
        "from bioseq.inference.predictor import Predictor\n"
        "assert Predictor(PackedEncoder(CONFIGS['tiny'])).embed(['MKT', 'AC']).shape == (2, 64)\n"
        "assert bioseq.load('default').embed(['MKT']).shape[0] == 1\n"
    )


def test_public_names_resolve() -> None:
    import bioseq

    for name in bioseq.__all__:
        assert getattr(bioseq, name) is not None
    with pytest.raises(AttributeError):
        bioseq.nothing_here  # noqa: B018
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert bioseq.__version__ == project["version"]


def test_readme_begins_with_the_two_commands() -> None:
    blocks = re.findall(r"```(?:sh|bash)?\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert [line.split("#")[0].strip() for line in blocks[0].strip().splitlines()] == [
        "make demo",
        "make test",
    ]


def test_every_python_file_has_a_docstring_and_no_machine_path() -> None:
    for folder in ("bioseq", "training", "serving"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            if text.strip():
                assert text.lstrip().startswith(('"""', "#!")), file
            assert not re.search(r"/(home|work|root|Users)/\w", text), file
