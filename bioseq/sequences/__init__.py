"""Sequences before any model sees them: alphabets, FASTA records, mutations, translation, masking."""
