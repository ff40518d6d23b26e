"""The search spaces that come with nasplat, one file each."""

from search_spaces.bats import Bats

__all__ = ["Bats"]
