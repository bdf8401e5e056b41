const Autopsy = (() => {
if (!document.getElementById("autopsy-data")) return { why: () => null, show: () => {} };
const NEVER = 65535;
const decoded = new Map();
const numbersOf = (text, wide) => {
  const known = decoded.get(text);
  if (known) return known;
  const raw = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const numbers = wide ? new Uint16Array(raw.buffer) : Uint16Array.from(raw, value => value === 255 ? NEVER : value);
  decoded.set(text, numbers);
  return numbers;
};
const rowsOf = (view, stored, chosen) => {
  const rows = [];
  stored.of.forEach((layer, s) => layer.forEach((pattern, h) => {
    if ((chosen.layer < 0 || chosen.layer === view.layers[s]) && (chosen.head < 0 || chosen.head === h))
      rows.push(numbersOf(stored.patterns[pattern], stored.wide));
  }));
  return rows;
};
// For every token: how many of the chosen layers and heads hold it after `step`, and in how many it lives on in an
// entry that is held; an entry may have joined another one in its turn.
const state = (item, view, chosen, step) => {
  const freed = rowsOf(view, view.freed, chosen), merged = view.merged ? rowsOf(view, view.merged, chosen) : [];
  const prompt = item.tokens.length, count = prompt + view.steps, pairs = freed.length;
  const held = new Uint16Array(count), joined = new Uint16Array(count);
  const arrived = Math.min(count, prompt + step);
  freed.forEach((row, r) => {
    for (let p = 0; p < arrived; p++) {
      if (row[p] > step) held[p]++;
      else if (merged.length && p < prompt && row[lastOf(merged[r], row, p, step)] > step) joined[p]++;
    }
  });
  return { held, joined, pairs, arrived, prompt };
};
const lastOf = (merged, row, p, step) => {
  for (let turns = merged.length; turns && row[p] <= step && merged[p] !== NEVER; turns--) p = merged[p];
  return p;
};
const imageTokens = item => [...item.kinds].flatMap((kind, p) => kind === "1" ? [p] : []);

// The picture with one square per patch; returns the element and a function that sets what is seen of each patch.
const pictureOf = (item, name) => {
  const { rows, columns, source, places } = item.picture, image = imageTokens(item);
  const box = make("svg", { viewBox: `0 0 ${columns || 1} ${rows || 1}`, class: "ap-picture", role: "img", tabindex: 0,
    preserveAspectRatio: "none", style: `aspect-ratio: ${item.picture.width} / ${item.picture.height}` });
  box.append(make("image", { href: source, width: columns || 1, height: rows || 1, preserveAspectRatio: "none" }));
  const squares = new Map();
  places.forEach((place, index) => {
    if (place < 0) return;
    const at = { x: place % columns, y: Math.floor(place / columns), width: 1, height: 1 };
    const veil = make("rect", { ...at, class: "ap-veil" });
    const hatch = make("rect", { ...at, fill: "url(#ap-hatch)", opacity: 0 });
    squares.set(image[index], [veil, hatch]);
    box.append(veil, hatch);
  });
  const cursor = make("rect", { class: "ap-cursor", width: 1, height: 1, x: -9, y: -9 });
  box.append(cursor);
  const show = (veiled, hatched) => squares.forEach(([veil, hatch], token) => {
    veil.setAttribute("opacity", veiled(token));
    hatch.setAttribute("opacity", hatched(token));
  });
  const point = place => {
    cursor.setAttribute("x", place < 0 ? -9 : place % columns);
    cursor.setAttribute("y", place < 0 ? -9 : Math.floor(place / columns));
  };
  return { box, show, point, name };
};

const SCALES = {
  entries: { name: "entries held", text: value => String(value) },
  image_kept_permille: { name: "image patches kept", text: value => `${Math.round(value / 10)} %`, most: 1000 },
  mean_age_tokens: { name: "mean age in tokens", text: value => String(value) },
  attention_permille: { name: "attention held", text: value => `${Math.round(value / 10)} %`, most: 1000 },
};
const mostOf = (views, measure) => SCALES[measure].most ||
  Math.max(1, ...views.map(view => (view.statistics[measure] || [1]).reduce((a, b) => Math.max(a, b), 1)));
const checkpointAt = (view, step) => {
  let found = 0;
  view.checkpoints.forEach((checkpoint, index) => { if (checkpoint <= step) found = index; });
  return found;
};
// Layers downwards, heads to the right; numbers are written where there is room.
const heatMap = (cell, label) => {
  const { layers, heads } = cell, roomy = heads <= 8 && layers <= 40;
  const width = roomy ? 52 : 10, height = roomy ? 20 : 10, left = 24, top = 14, gap = roomy ? 1 : 0;
  const box = make("svg", { viewBox: `0 0 ${left + heads * width} ${top + layers * height}`, class: "ap-heat",
    role: "img", tabindex: 0, style: `max-width: ${left + Math.max(heads * width, 90)}px` });
  const every = count => count > 12 ? Math.ceil(count / 8) : 1;
  for (let h = 0; h < heads; h += every(heads))
    box.append(make("text", { x: left + (h + .5) * width, y: top - 4, class: "ap-tick ap-middle" }, `h${h + 1}`));
  for (let l = 0; l < layers; l += every(layers))
    box.append(make("text", { x: left - 4, y: top + (l + .5) * height + 3, class: "ap-tick ap-end" }, `L${l + 1}`));
  const places = [];
  for (let l = 0; l < layers; l++) for (let h = 0; h < heads; h++) {
    const at = { x: left + h * width, y: top + l * height, width: width - gap, height: height - gap };
    const back = make("rect", { ...at, class: "ap-heat-back" });
    const square = make("rect", { ...at, class: "ap-heat-square" });
    const number = make("text", { x: at.x + at.width / 2, y: at.y + height / 2 + 3.5, class: "ap-number ap-middle" });
    box.append(back, square, ...(roomy ? [number] : []));
    places.push({ square, number, at });
  }
  const cursor = make("rect", { class: "ap-cursor", x: -99, y: -99, width, height });
  box.append(cursor);
  const value = (view, measure, step, index) =>
    (view.statistics[measure] || [])[checkpointAt(view, step) * layers * heads + index];
  const show = (view, measure, step, most) => places.forEach(({ square, number }, index) => {
    const found = value(view, measure, step, index), share = found === undefined ? 0 : Math.min(1, found / most);
    square.setAttribute("opacity", share);
    number.textContent = found === undefined ? "" : SCALES[measure].text(found);
    number.classList.toggle("ap-light", share > .55);
  });
  const point = index => {
    cursor.setAttribute("x", index < 0 ? -99 : places[index].at.x);
    cursor.setAttribute("y", index < 0 ? -99 : places[index].at.y);
  };
  return { box, show, point, value, columns: heads, count: layers * heads, label };
};

// The words of prompt and answer; a run of image tokens is one chip that counts.
const wordsOf = (item, view) => {
  const box = tag("p", "ap-words"), spans = [];
  box.tabIndex = 0;
  const all = [...item.tokens, ...view.answer], prompt = item.tokens.length;
  for (let p = 0; p < all.length; p++) {
    if (item.kinds[p] === "1") {
      const start = p;
      while (item.kinds[p + 1] === "1") p++;
      const chip = tag("span", "ap-chip");
      spans.push({ span: chip, start, end: p + 1 });
      box.append(chip, " ");
      continue;
    }
    if (p === prompt) box.append(tag("span", "ap-turn", "answer:"), " ");
    const span = tag("span", "ap-word", all[p]);
    spans.push({ span, start: p, end: p + 1 });
    box.append(span);
  }
  const show = now => spans.forEach(({ span, start, end }) => {
    if (end - start > 1 || span.className.startsWith("ap-chip")) {
      let held = 0;
      for (let p = start; p < end; p++) held += now.held[p];
      const mean = held / Math.max(1, now.pairs);
      const text = mean < 9.95 ? mean.toFixed(1).replace(".0", "") : Math.round(mean);
      span.textContent = `[${end - start} image tokens, ${text} kept]`;
      return;
    }
    const share = now.pairs ? now.held[start] / now.pairs : 0, later = start >= now.arrived;
    span.classList.toggle("ap-later", later);
    span.classList.toggle("ap-gone", !later && now.pairs > 0 && share === 0);
    span.classList.toggle("ap-merged", !later && now.joined[start] * 2 > now.pairs);
    span.style.setProperty("--held", later ? "" : `${Math.round(100 * share)}%`);
  });
  return { box, spans, show };
};

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

const at = id => document.getElementById(id);
const data = embedded("autopsy-data");
const pick = { group: at("ap-group"), sample: at("ap-sample"), budget: at("ap-budget"), layer: at("ap-layer"),
  head: at("ap-head"), measure: at("ap-measure") };
const slider = at("ap-step"), play = at("ap-play"), moment = at("ap-moment"), readout = at("ap-readout");
const panels = at("ap-panels"), legend = at("ap-scale");
let shown = [], item = null, reference = null, timer = null;

const fill = (select, entries) => {
  const before = select.value;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => String(value) === before)) select.value = before;
};
const group = () => data[pick.group.value];
const chosen = () => ({ layer: Number(pick.layer.value), head: Number(pick.head.value) });
const step = () => Number(slider.value);
const capped = (panel, moment) => Math.min(moment, panel.view.steps);
const pickGroup = () => {
  fill(pick.budget, group().budgets.map(budget => [budget, budget || "everything"]));
  const wanted = [State.get("budget"), group().asked].find(one => group().budgets.includes(one));
  if (wanted) pick.budget.value = wanted;
  pickBudget();
};
const pickBudget = () => {
  const cells = group().cells.filter(cell => cell.budget === pick.budget.value);
  fill(pick.sample, group().ids.filter(id => cells.some(cell => cell.views[id])).map(id => [id, id]));
  pickSample();
};
const pickSample = () => {
  item = group().items[pick.sample.value];
  const cells = group().cells.filter(cell => cell.budget === pick.budget.value && cell.views[pick.sample.value]);
  const heads = Math.max(1, ...cells.map(cell => cell.heads)), total = Math.max(1, ...cells.map(cell => cell.layers));
  const all = item.layers.length < total ? `all ${item.layers.length} stored of ${total}` : `all ${total}`;
  fill(pick.layer, [[-1, all], ...item.layers.map(layer => [layer, `layer ${layer + 1}`])]);
  fill(pick.head, [[-1, `all ${heads}`], ...Array.from({ length: heads }, (_, h) => [h, `head ${h + 1}`])]);
  const views = cells.map(cell => cell.views[pick.sample.value]);
  const measures = Object.keys(SCALES).filter(name => views.some(view => view.statistics[name]));
  const before = pick.measure.value;
  fill(pick.measure, measures.map(name => [name, SCALES[name].name]));
  if (!before && measures.includes("attention_permille")) pick.measure.value = "attention_permille";
  slider.max = Math.max(0, ...views.map(view => view.steps));
  reference = item.picture ? pictureOf(item, "full cache") : null;
  shown = cells.map((cell, index) => {
    const view = views[index];
    return { cell, view, picture: item.picture ? pictureOf(item, cell.label) : null,
      heat: heatMap(cell, cell.label), same: tag("p", "ap-says"), words: wordsOf(item, view), ended: tag("small", "") };
  });
  build();
  draw();
};
const build = () => {
  const made = shown.map(({ cell, view, picture, heat, same, words, ended }) => {
    const says = tag("p", "ap-says", view.says.replaceAll(" %", "\u00a0%"));
    if (view.differs) says.append(tag("span", "failed", " This replay's answer is not the measured one."));
    const drawn = [...(picture ? [picture.box] : []), heat.box, same, words.box];
    return tag("div", "ap-panel", tag("h3", "", cell.label, ended), ...drawn, says);
  });
  if (reference) {
    const note = "Clearer patches get more of the full cache's attention while it answers. Policies do not see this.";
    made.unshift(tag("div", "ap-panel ap-reference", tag("h3", "", "full: where it looks"), reference.box,
      tag("p", "ap-says", note)));
  }
  shown.forEach((panel, index) => { panel.box = made[index + (reference ? 1 : 0)]; });
  panels.replaceChildren(...made);
  hide();
  shown.forEach(panel => {
    if (panel.picture) follow(panel.picture.box, item.picture.columns, item.picture.rows, showPatch);
    const { box, columns, count } = panel.heat;
    follow(box, columns, count / columns, index => showHeat(panel, index), true);
    followWords(panel);
  });
  if (reference) follow(reference.box, item.picture.columns, item.picture.rows, showPatch);
  reading = null;
  say("");
};
const hide = () => {
  const off = new Set((State.get("off") || "").split("~"));
  shown.forEach(panel => { panel.box.hidden = off.has(panel.cell.label); });
};
const draw = () => {
  const now = step(), total = Number(slider.max), measure = pick.measure.value;
  moment.textContent = now ? `after ${now} of ${total} answer tokens` : "after the prompt";
  slider.setAttribute("aria-valuetext", moment.textContent);
  const most = mostOf(shown.map(panel => panel.view), measure);
  shown.forEach(panel => {
    const seen = capped(panel, now), found = panel.now = state(item, panel.view, chosen(), seen);
    panel.words.show(found);
    panel.ended.textContent = !found.pairs ? " (layer not stored)" : now > seen ? ` (ended after ${seen})` : "";
    if (panel.picture) {
      const pairs = Math.max(1, found.pairs);
      panel.picture.show(p => ((1 - found.held[p] / pairs) * .9).toFixed(3),
        p => (found.joined[p] / pairs * .5).toFixed(3));
      const tokens = imageTokens(item), held = tokens.reduce((sum, p) => sum + found.held[p], 0) / pairs;
      panel.picture.box.setAttribute("aria-label",
        `${panel.cell.label}, ${moment.textContent}: ${held.toFixed(1)} of ${tokens.length} image patches held`);
    }
    panel.heat.show(panel.view, measure, seen, most);
    const values = Array.from({ length: panel.heat.count }, (_, index) => panel.heat.value(panel.view, measure, seen, index));
    const isSame = values.every(one => one === values[0]);  // then a map of layers and heads says no more than its number
    panel.heat.box.style.display = isSame ? "none" : "";
    panel.same.hidden = !isSame || values[0] === undefined;
    panel.same.textContent = panel.same.hidden ? "" : `${SCALES[measure].name}: ${SCALES[measure].text(values[0])} in every layer and head`;
    panel.heat.box.setAttribute("aria-label", `${panel.cell.label}: ${SCALES[measure].name}, layers by heads; ` +
      "arrow keys read single numbers");
  });
  if (reference) {
    const { layer } = chosen();
    const rows = item.attention.filter((_, s) => layer < 0 || layer === item.layers[s]).map(bytes);
    const tokens = imageTokens(item), sum = p => rows.reduce((total, row) => total + row[p], 0);
    const top = Math.max(1, ...tokens.map(sum));
    reference.show(p => ((1 - Math.sqrt(sum(p) / top)) * .9).toFixed(3), () => 0);
    reference.box.setAttribute("aria-label", "Where the full cache looks while it answers");
  }
  const stored = Math.max(0, ...shown.map(({ view }) => view.checkpoints[checkpointAt(view, now)]));
  legend.textContent = `${SCALES[measure].name}: left end 0, right end ${SCALES[measure].text(most)}; as stored ` +
    (stored ? `after about ${stored} answer tokens` : "after the prompt");
  if (reading) reading.again();
};
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; readout.ariaLive = "polite"; };
play.addEventListener("click", () => {
  if (timer) { stop(); return; }
  if (step() >= Number(slider.max)) slider.value = 0;
  play.textContent = "Pause";
  readout.ariaLive = "off";  // nobody can listen that fast
  const stride = Math.max(1, Math.round(Number(slider.max) / 60));
  timer = setInterval(() => {
    slider.value = step() + stride;
    draw();
    if (step() >= Number(slider.max)) stop();
  }, 150);
});
slider.addEventListener("input", () => { stop(); draw(); });
slider.addEventListener("change", () => State.set("step", slider.value === "0" ? "" : slider.value));
pick.group.addEventListener("change", pickGroup);
pick.budget.addEventListener("change", pickBudget);
pick.sample.addEventListener("change", () => { pickSample(); State.set("kept", pick.sample.value); });
for (const select of [pick.layer, pick.head, pick.measure]) select.addEventListener("change", draw);
let before = null;  // paper shows the end
addEventListener("beforeprint", () => { stop(); before = slider.value; slider.value = slider.max; draw(); });
addEventListener("afterprint", () => { if (before !== null) { slider.value = before; before = null; draw(); } });
fill(pick.group, data.map((one, index) => [index, one.title]));
at("ap-group-label").hidden = data.length < 2;
// Where a link says which sample, budget and moment.
const linked = () => {
  const id = State.get("kept"), index = data.findIndex(one => one.title === State.get("group"));
  if (index >= 0) pick.group.value = index;
  pickGroup();
  if (id && group().items[id]) { pick.sample.value = id; pickSample(); }
  slider.value = State.get("step") || 0;
  draw();
};
State.listen(["budget", "group"], linked);
State.listen(["kept", "step"], by => { if (by) linked(); });
State.listen(["off"], () => { hide(); });
linked();

