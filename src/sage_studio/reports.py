"""What reports are made of: the machine that was measured on, Markdown tables, pictures, colours (imports no torch)."""

import io
import os
import platform

from sage_studio.errors import MissingExtraError, install_hint

# Okabe and Ito's palette, told apart by colour-blind readers too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6A3D9A")
GREY = "#777777"


def machine(device=None) -> dict:
    """What is measured on, JSON-ready; `device` is a torch one."""
    import torch

    found = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device is not None and device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def machine_line(found: dict) -> str:
    """The `machine()` of a result in words."""
    device = f"{found['device']}, " if "device" in found else ""
    return f"{device}{found['threads']} threads of {found['cores']} cores, torch {found['torch']}"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def plotting():
    """matplotlib's `Figure` and its canvas.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(f"pictures need matplotlib: {install_hint('matplotlib')}.") from error
    return Figure, FigureCanvasAgg


def figure(width: float, height: float):
    """A matplotlib figure of `width` x `height` inches; raises `MissingExtraError` as `plotting`."""
    make, canvas = plotting()
    picture = make(figsize=(width, height), layout="constrained")
    canvas(picture)
    return picture


def png(picture) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def plain(axes) -> None:
    """Leave out the frame's upper and right side."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
