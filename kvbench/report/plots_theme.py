"""Two palettes for one drawing: light for paper, dark for a dark page; and how a page switches between them.

Both were found by searching near the hues of Okabe and Ito for the largest smallest distance (in Oklab)
between any two colours, as seen with normal vision and with protanopia, deuteranopia and tritanopia. A test
simulates those again. No colour says anything alone: marker and line style say it a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """Colours as #rrggbb; `paper` is what a figure lies on."""

    ink: str
    muted: str
    grid: str
    paper: str
    grey: str
    orange: str
    blue: str
    green: str
    purple: str
    sky: str
    vermilion: str
    brown: str


LIGHT = Theme(
    ink="#1f2933", muted="#5f6b7a", grid="#d9dee5", paper="#ffffff", grey="#8f8f8f", orange="#eb8900",
    blue="#004a8c", green="#027b6a", purple="#a71de5", sky="#6599fb", vermilion="#c7470d", brown="#693b05",
)  # fmt: skip
DARK = Theme(
    ink="#e6e9ee", muted="#a3adba", grid="#39424e", paper="#1a1f26", grey="#969696", orange="#f9c020",
    blue="#3d89fe", green="#39d8a8", purple="#974fad", sky="#c0b4ff", vermilion="#f0731f", brown="#b34827",
)  # fmt: skip
THEMES = {"light": LIGHT, "dark": DARK}
_NAMES = tuple(field.name for field in fields(Theme))

# A page that holds the SVG inline swaps every light colour for a variable, so figures follow its own light and dark.
THEME_COLOURS = {getattr(LIGHT, name): f"var(--plot-{name}, {getattr(LIGHT, name)})" for name in _NAMES}


def theme_variables(theme: Theme) -> str:
    """Return the declarations that a style sheet gives its root: `--plot-ink: #1f2933; ...`."""
    return " ".join(f"--plot-{name}: {getattr(theme, name)};" for name in _NAMES)


# Follows the system; a root with data-theme follows that; paper is printed light.
PLOT_STYLE = f"""
:root {{ {theme_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {theme_variables(DARK)} }} }}
:root[data-theme=dark] {{ {theme_variables(DARK)} }}
@media print {{ :root, :root:not([data-theme=light]), :root[data-theme=dark] {{ {theme_variables(LIGHT)} }} }}
"""
