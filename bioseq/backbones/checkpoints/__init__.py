"""Checkpoints in Hugging Face's layout that the packed encoder computes, read and written without loss.

checkpoint  folder <-> tensors     tensors     safetensors, one file or shards
reading     config.json, vocab     layout      what a family's reader gives
esm         ESM-1b and ESM-2       esmc        ESM Cambrian        amplify     AMPLIFY
"""
