"""Triton's interpreter, without the half of its time that computes nothing."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from triton.runtime import interpreter


def make_faster() -> None:
    _patch_language_once_a_launch()
    # It computes whether sums and products of integers overflow, and looks at the outcome with `debug` alone.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    numpy_type_of_number = functools.cache(interpreter._get_np_dtype)  # which makes a table of all types at every call
    address = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda type_: address if type_.scalar.is_ptr() else numpy_type_of_number(type_.scalar)


def _patch_language_once_a_launch() -> None:
    """Within a launch, the interpreter patches `triton.language` anew at every call of a kernel's functions; the first
    call in each module is enough. The launch takes its patches back at its end, as ever."""
    patch_language, patched = interpreter._patch_lang, set()

    def patch_for_new_modules(function: Callable) -> interpreter._LangPatchScope | None:
        module = function.__globals__["__name__"]
        if module in patched:
            return None  # a launch, whose scope is used, finds nothing patched
        patched.add(module)
        scope = patch_language(function)
        restore = scope.restore

        def restore_and_forget() -> None:
            patched.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_for_new_modules
