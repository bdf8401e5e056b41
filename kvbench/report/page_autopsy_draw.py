"""The drawing half of the autopsy's script: pictures with patches, heat maps, token texts.

Texts enter the document as text nodes only. Nothing here knows what is chosen; `page_autopsy_script` does.
"""

DRAW = r"""
const SVG = "http://www.w3.org/2000/svg", NEVER = 65535;
const make = (name, attributes, ...children) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
};
const tag = (name, kind, ...children) => {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
};
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
    span.style.opacity = later ? "" : .4 + .6 * share;
  });
  return { box, spans, show };
};
"""
