"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, edges, tokens } = data;
const SVG = "http://www.w3.org/2000/svg";
const by = (id) => document.getElementById(id);
const inputs = nodes.map(() => []), outputs = nodes.map(() => []);
for (const [source, target, weight] of edges) {
  inputs[target].push([source, weight]);
  outputs[source].push([target, weight]);
}
for (const list of [...inputs, ...outputs]) list.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
const supers = nodes.map(() => []);
for (const [name, members] of Object.entries(data.supernodes)) for (const i of members) supers[i].push(name);

let held = nodes.findIndex((node) => node.kind === "target"), over = -1, showAll = false;
const pinned = new Set();

function make(name, attributes = {}, text = null, svg = false) {
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}
const draw = (name, attributes, text = null) => make(name, attributes, text, true);
const visible = (token) => token.replace(/\n/g, "⏎").replace(/ /g, "·");
const number = (x) => (Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 0.001) ? x.toExponential(1) : String(Number(x.toPrecision(3))));
const promotes = (i) => (data.features[String(i)]?.promoted ?? []).slice(0, 2).map(([token]) => visible(token)).join(" ");
const called = (i) => nodes[i].name || nodes[i].label + (promotes(i) && ` (${promotes(i)})`);
const said = (i) => (nodes[i].kind === "embed" ? `${nodes[i].label} ${visible(tokens[nodes[i].position] ?? "")}` : called(i));

// Where everything stands: a row for each layer, targets on top, a column for each token and one for what has none.
const rows = data.layers + 2, gap = 15, least = 46;
const row = (node) => (node.kind === "target" ? 0 : node.layer < 0 ? rows - 1 : data.layers - node.layer);
const cells = new Map();
nodes.forEach((node, i) => {
  const key = `${row(node)},${node.position}`;
  if (!cells.has(key)) cells.set(key, []);
  cells.get(key).push(i);
});
const wide = (position) => Math.max(1, ...Array.from({ length: rows }, (_, r) => Math.min(6, (cells.get(`${r},${position}`) ?? []).length)));
const high = (r) => Math.max(1, ...[-1, ...tokens.keys()].map((p) => Math.ceil((cells.get(`${r},${p}`) ?? []).length / 6)));
const columns = [], lines = [];
let x = 74;
for (const position of [...tokens.keys(), -1]) {
  const text = position < 0 ? "constants" : visible(tokens[position]);
  const width = Math.max(least, wide(position) * gap + 14, Math.min(120, text.length * 7.4 + 14));
  columns[position] = { left: x, width, text };
  x += width;
}
let y = 10;
for (let r = 0; r < rows; r += 1) {
  const height = high(r) * gap + 26;
  lines.push({ top: y, height });
  y += height;
}
const place = nodes.map(() => null);
for (const [key, members] of cells) {
  const [r, position] = key.split(",").map(Number);
  members.sort((a, b) => nodes[b].influence - nodes[a].influence);
  members.forEach((i, n) => {
    const inRow = Math.min(6, members.length - 6 * Math.floor(n / 6));
    const column = columns[position];
    place[i] = [column.left + column.width / 2 + ((n % 6) - (inRow - 1) / 2) * gap, lines[r].top + 20 + Math.floor(n / 6) * gap];
  });
}
const svg = draw("svg", { width: x + 10, height: y + 34, viewBox: `0 0 ${x + 10} ${y + 34}`, role: "img", "aria-label": "graph of layers by tokens" });
lines.forEach((line, r) => {
  if (r % 2) svg.append(draw("rect", { class: "stripe", x: 0, y: line.top, width: x + 10, height: line.height }));
  const text = r === 0 ? "targets" : r === rows - 1 ? "tokens" : `layer ${data.layers - r}`;
  svg.append(draw("text", { class: "layer", x: 8, y: line.top + 24 }, text));
});
for (const column of Object.values(columns)) {
  const text = column.text.length > 16 ? `${column.text.slice(0, 15)}…` : column.text;
  svg.append(draw("text", { x: column.left + column.width / 2, y: y + 20, "text-anchor": "middle" }, text));
}
const edgeLayer = draw("g", {}), nodeLayer = draw("g", {});
svg.append(edgeLayer, nodeLayer);
by("frame").append(svg);

