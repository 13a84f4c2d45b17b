/* Charts by ECharts, as SVG in the colours of the page; all are drawn anew when these change. */

const CHARTS = new Set();
const LINES = {
  light: ["#0a5a9c", "#c2500a", "#1c7a5a", "#a13d80", "#7a6a00", "#5b4bb0", "#2a8fb8", "#6b6f76"],
  dark: ["#84bdf3", "#f0a06a", "#74cfae", "#e297c6", "#d6c45a", "#b3a6f5", "#6fd0ee", "#b0b5bc"],
};
const RAMP = { light: ["#0a5a9c", "#3f8f8a", "#c9a227", "#c2500a"], dark: ["#84bdf3", "#7cc9b4", "#e3c86a", "#f0a06a"] };

function theme() {
  return document.documentElement.dataset.theme;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function line(i) {
  return LINES[theme()][i % LINES.light.length];
}

/* A colour of the ramp, share from 0 to 1. */
function ramp(share) {
  const stops = RAMP[theme()];
  const at = Math.min(stops.length - 1.001, Math.max(0, share) * (stops.length - 1));
  const [a, b] = [stops[Math.floor(at)], stops[Math.floor(at) + 1]];
  const mix = (i) => Math.round(parseInt(a.slice(i, i + 2), 16) * (1 - (at % 1)) + parseInt(b.slice(i, i + 2), 16) * (at % 1));
  return `rgb(${mix(1)}, ${mix(3)}, ${mix(5)})`;
}

/* A chart that lives as long as its node is on the page. option(): what ECharts draws, made anew for each theme. */
function chart(node, option, ready) {
  let drawn = null;
  const made = {
    draw() {
      if (!node.isConnected) return false;
      drawn ??= echarts.init(node, null, { renderer: "svg" });
      drawn.setOption(option(), true);
      ready?.(drawn);
      return true;
    },
    fit: () => drawn?.resize(),
    end() {
      drawn?.dispose();
      CHARTS.delete(made);
    },
  };
  CHARTS.add(made);
  return made;
}

function drawAll() {
  for (const each of [...CHARTS]) if (!each.draw()) each.end();
}

addEventListener("resize", () => CHARTS.forEach((each) => each.fit()));

function axis(more) {
  return {
    axisLine: { lineStyle: { color: colour("edge") } },
    axisLabel: { color: colour("soft"), fontSize: 12, hideOverlap: true, formatter: number },
    axisTick: { show: false },
    splitLine: { lineStyle: { color: colour("line") } },
    ...more,
  };
}

function tooltip(more) {
  return {
    backgroundColor: colour("paper"),
    borderColor: colour("edge"),
    textStyle: { color: colour("ink") },
    confine: true,
    transitionDuration: 0,
    ...more,
  };
}

/* lines: [{name, steps, values, colour: () => string, dashed}]. Says in its label what a person would see first. */
function lineChart(title, lines, more = {}) {
  const values = lines.flatMap((each) => each.values).filter((value) => value !== null);
  const positive = values.length > 0 && values.every((value) => value > 0);
  const state = { log: positive && Math.max(...values) > 30 * Math.min(...values) };
  const said = lines.slice(0, 12).map((each) => {
    const i = each.values.findLastIndex((value) => value !== null);
    return i < 0 ? `${each.name}: no values` : `${each.name}: ${number(each.values[i])} at step ${whole(each.steps[i])}`;
  });
  const node = el("div", { class: "draw", role: "img", "aria-label": `${title}. ${said.join("; ")}` });
  const many = lines.length > 12;
  const hidden = new Set();
  const option = () => ({
    animation: false,
    textStyle: { fontFamily: colour("face") },
    color: lines.map((each) => each.colour()),
    grid: { left: 8, right: 16, top: 12, bottom: 8, containLabel: true },
    legend: { show: false, selected: Object.fromEntries([...hidden].map((name) => [name, false])) },
    tooltip: tooltip({ trigger: many ? "item" : "axis", axisPointer: { lineStyle: { color: colour("edge") } }, formatter: tip }),
    xAxis: axis({ type: "value", min: "dataMin", max: "dataMax", splitLine: { show: false } }),
    yAxis: axis({ type: state.log ? "log" : "value", scale: true, axisLine: { show: false } }),
    toolbox: { feature: { dataZoom: { yAxisIndex: false, icon: { zoom: "path://", back: "path://" } } }, top: -100 },
    series: lines.map((each) => ({
      name: each.name,
      type: "line",
      showSymbol: each.steps.length === 1,
      symbolSize: 7,
      lineStyle: { width: many ? 1.2 : 2, type: each.dashed ? "dashed" : "solid" },
      emphasis: { focus: many ? "series" : "none", lineStyle: { width: 3 } },
      triggerLineEvent: many,
      data: each.steps.map((step, i) => [step, each.values[i]]),
    })),
  });
  const keys = lines.length > 1 && !many ? legend(title, lines, hidden, () => drawn.draw()) : null;
  const drawn = chart(node, option, (made) => {
    keys?.querySelectorAll(".swatch").forEach((swatch, i) => (swatch.style.background = lines[i].colour()));
    if (!matchMedia("(pointer: fine)").matches) return;
    made.dispatchAction({ type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: true });
    made.getZr().off("dblclick");
    made.getZr().on("dblclick", () => made.dispatchAction({ type: "dataZoom", start: 0, end: 100 }));
  });
  const box = el("input", {
    type: "checkbox",
    checked: state.log,
    onchange: () => {
      state.log = box.checked;
      drawn.draw();
    },
  });
  const log = el("label", {}, box, "log", el("span", { class: "hush" }, ` scale of ${title}`));
  const heading = el("h3", {}, title);
  return el(
    "div",
    { class: `chart card${more.large ? " large" : ""}` },
    el("div", { class: "row" }, more.control ?? heading, positive ? log : null),
    node,
    keys,
    lines.length ? numbers(title, lines) : null,
  );
}

/* A button for each line, that hides it and shows it again. */
function legend(title, lines, hidden, change) {
  const press = (event, name) => {
    const gone = !hidden.delete(name);
    if (gone) hidden.add(name);
    event.currentTarget.setAttribute("aria-pressed", String(!gone));
    change();
  };
  const button = (each) =>
    el("button", { type: "button", "aria-pressed": "true", onclick: (event) => press(event, each.name) }, el("span", { class: "swatch" }), each.name);
  return el("div", { class: "legend", role: "group", "aria-label": `Lines of ${title}` }, lines.map(button));
}

/* The same as a table, made when it is asked for. */
function numbers(title, lines) {
  const node = el("details", { class: "small" }, el("summary", {}, "Numbers", el("span", { class: "hush" }, ` of ${title}`)));
  node.addEventListener("toggle", () => {
    if (!node.open || node.childElementCount > 1) return;
    const steps = [...new Set(lines.flatMap((each) => each.steps))].sort((a, b) => a - b);
    const maps = lines.map((each) => new Map(each.steps.map((step, i) => [step, each.values[i]])));
    const rows = steps.map((step) => [whole(step), ...maps.map((map) => map.get(step) ?? null)]);
    node.append(plainTable(`${title}, numbers`, ["step", ...lines.map((each) => each.name)], rows));
  });
  return node;
}

function tip(found) {
  const points = [found].flat();
  if (!points.length) return "";
  return el(
    "div",
    { class: "tip" },
    el("div", { class: "soft" }, `step ${whole(points[0].value[0])}`),
    points.slice(0, 14).map((point) => {
      const swatch = el("span", { class: "swatch" });
      swatch.style.background = point.color;
      return el("div", { class: "row" }, el("span", {}, swatch, point.seriesName), el("strong", {}, number(point.value[1])));
    }),
  );
}

/* Every run a line through its settings and figures. chosen(indices or null): which lines the marked ranges leave. */
function parallelChart(columns, runs, metric, chosen) {
  const node = el("div", {
    class: "draw",
    role: "img",
    "aria-label": `Parallel coordinates of ${plural(runs.length, "run")} over ${columns.map((c) => c.title).join(", ")}. The table has the same values.`,
  });
  node.style.minWidth = `${96 * columns.length}px`;
  const at = columns.findIndex((column) => column.key === metric);
  const numbersOnly = columns.map((column) => {
    const k = DATA.columns.indexOf(column);
    return runs.every((run) => run.cells[k] === null || typeof run.cells[k] === "number");
  });
  const cells = runs.map((run) => columns.map((column) => run.cells[DATA.columns.indexOf(column)]));
  const known = at < 0 ? [] : cells.map((row) => row[at]).filter((value) => typeof value === "number");
  const better = at < 0 ? 0 : columns[at].better;
  const shade = (value) => {
    if (typeof value !== "number") return colour("edge");
    const share = known.filter((each) => each < value).length / Math.max(1, known.length - 1); // its place: one outlier takes no colours
    return ramp(better > 0 ? 1 - share : share);
  };
  const dimension = (column, i) => {
    const values = cells.map((row) => row[i]).filter((value) => value !== null);
    const numeric = numbersOnly[i];
    const spread = numeric && column.kind === "config" && Math.min(...values) > 0 && Math.max(...values) >= 20 * Math.min(...values);
    return {
      dim: i,
      z: 10, // its words above the lines
      name: column.title,
      type: numeric ? (spread ? "log" : "value") : "category",
      scale: true,
      data: numeric ? undefined : [...new Set(values.map(String))].sort(),
      nameTextStyle: { color: i === at ? colour("accent") : colour("ink"), fontSize: 12, width: 92, overflow: "truncate" },
      axisLabel: { color: colour("ink"), textBorderColor: colour("paper"), textBorderWidth: 3, fontSize: 12, width: 88, overflow: "truncate", formatter: (value) => (numeric ? number(value) : value) },
      axisLine: { lineStyle: { color: colour("edge") } },
      axisTick: { show: false },
      minorTick: { show: false },
    };
  };
  const option = () => ({
    animation: false,
    textStyle: { fontFamily: colour("face") },
    parallel: { left: 48, right: 64, top: 48, bottom: 24 },
    parallelAxis: columns.map(dimension),
    tooltip: tooltip({ trigger: "item", formatter: (found) => el("div", { class: "tip" }, found.name) }),
    series: {
      type: "parallel",
      emphasis: { lineStyle: { width: 4, opacity: 1 } },
      inactiveOpacity: 0.06,
      activeOpacity: 0.9,
      lineStyle: { width: runs.length > 40 ? 1.4 : 2.4, opacity: 0.9 },
      data: runs.map((run, k) => ({
        name: run.name,
        value: cells[k].map((value, i) => (value === null ? "-" : numbersOnly[i] ? value : String(value))),
        lineStyle: { color: shade(cells[k][at]) },
      })),
    },
  });
  chart(node, option, (made) => {
    made.off("axisareaselected");
    made.on("axisareaselected", () => {
      const series = made.getModel().getSeriesByIndex(0);
      const active = series.getRawIndicesByActiveState("active");
      chosen(active.length || series.getRawIndicesByActiveState("inactive").length ? active : null);
    });
  });
  return el("div", { class: "card parallel", tabindex: 0, role: "region", "aria-label": "Parallel coordinates" }, node);
}
