"""Homologs: what a protein's relatives say about it.

Reference sets, searches in them (MMseqs2), alignments on the query's columns, weighted profiles, transfer of
labels, and how a profile is mixed with a model. The door is `open_homologs`; everything is loaded on first use.
"""