const marks = nodes.map((node, i) => {
  const [cx, cy] = place[i], size = 3 + 4 * Math.sqrt(Math.min(1, node.influence));
  const mark = node.kind === "head"
    ? draw("rect", { x: cx - size, y: cy - size, width: 2 * size, height: 2 * size, rx: 1.5 })
    : draw("circle", { cx, cy, r: size });
  mark.setAttribute("tabindex", "0");
  mark.append(draw("title", {}, said(i)));
  mark.addEventListener("mouseenter", () => { over = i; show(); });
  mark.addEventListener("mouseleave", () => { over = -1; show(); });
  mark.addEventListener("click", () => { held = i; show(); });
  mark.addEventListener("dblclick", () => { pinned.has(i) ? pinned.delete(i) : pinned.add(i); show(); });
  mark.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); held = i; show(); }
  });
  nodeLayer.append(mark);
  return mark;
});

const scale = Math.max(...inputs.flatMap((list, i) => (nodes[i].kind === "target" ? list.map((e) => Math.abs(e[1])) : [])), 1e-12);
const threshold = () => scale * 10 ** ((by("least").valueAsNumber - 100) / 25) * (by("least").valueAsNumber > 0);

function drawEdges(centre) {
  edgeLayer.replaceChildren();
  const limit = threshold();
  by("least-says").textContent = number(limit);
  const chosen = new Set([centre, ...pinned]);
  for (const [source, target, weight] of edges) {
    const mine = chosen.has(source) || chosen.has(target);
    if ((!showAll && !mine) || Math.abs(weight) < limit) continue;
    const [x0, y0] = place[source], [x1, y1] = place[target], middle = (y0 + y1) / 2;
    edgeLayer.append(draw("path", {
      class: weight < 0 ? "edge down" : "edge",
      d: `M${x0},${y0}C${x0},${middle} ${x1},${middle} ${x1},${y1}`,
      "stroke-width": Math.max(0.6, Math.min(7, 5 * Math.sqrt(Math.abs(weight) / scale))),
      "stroke-opacity": mine ? 0.75 : 0.16,
    }));
  }
}

function pair(i, weight, after = "") {
  const button = make("button", { class: "pair", type: "button", title: said(i) });
  button.append(make("span", { class: "what" }, said(i) + after));
  button.append(make("span", { class: `number ${weight < 0 ? "minus" : "plus"}` }, number(weight)));
  button.addEventListener("click", () => { held = i; show(); marks[i].focus({ preventScroll: true }); });
  return button;
}

function listed(panel, title, list, rest = 0) {
  panel.append(make("h2", {}, `${title} (${list.length})`));
  for (const [i, weight] of list.slice(0, 14)) panel.append(pair(i, weight));
  const other = list.slice(14).reduce((sum, [, weight]) => sum + weight, 0);
  if (list.length > 14) panel.append(make("p", { class: "soft" }, `${list.length - 14} more, ${number(other)} in total`));
  if (rest) panel.append(make("p", { class: "soft" }, `from nodes outside this graph: ${number(rest)}`));
  if (!list.length) panel.append(make("p", { class: "soft" }, "none here"));
}

