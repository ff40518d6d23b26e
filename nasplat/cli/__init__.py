"""The command line: a thin layer over the same calls that Python users make."""

from nasplat.cli import breakdown, catalogue, preflight, profile_space, studies
from nasplat.cli.app import app, main

__all__ = ["app", "breakdown", "catalogue", "main", "preflight", "profile_space", "studies"]
