from toys import recall

__all__ = ["recall"]
