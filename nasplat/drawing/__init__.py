"""Pictures of architectures: what a space says of one (``sketch``), and how it is drawn (``cells``, ``stages``).

A space describes an architecture as data, cells as :class:`Graph` and rows of stages as :class:`Stages`; everything
about lines and colours is here, so that all spaces look alike.
"""

from nasplat.drawing.picture import Picture
from nasplat.drawing.sketch import Block, Graph, Sketch, Stages

__all__ = ["Block", "Graph", "Picture", "Sketch", "Stages"]
