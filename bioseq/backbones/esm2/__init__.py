"""The Hugging Face layout of ESM-2: configuration and checkpoint, read and written without loss."""
