"""Bundles: what is written can be read, and nothing else can."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bioseq.backbones.packed.config import CONFIGS
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.storage import load_backbone, save_backbone
from bioseq.bundles.bundle import open_bundle, write_bundle
from bioseq.bundles.manifest import check_file_name, check_name, manifest_from_dict
from bioseq.errors import BundleError, OutputError

HASH = "sha256:" + "0" * 64


def encoder(seed: int = 0, *, lm_head: bool = True) -> PackedEncoder:
    model = PackedEncoder(CONFIGS["tiny"], lm_head=lm_head)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def backbone(path: Path, seed: int = 0, **how):
    return save_backbone(
        path, encoder(seed), name="tiny", card="# A card\n", evidence={"perplexity": 17.5}, **how
    )


def head_fields(**changes):
    fields = {
        "kind": "head",
        "name": "stability",
        "alphabet": "protein",
        "base_hash": HASH,
        "task": "regression",
        "labels": ["ddg"],
        "units": {"ddg": "kcal/mol"},
    }
    return {**fields, **changes}


def head(path: Path, **how):
    fields = head_fields(**how.pop("fields", {}))
    given = {"tensors": {"weight": torch.ones(2)}, "card": "# Head", "evidence": {"beats_baseline": True}}
    return write_bundle(path, manifest_fields=fields, **{**given, **how})


@pytest.fixture
def bundle(tmp_path):
    return backbone(tmp_path / "b")


def edit_manifest(bundle, change) -> None:
    file = bundle.path / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_a_backbone_comes_back_exactly(bundle):
    opened = open_bundle(bundle.path)
    assert opened.manifest == bundle.manifest
    assert opened.card() == "# A card\n" and opened.evidence() == {"perplexity": 17.5}
    assert opened.calibration() == {} and opened.adapter is None
    loaded = load_backbone(opened)
    expected = encoder(0).state_dict()
    assert sorted(loaded.state_dict()) == sorted(expected)
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in expected.items())
    assert not loaded.training and loaded.config == CONFIGS["tiny"]


def test_dtype_is_asked_for_not_inherited(bundle):
    assert load_backbone(bundle, dtype=torch.bfloat16).final_norm.weight.dtype == torch.bfloat16


def test_a_backbone_without_lm_head(tmp_path):
    made = save_backbone(tmp_path / "b", encoder(lm_head=False), name="t", card="", evidence={})
    assert load_backbone(made).lm_head is None and made.manifest.extra["lm_head"] is False


def test_the_same_input_gives_the_same_bytes(tmp_path):
    a, b = backbone(tmp_path / "a"), backbone(tmp_path / "b")
    for file in a.path.iterdir():
        assert file.read_bytes() == (b.path / file.name).read_bytes(), file.name


def test_the_hash_covers_content_and_meaning_but_not_the_name(tmp_path):
    first = head(tmp_path / "a").manifest.content_hash
    assert head(tmp_path / "b", fields={"name": "other", "version": 7}).manifest.content_hash == first
    assert head(tmp_path / "c", fields={"units": {"ddg": "J"}}).manifest.content_hash != first
    assert head(tmp_path / "d", tensors={"weight": torch.zeros(2)}).manifest.content_hash != first
    assert head(tmp_path / "e", card="# Another").manifest.content_hash != first
    assert head(tmp_path / "f", calibration={"q": 1.0}).manifest.content_hash != first


def test_a_head_with_adapter_calibration_and_extra_files(tmp_path):
    adapter = tmp_path / "peft"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, adapter / "adapter_model.safetensors")
    (adapter / "README.md").write_text("peft writes this; it is not taken")
    extra = tmp_path / "train_ids.json"
    extra.write_text("[]")
    made = head(
        tmp_path / "h",
        tensors=None,
        adapter=adapter,
        calibration={"level": 0.9},
        extra_files={"reference/ids.json": extra},
    )
    opened = open_bundle(made.path)
    assert opened.adapter == made.path / "adapter" and opened.read_tensors() == {}
    assert sorted(p.name for p in opened.adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert opened.calibration() == {"level": 0.9} and opened.file("reference/ids.json").read_text() == "[]"
    with pytest.raises(BundleError, match="is a head, not a backbone"):
        load_backbone(opened)


# -------------------------------------------------------------------------------------------- faults on opening


@pytest.mark.parametrize("name", ["model.safetensors", "card.md", "evidence.json"])
def test_a_wrong_hash_names_found_and_expected(bundle, name):
    open_bundle(bundle.path)  # verified once: the change after it must still be seen
    file = bundle.path / name
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} has hash sha256:\w+, the manifest expects sha256:\w+"):
        open_bundle(bundle.path)


def test_a_truncated_tensor_file(bundle):
    file = bundle.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"model\.safetensors has hash"):
        open_bundle(bundle.path)
    with pytest.raises(BundleError, match=r"cannot read .*model\.safetensors"):
        open_bundle(bundle.path, verify=False).read_tensors()


def test_a_changed_manifest(bundle):
    edit_manifest(bundle, lambda m: m.update(licence="MIT"))
    with pytest.raises(BundleError, match=r"content_hash sha256:\w+, its content gives sha256:\w+"):
        open_bundle(bundle.path, verify=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(colour="red"), "colour: unknown key.*Known: kind, name"),
        (lambda m: m["extra"].update(colour="red"), r"extra\.colour: unknown key"),
        (lambda m: m["extra"].update(lm_head="yes"), r"extra\.lm_head: bool is needed, not 'yes'"),
        (lambda m: m.update(format_version=2), "format_version 2; this bioseq reads 1"),
        (lambda m: m.pop("kind"), "kind: missing"),
        (lambda m: m.update(kind="tail"), "kind: 'tail' is not one of backbone, head"),
        (lambda m: m.update(alphabet="klingon"), "alphabet: 'klingon' is not one of"),
        (lambda m: m.update(seed="1"), "seed: int is needed, not '1'"),
        (lambda m: m.update(version=True), "version: int is needed, not True"),
        (lambda m: m.update(name="../x"), "cannot name a model"),
        (lambda m: m.update(architecture={}), "needs its architecture"),
        (lambda m: m["files"].update({"../../etc/passwd": HASH}), "cannot name a file of a bundle"),
        (lambda m: m["files"].update({"card.md": "md5:1"}), r"hash of card\.md"),
        (lambda m: m["files"].pop("card.md"), r"does not list card\.md"),
        (lambda m: m["files"].pop("model.safetensors"), "neither model.safetensors nor a whole adapter"),
        (lambda m: m["files"].update({"more.json": HASH}), r"more\.json is missing"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(bundle, change, said):
    edit_manifest(bundle, change)
    with pytest.raises(BundleError, match=said):
        open_bundle(bundle.path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_manifest_that_is_no_json(bundle, text):
    (bundle.path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(bundle.path)


def test_a_missing_file_is_named(bundle):
    (bundle.path / "evidence.json").unlink()
    with pytest.raises(BundleError, match=r"evidence\.json is missing"):
        open_bundle(bundle.path)


def test_a_file_that_is_not_listed_is_refused_unless_hidden(bundle):
    (bundle.path / ".DS_Store").write_bytes(b"x")
    open_bundle(bundle.path)
    (bundle.path / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match=r"notes\.txt is not listed"):
        open_bundle(bundle.path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "optimizer.pt", "x.pkl", ".hidden.pickle", "deep/model.pth"]
)
def test_a_pickle_is_refused(bundle, name):
    (bundle.path / name).parent.mkdir(exist_ok=True)
    (bundle.path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(BundleError, match="may be a pickle"):
        open_bundle(bundle.path)


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path):
    shutil.move(bundle.path / "card.md", tmp_path / "card.md")
    (bundle.path / "card.md").symlink_to(tmp_path / "card.md")
    with pytest.raises(BundleError, match="is a link"):
        open_bundle(bundle.path)


def test_folders_that_are_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        open_bundle(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BundleError, match="bioseq models import"):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("layers.1.up.bias"), r"missing tensor: layers\.1\.up\.bias"),
        (lambda t: t.update(spare=torch.ones(1)), "unknown tensor: spare"),
        (
            lambda t: t.update({"final_norm.bias": torch.ones(3)}),
            r"final_norm\.bias has shape \(3,\), expected \(64,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_architecture(bundle, tmp_path, change, said):
    tensors = load_file(bundle.path / "model.safetensors")
    change(tensors)
    fields = {
        "kind": "backbone",
        "name": "t",
        "alphabet": "protein",
        "architecture": bundle.manifest.architecture,
    }
    odd = write_bundle(tmp_path / "odd", manifest_fields=fields, tensors=tensors, card="", evidence={})
    with pytest.raises(BundleError, match=said):
        load_backbone(odd)


# -------------------------------------------------------------------------------------------- faults on writing


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"fields": {"colour": 1}}, "colour: unknown key"),
        ({"fields": {"content_hash": HASH}}, "content_hash cannot be set"),
        ({"fields": {"base_hash": None}}, "needs base_hash"),
        ({"fields": {"task": "guess"}}, "task: 'guess' is not one of"),
        ({"tensors": None}, "needs tensors, an adapter, or both"),
        ({"evidence": {"r": float("nan")}}, r"evidence\.json cannot be written"),
        ({"adapter": Path("/nowhere")}, r"adapter_config\.json is missing"),
        ({"extra_files": {"../x": Path("/etc/hostname")}}, "cannot name a file"),
        ({"extra_files": {"card.md": Path("/etc/hostname")}}, "would replace"),
        ({"extra_files": {"w.pkl": Path(__file__)}}, "may be a pickle"),
    ],
)
def test_nothing_is_written_of_an_impossible_bundle(tmp_path, how, said):
    with pytest.raises(BundleError, match=said):
        head(tmp_path / "h", **how)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unless_asked(bundle):
    before = bundle.manifest.content_hash
    with pytest.raises(OutputError, match="exists already"):
        backbone(bundle.path, seed=1)
    assert open_bundle(bundle.path).manifest.content_hash == before
    assert backbone(bundle.path, seed=1, force=True).manifest.content_hash != before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import bioseq.bundles.bundle as module

    def full(*args, **kwargs):
        with open("/dev/full", "wb", buffering=0) as handle:
            handle.write(b"x")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    source = tmp_path / "s.json"
    source.write_text("{}")
    with pytest.raises(OutputError, match="No space left"):
        head(tmp_path / "h", extra_files={"x.json": source})
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-x", "a b", "a@1", "é", "a" * 101, "x.part", "."])
def test_names_that_could_be_paths_are_refused(name):
    with pytest.raises(BundleError, match="cannot name a model"):
        check_name(name)


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a\\b", "./a", ".a", "a//b", "manifest.json"])
def test_file_names_stay_inside(name):
    with pytest.raises(BundleError, match="cannot name a file"):
        check_file_name(name)


def test_manifest_reads_its_own_json(bundle):
    assert manifest_from_dict(json.loads(bundle.manifest.to_json())) == bundle.manifest


def test_a_bundle_opens_where_only_torch_numpy_and_safetensors_are(bundle):
    """The minimal environment: the other dependencies are made unimportable in a fresh interpreter."""
    code = (
        "import sys\n"
        "for n in ('pyarrow','Bio','transformers','peft','ray','fastapi','matplotlib','jinja2','tqdm'):\n"
        "    sys.modules[n] = None\n"
        "from bioseq.backbones.storage import load_backbone\nfrom bioseq.bundles.bundle import open_bundle\n"
        "from bioseq.backbones.importing import export_checkpoint\n"
        "b = open_bundle(sys.argv[1]); load_backbone(b); export_checkpoint(b, sys.argv[1] + '_hf')\n"
        "from bioseq.bundles.registry import Registry; Registry(sys.argv[1] + '_home').register(b)\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
