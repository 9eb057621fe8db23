"""How the report draws: one style, colours that the page sets, SVG with real text and a name for who cannot see it."""

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from ..errors import SettingsError

T = TypeVar("T")

# Drawn with colours that nobody would choose, for which the page's own stand in, light or dark.
INK, QUIET, LINE, BEFORE, AFTER, GATE = (f"#0{n}010{n}" for n in range(1, 7))
LEVELS = [f"#0{n}020{n}" for n in range(1, 7)]
_VARIABLES = dict(
    zip(
        (INK, QUIET, LINE, BEFORE, AFTER, GATE),
        ("text", "quiet", "line", "before", "after", "gate"),
        strict=True,
    )
)
_VARIABLES |= {colour: f"level-{n}" for n, colour in enumerate(LEVELS, 1)}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_reflect",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "legend.frameon": False,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
}


class Figure(NamedTuple):
    """What the page shows of one question."""

    name: str
    title: str
    words: str  # the main numbers, and what is not drawn
    svg: str
    head: Sequence[str]  # of the table of its numbers
    rows: Sequence[Sequence[Any]]
    levels: Sequence[str] = ()  # of a density: what each shade stands for


def styled(draw: Callable[..., T]) -> Callable[..., T]:
    """Draw in the report's style, whatever style the process has."""

    @wraps(draw)
    def in_style(*args: Any, **kwargs: Any) -> T:
        try:
            from matplotlib import rc_context, rcdefaults
        except ImportError as error:
            raise SettingsError(
                "The report's figures are drawn by matplotlib, which is not installed: "
                "`pip install 'hf_reflect[report]'`."
            ) from error
        with rc_context():
            rcdefaults()
            with rc_context(_RC):
                return draw(*args, **kwargs)

    return in_style


def new_axes(grid: bool = True) -> tuple[Any, Any]:
    """A figure of a size at which its text can be read on a phone, and its axes."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(4.3, 2.8), facecolor="none", layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    if grid:
        axes.grid(axis="y")
    return figure, axes


def draw_gate(axes: Any, value: float, axis: str) -> None:
    """A gate's line, across or along, with its name."""
    line, label = (axes.axvline, "x") if axis == "x" else (axes.axhline, "y")
    line(value, color=GATE, linewidth=1.3, linestyle=(0, (4, 2)))
    at = (value, 0.98) if label == "x" else (0.99, value)
    low, high = axes.get_xlim() if label == "x" else axes.get_ylim()
    crowded = value > (low + high) / 2
    style: dict[str, Any] = {"ha": "right" if crowded else "left", "va": "top", "xytext": (-4 if crowded else 4, 0)}
    if label == "y":
        style = {"ha": "right", "va": "top" if crowded else "bottom", "xytext": (0, -3 if crowded else 3)}
    axes.annotate(
        f"gate {value:g}", at, xycoords=("data", "axes fraction") if label == "x" else ("axes fraction", "data"),
        textcoords="offset points", color=GATE, **style,
    )  # fmt: skip


def as_svg(figure: Any, name: str, label: str) -> str:
    """As an element of the page: no ids that another figure has, colours by variable, named for who cannot see it."""
    from markupsafe import escape

    file = io.StringIO()
    figure.savefig(
        file,
        format="svg",
        facecolor="none",
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    size = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">") + 1 :]
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"\n\s*", "\n", body)
    head = f'<svg {size[0] if size else ""} role="img" aria-label="{escape(label)}">'
    return head + body
