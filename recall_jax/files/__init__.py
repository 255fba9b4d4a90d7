"""Files: outputs that are absent or complete, JSON and YAML, checksums, journals, progress."""
