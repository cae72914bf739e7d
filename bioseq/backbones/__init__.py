"""The networks: how a checkpoint becomes an encoder and a backbone bundle, and where LoRA may touch it.

protocol    what a backbone is       families      folder or bundle -> backbone, whichever family
packed/     the encoder              padded/       families that run through transformers
checkpoints/  Hugging Face layouts of the packed encoder's families
storage     bundle <-> encoder           importing   Hugging Face folder <-> bundle
hub         Hugging Face hub -> folder   unpickling  pickled weights -> safetensors, apart
pooling     hidden states -> embeddings  lora        adapters, routed per segment of a packed batch
"""
