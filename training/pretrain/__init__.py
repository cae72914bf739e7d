"""Masked-language-model pretraining: `run` takes a `PretrainSpec` to backbone bundles, in one process, under
torchrun or through Ray; `recipes` names complete specs and `evaluate` holds the perplexity protocol."""