let shown = null;
function drawPanel(i) {
  if (shown === i) return;
  shown = i;
  const panel = by("panel"), node = nodes[i];
  panel.replaceChildren(make("h2", {}, said(i)));
  const facts = make("dl", { class: "facts" });
  const known = [["kind", node.kind], ["influence", number(node.influence)]];
  if (["target", "feature", "head"].includes(node.kind)) known.push(["value", number(node.value)]);
  if (node.kind === "feature") known.push(["activation", number(node.activation)]);
  if (node.position >= 0) known.push(["token", visible(tokens[node.position] ?? "")]);
  if (supers[i].length) known.push(["part of", supers[i].join(", ")]);
  for (const [what, value] of known) {
    const entry = make("div");
    entry.append(make("dt", {}, what), make("dd", {}, value));
    facts.append(entry);
  }
  panel.append(facts);
  if (node.kind !== "target") {
    const label = make("label");
    const name = make("input", { id: "name", value: node.name, placeholder: "your name for it", autocomplete: "off" });
    name.addEventListener("input", () => { node.name = name.value; drawPaths(); marks[i].querySelector("title").textContent = said(i); });
    label.append(make("span", {}, "name"), name);
    panel.append(label, make("p"));
  }
  if (["target", "feature", "head"].includes(node.kind)) listed(panel, "receives from", inputs[i], node.rest);
  if (node.kind !== "target") listed(panel, "contributes to", outputs[i]);
  const about = data.features[String(i)];
  for (const which of ["promoted", "suppressed"]) {
    if (!about || !about[which]) continue;
    panel.append(make("h2", {}, `${which} tokens`));
    const line = make("p");
    for (const [token] of about[which]) line.append(make("span", { class: "token" }, visible(token)), " ");
    panel.append(line);
  }
  if (about && about.contexts.length) {
    panel.append(make("h2", {}, "most active on"));
    const most = Math.max(...about.contexts.flat().map(([, value]) => value), 1e-12);
    for (const context of about.contexts) {
      const line = make("p", { class: "context" });
      for (const [token, value] of context) {
        const word = make("span", { title: number(value) }, token);
        if (value > 0) word.setAttribute("style", `background: rgb(var(--heat) / ${(0.85 * value / most).toFixed(2)})`);
        line.append(word);
      }
      panel.append(line);
    }
  }
}

function drawPaths() {
  const list = by("paths");
  list.replaceChildren();
  data.paths.forEach((target) => {
    for (const [weight, places] of target.paths) {
      const item = make("li"), button = make("button", { class: "pair steps", type: "button" });
      button.append(make("span", { class: "what" }, places.map(said).join(" → ")));
      button.append(make("span", { class: `number ${weight < 0 ? "minus" : "plus"}` }, number(weight)));
      button.addEventListener("click", () => {
        pinned.clear();
        places.forEach((i) => pinned.add(i));
        held = places[0];
        show();
      });
      item.append(button);
      list.append(item);
    }
    list.append(make("li", { class: "soft" }, `all other paths: ${number(target.remainder)} of ${number(target.value)}`));
  });
}

function show() {
  const centre = over >= 0 ? over : held, wanted = by("search").value.toLowerCase();
  const near = new Set([centre, ...pinned]);
  if (centre >= 0) for (const [i] of [...inputs[centre], ...outputs[centre]]) near.add(i);
  marks.forEach((mark, i) => {
    const match = wanted ? said(i).toLowerCase().includes(wanted) || nodes[i].label.toLowerCase().includes(wanted) : near.has(i) || showAll;
    mark.setAttribute("class", `node ${nodes[i].kind}${match ? "" : " dim"}${i === held ? " on" : ""}${pinned.has(i) ? " pinned" : ""}`);
  });
  drawEdges(centre);
  if (centre >= 0) drawPanel(centre);
}

function save(name, type, text) {
  const link = make("a", { download: name, href: `data:${type};charset=utf-8,${encodeURIComponent(text)}` });
  link.click();
}
by("least").addEventListener("input", show);
by("search").addEventListener("input", show);
by("all").addEventListener("click", () => { showAll = !showAll; by("all").setAttribute("aria-pressed", String(showAll)); show(); });
by("clear").addEventListener("click", () => { pinned.clear(); show(); });
by("export").addEventListener("click", () => {
  const names = Object.fromEntries(nodes.map((node, i) => [i, node.name]).filter(([, name]) => name));
  save("labels.json", "application/json", JSON.stringify({ names, pinned: [...pinned] }, null, 1));
});
by("picture").addEventListener("click", () => {
  const copy = svg.cloneNode(true), style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  const rules = Array.from(document.styleSheets[0].cssRules).filter((rule) => rule.selectorText?.startsWith("svg"))
    .map((rule) => rule.cssText.replace(/var\((--[a-z]+)\)/g, (_, name) => value(name)).replace(/svg /g, "")).join("\n");
  copy.setAttribute("xmlns", SVG);
  copy.prepend(draw("style", {}, rules));
  save("circuit.svg", "image/svg+xml", new XMLSerializer().serializeToString(copy));
});
drawPaths();
show();
// Where the target stands outside of a narrow frame, begin there.
if (held >= 0 && place[held][0] > by("frame").clientWidth - 60) by("frame").scrollLeft = place[held][0] - by("frame").clientWidth / 2;
