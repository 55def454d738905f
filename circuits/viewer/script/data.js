"use strict";
// The graph as the page holds it, and how nodes are called.

const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, edges, tokens } = data;
const SVG = "http://www.w3.org/2000/svg";
const by = (id) => document.getElementById(id);

// Edges by node, the largest first: [other node, weight].
const inputs = nodes.map(() => []), outputs = nodes.map(() => []);
for (const [source, target, weight] of edges) {
  inputs[target].push([source, weight]);
  outputs[source].push([target, weight]);
}
const bySize = (list) => list.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
[...inputs, ...outputs].forEach(bySize);

const numbered = new Map(nodes.map((node, i) => [node.id, i]));
const target = nodes.findIndex((node) => node.kind === "target");
const traced = (i) => ["target", "feature", "head"].includes(nodes[i].kind);

// What the targets' largest input is: the scale of widths and of the slider.
const scale = Math.max(...inputs.flatMap((list, i) => (nodes[i].kind === "target" ? list.map((e) => Math.abs(e[1])) : [])), 1e-12);

function make(name, attributes = {}, text = null, svg = false) {
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}
const draw = (name, attributes, text = null) => make(name, attributes, text, true);

const visible = (token) => token.replace(/\n/g, "⏎").replace(/ /g, "·");
const number = (x) => (Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 0.001) ? x.toExponential(1) : String(Number(x.toPrecision(3))));
const promoted = (i) => (data.features[String(i)]?.promoted ?? []).map(([token]) => visible(token));
const token = (i) => (nodes[i].position < 0 ? "" : visible(tokens[nodes[i].position] ?? ""));
const named = (i) => work.names.get(i) ?? "";

function called(i) {
  const node = nodes[i];
  if (named(i)) return named(i);
  if (node.kind === "embed") return `${node.label} ${token(i)}`;
  const words = promoted(i).slice(0, 2).join(" ");
  return words ? `${node.label} (${words})` : node.label;
}
