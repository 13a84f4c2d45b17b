/* One run: its samples over training, its figures and how they were made, its curves, what was generated, its config. */

function runView(index) {
  const run = DATA.runs[index];
  const figures = DATA.columns.map((column, i) => [column, run.cells[i]]).filter(([column]) => column.kind === "figure");
  return el(
    "section",
    { "aria-labelledby": "title" },
    el(
      "div",
      { class: "lead" },
      el("h1", { id: "title" }, run.name),
      el("p", { class: "facts" }, stateOf(run), el("span", {}, stepsOf(run)), run.time ? el("span", {}, when(run.time)) : null),
      run.reason ? el("p", { class: "note bad" }, run.reason) : null,
      run.problems.map((problem) => el("p", { class: "note small" }, problem)),
      DATA.runs.length > 1 ? picker(index) : null,
    ),
    el(
      "div",
      { class: "viewer" },
      viewer(run),
      el(
        "div",
        { class: "block" },
        figures.length ? [el("h2", {}, "Figures"), list(figures.map(([column, value]) => [column.title, number(value)]))] : null,
        el("h2", {}, "Made of"),
        list(parts(run)),
      ),
    ),
    charts(run),
    run.evaluated.length ? block("Evaluated", 2, run.evaluated.map(evaluation)) : null,
    run.generated.length ? block("Generated", 2, el("div", { class: "gallery" }, run.generated.map(generated))) : null,
    config(run, index),
  );
}

function when(time) {
  return time.replace("T", " ").replace(/([+-]\d\d:?\d\d|Z)$/, "").slice(0, 16);
}

function picker(index) {
  const options = DATA.runs.map((run, i) => [i, run.name]);
  const go = (i) => (location.hash = `run=${i}`);
  return el(
    "div",
    { class: "controls" },
    select("Run", options, index, go),
    el("button", { type: "button", disabled: index === 0, onclick: () => go(index - 1) }, "Previous"),
    el("button", { type: "button", disabled: index === DATA.runs.length - 1, onclick: () => go(index + 1) }, "Next"),
  );
}

function viewer(run) {
  const kinds = Object.keys(run.previews).sort((a, b) => order(a) - order(b));
  if (!kinds.length) return el("p", { class: "soft" }, "No samples yet.");
  const image = el("img", {});
  const place = el("div", {});
  function show(kind) {
    const stills = run.previews[kind];
    place.replaceChildren(
      slider(stepsIn([run], kind), (step) => {
        const still = stills.find((each, i) => (each.step ?? i) === step);
        image.src = still.src;
        image.width = still.width;
        image.height = still.height;
        image.alt = `${kindOf(kind)} of ${run.name}${at(still)}`;
      }),
    );
  }
  show(kinds[0]);
  return el(
    "div",
    { class: "stage" },
    kinds.length > 1 ? segments("Pictures", kinds.map((kind) => [kind, kindOf(kind)]), kinds[0], show) : null,
    place,
    el("figure", {}, image),
  );
}

function order(kind) {
  const i = Object.keys(KINDS).indexOf(kind);
  return i < 0 ? 99 : i;
}

/* The objects that the run was composed of. */
function parts(run) {
  return Object.entries(run.config)
    .filter(([key]) => /^\w+\._target_$/.test(key))
    .map(([key, value]) => [key.split(".")[0], value]);
}

/* loss_by_noise/t_0.0_to_0.1 -> loss_by_noise: curves that stand in one chart. */
function groupOf(tag) {
  if (tag.startsWith("loss_by_noise/")) return "loss_by_noise";
  return tag.split("/").length > 2 ? tag.slice(0, tag.lastIndexOf("/")) : null;
}

function levelOf(tag) {
  return tag.slice(tag.lastIndexOf("/") + 1).replace(/^t_/, "").replace("_to_", "–").replaceAll("_", " ");
}

const FIRST_CURVES = ["train/loss", "evaluate/x0_mse", "loss_by_noise"];

function charts(run) {
  const groups = Object.groupBy(Object.keys(run.curves), (tag) => groupOf(tag) ?? tag);
  const names = Object.keys(groups).sort((a, b) => rank(FIRST_CURVES, a) - rank(FIRST_CURVES, b));
  if (!names.length) return null;
  const drawn = names.map((name) => {
    const tags = groups[name];
    const lines = tags.map((tag, i) => ({
      name: tags.length > 1 ? levelOf(tag) : titleOf(tag),
      ...run.curves[tag],
      colour: () => (tags.length > 1 ? ramp(i / (tags.length - 1)) : line(0)),
    }));
    return lineChart(titleOf(name), lines);
  });
  const hint = el("p", { class: "soft small" }, "Drag across a chart to enlarge a part of it, double-click to go back.");
  return block("Curves", 2, hint, el("div", { class: "charts" }, drawn));
}

function rank(first, name) {
  const i = first.indexOf(name);
  return i >= 0 ? i : name.startsWith("evaluate") ? first.length : first.length + 1;
}

function evaluation(file) {
  const rows = Object.entries(file.figures).map(([name, figure]) => {
    const error = figure.error === null || figure.error === undefined ? "" : ` ± ${number(figure.error)}`;
    return [name.replaceAll("_", " "), number(figure.value) + error, figure.error === null ? "" : String(figure.of ?? "")];
  });
  return el("div", { class: "block" }, plainTable(`Figures of ${file.name}`, ["figure", "value", "error is the"], rows), how(file.made, file.name));
}

function how(facts, name) {
  const text = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : String(value));
  return el(
    "details",
    { class: "small" },
    el("summary", {}, "How these were made", el("span", { class: "hush" }, `: ${name}`)),
    list(Object.entries(facts).map(([key, value]) => [key, text(value)])),
  );
}

function generated(made) {
  const picture = made.picture && el("img", { src: made.picture.src, width: made.picture.width, height: made.picture.height, alt: `Generated pictures: ${made.name}` });
  return el("figure", { class: "card" }, picture, el("figcaption", {}, made.name), how(made.facts, made.name));
}

/* Where this run differs from the others, what they have there, and everything, folded. */
function config(run, index) {
  const rows = DATA.runs.length > 1 ? differences(index) : [];
  const yaml = el("details", {}, el("summary", {}, "The whole config"), el("div", { class: "scroll" }, el("pre", { tabindex: 0 }, run.yaml)));
  return block(
    "Config",
    2,
    rows.length ? plainTable("Settings in which runs differ", ["setting", "this run", "the others"], rows) : null,
    run.yaml ? yaml : el("p", { class: "soft" }, "This run has no config."),
  );
}

function differences(index) {
  const others = DATA.runs.filter((other, i) => i !== index && Object.keys(other.config).length);
  const own = DATA.runs[index].config;
  const keys = new Set([own, ...others.map((other) => other.config)].flatMap(Object.keys));
  const rows = [];
  for (const key of keys) {
    if (key === "name" || key === "outputs") continue;
    const counts = new Map();
    for (const other of others) counts.set(other.config[key] ?? "–", (counts.get(other.config[key] ?? "–") ?? 0) + 1);
    if (counts.size === 1 && counts.has(own[key] ?? "–")) continue;
    const said = [...counts].sort((a, b) => b[1] - a[1]);
    const text = said.slice(0, 4).map(([value, count]) => (others.length > 1 ? `${value} (${count})` : value));
    rows.push([key.replace("._target_", ""), own[key] ?? "–", text.join(", ") + (said.length > 4 ? " ..." : "")]);
  }
  return rows;
}
