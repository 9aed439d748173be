"""Triton's interpreter, which runs the kernels where there is no GPU, in less time."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


def hasten_interpreter() -> None:
    """Keep it from replacing all of Triton's language by its own before each call of a function.

    It looks through whole modules for that, though all has been replaced since the kernel began.
    """
    if find_spec("triton") is None:  # it is for Linux alone
        return
    from triton import language  # noqa: PLC0415 - which reads the environment that says how
    from triton.runtime import interpreter  # noqa: PLC0415

    replace = interpreter._patch_lang

    @cache
    def languages(function):
        """Those of the modules with the language that a function sees."""
        seen = function.__globals__.values()
        return [module for module in (language, language.core) if any(module is x for x in seen)]

    def replace_once(function):
        if any(language.core.is_builtin(module.load) for module in languages(function)):
            return replace(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    interpreter._patch_lang = replace_once
