"""`bioseq models import hf:...` as a user types it, against a server of this computer that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, Hub
from safetensors.torch import load_file

from bioseq.backbones.checkpoints.checkpoint import write_checkpoint
from bioseq.backbones.packed.config import CONFIGS, ModelConfig
from bioseq.backbones.packed.encoder import PackedEncoder

pytest.importorskip("huggingface_hub")


def save(folder: Path, config: ModelConfig = CONFIGS["tiny"]) -> Path:
    encoder = PackedEncoder(config)
    encoder.init_weights(torch.Generator().manual_seed(0))
    write_checkpoint(folder, config, encoder.state_dict())
    (folder / "README.md").write_text("---\nlicense: mit\ntags:\n- biology\n---\n# A model\n")
    return folder


@pytest.fixture
def hub(tmp_path):
    hub = Hub()
    hub.repos["lab/tiny"] = save(tmp_path / "tiny")
    yield hub
    hub.close()


@pytest.fixture
def bioseq(hub, tmp_path):
    def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        ours = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "BIOSEQ_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "bioseq", *map(str, words)]
        return subprocess.run(
            command, env={**kept, **ours, **env}, capture_output=True, text=True, check=False
        )

    return run


def fetch(bioseq, source: str = "hf:lab/tiny", **env: str) -> str:
    """Import, and the error that it gave."""
    done = bioseq("models", "import", source, "mine", **env)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def pickled(folder: Path, state: object = None) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights) if state is None else state, folder / "pytorch_model.bin")
    weights.unlink()


def test_import_by_a_tag_then_embed_and_again_offline(hub, bioseq, tmp_path):
    done = bioseq("models", "import", "hf:lab/tiny@v1", "mine")
    assert done.returncode == 0, done.stderr
    assert "registered mine@1" in done.stderr and f"fetching commit {COMMIT}" in done.stderr
    assert "lab/tiny: model.safetensors, file 1 of 1" in done.stderr
    shown = bioseq("models", "show", "mine", "--json")
    manifest = json.loads(shown.stdout)["manifest"]
    assert manifest["licence"] == "mit" and manifest["extra"]["source"] == f"hf:lab/tiny@{COMMIT}"
    card = bioseq("models", "show", "mine").stdout
    assert f"| source | `hf:lab/tiny@{COMMIT}` |" in card and "| licence | mit |" in card

    assert bioseq("models", "export", "mine", tmp_path / "out").returncode == 0
    theirs, ours = (load_file(f / "model.safetensors") for f in (hub.repos["lab/tiny"], tmp_path / "out"))
    assert sorted(theirs) == sorted(ours) and all(theirs[k].equal(ours[k]) for k in theirs)

    asked = len(hub.asked)
    (tmp_path / "p.fasta").write_text(">a\nMKTAYIAKQR\n")
    embedded = bioseq("embed", tmp_path / "p.fasta", "--model", "mine", "-o", tmp_path / "e.parquet")
    assert embedded.returncode == 0 and (tmp_path / "e.parquet").stat().st_size, embedded.stderr
    again = bioseq("models", "import", "hf:lab/tiny@v1", "again", "--licence", "ours", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(hub.asked) == asked  # neither embedding nor offline mode asked the hub
    entries = json.loads(bioseq("models", "show", "again", "--json").stdout)["manifest"]
    assert entries["weights_hash"] == manifest["weights_hash"] and entries["licence"] == "ours"


def test_a_broken_transfer_is_taken_up_where_it_stopped(hub, bioseq, tmp_path):
    config = ModelConfig(
        **{**CONFIGS["tiny"].to_dict(), "d_model": 256, "d_ff": 1024, "n_layers": 4, "n_heads": 4}
    )
    hub.repos["lab/big"] = save(tmp_path / "big", config)
    assert (tmp_path / "big" / "model.safetensors").stat().st_size > 12_000_000
    hub.breaks["model.safetensors"] = 11 << 20  # the client writes pieces of 10 MiB
    done = bioseq("models", "import", "hf:lab/big", "mine")
    assert done.returncode == 0, done.stderr
    ranges = [r for m, path, r in hub.asked if m == "GET" and path.endswith("/model.safetensors")]
    assert ranges[0] is None and ranges[1:] == [f"bytes={10 << 20}-"]


def test_pickled_weights_are_converted_and_it_is_said(hub, bioseq, tmp_path):
    before = load_file(hub.repos["lab/tiny"] / "model.safetensors")
    pickled(hub.repos["lab/tiny"])
    done = bioseq("models", "import", "hf:lab/tiny", "mine")
    assert done.returncode == 0, done.stderr
    assert "has no safetensors: its pickled weights are converted" in done.stderr
    assert bioseq("models", "export", "mine", tmp_path / "out").returncode == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(before) == sorted(after) and all(before[k].equal(after[k]) for k in before)


class Malice:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_malicious_pickle_is_refused_and_not_run(hub, bioseq, tmp_path):
    pickled(hub.repos["lab/tiny"], {"weight": Malice(tmp_path / "mark")})
    said = fetch(bioseq)
    assert "weights of lab/tiny were refused: it names things that are not tensors" in said
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("state", [[1, 2], {"weight": {"step": 1}}], ids=["a-list", "nested"])
def test_a_pickle_of_other_things_is_refused(hub, bioseq, state):
    pickled(hub.repos["lab/tiny"], state)
    assert "refused: it is not a table of tensors." in fetch(bioseq)


def test_safetensors_are_preferred(hub, bioseq):
    (hub.repos["lab/tiny"] / "pytorch_model.bin").write_bytes(b"never read")
    done = bioseq("models", "import", "hf:lab/tiny", "mine")
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" not in hub.files()


def edit_config(hub: Hub, **changes: object) -> None:
    file = hub.repos["lab/tiny"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_code_of_a_repository_is_refused_before_the_weights_are_fetched(hub, bioseq):
    edit_config(hub, model_type="novel", auto_map={"AutoModel": "modeling_novel.NovelModel"})
    (hub.repos["lab/tiny"] / "modeling_novel.py").write_text("raise SystemExit('ran')\n")
    said = fetch(bioseq)
    assert "program code from its repository" in said and "'novel'" in said
    assert set(hub.files()) <= {"config.json", "vocab.txt", "README.md"}


def test_auto_map_on_a_known_architecture_is_no_matter(hub, bioseq):
    edit_config(hub, auto_map={"AutoModel": "modeling_esm.EsmModel"})
    assert bioseq("models", "import", "hf:lab/tiny", "mine").returncode == 0
    assert all(not name.endswith(".py") for name in hub.files())


def test_an_unknown_architecture_is_refused_before_the_weights_are_fetched(hub, bioseq):
    edit_config(hub, model_type="mamba")
    assert "lab/tiny: config.json has model_type 'mamba'" in fetch(bioseq)
    assert "model.safetensors" not in hub.files()


def test_gated(hub, bioseq):
    hub.gated.add("lab/tiny")
    said = fetch(bioseq)
    assert (
        "only to people who accepted its terms" in said
        and f"{hub.url}/lab/tiny" in said
        and "HF_TOKEN" in said
    )
    assert bioseq("models", "import", "hf:lab/tiny", "mine", HF_TOKEN="good").returncode == 0


def test_missing(hub, bioseq):
    assert "there is no model lab/absent on" in fetch(bioseq, "hf:lab/absent")
    assert "lab/tiny has no revision 'v9'" in fetch(bioseq, "hf:lab/tiny@v9")
    assert "does not name a model" in fetch(bioseq, "hf:tiny")
    (hub.repos["lab/tiny"] / "model.safetensors").unlink()
    assert "lab/tiny has no weights that bioseq reads" in fetch(bioseq)
    (hub.repos["lab/tiny"] / "config.json").unlink()
    assert "lab/tiny lacks a file that a model needs" in fetch(
        bioseq, HF_HOME=str(hub.repos["lab/tiny"] / "hf")
    )


def test_no_network(hub, bioseq):
    assert "is not on this computer, and HF_HUB_OFFLINE" in fetch(bioseq, HF_HUB_OFFLINE="1")
    assert not hub.asked
    hub.close()
    assert "cannot be reached" in fetch(bioseq)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: other\nlicense_name: house-licence\n---\n", "house-licence"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("# no heading\n", "unknown"),
        ("---\nlicense: [\n---\n", "unknown"),
        ("---\nlicense: a | b\n---\n", "a b"),
    ],
    ids=["named", "two", "none", "broken", "table"],
)
def test_the_licence_of_a_model_card(tmp_path, text, licence):
    from bioseq.backbones.hub import _licence

    (tmp_path / "README.md").write_text(text)
    assert _licence(tmp_path / "README.md") == licence


@pytest.mark.parametrize(("family", "text"), [("prot_t5", "MKV"), ("nucleotides", "ACGTTA"), ("esmc", "MKV")])
def test_other_families_come_with_their_vocabulary(hub, bioseq, tmp_path, family, text):
    pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    import family_folders

    folder = tmp_path / family
    getattr(family_folders, family)(folder)
    hub.repos["lab/other"] = folder
    done = bioseq("models", "import", "hf:lab/other", "other")
    assert done.returncode == 0, done.stderr
    (tmp_path / "in.fasta").write_text(f">a\n{text}\n")
    done = bioseq(
        "embed", tmp_path / "in.fasta", "--model", "other", "-o", tmp_path / "out.npz", HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr


def test_a_known_name_that_needs_its_own_code_is_refused_before_the_weights(hub, bioseq, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    import family_folders

    folder = tmp_path / "bert"
    family_folders.prot_bert(folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {"AutoModel": "bert_layers.BertModel"}
    }
    (folder / "config.json").write_text(json.dumps(config))
    hub.repos["lab/tiny"] = folder
    said = fetch(bioseq)
    assert "runs no such code" in said
    assert not any("safetensors" in path for _, path, _ in hub.asked)
