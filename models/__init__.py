"""Models and methods built on the layers: they know the layers, never a backend."""
