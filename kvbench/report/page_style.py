"""The page's style sheet: light and dark, phone and paper; wide things scroll inside their own box."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #5f6b7a; --grid: #d9dee5; --card: #ffffff;
  --paper: #f5f6f8; --link: #0b5cad; --warn: #a33a00; --mark: #ffe08a; --mark-ink: #1f2933;
  --blue: #0072b2; --grey: #808080; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --muted: #a3adba; --grid: #39424e; --card: #1a1f26;
  --paper: #12161b; --link: #7db8ff; --warn: #ffa873; --mark: #7a5c00; --mark-ink: #ffffff;
  --blue: #3d9be0; --grey: #a3a3a3; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 24px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.3rem; margin: 40px 0 8px; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 24px 0 6px; }
p, ul, dl { margin: 6px 0 12px; max-width: 82ch; }
li { margin: 3px 0; overflow-wrap: anywhere; }
a { color: var(--link); }
nav a { display: inline-block; padding: 4px 14px 4px 0; }
code { font: 0.92em ui-monospace, monospace; }
small, .quiet, figcaption { color: var(--muted); font-size: 0.86rem; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 8px 16px;
  margin: 10px 0; min-width: 0; }
.card h3 { margin-top: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 0 14px;
  align-items: start; }
.card ul { padding-left: 20px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--grid); border-radius: 8px; }
.scroll:focus-visible, button:focus-visible, select:focus-visible, summary:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; min-width: 76px; }
th small, td small { display: block; font-weight: normal; font-size: 0.78rem; color: var(--muted); }
.text th, .text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.text th { vertical-align: top; white-space: nowrap; }
.text td { min-width: 90px; }
.name { text-align: left; }
tbody .name:first-child, thead .name:first-child { position: sticky; left: 0; background: var(--card); }
tbody tr:hover td { background: color-mix(in srgb, var(--grid) 35%, var(--card)); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
th button::after { content: " \\2195"; color: var(--muted); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--link); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--link); }
.failed { color: var(--warn); font-weight: 600; }
figure { margin: 14px 0 22px; }
.plot svg { display: block; width: 100%; min-width: 720px; height: auto; }
figcaption { margin-top: 4px; max-width: 95ch; }
details { margin: 6px 0; }
details h4 { margin: 14px 0 0; font-size: 0.95rem; }
summary { cursor: pointer; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: end; }
.controls label { display: block; font-size: 0.86rem; color: var(--muted); min-width: 0; max-width: 100%; }
select, .controls button { display: block; font: inherit; font-size: 0.95rem; max-width: 100%; padding: 5px 8px;
  color: var(--ink); background: var(--card); border: 1px solid var(--muted); border-radius: 6px; }
.panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 10px;
  margin: 10px 0; }
.pane { border: 1px solid var(--grid); border-radius: 6px; padding: 8px 12px; min-width: 0; background: var(--card); }
.pane h4 { margin: 0 0 4px; font-size: 0.86rem; color: var(--muted); overflow-wrap: anywhere; }
.pane p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.93rem; }
mark { background: var(--mark); color: var(--mark-ink); border-radius: 2px; padding: 0 2px; }
footer { padding: 30px 16px 40px; }
@media print {
  :root { --ink: #000; --muted: #444; --grid: #bbb; --card: #fff; --paper: #fff; --link: #000; --warn: #800;
    --mark: #ddd; --mark-ink: #000; --blue: #0072b2; --grey: #808080; }
  body { font-size: 10pt; } nav, #samples, th button::after { display: none; content: ""; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; border: 0; }
  table { font-size: 6.5pt; } table.text { font-size: 8.5pt; } th, td { padding: 2px 3px; }
  th small, td small { font-size: 5.5pt; } .plot svg { min-width: 0; } figure, tr, .card { break-inside: avoid; }
  tbody .name:first-child, thead .name:first-child { position: static; }
  @page { size: A4 landscape; margin: 12mm; }
}
"""
