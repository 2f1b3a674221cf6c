"use strict";
// Everything that is shown comes from the data below, and goes into the page as text alone.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

function make(kind, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

// Names hold any bytes: what turns the writing round, or cannot be seen, is shown by its number.
const shown = (text) => String(text).replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
  (letter) => "\\u{" + letter.codePointAt(0).toString(16) + "}");

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let unit = 0, value = bytes;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return (unit && value % 1 ? value.toFixed(value < 10 ? 2 : 1) : value) + " " + units[unit];
}
// Addresses beyond 2^53 are off by a few bytes here: the JSON has them as they are.
const hex = (number) => "0x" + number.toString(16);
const isAddress = (key) => /(^|_)(address|data|first|lowest|highest|pfn|blocks #[0-9]+)$/.test(key);
const isSize = (key) => /(^|_)bytes$|^size$/.test(key);

function value(key, it) {
  if (it === null) return "-";
  if (typeof it === "number" && isAddress(key)) return hex(it);
  if (typeof it === "number" && isSize(key)) return size(it);
  return shown(it);
}

// Figures.
function figures() {
  const kho = data.kho || {}, luo = data.luo || {}, sessions = luo.sessions || [];
  const files = sessions.reduce((sum, session) => sum + session.files.length, 0);
  const errors = data.findings.filter((finding) => finding.severity === "error").length;
  const list = [
    [kho.preserved_bytes == null ? "unknown" : size(kho.preserved_bytes), "preserved"],
    [kho.version || "none", "KHO, FDT at " + (kho.fdt_address == null ? "-" : hex(kho.fdt_address))],
    [luo.version || "none", "LUO, update " + (luo.liveupdate_number == null ? "-" : luo.liveupdate_number)],
    [sessions.length, "sessions, " + files + " files"],
    [size(data.unreferenced.bytes), "preserved, and referred to by nothing"],
    [errors, "errors of " + (data.findings.length + data.findings_left_out) + " findings"],
  ];
  for (const [number, what] of list) {
    const box = make("div");
    box.append(make("b", shown(number)), make("span", shown(what)));
    find("summary").append(box);
  }
  for (const it of kho.orders || []) {
    const row = make("tr");
    for (const cell of [size(it.block_bytes), it.order, it.blocks, size(it.bytes), it.runs, (100 * it.density).toFixed(1) + " %"])
      row.append(make("td", cell, "n"));
    find("orders").append(row);
  }
}

// Findings.
function findings() {
  const all = data.findings.map((it) => [it.severity, it.rule, it.subject, it.words])
    .concat(data.stale.map((it) => ["stale", "", it.what, it.why]))
    .concat(data.unread.map((it) => ["unread", "", "", it]));
  for (const [severity, rule, subject, words] of all) {
    const row = make("tr");
    const name = severity === "error" ? "bad" : severity === "note" ? "soft" : "warn";
    row.append(make("td", severity, name), make("td", rule, "rule"), make("td", shown(subject), "what"), make("td", shown(words), "what"));
    find("findings").append(row);
  }
  if (!all.length) find("findings-none").hidden = false;
  if (data.findings_left_out) find("findings-more").textContent = data.findings_left_out + " more of the same rules";
}

// The map. A color for each owner, and for each page size.
const dark = matchMedia("(prefers-color-scheme: dark)");
const hue = (index) => (index * 137.5) % 360;
const paint = (angle) => "hsl(" + angle + " 62% " + (dark.matches ? "58%" : "47%") + ")";
const none = () => (dark.matches ? "#7d8590" : "#8c959f");
const ofOwner = (owner) => (owner === null ? none() : paint(hue(owner)));
const ofOrder = (order) => paint(210 - Math.min(order, 18) * 11);
const label = (owner) => (owner === null ? "referred to by nothing" : shown(data.owners[owner].label));

const COLUMNS = 64, STEP = 16, GAP = 2;
function draw() {
  const canvas = find("map"), rows = Math.max(1, Math.ceil(data.map.cells / COLUMNS)), scale = window.devicePixelRatio || 1;
  canvas.width = COLUMNS * STEP * scale;
  canvas.height = rows * STEP * scale;
  const context = canvas.getContext("2d"), byOrder = find("by-order").checked;
  context.scale(scale, scale);
  context.fillStyle = dark.matches ? "#2a3036" : "#e3e7ec";
  for (let index = 0; index < data.map.cells; index += 1)
    context.fillRect((index % COLUMNS) * STEP + 1, Math.floor(index / COLUMNS) * STEP + 1, STEP - GAP, STEP - GAP);
  for (const cell of data.map.used) {
    const full = Math.max(2, Math.round((STEP - GAP) * Math.min(1, cell.bytes / data.map.cell_bytes)));
    context.fillStyle = byOrder ? ofOrder(cell.order) : ofOwner(cell.owner);
    context.fillRect((cell.index % COLUMNS) * STEP + 1, Math.floor(cell.index / COLUMNS) * STEP + 1 + STEP - GAP - full, STEP - GAP, full);
  }
}

const cells = new Map(data.map.used.map((cell) => [cell.index, cell]));
function point(event) {
  const box = find("map").getBoundingClientRect(), rows = Math.ceil(data.map.cells / COLUMNS);
  const column = Math.floor(((event.clientX - box.left) / box.width) * COLUMNS);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const index = row * COLUMNS + column, cell = cells.get(index);
  if (column < 0 || column >= COLUMNS || index >= data.map.cells) return;
  const from = index * data.map.cell_bytes;
  find("at").textContent = hex(from) + " to " + hex(from + data.map.cell_bytes) + ": " + (cell
    ? size(cell.bytes) + " preserved, most of it by " + label(cell.owner) + ", the largest block " + size(4096 * 2 ** cell.order)
    + (cell.unreferenced_bytes ? ", " + size(cell.unreferenced_bytes) + " referred to by nothing" : "")
    : "nothing preserved");
}

function owners() {
  const rows = data.owners.map((it, index) => [index, shown(it.label), it.kind, it.bytes, it.metadata_bytes, it.by_order]);
  if (data.unreferenced.bytes) rows.push([null, "referred to by nothing", "", data.unreferenced.bytes, 0, {}]);
  const PART = 200;
  const add = (from) => {
    for (const [index, name, kind, bytes, metadata, byOrder] of rows.slice(from, from + PART)) {
      const row = make("tr"), first = make("td", undefined, "what"), swatch = make("span", undefined, "swatch");
      swatch.style.background = ofOwner(index);
      first.append(swatch, name);
      const orders = Object.entries(byOrder).map(([order, blocks]) => blocks + " of " + size(4096 * 2 ** order)).join(", ");
      row.append(first, make("td", kind), make("td", size(bytes), "n"), make("td", size(metadata), "n"), make("td", orders));
      find("owners").append(row);
    }
    if (rows.length > from + PART) more(find("owners-more"), rows.length - from - PART, () => add(from + PART));
  };
  add(0);
}

function more(place, count, act) {
  const button = make("button", count + " more");
  button.addEventListener("click", () => { button.remove(); act(); });
  place.append(button);
}

// The tree: what is in a node is made when it is unfolded.
function title(key, it) {
  const named = it && typeof it === "object" && !Array.isArray(it);
  if (named && it.handler !== undefined)
    return shown(it.handler) + ", token " + it.token_hex + (it.size == null ? "" : ", " + size(it.size)) + (it.folios == null ? "" : ", " + it.folios + " folios");
  if (named && it.files !== undefined) return "session " + shown(it.name) + ", " + it.files.length + " files";
  if (named && it.label !== undefined) return shown(it.label) + ", " + size(it.bytes);
  if (named && it.name !== undefined && it.name !== null && typeof it.name === "string") return shown(it.name);
  if (named && it.address != null && it.bytes != null)
    return hex(it.address) + ", " + size(it.bytes) + (it.owner === undefined ? "" : ", " + label(it.owner));
  if (Array.isArray(it)) return shown(key) + " (" + it.length + ")";
  return shown(key);
}

function branch(place, key, it) {
  if (it === null || typeof it !== "object") {
    const leaf = make("div", undefined, "leaf");
    leaf.append(make("span", shown(key) + ": ", "key"), value(key, it));
    place.append(leaf);
    return;
  }
  const node = make("details");
  node.append(make("summary", title(key, it)));
  node.addEventListener("toggle", () => fill(node, key, it), { once: true });
  place.append(node);
}

const EACH = 200;
function fill(node, name, it, from = 0) {
  const parts = Object.entries(it);
  const numbered = Array.isArray(it);
  for (const [key, part] of parts.slice(from, from + EACH)) branch(node, numbered ? (typeof part === "number" ? name + " #" : "#") + key : key, part);
  if (parts.length > from + EACH) more(node, parts.length - from - EACH, () => fill(node, name, it, from + EACH));
}

function tree() {
  const { arena, kho, luo, kexec, memblock, owners, ranges, unreferenced } = data;
  const top = { arena, kho, luo, "kexec metadata": kexec, "reserved memory": memblock, owners, "preserved ranges": ranges, unreferenced };
  for (const [key, it] of Object.entries(top)) if (it !== null && !(Array.isArray(it) && !it.length)) branch(find("tree"), key, it);
  if (data.ranges_left_out) find("tree").append(make("p", data.ranges_left_out + " ranges are not listed", "soft"));
}

figures();
findings();
owners();
tree();
draw();
find("scale").textContent = data.map.cells + " cells of " + size(data.map.cell_bytes) + ", 64 in a row, filled as far as it is preserved";
find("map").addEventListener("pointermove", point);
for (const id of ["by-owner", "by-order"]) find(id).addEventListener("change", draw);
dark.addEventListener("change", () => { draw(); find("owners").replaceChildren(); find("owners-more").replaceChildren(); owners(); });
