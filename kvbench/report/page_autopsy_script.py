"""The choosing half of the autopsy's script: model, sample, budget, layer, head, moment; by click or key."""

from kvbench.report.page_autopsy_draw import DRAW
from kvbench.report.page_autopsy_read import READ

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
const pickGroup = () => {
  fill(pick.budget, group().budgets.map(budget => [budget, budget || "everything"]));
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
  reading = null;
  say("");
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
pick.group.addEventListener("change", pickGroup);
pick.budget.addEventListener("change", pickBudget);
pick.sample.addEventListener("change", pickSample);
for (const select of [pick.layer, pick.head, pick.measure]) select.addEventListener("change", draw);
let before = null;  // paper shows the end
addEventListener("beforeprint", () => { stop(); before = slider.value; slider.value = slider.max; draw(); });
addEventListener("afterprint", () => { if (before !== null) { slider.value = before; before = null; draw(); } });
fill(pick.group, data.map((one, index) => [index, one.title]));
at("ap-group-label").hidden = data.length < 2;
pickGroup();
"""

AUTOPSY_SCRIPT = f'if (document.getElementById("autopsy-data")) (() => {{{DRAW}{READ}{_CHOOSE}}})();\n'
