"""What users say of their batches and models: the axes of a batch, and the part of a model's result that counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.model.trees import items, tensors

LAYOUTS = ("TB", "BT", "B")


@dataclass(frozen=True)
class Interface:
    """The axes of batches, and the part of a model's result that losses and metrics read.

    layout: "TB" for events [T, B, ...], "BT" for [B, T, ...], "B" for a static input [B, ...] that the model repeats or
    encodes itself. output: an index, a key, a function of the result, or "all"; None: the first tensor.
    """

    layout: str = "TB"
    output: Any = None

    @classmethod
    def of(cls, time_first: "bool | Interface" = True, layout: str | None = None, output: Any = None) -> "Interface":
        """Makes an interface from the arguments of `train`. time_first=False is a shorthand of layout="BT"."""
        if isinstance(time_first, Interface):
            return time_first
        if not isinstance(time_first, bool):
            raise UsageError(f"time_first={time_first!r} is neither True nor False; it says which axis is time")
        if layout is not None and layout not in LAYOUTS:
            raise UsageError(f"layout={layout!r} is not known; use 'TB', 'BT' or 'B'")
        if layout is not None and layout != "BT" and not time_first:
            raise UsageError(f"layout={layout!r} and time_first=False contradict each other; give layout alone")
        if not (output is None or isinstance(output, int | str) or callable(output)):
            raise UsageError(f"output={output!r} is no index, key or function; it says which output the loss reads")
        return cls(layout or ("TB" if time_first else "BT"), output)

    def select(self, result: Any) -> Any:
        """Returns the part of a model's result that losses and metrics read."""
        if callable(self.output):
            return self.output(result)
        if self.output == "all" or (isinstance(result, Tensor) and self.output in (0, -1)):
            return result
        if self.output is None:
            found = tensors(result)
            return found[0] if found else result
        try:
            if isinstance(result, Tensor):
                raise TypeError("a tensor has no parts")
            if isinstance(self.output, str) and not isinstance(result, Mapping):
                return getattr(result, self.output)
            return result[self.output]
        except (LookupError, TypeError, AttributeError) as error:
            names = [name for name, _ in items(result)] if not isinstance(result, Tensor) else []
            held = f"has {', '.join(map(repr, names))}" if names else "is one tensor"
            raise UsageError(
                f"output={self.output!r} is no part of the model's result, a {type(result).__name__} that {held}; "
                "name one of its parts"
            ) from error


USUAL = Interface()  # events [T, B, ...], and the first tensor of the result


def axes_in_words(layout: str) -> str:
    """Returns the axes of a batch's events in brackets."""
    return {"TB": "[T, B, ...]", "BT": "[B, T, ...]", "B": "[B, ...]"}[layout]
