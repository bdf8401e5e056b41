"""How the page is printed: A4 across, tables small enough for their columns, nothing that only moves.

Pages break between rows, never in one, and not below a heading; what would leave most of a page empty may break.
"""

PRINT_STYLE = """
@media print {
  @page { size: A4 landscape; margin: 11mm; }
  body { font-size: 9pt; }
  header { padding-top: 0; }
  h1 { font-size: 14pt; } h2 { font-size: 12pt; margin: 12pt 0 4pt; padding-top: 4pt; } h3 { margin: 6pt 0 2pt; }
  .answer { font-size: 10.5pt; margin: 3pt 0; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  nav, .skip, .top button, .controls, #samples { display: none; }
  th button::after { content: none !important; }
  a { color: inherit; text-decoration: none; }
  h2, h3, h4, caption, summary { break-after: avoid; }
  .scroll { overflow: visible; margin: 3pt 0 8pt; }
  p, ul { max-width: none; margin: 3pt 0 6pt; orphans: 3; widows: 3; }
  figure { margin: 2pt 0 10pt; } figcaption { max-width: none; }
  footer { padding-top: 6pt; padding-bottom: 0; }
  table { font-size: 6.6pt; width: 100%; }
  table.text { font-size: 8pt; }
  th, td { padding: 2px 3px; }
  th, thead th, .verdict { min-width: 0; }
  th small, td small { font-size: 5.6pt; }
  thead { display: table-header-group; }
  tbody tr:nth-child(-n+3) { break-before: avoid; }
  caption { break-inside: avoid; } .losses caption { white-space: nowrap; }
  tr, figure, .answers > div, li { break-inside: avoid; }
  tbody th.name, thead .name:first-child { position: static; }
  .missing { font-size: 5.4pt; }
  .plot svg { min-width: 0; width: auto; max-width: 100%; max-height: 92mm; margin: 0 auto; }
  .tall .plot svg { max-height: 165mm; }
  .answers { grid-template-columns: repeat(3, 1fr); gap: 8px 20px; margin: 6pt 0; }
  dl > div { padding: 2pt 0; grid-template-columns: 60px 1fr; }
  dd, dt { font-size: 7.6pt; line-height: 1.35; }
}
"""
