"""One file per strategy; each has a SPEC."""
