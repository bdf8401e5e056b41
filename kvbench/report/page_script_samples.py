"""The samples' script: walk through all answers, and open the one that a link names.

Texts enter the document as text nodes only, so model output is never read as markup.
"""

SAMPLES_SCRIPT = """
const store = document.getElementById("sample-data");
if (store) {
  const groups = JSON.parse(store.textContent), at = id => document.getElementById(id);
  const group = at("pick-group"), cell = at("pick-cell"), sample = at("pick-sample");
  const fill = (select, names, keep) => {
    select.replaceChildren(...names.map((name, index) => new Option(name, index)));
    select.selectedIndex = keep >= 0 && keep < names.length ? keep : 0;
  };
  const chosenGroup = () => groups[group.value], chosenCell = () => chosenGroup().cells[cell.value];
  const words = text => (text || "").match(/\\s*\\S+/g) || [];
  const firstDifference = (a, b) => {
    for (let i = 0; i < Math.max(a.length, b.length); i++) if ((a[i] || "").trim() !== (b[i] || "").trim()) return i;
    return -1;
  };
  const show = (place, list, marked) => {
    place.replaceChildren();
    if (marked < 0) { place.append(list.join("") || "(empty)"); return; }
    place.append(list.slice(0, marked).join(""));
    const mark = document.createElement("mark");
    const word = marked < list.length ? list[marked] : " (ends here)";
    mark.textContent = word.trim();
    place.append(word.slice(0, word.indexOf(mark.textContent)), mark, list.slice(marked + 1).join(""));
  };
  const draw = () => {
    const one = chosenCell().samples[sample.value];
    if (!one) return;
    const item = chosenGroup().items[one.id] || {};
    const full = one.full === undefined ? item.full : one.full;
    const a = words(full), b = words(one.text), marked = firstDifference(a, b);
    at("text-reference").textContent = item.reference === undefined ? "(none recorded)" : item.reference;
    show(at("text-full"), a, marked);
    show(at("text-policy"), b, marked);
    at("name-policy").textContent = chosenCell().label;
    at("scores").textContent = (marked < 0 ? "Same words as full. " : "") + one.scores;
  };
  const pickCell = () => { fill(sample, chosenCell().samples.map(one => one.id), sample.selectedIndex); draw(); };
  const pickGroup = () => {
    const cells = chosenGroup().cells;
    fill(cell, cells.map(one => one.label), Math.min(1, cells.length - 1));
    pickCell();
  };
  const step = by => {
    const count = sample.options.length;
    sample.selectedIndex = (sample.selectedIndex + by + count) % count;
    draw();
  };
  group.addEventListener("change", pickGroup);
  cell.addEventListener("change", pickCell);
  sample.addEventListener("change", draw);
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  fill(group, groups.map(one => one.title), 0);
  pickGroup();
}
"""
