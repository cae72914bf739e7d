"""Trained models on disk: the bundle folder, its manifest, and the registry of names and versions.

bundle      open and write a folder      manifest    its keys and hashes
registry    names, versions, aliases     stores      where a registry lies: a folder or object storage
"""
