"""The commands of `bin/`: each file is one of them."""
