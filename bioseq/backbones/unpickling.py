"""Pickled tensors to safetensors: `python -m bioseq.backbones.unpickling PICKLE... OUT`, a process of its own.

torch reads them with `weights_only`: tensors and plain containers; anything else in the pickle is an error, not run.
"""

from __future__ import annotations

import sys
from pickle import UnpicklingError


def main(*names: str) -> int:
    import torch
    from safetensors.torch import save_file

    *sources, out = names
    tensors: dict[str, torch.Tensor] = {}
    for source in sources:
        try:
            state = torch.load(source, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            kind = (
                "it names things that are not tensors"
                if "global" in str(error).lower()
                else "it cannot be read"
            )
            print(f"{kind}.", file=sys.stderr)
            return 1
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            print("it is not a table of tensors.", file=sys.stderr)
            return 1
        tensors.update(state)
    # cloned: tied tensors share memory, which safetensors refuses
    save_file({str(k): v.contiguous().clone() for k, v in tensors.items()}, out, metadata={"format": "pt"})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
