from toys import cache, recall, toys

__all__ = ["cache", "recall", "toys"]
