"""The style sheet of the autopsy: veils over patches, heat maps, token texts; light, dark, phone and paper."""

from __future__ import annotations

_DARK = "--veil: #59626e; --hatch: #d9a8ff; --cold: #232a33; --hot: #6db4f2;"
_THEMES = f"""
:root {{ --veil: #c3c9d1; --hatch: #7a3fa0; --cold: #eef2f7; --hot: #0b5394; }}
@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {_DARK} }} }}
@media screen {{ :root[data-theme=dark] {{ {_DARK} }} }}
"""
_REST = """
.ap-panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); gap: 14px 18px;
  margin: 12px 0; }
.ap-panel { min-width: 0; } #ap-group-label[hidden] { display: none; }
.ap-panel h4 small { font-weight: normal; font-size: 0.85em; }
.ap-panel h4 { margin: 0 0 4px; font-size: 0.92rem; overflow-wrap: anywhere; }
.ap-picture { display: block; width: 100%; max-width: 336px; border-radius: 4px; touch-action: pan-y; }
.ap-picture image { image-rendering: auto; }
.ap-veil { fill: var(--veil); shape-rendering: crispEdges; }
.ap-cursor { fill: none; stroke: var(--mark); stroke-width: 2px; vector-effect: non-scaling-stroke;
  pointer-events: none; }
.ap-picture:focus-visible, .ap-heat:focus-visible, .ap-words:focus-visible, #ap-step:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; }
.ap-heat { display: block; width: 100%; margin: 8px 0; }
.ap-heat-back { fill: var(--cold); } .ap-heat-square { fill: var(--hot); }
.ap-heat text { font: 9px system-ui, sans-serif; fill: var(--muted); }
.ap-heat .ap-number { font-size: 11px; fill: var(--ink); font-variant-numeric: tabular-nums; }
.ap-heat .ap-number.ap-light { fill: var(--card); }
.ap-middle { text-anchor: middle; } .ap-end { text-anchor: end; }
.ap-words { font-size: 0.8rem; line-height: 1.55; margin: 6px 0; white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 15em; overflow-y: auto; }
.ap-word { border-radius: 2px; } .ap-gone { text-decoration: line-through; color: var(--muted); }
.ap-merged { text-decoration: underline dashed var(--hatch); } .ap-later { opacity: 0.16; }
.ap-here { background: var(--mark); color: var(--mark-ink); }
.ap-chip, .ap-turn { border: 1px solid var(--grid); border-radius: 4px; padding: 0 4px; color: var(--muted);
  white-space: normal; }
.ap-says { font-size: 0.8rem; color: var(--muted); margin: 4px 0; }
.ap-time { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 12px; margin: 10px 0 0; }
.ap-time button { font: inherit; font-size: 0.95rem; padding: 4px 12px; min-width: 76px; color: var(--ink);
  background: var(--card); border: 1px solid var(--muted); border-radius: 6px; }
#ap-step { flex: 1 1 200px; min-width: 140px; accent-color: var(--link); }
#ap-moment { min-width: 15em; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
#ap-readout { min-height: 1.5em; margin: 6px 0; padding: 3px 0; font-size: 0.9rem; max-width: none; }
#ap-readout:not(:empty) { position: sticky; top: 0; z-index: 2; background: var(--paper); }
.ap-legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.82rem; color: var(--muted); margin: 6px 0; }
.ap-swatch { display: inline-block; width: 14px; height: 14px; vertical-align: -2px; border: 1px solid var(--grid);
  border-radius: 2px; margin-right: 4px; }
.ap-swatch.ap-out { background: var(--veil); }
.ap-swatch.ap-join { background: repeating-linear-gradient(45deg, var(--hatch) 0 2px, var(--veil) 2px 5px); }
.ap-swatch.ap-ramp { width: 46px; background: linear-gradient(to right, var(--cold), var(--hot)); }
@media (max-width: 520px) { .ap-panels { grid-template-columns: repeat(2, 1fr); gap: 12px; } }
@media print {
  #autopsy .controls, .ap-time button, #ap-step, #ap-readout { display: none; }
  .ap-panels { grid-template-columns: repeat(5, 1fr); gap: 4mm; } .ap-panel { break-inside: avoid; }
  .ap-legend, #ap-moment { font-size: 8pt; } .ap-panel h4 { font-size: 8.5pt; }
  .ap-words { max-height: none; overflow: visible; font-size: 6.2pt; line-height: 1.35; margin: 3pt 0; }
  .ap-says { font-size: 6.8pt; line-height: 1.35; margin: 3pt 0 0; } .ap-heat { max-height: 24mm; margin: 4pt 0; }
  .ap-panels { margin: 4pt 0; } .ap-picture { max-width: 44mm; } .ap-legend { margin: 2pt 0; }
  .ap-picture, .ap-heat, .ap-swatch { print-color-adjust: exact; }
}
"""
AUTOPSY_STYLE = _THEMES + _REST
