from toys import toys

__all__ = ["toys"]
