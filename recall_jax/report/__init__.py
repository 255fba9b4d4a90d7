"""Report results as JSON, HTML pages and model cards."""
