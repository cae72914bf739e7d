"""ESM-1b, ESM-C and AMPLIFY in the packed encoder, against transformers' classes and an independent reading."""

import json

import amplify_reference
import family_folders
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bioseq
from bioseq.backbones import lora
from bioseq.backbones.checkpoints.amplify import ABSENT
from bioseq.backbones.checkpoints.checkpoint import load_checkpoint, write_checkpoint
from bioseq.backbones.importing import export_checkpoint, import_checkpoint
from bioseq.bundles.bundle import open_bundle
from bioseq.errors import CheckpointError, SequenceTooLongError
from bioseq.sequences.alphabet import protein

transformers = pytest.importorskip("transformers")
FAMILIES = ("esm1b", "esmc", "amplify")
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "MKV", "ACDEFGHIKLMNPQRSTVWYBLLLL<mask>K", "W" * 50 + "<mask><mask>A"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        getattr(family_folders, family)(root / family)
    return {family: root / family for family in FAMILIES}


def tokens_of(sequence):
    parts = sequence.replace("<mask>", "?")
    return ["<cls>", *("<mask>" if a == "?" else a for a in parts), "<eos>"]


def reference(family, folder, sequence):
    """(states of every layer, logits), each with the special tokens."""
    tokens = tokens_of(sequence)
    if family == "amplify":
        own = {"<cls>": "<bos>"}
        return amplify_reference.compute(folder, [own.get(t, t) for t in tokens])
    kind = transformers.EsmcForMaskedLM if family == "esmc" else transformers.EsmForMaskedLM
    model = kind.from_pretrained(folder).eval()
    ids = torch.tensor([[protein().id(t) for t in tokens]])
    with torch.no_grad():
        out = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return [h[0] for h in out.hidden_states], out.logits[0]


