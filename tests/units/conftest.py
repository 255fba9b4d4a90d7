from toys import cache, recall

__all__ = ["cache", "recall"]
