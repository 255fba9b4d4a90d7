"""JAX trees on disk, merged as they are: all there is to know is which leaf is which unit."""
