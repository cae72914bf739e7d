"""Campaigns: rounds of design and measurement of variants of one wild type.

Hands out `Campaign` (a folder with campaign.toml, prior.csv, ledger.csv, rounds/), its `Space` and its `State`, and
ingests results. What to measure next is computed in `training.campaigns`.
"""
