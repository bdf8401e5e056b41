// Figures drawn in the page: axes, marks and lines as SVG with real text, read by pointer, finger and arrow keys, saved
// as SVG, PNG or CSV. What a figure shows is plain data; `board.js` makes it from the records.
const Charts = (() => {
const PAD = { left: 58, right: 16, top: 12, bottom: 44 }, NEAR = 26, LETTER = 6.4;
const many = 8;  // more policies than these are pale unless they stand on the front

const nice = (low, high, count) => {
  const span = high - low || Math.abs(high) || 1, raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(one => one * power >= raw) * power, found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
};
const logTicks = (low, high) => {
  const found = [], steps = high / low > 200 ? [1] : high / low > 12 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
    for (const step of steps) if (step * power >= low && step * power <= high) found.push(step * power);
  return found;
};
const plain = value => Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }).replace("-", "\u2212");
// From data to pixels: `log` where values differ by factors, room at both ends so that no mark is cut by an axis.
const scaleOf = ({ low, high, log, ticks, within }, from, to) => {
  if (low === high) { low -= Math.abs(low) * .1 || 1; high += Math.abs(high) * .1 || 1; if (log) low = high / 1.5; }
  const by = log ? Math.log : one => one, span = by(high) - by(low), a = by(low) - span * .05, b = by(high) + span * .05;
  const place = value => from + (by(value) - a) / (b - a) * (to - from);
  const back = pixel => { const one = a + (pixel - from) / (to - from) * (b - a); return log ? Math.exp(one) : one; };
  const ends = [back(from), back(to)].sort((x, y) => x - y), room = Math.abs(to - from);
  const found = ticks || (log ? logTicks(...ends) : nice(...ends, Math.max(2, room / 70))).map(value => [value, plain(value)]);
  const shown = found.filter(([value]) => value >= ends[0] && value <= ends[1] && !(within && (value < within[0] || value > within[1] + 1e-9)));
  return { place, ticks: shown };
};
const marker = (look, size, attributes) => {
  const hollow = look.fill === "none", colour = `var(--plot-${look.colour})`;
  return make("path", { d: look.outline, ...attributes,
    style: `fill: ${hollow ? "var(--plot-paper)" : colour}; fill-opacity: ${["full", "none"].includes(look.fill) ? 1 : .45}; ` +
      `stroke: ${colour}; stroke-width: ${(hollow ? 1.8 : 1) / size}`,
    transform: `${attributes && attributes.at ? `translate(${attributes.at[0].toFixed(1)} ${attributes.at[1].toFixed(1)}) ` : ""}scale(${size})` });
};
const text = (x, y, words, kind, anchor) => make("text", { x: x.toFixed(1), y: y.toFixed(1), class: kind || "", "text-anchor": anchor || "start" }, words);
const line = (x1, y1, x2, y2, attributes) => make("line", { x1: x1.toFixed(1), y1: y1.toFixed(1), x2: x2.toFixed(1), y2: y2.toFixed(1), ...attributes });
const path = (points, attributes) => make("path", { d: "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L"), fill: "none", ...attributes });

// The first free place for a name beside its mark; none where all are taken, so that no name is struck through.
const placeName = (words, x, y, taken, frame, lines) => {
  const width = words.length * 7 + 6, height = 15;
  for (const far of [9, 18, 30]) for (const [dx, dy] of [[1, 0], [0, -1], [-1, 0], [0, 1], [.8, -.8], [.8, .8], [-.8, -.8], [-.8, .8]]) {
    const left = x + dx * far + (dx > .1 ? 0 : dx < -.1 ? -width : -width / 2), top = y + dy * far - height / 2 + (Math.abs(dx) < .1 ? dy * 4 : 0);
    const box = [left, top, left + width, top + height];
    if (box[0] < frame[0] || box[1] < frame[1] || box[2] > frame[2] || box[3] > frame[3]) continue;
    if ([...taken, ...lines].some(one => box[0] < one[2] && one[0] < box[2] && box[1] < one[3] && one[1] < box[3])) continue;
    taken.push(box);
    return [left + 2, top + 11.5];
  }
  return null;
};

