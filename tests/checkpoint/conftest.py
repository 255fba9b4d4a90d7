from toys import disk, recall, toys

__all__ = ["disk", "recall", "toys"]
