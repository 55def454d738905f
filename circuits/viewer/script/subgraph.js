// The subgraph: pinned nodes as cards, which are dragged onto one another to make supernodes. An edge between two cards
// is the sum of the direct contributions from one's nodes to the other's.

const board = by("board"), CARD = { width: 150, height: 46, gapX: 18, gapY: 44 };

function cards() {
  const grouped = new Set(work.groups.flatMap((group) => group.members));
  const single = [...work.pins].filter((i) => !grouped.has(i)).map((i) => ({ key: nodes[i].id, members: [i], group: null }));
  const several = work.groups.map((group) => ({ key: `group/${group.members.map((i) => nodes[i].id).join(",")}`, members: group.members, group }));
  return [...several, ...single];
}
const titleOf = (card) => (card.group ? card.group.name || `${card.members.length} nodes` : called(card.members[0]));
const aboutNode = (i) => `${named(i) ? nodes[i].label : nodes[i].kind} ${token(i)}`;
function between(from, to) {
  const wanted = new Set(from.members);
  return to.members.reduce((sum, i) => sum + inputs[i].reduce((part, [j, weight]) => part + (wanted.has(j) ? weight : 0), 0), 0);
}

function drawBoard() {
  const all = cards();
  by("subgraph").hidden = !all.length;
  board.replaceChildren();
  if (!all.length) return;
  const level = (card) => Math.min(...card.members.map((i) => rowOf(nodes[i])));
  const column = (card) => card.members.reduce((sum, i) => sum + place[i][0], 0) / card.members.length;
  const levels = [...new Set(all.map(level))].sort((a, b) => a - b), fit = Math.max(1, Math.floor((board.clientWidth - 8) / (CARD.width + CARD.gapX)));
  let top = 8;
  for (const row of levels) {
    const here = all.filter((card) => level(card) === row).sort((a, b) => column(a) - column(b));
    here.forEach((card, n) => { card.at = work.places.get(card.key) ?? [8 + (n % fit) * (CARD.width + CARD.gapX), top + Math.floor(n / fit) * (CARD.height + 10)]; });
    top += Math.ceil(here.length / fit) * (CARD.height + 10) + CARD.gapY - 10;
  }
  const height = Math.max(top, ...all.map((card) => card.at[1] + CARD.height + 16)), width = Math.max(board.clientWidth, ...all.map((card) => card.at[0] + CARD.width + 8));
  const wires = draw("svg", { width, height, class: "wires", "aria-hidden": "true" });
  board.append(wires);
  board.style.height = `${height}px`;
  for (const from of all) {
    for (const to of all) {
      const weight = from === to ? 0 : between(from, to);
      if (Math.abs(weight) < 1e-12) continue;
      const x0 = from.at[0] + CARD.width / 2, y0 = from.at[1], x1 = to.at[0] + CARD.width / 2, y1 = to.at[1] + CARD.height, middle = (y0 + y1) / 2;
      const wire = draw("path", { class: weight < 0 ? "edge down" : "edge", d: `M${x0},${y0}C${x0},${middle} ${x1},${middle} ${x1},${y1}`,
        "stroke-width": Math.max(0.8, Math.min(7, 5 * Math.sqrt(Math.abs(weight) / scale))), "stroke-opacity": 0.6 });
      wire.append(draw("title", {}, `${titleOf(from)} → ${titleOf(to)}: ${number(weight)}`));
      wires.append(wire);
    }
  }
  all.forEach((card) => board.append(drawCard(card, all)));
}

function drawCard(card, all) {
  const made = make("div", { class: `card${card.group ? " group" : ""}${card.members.includes(view.held) ? " on" : ""}`, tabindex: "0", role: "button", style: `left:${card.at[0]}px;top:${card.at[1]}px` });
  made.append(make("strong", {}, titleOf(card)));
  made.append(make("span", { class: "soft" }, card.group ? `${card.members.length} nodes` : aboutNode(card.members[0])));
  made.setAttribute("aria-label", titleOf(card));
  const open = () => (card.group ? drawGroup(card.group) : hold(card.members[0]));
  made.addEventListener("keydown", (event) => {
    if (event.target !== made) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); }
    if (event.key === "g") { event.preventDefault(); card.members.forEach(toggleMark); }
  });
  made.addEventListener("pointerdown", (event) => {
    const start = [event.clientX, event.clientY], [left, top] = card.at;
    let moved = false;
    made.setPointerCapture(event.pointerId);
    const over = () => all.find((other) => other !== card && Math.abs(other.at[0] - card.at[0]) < CARD.width * 0.6 && Math.abs(other.at[1] - card.at[1]) < CARD.height * 0.7);
    const move = (to) => {
      const dx = to.clientX - start[0], dy = to.clientY - start[1];
      if (!moved && Math.hypot(dx, dy) < 5) return;
      moved = true;
      card.at = [Math.max(0, left + dx), Math.max(0, top + dy)];
      made.style.left = `${card.at[0]}px`;
      made.style.top = `${card.at[1]}px`;
      board.classList.toggle("joining", Boolean(over()));
    };
    const end = () => {
      made.removeEventListener("pointermove", move);
      board.classList.remove("joining");
      if (!moved) return open();
      const onto = over();
      if (onto) { groupTogether([...onto.members, ...card.members]); changed(); drawGroup(groupOf(card.members[0])); }
      else { work.places.set(card.key, card.at); drawBoard(); }
    };
    made.addEventListener("pointermove", move);
    made.addEventListener("pointerup", end, { once: true });
    made.addEventListener("pointercancel", () => { made.removeEventListener("pointermove", move); drawBoard(); }, { once: true });
  });
  return made;
}
