// The graph: nodes are SVG, so that they can be focused and read out; edges are painted on two canvases as wide as the
// frame, one for what stays and one for what is looked at, so that looking around repaints few of them.

const view = { held: target, over: -1, all: false, wanted: "" };
const frame = by("frame"), stage = make("div", { id: "stage", style: `width:${size.width}px;height:${size.height}px` });
const below = make("canvas", { class: "edges" }), above = make("canvas", { class: "edges" });
const svg = draw("svg", { width: size.width, height: size.height, viewBox: `0 0 ${size.width} ${size.height}`, role: "group", "aria-label": "graph of layers by tokens" });
const names = make("div", { class: "layers" });
stage.append(below, above, svg, names);
frame.append(stage);
for (const line of lines) names.append(make("span", { style: `top:${line.top + 8}px` }, line.text));
for (const column of columns.values()) {
  const text = column.text.length > 16 ? `${column.text.slice(0, 15)}…` : column.text;
  const word = draw("text", { x: column.left + column.width / 2, y: bottom + 20, "text-anchor": "middle" }, text);
  word.append(draw("title", {}, column.text));
  svg.append(word);
}

const marks = nodes.map((node, i) => {
  const [cx, cy] = place[i], r = 3 + 4 * Math.sqrt(Math.min(1, node.influence));
  const mark = node.kind === "head"
    ? draw("rect", { x: cx - r, y: cy - r, width: 2 * r, height: 2 * r, rx: 1.5 })
    : draw("circle", { cx, cy, r });
  mark.dataset.node = i;
  mark.setAttribute("tabindex", i === target ? "0" : "-1");
  mark.setAttribute("role", "button");
  svg.append(mark);
  return mark;
});
const titles = marks.map((mark, i) => {
  const title = draw("title", {}, called(i));
  mark.append(title);
  return title;
});
const nodeAt = (event) => Number(event.target.closest?.("[data-node]")?.dataset.node ?? -1);

