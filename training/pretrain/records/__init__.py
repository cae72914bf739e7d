"""What a run leaves on disk: checkpoints, metrics, plot, card with its n-gram baselines, and trackers."""
