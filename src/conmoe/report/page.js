"use strict";
// Tables are sorted by the buttons in their headings: once upwards, once downwards. Cells carry their number in data-v.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [left, right] = [key(a), key(b)];
      if (left === "" || right === "") return (left === "") - (right === ""); // what is not known stays last
      const both = left !== "" && right !== "" && !isNaN(left) && !isNaN(right);
      return (up ? 1 : -1) * (both ? left - right : left.localeCompare(right));
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  });
}
// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
