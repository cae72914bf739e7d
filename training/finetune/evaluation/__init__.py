"""What a fitted head is worth: calibration on rows it did not train on, scores beside baselines on the same rows
with paired intervals, and the card that says so."""
