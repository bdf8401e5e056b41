// Paper shows what is folded. Every table has its name in its head, which is repeated on every sheet as a caption is not,
// and one that is wider than a sheet stands in parts, each with the columns that name a row.
(() => {
const SHEET = 1035, GAP = 6, DENSE_FROM = 20, MOST_LETTERS = 60000, MOST_LATER = 20000;  // a sheet's width in CSS pixels; columns; letters
const pen = document.createElement("canvas").getContext("2d");
const wide = (words, size) => { pen.font = `${size}px system-ui, sans-serif`; return pen.measureText(words).width; };
const pieces = (words, breaks) => words.split(breaks ? /[ \n]+/ : /\n/);
const widest = (cell, size) => {
  const small = cell.querySelector("small"), words = small ? cell.textContent.slice(0, -small.textContent.length) : cell.textContent;
  const breaks = cell.tagName === "TH" || /^(v-|missing)/.test(cell.className), least = cell.tagName === "TH" ? 1.08 : 1;
  return Math.max(...pieces(words, breaks).map(one => least * wide(one, size)), ...(small ? pieces(small.textContent, true).map(one => wide(one, .86 * size)) : []));
};
const inParts = table => {
  const heads = [...[...table.tHead.rows].at(-1).cells], rows = [...table.tBodies[0].rows], dense = heads.length > DENSE_FROM;
  table.classList.toggle("dense", dense);
  const size = dense ? 6.9 : 8.8, shown = (cell, at) => cell && !heads[at].classList.contains("off-column");
  const widths = heads.map((head, at) => GAP + Math.max(...[head, ...rows.map(row => row.cells[at])].map(cell => shown(cell, at) ? widest(cell, size) : 0)));
  const kept = heads.length > 1 && heads[1].textContent.startsWith("budget") ? [0, 1] : [0], named = kept.reduce((sum, at) => sum + widths[at], 0);
  const parts = [[]], all = widths.slice(kept.length).reduce((sum, one) => sum + one, 0), room = SHEET - named;
  const share = all / Math.ceil(all / room);  // of a part, so that the last one is not a stub
  let filled = 0;
  for (let at = kept.length; at < heads.length; at++) {
    if (parts.at(-1).length && (filled >= share || filled + widths[at] > room)) { parts.push([]); filled = 0; }
    parts.at(-1).push(at);
    filled += widths[at];
  }
  if (parts.length < 2) return;
  table.classList.add("printed-away");
  table.after(...parts.map((columns, number) => {
    const part = table.cloneNode(true), stays = new Set([...kept, ...columns]);
    part.removeAttribute("id");
    part.className = `${table.className} printed-part`.replace(" printed-away", "");
    part.caption.append(` (part ${number + 1} of ${parts.length})`);
    for (const row of [...part.rows]) {
      let at = 0;
      for (const cell of [...row.cells]) {
        const first = at;
        at += cell.colSpan;
        const left = [...stays].filter(one => one >= first && one < at).length;
        if (left) cell.colSpan = left; else cell.remove();
      }
      if (row.parentNode.tagName === "TBODY" && row.cells.length <= kept.length) row.remove();
    }
    return part;
  }));
};
let unfolded = [];
addEventListener("beforeprint", () => {
  for (const place of document.querySelectorAll(".later"))
    if (!place.closest("details:not([open])") || place.textContent.length < MOST_LATER) { nearby.unobserve(place); drawTable(place); }
  unfolded = [...document.querySelectorAll("main details:not([open])")].filter(one => one.textContent.length < MOST_LETTERS && !one.querySelector(".later"));
  for (const one of unfolded) one.open = true;
  const tables = [...document.querySelectorAll("main table")].filter(table => table.tHead && table.caption && !table.tHead.querySelector(".printed-name"));
  for (const table of tables) if (!table.matches(".places, .text") && !table.closest("details:not([open])")) inParts(table);
  for (const table of document.querySelectorAll("main table")) {
    if (!table.tHead || !table.caption || table.tHead.querySelector(".printed-name")) continue;
    const name = tag("th", "name", table.caption.textContent), row = tag("tr", "printed-name", name);
    name.colSpan = [...table.tHead.rows].at(-1).cells.length;
    table.tHead.prepend(row);
  }
});
addEventListener("afterprint", () => {
  for (const one of unfolded) one.open = false;
  for (const one of document.querySelectorAll(".printed-name, .printed-part")) one.remove();
  for (const one of document.querySelectorAll(".printed-away")) one.classList.remove("printed-away");
  unfolded = [];
});
})();
