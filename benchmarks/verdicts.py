"""Why a benchmark has no figure of something."""


class Absent(Exception):
    """Why a variant cannot be measured."""


class Wrong(Exception):
    """A result that is not what it should be."""
