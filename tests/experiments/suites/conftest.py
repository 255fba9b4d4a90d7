from toys import cache, compile_once, recall

__all__ = ["cache", "compile_once", "recall"]
