"""Fine-tuning that changes the backbone: LoRA adapters, or every weight.

The head starts from the linear model on frozen embeddings (linear probing first, Kumar et al. 2022, arXiv
2202.10054), then head and backbone train together with AdamW, a warm-up and a cosine; the best epoch by the
validation score is kept. With several workers Ray Train runs the loop (`tuning`) in each. Weights and rows go to them
through Ray's object store and the result comes back the same way, so they may be on other nodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bioseq.backbones import lora as adapters
from bioseq.backbones.packed.encoder import PackedEncoder
from bioseq.backbones.packed.weights import build_encoder
from bioseq.backbones.pooling import EmbedOptions
from bioseq.errors import SpecError
from bioseq.heads.features import Context, clean
from bioseq.inference.predictor import Predictor
from bioseq.specs.finetune import FinetuneSpec
from training.finetune.embeddings import embed_cached
from training.finetune.fit import Fit, head_settings, n_outputs, say
from training.finetune.metrics import MAIN
from training.finetune.models.frozen import fit_frozen
from training.finetune.models.linear import class_weights
from training.finetune.models.pooled import Data, prepare
from training.finetune.models.residues import fit_residue_head, outputs_of
from training.finetune.models.tuning import NAME, tune
from training.tables.labels import Labels
from training.tables.splits import Split

LETTERS = 21


def fit_tuned(
    spec: FinetuneSpec,
    split: Split,
    places: dict[str, np.ndarray],
    parts: dict[str, Labels],
    predictor: Predictor,
    *,
    method: str,
    scratch: Path,
) -> Fit:
    """Train, then give the adapter (or the whole trunk), the head's tensors, and the features of all parts as
    the tuned model sees them."""
    if predictor.config.reads_homologs:
        raise SpecError(
            f"{method} does not train a backbone that reads homologs ({predictor.name}).",
            field="method",
            hint="Choose method 'frozen', whose features are made with homologs.",
        )
    if not isinstance(predictor.encoder, PackedEncoder):
        raise SpecError(
            f"{method} trains backbones of the packed encoder, and {predictor.name} runs through transformers.",
            field="method",
            hint="Choose method 'frozen'; docs/backbones.md says what each family can do.",
        )
    labels = parts["train"]
    residue = labels.task == "per_residue"
    outputs = n_outputs(labels)
    args = (spec, split, places, parts, predictor)
    data: Data | None = None
    baselines: dict[str, Any] = {}
    if residue:
        baselines["frozen_probe"] = outputs_of(fit_residue_head(*args, scratch=scratch), parts["test"])
        offset, scale, start = np.zeros(1), np.ones(1), None
    else:
        data = prepare(*args, scratch, folds=False)
        chosen = ("embedding",)
        probe = fit_frozen(labels.task, data.rows, outputs, sets=(chosen,), seed=spec.seed)
        matrix = data.held.matrix(chosen, data.rows.context, data.rows.trained)
        baselines["frozen_probe"] = probe.outputs(matrix)
        linear = fit_frozen(
            labels.task,
            data.rows,
            outputs,
            models=("linear",),
            sets=(chosen,),
            balance="none",
            seed=spec.seed,
        )
        baselines["epoch_0"] = linear.outputs(matrix)
        weight, bias = (t.mean(0).numpy() for t in linear.net.layers[0])
        weight = linear.standard.scale[:, None] * weight
        offset, scale = linear.offset, linear.scale
        start = (weight, bias[0] - linear.standard.mean @ weight)
    encoder = build_encoder(predictor.config, predictor.encoder.state_dict())
    task: dict[str, Any] = {
        "spec": spec.to_dict(),
        "method": method,
        "config": encoder.config.to_dict(),
        "ends": (predictor.alphabet.cls_id, predictor.alphabet.eos_id),
        "task": labels.task,
        "classes": outputs,
        "offset": offset,
        "scale": scale,
        "start": start,
        "device": predictor.device.type,
        "positive": np.ones(1) if residue else class_weights(labels.task, labels.y, outputs, spec.class_weights),
        "parts": {
            name: {"ids": _ids(predictor, some), "y": some.residues if residue else some.y, "weight": some.weights}
            for name, some in parts.items()
            if name != "test"
        },
    }  # fmt: skip
    weights = {k: v.cpu() for k, v in encoder.state_dict().items()}
    files = _with_ray(task, weights, spec, scratch) if spec.workers > 1 else tune(task, weights)
    for name, content in files.items():
        file = scratch / "tuned" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    result = json.loads(files["result.json"])
    say(
        f"best epoch {result['epoch']}: {MAIN[labels.task]} {result['valid'] or float('nan'):.4f} on validation"
    )
    return _fit(spec, parts, predictor, method, scratch / "tuned", result, data, baselines, (offset, scale))


def _fit(
    spec: FinetuneSpec,
    parts: dict[str, Labels],
    predictor: Predictor,
    method: str,
    folder: Path,
    result: dict[str, Any],
    data: Data | None,
    baselines: dict[str, Any],
    target: tuple[np.ndarray, np.ndarray],
) -> Fit:
    from safetensors.torch import load_file

    labels = parts["train"]
    residue = labels.task == "per_residue"
    saved = load_file(folder / "model.safetensors")
    encoder = build_encoder(predictor.config, predictor.encoder.state_dict())
    adapter_folder, architecture = None, {}
    tensors: dict[str, torch.Tensor] = {}
    if method == "lora":
        adapter_folder = folder / "adapter"
        adapters.merge(encoder, adapters.load_adapter(encoder, adapter_folder))
    else:
        own = {k.removeprefix("trunk."): v for k, v in saved.items() if k.startswith("trunk.")}
        encoder.load_state_dict(own)
        architecture, tensors = encoder.config.to_dict(), {f"trunk.{k}": v for k, v in own.items()}
    tuned = Predictor(
        encoder, name=NAME, alphabet=predictor.alphabet, dtype=predictor.dtype, device=str(predictor.device)
    )
    ask = EmbedOptions(per_residue=residue)
    features: dict[str, Any] = {}
    for part, some in parts.items():
        rows, _ = embed_cached(tuned, some.sequences, ask=ask, label=f"tuned embeddings of the {part} rows")
        features[part] = rows if residue else np.stack(rows)
    width = encoder.config.d_model + (LETTERS if residue else 0)
    weight, bias = saved["head.weight"], saved["head.bias"]
    tensors |= {"features.mean": torch.zeros(width), "features.scale": torch.ones(width)}
    if residue:
        letters = torch.zeros(len(weight), LETTERS)
        tensors |= {
            "conv.0.weight": torch.cat([weight, letters], 1)[:, :, None].contiguous(),
            "conv.0.bias": bias,
        }
    else:
        tensors |= {"layers.0.weight": weight.T[None].contiguous(), "layers.0.bias": bias[None, None]}
    if labels.task == "regression":
        tensors["target.offset"] = torch.from_numpy(target[0]).float()
        tensors["target.scale"] = torch.from_numpy(target[1]).float()
    return Fit(
        settings=head_settings(labels, method, ("embedding",), Context(alphabet=predictor.alphabet.name)),
        tensors=tensors,
        features=features,
        trained=labels,
        calibrated="the validation rows, which also chose the epoch, so the figures on the test part are the check",
        chosen={"model": method, **result["setting"], "epochs": result["epoch"], "valid": result["valid"]},
        tried=result["history"],
        adapter=adapter_folder,
        architecture=architecture,
        cost={"trained_parameters": result["trained"], "workers": spec.workers},
        rows=None if data is None else data.rows,
        held=None if data is None else data.held,
        links={} if data is None else data.links,
        training=None if data is None else data.training,
        baselines=baselines,
    )


def _ids(predictor: Predictor, labels: Labels) -> list[np.ndarray]:
    return [predictor.alphabet.encode(clean(s)).ids[: predictor.max_residues] for s in labels.sequences]


def _with_ray(
    task: dict[str, Any], weights: dict[str, torch.Tensor], spec: FinetuneSpec, scratch: Path
) -> dict[str, bytes]:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from training.ray_session import ray_session

    with ray_session(spec.address, max(4, spec.workers + 2), log_to_driver=False):
        box: Any = ray.remote(num_cpus=0)(_Box).remote()
        TorchTrainer(
            _ray_loop,
            train_loop_config={"work": [ray.put((task, weights))], "box": box},
            scaling_config=ScalingConfig(
                num_workers=spec.workers, use_gpu=task["device"] == "cuda", resources_per_worker={"CPU": 1}
            ),
            run_config=RunConfig(name="finetune", storage_path=str(scratch / "ray")),
        ).fit()
        files: dict[str, bytes] = ray.get(box.get.remote())
        return files


class _Box:
    """An actor that keeps the result until the driver fetches it: workers share no disk with it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put(self, files: dict[str, bytes]) -> None:
        self.files = files

    def get(self) -> dict[str, bytes]:
        return self.files


def _ray_loop(config: dict[str, Any]) -> None:
    import ray
    import ray.train

    context = ray.train.get_context()
    task, weights = ray.get(config["work"][0])
    files = tune(task, weights, rank=context.get_world_rank(), world=context.get_world_size())
    if files:
        ray.get(config["box"].put.remote(files))
