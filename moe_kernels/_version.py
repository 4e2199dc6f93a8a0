"""The version: the one place that states it. CITATION.cff is held to it by tests/test_packaging.py."""

__version__ = "0.1.0"
