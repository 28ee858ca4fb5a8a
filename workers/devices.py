"""Which device long work runs on."""

from pathlib import Path

from moerge.compression.arithmetic import NUMPY, Arithmetic

# Without these, no CUDA device can be opened; looking costs nothing, importing torch costs seconds and 200 MB.
_DRIVER = (Path("/dev/nvidiactl"), Path("/dev/dxg"))


def arithmetic(choice: str) -> Arithmetic:
    """Where compression computes: `choice` is auto, cpu or a torch device such as cuda:1.

    auto takes the first CUDA device that works, else the processor. Raises RuntimeError for a named one that does not.
    """
    if choice == "cpu" or (choice == "auto" and not any(path.exists() for path in _DRIVER)):
        return NUMPY
    import torch  # noqa: PLC0415 - only where there may be a GPU, and never in the parent that forks

    from moerge.compression.on_torch import Torch  # noqa: PLC0415

    if choice == "auto" and not torch.cuda.is_available():
        return NUMPY
    return Torch("cuda" if choice == "auto" else choice)
