"use strict";
// Sorting, filters, figures and copying. Every page reads without it.

// --- Tables ---

/** What a cell is sorted by: its `data-value`, else its words; numbers before words, nothing last. */
function sortKey(cell) {
  const text = cell.dataset.value ?? cell.textContent.trim();
  return { empty: text === "", number: text === "" ? NaN : Number(text), text };
}

function compareKeys(a, b, up) {
  if (a.empty || b.empty) return a.empty - b.empty; // in both directions
  const numbers = !Number.isNaN(a.number) && !Number.isNaN(b.number);
  const order = numbers ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
  return up ? order : -order;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].map((row) => [sortKey(row.cells[column]), row]);
      rows.sort(([a], [b]) => compareKeys(a, b, up));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

for (const form of document.querySelectorAll("[data-filters]")) {
  const rows = [...document.getElementById(form.dataset.filters).tBodies[0].rows];
  const fields = [...form.querySelectorAll("[data-filter]")];
  const said = form.querySelector("output");
  const words = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  const apply = () => {
    for (const row of rows) {
      row.hidden = !fields.every((field) => {
        const wanted = field.value.trim().toLowerCase();
        if (field.dataset.filter === "text") return wanted.split(/\s+/).every((word) => words.get(row).includes(word));
        return wanted === "" || row.dataset[field.dataset.filter].toLowerCase() === wanted;
      });
    }
    const shown = rows.filter((row) => !row.hidden).length;
    said.textContent = shown === rows.length ? `${rows.length} in all` : `${shown} of ${rows.length}`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}

// --- Figures ---

/** A value on an axis -> its place in the picture's units, between two ends. */
function place(value, axis, start, end) {
  const [low, high] = axis.limits;
  const of = axis.log ? Math.log : (x) => x;
  return start + ((of(value) - of(low)) / (of(high) - of(low))) * (end - start);
}

function shownValue(value, axis) {
  if (axis.names.length) return axis.names[value];
  return Number(value.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 6 });
}

/** Makes a figure answer: its legend hides lines, the point under the pointer is read out. */
function enhanceFigure(figure) {
  const numbers = JSON.parse(figure.querySelector("script.numbers").textContent);
  const picture = figure.querySelector(".picture");
  const svg = picture.querySelector("svg");
  const readout = figure.querySelector(".readout");
  const ring = document.createElement("span");
  const off = new Set();
  ring.className = "ring";
  ring.hidden = true;
  picture.append(ring);

  for (const button of figure.querySelectorAll("[data-toggles]")) {
    button.addEventListener("click", () => {
      const index = Number(button.dataset.toggles);
      const hide = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!hide));
      if (hide) off.add(index); else off.delete(index);
      for (const part of svg.querySelectorAll(`[data-series="${index}"]`)) part.classList.toggle("off", hide);
    });
  }

  const [left, top, right, bottom] = numbers.box;
  const points = numbers.series.flatMap((series, index) => series.points.map(([x, y]) => ({
    index, series, x, y, at: [place(x, numbers.x, left, right), place(y, numbers.y, bottom, top)],
  })));

  picture.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / frame.width;
    const mouse = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
    let nearest = null;
    let best = 40 * scale; // pixels
    for (const point of points) {
      const distance = Math.hypot(point.at[0] - mouse[0], point.at[1] - mouse[1]);
      if (distance < best && !off.has(point.index)) [nearest, best] = [point, distance];
    }
    ring.hidden = nearest === null;
    if (nearest === null) return;
    ring.style.left = `${nearest.at[0] / scale}px`;
    ring.style.top = `${nearest.at[1] / scale}px`;
    const of = (axis, value) => `${axis.label ? `${axis.label.split(/[;,]/)[0]}: ` : ""}${shownValue(value, axis)}`;
    readout.textContent = `${nearest.series.name}. ${of(numbers.x, nearest.x)}, ${of(numbers.y, nearest.y)}`;
  });
  picture.addEventListener("pointerleave", () => { ring.hidden = true; readout.textContent = "\u00a0"; });
}

function enhanceFigures(root) {
  for (const figure of root.querySelectorAll("figure.plot")) enhanceFigure(figure);
}
enhanceFigures(document);

// --- Commands ---

for (const block of document.querySelectorAll("#commands ~ pre, section[aria-labelledby=commands] pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(block); // a page from a file may not write to the clipboard everywhere
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  block.after(button);
}

// A link to a part inside closed details opens them.
function reveal() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
}
addEventListener("hashchange", reveal);
reveal();
