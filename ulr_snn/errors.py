"""The one exception that a wrong use of the library raises."""


class UsageError(ValueError):
    """A wrong use: one sentence that says what is wrong, where, and what to do."""
