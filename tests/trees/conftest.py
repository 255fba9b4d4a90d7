from toys import recall, toys

__all__ = ["recall", "toys"]
