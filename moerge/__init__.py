"""Moerge: compress, route and merge small experts (PEFT adapters). Arrays in, arrays out."""

__version__ = "0.1.0"
