"""esm-cpp (PyPI) as a process of `embed.py --esm-cpp PYTHON`, run by a Python that has it: `_esm_cpp.py WEIGHTS float32|int8`.

Pickled lists of sequences come in, (logits' seconds, CPU seconds, MiB, mean of the first one's last hidden states) go out.
`forward_batch` is its fastest way and gives logits; it has no batched embeddings. int8 is its own recipe: SmoothQuant
(alpha 0.5) calibrated on the first sequences that come in, then W8A8.
"""

from __future__ import annotations

import pickle
import resource
import sys
import time
from typing import Any

import numpy as np


def main() -> None:
    import esm_cpp  # type: ignore[import-not-found]

    model, tokens = esm_cpp.Model.load_from_safetensors(sys.argv[1]), esm_cpp.Tokenizer()
    wanted = sys.argv[2] == "int8"

    def encode(sequences: list[str]) -> list[Any]:
        return [np.asarray(tokens.encode(s), dtype=np.int32) for s in sequences]

    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    while True:
        try:
            ids = encode(pickle.load(sys.stdin.buffer))
        except EOFError:
            return
        if wanted:
            seen = esm_cpp.ActivationObserver()
            for one in ids:
                model.forward_with_observer(one, np.ones_like(one), seen)
            model.apply_smoothquant(seen.percentile(99.9), 0.5)
            model.quantize_weights()
            wanted = False
        wall, cpu = time.perf_counter(), time.process_time()
        model.forward_batch(ids)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        first = model.forward_with_hidden_states(ids[0])[1][-1][1:-1].mean(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        pickle.dump((wall, cpu, peak, first), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
