"""Searches with one set of weights that all architectures share: supernets, and what is found with them."""
