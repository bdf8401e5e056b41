"""The choosing half of the autopsy's script: model, sample, budget, layer, head, moment; by click or key."""

from kvbench.report.page_autopsy_draw import DRAW

_CHOOSE = r"""
const at = id => document.getElementById(id);
const data = JSON.parse(at("autopsy-data").textContent);
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
const say = text => { readout.textContent = text; };

const pickGroup = () => {
  fill(pick.sample, Object.keys(group().items).map(id => [id, id]));
  fill(pick.budget, group().budgets.map(budget => [budget, budget || "everything"]));
  pickSample();
};
const pickSample = () => {
  item = group().items[pick.sample.value];
  if (!item) { panels.replaceChildren("No sample was looked at."); return; }
  const cells = group().cells.filter(cell => cell.budget === pick.budget.value && cell.views[pick.sample.value]);
  const heads = Math.max(1, ...cells.map(cell => cell.heads)), total = Math.max(1, ...cells.map(cell => cell.layers));
  const all = item.layers.length < total ? `all ${item.layers.length} stored of ${total}` : `all ${total}`;
  fill(pick.layer, [[-1, all], ...item.layers.map((layer, index) => [index, `layer ${layer + 1}`])]);
  fill(pick.head, [[-1, `all ${heads}`], ...Array.from({ length: heads }, (_, h) => [h, `head ${h + 1}`])]);
  const views = cells.map(cell => cell.views[pick.sample.value]);
  const measures = Object.keys(SCALES).filter(name => views.some(view => view.statistics[name]));
  fill(pick.measure, measures.map(name => [name, SCALES[name].name]));
  slider.max = Math.max(0, ...views.map(view => view.steps));
  reference = item.picture ? pictureOf(item, "full cache") : null;
  shown = cells.map((cell, index) => {
    const view = views[index];
    return { cell, view, picture: item.picture ? pictureOf(item, cell.label) : null,
      heat: heatMap(cell, cell.label), words: wordsOf(item, view), ended: tag("small", "") };
  });
  build();
  draw();
};
const build = () => {
  const made = shown.map(({ cell, view, picture, heat, words, ended }) => {
    const says = tag("p", "ap-says", view.says.replaceAll(" %", "\u00a0%"));
    if (view.differs) says.append(tag("span", "failed", " This replay's answer is not the measured one."));
    const drawn = [...(picture ? [picture.box] : []), heat.box, words.box];
    return tag("div", "ap-panel", tag("h4", "", cell.label, ended), ...drawn, says);
  });
  if (reference) {
    const note = "Clearer patches get more of the full cache's attention while it answers. Policies do not see this.";
    made.unshift(tag("div", "ap-panel ap-reference", tag("h4", "", "full: where it looks"), reference.box,
      tag("p", "ap-says", note)));
  }
  panels.replaceChildren(...made);
  shown.forEach(panel => {
    if (panel.picture) follow(panel.picture.box, item.picture.columns, item.picture.rows, showPatch);
    const { box, columns, count } = panel.heat;
    follow(box, columns, count / columns, index => showHeat(panel, index), true);
    followWords(panel);
  });
  if (reference) follow(reference.box, item.picture.columns, item.picture.rows, showPatch);
  showPatch(-1);
};
const draw = () => {
  const now = step(), total = Number(slider.max), measure = pick.measure.value;
  moment.textContent = now ? `after ${now} of ${total} answer tokens` : "after the prompt";
  slider.setAttribute("aria-valuetext", moment.textContent);
  const most = mostOf(shown.map(panel => panel.view), measure);
  shown.forEach(panel => {
    const seen = capped(panel, now), found = panel.now = state(item, panel.view, chosen(), seen);
    panel.words.show(found);
    panel.ended.textContent = now > seen ? ` (ended after ${seen})` : "";
    if (panel.picture) {
      panel.picture.show(p => ((1 - found.held[p] / found.pairs) * .9).toFixed(3),
        p => (found.joined[p] / found.pairs * .5).toFixed(3));
      const tokens = imageTokens(item), held = tokens.reduce((sum, p) => sum + found.held[p], 0) / found.pairs;
      panel.picture.box.setAttribute("aria-label",
        `${panel.cell.label}, ${moment.textContent}: ${held.toFixed(1)} of ${tokens.length} image patches held`);
    }
    panel.heat.show(panel.view, measure, seen, most);
    panel.heat.box.setAttribute("aria-label", `${panel.cell.label}: ${SCALES[measure].name}, layers by heads; ` +
      "arrow keys read single numbers");
  });
  if (reference) {
    const rows = item.attention.filter((_, s) => chosen().layer < 0 || chosen().layer === s).map(text => bytes(text));
    const tokens = imageTokens(item), sum = p => rows.reduce((total, row) => total + row[p], 0);
    const top = Math.max(1, ...tokens.map(sum));
    reference.show(p => ((1 - Math.sqrt(sum(p) / top)) * .9).toFixed(3), () => 0);
    reference.box.setAttribute("aria-label", "Where the full cache looks while it answers");
  }
  const stored = shown.length ? shown[0].view.checkpoints[checkpointAt(shown[0].view, capped(shown[0], now))] : 0;
  legend.textContent = `${SCALES[measure].name}: left end 0, right end ${SCALES[measure].text(most)}; as stored ` +
    (stored ? `after about ${stored} answer tokens` : "after the prompt");
};
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));

const showPatch = place => {
  [reference, ...shown.map(panel => panel.picture)].forEach(picture => picture && picture.point(place));
  if (place < 0) { say(""); return; }
  const token = imageTokens(item)[item.picture.places.indexOf(place)];
  const name = `Patch row ${Math.floor(place / item.picture.columns) + 1}, column ${place % item.picture.columns + 1}`;
  if (token === undefined) { say(`${name}: no token`); return; }
  const parts = shown.map(({ cell, now }) => `${cell.label} ${now.held[token]} of ${now.pairs}` +
    (now.joined[token] ? ` (${now.joined[token]} merged)` : ""));
  say(`${name}, held in layers x heads: ${parts.join(", ")}`);
};
const showHeat = (panel, index) => {
  shown.forEach(other => other.heat.point(index < other.heat.count ? index : -1));
  if (index < 0) { say(""); return; }
  const heads = panel.heat.columns, measure = pick.measure.value;
  const parts = shown.map(other => `${other.cell.label} ` + (other.heat.count > index ?
    SCALES[measure].text(other.heat.value(other.view, measure, capped(other, step()), index) ?? "-") : "-"));
  const place = `Layer ${Math.floor(index / heads) + 1}, head ${index % heads + 1}`;
  say(`${place}, ${SCALES[measure].name}: ${parts.join(", ")}`);
};
const showWord = (panel, index) => {
  panel.words.spans.forEach(({ span }, other) => span.classList.toggle("ap-here", other === index));
  if (index < 0) { say(""); return; }
  const { span, start, end } = panel.words.spans[index];
  if (end - start > 1) { say(`${panel.cell.label}: ${span.textContent}`); return; }
  const now = panel.now, own = start - now.prompt;
  const place = own < 0 ? `prompt token ${start + 1}` : `answer token ${own + 1}`;
  const left = rowsOf(panel.view.freed, chosen()).map(row => row[start]).filter(value => value !== NEVER);
  const first = Math.min(...left), cut = first ? `at answer token ${first}` : "with the prompt's cut";
  const when = left.length ? `; first leaves ${cut}` : "";
  const here = start >= now.arrived ? "not written yet" : `held by ${now.held[start]} of ${now.pairs} (layers x heads)`;
  say(`${panel.cell.label}: "${span.textContent.trim()}" (${place}) ${here}${when}`);
};
// Pointer and arrow keys walk over a grid; `inset` where the drawing has room for labels at the left and top.
const follow = (box, columns, rows, show, inset) => {
  let place = -1;
  box.addEventListener("pointermove", event => {
    const frame = box.getBoundingClientRect(), view = box.viewBox.baseVal;
    const left = inset ? 24 : 0, top = inset ? 14 : 0;
    const x = Math.floor(((event.clientX - frame.x) / frame.width * view.width - left) / (view.width - left) * columns);
    const y = Math.floor(((event.clientY - frame.y) / frame.height * view.height - top) / (view.height - top) * rows);
    place = x >= 0 && y >= 0 && x < columns && y < rows ? y * columns + x : -1;
    show(place);
  });
  box.addEventListener("pointerleave", () => show(place = -1));
  box.addEventListener("blur", () => show(place = -1));
  box.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    place = place < 0 ? 0 : Math.max(0, Math.min(columns * rows - 1, place + by));
    show(place);
  });
};
const followWords = panel => {
  const { box, spans } = panel.words;
  let index = -1;
  const go = next => showWord(panel, index = next);
  box.addEventListener("pointerover", event => go(spans.findIndex(({ span }) => span === event.target)));
  box.addEventListener("pointerleave", () => go(-1));
  box.addEventListener("blur", () => go(-1));
  box.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    go(Math.max(0, Math.min(spans.length - 1, index + by)));
  });
};
const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
play.addEventListener("click", () => {
  if (timer) { stop(); return; }
  if (step() >= Number(slider.max)) slider.value = 0;
  play.textContent = "Pause";
  const stride = Math.max(1, Math.round(Number(slider.max) / 60));
  timer = setInterval(() => {
    slider.value = step() + stride;
    draw();
    if (step() >= Number(slider.max)) stop();
  }, 150);
});
slider.addEventListener("input", () => { stop(); draw(); });
pick.group.addEventListener("change", pickGroup);
for (const select of [pick.sample, pick.budget]) select.addEventListener("change", pickSample);
for (const select of [pick.layer, pick.head, pick.measure]) select.addEventListener("change", draw);
let before = null;  // paper shows the end
addEventListener("beforeprint", () => { stop(); before = slider.value; slider.value = slider.max; draw(); });
addEventListener("afterprint", () => { if (before !== null) { slider.value = before; before = null; draw(); } });
fill(pick.group, data.map((one, index) => [index, one.title]));
at("ap-group-label").hidden = data.length < 2;
pickGroup();
"""

AUTOPSY_SCRIPT = f'if (document.getElementById("autopsy-data")) (() => {{{DRAW}{_CHOOSE}}})();\n'
