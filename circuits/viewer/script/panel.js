// The panel: what is known about a node or a supernode.

function pair(i, weight) {
  const button = make("button", { class: "pair", type: "button", title: called(i) });
  button.append(make("span", { class: "what" }, called(i)));
  button.append(make("span", { class: `number ${weight < 0 ? "minus" : "plus"}` }, number(weight)));
  button.addEventListener("click", () => { hold(i); marks[i].focus({ preventScroll: true }); });
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

function nameField(value, done) {
  const label = make("label"), input = make("input", { id: "name", value, placeholder: "your name for it", autocomplete: "off", maxlength: "200" });
  input.addEventListener("change", () => done(input.value.trim()));
  label.append(make("span", {}, "name"), input);
  return label;
}

function actions(...buttons) {
  const line = make("p", { class: "actions" });
  for (const [text, act] of buttons) {
    const button = make("button", { type: "button" }, text);
    button.addEventListener("click", act);
    line.append(button);
  }
  return line;
}

// On narrow screens the panel lies over the graph: its head stays, and the rest can be closed.
let closed = false;
function beginPanel(panel, title) {
  const head = make("div", { class: "head" }), button = make("button", { id: "fold", type: "button" });
  const tell = () => {
    panel.classList.toggle("closed", closed);
    button.textContent = closed ? "open" : "close";
    button.setAttribute("aria-expanded", String(!closed));
  };
  button.addEventListener("click", () => { closed = !closed; tell(); });
  head.append(make("h2", {}, title), button);
  panel.replaceChildren(head);
  panel.scrollTop = 0;
  tell();
}

let shown = null;
function drawPanel(i) {
  if (shown === i) return;
  shown = i;
  const panel = by("panel"), node = nodes[i], group = groupOf(i);
  beginPanel(panel, called(i));
  const facts = make("dl", { class: "facts" });
  const known = [["kind", node.kind], ["influence", number(node.influence)]];
  if (traced(i)) known.push(["value", number(node.value)]);
  if (node.kind === "feature") known.push(["activation", number(node.activation)]);
  if (node.position >= 0) known.push(["token", token(i)]);
  if (named(i)) known.push(["label", node.label]);
  if (group) known.push(["supernode", group.name || `${group.members.length} nodes`]);
  for (const [what, value] of known) {
    const entry = make("div");
    entry.append(make("dt", {}, what), make("dd", {}, value));
    facts.append(entry);
  }
  panel.append(facts, nameField(named(i), (name) => { rename(i, name); shown = null; changed(); }));
  const pin = work.pins.has(i) ? "unpin" : "pin";
  panel.append(actions([pin, () => { togglePin(i); shown = null; changed(); }], ...(group ? [["show supernode", () => drawGroup(group)]] : [])));
  if (traced(i)) listed(panel, "receives from", inputs[i], node.rest);
  if (node.kind !== "target") listed(panel, "contributes to", outputs[i]);
  drawFeature(panel, data.features[String(i)]);
}

function drawGroup(group) {
  shown = group;
  const panel = by("panel"), inside = new Set(group.members);
  const summed = (lists) => {
    const sums = new Map();
    for (const i of group.members) for (const [j, weight] of lists[i]) if (!inside.has(j)) sums.set(j, (sums.get(j) ?? 0) + weight);
    return bySize([...sums]);
  };
  beginPanel(panel, group.name || "Supernode");
  panel.append(nameField(group.name, (name) => { group.name = name; changed(); drawGroup(group); }));
  panel.append(actions(["take apart", () => { ungroup(group); shown = null; changed(); }]));
  panel.append(make("h2", {}, `nodes (${group.members.length})`));
  for (const i of group.members) panel.append(pair(i, nodes[i].value));
  listed(panel, "receives from", summed(inputs));
  listed(panel, "contributes to", summed(outputs));
}

function drawFeature(panel, about) {
  if (!about) return;
  for (const which of ["promoted", "suppressed"]) {
    if (!about[which]) continue;
    panel.append(make("h2", {}, `${which} tokens`));
    const line = make("p");
    for (const [word] of about[which]) line.append(make("span", { class: "token" }, visible(word)), " ");
    panel.append(line);
  }
  if (!about.contexts.length) return;
  panel.append(make("h2", {}, "most active on"));
  const most = Math.max(...about.contexts.flat().map(([, value]) => value), 1e-12);
  for (const context of about.contexts) {
    const line = make("p", { class: "context" });
    for (const [text, value] of context) {
      const word = make("span", { title: number(value) }, text);
      if (value > 0) word.setAttribute("style", `background: rgb(var(--heat) / ${(0.85 * value / most).toFixed(2)})`);
      line.append(word);
    }
    panel.append(line);
  }
}

function drawPaths() {
  const list = by("paths");
  list.replaceChildren();
  for (const each of data.paths) {
    for (const [weight, places] of each.paths) {
      const item = make("li"), button = make("button", { class: "pair steps", type: "button" });
      button.append(make("span", { class: "what" }, places.map(called).join(" → ")));
      button.append(make("span", { class: `number ${weight < 0 ? "minus" : "plus"}` }, number(weight)));
      button.addEventListener("click", () => { places.forEach((i) => work.pins.add(i)); view.held = places[0]; shown = null; changed(); });
      item.append(button);
      list.append(item);
    }
    list.append(make("li", { class: "soft" }, `all other paths: ${number(each.remainder)} of ${number(each.value)}`));
  }
}
