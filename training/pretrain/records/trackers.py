"""Metrics to TensorBoard, MLflow or Weights & Biases, where installed and asked for.

TensorBoard is asked for by default and left out silently where it is not installed (the minimal GPU
environment); the other two are named by the user, so their absence is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bioseq.errors import SpecError
from bioseq.specs.pretrain import PretrainSpec


class Trackers:
    def __init__(self, spec: PretrainSpec, folder: Path, first: int):
        self._board: Any = None
        self._mlflow: Any = None
        self._wandb: Any = None
        for name in spec.trackers:
            try:
                if name == "tensorboard":
                    from torch.utils.tensorboard import SummaryWriter

                    self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)
                elif name == "mlflow":
                    import mlflow

                    self._mlflow = mlflow
                    mlflow.start_run(run_name=spec.name)
                    mlflow.log_params(_flat(spec.to_dict()))
                else:
                    import wandb

                    self._wandb = wandb.init(
                        name=spec.name, dir=str(folder), config=spec.to_dict(), resume="allow"
                    )
            except ImportError as error:
                if name != "tensorboard":
                    raise SpecError(
                        f"{name} is not installed.",
                        field="trackers",
                        hint=f"Install it with: pip install {name}",
                    ) from error

    def log(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""
        values = {
            k: v for k, v in _flat(row).items() if isinstance(v, int | float) and k not in ("step", "time")
        }
        named = {f"{row['kind']}/{k}": float(v) for k, v in values.items()}
        if self._board is not None:
            for name, value in named.items():
                self._board.add_scalar(name, value, row["step"], walltime=row["time"])
        if self._mlflow is not None:
            self._mlflow.log_metrics(named, step=row["step"])
        if self._wandb is not None:
            self._wandb.log(named, step=row["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._mlflow is not None:
            self._mlflow.end_run()
        if self._wandb is not None:
            self._wandb.finish()


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
