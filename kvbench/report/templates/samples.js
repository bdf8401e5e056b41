// Every policy's answer to one sample, word by word beside the full cache's; those that say the same share a pane.
const Samples = (() => {
const none = { has: () => false, show: () => {}, failing: () => {}, keep: () => {} };
if (!document.getElementById("sample-data")) return none;
const at = id => document.getElementById(id);
const groups = embedded("sample-data");
const pictures = at("autopsy-data") ? embedded("autopsy-data") : [];
const pick = { group: at("sb-group"), policy: at("sb-policy"), budget: at("sb-budget"), which: at("sb-which"),
  sample: at("sb-sample") };
let listed = [], kept = null;

const fill = (select, entries, wanted) => {
  const before = wanted === undefined ? select.value : String(wanted);
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => String(value) === before)) select.value = before;
};
const unique = list => [...new Set(list)];
const group = () => groups[pick.group.value];
const pickGroup = () => {
  const policies = unique(group().cells.map(cell => cell.policy));
  fill(pick.policy, policies.map(name => [name, name]), group().opening ? group().opening[0] : undefined);
  const first = group().cells.find(cell => cell.budget);
  if (first && !group().opening && pick.policy.selectedIndex === 0 && !group().cells[0].budget) pick.policy.value = first.policy;
  pickPolicy(group().opening && group().opening[1]);
};
const pickPolicy = wanted => {
  const cells = group().cells.filter(cell => cell.policy === pick.policy.value);
  const budgets = unique(cells.map(cell => cell.budget));
  fill(pick.budget, [...(budgets.length > 1 ? [["*", "all budgets"]] : []),
    ...budgets.map(budget => [budget, budget || "everything"])], budgets.includes(wanted) ? wanted : undefined);
  list();
};
const list = (key, id) => {
  const before = listed[pick.sample.value], cells = group().cells.filter(cell => cell.policy === pick.policy.value &&
    (pick.budget.value === "*" || cell.budget === pick.budget.value));
  listed = cells.flatMap(cell => cell.samples.map(answer => ({ cell, answer })))
    .filter(({ answer }) => (pick.which.value === "all" || answer.collapsed) && (!kept || kept.has(answer.id.replace(/, turn \d+$/, ""))));
  at("sb-kept").hidden = !kept;
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

// Words of both texts in order: kept, left out (of the full cache's), new (the policy's); the longest common ones stay.
const MOST_WORDS = 1200;
const aligned = (full, text) => {
  const a = full.match(/\S+\s*|^\s+/g) || [], b = text.match(/\S+\s*|^\s+/g) || [];
  if (a.length > MOST_WORDS || b.length > MOST_WORDS) return [["same", text]];
  const same = (i, j) => a[i].trim() === b[j].trim(), wide = b.length + 1, table = new Uint16Array((a.length + 1) * wide);
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    table[i * wide + j] = same(i, j) ? table[(i + 1) * wide + j + 1] + 1 : Math.max(table[(i + 1) * wide + j], table[i * wide + j + 1]);
  const found = [], push = (kind, word) => { if (found.length && found.at(-1)[0] === kind) found.at(-1)[1] += word; else found.push([kind, word]); };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && same(i, j)) { push("same", b[j]); i++; j++; }
    else if (j >= b.length || i < a.length && table[(i + 1) * wide + j] >= table[i * wide + j + 1]) push("del", a[i++]);
    else push("ins", b[j++]);
  }
  return found;
};
// A text with the place of its first different token, and in a policy's what it leaves out and adds.
const marked = (place, text, mark, full) => {
  if (text === undefined) { place.replaceChildren("(no text recorded)"); return; }
  if (!text && !mark) { place.replaceChildren("(empty)"); return; }
  const parts = full === undefined || full === text ? [["same", text]] : aligned(full, text), made = [];
  let from = 0, isMarked = !mark;
  const put = (kind, words) => { if (words) made.push(kind === "same" ? words : tag(kind, "", words)); };
  for (const [kind, words] of parts) {
    if (kind === "del") { put(kind, words); continue; }
    const to = from + words.length;
    if (!isMarked && mark[0] < to && mark[0] >= from) {
      const end = Math.min(Math.max(mark[1], mark[0]), to);
      put(kind, words.slice(0, mark[0] - from));
      made.push(tag("mark", "", words.slice(mark[0] - from, end - from) || "(ends here)"));
      put(kind, words.slice(end - from));
      isMarked = true;
    } else put(kind, words);
    from = to;
  }
  if (!isMarked) made.push(tag("mark", "", mark[0] < mark[1] ? text.slice(...mark) : "(ends here)"));
  place.replaceChildren(...made);
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
// The other policies at the same budget, by what they say.
const others = (chosen, answer) => {
  const off = new Set((State.get("off") || "").split("~")), byText = new Map();
  for (const cell of group().cells) {
    if (cell === chosen || !cell.budget || cell.budget !== chosen.budget || off.has(cell.policy)) continue;
    const theirs = cell.samples.find(one => one.id === answer.id);
    if (!theirs) continue;
    const text = theirs.text === undefined ? "" : theirs.text;
    byText.set(text, [...(byText.get(text) || []), { cell, theirs }]);
  }
  return [...byText.values()];
};
const pane = (some, full) => {
  const heading = tag("h4", ""), words = tag("p", "");
  some.forEach(({ cell, theirs }, index) => {
    const button = tag("button", "sb-pick", cell.policy);
    button.type = "button";
    button.title = "Show this policy's scores";
    button.addEventListener("click", () => { show(cell.key, theirs.id); });
    const lead = theirs.scores.find(([name]) => name === group().lead) || theirs.scores[0], score = lead ? ` ${lead[1]}` : "";
    heading.append(index ? ", " : "", button, `${score}${theirs.collapsed ? " \u2715" : ""}`);
  });
  marked(words, some[0].theirs.text, (some[0].theirs.marks || [])[1], full);
  return tag("div", "pane", heading, words);
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
  marked(at("sb-text"), answer.text, marks[1], full);
  at("sb-policy-name").textContent = cell.label + (answer.collapsed ? " \u2715" : "");
  at("sb-others").replaceChildren(...others(cell, answer).map(some => pane(some, full)));
  const where = answer.token === undefined ? "" : ` (token ${answer.token + 1})`;
  at("sb-differs").textContent = answer.text === undefined || full === undefined ? "" : !answer.marks ?
    "Same text as the full cache." : `Marked: the first different ${answer.word ? "word" : "token"}${where}.`;
  const named = /^[\w.\/:@%+-]+$/.test(answer.id) ? answer.id : `'${answer.id.replaceAll("'", "'\\''")}'`;
  if (answer.marks && answer.token !== undefined && !/, turn \d+$/.test(answer.id))
    at("sb-differs").append(" Again with its evidence kept: ", tag("code", "sb-command", `kvbench why ${cell.key} ${named}`));
  at("sb-scores").replaceChildren(row("th", ["score"], [cell.label], ["full cache"], ["difference"]),
    ...answer.scores.map(([name, value, other, difference, verdict]) =>
      row("td", [group().labels[name]], [value], [other || "-"],
        [difference + (verdict ? ` (${verdict})` : ""), verdict === "worse" ? "failed" : ""])));
  at("sb-why").replaceChildren();
  const first = at("sb-text").querySelector("mark"), moment = answer.token;
  const reason = first && moment !== undefined && Autopsy.why(group().title, answer.id, cell.policy, cell.budget, moment);
  if (reason) explain(first, reason, cell, answer);
  const pictured = pictures.find(other => other.title === group().title);
  const found = pictured && pictured.items[answer.id.replace(/, turn \d+$/, "")];
  const box = at("sb-picture"), source = found && found.picture ? found.picture.source : item.picture;
  box.hidden = !source;
  box.replaceChildren();
  if (box.hidden) return;
  const image = new Image();
  image.src = source;
  image.alt = `Picture of ${answer.id}`;
  box.append(image);
};
// A click on the first different word says what the policy had let go that the full cache looks at.
const explain = (first, reason, cell, answer) => {
  const ask = tag("button", "sb-pick", "Why?");
  ask.type = "button";
  const act = () => {
    const more = tag("button", "sb-pick", "Show it");
    more.type = "button";
    more.addEventListener("click", () => Autopsy.show(group().title, answer.id, cell.budget, answer.token, reason.place));
    at("sb-why").replaceChildren(reason.says, " ", more);
    const box = at("sb-picture");
    if (!reason.patch || box.hidden) return;
    const { row, column, rows, columns } = reason.patch, spot = tag("span", "sb-spot");
    spot.style.cssText = `left: ${100 * column / columns}%; top: ${100 * row / rows}%; width: ${100 / columns}%; height: ${100 / rows}%`;
    box.querySelectorAll(".sb-spot").forEach(one => one.remove());
    box.append(spot);
  };
  ask.addEventListener("click", act);
  first.addEventListener("click", act);
  first.classList.add("sb-first");
  at("sb-differs").append(" ", ask);
};
const remember = () => {
  const one = listed[pick.sample.value];
  if (one) State.set("sample", `${one.cell.key}/${one.answer.id}`);
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
    const ids = wanted === undefined ? [cell.samples[0] && cell.samples[0].id] : [wanted, `${wanted}, turn 1`];
    const found = matches(one, cell) && ids.find(id => cell.samples.some(a => a.id === id));
    if (!found) continue;
    pick.group.value = index;
    pick.which.value = "all";
    kept = kept && kept.has(found.replace(/, turn \d+$/, "")) ? kept : null;
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
const show = (key, id) => { if (open((_, cell) => cell.key === key, id)) remember(); else missing(); };
const openLink = () => {
  const part = /^([0-9a-f]{16})\/(.*)$/s.exec(State.get("sample") || "");
  if (part && !open((_, cell) => cell.key === part[1], part[2])) missing();
};
document.addEventListener("click", event => {
  const link = event.target.closest("main a[href='#samples']"), place = link && link.closest("td"), table = place && place.closest("table");
  if (!link) return;
  const { group: title, cell: label, sample } = link.dataset.sample ? link.dataset : { group: table.dataset.group,
    cell: [...table.tHead.rows].at(-1).cells[place.cellIndex].dataset.cell, sample: place.parentNode.dataset.sample };
  if (open((one, cell) => one.title === title && cell.label === label, sample)) { event.preventDefault(); remember(); }
  else missing();
});
pick.group.addEventListener("change", pickGroup);
pick.policy.addEventListener("change", () => { pickPolicy(pick.budget.value); remember(); });
for (const select of [pick.budget, pick.which]) select.addEventListener("change", () => { list(); remember(); });
pick.sample.addEventListener("change", () => { draw(); remember(); });
at("sb-previous").addEventListener("click", () => step(-1));
at("sb-next").addEventListener("click", () => step(1));
at("sb-kept").addEventListener("click", () => { kept = null; State.set("brush", ""); list(); });
at("sb-card").addEventListener("keydown", event => {
  if (event.target.tagName === "SELECT" || event.altKey || event.ctrlKey || event.metaKey) return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) { event.preventDefault(); step(by); }
});
State.listen(["sample"], linked => { if (linked) openLink(); });
State.listen(["off"], draw);
State.listen(["budget", "group"], () => {
  const index = groups.findIndex(one => one.title === State.get("group"));
  if (index >= 0 && String(index) !== pick.group.value) { pick.group.value = index; pickGroup(); }
  if (State.get("budget")) pickPolicy(State.get("budget"));
});
fill(pick.group, groups.map((one, index) => [index, one.title]));
at("sb-group-label").hidden = groups.length < 2;
pickGroup();
if (State.get("sample")) openLink();
const failing = key => {
  const found = groups.flatMap(one => one.cells).find(cell => cell.key === key), first = found && found.samples.find(answer => answer.collapsed);
  show(key, first && first.id);
  pick.which.value = "collapsed";
  list(key, first && first.id);
};
return { show, failing, has: key => groups.some(one => one.cells.some(cell => cell.key === key && cell.samples.length)),
  keep: ids => { kept = new Set(ids); list(); } };
})();
