from toys import compile_in_haste

__all__ = ["compile_in_haste"]
