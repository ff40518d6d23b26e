"""``python -m nasplat``: the command line."""

from nasplat.cli import main

main()
