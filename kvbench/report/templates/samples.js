if (document.getElementById("sample-data")) (() => {
const at = id => document.getElementById(id);
const groups = JSON.parse(at("sample-data").textContent);
const pictures = at("autopsy-data") ? JSON.parse(at("autopsy-data").textContent) : [];
const pick = { group: at("sb-group"), policy: at("sb-policy"), budget: at("sb-budget"), which: at("sb-which"),
  sample: at("sb-sample") };
let listed = [];

const fill = (select, entries, wanted) => {
  const before = wanted === undefined ? select.value : String(wanted);
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => String(value) === before)) select.value = before;
};
const unique = list => [...new Set(list)];
const group = () => groups[pick.group.value];
const pickGroup = () => {
  const cells = group().cells, policies = unique(cells.map(cell => cell.policy));
  fill(pick.policy, policies.map(name => [name, name]));
  const first = cells.find(cell => cell.budget);
  if (first && pick.policy.selectedIndex === 0 && !cells[0].budget) pick.policy.value = first.policy;
  pickPolicy();
};
const pickPolicy = () => {
  const cells = group().cells.filter(cell => cell.policy === pick.policy.value);
  const budgets = unique(cells.map(cell => cell.budget));
  fill(pick.budget, [...(budgets.length > 1 ? [["*", "all budgets"]] : []),
    ...budgets.map(budget => [budget, budget || "everything"])]);
  list();
};
const list = (key, id) => {
  const before = listed[pick.sample.value], cells = group().cells.filter(cell => cell.policy === pick.policy.value &&
    (pick.budget.value === "*" || cell.budget === pick.budget.value));
  listed = cells.flatMap(cell => cell.samples.map(answer => ({ cell, answer })))
    .filter(({ answer }) => pick.which.value === "all" || answer.collapsed);
  const wanted = id === undefined && before ? before.answer.id : id;
  const index = listed.findIndex(one => one.answer.id === wanted && (key === undefined || one.cell.key === key));
  const named = ({ cell, answer }) => answer.id + (pick.budget.value === "*" ? ` at ${cell.budget}` : "") +
    (answer.collapsed ? " (collapsed)" : "");
  fill(pick.sample, listed.map((one, place) => [place, named(one)]), Math.max(0, index));
  const sum = name => cells.reduce((total, cell) => total + cell[name], 0), lost = sum("num_collapsed");
  const cut = pick.which.value === "collapsed" && listed.length < lost;
  at("sb-count").textContent = `${listed.length} of ` + (cut ? `${lost} collapsed samples` : `${sum("num")} samples`);
  draw();
};
const marked = (place, text, mark) => {
  if (text === undefined) { place.replaceChildren("(no text recorded)"); return; }
  if (!mark) { place.replaceChildren(text || "(empty)"); return; }
  const word = document.createElement("mark");
  word.textContent = mark[0] < mark[1] ? text.slice(...mark) : "(ends here)";
  place.replaceChildren(text.slice(0, mark[0]), word, text.slice(mark[1]));
};
const row = (name, ...cells) => {
  const made = document.createElement("tr");
  cells.forEach(([text, kind], index) => {
    const cell = document.createElement(name === "th" || !index ? "th" : "td");
    if (cell.tagName === "TH") cell.scope = name === "th" ? "col" : "row";
    if (!index) cell.className = "name";
    if (kind) cell.classList.add(kind);
    cell.textContent = text;
    made.append(cell);
  });
  return made;
};
const draw = () => {
  const one = listed[pick.sample.value];
  at("sb-shown").hidden = !one;
  at("sb-none").hidden = Boolean(one);
  if (!one) return;
  const { cell, answer } = one, item = group().items[answer.id] || {};
  const full = answer.full === undefined ? item.full : answer.full, marks = answer.marks || [];
  at("sb-name").textContent = `${answer.id}: ${cell.label}`;
  at("sb-question").textContent = item.question || "";
  at("sb-reference").textContent = item.reference === undefined ? "(none recorded)" : item.reference;
  marked(at("sb-full"), full, marks[0]);
  marked(at("sb-text"), answer.text, marks[1]);
  at("sb-policy-name").textContent = cell.label;
  const where = answer.token === undefined ? "" : ` (token ${answer.token + 1})`;
  at("sb-differs").textContent = answer.text === undefined || full === undefined ? "" : !answer.marks ?
    "Same text as the full cache." : `Marked: the first different ${answer.word ? "word" : "token"}${where}.`;
  at("sb-scores").replaceChildren(row("th", ["score"], [cell.label], ["full cache"], ["difference"]),
    ...answer.scores.map(([name, value, other, difference, verdict]) =>
      row("td", [group().labels[name]], [value], [other || "-"],
        [difference + (verdict ? ` (${verdict})` : ""), verdict === "worse" ? "failed" : ""])));
  const pictured = pictures.find(other => other.title === group().title);
  const found = pictured && pictured.items[answer.id.replace(/, turn \d+$/, "")];
  const box = at("sb-picture");
  box.hidden = !(found && found.picture);
  box.replaceChildren();
  if (box.hidden) return;
  const image = new Image();
  image.src = found.picture.source;
  image.alt = `Picture of ${answer.id}`;
  box.append(image);
};
const remember = () => {
  const one = listed[pick.sample.value];
  if (one) history.replaceState(null, "", `#sample=${one.cell.key}/${encodeURIComponent(one.answer.id)}`);
};
const step = by => {
  if (!listed.length) return;
  pick.sample.selectedIndex = (pick.sample.selectedIndex + by + listed.length) % listed.length;
  draw();
  remember();
};
// A conversation is linked to as a whole and opens at its first turn.
const open = (matches, wanted) => {
  for (const [index, one] of groups.entries()) for (const cell of one.cells) {
    const found = matches(one, cell) && [wanted, `${wanted}, turn 1`].find(id => cell.samples.some(a => a.id === id));
    if (!found) continue;
    pick.group.value = index;
    pick.which.value = "all";
    pickGroup();
    pick.policy.value = cell.policy;
    pickPolicy();
    pick.budget.value = cell.budget;
    list(cell.key, found);
    at("samples").scrollIntoView();
    return true;
  }
  return false;
};
const missing = () => { at("sb-count").textContent = "The linked sample is not on this page."; };
const openLink = () => {
  const part = /^#sample=([0-9a-f]{16})\/(.*)$/.exec(location.hash);
  if (!part) return;
  let id = part[2];
  try { id = decodeURIComponent(id); } catch { return; }
  if (!open((_, cell) => cell.key === part[1], id)) missing();
};
document.addEventListener("click", event => {
  const link = event.target.closest("a[data-sample]");
  if (!link) return;
  const { group: title, cell: label, sample } = link.dataset;
  if (open((one, cell) => one.title === title && cell.label === label, sample)) { event.preventDefault(); remember(); }
  else missing();
});
pick.group.addEventListener("change", pickGroup);
pick.policy.addEventListener("change", () => { pickPolicy(); remember(); });
for (const select of [pick.budget, pick.which]) select.addEventListener("change", () => { list(); remember(); });
pick.sample.addEventListener("change", () => { draw(); remember(); });
at("sb-previous").addEventListener("click", () => step(-1));
at("sb-next").addEventListener("click", () => step(1));
at("sb-card").addEventListener("keydown", event => {
  if (event.target.tagName === "SELECT" || event.altKey || event.ctrlKey || event.metaKey) return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) { event.preventDefault(); step(by); }
});
addEventListener("hashchange", openLink);
fill(pick.group, groups.map((one, index) => [index, one.title]));
at("sb-group-label").hidden = groups.length < 2;
pickGroup();
openLink();
})();