const threshold = () => scale * 10 ** ((by("least").valueAsNumber - 100) / 25) * (by("least").valueAsNumber > 0);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function clear(canvas) {
  const ratio = window.devicePixelRatio || 1, width = Math.min(size.width, frame.clientWidth);
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(size.height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(size.height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${size.height}px`;
    canvas.style.marginBottom = `-${size.height}px`;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, size.height);
  pen.translate(-frame.scrollLeft, 0);
  return pen;
}

// Paint edges [source, target, weight], those of one colour and width in one stroke.
function paint(pen, list, opacity) {
  const strokes = new Map();
  for (const [source, to, weight] of list) {
    const width = Math.max(0.6, Math.min(7, Math.round(10 * Math.sqrt(Math.abs(weight) / scale)) / 2));
    const key = `${weight < 0 ? "--down" : "--up"} ${width}`;
    if (!strokes.has(key)) strokes.set(key, new Path2D());
    const [x0, y0] = place[source], [x1, y1] = place[to], middle = (y0 + y1) / 2, path = strokes.get(key);
    path.moveTo(x0, y0);
    path.bezierCurveTo(x0, middle, x1, middle, x1, y1);
  }
  pen.globalAlpha = opacity;
  for (const [key, path] of strokes) {
    const [name, width] = key.split(" ");
    pen.strokeStyle = colour(name);
    pen.lineWidth = Number(width);
    pen.stroke(path);
  }
}

function paintBelow() {
  const pen = clear(below), limit = threshold();
  by("least-says").textContent = number(limit);
  pen.fillStyle = colour("--paper");
  lines.forEach((line, row) => { if (row % 2) pen.fillRect(0, line.top, size.width, line.height); });
  if (view.all) paint(pen, edges.filter(([, , weight]) => Math.abs(weight) >= limit), 0.16);
  const pins = [...work.pins];
  paint(pen, pins.flatMap((i) => edgesOf(i)).filter(([source, to]) => work.pins.has(source) && work.pins.has(to)), 0.75);
}

const edgesOf = (i) => (i < 0 ? [] : [...inputs[i].map(([j, weight]) => [j, i, weight]), ...outputs[i].map(([j, weight]) => [i, j, weight])]);

function paintAbove() {
  const limit = threshold();
  paint(clear(above), edgesOf(centre()).filter(([, , weight]) => Math.abs(weight) >= limit), 0.75);
}

const centre = () => (view.over >= 0 ? view.over : view.held);
let near = [];
function light() {
  for (const i of near) marks[i].classList.remove("near");
  const i = centre();
  near = view.wanted ? found : i < 0 ? [] : [i, ...inputs[i].map(([j]) => j), ...outputs[i].map(([j]) => j)];
  for (const j of near) marks[j].classList.add("near");
  svg.classList.toggle("dimmed", Boolean(view.wanted) || (i >= 0 && !view.all));
}

function mark() {
  marks.forEach((each, i) => {
    each.setAttribute("class", `node ${nodes[i].kind}${i === view.held ? " on" : ""}${work.pins.has(i) ? " pinned" : ""}${work.marked.has(i) ? " marked" : ""}${groupOf(i) ? " grouped" : ""}`);
    each.setAttribute("aria-label", called(i));
    each.setAttribute("aria-pressed", String(work.pins.has(i)));
    titles[i].textContent = called(i);
  });
  near = [];
}

let waiting = false;
function look(i) {
  if (view.over === i) return;
  view.over = i;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    light();
    paintAbove();
    if (centre() >= 0) drawPanel(centre());
  });
}
svg.addEventListener("pointerover", (event) => look(nodeAt(event)));
svg.addEventListener("pointerleave", () => look(-1));
svg.addEventListener("click", (event) => { if (nodeAt(event) >= 0) hold(nodeAt(event)); });
svg.addEventListener("dblclick", (event) => { const i = nodeAt(event); if (i >= 0) { togglePin(i); changed(); } });
svg.addEventListener("focusin", (event) => { const i = nodeAt(event); if (i >= 0) marks.forEach((each, j) => each.setAttribute("tabindex", j === i ? "0" : "-1")); });
svg.addEventListener("keydown", (event) => {
  const i = nodeAt(event);
  if (i < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = { Enter: () => hold(i), " ": () => hold(i), p: () => { togglePin(i); changed(); }, g: () => toggleMark(i) };
  if (event.key.startsWith("Arrow")) { const next = neighbour(i, event.key); marks[next].focus(); look(next); }
  else if (steps[event.key]) steps[event.key]();
  else return;
  event.preventDefault();
});
frame.addEventListener("scroll", () => requestAnimationFrame(() => { paintBelow(); paintAbove(); }));
window.addEventListener("resize", () => { paintBelow(); paintAbove(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paintBelow(); paintAbove(); });

function hold(i) {
  view.held = i;
  view.over = -1;
  shown = null;
  refresh();
}
function toggleMark(i) {
  if (!work.marked.delete(i)) work.marked.add(i);
  say(work.marked.size > 1 ? `${work.marked.size} nodes marked: Shift+G puts them into one supernode.` : work.marked.size ? "One node marked: mark more with g." : "");
  refresh();
}

// The picture that is saved: the SVG with the edges that are in sight.
function picture() {
  const copy = svg.cloneNode(true), drawn = draw("g", { fill: "none" }), limit = threshold();
  const mine = (i, j) => (work.pins.has(i) && work.pins.has(j)) || i === view.held || j === view.held;
  for (const [source, to, weight] of edges) {
    if (Math.abs(weight) < limit || !(view.all || mine(source, to))) continue;
    const [x0, y0] = place[source], [x1, y1] = place[to], middle = (y0 + y1) / 2;
    drawn.append(draw("path", { d: `M${x0},${y0}C${x0},${middle} ${x1},${middle} ${x1},${y1}`, stroke: colour(weight < 0 ? "--down" : "--up"),
      "stroke-width": Math.max(0.6, Math.min(7, 5 * Math.sqrt(Math.abs(weight) / scale))), "stroke-opacity": mine(source, to) ? 0.75 : 0.16 }));
  }
  copy.prepend(drawn);
  for (const line of lines) copy.append(draw("text", { class: "layer", x: 8, y: line.top + 24 }, line.text));
  const rules = Array.from(document.styleSheets[0].cssRules).filter((rule) => rule.selectorText?.startsWith("svg"))
    .map((rule) => rule.cssText.replace(/var\((--[a-z]+)\)/g, (_, name) => colour(name)).replace(/svg\.dimmed |svg /g, "")).join("\n");
  copy.setAttribute("xmlns", SVG);
  copy.removeAttribute("class");
  copy.prepend(draw("style", {}, rules));
  return new XMLSerializer().serializeToString(copy);
}
