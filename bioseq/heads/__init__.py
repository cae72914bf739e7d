"""Task heads as they are applied: `head.Head` turns features of a sequence into calibrated predictions, `features`
computes blocks from the sequence itself, `ood` says how far a sequence lies from the training data."""
