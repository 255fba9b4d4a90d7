"""Many processes as one: tensors sharded over the mesh, its programs, and what each writes."""
