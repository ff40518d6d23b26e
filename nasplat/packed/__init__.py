"""A runtime that runs binary networks on packed bits.

::

    from nasplat.packed import PackedProgram, pack, profile, verify

    program = pack(model, example)
    logits = program(x)
    program.save("best.packed")
    program = PackedProgram.load("best.packed")
"""

from nasplat.packed.profile import profile
from nasplat.packed.program import PackedProgram, pack
from nasplat.packed.verify import verify

__all__ = ["PackedProgram", "pack", "profile", "verify"]
