"""Figures that show what they should, in a font that has the characters."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from firefly_lightning.errors import FireflyError
from firefly_lightning.preparation.figures import draw_lengths, draw_tasks, find_font
from tests.support.helpers import raised_line


def make_font(path: Path, text: str) -> Path:
    """A font whose every character is the same black box."""
    pen = TTGlyphPen(None)
    for at, point in enumerate([(100, 0), (100, 800), (900, 800), (900, 0)]):
        (pen.lineTo if at else pen.moveTo)(point)
    pen.closePath()
    box, names = pen.glyph(), [".notdef", *(f"g{at}" for at in range(len(text)))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(character): f"g{at}" for at, character in enumerate(text)})
    font.setupGlyf(dict.fromkeys(names, box))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path


def test_matplotlibs_own_font_draws_latin_names(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: pytest.fail("not needed"))
    assert Path(find_font("NER Cot").get_file()).name == "DejaVuSans.ttf"


def test_an_installed_font_with_the_characters_is_found(tmp_path, monkeypatch):
    fonts = [make_font(tmp_path / "a.ttf", "对"), make_font(tmp_path / "b.ttf", "对联 A"), tmp_path / "broken.ttf"]
    fonts[2].write_text("no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(font) for font in reversed(fonts)])
    assert find_font("对联").get_file() == str(fonts[1])
    assert find_font("对 联").get_file() == str(fonts[1])
    with pytest.raises(
        FireflyError, match=r"no installed font has 对 联 诗; install .* or name a font file with --font"
    ) as raised:
        find_font("对联诗A")
    raised_line(raised)


def test_a_named_font_is_taken_or_refused(tmp_path):
    font = make_font(tmp_path / "a.ttf", "对联")
    assert find_font("对联", str(font)).get_file() == str(font)
    with pytest.raises(FireflyError, match=r"a\.ttf: has no 诗; name a font that has"):
        find_font("诗", str(font))
    for wrong in (tmp_path / "missing.ttf", Path(__file__)):
        with pytest.raises(FireflyError, match="not a font file that can be read"):
            find_font("诗", str(wrong))


def pixels(path: Path, color: str) -> np.ndarray:
    """Which pixels are near a colour: 8-bit RGB in hexadecimal."""
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.abs(matplotlib.image.imread(path)[..., :3] - wanted).max(-1) < 0.02


def test_bars_are_as_long_as_their_counts(tmp_path):
    font = find_font("对联", str(make_font(tmp_path / "a.ttf", "对联$_^ abc")))
    draw_tasks(tmp_path / "tasks.png", {"对联": 300, "a$b$": 100, "c_^": 200}, font)
    widths = pixels(tmp_path / "tasks.png", "#4C78A8").sum(1)
    bars = [int(width) for width in sorted({*widths.tolist()}) if np.count_nonzero(widths == width) > 10]
    assert len(bars) == 4  # and the rows between them
    assert bars[1:] == pytest.approx([bars[3] / 3, 2 * bars[3] / 3, bars[3]], rel=0.02)


def test_the_line_parts_the_histogram(tmp_path):
    lengths = np.array([100] * 300 + [700] * 100, np.int32)
    draw_lengths(tmp_path / "lengths.png", lengths, 512)
    blue, red = (pixels(tmp_path / "lengths.png", color) for color in ("#4C78A8", "#E45756"))
    line = int(np.argmax(red.sum(0)))
    bars = np.flatnonzero(blue.sum(0) > 50)
    left, right = bars[bars < line], bars[bars > line]
    assert blue[:, left].sum(0).max() == pytest.approx(3 * blue[:, right].sum(0).max(), rel=0.05)
    # Rows of 100 and 700 tokens, the line at 512: places on one axis, to the width of a bar.
    assert (right.mean() - line) / (line - left.mean()) == pytest.approx(188 / 412, abs=0.05)
