"""LoRA and full fine-tuning, and mixed heads in one packed batch."""

from __future__ import annotations

import numpy as np
import pytest
from heads_tables import sequences, table, write_table

from bioseq.bundles.bundle import open_bundle
from bioseq.heads.head import Head
from bioseq.inference.loading import load
from bioseq.specs.finetune import FinetuneSpec, LoraSettings

pytest.importorskip("sklearn", reason="the extra [train] is not installed")
from training.finetune.models.tuning import batches
from training.finetune.run import finetune


def spec_for(tmp_path, backbone, method, name, **options) -> FinetuneSpec:
    settings = {
        "targets": ("k",),
        "epochs": 2,
        "bootstrap": 20,
        "neighbours": 20,
        "batch_tokens": 512,
        "homologs": "none",
    } | options
    path = write_table(tmp_path / f"{name}.csv", table(60))
    return FinetuneSpec(
        labels=str(path),
        base=str(backbone),
        method=method,
        output=str(tmp_path / name),
        threads=1,
        **settings,
    )


@pytest.fixture(scope="module")
def heads(tmp_path_factory, backbone):
    """Two LoRA heads, a full one and a frozen one, by name."""
    folder = tmp_path_factory.mktemp("heads")
    lora = LoraSettings(rank=4, alpha=32)
    made = {
        "lora_k": finetune(spec_for(folder, backbone, "lora", "lora_k", lora=lora, lr=5e-3)),
        "lora_class": finetune(
            spec_for(
                folder, backbone, "lora", "lora_class", targets=("kind",), lr=5e-3,
                lora=LoraSettings(rank=2, targets=("value", "output.dense")),
            )
        ),
        "full": finetune(spec_for(folder, backbone, "full", "full", lr=1e-3)),
        "frozen": finetune(spec_for(folder, backbone, "frozen", "frozen", features=(), models=("linear",))),
    }  # fmt: skip
    return {name: str(bundle.path) for name, bundle in made.items()}


def test_mixed_heads_in_one_call_equal_each_alone(backbone, heads):
    model = load(backbone, threads=1)
    fresh = sequences(7, 11)
    names = list(heads.values())
    together = model.predict(fresh, names)
    for name in names:
        alone = load(backbone, threads=1)
        for s, both in zip(fresh, together):
            one = alone.predict([s], [name])[0][name]
            if one["task"] == "regression":
                np.testing.assert_allclose(both[name]["value"], one["value"], rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_allclose(
                    list(both[name]["probabilities"].values()), list(one["probabilities"].values()), atol=1e-5
                )


def test_nearest_examples_are_found_in_the_space_of_the_head(backbone, heads):
    """Also of a head with weights of its own, which the bare backbone's embedding would not find."""
    model = load(backbone, threads=1)
    rows = {r["id"]: r["sequence"] for r in table(60)}
    for name in heads.values():
        known = Head.load(open_bundle(name)).neighbour_ids[:4]
        assert len(known) == 4
        answers = model.predict([rows[i] for i in known], [name], nearest=2)
        assert [a[name]["nearest"][0]["id"] for a in answers] == known
        assert all(a[name]["nearest"][0]["similarity"] > 0.99 for a in answers)


def test_a_sequence_costs_one_segment_for_each_head_with_weights_of_its_own(backbone, heads):
    model = load(backbone, threads=1)
    cost = {n: model.prepare("ACDEFGHIKL", heads=[h]).tokens for n, h in heads.items()}
    assert cost == {"lora_k": 12, "lora_class": 12, "full": 12, "frozen": 12}
    assert model.prepare("ACDEFGHIKL", heads=list(heads.values())).tokens == 4 * 12


def test_the_adapter_in_the_bundle_changed_and_peft_can_read_it(backbone, heads, tmp_path):
    from bioseq.backbones.checkpoints.checkpoint import write_checkpoint
    from bioseq.backbones.storage import load_backbone

    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    encoder = load_backbone(open_bundle(backbone))
    write_checkpoint(tmp_path / "hf", encoder.config, encoder.state_dict())
    base = transformers.EsmModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False)
    bundle = open_bundle(heads["lora_k"])
    theirs = peft.PeftModel.from_pretrained(base, bundle.adapter).eval()
    import torch

    sequence = sequences(1, 5)[0]
    model = load(backbone, threads=1)
    ids = model.prepare(sequence).ids
    tokens = torch.tensor([[0, *ids.tolist(), 2]])
    with torch.no_grad():
        hidden = theirs(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0, 1:-1]
    head = Head.load(bundle)
    want = head.predict(hidden.mean(0, keepdim=True).numpy(), [sequence])[0]["value"]
    got = model.predict([sequence], [heads["lora_k"]])[0][heads["lora_k"]]["value"]
    assert got == pytest.approx(want, rel=1e-5)
    bare = head.predict(model.embed([sequence]), [sequence])[0]["value"]
    assert abs(got - bare) > 1e-6  # the adapter matters


