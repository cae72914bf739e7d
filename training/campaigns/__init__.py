"""What a campaign measures next: surrogates that compete, picks with reasons, reports, and simulations.

Hands out `propose` (a round), `score_variants` (the latest surrogate's view of any variants), `simulate` and the command.
"""
