"""Triton's interpreter, without a search through all of triton.language at every call.

Before a kernel runs, the interpreter puts functions of its own into triton.language; it does so
again before every call of another @triton.jit function from the kernel, when all of them are in
place. To look for them took about half of the time of a kernel.
"""

from __future__ import annotations

import inspect
from typing import Any


def is_patched(function: Any) -> bool:
    """Whether the interpreter's functions are in every module of the language that it sees."""
    import triton.language as tl

    seen = [each for each in function.__globals__.values() if inspect.ismodule(each)]
    seen = [each for each in seen if each is tl or each is tl.core]
    # A module is patched, and restored, as a whole.
    return bool(seen) and not any(tl.core.is_builtin(each.load) for each in seen)


def patch_once() -> None:
    """From now on a call that finds the interpreter's functions in place leaves them there.

    A Triton whose interpreter does this in another way stays as it is.
    """
    from triton.runtime import interpreter

    stock, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if stock is None or scope is None or hasattr(stock, "stock"):
        return

    def patch_lang(function: Any) -> Any:
        return scope() if is_patched(function) else stock(function)

    patch_lang.stock = stock  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_lang