def test_residue_heads_can_be_tuned(tmp_path, backbone):
    from test_heads_finetune import residue_files

    files = residue_files(tmp_path, 40)
    bundle = finetune(
        FinetuneSpec(
            labels=files[0], residue_labels=files[1], residue_mask=files[2], base=str(backbone), method="lora",
            output=str(tmp_path / "head"), epochs=3, lr=1e-2, batch_tokens=300, bootstrap=20, neighbours=0, threads=1,
            homologs="none",
        )
    )  # fmt: skip
    answer = load(backbone, threads=1).predict(["ACDEFGHIKL"], [str(bundle.path)])[0][str(bundle.path)]
    assert len(answer["value"]) == 10
    assert bundle.evidence()["metrics"]["accuracy"] > bundle.evidence()["baselines"]["majority"]["accuracy"]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_rank_has_equally_many_batches_and_together_all_rows(world):
    lengths = np.random.default_rng(0).integers(5, 60, 83)
    plans = [batches(lengths, 200, 1, 0, rank, world) for rank in range(world)]
    assert len({len(p) for p in plans}) == 1
    assert {int(i) for p in plans for b in p for i in b} == set(range(83))
    assert all(lengths[b].sum() <= 200 for p in plans for b in p)


@pytest.mark.timeout(600)  # Ray alone may need minutes to start on a busy machine
def test_two_ray_workers_train_the_head(tmp_path, backbone):
    """Starts Ray: slow on a busy machine, so it is small."""
    pytest.importorskip("ray.train")
    bundle = finetune(spec_for(tmp_path, backbone, "lora", "two", workers=2, epochs=2, lr=5e-3))
    evidence = bundle.evidence()
    assert evidence["cost"]["workers"] == 2 and [t["epoch"] for t in evidence["tried"]] == [0, 1, 2]
    assert bundle.adapter is not None


def test_losses_are_sums_and_counts_so_that_uneven_batches_weigh_their_rows():
    import torch

    from training.finetune.models.linear import task_loss

    rng = torch.Generator().manual_seed(0)
    out, y = torch.randn(9, 2, generator=rng), torch.randn(9, 2, generator=rng)
    y[2, 0] = torch.nan
    weight, ones = torch.rand(9, generator=rng), torch.ones(2)
    whole, count = task_loss("regression", out, y, weight, ones)
    parts = [task_loss("regression", out[r], y[r], weight[r], ones) for r in (slice(0, 7), slice(7, 9))]
    assert sum(p[0] for p in parts).item() == pytest.approx(whole.item(), rel=1e-6)
    assert sum(p[1] for p in parts).item() == pytest.approx(count.item(), rel=1e-6)
    means = [(p[0] / p[1]).item() for p in parts]
    assert np.mean(means) != pytest.approx(
        (whole / count).item(), rel=1e-3
    )  # what a mean of means would give


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_nodes_train_the_head_and_send_it_back(tmp_path, backbone):
    """Workers on two nodes: weights come through the object store, and the result goes back the same way."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address)
        bundle = finetune(spec_for(tmp_path, backbone, "lora", "nodes", workers=2, epochs=1, lr=5e-3))
        assert bundle.adapter is not None and bundle.evidence()["cost"]["workers"] == 2
        assert {"frozen_probe", "epoch_0"} <= set(bundle.evidence()["baselines"])
    finally:
        ray.shutdown()
        cluster.shutdown()
