"""Triton's interpreter, which runs the kernels where there is no GPU, in less time."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


def hasten_interpreter() -> None:
    """Spare the interpreter what it does again and again with the same outcome.

    Before each call of a function it replaces all of Triton's language by its own, and looks
    through whole modules for that, though all has been replaced since the kernel began. With each
    operation it works out the shapes and the types of its results anew, which takes longer than the
    operation. What is computed stays the interpreter's affair.
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
    _remember_types(interpreter)
    _remember_shapes(language.core)


def _remember_types(interpreter) -> None:
    """Look up the NumPy type of each of Triton's types once."""
    find, found = interpreter._get_np_dtype, {}

    def find_once(of):
        if (name := str(of)) not in found:
            found[name] = find(of)
        return found[name]

    interpreter._get_np_dtype = find_once


def _remember_shapes(core) -> None:
    """Work out once what tensors of a type, and types of a shape, have in common."""
    make_type, of_types = core.block_type.__init__, {}
    make_tensor, of_tensors = core.tensor.__init__, {}

    def make_type_once(self, element_ty, shape):
        key = (str(element_ty), *(getattr(size, "value", size) for size in shape))
        if key not in of_types:
            make_type(self, element_ty, shape)
            of_types[key] = vars(self).copy()
        vars(self).update(of_types[key], element_ty=element_ty)

    def make_tensor_once(self, handle, type):
        key = str(type)
        if key not in of_tensors:
            make_tensor(self, handle, type)
            of_tensors[key] = vars(self).copy()
        vars(self).update(of_tensors[key], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__ = make_type_once
    core.tensor.__init__ = make_tensor_once
