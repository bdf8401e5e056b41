"use strict";
const make = (name, attributes, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes || {})) if (key !== "at") made.setAttribute(key, value);
  made.append(...children);
  return made;
};
const tag = (name, kind, ...children) => {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
};
// What stands in the page for its scripts, where nothing is said twice: `safe_json` of markup.py.
const unpacked = text => {
  const { data, lists, shapes, texts } = JSON.parse(text);
  const whole = one => {
    if (typeof one === "string") return one[0] === "!" ? lists[parseInt(one.slice(1), 36)] : texts[parseInt(one, 36)];
    if (Array.isArray(one)) return one.map(whole);
    if (one === null || typeof one !== "object") return one;
    const [shape] = Object.keys(one), names = shapes[parseInt(shape, 36)], values = one[shape], made = {};
    for (let at = 0; at < names.length; at++) made[names[at]] = whole(values[at]);
    return made;
  };
  lists.forEach((list, place) => { lists[place] = list.map(whole); });
  return whole(data);
};
const readings = {};
const embedded = id => readings[id] = readings[id] || unpacked(document.getElementById(id).textContent);
// What is chosen stands in the address behind the hash, so that a link shows the same page: #budget=...&sample=KEY/ID
const State = (() => {
  const decoded = words => { try { return decodeURIComponent(words); } catch { return words; } };
  const read = () => new Map(location.hash.includes("=") ? location.hash.slice(1).split("&").map(part => {
    const at = part.indexOf("=");
    return [part.slice(0, at), decoded(part.slice(at + 1))];
  }) : []);
  let values = read();
  const listeners = [];
  const tell = (names, linked) => { for (const [wanted, act] of listeners) if (wanted.some(name => names.includes(name))) act(linked); };
  const set = (name, value) => {
    if ((values.get(name) || "") === String(value)) return;
    if (value === "") values.delete(name); else values.set(name, String(value));
    const parts = [...values].map(([one, words]) => `${one}=${encodeURIComponent(words).replace("%2F", "/")}`);
    history.replaceState(null, "", `#${parts.join("&")}`);
    tell([name], false);
  };
  addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return;  // a link to a section changes nothing else
    const before = values;
    values = read();
    tell([...new Set([...before.keys(), ...values.keys()])].filter(name => before.get(name) !== values.get(name) || name === "sample"), true);
  });
  return { get: name => values.get(name), set, listen: (names, act) => listeners.push([names, act]) };
})();
const root = document.documentElement, themes = document.getElementById("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches;
const nameTheme = () => { themes.textContent = isDark() ? "Light colours" : "Dark colours"; };
themes.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("kvbench-theme", root.dataset.theme); } catch { /* a page may have no storage */ }
  nameTheme();
});
systemDark.addEventListener("change", nameTheme);
try {
  const stored = localStorage.getItem("kvbench-theme");
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;
} catch { /* a page may have no storage */ }
nameTheme();
themes.hidden = false;

