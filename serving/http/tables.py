"""Arrow types of predictions. Told by the task and never inferred from the values, so that every record batch
of a stream has the same."""

from __future__ import annotations

from typing import Any


def prediction_type(example: dict[str, Any]) -> Any:
    """The struct type of all predictions of the head that made `example`; `to_pylist` gives the dicts back."""
    import pyarrow as pa

    task, value = example["task"], example["value"]
    number = pa.float64()
    several = isinstance(value, dict)  # a regression of several targets

    def by_key(kind: Any, keys: Any) -> Any:
        return pa.struct([(k, kind) for k in keys])

    value_type, interval, probabilities = pa.string(), pa.null(), pa.null()
    if task == "regression":
        pair = pa.list_(number)
        value_type = by_key(number, value) if several else number
        interval = by_key(pair, value) if several else pair
        if example["interval"] is None:
            interval = pa.null()
    elif isinstance(example["probabilities"], dict):
        probabilities = by_key(number, example["probabilities"])
        if isinstance(value, list):
            value_type = pa.list_(pa.string())
        elif isinstance(value, bool):
            value_type = pa.bool_()
        elif isinstance(value, int):
            value_type = pa.int64()
    elif example["probabilities"] is not None:
        probabilities = pa.list_(pa.list_(number))
    nearest = {"id": pa.string(), "similarity": number}
    if "homologs" in example:  # found by alignment, so that it is told how near, and what its label is
        label = value_type if task != "per_residue" else pa.null()
        nearest |= {"identity": number, "coverage": number, "label": label, "text": pa.string()}
    fields = {
        "task": pa.string(),
        "value": value_type,
        "interval": interval,
        "probabilities": probabilities,
        "ood": number,
        "ood_percentile": number,
        "head": pa.string(),
        "version": pa.int64(),
        "labels": pa.list_(pa.string()),
        "nearest": pa.list_(pa.struct(list(nearest.items()))),
        "homologs": pa.struct([("number", pa.int64()), ("effective", number)]),
    }
    spare = {k: _plain_type(v) for k, v in example.items() if k not in fields}
    return pa.struct([(k, fields.get(k, spare.get(k))) for k in example])


def coding_type() -> Any:
    """The struct type of `CodingPlace`."""
    import pyarrow as pa

    number = pa.int64()
    return pa.struct(
        [("sequence", number), ("strand", pa.string()), ("first_base", number), ("last_base", number)]
        + [("residues", number)]
    )


def _plain_type(value: Any) -> Any:
    import pyarrow as pa

    return pa.array([value]).type
