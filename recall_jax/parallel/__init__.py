"""Several devices and processes: the mesh, processes that work together, and their watch."""
