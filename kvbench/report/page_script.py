"""The page's script: sort a table by click or key. No library, no network.

Texts enter the document as text nodes only, so model output is never read as markup.
"""

SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) if (other.hasAttribute("aria-sort")) other.ariaSort = "none";
    head.ariaSort = up ? "ascending" : "descending";
    const numeric = head.dataset.kind === "number", value = row => row.children[column].dataset.v;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (up ? 1 : -1) * (numeric ? x - y : x < y ? -1 : x > y ? 1 : 0);
    });
    body.append(...rows);
  });
}
"""
