"""Screening a FASTA library of any size on Ray: every record is computed once, and a killed run resumes to the same
bytes. `run.screen` runs a `ScreenSpec` and fills its folder; `cli` holds `bioseq screen` and `bioseq report`.
"""
