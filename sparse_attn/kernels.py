"""The Triton kernels: `sparse_attn.kernels.<name>` is a module of the folder `kernels`.

The folder has no `__init__.py`, so that at the repository's root it cannot hide another package called
`kernels`. In a wheel it lies inside this package, in a checkout beside it.
"""

from pathlib import Path

_package = Path(__file__).resolve().parent
_installed = _package / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _package.parent / "kernels")]
