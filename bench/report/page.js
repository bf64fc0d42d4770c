"use strict";
// Sorting and filtering of the tables. Nothing here is made from data, and the page reads the same
// without it.

function sortKey(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
  const text = cell.textContent.trim();
  return text === "" || text === "–" ? null : text;
}

function compare(one, other, sign) {
  // What is missing stands last in both directions.
  if (one === null || other === null) return (one === null) - (other === null);
  if (typeof one === "number" && typeof other === "number") return sign * (one - other);
  return sign * String(one).localeCompare(String(other), "en", { numeric: true });
}

function makeSortable(table) {
  const headings = Array.from(table.tHead.rows[0].cells);
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const keyed = Array.from(table.tBodies[0].rows, (row) => [sortKey(row, column), row]);
      keyed.sort((a, b) => compare(a[0], b[0], descending ? -1 : 1));
      table.tBodies[0].append(...keyed.map((pair) => pair[1]));
    });
  });
}

function makeFilterable(controls, table) {
  const rows = Array.from(table.tBodies[0].rows, (row) => [row.textContent.toLowerCase(), row]);
  const field = controls.querySelector("input");
  const count = controls.querySelector("output");
  function apply() {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [text, row] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }
  field.addEventListener("input", apply);
  controls.hidden = false;
  apply();
}

for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
for (const controls of document.querySelectorAll(".filter")) {
  makeFilterable(controls, document.getElementById(controls.dataset.table));
}
