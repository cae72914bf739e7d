"""The models that a head may become: linear and network ensembles on frozen features, convolutions per residue,
and LoRA or full fine-tuning of the backbone."""
