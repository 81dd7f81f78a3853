// Of `run.py report`: the theme, from the address (#dark, #light), from last time, or as the system has it; and tables
// that a click, or a key, on a column's name sorts. Without it the page says the same.
(() => {
  "use strict";
  const root = document.documentElement;
  const key = "specdec-report-theme";
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem(key); } catch { return null; } };
  const keep = (theme) => { try { localStorage.setItem(key, theme); } catch { /* a file may not be let to */ } };
  const chosen = { "#dark": "dark", "#light": "light" }[location.hash] ?? stored();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  const dark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    return text === "–" ? -Infinity : /^\d/.test(text) ? parseFloat(text.replaceAll(",", "")) : text;
  };
  const sort = (table, column, heading) => {
    const body = table.tBodies[0];
    const up = heading.getAttribute("aria-sort") !== "ascending";
    const figures = heading.classList.contains("n");
    const compare = (a, b) => {
      const [x, y] = [a, b].map((row) => figures ? value(row, column) : row.cells[column].textContent);
      const order = figures ? (x === y ? 0 : x < y ? -1 : 1) : x.localeCompare(y, "en", { numeric: true });
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  };

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; }; // what pressing it does
    button.hidden = false;
    button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; keep(root.dataset.theme); show(); });
    system.addEventListener("change", show);
    show();
    for (const table of document.querySelectorAll("table.sortable")) {
      [...table.tHead.rows[0].cells].forEach((heading, column) => {
        const name = document.createElement("button");
        name.type = "button";
        name.append(...heading.childNodes);
        name.addEventListener("click", () => sort(table, column, heading));
        heading.append(name);
        heading.setAttribute("aria-sort", "none");
      });
    }
    root.dataset.script = "ran"; // for eval.screenshots and the tests
  });
})();
