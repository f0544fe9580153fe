"""Lightning and torchmetrics import torchvision, and a build of it that does not fit torch's lacks its operators."""

import contextlib
import importlib
import importlib.metadata
import sys

import torch

_declared: list[torch.library.Library] = []


def declare_operators(*importers: str) -> None:
    """Declares the operators that torchvision misses at import, if it is installed and does not import. Nothing calls
    them. importers: libraries that have tried to import it, and are to try again."""
    missing = False
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("torchvision")
        try:
            importlib.import_module("torchvision.transforms")
        except (ImportError, RuntimeError):
            missing = True
    if missing and not _declared:
        for module in [module for module in sys.modules if module.partition(".")[0] in ("torchvision", *importers)]:
            del sys.modules[module]
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            _declared[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
