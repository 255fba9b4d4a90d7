"""Run on several devices and processes: the mesh, communication, and failure detection."""
