/* All runs: a wall of samples under one slider, the table, parallel coordinates and one curve of each. */

const FIRST = 12; // pictures of the wall before it is asked for more

function overview() {
  const state = { order: DATA.runs, text: "", run: "", marked: null, all: false, step: Infinity };
  const keeps = (run) =>
    (!state.run || run.state === state.run) &&
    (!state.marked || state.marked.has(run)) &&
    state.text.split(/\s+/).every((word) => haystack(run).includes(word));
  const count = el("p", { class: "small soft", role: "status" });
  const wall = el("div", { class: "wall" });
  wall.style.setProperty("--least", DATA.runs.length > 8 ? "170px" : DATA.runs.length % 4 ? "280px" : "240px"); // whole rows
  const more = el("button", { type: "button", onclick: () => ((state.all = true), showWall()) });
  const curves = el("div", {});
  const table = runsTable(DATA.runs, (order) => {
    state.order = order;
    showWall();
  });
  let tag = curveTags()[0];

  function showWall() {
    const shown = state.order.filter(keeps);
    const few = state.all ? shown : shown.slice(0, FIRST);
    wall.replaceChildren(...few.map((run) => brick(run, state.step)));
    more.hidden = few.length === shown.length;
    more.textContent = `Show all ${shown.length}`;
  }
  function showCurves() {
    curves.replaceChildren(curvesOf(DATA.runs.filter(keeps), tag, (chosen) => ((tag = chosen), showCurves())));
    drawAll();
  }
  function change() {
    table.filter(keeps);
    const shown = DATA.runs.filter(keeps).length;
    count.textContent = shown === DATA.runs.length ? plural(shown, "run") : `${shown} of ${plural(DATA.runs.length, "run")}`;
    showWall();
    showCurves();
  }
  const steps = stepsIn(DATA.runs, "samples");
  const metric = DATA.columns.find((column) => column.key === DATA.metric);
  const node = el(
    "section",
    { "aria-labelledby": "title" },
    el("div", { class: "lead" }, el("h1", { id: "title" }, DATA.title), summary(metric)),
    steps.length
      ? block("Samples", 2, slider(steps, (step) => ((state.step = step), showWall())), wall, el("div", {}, more))
      : null,
    block("Runs", 2, filters(state, change, count), table.node),
    DATA.columns.length > 1
      ? block(
          "Settings and figures",
          2,
          el("p", { class: "soft small" }, `${coloured(metric)}Drag along an axis to keep the runs that pass there; click the axis to let them all back.`),
          parallelChart(DATA.columns, DATA.runs, DATA.metric, (marked) => {
            state.marked = marked && new Set(marked.map((i) => DATA.runs[i]));
            change();
          }),
        )
      : null,
    tag ? block("Curves", 2, curves) : null,
  );
  return {
    node,
    start() {
      table.sortBy(DATA.metric, metric?.better > 0 ? "descending" : "ascending");
      change();
    },
  };
}

function coloured(metric) {
  return metric ? `Coloured by ${metric.title}${metric.better ? ", blue is best" : ""}. ` : "";
}

function summary(metric) {
  const states = Object.entries(Object.groupBy(DATA.runs, (run) => run.state)).map(([state, runs]) => `${runs.length} ${state}`);
  const at = DATA.columns.indexOf(metric);
  const known = metric ? DATA.runs.filter((run) => run.cells[at] !== null) : [];
  const best = known.toSorted((a, b) => (metric.better > 0 ? -1 : 1) * (a.cells[at] - b.cells[at]))[0];
  const link = best && el("a", { href: `#run=${DATA.runs.indexOf(best)}` }, best.name);
  return el(
    "p",
    { class: "soft" },
    `${plural(DATA.runs.length, "run")}: ${states.join(", ")}. `,
    ...(best && metric.better ? [`Best ${metric.title}: ${number(best.cells[at])}, `, link, "."] : []),
  );
}

const HAYSTACKS = new WeakMap();

/* Every word of a run that a filter can find: its name, state, settings and figures, "lr=0.001" among them. */
function haystack(run) {
  if (!HAYSTACKS.has(run)) {
    const cells = DATA.columns.map((column, i) => `${column.title}=${run.cells[i] ?? ""} ${column.key}=${run.cells[i] ?? ""}`);
    HAYSTACKS.set(run, [run.name, run.state, run.reason, ...cells].join(" ").toLowerCase());
  }
  return HAYSTACKS.get(run);
}

function filters(state, change, count) {
  const search = el("input", {
    type: "search",
    placeholder: "cosine lr=0.001",
    oninput: () => {
      state.text = search.value.trim().toLowerCase();
      change();
    },
  });
  const states = [...new Set(DATA.runs.map((run) => run.state))];
  return el(
    "div",
    { class: "controls" },
    el("label", { class: "field wide" }, "Filter by words of name, settings or figures", search),
    states.length > 1
      ? select("State", [["", "all"], ...states.map((each) => [each, each])], "", (chosen) => ((state.run = chosen), change()))
      : null,
    count,
  );
}

function brick(run, step) {
  const stills = run.previews.samples;
  const href = `#run=${DATA.runs.indexOf(run)}`;
  const still = stills && stillAt(stills, step);
  const metric = DATA.columns.findIndex((column) => column.key === DATA.metric);
  const figure = metric < 0 || run.cells[metric] === null ? "" : `${DATA.columns[metric].title} ${number(run.cells[metric])}`;
  return el(
    "figure",
    {},
    still
      ? el("img", { src: still.src, width: still.width, height: still.height, alt: `Samples of ${run.name}${at(still)}` })
      : el("div", { class: "empty" }, run.reason.split("\n")[0] || `no samples (${run.state})`),
    el("figcaption", {}, el("a", { href }, run.name), el("br"), figure || stateOf(run)),
  );
}

function at(still) {
  return still.step === null ? "" : ` at step ${whole(still.step)}`;
}

function curveTags() {
  const tags = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.curves)))].filter((tag) => !groupOf(tag));
  return tags.sort((a, b) => (b === "train/loss") - (a === "train/loss"));
}

/* One curve of every run: a colour each where they are few, else by their place in the order of the figure. */
function curvesOf(runs, tag, change) {
  const metric = DATA.columns.findIndex((column) => column.key === DATA.metric);
  const having = runs.filter((run) => run.curves[tag]);
  const ranked = having.toSorted((a, b) => compare(a.cells[metric], b.cells[metric], 1));
  const place = new Map(ranked.map((run, i) => [run, i / Math.max(1, ranked.length - 1)]));
  const lines = having.map((run, i) => ({
    name: run.name,
    ...run.curves[tag],
    colour: () => (having.length > 8 ? ramp(place.get(run)) : line(i)),
  }));
  const control = select("Curve", curveTags().map((each) => [each, titleOf(each)]), tag, change);
  return lineChart(titleOf(tag), lines, { large: true, control });
}
