// The reader's work: names, pins and supernodes. It is kept in this browser and in the page's address, and saved to a
// file that other copies of the page open. Files and addresses name nodes by their ids, memory by their numbers.

const FORMAT = "hooked-mamba circuit work";
const work = { names: new Map(), pins: new Set(), groups: [], places: new Map(), marked: new Set() };
const storage = `hooked-mamba:${location.pathname}:${data.fingerprint}`;

const groupOf = (i) => work.groups.find((group) => group.members.includes(i));

function written() {
  const ids = (list) => list.map((i) => nodes[i].id);
  return {
    format: FORMAT,
    version: 1,
    pins: ids([...work.pins]),
    names: Object.fromEntries([...work.names].map(([i, name]) => [nodes[i].id, name])),
    groups: work.groups.map((group) => ({ name: group.name, members: ids(group.members) })),
  };
}

// Take over written work; returns what of it belongs to no node of this graph. Errors are texts for the reader.
function readWork(found) {
  if (found === null || typeof found !== "object" || found.format !== FORMAT) throw new Error(`not a file of saved work: expected format "${FORMAT}"`);
  if (found.version !== 1) throw new Error(`work of version ${String(found.version).slice(0, 20)}: this page reads version 1`);
  const unknown = new Set();
  const known = (list) => (Array.isArray(list) ? list : []).map(String).flatMap((id) => {
    if (numbered.has(id)) return [numbered.get(id)];
    unknown.add(id);
    return [];
  });
  work.pins = new Set(known(found.pins));
  work.names = new Map(Object.entries(found.names ?? {}).flatMap(([id, name]) => known([id]).map((i) => [i, String(name).slice(0, 200)])));
  const taken = new Set();
  work.groups = (Array.isArray(found.groups) ? found.groups : []).map((group) => ({
    name: String(group?.name ?? "").slice(0, 200),
    members: known(group?.members).filter((i) => !taken.has(i) && taken.add(i)),
  })).filter((group) => group.members.length);
  for (const group of work.groups) group.members.forEach((i) => work.pins.add(i));
  work.places.clear();
  work.marked.clear();
  return [...unknown];
}

const inAddress = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text))).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
const fromAddress = (text) => new TextDecoder().decode(Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (c) => c.charCodeAt(0)));

function keep() {
  const text = JSON.stringify(written());
  try { localStorage.setItem(storage, text); } catch { /* pages in frames may have no storage */ }
  try { history.replaceState(null, "", `#work=${inAddress(text)}`); } catch { /* nor an address of their own */ }
}

function restore() {
  const address = /^#work=([\w-]+)$/.exec(location.hash);
  let kept = null;
  try { kept = localStorage.getItem(storage); } catch { /* no storage */ }
  for (const text of [address && (() => fromAddress(address[1])), kept && (() => kept)]) {
    if (!text) continue;
    try { return report(readWork(JSON.parse(text()))); } catch (error) { say(`The work kept for this page cannot be read: ${error.message}`); }
  }
  nodes.forEach((node, i) => { if (node.name) work.names.set(i, node.name); });
  work.groups = Object.entries(data.supernodes).map(([name, members]) => ({ name, members: [...members] }));
  for (const group of work.groups) group.members.forEach((i) => work.pins.add(i));
}

function report(unknown) {
  if (unknown.length) say(`${unknown.length} of the nodes named there are not in this graph, such as ${unknown[0].slice(0, 60)}.`);
}

function say(text) { by("says").textContent = text; }

// Changes; each is followed by `changed()` in main.js.
function rename(i, name) { name ? work.names.set(i, name) : work.names.delete(i); }
function togglePin(i) {
  if (!work.pins.delete(i)) { work.pins.add(i); return; }
  for (const group of work.groups) group.members = group.members.filter((member) => member !== i);
  work.groups = work.groups.filter((group) => group.members.length);
}
function groupTogether(members, name = "") {
  const all = new Set(members.flatMap((i) => groupOf(i)?.members ?? [i]));
  const first = work.groups.find((group) => group.members.some((i) => all.has(i)));
  work.groups = work.groups.filter((group) => !group.members.some((i) => all.has(i)));
  work.groups.push({ name: name || first?.name || "", members: [...all] });
  all.forEach((i) => work.pins.add(i));
}
function ungroup(group) { work.groups = work.groups.filter((other) => other !== group); }
