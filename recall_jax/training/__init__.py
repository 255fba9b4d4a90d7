"""Fine-tune models, resumably: all parameters, LoRA adapters, or with EWC."""
