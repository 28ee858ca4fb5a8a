"""Moerge: compress, route and merge small experts (PEFT adapters). Arrays in, arrays out."""
