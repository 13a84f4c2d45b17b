/* Two runs side by side: the same step of the same previews, their figures, the settings that differ, their curves in one. */

function compareView(a, b) {
  const pair = [DATA.runs[a], DATA.runs[b]];
  const options = DATA.runs.map((run, i) => [i, run.name]);
  const go = (left, right) => (location.hash = `compare=${left},${right}`);
  return el(
    "section",
    { "aria-labelledby": "title" },
    el(
      "div",
      { class: "lead" },
      el("h1", { id: "title" }, "Side by side"),
      el(
        "div",
        { class: "controls" },
        select("Left", options, a, (i) => go(i, b)),
        select("Right", options, b, (i) => go(a, i)),
        el("button", { type: "button", onclick: () => go(b, a) }, "Swap"),
      ),
      el("p", { class: "soft small" }, sameNoise(pair)),
    ),
    pictures(pair),
    block("Figures", 2, figuresOf(pair)),
    block("Settings that differ", 2, settingsOf(pair)),
    together(pair),
  );
}

function sameNoise(pair) {
  const same = ["seed", "trainer.preview", "dataset.size", "dataset.channels"].every((key) => pair[0].config[key] === pair[1].config[key]);
  return same
    ? "Same seed and number of previews: both begin with the same noise, so picture compares with picture."
    : "The seeds or previews differ: the pictures begin with different noise.";
}

function pictures(pair) {
  const kinds = Object.keys(KINDS).filter((kind) => pair.some((run) => run.previews[kind]));
  if (!kinds.length) return el("p", { class: "soft" }, "Neither has samples.");
  const place = el("div", {});
  const stage = el("div", { class: "pair" });
  function show(kind) {
    const steps = stepsIn(pair, kind);
    place.replaceChildren(slider(steps, (step) => stage.replaceChildren(...pair.map((run) => still(run, kind, step)))));
  }
  show(kinds[0]);
  return el("div", { class: "block" }, kinds.length > 1 ? segments("Pictures", kinds.map((kind) => [kind, kindOf(kind)]), kinds[0], show) : null, place, stage);
}

function still(run, kind, step) {
  const stills = run.previews[kind];
  const found = stills && stillAt(stills, step);
  return el(
    "figure",
    {},
    el("h2", {}, el("a", { href: `#run=${DATA.runs.indexOf(run)}` }, run.name)),
    found
      ? el("img", { src: found.src, width: found.width, height: found.height, alt: `${kindOf(kind)} of ${run.name}${at(found)}` })
      : el("p", { class: "soft" }, "None."),
    found && found.step !== null ? el("figcaption", {}, `step ${whole(found.step)}`) : null,
  );
}

function figuresOf(pair) {
  const rows = DATA.columns
    .map((column, i) => [column, ...pair.map((run) => run.cells[i])])
    .filter(([column, left, right]) => column.kind === "figure" && (left !== null || right !== null))
    .map(([column, left, right]) => [column.title, number(left), number(right), change(left, right)]);
  return plainTable("Figures of both runs", ["figure", "left", "right", "right against left"], rows);
}

function change(left, right) {
  if (left === null || right === null || !left) return "";
  const percent = (100 * (right - left)) / Math.abs(left);
  return `${percent > 0 ? "+" : percent < 0 ? "−" : ""}${Number(Math.abs(percent).toPrecision(3))} %`;
}

function settingsOf(pair) {
  const keys = [...new Set(pair.flatMap((run) => Object.keys(run.config)))].filter((key) => key !== "name" && key !== "outputs");
  const rows = keys
    .filter((key) => pair[0].config[key] !== pair[1].config[key])
    .map((key) => [key.replace("._target_", ""), ...pair.map((run) => run.config[key] ?? "–")]);
  return rows.length ? plainTable("Settings that differ", ["setting", "left", "right"], rows) : el("p", { class: "soft" }, "None.");
}

function together(pair) {
  const tags = curveTags().filter((tag) => pair.some((run) => run.curves[tag])).sort((a, b) => rank(FIRST_CURVES, a) - rank(FIRST_CURVES, b));
  if (!tags.length) return null;
  const drawn = tags.map((tag) => {
    const lines = pair.map((run, i) => ({ name: run.name, ...(run.curves[tag] ?? { steps: [], values: [] }), colour: () => line(i), dashed: i === 1 }));
    return lineChart(titleOf(tag), lines);
  });
  return block("Curves", 2, el("div", { class: "charts" }, drawn));
}
