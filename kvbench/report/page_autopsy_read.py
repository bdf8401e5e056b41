"""The reading part of the autopsy's script: pointer, finger or key on a place, and a line that says its numbers.

What is shown at the moment (`shown`, `item`, `pick`, ...) is that of `page_autopsy_script`, which stands behind it.
"""

READ = r"""
let reading = null;
const say = text => { readout.textContent = text; };
// One place is read out at a time; what it says is said again when the moment changes.
const read = reader => {
  if (reading && reading !== reader) reading.clear();
  reading = reader;
  reading.again();
};
const readNoMore = reader => {
  if (reading !== reader) return;
  reading = null;
  reader.clear();
  say("");
};
const showPatch = place => {
  [reference, ...shown.map(panel => panel.picture)].forEach(picture => picture && picture.point(place));
  if (place < 0) return;
  const token = imageTokens(item)[item.picture.places.indexOf(place)];
  const name = `Patch row ${Math.floor(place / item.picture.columns) + 1}, column ${place % item.picture.columns + 1}`;
  if (token === undefined) { say(`${name}: no token`); return; }
  const parts = shown.map(({ cell, now }) => `${cell.label} ${now.held[token]} of ${now.pairs}` +
    (now.joined[token] ? ` (${now.joined[token]} merged)` : ""));
  say(`${name}, held in layers x heads: ${parts.join(", ")}`);
};
const showHeat = (panel, index) => {
  shown.forEach(other => other.heat.point(index < other.heat.count ? index : -1));
  if (index < 0) return;
  const heads = panel.heat.columns, measure = pick.measure.value;
  const parts = shown.map(other => `${other.cell.label} ` + (other.heat.count > index ?
    SCALES[measure].text(other.heat.value(other.view, measure, capped(other, step()), index) ?? "-") : "-"));
  const place = `Layer ${Math.floor(index / heads) + 1}, head ${index % heads + 1}`;
  say(`${place}, ${SCALES[measure].name}: ${parts.join(", ")}`);
};
const showWord = (panel, index) => {
  panel.words.spans.forEach(({ span }, other) => span.classList.toggle("ap-here", other === index));
  if (index < 0) return;
  const { span, start, end } = panel.words.spans[index];
  if (end - start > 1) { say(`${panel.cell.label}: ${span.textContent}`); return; }
  const now = panel.now, own = start - now.prompt;
  const place = own < 0 ? `prompt token ${start + 1}` : `answer token ${own + 1}`;
  const left = rowsOf(panel.view, panel.view.freed, chosen()).map(row => row[start]).filter(value => value !== NEVER);
  const first = Math.min(...left), cut = first ? `at answer token ${first}` : "with the prompt's cut";
  const when = left.length ? `; first leaves ${cut}` : "";
  const here = start >= now.arrived ? "not written yet" : `held by ${now.held[start]} of ${now.pairs} (layers x heads)`;
  say(`${panel.cell.label}: "${span.textContent.trim()}" (${place}) ${here}${when}`);
};
// Reads place after place; -1 ends it. What a finger or a key reads stays, so that the slider can show how it changes.
const walk = (box, show, keys) => {
  let place = -1;
  const reader = { again: () => show(place), clear: () => show(-1) };
  const go = next => { place = next; if (place < 0) readNoMore(reader); else read(reader); };
  box.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") go(-1); });
  box.addEventListener("keydown", event => {
    const next = event.key === "Escape" ? -1 : keys(event.key, place);
    if (next === undefined) return;
    event.preventDefault();
    go(next);
  });
  return go;
};
// Pointer, finger and arrow keys walk over a grid; `inset` where there is room for labels at the left and top.
const follow = (box, columns, rows, show, inset) => {
  const go = walk(box, show, (key, place) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
    return by && (place < 0 ? 0 : Math.max(0, Math.min(columns * rows - 1, place + by)));
  });
  const point = event => {
    const frame = box.getBoundingClientRect(), view = box.viewBox.baseVal;
    const left = inset ? 24 : 0, top = inset ? 14 : 0;
    const x = Math.floor(((event.clientX - frame.x) / frame.width * view.width - left) / (view.width - left) * columns);
    const y = Math.floor(((event.clientY - frame.y) / frame.height * view.height - top) / (view.height - top) * rows);
    go(x >= 0 && y >= 0 && x < columns && y < rows ? y * columns + x : -1);
  };
  for (const kind of ["pointermove", "pointerdown"]) box.addEventListener(kind, point);
};
const followWords = panel => {
  const { box, spans } = panel.words;
  const go = walk(box, index => showWord(panel, index), (key, index) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[key];
    return by && Math.max(0, Math.min(spans.length - 1, index + by));
  });
  const point = event => go(spans.findIndex(({ span }) => span === event.target));
  for (const kind of ["pointerover", "pointerdown"]) box.addEventListener(kind, point);
};
"""
