"""Generate the tokens with which a model continues a prompt."""
