// Where everything stands: a row for each layer with the targets on top, a column for each token and one for constants.

const rows = data.layers + 2, gap = 15, across = 6, margin = 78;
const rowOf = (node) => (node.kind === "target" ? 0 : node.layer < 0 ? rows - 1 : data.layers - node.layer);
const cells = new Map();
nodes.forEach((node, i) => {
  const key = `${rowOf(node)},${node.position}`;
  if (!cells.has(key)) cells.set(key, []);
  cells.get(key).push(i);
});
const sizeOf = (row, position) => (cells.get(`${row},${position}`) ?? []).length;
const everyColumn = [...tokens.keys(), -1];

const columns = new Map(), lines = [];
let right = margin, bottom = 10;
for (const position of everyColumn) {
  const text = position < 0 ? "constants" : visible(tokens[position]);
  const most = Math.max(1, ...Array.from({ length: rows }, (_, row) => Math.min(across, sizeOf(row, position))));
  const width = Math.max(46, most * gap + 14, Math.min(120, text.length * 7.4 + 14));
  columns.set(position, { left: right, width, text });
  right += width;
}
for (let row = 0; row < rows; row += 1) {
  const height = Math.max(1, ...everyColumn.map((position) => Math.ceil(sizeOf(row, position) / across))) * gap + 26;
  lines.push({ top: bottom, height, text: row === 0 ? "targets" : row === rows - 1 ? "tokens" : `layer ${data.layers - row}` });
  bottom += height;
}
const size = { width: right + 10, height: bottom + 34 };

const place = nodes.map(() => null);
for (const [key, members] of cells) {
  const [row, position] = key.split(",").map(Number), column = columns.get(position);
  members.sort((a, b) => nodes[b].influence - nodes[a].influence);
  members.forEach((i, n) => {
    const line = Math.floor(n / across), inLine = Math.min(across, members.length - across * line);
    place[i] = [column.left + column.width / 2 + ((n % across) - (inLine - 1) / 2) * gap, lines[row].top + 20 + line * gap];
  });
}

// The nodes of each row from left to right: where the arrow keys lead.
const inRows = Array.from({ length: rows }, (_, row) => nodes.map((_, i) => i).filter((i) => rowOf(nodes[i]) === row).sort((a, b) => place[a][0] - place[b][0]));
function neighbour(i, key) {
  const row = rowOf(nodes[i]), here = inRows[row], at = here.indexOf(i);
  if (key === "ArrowLeft") return here[Math.max(0, at - 1)];
  if (key === "ArrowRight") return here[Math.min(here.length - 1, at + 1)];
  const step = key === "ArrowUp" ? -1 : 1;
  for (let other = row + step; other >= 0 && other < rows; other += step) {
    if (inRows[other].length) return inRows[other].reduce((a, b) => (Math.abs(place[b][0] - place[i][0]) < Math.abs(place[a][0] - place[i][0]) ? b : a));
  }
  return i;
}