// Of what a policy had let go when it wrote an answer's token: what the full cache's own answer attends to most.
const why = (title, id, label, budget, moment) => {
  const found = data.find(one => one.title === title), item = found && found.items[id];
  const cell = found && found.cells.find(one => one.label === label && one.budget === budget), view = cell && cell.views[id];
  if (!item || !view) return null;
  let best = null;
  view.freed.of.forEach((heads, s) => {
    const place = item.layers.indexOf(view.layers[s]);
    if (place < 0) return;
    const looked = bytes(item.attention[place]);
    heads.forEach((pattern, h) => {
      const row = numbersOf(view.freed.patterns[pattern], view.freed.wide);
      for (let p = 1; p < item.tokens.length; p++)  // the first token is looked at whatever it says
        if (row[p] <= moment && looked[p] && (!best || looked[p] > best.weight)) best = { weight: looked[p], token: p, layer: view.layers[s] + 1, head: h + 1, step: row[p] };
    });
  });
  if (!best) return null;
  const image = imageTokens(item).indexOf(best.token), place = image < 0 || !item.picture ? -1 : item.picture.places[image];
  const columns = place < 0 ? 1 : item.picture.columns, patch = place < 0 ? null : { row: Math.floor(place / columns), column: place % columns, rows: item.picture.rows, columns };
  const what = patch ? `the patch in row ${patch.row + 1}, column ${patch.column + 1}` : item.kinds[best.token] === "1" ? "an image token" : `the word "${item.tokens[best.token].trim()}"`;
  const when = best.step ? `at answer token ${best.step}` : "with the prompt's cut";
  return { ...best, patch, place, says: `Of what ${label} had let go by then, the full cache attends most to ${what}; it left layer ${best.layer}, head ${best.head} ${when}.` };
};
const show = (title, id, budget, moment, place) => {
  const index = data.findIndex(one => one.title === title);
  if (index < 0) return;
  pick.group.value = index;
  pickGroup();
  pick.budget.value = budget;
  pickBudget();
  pick.sample.value = id;
  pickSample();
  slider.value = moment;
  draw();
  if (place >= 0) showPatch(place);
  at("autopsy").scrollIntoView();
};
return { why, show };
})();
