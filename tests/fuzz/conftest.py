from toys import cache, toys

__all__ = ["cache", "toys"]
