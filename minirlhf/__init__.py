"""RLHF in NumPy and CuPy, written to be read: every operation beside its gradient."""

__version__ = "0.1.0"
