"""The command line: a thin layer over the same calls that Python users make."""

from nasplat.cli import catalogue, studies
from nasplat.cli.app import app, main

__all__ = ["app", "catalogue", "main", "studies"]
