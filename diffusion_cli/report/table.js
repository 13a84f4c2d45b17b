/* The table of runs: every column sorts, by mouse, Enter or space; a run without a value comes last either way. */

function runsTable(runs, sorted) {
  const columns = [
    { title: "run", value: (run) => run.name },
    { title: "state", value: (run) => run.state },
    { title: "step", value: (run) => run.step, numeric: true },
    ...DATA.columns.map((column, i) => ({
      ...column,
      value: (run) => run.cells[i],
      numeric: runs.every((run) => run.cells[i] === null || typeof run.cells[i] === "number"),
    })),
  ];
  const rows = new Map(runs.map((run) => [run, row(run, columns)]));
  const body = el("tbody", {}, [...rows.values()]);
  const heads = columns.map((column, i) =>
    el(
      "th",
      { scope: "col", class: column.numeric ? "number" : null },
      el("button", { type: "button", title: column.key ?? null, onclick: () => sort(i) }, column.title),
    ),
  );
  let order = runs;
  function sort(i, direction) {
    const turn = direction ?? (heads[i].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    heads.forEach((head, k) => (k === i ? head.setAttribute("aria-sort", turn) : head.removeAttribute("aria-sort")));
    const sign = turn === "ascending" ? 1 : -1;
    order = [...runs].sort((a, b) => compare(columns[i].value(a), columns[i].value(b), sign));
    body.append(...order.map((run) => rows.get(run)));
    sorted(order);
  }
  const node = el(
    "div",
    { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Table of runs" },
    el("table", {}, el("caption", { class: "hush" }, "Runs; a column's button sorts by it"), el("thead", {}, el("tr", {}, heads)), body),
  );
  function filter(keeps) {
    for (const [run, each] of rows) each.hidden = !keeps(run);
  }
  function sortBy(key, direction) {
    const i = columns.findIndex((column) => column.key === key);
    sort(Math.max(0, i), i < 0 ? "ascending" : direction);
  }
  return { node, filter, sortBy };
}

function compare(a, b, sign) {
  const [noA, noB] = [a === null || a === undefined, b === null || b === undefined];
  if (noA || noB) return noA - noB;
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * String(a).localeCompare(String(b), "en", { numeric: true });
}

function row(run, columns) {
  const reason = run.reason ? el("span", { class: "reason small" }, run.reason.split("\n")[0]) : null;
  const cells = columns.slice(1).map((column) => {
    const value = column.value(run);
    if (column.title === "state" && !column.key) return el("td", {}, stateOf(run), reason);
    const best = column.kind === "figure" && isBest(column, value);
    const text = column.numeric ? number(value) : (value ?? "–");
    return el("td", { class: `${column.numeric ? "number" : ""}${best ? " best" : ""}` }, String(text), best ? el("span", { class: "hush" }, " (best)") : null);
  });
  return el("tr", {}, el("th", { scope: "row" }, el("a", { href: `#run=${DATA.runs.indexOf(run)}` }, run.name)), cells);
}

function isBest(column, value) {
  if (!column.better || value === null || DATA.runs.length < 2) return false;
  const i = DATA.columns.findIndex((each) => each.key === column.key && each.kind === column.kind);
  const all = DATA.runs.map((run) => run.cells[i]).filter((each) => each !== null);
  return all.length > 1 && value === (column.better < 0 ? Math.min(...all) : Math.max(...all));
}
