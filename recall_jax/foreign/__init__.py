"""What others wrote and we have to run: patterns and templates, in a process with limits."""
