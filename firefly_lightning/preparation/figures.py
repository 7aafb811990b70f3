"""The two figures of a set of rows: how many there are of each kind, and how long they are."""

from collections.abc import Mapping
from pathlib import Path
from warnings import catch_warnings, filterwarnings

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import ScalarFormatter

from firefly_lightning.errors import FireflyError

BINS = 64
BLUE, RED = "#4C78A8", "#E45756"


def draw_tasks(path: Path, rows: Mapping[str, int], font: FontProperties) -> None:
    """Draws a bar for the number of rows of each kind, the most at the top, as a PNG."""
    ordered = sorted(rows.items(), key=lambda item: (item[1], item[0]))
    names, counts = [name for name, _ in ordered], [count for _, count in ordered]
    figure = Figure(figsize=(9, 1.4 + 0.28 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(len(names)), counts, color=BLUE)
    total = sum(counts)
    axes.bar_label(bars, [f"{count:,} ({count / total:.1%})" for count in counts], padding=3, fontsize=8)
    # Kinds are the user's text; `$` would begin a formula.
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names], fontproperties=font)
    axes.set_xlim(0, 1.2 * max(counts))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("rows")
    axes.set_title(f"Task distribution: {total:,} rows of {len(names)} kinds")
    _finish(figure, path)


def draw_lengths(path: Path, lengths: npt.NDArray[np.int32], max_length: int) -> None:
    """Draws a histogram of tokens a row, with a line at ``max_length`` and the share of longer rows, as a PNG."""
    beyond = np.count_nonzero(lengths > max_length) / len(lengths)
    # A few very long rows would press all others into one bar: the last bar holds everything from its start on.
    top = max(float(np.quantile(lengths, 0.995)), 1.25 * max_length)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(np.minimum(lengths, top), bins=BINS, range=(0, top), color=BLUE)
    axes.set_xlim(0, top)
    axes.axvline(max_length, color=RED, linestyle="--")
    axes.annotate(
        f"{max_length} tokens\n{beyond:.2%} of the rows are longer", (max_length, 0.95), (-6, 0),
        xycoords=("data", "axes fraction"), textcoords="offset points", color=RED, va="top", ha="right",
    )  # fmt: skip
    axes.set_xlabel(
        "tokens a row, control tokens included" + (", longer ones in the last bar" if lengths.max() > top else "")
    )
    axes.set_ylabel("rows")
    axes.set_title(
        f"Token lengths: median {np.median(lengths):,.0f}, mean {lengths.mean():,.1f}, longest {lengths.max():,}"
    )
    _finish(figure, path)


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), ScalarFormatter):
                axis.set_major_formatter("{x:,.0f}")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure; a character that the font lacks becomes a box, which whoever chose the font has said."""
    with catch_warnings():
        filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path, dpi=150)


def font_or_default(text: str, font: str | None = None) -> tuple[FontProperties, str | None]:
    """A font for a text, as :func:`find_font` finds it; where there is none, Matplotlib's own and what it lacks."""
    try:
        return find_font(text, font), None
    except FireflyError as error:
        return FontProperties(fname=font_manager.findfont("DejaVu Sans")), str(error)


def find_font(text: str, font: str | None = None) -> FontProperties:
    """A font that has every character of a text: the named file, Matplotlib's own, or an installed one.

    Raises:
        FireflyError: If there is no such font, or the named file is no font or lacks characters.
    """
    needed = {ord(character) for character in text if character.isprintable() and not character.isspace()}
    if font:
        path = Path(font).expanduser()
        if (has := _characters(path)) is None:
            raise FireflyError(f"{font}: not a font file that can be read; name a .ttf or .otf file")
        if lacking := needed - has:
            raise FireflyError(f"{font}: has no {_shown(lacking)}; name a font that has")
        return FontProperties(fname=str(path))
    own = Path(font_manager.findfont("DejaVu Sans"))
    if needed <= (_characters(own) or set()):
        return FontProperties(fname=str(own))
    # The system is asked anew: the list that Matplotlib keeps may be older than a font.
    for path in sorted(map(Path, font_manager.findSystemFonts())):
        if needed <= (_characters(path) or set()):
            return FontProperties(fname=str(path))
    raise FireflyError(
        f"no installed font has {_shown(needed - (_characters(own) or set()))}; install a font with Chinese "
        "characters, for example the package fonts-noto-cjk, or name a font file with --font"
    )


def _characters(path: Path) -> set[int] | None:
    try:
        return set(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):  # missing, or no font
        return None


def _shown(characters: set[int]) -> str:
    return " ".join(chr(character) for character in sorted(characters)[:10])
