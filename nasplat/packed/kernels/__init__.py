"""The compiled half of the packed runtime: vector code, and the loops around it.

:mod:`.isa` says what a processor offers, :mod:`.emit` writes the inner loops for it, :mod:`.intrinsics` makes them
callable from compiled Python, and :mod:`.executor` runs a table of operations. Only the last two need Numba.
"""
