"""Run patterns and templates written by others, in a separate process with limits."""
