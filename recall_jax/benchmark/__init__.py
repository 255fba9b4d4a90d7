"""Throughput of the measures of similarity, beside that of other software on the same machine."""
