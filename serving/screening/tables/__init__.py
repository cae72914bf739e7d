"""What a screening run computed, as tables: columns of each head, merged parts, hits, summary and report."""
