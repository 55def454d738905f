// Controls, keys, and the start.

function refresh() {
  mark();
  light();
  paintBelow();
  paintAbove();
  drawBoard();
  if (centre() >= 0) drawPanel(centre());
}
function changed() {
  keep();
  drawPaths();
  refresh();
}

let found = [];
function find() {
  view.wanted = by("search").value.trim().toLowerCase();
  const text = (i) => `${called(i)} ${nodes[i].label} ${token(i)} ${promoted(i).join(" ")}`.toLowerCase();
  found = view.wanted ? nodes.map((_, i) => i).filter((i) => text(i).includes(view.wanted)).sort((a, b) => nodes[b].influence - nodes[a].influence) : [];
  const list = by("found");
  list.hidden = !view.wanted;
  list.replaceChildren(make("p", { class: "soft" }, found.length ? `${found.length} nodes` : "no node"));
  for (const i of found.slice(0, 8)) list.append(pair(i, nodes[i].value));
  light();
}

function save(name, type, text) {
  make("a", { download: name, href: `data:${type};charset=utf-8,${encodeURIComponent(text)}` }).click();
}
async function copyLink() {
  keep();
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied. It holds your pins, supernodes and names.");
  } catch { say("Copy the page's address: it holds your pins, supernodes and names."); }
}
async function openWork(file) {
  if (!file) return;
  try {
    const unknown = readWork(JSON.parse(await file.text()));
    say("");
    report(unknown);
    shown = null;
    changed();
  } catch (error) { say(`${file.name}: ${error.message}`); }
}

by("least").addEventListener("input", () => { paintBelow(); paintAbove(); });
by("search").addEventListener("input", find);
by("search").addEventListener("keydown", (event) => { if (event.key === "Enter" && found.length) { hold(found[0]); marks[found[0]].focus(); } });
by("all").addEventListener("click", () => { view.all = !view.all; by("all").setAttribute("aria-pressed", String(view.all)); refresh(); });
by("clear").addEventListener("click", () => { work.pins.clear(); work.groups = []; work.marked.clear(); shown = null; changed(); });
by("save").addEventListener("click", () => save("circuit-work.json", "application/json", JSON.stringify(written(), null, 1)));
by("open").addEventListener("click", () => by("file").click());
by("file").addEventListener("change", (event) => { openWork(event.target.files[0]); event.target.value = ""; });
by("link").addEventListener("click", copyLink);
by("picture").addEventListener("click", () => save("circuit.svg", "image/svg+xml", picture()));
document.addEventListener("keydown", (event) => {
  if (event.target.closest?.("input, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); by("search").focus(); }
  if (event.key === "?") by("keys").open = !by("keys").open;
  if (event.key === "G" && work.marked.size > 1) {
    const members = [...work.marked];
    groupTogether(members);
    work.marked.clear();
    say("");
    changed();
    drawGroup(groupOf(members[0]));
  }
  if (event.key === "Escape") { work.marked.clear(); say(""); refresh(); }
});
window.addEventListener("hashchange", () => { restore(); shown = null; drawPaths(); refresh(); });

restore();
drawPaths();
refresh();
// If the target lies outside of a narrow frame, begin there.
if (target >= 0 && place[target][0] > frame.clientWidth - 60) frame.scrollLeft = place[target][0] - frame.clientWidth / 2;
