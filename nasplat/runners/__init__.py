"""Where trials run: in this process (``local``), or on Ray Tune (``ray_tune``, imported only when asked for)."""
