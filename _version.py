"""The version, in this one place."""

__version__ = "0.3.0.dev0"
