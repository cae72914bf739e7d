"""Families that run through `transformers`: sequences of like length in padded batches, behind the backbone's contract.

config      shape, vocabulary, special tokens     tokens    residues -> a family's own tokens, and back
encoder     the backbone                          checkpoint    Hugging Face folder or bundle -> encoder
"""
