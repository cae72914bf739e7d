"""The models and heads that ship, made again from the data by one command each."""
