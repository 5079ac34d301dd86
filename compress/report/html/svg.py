"""matplotlib figures -> SVG that belongs to the page: text as text in the page's font, colours as CSS variables.

A figure is drawn in placeholder colours, one for each name in COLOURS, and these become `var(--name)`, so that light,
dark and print are a matter of style. Identifiers are made unique on the page, and what it does not need is dropped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from compress.errors import CompressError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: steps of the sequential map, pale to strong
LEVELS = 9
#: what a figure may be drawn in, by the name of its CSS variable: (light, dark)
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1b1d21", "#e7e5e0"),
    "soft": ("#5d6169", "#a3a6ad"),
    "line": ("#d9dbdf", "#3a3e46"),
    "paper": ("#ffffff", "#16181c"),
    "shade": ("#c6cad1", "#4a4f59"),
    "accent": ("#0b5cad", "#6cb2f5"),
    "alarm": ("#b8430f", "#f59a66"),
    "read": ("#7a62a8", "#a996d6"),
    "look": ("#2f74b8", "#6fb0ea"),
    "solve": ("#c2571a", "#f0965a"),
    "write": ("#33846a", "#5fc0a0"),
    "check": ("#8a8f98", "#757b86"),
}
#: the sequential map: one hue, evenly lighter, so that it reads without colour too; dark pages begin at the dark end
_LIGHT = "#eef4fb #d9e7f5 #bfd8ee #9cc4e4 #73aad6 #4c8ec4 #2f71ad #1a5490 #0b3768".split()
_DARK = "#1d2733 #1f364e #23486b #2a5c8a #3473aa #498dc6 #6ba8da #97c5ea #cfe6f8".split()
COLOURS |= {f"h{i}": (light, dark) for i, (light, dark) in enumerate(zip(_LIGHT, _DARK, strict=True))}
COLOURS |= {f"i{i}": ("#1b1d21" if i < 5 else "#ffffff", "#e7e5e0" if i < 5 else "#0d0f12") for i in range(LEVELS)}

_PLACEHOLDERS = {name: f"#0a{i:02x}f{i % 10}" for i, name in enumerate(COLOURS)}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_FAMILY = re.compile(r"font-family:[^;]*;?|font: ([\d.]+px) [^;]*;?")


def colour(name: str) -> str:
    """The placeholder for a CSS variable."""
    return _PLACEHOLDERS[name]


def library() -> Any:
    """matplotlib. Raises CompressError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise CompressError(
            "matplotlib is not installed, and draws the plots", "compress report", "pip install 'compress-llm[report]'"
        ) from None
    return matplotlib


@contextmanager
def style() -> Iterator[None]:
    """The settings in which figures are drawn: thin lines, no frame, nothing that a reader does not need."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "compress",
        "font.family": ["DejaVu Sans"],
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": colour("line"),
        "axes.labelcolor": colour("soft"),
        "axes.titlecolor": colour("ink"),
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.unicode_minus": True,
        "xtick.color": colour("line"),
        "ytick.color": colour("line"),
        "xtick.labelcolor": colour("soft"),
        "ytick.labelcolor": colour("soft"),
        "text.color": colour("ink"),
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "text.parse_math": False,
    }
    with library().rc_context(settings):
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many pixels, to be drawn within `style`."""
    library()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(made)  # measures text
    return made


def render(drawn: Figure, prefix: str, label: str, titles: Mapping[str, str] | None = None, cls: str = "") -> str:
    """A figure as an <svg> element.

    Args:
        prefix: of its identifiers, unique on the page.
        label: what a screen reader says of it.
        titles: what a pointer shows of the elements drawn with these gids.
        cls: classes of the element.
    """
    text = io.StringIO()
    with style():
        drawn.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(text.getvalue())
    _clean(root, prefix, titles or {})
    _flatten(root)
    root.attrib.pop("version", None)
    root.attrib |= {"role": "img", "aria-label": label, "class": f"figure {cls}".strip()}
    wide = root.attrib.pop("width").removesuffix("pt")
    root.attrib.pop("height", None)
    root.attrib["style"] = f"max-width:{float(wide):.0f}px"
    out = ElementTree.tostring(root, encoding="unicode")
    for name, placeholder in _PLACEHOLDERS.items():
        out = out.replace(placeholder, f"var(--{name})")
    return out


def _clean(root: ElementTree.Element, prefix: str, titles: Mapping[str, str]) -> None:
    """Drop metadata, comments and global styles; keep the identifiers that are used, made unique; name elements."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w.-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                _name(element, value, value in used, prefix, titles)
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.attrib[key] = f"#{prefix}-{value[1:]}"
            elif key == "clip-path":
                element.attrib[key] = value.replace("url(#", f"url(#{prefix}-")
            elif key == "style":
                element.attrib[key] = _FAMILY.sub(lambda m: f"font-size: {m[1]};" if m[1] else "", value).strip()
            elif key in ("d", "x", "y", "transform", "width", "height", "points"):
                element.attrib[key] = " ".join(_NUMBER.sub(lambda m: f"{float(m[0]):.1f}", value).split())
        element.tail = None if element.tail is None or not element.tail.strip() else element.tail
        element.text = None if element.text is None or not element.text.strip() else element.text


def _flatten(element: ElementTree.Element) -> None:
    """Drop what is not seen, and groups around a single element: a map has hundreds of them."""
    for child in list(element):
        _flatten(child)
        shape = child.tag.removeprefix(f"{{{_SVG}}}")
        style = child.attrib.get("style", "")
        unseen = shape == "path" and style.strip("; ") == "fill: none" and "id" not in child.attrib
        if unseen or (shape in ("g", "defs") and not len(child)):
            element.remove(child)
        elif shape == "g" and set(child.attrib) <= {"class"}:
            *titles, last = child
            if all(t.tag == f"{{{_SVG}}}title" for t in titles) and not set(last.attrib) & set(child.attrib):
                last.attrib |= child.attrib
                last[:0] = titles
                element[list(element).index(child)] = last


def _name(element: ElementTree.Element, value: str, used: bool, prefix: str, titles: Mapping[str, str]) -> None:
    """An element's identifier, dropped where nothing refers to it; and what a pointer shows of it."""
    del element.attrib["id"]
    if used:
        element.attrib["id"] = f"{prefix}-{value}"
    if value in titles:
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = titles[value]
        element.insert(0, title)
        element.attrib["class"] = "cell"
