"""Corpora for pretraining: `prepare` makes one from sequence files, `open_corpus` reads it as memory-mapped
token shards with a manifest of counts and hashes."""
