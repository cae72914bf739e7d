"""Checkpoints in Hugging Face's layout that the packed encoder computes, read and written without loss.

checkpoint, layout     folder <-> tensors, and how it was spelt
reading, tensors       config.json and vocabulary; safetensors
esm, esmc, amplify     a family each
"""
