"""The directions of the house, and what must not be loaded or written."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_rules_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout


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
