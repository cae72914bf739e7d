from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bioseq.cli import main
from bioseq.errors import CheckpointError, SpecError
from bioseq.specs.pretrain import PretrainSpec
from training.pretrain.command import run_parser, spec_of
from training.pretrain.recipes import RECIPES, recipe
from training.pretrain.run import run


def _bad(capsys, *argv: str) -> str:
    assert main(list(argv)) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_whole_and_round_trip(name):
    spec = recipe(name)
    assert PretrainSpec.from_dict(json.loads(spec.to_json())) == spec and spec.name == name
    import tomllib

    assert PretrainSpec.from_dict(tomllib.loads(spec.to_toml())) == spec


def test_from_text_to_a_loaded_model_and_on(tmp_path, data, capsys):
    lines = [
        line for line in (data / "valid_remote_25.fasta").read_text().split("\n") if not line.startswith(">")
    ]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    valid = f"orphan={data / 'valid_orphan_25.fasta'}"
    assert (
        main(
            ["pretrain", "prepare", str(tmp_path / "a.txt"), "--valid", valid, "-o", str(tmp_path / "corpus")]
        )
        == 0
    )
    (tmp_path / "over.toml").write_text("steps = 6\n[schedule]\nwarmup = 2\ndecay = 2\n")
    common = [
        "--corpus",
        str(tmp_path / "corpus"),
        "--engine",
        "local",
        "--config",
        str(tmp_path / "over.toml"),
    ]
    common += [
        "--set",
        "tokens_per_step=600",
        "--set",
        "micro_tokens=600",
        "--set",
        "workers.threads=1",
        "--quiet",
    ]
    first = ["pretrain", "run", "protein_tiny", *common, "-o", str(tmp_path / "run"), "--register", "mine"]
    assert main(first) == 0
    assert "perplexity on orphan: " in capsys.readouterr().err
    import bioseq

    model = bioseq.load("mine@1", threads=1)
    assert model.embed([lines[0]]).shape == (1, 64)
    more = ["pretrain", "run", "protein_tiny", *common, "-o", str(tmp_path / "more"), "--init", "mine"]
    assert main(more) == 0
    assert "holds a run already" in _bad(capsys, *more)
    assert main([*more, "--resume"]) == 0


def test_continued_pretraining_from_an_esm2_directory(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=1026, position_embedding_type="rotary", token_dropout=True,
        layer_norm_eps=1e-5, emb_layer_norm_before=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.EsmForMaskedLM(config).save_pretrained(tmp_path / "hf")
    spec = tiny(steps=3, init=str(tmp_path / "hf"), optimiser__lr=1e-9, schedule__warmup=0, schedule__decay=0)
    run(spec, progress=False)
    from training.pretrain.records.checkpoint import last
    from training.pretrain.setup import open_backbone

    began = open_backbone(str(tmp_path / "hf")).state_dict()
    ended = last(Path(spec.output) / "checkpoints").model()
    assert all(torch.allclose(began[k], ended[k], atol=1e-6) for k in ended)
    with pytest.raises(CheckpointError, match=r"init: d_ff of .* is 64, the run asks for 128"):
        run(spec.override({"model.d_ff": 128, "output": str(tmp_path / "other")}), progress=False)


def test_a_job_is_started_from_a_spec_file(tiny, tmp_path):
    spec = tiny(steps=3, schedule__warmup=1, schedule__decay=1)
    (tmp_path / "job.toml").write_text(spec.to_toml())
    command = [sys.executable, "-m", "bioseq", "pretrain", "--spec", str(tmp_path / "job.toml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (Path(spec.output) / "last" / "manifest.json").exists() and done.stdout == ""


def test_precedence_is_recipe_config_set_option(tmp_path):
    (tmp_path / "c.toml").write_text("seed = 1\nsteps = 700\ncorpus = 'a'\n")
    argv = ["protein_tiny", "--config", str(tmp_path / "c.toml"), "--set", "seed=2", "--corpus", "b"]
    spec = spec_of(run_parser().parse_args(argv))
    assert (spec.seed, spec.steps, spec.corpus, spec.crop) == (2, 700, "b", recipe("protein_tiny").crop)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lr=1", "optimizer.lr: unknown key"),
        ("optimiser.rate=1", "optimiser.rate: unknown key"),
        ("optimiser.lr=-1", "optimiser.lr: -1.0 is not above 0"),
        ("model.n_heads=5", "model.n_heads: 5 heads do not divide 64"),
        ("crop=2000", "crop: 2000 residues are over the model's 1022"),
        ("schedule.warmup=9999", "schedule.warmup: warm-up 9999"),
        ("precision=float16", "precision: 'float16' is not one of"),
        ("workers.min_count=4", "workers.min_count: 4 is over workers.count 1"),
        ("steps=many", "steps: int is needed"),
        ("masking.rate=1.5", "masking.rate: 1.5 is not between"),
        ("compile=true", "compile: torch.compile needs minutes on a CPU"),
        ("nonsense", "--set: 'nonsense' is not of the form"),
    ],
)
def test_a_bad_setting_names_its_field_and_leaves_no_folder(setting, message, corpus_path, tmp_path, capsys):
    argv = ["pretrain", "run", "protein_tiny", "--corpus", str(corpus_path), "-o", str(tmp_path / "run")]
    assert message in _bad(capsys, *argv, "--set", setting)
    assert not (tmp_path / "run").exists()


def test_more_refusals(corpus_path, tmp_path, capsys):
    out = ["-o", str(tmp_path / "run"), "--engine", "local"]
    assert "'protein_9m' is not a recipe; the recipes are protein_tiny" in _bad(
        capsys, "pretrain", "run", "protein_9m", *out
    )
    assert "not a prepared corpus" in _bad(
        capsys, "pretrain", "run", "protein_tiny", "--corpus", str(tmp_path), *out
    )
    (tmp_path / "spec.toml").write_text("name = 'x'\nspeed = 3\n")
    assert "speed: unknown key" in _bad(capsys, "pretrain", "--spec", str(tmp_path / "spec.toml"))
    common = ["pretrain", "run", "protein_tiny", "--corpus", str(corpus_path), *out]
    assert "alphabet: the corpus holds protein" in _bad(capsys, *common, "--set", "alphabet=dna")
    assert "wandb is not installed" in _bad(capsys, *common, "--set", 'trackers=["wandb"]')
    assert "address: goes with the Ray engine only" in _bad(capsys, *common, "--address", "nowhere:1")
    assert "do not hold the longest sequence" in _bad(capsys, *common, "--set", "micro_tokens=20")
    assert not (tmp_path / "run").exists()
    assert main(["pretrain", "fly"]) == 2 and main(["pretrain"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "run", "-h"])
    assert stop.value.code == 0 and "example:" in capsys.readouterr().out
    with pytest.raises(SpecError, match="not both"):
        spec_of(run_parser().parse_args([]))
