"""What all pictures share."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from kvjax.errors import InputError
from kvjax.files import output

if TYPE_CHECKING:
    import matplotlib.figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))


def check_picture(path: Path) -> None:
    """Raise `InputError` for a picture that cannot be drawn or written, before work is done for it."""
    if path.suffix.lower() != ".png":
        raise InputError(f"cannot draw {path}: pictures are PNG files, give a name that ends in .png")
    output.check_writable(path)
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'kvjax[eval]'") from None


def save_figure(figure: "matplotlib.figure.Figure", path: Path) -> Path:
    """Write a figure as a PNG file."""
    figure.savefig(picture := io.BytesIO(), format="png", dpi=150)
    output.write(path, picture.getvalue())
    return path