const draw = (figure, spec, width) => {
  const rows = spec.rows, left = rows ? Math.min(width * .42, Math.max(...rows.map(one => one.length)) * LETTER + 18) : PAD.left;
  const height = rows ? rows.length * 22 + PAD.top + PAD.bottom : spec.height || Math.min(420, Math.max(280, width * .62));
  const frame = [left, PAD.top, width - PAD.right, height - PAD.bottom];
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, class: "chart", role: "img", tabindex: 0, "aria-label": spec.alt });
  const x = scaleOf(spec.x, frame[0], frame[2]);
  const y = rows ? { place: row => frame[1] + row * 22 + 11, ticks: [] } : scaleOf(spec.y, frame[3], frame[1]);
  const grid = make("g", { class: "grid" }), names = make("g", { class: "names" }), back = make("g"), front = make("g");
  let last = -99;
  for (const [value, words] of x.ticks) {
    const at = x.place(value), half = words.length * LETTER / 2;
    grid.append(line(at, frame[1], at, frame[3], {}));
    if (at - half > last) { grid.append(text(at, frame[3] + 16, words, "tick", "middle")); last = at + half + 6; }
  }
  for (const [value, words] of y.ticks) {
    grid.append(line(frame[0], y.place(value), frame[2], y.place(value), {}), text(frame[0] - 7, y.place(value) + 4, words, "tick", "end"));
  }
  if (rows) rows.forEach((words, row) => grid.append(text(frame[0] - 10, y.place(row) + 4, words.length * LETTER > left - 14 ? `${words.slice(0, Math.floor((left - 20) / LETTER))}\u2026` : words, "tick ink", "end")));
  grid.append(text((frame[0] + frame[2]) / 2, height - 8, spec.x.label, "axis", "middle"));
  if (!rows) grid.append(make("text", { transform: `translate(13 ${(frame[1] + frame[3]) / 2}) rotate(-90)`, class: "axis", "text-anchor": "middle" }, spec.y.label));
  for (const one of spec.lines || []) {  // level or upright, such as the full cache's number
    const [at, upright] = one.x === undefined ? [y.place(one.y), false] : [x.place(one.x), true];
    back.append(upright ? line(at, frame[1], at, frame[3], { class: "reference" }) : line(frame[0], at, frame[2], at, { class: "reference" }));
  }
  for (const one of spec.bars || []) {
    const [a, b] = [x.place(one.from), x.place(one.to)];
    back.append(make("rect", { x: a.toFixed(1), y: (y.place(one.row) - 7).toFixed(1), width: Math.max(0, b - a).toFixed(1), height: 14, class: `part ${one.kind}` }));
  }
  const taken = [], spots = [], crossed = [];  // marks, and places that lines go through
  const cross = (x1, y1, x2, y2) => {
    const steps = Math.ceil(Math.hypot(x2 - x1, y2 - y1) / 8) || 1;
    for (let k = 0; k <= steps; k++) { const a = x1 + (x2 - x1) * k / steps, b = y1 + (y2 - y1) * k / steps; crossed.push([a - 1, b - 1, a + 1, b + 1]); }
  };
  for (const one of spec.series) {
    const mine = make("g", { "data-p": one.policy, class: one.pale ? "pale" : "" }), colour = `var(--plot-${one.look.colour})`;
    const at = one.points.map(point => ({ ...point, px: x.place(point.x), py: y.place(point.y), policy: one.policy }));
    if (one.band && at.length > 1) {
      const edge = [...at.map(point => [point.px, y.place(point.high)]), ...at.slice().reverse().map(point => [point.px, y.place(point.low)])];
      back.append(make("path", { d: "M" + edge.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L") + "Z", "data-p": one.policy, class: `band ${one.pale ? "pale" : ""}`, style: `fill: ${colour}` }));
    }
    if (one.joined && at.length > 1) mine.append(path(at.map(point => [point.px, point.py]), { style: `stroke: ${colour}`, "stroke-dasharray": one.look.dash, class: "joined" }));
    if (one.joined) at.slice(1).forEach((point, index) => cross(at[index].px, at[index].py, point.px, point.py));
    for (const point of at) {
      if (point.low !== undefined && !rows && !one.band) cross(point.px, y.place(point.low), point.px, y.place(point.high));
      if (point.left !== undefined) cross(x.place(point.left), point.py, x.place(point.right), point.py);
      if (!one.band || at.length < 2) {
        if (point.low !== undefined && !rows) mine.append(line(point.px, y.place(point.low), point.px, y.place(point.high), { style: `stroke: ${colour}`, class: "interval" }));
        const [from, to] = rows ? [point.low, point.high] : [point.left, point.right];
        if (from !== undefined) mine.append(line(x.place(from), point.py, x.place(to), point.py, { style: `stroke: ${colour}`, class: "interval" }));
      }
      if (point.failed) mine.append(make("path", { d: "M-5-5L5 5M-5 5L5-5", transform: `translate(${point.px.toFixed(1)} ${point.py.toFixed(1)})`, class: "broken" }));
      else if (!one.bare) mine.append(marker(one.look, point.big ? 12 : one.size || 9, { at: [point.px, point.py], class: `mark${point.noisy ? " noisy-mark" : ""}` }));
      taken.push([point.px - 6, point.py - 6, point.px + 6, point.py + 6]);
      spots.push(point);
    }
    front.append(mine);
  }
  if (spec.front && spec.front.length > 1) {
    const steps = spec.front.flatMap(([a, b], index) => index ? [[x.place(a), y.place(spec.front[index - 1][1])], [x.place(a), y.place(b)]] : [[x.place(a), y.place(b)]]);
    back.append(path(steps, { class: "front" }));
    steps.slice(1).forEach(([a, b], index) => cross(...steps[index], a, b));
  }
  for (const [words, dataX, dataY, policy, pale] of spec.names || []) {
    const around = [words, x.place(dataX), y.place(dataY), taken, [frame[0], 0, width, frame[3]]];
    const place = placeName(...around, crossed) || placeName(...around, []);
    if (place) names.append(make("text", { x: place[0].toFixed(1), y: place[1].toFixed(1), class: `name${pale ? " pale" : ""}`, "data-p": policy }, words));
  }
  svg.append(grid, back, front, names);
  return { svg, spots, frame, x, y };
};

const saved = (name, blob) => {
  const link = tag("a", "");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
// The drawing alone has no style sheet, so what it looks like now is written into it.
const alone = svg => {
  const copy = svg.cloneNode(true), theirs = [svg, ...svg.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((one, index) => {
    const style = getComputedStyle(theirs[index]);
    const kept = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-family", "font-weight", "paint-order"];
    one.setAttribute("style", kept.map(name => `${name}:${style.getPropertyValue(name)}`).join(";"));
    one.removeAttribute("class");
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  const paper = make("rect", { width: "100%", height: "100%" });
  paper.style.fill = getComputedStyle(svg).getPropertyValue("--plot-paper");
  copy.prepend(paper);
  return new XMLSerializer().serializeToString(copy);
};
const asPng = (svg, done) => {
  const image = new Image(), canvas = document.createElement("canvas");
  const { width, height } = svg.viewBox.baseVal;
  image.addEventListener("load", () => {
    canvas.width = 2 * width; canvas.height = 2 * height;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob(done, "image/png");
  });
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(alone(svg))}`;
};
const quoted = value => /[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? "");

// Puts a figure into its element; `open` is what Enter or a click on a mark does, `brush` what a drag across does.
const mount = (figure, { name, title, caption, spec, open, brush }) => {
  const box = tag("div", "chart-box"), tip = tag("output", "chart-tip"), tools = tag("div", "chart-tools");
  const heading = tag("h3", "chart-title", title);
  tip.setAttribute("aria-live", "polite");
  for (const [kind, act] of [["SVG", () => saved(`${name}.svg`, new Blob([alone(now.svg)], { type: "image/svg+xml" }))],
    ["PNG", () => asPng(now.svg, blob => saved(`${name}.png`, blob))],
    ["CSV", () => saved(`${name}.csv`, new Blob([now.spec.table.map(row => row.map(quoted).join(",")).join("\n") + "\n"], { type: "text/csv" }))]]) {
    const button = tag("button", "", kind);
    button.type = "button";
    button.setAttribute("aria-label", `Save ${title} as ${kind}`);
    button.addEventListener("click", act);
    tools.append(button);
  }
  figure.replaceChildren(tag("div", "chart-head", heading, tools), box, tip, tag("figcaption", "", ...(typeof caption === "function" ? caption() : [caption])));
  let now = null, at = -1, start = null;
  const light = point => {
    now.svg.classList.toggle("has-lit", Boolean(point));
    for (const one of now.svg.querySelectorAll("[data-p]")) one.classList.toggle("lit", Boolean(point) && Number(one.dataset.p) === point.policy);
    tip.textContent = point ? point.says : "";
    now.ring.setAttribute("transform", point ? `translate(${point.px} ${point.py})` : "translate(-99 -99)");
  };
  const place = event => {
    const frame = now.svg.getBoundingClientRect(), { width } = now.svg.viewBox.baseVal;
    return [(event.clientX - frame.x) / frame.width * width, (event.clientY - frame.y) / frame.width * width];
  };
  const nearest = event => {
    const [px, py] = place(event);
    let found = -1, best = NEAR;
    now.spots.forEach((spot, index) => { const far = Math.hypot(spot.px - px, spot.py - py); if (far < best) { best = far; found = index; } });
    return found;
  };
  const redraw = () => {
    const made = spec();
    figure.hidden = !made;
    if (!made) return;
    const width = Math.max(300, Math.floor(figure.clientWidth || 640));
    now = { ...draw(figure, made, width), spec: made };
    now.ring = make("circle", { r: 9, class: "ring", transform: "translate(-99 -99)" });
    now.svg.append(now.ring);
    heading.textContent = made.title || title;
    box.replaceChildren(now.svg);
    at = -1;
    tip.textContent = "";
    const { svg } = now;
    svg.addEventListener("pointermove", event => { if (!start) { at = nearest(event); light(now.spots[at]); } });
    svg.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") { at = -1; light(null); } });
    svg.addEventListener("keydown", event => {
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (by) { at = (at + by + now.spots.length) % now.spots.length; light(now.spots[at]); }
      else if (event.key === "Enter" && now.spots[at]) open(now.spots[at]);
      else if (event.key === "Escape") { at = -1; light(null); }
      else return;
      event.preventDefault();
    });
    const band = make("rect", { class: "brush", y: now.frame[1], height: now.frame[3] - now.frame[1], width: 0 });
    svg.addEventListener("pointerdown", event => { start = brush && event.pointerType !== "touch" ? place(event) : null; if (start) { svg.append(band); band.setAttribute("width", 0); } });
    svg.addEventListener("pointermove", event => {
      if (!start) return;
      const [from, to] = [start[0], place(event)[0]].sort((a, b) => a - b);
      band.setAttribute("x", from); band.setAttribute("width", to - from);
    });
    svg.addEventListener("pointerup", event => {
      const end = place(event)[0], wide = start && Math.abs(end - start[0]) > 8, from = start && start[0];
      start = null;
      band.remove();
      if (wide) {
        const inside = now.spots.filter(spot => spot.px >= Math.min(from, end) && spot.px <= Math.max(from, end));
        if (inside.length) brush(inside);
        return;
      }
      at = nearest(event);
      light(now.spots[at]);
      if (now.spots[at]) open(now.spots[at]);
    });
  };
  return redraw;
};
return { mount, marker, many };
})();
