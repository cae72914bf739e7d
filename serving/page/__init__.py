"""The page at `/`: static files, built from `source/` and committed with their hashes, that speak the public API only."""
