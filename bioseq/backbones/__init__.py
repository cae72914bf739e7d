"""The networks: how a checkpoint becomes an encoder and a backbone bundle, and where LoRA may touch it.

storage     bundle <-> encoder           importing   Hugging Face folder <-> bundle
hub         Hugging Face hub -> folder   unpickling  pickled weights -> safetensors, apart
pooling     hidden states -> embeddings  lora        adapters, routed per segment of a packed batch
"""
