"""The page's style sheet: quiet type, rules instead of boxes, light and dark; wide things scroll inside their own box.

A root with data-theme follows that instead of the system; paper is printed light (page_style_print).
"""

from __future__ import annotations

import re

from kvbench.report.page_autopsy_style import AUTOPSY_STYLE
from kvbench.report.page_samples_script import SAMPLES_STYLE
from kvbench.report.page_style_print import PRINT_STYLE

_LIGHT = (
    "--ink: #1c232b; --muted: #5a6572; --grid: #d5dae1; --rule: #8b95a1; --paper: #ffffff; --card: #ffffff; "
    "--soft: #f3f5f8; --link: #0b5cad; --warn: #a33a00; --good: #00664f; --mark: #ffe08a; --mark-ink: #1c232b;"
)
_DARK = (
    "--ink: #e4e8ed; --muted: #a0abb8; --grid: #363f4a; --rule: #6d7885; --paper: #14181d; --card: #14181d; "
    "--soft: #1d232a; --link: #7db8ff; --warn: #ffa06b; --good: #5fd3a9; --mark: #7a5c00; --mark-ink: #ffffff;"
)
_THEMES = f"""
:root {{ color-scheme: light; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ color-scheme: dark; {_DARK} }} }}
@media screen {{ :root[data-theme=dark] {{ color-scheme: dark; {_DARK} }} }}
"""
_TEXT = """
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 8px; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header, footer { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 22px; }
.skip { position: absolute; left: -999px; top: 0; padding: 8px 14px; background: var(--paper); z-index: 2; }
.skip:focus { left: 12px; }
.top { display: flex; flex-wrap: wrap; gap: 6px 20px; align-items: baseline; justify-content: space-between; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.22rem; margin: 44px 0 10px; padding-top: 10px; border-top: 1px solid var(--rule);
  overflow-wrap: anywhere; }
h3 { font-size: 1.02rem; margin: 24px 0 6px; overflow-wrap: anywhere; }
h4 { font-size: 0.94rem; margin: 16px 0 4px; overflow-wrap: anywhere; }
p, ul { margin: 6px 0 12px; max-width: 84ch; }
ul { padding-left: 22px; }
li { margin: 3px 0; overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: 2px; text-decoration-thickness: 1px; }
nav { margin: 8px 0 0; }
nav a { display: inline-block; padding: 4px 16px 4px 0; }
code { font: 0.92em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: 10px 14px; font: 0.86rem/1.6 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
small, .quiet, figcaption { color: var(--muted); font-size: 0.86rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.failed { color: var(--warn); font-weight: 600; }
details { margin: 8px 0; }
summary { cursor: pointer; padding: 3px 0; overflow-wrap: anywhere; }
footer { padding: 36px 20px 44px; }
"""
_ANSWER = """
.answer { font-size: 1.1rem; line-height: 1.45; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 20px 36px;
  margin: 18px 0; }
.answers > div { border-top: 2px solid var(--ink); min-width: 0; }
.answers h3 { margin: 8px 0 6px; }
dl { margin: 0; }
dl > div { border-top: 1px solid var(--grid); padding: 5px 0; display: grid; grid-template-columns: 92px 1fr;
  gap: 10px; }
dl > div:first-child { border-top: 0; }
dt { color: var(--muted); font-size: 0.86rem; padding-top: 1px; }
dd { margin: 0; font-size: 0.93rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 0; }
"""
_TABLES = """
.scroll { overflow-x: auto; margin: 8px 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; font-variant-numeric: tabular-nums;
  border-bottom: 1px solid var(--rule); }
caption { text-align: left; font-weight: 600; padding: 0 0 6px; font-size: 0.92rem; }
th, td { padding: 5px 8px; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; border-bottom: 1px solid var(--rule); }
thead tr:first-child > * { border-top: 1px solid var(--rule); }
thead .over { border-bottom: 1px solid var(--grid); text-align: center; font-weight: 600; color: var(--muted);
  min-width: 0; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
th small, td small { display: block; white-space: pre-line; font-weight: normal; font-size: 0.76rem;
  color: var(--muted); }
thead small { white-space: normal; }
tbody th { font-weight: normal; }
.name { text-align: left; }
.text th, .text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.text tbody th { vertical-align: top; white-space: nowrap; }
.text td { min-width: 90px; }
tbody th.name { max-width: 150px; white-space: normal; overflow-wrap: break-word; }
tbody th.name, thead .name:first-child { position: sticky; left: 0; background: var(--paper); z-index: 1; }
tbody tr:hover > * { background: var(--soft); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 2px 0;
  cursor: pointer; text-align: inherit; }
th button::after { content: "\\00a0\\2195"; color: var(--muted); font-weight: normal; font-size: 0.8em; }
th[aria-sort=ascending] button::after { content: "\\00a0\\2191"; color: var(--link); }
th[aria-sort=descending] button::after { content: "\\00a0\\2193"; color: var(--link); }
#verdict-table th, #verdict-table td { padding-left: 6px; padding-right: 6px; }
.missing { color: var(--muted); font-size: 0.76rem; white-space: normal; }
.losses { width: auto; }
.losses thead th { max-width: 118px; overflow-wrap: break-word; }
.verdict, .verdict small { white-space: normal; }
.verdict { min-width: 104px; }
.v-better { color: var(--good); }
.v-worse { color: var(--warn); }
.noisy > *, td.noisy { color: var(--muted); font-style: italic; }
.collapsed, .collapsed a { color: var(--warn); }
"""
_PARTS = """
figure { margin: 14px 0 26px; }
.plot { background: var(--plot-paper, var(--paper)); }
.plot svg { display: block; width: 100%; min-width: 700px; height: auto; }
figcaption { margin-top: 4px; max-width: 100ch; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: end; margin: 10px 0; }
.controls label { display: block; font-size: 0.84rem; color: var(--muted); min-width: 0; max-width: 100%; }
.controls output { font-size: 0.86rem; color: var(--muted); padding: 6px 0; }
select, input[type=search], button.plain, .controls button { display: block; font: inherit; font-size: 0.92rem;
  max-width: 100%; padding: 5px 8px; color: var(--ink); background: var(--paper); border: 1px solid var(--rule);
  border-radius: 4px; cursor: pointer; min-height: 36px; }
input[type=search] { cursor: text; width: 11em; }
.panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 10px 24px;
  margin: 10px 0; }
.pane { border-top: 1px solid var(--rule); padding: 6px 0; min-width: 0; }
.pane h4 { margin: 0 0 4px; font-size: 0.84rem; color: var(--muted); }
.pane p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.93rem; }
mark { background: var(--mark); color: var(--mark-ink); border-radius: 2px; padding: 0 2px; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  tbody th.name, thead .name:first-child { max-width: 118px; }
  th, td { padding: 5px 7px; }
  dl > div { grid-template-columns: 80px 1fr; }
}
"""
_OWN = _THEMES + _TEXT + _ANSWER + _TABLES + _PARTS + AUTOPSY_STYLE + SAMPLES_STYLE + PRINT_STYLE
_DARK_BLOCK = re.compile(r"@media \(prefers-color-scheme: dark\) \{\s*:root \{([^}]*)\}\s*\}")
# A part that knows only the system's dark colours gets them for the chosen ones too, on screens alone.
STYLE = _DARK_BLOCK.sub(
    r"@media screen and (prefers-color-scheme: dark) { :root:not([data-theme=light]) {\1} }\n"
    r"@media screen { :root[data-theme=dark] {\1} }",
    _OWN,
)
