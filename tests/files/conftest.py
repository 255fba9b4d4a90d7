from toys import cache, disk, recall, toys

__all__ = ["cache", "disk", "recall", "toys"]
