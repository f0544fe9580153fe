"""The exceptions of the library."""


def reason(error: BaseException) -> str:
    """Returns why something failed: the words of the system, or the first line of the error's text."""
    return getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]


def lost_process(error: BaseException) -> bool:
    """Returns whether torch raises this error, in the midst of other code, because a loader's process has ended."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


class UsageError(ValueError):
    """A wrong use: one sentence that says what is wrong, where, and what to do."""


def unwritable(path: object, error: OSError) -> UsageError:
    """Returns the error for a file that cannot be written."""
    return UsageError(f"'{path}' cannot be written: {error.strerror}; name a file in a folder that exists")


class NotFiniteError(UsageError, FloatingPointError):
    """A loss that is not finite before a weight has changed, so that no learning rate is to blame."""


class OwnError(Exception):
    """Carries an exception of the user's code past the handlers of wrong uses, so that it keeps its traceback."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class SaveError(OSError):
    """What a run saves could not be written. What it saved before is intact."""


class LoaderError(RuntimeError):
    """A process that fetches batches has ended."""


class RankError(RuntimeError):
    """Another process of the run has stopped, so that this one cannot go on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a training, which was saved after its step."""


class Terminated(SystemExit):
    """SIGTERM during a training, which was saved after its step. It ends the process with exit code 143."""

    def __init__(self, message: str) -> None:
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message
