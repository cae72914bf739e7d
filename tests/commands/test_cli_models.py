"""`bioseq models` as a user types it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bioseq.backbones.checkpoints.checkpoint import write_checkpoint
from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import save_backbone
from bioseq.bundles.bundle import write_bundle
from bioseq.cli import main
from bioseq.commands import models


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    import bioseq.bundles.registry

    monkeypatch.setenv("BIOSEQ_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(bioseq.bundles.registry, "SHIPPED", tmp_path / "no-models")


def encoder() -> PackedEncoder:
    model = PackedEncoder(CONFIGS["tiny"])
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "hf", CONFIGS["tiny"], encoder().state_dict())


def run(*args) -> int:
    return main(["models", *map(str, args)])


def test_the_whole_life_of_a_model(checkpoint, tmp_path, capsys):
    assert run("list") == 0
    out = capsys.readouterr()
    assert out.out == "" and "no models" in out.err
    assert run("import", checkpoint, "esm2-tiny", "--licence", "MIT") == 0
    said = capsys.readouterr().err
    assert "registered esm2-tiny@1" in said and "homologs fit-mixture esm2-tiny@1" in said
    assert run("alias", "default", "esm2-tiny@1") == 0
    capsys.readouterr()

    assert run("list") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "KIND", "TASK", "BASE", "HASH", "ALIASES"]
    assert row.split()[:2] == ["esm2-tiny@1", "backbone"] and row.endswith("default")
    assert row.index("backbone") == header.index("KIND")  # columns stand under their headings

    assert run("list", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["name"] == "esm2-tiny" and entry["version"] == 1 and entry["aliases"] == ["default"]

    assert run("show", "default") == 0
    out = capsys.readouterr().out
    assert "esm2-tiny@1" in out and "# An imported ESM-2 checkpoint" in out and "| licence | MIT |" in out
    assert run("show", "default", "--json") == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["licence"] == "MIT"

    assert run("export", "default", tmp_path / "out") == 0
    a, b = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(a) == sorted(b) and all(a[k].equal(b[k]) for k in a)
    assert run("export", "default", tmp_path / "out") == 1
    assert "exists already" in capsys.readouterr().err

    assert run("remove", "esm2-tiny@1") == 1
    assert "alias 'default'" in capsys.readouterr().err
    assert run("import", checkpoint, "second") == 0
    assert run("alias", "default", "second@1") == 0
    assert run("remove", "esm2-tiny@1") == 0
    assert run("show", "esm2-tiny") == 1
    assert "there is no model 'esm2-tiny'" in capsys.readouterr().err


def test_register_a_head_and_its_notes(tmp_path, capsys):
    base = save_backbone(tmp_path / "b", encoder(), name="base", card="", evidence={})
    fields = {
        "kind": "head",
        "name": "solubility",
        "alphabet": "protein",
        "base_hash": base.manifest.content_hash,
        "task": "binary",
        "labels": ["soluble"],
    }
    tensors = {"weight": torch.ones(1)}
    head = write_bundle(
        tmp_path / "h",
        manifest_fields=fields,
        tensors=tensors,
        card="# H",
        evidence={"beats_baseline": False},
    )
    assert run("register", head.path) == 1
    assert "--accept-weak" in capsys.readouterr().err
    assert run("register", head.path, "--accept-weak", "--name", "sol") == 0
    assert "not registered here" in capsys.readouterr().err
    assert run("register", base.path) == 0
    assert run("list") == 0
    assert any(
        line.split()[:4] == ["sol@1", "head", "binary", "base@1"]
        for line in capsys.readouterr().out.splitlines()
    )
    assert run("show", "sol") == 0
    assert "labels:   soluble" in capsys.readouterr().out
    assert run("export", "sol", tmp_path / "out") == 1
    assert "is a head" in capsys.readouterr().err
    assert run("remove", "base@1") == 0
    assert "sol@1 cannot be used without it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ("import", "NOWHERE", "x"),
        ("import", "HF", "Bad/Name"),
        ("import", "HF", "x", "--card", "NOWHERE"),
        ("register", "NOWHERE"),
        ("remove", "x@1"),
        ("alias", "a", "x@1"),
        ("export", "x", "OUT"),
        ("list", "--registry", "gopher://x"),
    ],
)
def test_faults_exit_1_with_a_message_and_write_nothing(checkpoint, tmp_path, capsys, args):
    places = {"HF": checkpoint, "NOWHERE": tmp_path / "nowhere", "OUT": tmp_path / "out"}
    assert run(*(places.get(a, a) for a in args)) == 1
    assert capsys.readouterr().err.startswith("bioseq: error: ")
    assert {p.name for p in tmp_path.iterdir()} <= {"hf", "home"}
    assert run("list", "--json") == 0 and json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("args", [(), ("frobnicate",), ("show",), ("remove",), ("list", "--jso")])
def test_wrong_use_exits_2(args, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", ["", "list", "show", "import", "export", "register", "remove", "alias"])
def test_help_everywhere_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        models.main([*filter(None, [command]), "-h"])
    assert caught.value.code == 0
    assert f"example:\n  bioseq models {command or 'list'}" in capsys.readouterr().out


def test_a_head_can_be_used_while_any_copy_of_its_weights_is_left(tmp_path, capsys):
    first = save_backbone(tmp_path / "b", encoder(), name="first", card="# one", evidence={})
    second = save_backbone(tmp_path / "c", encoder(), name="second", card="# two", evidence={})
    weights = first.manifest.weights_hash
    fields = {
        "kind": "head",
        "name": "sol",
        "alphabet": "protein",
        "task": "binary",
        "base_weights_hash": weights,
    }
    head = write_bundle(
        tmp_path / "h", manifest_fields=fields, tensors={"w": torch.ones(1)}, card="# H", evidence={}
    )
    for bundle in (first, second, head):
        assert run("register", bundle.path) == 0
    assert run("show", "second") == 0
    assert f"weights:  {weights}" in capsys.readouterr().out
    assert run("remove", "first@1") == 0
    assert "cannot be used" not in capsys.readouterr().err
    assert run("remove", "second@1") == 0
    assert "sol@1 cannot be used without it" in capsys.readouterr().err
