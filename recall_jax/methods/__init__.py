"""Methods: similarities to weights, and the kernels that turn K parameters into one."""