const names = new Intl.Collator("en", { numeric: true });  // item 2 before item 10
// A click on a head sorts; what was chosen stands in the address where `remember` keeps it.
const sorts = (button, remember) => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const sort = up => {
    const column = [...head.parentNode.children].indexOf(head);
    for (const other of head.parentNode.children) if (other.hasAttribute("aria-sort")) other.ariaSort = "none";
    head.ariaSort = up ? "ascending" : "descending";
    const numeric = head.dataset.kind === "number";
    const value = row => {  // what a cell shows, where it does not sort by something else
      const { firstChild, dataset } = row.children[column], shown = firstChild ? firstChild.textContent.replace("\u2212", "-") : "";
      return dataset.v ?? (numeric && (shown === "" || !Number.isFinite(Number(shown))) ? "" : shown);
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (up ? 1 : -1) * (numeric ? x - y : names.compare(x, y));
    });
    body.append(...rows);
  };
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    sort(up);
    remember(up);
  });
  return sort;
};
for (const [number, button] of [...document.querySelectorAll("th[aria-sort] button")].entries()) {
  const sort = sorts(button, up => State.set("sort", `${number}${up ? "" : "-"}`));
  const linked = () => { const part = /^(\d+)(-?)$/.exec(State.get("sort") || ""); if (part && Number(part[1]) === number) sort(!part[2]); };
  State.listen(["sort"], by => { if (by) linked(); });
  linked();
}
// A large table is made once a reader comes near it.
const drawTable = place => {
  const { caption, classes, group, heads, rows, samples } = unpacked(place.querySelector("script").textContent);
  const small = words => words ? [tag("small", "", words)] : [], head = tag("tr", ""), above = tag("tr", "");
  for (const [label, note = "", cell = "", kind = "", over = ""] of heads) {
    const last = above.lastChild;
    if (last && last.textContent === over) last.colSpan++;
    else above.append(tag(over ? "th" : "td", over ? "over" : "", over));
    const one = tag("th", kind === "number" ? "" : "name");
    one.scope = "col";
    if (cell) one.dataset.cell = cell;
    if (kind === "none") one.append(label);
    else {
      const button = tag("button", "", label);
      button.type = "button";
      one.ariaSort = "none";
      one.setAttribute("aria-sort", "none");
      one.dataset.kind = kind === "text" ? "text" : "number";
      one.append(button);
    }
    one.append(...small(note));
    head.append(one);
  }
  const body = tag("tbody", ""), table = tag("table", classes, tag("caption", "", caption), tag("thead", "", ...(above.textContent ? [above] : []), head), body);
  for (const one of above.querySelectorAll("th")) one.scope = "colgroup";
  if (group) table.dataset.group = group;
  for (const [number, cells] of rows.entries()) {
    const row = tag("tr", "");
    if (samples[number]) row.dataset.sample = samples[number];
    for (const [words = "", below = "", kind = "", title = "", order = "", role = ""] of cells) {
      const one = tag(role === "head" ? "th" : "td", role === "head" ? "name" : kind);
      if (role === "head") { one.scope = "row"; one.dataset.v = words; }
      if (order) one.dataset.v = order;
      if (title) one.title = title;
      if (role === "link") { const link = tag("a", "", words); link.href = "#samples"; one.append(link); } else one.append(words);
      one.append(...small(below));
      row.append(one);
    }
    body.append(row);
  }
  place.replaceWith(table);
  for (const button of table.querySelectorAll("thead button")) sorts(button, () => {});
  document.dispatchEvent(new Event("table-drawn"));
};
const nearby = new IntersectionObserver(seen => { for (const one of seen) if (one.isIntersecting) { nearby.unobserve(one.target); drawTable(one.target); } },
  { rootMargin: "800px" });
for (const place of document.querySelectorAll(".later")) nearby.observe(place);
const filters = document.getElementById("filters");
if (filters) {
  const rows = [...document.getElementById("verdict-table").tBodies[0].rows];
  const texts = rows.map(row => row.textContent.toLowerCase());
  const selects = [...filters.querySelectorAll("select")], typed = document.getElementById("filter-text");
  const count = document.getElementById("filter-count");
  const choose = () => {
    const words = typed.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, index) => {
      const fits = selects.every(one => !one.value || row.dataset[one.dataset.field] === one.value) &&
        words.every(word => texts[index].includes(word));
      row.hidden = !fits;
      shown += fits;
    });
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  const remember = () => State.set("rows", [...selects.map(one => one.value), typed.value].join("~").replace(/^~+$/, ""));
  filters.addEventListener("input", () => { choose(); remember(); });
  filters.addEventListener("submit", event => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(() => { choose(); remember(); }));
  const linked = State.get("rows");
  filters.reset();
  (linked || "").split("~").forEach((value, index) => { if (index < selects.length) selects[index].value = value; else typed.value = value; });
  filters.hidden = false;
  choose();
}
