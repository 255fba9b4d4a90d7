from toys import cache, disk

__all__ = ["cache", "disk"]
