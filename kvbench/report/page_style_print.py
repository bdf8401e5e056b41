"""How the page is printed: A4 across, tables whole and small enough for their columns, nothing that only moves."""

PRINT_STYLE = """
@media print {
  @page { size: A4 landscape; margin: 11mm; }
  body { font-size: 9.5pt; }
  main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  nav, .skip, .top button, .controls, #samples { display: none; }
  th button::after { content: none !important; }
  a { color: inherit; text-decoration: none; }
  h2, h3, h4, caption, summary { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 6.6pt; width: 100%; }
  table.text { font-size: 8pt; }
  th, td { padding: 2px 3px; }
  th, thead th, .verdict { min-width: 0; }
  th small, td small { font-size: 5.6pt; }
  thead { display: table-header-group; }
  tr, figure, .answers > div, li { break-inside: avoid; }
  tbody th.name, thead .name:first-child { position: static; }
  .plot svg { min-width: 0; }
  .answers { grid-template-columns: repeat(3, 1fr); gap: 10px 20px; }
  dd, dt { font-size: 8pt; }
}
"""