def worst(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_and_the_logits_equal_the_reference(folders, family):
    model = bioseq.load(folders[family], threads=1)
    depth = model.config.n_layers
    got = model.embed(SEQUENCES, layers=range(depth + 1), per_residue=True)
    logits = model.logits(SEQUENCES)
    for sequence, states, said in zip(SEQUENCES, got, logits, strict=True):
        want, wanted = reference(family, folders[family], sequence)
        for layer in range(depth + 1):
            assert worst(states[layer], want[layer][1:-1]) <= 1e-5, layer
        wanted = wanted[1:-1].numpy()
        if family == "amplify":
            places = [amplify_reference.VOCABULARY.index(a) for a in protein().standard]
            assert worst(said[:, protein().standard_ids], wanted[:, places]) <= 1e-5
            assert (said[:, protein().id("X")] == np.float32(ABSENT)).all()
        else:
            assert worst(said, wanted) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_does_not_depend_on_batch_mates(folders, family):
    model = bioseq.load(folders[family], threads=1)
    together = model.embed(SEQUENCES)
    for sequence, row in zip(SEQUENCES, together):
        assert worst(row, model.embed([sequence])[0]) <= 1e-5
    half = bioseq.load(folders[family], threads=1, dtype="bfloat16")
    for sequence, row in zip(SEQUENCES, half.embed(SEQUENCES)):
        assert worst(row, half.embed([sequence])[0]) <= 2e-2
    assert worst(half.embed(SEQUENCES), together) <= 3e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_imported_and_exported_the_tensors_are_the_same_bytes(folders, family, tmp_path):
    bundle = import_checkpoint(folders[family], tmp_path / "bundle", name="m")
    again = bioseq.load(tmp_path / "bundle", threads=1)
    assert again.weights_hash == bioseq.load(folders[family], threads=1).weights_hash
    export_checkpoint(open_bundle(bundle.path), tmp_path / "out")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", folders[family]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in theirs)
    assert (tmp_path / "out/config.json").read_bytes() == (folders[family] / "config.json").read_bytes()
    assert load_checkpoint(tmp_path / "out").weights_hash == again.weights_hash


@pytest.mark.parametrize("family", ["esm1b", "esmc"])
@pytest.mark.parametrize("lm", [True, False])
def test_transformers_loads_what_was_not_imported(tmp_path, family, lm):
    getattr(family_folders, f"{family}_model")(lm).save_pretrained(
        tmp_path / "from", save_original_format=False
    )
    found = load_checkpoint(tmp_path / "from")
    assert found.lm_head is lm
    write_checkpoint(tmp_path / "to", found.config, found.tensors)
    kinds = {
        "esm1b": (transformers.EsmModel, transformers.EsmForMaskedLM),
        "esmc": (transformers.EsmcModel, transformers.EsmcForMaskedLM),
    }
    model, missing = kinds[family][lm].from_pretrained(tmp_path / "to", output_loading_info=True)
    named = {k for k in missing["missing_keys"] if "contact_head" not in k and "pooler" not in k}
    assert not named and not missing["unexpected_keys"]
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    with torch.no_grad():
        got = model.eval()(ids, attention_mask=torch.ones_like(ids))[0]
        kind = kinds[family][lm].from_pretrained(tmp_path / "from").eval()
        assert worst(got, kind(ids, attention_mask=torch.ones_like(ids))[0]) <= 1e-6


def test_parameters_and_operations_are_counted(folders):
    for family in FAMILIES:
        found = load_checkpoint(folders[family])
        counted = sum(t.numel() for t in found.encoder.parameters())
        assert found.config.n_parameters == counted, family
        matrices = sum(
            t.numel() for n, t in found.encoder.named_parameters() if t.ndim == 2 and "layers." in n
        )
        assert found.config.flops_per_token(0) == 2 * matrices


def test_learned_positions_bound_the_length(folders):
    model = bioseq.load(folders["esm1b"], threads=1)
    assert model.max_residues == 76
    model.embed(["M" * 76])
    with pytest.raises(SequenceTooLongError, match="77 residues; the limit is 76"):
        model.embed(["M" * 77])
    assert model.embed(["M" * 200], long_sequences="window").shape == (1, 48)


ALL = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


@pytest.mark.parametrize("targets", [("query", "value"), ALL])
@pytest.mark.parametrize("family", ["esmc", "amplify"])
def test_lora_acts_on_the_familys_own_modules(folders, family, targets, tmp_path):
    found = load_checkpoint(folders[family])
    encoder = found.encoder.eval()
    shape = lora.LoraShape(2, 4.0, lora.exact_targets(targets, family))
    adapter = lora.LoraAdapter(encoder, shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for b in adapter.b.values():
            b.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    lora.save_adapter(adapter, tmp_path / "adapter")
    lora.attach(encoder, "one", tmp_path / "adapter")
    ids = torch.tensor([0, *range(4, 20), 2])
    cu = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad(), lora.routed(encoder, [("one", 0, len(ids))]):
        got = encoder(ids, cu, len(ids))
    merged = load_checkpoint(folders[family]).encoder.eval()
    lora.merge(merged, adapter)
    with torch.no_grad():
        assert worst(got, merged(ids, cu, len(ids))) <= 1e-5
        assert worst(got, encoder(ids, cu, len(ids))) > 1e-2
    if family == "esmc":
        peft = pytest.importorskip("peft")
        model = transformers.EsmcForMaskedLM.from_pretrained(folders[family]).esmc
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        with torch.no_grad():
            want = theirs(ids[None], attention_mask=torch.ones(1, len(ids))).last_hidden_state[0]
        assert worst(got, want) <= 1e-5


@pytest.mark.parametrize(
    ("family", "key", "value", "said"),
    [
        ("esmc", "hidden_act", "gelu", "hidden_act 'gelu'"),
        ("esmc", "num_key_value_heads", 2, "num_key_value_heads 2"),
        ("esmc", "rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta 500000"),
        ("esmc", "vocab_size", 20, "vocab_size 20"),
        ("amplify", "rms_norm", False, "rms_norm False"),
        ("amplify", "hidden_act", "GELU", "hidden_act 'GELU'"),
        ("amplify", "vocab_size", 32, "27 tokens"),
        ("esm1b", "max_position_embeddings", 60, "position_embeddings.weight has shape"),
        ("esm1b", "emb_layer_norm_before", False, "unknown tensors: esm.embeddings.layer_norm"),
    ],
)
def test_another_architecture_under_a_known_name_is_refused(folders, tmp_path, family, key, value, said):
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in folders[family].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


def test_a_vocabulary_that_does_not_match_is_refused(folders, tmp_path):
    (tmp_path / "v").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "v" / name).write_bytes((folders["amplify"] / name).read_bytes())
    with pytest.raises(CheckpointError, match="needs its vocabulary"):
        load_checkpoint(tmp_path / "v")
    (tmp_path / "v/vocab.txt").write_text("\n".join(["ä", *amplify_reference.VOCABULARY[1:]]))
    with pytest.raises(CheckpointError, match="which no protein has"):
        load_checkpoint(tmp_path / "v")
