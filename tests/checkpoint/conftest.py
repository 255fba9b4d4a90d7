from toys import disk

__all__ = ["disk"]
