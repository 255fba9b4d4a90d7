"""Provide the command line `recall`; each command imports what it needs when it runs."""
