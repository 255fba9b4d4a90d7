"""Run decoders in Flax Linen, one unit at a time: `embed`, `block`, `head`.

`config` reads a config.json into an `Architecture`; `convert` maps Hugging Face tensor names to the
parameter tree; `forward` holds the pure functions that run it. A new family is one file in
`families/` and one line in its registry.
"""
