"""Files that a command is asked to write: checked before, written after its work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["check_plot", "check_target", "write_plot"]

_PLOTS = (".png", ".svg", ".pdf")


def check_target(flag: str, name: str | None, overwrite: bool) -> None:
    """Raise ValueError where a file cannot, or should not, be written."""
    if name is None:
        return
    file = Path(name).expanduser()
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{flag} is {name}; expected a file in an existing folder")
    if file.exists() and not overwrite:
        raise ValueError(
            f"{flag} is {name}, which is there already; allow replacing it with "
            "--overwrite, or choose another name"
        )


def check_plot(name: str | None, overwrite: bool) -> None:
    """The same for a picture, whose suffix is its format."""
    if name is not None and Path(name).suffix not in _PLOTS:
        raise ValueError(
            f"--plot is {name}; expected a name ending in {', '.join(_PLOTS)}"
        )
    check_target("--plot", name, overwrite)


def write_plot(name: str, draw: Callable[[str], bytes]) -> None:
    """Write the picture that `draw` makes in a format (png, svg, pdf).

    Raises ValueError without matplotlib.
    """
    from vllm_ppd.files import write_bytes

    file = Path(name).expanduser()
    try:
        picture = draw(file.suffix[1:])
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib: pip install matplotlib, or leave --plot out"
        ) from error
    write_bytes(file, picture)
    print(f"The picture is in {name}.")
