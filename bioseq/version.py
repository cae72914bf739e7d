"""The version, in a module of its own: everything may import it without importing the public names."""

__version__ = "0.1.0"
