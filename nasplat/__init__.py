"""nasplat: neural architecture search with measured hardware cost."""
