"""A runtime that runs binary networks on packed bits.

::

    from nasplat.packed import PackedProgram, pack, profile, verify

    program = pack(model, example)
    logits = program(x)
    program.save("best.packed")
    program = PackedProgram.load("best.packed")
"""

from nasplat.packed.profile import Profile, profile
from nasplat.packed.program import PackedProgram, pack, warm_up
from nasplat.packed.verify import Verification, verify

__all__ = ["PackedProgram", "Profile", "Verification", "pack", "profile", "verify", "warm_up"]
