"""From a checked table of labels to a head's bundle: `run.finetune`, driven by `command`.

`models` fits, `evaluation` calibrates, measures beside baselines and writes the card; `fit` holds what travels
between them."""
