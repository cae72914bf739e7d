"""The packed encoder: ESM-2's architecture over concatenated sequences, without padding."""
