// The leaderboard, what is chosen on the page (group, budget, measure, cost, policies), and what each figure shows of it.
if (document.getElementById("living-data")) (() => {
const at = id => document.getElementById(id), data = embedded("living-data");
const form = at("choose"), pick = { group: at("pick-group"), budget: at("pick-budget"), measure: at("pick-measure"), cost: at("pick-cost") };
const SHOWN_PLACES = 12, MOST_COLUMNS = 120;
const hidden = () => new Set((State.get("off") || "").split("~").filter(Boolean));
const group = () => data[pick.group.value];
const known = name => group().measures[name] || { label: name, title: name, better: "lower", unit: "", factor: 1 };
const budget = () => pick.budget.value, measureName = () => pick.measure.value;
const isOn = cell => !hidden().has(group().policies[cell.policy].name);
const usable = () => group().cells.filter(cell => isOn(cell) && cell.status !== "failed");
const full = () => group().cells.find(cell => !cell.budget && Object.keys(cell.numbers).length);
const beats = (name, one, other) => known(name).better === "higher" ? one > other : one < other;
const isTime = name => /^(tpot|ttft|throughput|roof_share)/.test(name);
const noiseOf = (cell, name) => cell.noise && isTime(name) ? cell.noise[name.startsWith("ttft") ? "ttft" : "tpot"] : "";
const told = (cell, name) => {
  const found = cell.numbers[name];
  if (!found) return "";
  const low = found[1] === null ? "" : ` [${[1, 2].map(end => Number((found[end] / known(name).factor).toPrecision(3))).join(", ")}]`;
  const noise = noiseOf(cell, name);
  return `${known(name).label} ${found[4]}${low}${found[3] ? `, n = ${found[3]}` : ""}${noise ? ` (noisy: ${noise})` : ""}`;
};
const labelOf = cell => group().policies[cell.policy].name + (cell.budget ? `, ${cell.budget}` : "");
const bounds = (found, factor) => found[1] === null ? {} : { low: found[1] / factor, high: found[2] / factor };
const extent = values => ({ low: Math.min(...values), high: Math.max(...values) });
const axis = name => `${known(name).label}${known(name).unit ? ` (${known(name).unit.split(",")[0]})` : ""}`;

// Of two cells the one that costs no more and is better keeps the other off the Pareto front.
const frontOf = (cells, cost, name) => {
  if (known(name).reason) return [];
  const found = [];
  for (const cell of cells.filter(one => !noiseOf(one, cost)).sort((a, b) => a.numbers[cost][0] - b.numbers[cost][0] || (beats(name, a.numbers[name][0], b.numbers[name][0]) ? -1 : 1)))
    if (!found.length || beats(name, cell.numbers[name][0], found[found.length - 1].numbers[name][0])) found.push(cell);
  return found;
};
const withBoth = (cost, name) => usable().filter(cell => cell.numbers[cost] && cell.numbers[name]);
// With more policies than a reader can tell apart by colour, those off the front stand back.
const strong = () => {
  const shown = new Set(usable().map(cell => cell.policy));
  if (shown.size <= Charts.many + 1) return shown;
  const cells = pick.cost.value ? withBoth(pick.cost.value, measureName()) : [];
  const best = (group().boards[budget()] || {})[measureName()] || [];
  return new Set([...frontOf(cells, pick.cost.value, measureName()).map(cell => cell.policy),
    ...best.filter(row => row.rank && row.rank <= 3).map(row => group().cells[row.cell].policy), ...(full() ? [full().policy] : [])]);
};
const bySeries = cells => group().policies.map((look, policy) => ({ look, policy, cells: cells.filter(cell => cell.policy === policy) }))
  .filter(one => one.cells.length);
const tableOf = (cells, ...names) => [["policy", "budget", ...names.flatMap(name => [name, `${name}_low`, `${name}_high`, `${name}_n`])],
  ...cells.map(cell => [group().policies[cell.policy].name, cell.budget, ...names.flatMap(name => (cell.numbers[name] || [null, null, null, null]).slice(0, 4))])];
const extremes = (cells, name) => cells.flatMap(cell => cell.numbers[name].slice(0, 3).filter(one => one !== null)).map(one => one / known(name).factor);
const isLog = (name, { low, high }) => !known(name).share && low > 0 && high / low > 5;
const shortened = words => words.length > 30 ? `${words.slice(0, 14)}\u2026${words.slice(-13)}` : words;
const within = name => known(name).share ? [0, 1 / known(name).factor] : null;

const pareto = () => {
  const cost = pick.cost.value, name = measureName();
  if (!cost) return againstBudget();  // what is kept is what it costs, where nothing else was measured
  const cells = withBoth(cost, name);
  if (cells.length < 2 || cost === name) return null;
  const lit = strong(), front = frontOf(cells, cost, name), best = new Set(front), here = budget();
  const point = cell => {
    const [x, y] = [cell.numbers[cost], cell.numbers[name]], f = known(cost).factor, g = known(name).factor;
    return { x: x[0] / f, y: y[0] / g, ...bounds(y, g), ...(x[1] === null ? {} : { left: x[1] / f, right: x[2] / f }),
      big: best.has(cell), noisy: Boolean(noiseOf(cell, cost)), cell, says: `${labelOf(cell)}${best.has(cell) ? " (Pareto front)" : ""}: ${told(cell, name)}; ${told(cell, cost)}` };
  };
  const xs = extremes(cells, cost), x = extent(xs), names = [];
  for (const cell of front) if (cell.budget) names.push([`${shortened(group().policies[cell.policy].name)} ${cell.budget.replace(" tokens kept", "")}`, point(cell).x, point(cell).y, cell.policy]);
  for (const cell of cells) if (!best.has(cell) && lit.has(cell.policy) && (!cell.budget || cell.budget === here))
    names.push([shortened(group().policies[cell.policy].name), point(cell).x, point(cell).y, cell.policy]);
  const words = front.filter(cell => cell.budget).map(labelOf);
  return { x: { ...x, log: x.low > 0 && x.high / x.low > 3, label: axis(cost) }, y: { ...extent(extremes(cells, name)), log: isLog(name, extent(extremes(cells, name))), label: axis(name), within: within(name) },
    alt: `${known(name).title} over ${known(cost).label}. On the Pareto front: ${words.join("; ") || "the full cache alone"}.`,
    title: `${known(name).title} over ${known(cost).label}`, table: tableOf(cells, cost, name), names, height: 400,
    front: front.map(cell => [cell.numbers[cost][0] / known(cost).factor, cell.numbers[name][0] / known(name).factor]),
    series: bySeries(cells).map(one => ({ ...one, pale: !lit.has(one.policy), joined: true, points: one.cells.map(point) })) };
};
const quality = () => pick.cost.value ? againstBudget() : null;
const fit = () => group().measures.capacity_prompts ? againstBudget("capacity_prompts") : null;
const againstBudget = (name = measureName()) => {
  const f = known(name).factor, cells = usable().filter(cell => cell.budget && cell.numbers[name] && cell.size !== null);
  const places = [...new Set(cells.map(cell => cell.size))].sort((a, b) => a - b);
  if (places.length < 2) return null;
  const lit = strong(), share = places[places.length - 1] <= 1, ref = full() && full().numbers[name], scale = share ? 100 : 1;
  const ends = bySeries(cells).filter(one => lit.has(one.policy)).map(one => { const last = one.cells[one.cells.length - 1];
    return [shortened(one.look.name), last.size * scale, last.numbers[name][0] / f, one.policy]; });
  const values = [...extremes(cells, name), ...(ref ? [ref[0] / f] : [])], range = extent(values);
  const best = cells.filter(cell => cell.budget === budget()).sort((a, b) => beats(name, a.numbers[name][0], b.numbers[name][0]) ? -1 : 1)[0];
  return { x: { low: places[0] * scale, high: places[places.length - 1] * scale * (share ? 1.06 : 1.2), log: places[places.length - 1] / places[0] >= 8, label: share ? "tokens kept (%)" : "tokens kept",
    ticks: places.map(place => [place * scale, String(Number((place * scale).toPrecision(4)))]) },
    y: { ...range, log: isLog(name, range), label: axis(name), within: within(name) },
    lines: ref ? [{ y: ref[0] / f }] : [], names: ends, table: tableOf(cells, name), title: `${known(name).title} over budget`,
    alt: `${known(name).title} over budget; dashed: the full cache${ref ? `, ${ref[4]}` : ""}.${best ? ` Best at ${budget()}: ${group().policies[best.policy].name}, ${best.numbers[name][4]}.` : ""}`,
    series: bySeries(cells).map(one => ({ ...one, band: true, joined: true, pale: !lit.has(one.policy), points: one.cells.map(cell => {
      const found = cell.numbers[name], value = found[0] / f;
      return { x: cell.size * scale, y: value, ...{ low: value, high: value, ...bounds(found, f) }, cell, says: `${labelOf(cell)}: ${told(cell, name)}` }; }) })) };
};
const lost = () => {
  const found = group().lost;
  if (!found) return null;
  const factor = known(found.measure).factor, order = found.samples.slice(0, MOST_COLUMNS), lit = strong();
  const cells = usable().filter(cell => cell.budget === budget() && found.cells[group().cells.indexOf(cell)]);
  if (!cells.length) return null;
  const of = cell => found.cells[group().cells.indexOf(cell)];
  const values = cells.flatMap(cell => of(cell).slice(0, order.length).filter(one => one !== null)).map(one => one / factor);
  const worst = order[0];
  return { x: { low: 1, high: order.length, label: `samples, those that lose most first (${order.length}${order.length < found.samples.length ? ` of ${found.samples.length}` : ""})` },
    y: { ...extent([0, ...values]), label: `${known(found.measure).label} minus full${found.unit ? ` (${found.unit})` : ""}` }, lines: [{ y: 0 }],
    alt: `Difference of every sample to the full cache at ${budget()}. ${worst} loses most over all policies.`, title: `Which samples lose at ${budget()}`,
    table: [["policy", "sample", "difference"], ...cells.flatMap(cell => of(cell).map((value, index) => [group().policies[cell.policy].name, found.samples[index], value]))],
    series: bySeries(cells).map(one => ({ ...one, size: 7, pale: !lit.has(one.policy), points: one.cells.flatMap(cell => of(cell).slice(0, order.length).flatMap((value, index) => value === null ? [] :
      [{ x: index + 1, y: value / factor, cell, sample: order[index], place: index, says: `${order[index]} under ${labelOf(cell)}: ${plus(value / factor)} against full` }])) })) };
};
const plus = value => `${value > 0 ? "+" : ""}${Number(value.toPrecision(3))}`.replace("-", "\u2212");
const placesOf = name => ((group().boards[budget()] || {})[name] || []).map(row => ({ rank: "", numbers: [], word: "", share: "-", interval: "", lost: "", n: "",
  remark: "", value: "-", stored: "-", stored_share: "", step: "-", step_ratio: "", noise: "", ...group().costs_of[row.cell], ...row }));
const boardRows = () => placesOf(measureName()).filter(row => isOn(group().cells[row.cell]));
const costs = () => {
  const name = pick.cost.value, rows = name ? boardRows().map(row => group().cells[row.cell]).filter(cell => cell.numbers[name]) : [];
  if (rows.length < 2) return null;
  const f = known(name).factor, lit = strong(), ref = full() && full().numbers[name], ratio = name.endsWith("_ratio_to_full");
  const values = extremes(rows, name), least = rows.filter(cell => cell.budget).sort((a, b) => beats(name, a.numbers[name][0], b.numbers[name][0]) ? -1 : 1)[0];
  return { rows: rows.map(cell => group().policies[cell.policy].name), x: { ...extent([...(ratio ? [1] : [0]), ...values]), label: axis(name) },
    lines: ratio ? [{ x: 1 }] : ref ? [{ x: ref[0] / f }] : [], table: tableOf(rows, name), title: `${known(name).title} at ${budget()}`,
    alt: `${known(name).title} of every policy at ${budget()}; dashed: the full cache.${least ? ` Best: ${group().policies[least.policy].name}, ${least.numbers[name][4]}.` : ""}`,
    series: rows.map((cell, row) => ({ look: group().policies[cell.policy], policy: cell.policy, pale: !lit.has(cell.policy), points: [{ x: cell.numbers[name][0] / f, y: row,
      ...bounds(cell.numbers[name], f), noisy: Boolean(noiseOf(cell, name)), cell, says: `${labelOf(cell)}: ${told(cell, name)}` }] })) };
};
const PARTS = [["peak_load_bytes", "weights", "weights"], ["plain_activation_bytes", "activations", "activations"], ["kv_stored_bytes", "keys and values", "kv"]];
const memory = () => {
  const rows = boardRows().map(row => group().cells[row.cell]).filter(cell => cell.numbers.peak_memory_bytes && cell.numbers.peak_load_bytes);
  if (rows.length < 2) return null;
  const f = known("peak_memory_bytes").factor, bars = [];
  rows.forEach((cell, row) => {
    let from = 0;
    for (const [name, , kind] of PARTS) {
      const size = (cell.numbers[name] || [0])[0] / f;
      bars.push({ row, from, to: from + size, kind });
      from += size;
    }
    bars.push({ row, from, to: Math.max(from, cell.numbers.peak_memory_bytes[0] / f), kind: "rest" });
  });
  const least = rows.slice().sort((a, b) => a.numbers.peak_memory_bytes[0] - b.numbers.peak_memory_bytes[0])[0];
  return { rows: rows.map(cell => group().policies[cell.policy].name), bars, title: `Peak memory at ${budget()}`, x: { low: 0, high: Math.max(...bars.map(bar => bar.to)), label: `Peak memory (${known("peak_memory_bytes").unit})` },
    alt: `What the peak of all memory is made of. Lowest: ${group().policies[least.policy].name}, ${least.numbers.peak_memory_bytes[4]}.`,
    table: tableOf(rows, "peak_memory_bytes", ...PARTS.map(([name]) => name)),
    series: rows.map((cell, row) => ({ look: group().policies[cell.policy], policy: cell.policy, points: [{ x: cell.numbers.peak_memory_bytes[0] / f, y: row, cell,
      says: `${labelOf(cell)}: ${["peak_memory_bytes", ...PARTS.map(([name]) => name)].map(name => told(cell, name)).filter(Boolean).join("; ")}` }] })) };
};
const entries = () => {
  const cells = usable().filter(cell => cell.entries && (!cell.budget || cell.budget === budget()))
    .map(cell => ({ ...cell, entries: cell.entries[0].map((seen, at) => [seen, cell.entries[1][at], cell.entries[2][at]]) }));
  if (!cells.some(cell => cell.budget)) return null;
  const lit = strong(), all = cells.flatMap(cell => cell.entries);
  const one = cells.filter(cell => cell.budget)[0];
  return { x: { ...extent(all.map(row => row[0])), label: "tokens seen" }, y: { ...extent([0, ...all.map(row => row[1])]), label: "entries per layer and KV head" },
    alt: `Entries held while the answer is made, at ${budget()}: ${group().policies[one.policy].name} ends with ${Math.round(one.entries[one.entries.length - 1][1])}.`,
    title: `Entries held at ${budget()}`, table: [["policy", "budget", "seen_tokens", "mean", "max"], ...cells.flatMap(cell => cell.entries.map(row => [group().policies[cell.policy].name, cell.budget, ...row]))],
    names: cells.filter(cell => lit.has(cell.policy)).map(cell => [shortened(group().policies[cell.policy].name), cell.entries[cell.entries.length - 1][0], cell.entries[cell.entries.length - 1][1], cell.policy]),
    series: bySeries(cells).map(two => ({ ...two, bare: true, joined: true, pale: !lit.has(two.policy), points: two.cells.flatMap(cell => cell.entries.map(([x, y, most]) =>
      ({ x, y, cell, says: `${labelOf(cell)}: ${Number(y.toPrecision(4))} entries after ${x} tokens, at most ${most}` }))) })) };
};

// Tokens per second over the prompts that run together: of the speed pass, and at the most that fit.
const rates = () => {
  const cells = usable().filter(cell => cell.rates && (!cell.budget || cell.budget === budget())), all = cells.flatMap(cell => cell.rates);
  if (new Set(all.map(rate => rate[0])).size < 2) return null;
  const lit = strong(), xs = extent(all.map(rate => rate[0])), most = all.slice().sort((a, b) => b[1] - a[1])[0];
  const best = cells.find(cell => cell.rates.includes(most));
  return { x: { ...xs, log: true, label: "prompts that run together", ticks: [...new Set(all.map(rate => rate[0]))].sort((a, b) => a - b).map(size => [size, String(size)]) },
    y: { ...extent([0, ...all.flatMap(rate => rate.slice(1, 4).filter(one => one !== null))]), label: "tokens/s" }, title: `Throughput over the batch at ${budget()}`,
    alt: `Tokens per second of a whole run over the prompts that run together. Most: ${group().policies[best.policy].name}, ${most[5]} with ${most[0]}.`,
    table: [["policy", "budget", "prompts", "throughput_tokens_per_s", "low", "high", "n"], ...cells.flatMap(cell => cell.rates.map(rate => [group().policies[cell.policy].name, cell.budget, ...rate.slice(0, 5)]))],
    names: cells.filter(cell => lit.has(cell.policy)).map(cell => { const last = cell.rates[cell.rates.length - 1]; return [shortened(group().policies[cell.policy].name), last[0], last[1], cell.policy]; }),
    series: bySeries(cells).map(one => ({ ...one, joined: true, pale: !lit.has(one.policy), points: one.cells.flatMap(cell => cell.rates.map(([size, value, low, high, n, words]) =>
      ({ x: size, y: value, ...bounds([value, low, high], 1), cell, says: `${labelOf(cell)}: ${words} with ${size} together${low === null ? "" : ` [${[low, high].map(end => Number(end.toPrecision(3))).join(", ")}]`}${n ? `, n = ${n}` : ""}` }))) })) };
};
// Per policy the smallest budget shown to be safe, from where on the true one may lie, and below it what was looked at.
const DISC = "M-.5 0A.5 .5 0 1 0 .5 0A.5 .5 0 1 0-.5 0Z", OUTCOMES = { safe: { outline: DISC, fill: "full" }, undecided: { outline: DISC, fill: "none" },
  worse: { outline: "M-.5-.4L.5-.4L0 .5Z", fill: "full" }, failed: { outline: DISC, fill: "none" } };
const safe = number => {
  const found = group().safe[number];
  if (!found) return null;
  const places = group().policies.map(look => look.name), off = hidden(), rows = found.rows.filter(row => !off.has(row.name));
  if (!rows.length) return null;
  const top = Math.max(...found.ladder), words = row => row.safe === null ? `above ${top}${found.unit}` : `${row.safe}${found.unit}`;
  const cellOf = look => group().cells.find(cell => cell.key === look.key), least = rows.filter(row => row.safe !== null).sort((a, b) => a.safe - b.safe)[0];
  return { rows: rows.map(row => row.name), title: found.title, x: { ...extent(found.ladder), high: top * 1.1, log: top / Math.min(...found.ladder) >= 8, label: found.label, ticks: found.ladder.map(rung => [rung, String(rung)]) },
    alt: least ? `${found.title}. Least: ${least.name}, ${words(least)}.` : `${found.title}. No policy was shown to be safe.`,
    names: rows.map((row, at) => [words(row), row.safe === null ? top : row.safe, at - .12, places.indexOf(row.name)]),
    table: [["policy", "smallest_safe", "true_from", "status", "budget", "outcome", "difference", "n"], ...rows.flatMap(row => row.looks.map(look => [row.name, row.safe, row.low, row.status, look.budget, look.outcome, look.difference, look.n]))],
    series: rows.flatMap((row, at) => { const policy = places.indexOf(row.name), end = row.safe === null ? top : row.safe, seen = row.looks.find(look => look.budget === row.safe);
      return [...row.looks.map(look => ({ look: { ...OUTCOMES[look.outcome], colour: "muted", dash: "" }, policy, size: 6, points: [{ x: look.budget, y: at + .3, failed: look.outcome === "failed", cell: cellOf(look),
        says: `${row.name} at ${look.budget}${found.unit}: ${look.outcome}, ${look.difference}${look.n ? `, n = ${look.n}` : ""}` }] })),
      { look: row.look, policy, bare: row.safe === null, points: [{ x: end, y: at - .12, ...(row.low === null ? {} : { low: row.low, high: end }), cell: seen && cellOf(seen),
        says: `${row.name}: smallest safe budget ${words(row)}${row.low === null ? "" : `, the true one from ${row.low}${found.unit} on`}${seen ? `; there ${seen.difference}, n = ${seen.n}` : ""}${row.held ? `; it ${row.held}` : ""} (${row.status})` }] }]; }) };
};

const openCell = ({ cell, sample }) => {
  if (!cell) return;
  if (sample) { Samples.show(cell.key, sample); return; }
  const box = at("cell-box"), rows = Object.entries(cell.numbers).map(([name, found]) => {
    const interval = found[1] === null ? "" : `[${[1, 2].map(end => Number((found[end] / known(name).factor).toPrecision(4))).join(", ")}]`;
    const head = tag("th", "name", known(name).label);
    head.scope = "row";
    return tag("tr", "", head, tag("td", "", found[4]), tag("td", "", interval), tag("td", "", found[3] ? String(found[3]) : ""));
  });
  const heads = ["number", "value", "95 % interval", "n"].map((words, index) => { const one = tag("th", index ? "" : "name", words); one.scope = "col"; return one; });
  const close = tag("button", "plain-button", "Close"), more = tag("button", "plain-button", "Its samples");
  close.addEventListener("click", () => box.close());
  more.addEventListener("click", () => { box.close(); Samples.show(cell.key); });
  more.hidden = !Samples.has(cell.key);
  const caption = tag("caption", "", `${cell.status === "ok" ? "" : `Status: ${cell.status}. `}Cell ${cell.key}`);
  box.replaceChildren(tag("h3", "", labelOf(cell)), tag("table", "", caption, tag("thead", "", tag("tr", "", ...heads)), tag("tbody", "", ...rows)), more, close);
  box.showModal();
};

const signOf = look => make("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, Charts.marker(look, 11, {}));
const barOf = (row, look, rule) => {
  const svg = make("svg", { class: "bar", viewBox: "0 0 104 14", "aria-hidden": "true" }), x = share => 2 + share;
  svg.append(make("line", { x1: 2, x2: 102, y1: 7, y2: 7, style: "stroke: var(--grid); stroke-width: 1" }));
  if (rule !== undefined) svg.append(make("line", { x1: x(rule), x2: x(rule), y1: 0, y2: 14, class: "rule" }));
  if (!row.at) return svg;
  const [low, value, high] = row.at, colour = `var(--plot-${look.colour})`;
  svg.append(make("line", { x1: x(low), x2: x(high), y1: 7, y2: 7, style: `stroke: ${colour}` }), Charts.marker(look, 9, { at: [x(value), 7] }));
  return svg;
};
const cell = (kind, ...parts) => tag("td", kind, ...parts);
const small = words => words ? [tag("small", "", words.replaceAll("-", "\u2212").replaceAll(", ", ",\u00a0"))] : [];
// How many samples fail, and the way to the first of them.
const failures = (row, one) => {
  if (!/^[1-9]/.test(row.lost) || !Samples.has(one.key)) return cell("", row.lost);
  const button = tag("button", "sb-pick", row.lost);
  button.type = "button";
  button.title = "Read the answers that fail";
  button.addEventListener("click", () => Samples.failing(one.key));
  return cell("", button);
};
const drawBoard = box => {
  const name = measureName(), rows = placesOf(name), off = hidden();
  const reference = rows.find(row => row.word === "reference"), rule = reference && reference.at ? reference.at[1] : undefined;
  const table = box.querySelector("table"), more = State.get("places") === "all" || rows.length <= SHOWN_PLACES + 3;
  table.caption.textContent = `Leaderboard at ${budget()} by ${known(name).label}${known(name).better === "none" ? "" : `, ${known(name).better} is better`}`;
  const head = table.querySelector("[data-part=quality]");
  head.firstChild.textContent = known(name).label;
  const has = {};  // a column without any number is left out
  for (const part of ["share", "stored", "step", "lost"]) {
    has[part] = rows.some(row => row[part] && row[part] !== "-");
    table.querySelector(`[data-part=${part}]`).hidden = !has[part];
  }
  const unit = rows.map(row => row.unit).find(Boolean);
  table.querySelector("[data-part=next] small").textContent = `difference${unit ? `, ${unit}` : ""}`;
  table.tBodies[0].replaceChildren(...(more ? rows : rows.slice(0, SHOWN_PLACES)).map(row => {
    const one = group().cells[row.cell], look = group().policies[one.policy];
    const button = tag("button", "pick", signOf(look), tag("span", "long", ...row.policy.split("_").flatMap((part, index, all) => index < all.length - 1 ? [`${part}_`, tag("wbr")] : [part])));
    button.type = "button";
    button.setAttribute("aria-pressed", String(!off.has(look.name)));
    button.title = off.has(look.name) ? `Show ${look.name} everywhere` : `Hide ${look.name} everywhere`;
    button.addEventListener("click", () => toggle(look.name));
    const head = tag("th", "name", button);
    head.scope = "row";
    const word = cell(`v-${row.word.replaceAll(" ", "-")}`, row.word, ...small(row.numbers.join("\u00a0")));
    word.title = row.remark;
    const value = cell("name", tag("span", "value", tag("span", "", row.value, ...small(row.interval)), barOf(row, look, rule)));
    value.title = row.n;
    const step = cell(row.noise ? "noisy" : "", row.step, ...small(row.step_ratio));
    step.title = row.noise;
    const drawn = tag("tr", off.has(look.name) ? "off" : "", cell("", row.rank), head, value, ...(has.share ? [cell("", row.share)] : []),
      ...(has.stored ? [cell("", row.stored, ...small(row.stored_share))] : []), ...(has.step ? [step] : []), word, ...(has.lost ? [failures(row, one)] : []));
    drawn.dataset.policy = row.policy;
    return drawn;
  }));
  let button = box.querySelector(".more");
  if (!button) {
    button = tag("button", "more");
    button.type = "button";
    button.addEventListener("click", () => State.set("places", State.get("places") === "all" ? "" : "all"));
    box.append(button);
  }
  button.hidden = rows.length <= SHOWN_PLACES + 3;
  button.textContent = more ? `Show the first ${SHOWN_PLACES - 1}` : `Show all ${rows.length - 1} policies`;
};
const toggle = name => {
  const off = hidden();
  if (!off.delete(name)) off.add(name);
  State.set("off", [...off].join("~"));
};
const drawChips = () => {
  const off = hidden(), names = group().policies.map(look => look.name), front = strong();
  const all = [["Show all", []], ["Hide all", names], ["Pareto front", names.filter((_, index) => !front.has(index))]].map(([words, gone]) => {
    const button = tag("button", "all", words);
    button.addEventListener("click", () => State.set("off", gone.join("~")));
    return button;
  });
  const chips = group().policies.map(look => {
    const button = tag("button", "", signOf(look), look.name);
    button.setAttribute("aria-pressed", String(!off.has(look.name)));
    button.addEventListener("click", () => toggle(look.name));
    return button;
  });
  for (const one of [...all, ...chips]) one.type = "button";
  at("chips").replaceChildren(...all, ...chips);
  at("chips").hidden = names.length < 2;
};
// A hidden policy's rows and columns go from every table of the page.
const hideEverywhere = () => {
  const off = hidden(), every = new Set(data.flatMap(one => one.policies.map(look => look.name)));
  for (const table of document.querySelectorAll("main table:not(.places)")) {
    const heads = table.tHead ? [...table.tHead.rows].at(-1).cells : [];
    const gone = new Set([...heads].flatMap((head, index) => { const name = head.dataset.policy || head.firstChild && head.firstChild.textContent; return index && every.has(name) && off.has(name) ? [index] : []; }));
    if (!gone.size && !table.dataset.cut && !off.size) continue;
    table.dataset.cut = gone.size ? "yes" : "";
    for (const row of [...(table.tHead ? [[...table.tHead.rows].at(-1)] : []), ...(table.tBodies[0] ? table.tBodies[0].rows : [])]) {
      [...row.cells].forEach((one, index) => { one.classList.toggle("off-column", gone.has(index)); });
      const name = row.cells[0] && row.cells[0].dataset.v;
      if (name && every.has(name)) row.classList.toggle("off-row", off.has(name));
    }
  }
};

const fill = (select, entries, wanted) => {
  select.replaceChildren(...entries.map(([value, words]) => new Option(words, value)));
  if (entries.some(([value]) => String(value) === String(wanted))) select.value = wanted;
  select.parentNode.hidden = entries.length < 2;
};
const figures = [];
const refresh = () => {
  const titles = data.map(one => one.title);
  fill(pick.group, titles.map((title, index) => [index, title]), Math.max(0, titles.indexOf(State.get("group"))));
  fill(pick.budget, group().budgets.map(one => [one, one]), State.get("budget") || group().asked);
  if (!pick.budget.value || State.get("budget") && !group().budgets.includes(State.get("budget"))) pick.budget.value = group().asked;
  fill(pick.measure, group().ranked.map(name => [name, known(name).label]), State.get("measure"));
  fill(pick.cost, group().costs.map(name => [name, known(name).label]), State.get("cost"));
  for (const box of document.querySelectorAll(".board-group")) {
    box.hidden = box.dataset.group !== pick.group.value;
    for (const one of box.querySelectorAll(".headline")) one.hidden = one.dataset.budget !== budget();
    if (!box.hidden) drawBoard(box.querySelector(".board"));
  }
  drawChips();
  hideEverywhere();
  for (const redraw of figures) redraw();
};
const KINDS = {
  pareto: [pareto, "Bars are 95 % intervals. The grey line is the Pareto front: no other cell costs less and is better; its marks are larger. Pale marks: noisy times, or policies off the front where there are many."],
  quality: [quality, "Bands are 95 % intervals; dashed: the full cache."],
  lost: [lost, "A column is a sample. Click a mark to read the answer; drag across columns to keep only those samples below."],
  costs: [costs, "Lines are 95 % intervals; dashed: the full cache. Choose the cost above."],
  memory: [memory, () => [...[["weights", "weights"], ["activations", "activations without a cache"], ["kv", "keys and values at the end"], ["rest", "all else of the measured peak (mark)"]].flatMap(([kind, words]) => [make("svg", { class: "chart-key", viewBox: "0 0 11 11", "aria-hidden": "true" }, make("rect", { width: 11, height: 11, class: `part ${kind}` })), words])]],
  entries: [entries, "Mean over layers and the rows that are still answering."],
  rates: [rates, "Lines through marks are 95 % intervals. The last mark of a policy may be the most prompts that fit."],
  fit: [fit, "The most prompts that fit into the memory that was given; dashed: the full cache."],
  safe: [safe, "The line reaches from where the true smallest budget may lie. Below: what was looked at (full disc: safe, open: undecided, triangle: worse, cross: failed)."],
};
const brush = spots => {
  const places = spots.map(spot => spot.place);
  Samples.keep([...new Set(spots.map(spot => spot.sample))]);
  State.set("brush", `${Math.min(...places)}-${Math.max(...places)}`);
};
const setUp = () => {
  form.hidden = false;
  for (const [name, select] of Object.entries(pick)) select.addEventListener("change", () =>
    State.set(name, name === "group" ? data[select.value].title : select.value));
  form.addEventListener("submit", event => event.preventDefault());
  for (const figure of document.querySelectorAll("[data-figure]")) {
    const name = figure.dataset.figure, [spec, caption] = KINDS[name];
    figures.push(Charts.mount(figure, { name, title: name, caption, spec: () => figure.closest(".board-group") && figure.closest(".board-group").hidden ? null : spec(Number(figure.dataset.number || 0)),
      open: openCell, ...(name === "lost" ? { brush } : {}) }));
  }
  State.listen(["group", "budget", "measure", "cost", "off", "places"], refresh);
  document.addEventListener("table-drawn", hideEverywhere);
  refresh();
  const part = /^(\d+)-(\d+)$/.exec(State.get("brush") || "");
  if (part && group().lost) Samples.keep(group().lost.samples.slice(Number(part[1]), Number(part[2]) + 1));
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    for (const redraw of figures) redraw();
  });
};
setUp();
})();
