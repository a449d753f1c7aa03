"""Triton's interpreter, without the third of its time that goes into patching its language."""

from collections.abc import Callable

from triton.runtime import interpreter


def patch_language_once_a_launch() -> None:
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
