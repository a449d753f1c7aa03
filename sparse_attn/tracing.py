"""What torch.compile is told about functions."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_when_traced(function: Function) -> Function:
    """Marks a function whose result torch.compile takes as a constant instead of tracing it, as
    `torch.compiler.assume_constant_result` does; but that imports the compiler, which takes as long as torch itself."""
    function._dynamo_marked_constant = True
    return function
