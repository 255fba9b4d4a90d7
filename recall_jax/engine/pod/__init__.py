"""Many processes as one: sharded tensors, the processes themselves, and what each writes."""
