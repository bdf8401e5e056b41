"use strict";
const root = document.documentElement, themes = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches;
const nameTheme = () => { themes.textContent = isDark() ? "Light colours" : "Dark colours"; };
themes.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("kvbench-theme", root.dataset.theme); } catch { /* a page may have no storage */ }
  nameTheme();
});
systemDark.addEventListener("change", nameTheme);
try {
  const stored = localStorage.getItem("kvbench-theme");
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;
} catch { /* a page may have no storage */ }
nameTheme();
themes.hidden = false;

const names = new Intl.Collator("en", { numeric: true });  // item 2 before item 10
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
      return (up ? 1 : -1) * (numeric ? x - y : names.compare(x, y));
    });
    body.append(...rows);
  });
}
const filters = document.getElementById("filters");
if (filters) {
  const rows = [...document.getElementById("verdict-table").tBodies[0].rows];
  const texts = rows.map(row => row.textContent.toLowerCase());
  const selects = [...filters.querySelectorAll("select")], typed = document.getElementById("filter-text");
  const count = document.getElementById("filter-count");
  const choose = () => {
    const words = typed.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, index) => {
      const fits = selects.every(one => !one.value || row.dataset[one.dataset.field] === one.value) &&
        words.every(word => texts[index].includes(word));
      row.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  filters.addEventListener("input", choose);
  filters.addEventListener("submit", event => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(choose));
  filters.reset();
  filters.hidden = false;
  choose();
}
