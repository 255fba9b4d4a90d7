"""Write outputs that are absent or complete; read and write JSON, YAML, checksums, journals."""
