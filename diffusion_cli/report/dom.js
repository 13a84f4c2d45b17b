"use strict";
/* Elements and words. Text is always set as text, so that no name of a run can become markup. */

const DATA = JSON.parse(document.getElementById("data").textContent);
const CALM = matchMedia("(prefers-reduced-motion: reduce)");

/* el("p", {class: "soft", onclick: f}, "text", child, null): attributes that are null or false are left out, children too. */
function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function block(title, level, ...children) {
  return el("section", { class: "block" }, el("header", {}, el(`h${level}`, {}, title)), ...children);
}

function plural(count, word) {
  return `${whole(count)} ${word}${count === 1 ? "" : "s"}`;
}

function whole(value) {
  return value === null || value === undefined ? "" : value.toLocaleString("en-GB");
}

/* 0.37207 -> 0.3721, 403.9 -> 403.9, 0.00001 -> 1e-5 */
function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return whole(value);
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e7) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return size >= 1000 ? whole(Math.round(value)) : String(Number(value.toPrecision(4)));
}

function stateOf(run) {
  const known = ["finished", "running", "preempted", "failed"].includes(run.state) ? run.state : "";
  return el("span", { class: `state ${known}` }, run.state);
}

function stepsOf(run) {
  if (run.step === null) return "";
  return run.total !== null && run.total !== run.step ? `step ${whole(run.step)} of ${whole(run.total)}` : plural(run.step, "step");
}

const TAGS = {
  "train/loss": "Training loss",
  "evaluate/x0_mse": "Held-out error",
  "evaluate_on_train/x0_mse": "Error on training pictures",
  "evaluate/cross_entropy": "Held-out cross-entropy",
  "train/learning_rate": "Learning rate",
  "train/gradient_norm": "Gradient norm",
  "speed/images_per_second": "Images per second",
  loss_by_noise: "Training loss by noise level t",
  "evaluate/x0_mse_by_log_snr": "Held-out error by log-SNR",
};

function titleOf(tag) {
  return TAGS[tag] ?? tag.replace(/^evaluate\//, "held-out ").replaceAll("_", " ").replaceAll("/", " ");
}

const KINDS = { samples: "Samples", steps: "From noise to picture", denoised: "Denoised" };

function kindOf(kind) {
  return KINDS[kind] ?? kind.replaceAll("_", " ");
}

/* The newest of the stills at or before a step; the first where none is. */
function stillAt(stills, step) {
  return stills.findLast((still) => still.step === null || still.step <= step) ?? stills[0];
}

function stepsIn(runs, kind) {
  const steps = runs.flatMap((run) => (run.previews[kind] ?? []).map((still, i) => still.step ?? i));
  return [...new Set(steps)].sort((a, b) => a - b);
}

/* A slider over steps with a button that plays them. change(step) is called at once and at every move. */
function slider(steps, change) {
  const output = el("output", {});
  const input = el("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), value: steps.length - 1 });
  const play = el("button", { type: "button", "aria-pressed": "false" }, "Play");
  let timer = null;
  function show() {
    const step = steps[Number(input.value)];
    output.textContent = whole(step);
    input.setAttribute("aria-valuetext", `step ${whole(step)}`);
    change(step);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    play.setAttribute("aria-pressed", "false");
  }
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(input.value) === steps.length - 1) input.value = 0;
    show();
    play.textContent = "Pause";
    play.setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      if (!input.isConnected || Number(input.value) >= steps.length - 1) return stop();
      input.value = Number(input.value) + 1;
      show();
    }, CALM.matches ? 1500 : 600);
  });
  input.addEventListener("input", () => {
    stop();
    show();
  });
  const label = el("label", { class: "field" }, el("span", { class: "row" }, "Training step", output), input);
  const node = el("div", { class: "slider", hidden: steps.length < 2 }, label, play);
  show();
  return node;
}

function select(label, options, chosen, change) {
  const node = el("select", { onchange: () => change(node.value) });
  node.append(...options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text)));
  return el("label", { class: "field" }, label, node);
}

/* One of a few, as radio buttons. */
function segments(legend, options, chosen, change) {
  const name = `segments-${legend.replaceAll(" ", "-")}`;
  return el(
    "fieldset",
    { class: "segments" },
    el("legend", { class: "hush" }, legend),
    options.map(([value, text]) =>
      el(
        "label",
        {},
        el("input", { type: "radio", name, value, checked: value === chosen, onchange: () => change(value) }),
        el("span", {}, text),
      ),
    ),
  );
}

function list(pairs) {
  return el("dl", {}, pairs.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))));
}

/* A table of plain rows; the first cell of each is its header. Numbers stand to the right. */
function plainTable(caption, head, rows) {
  const right = head.map((_, i) => i > 0 && rows.every((row) => typeof row[i] === "number" || row[i] === null));
  const cell = (row) => (value, i) => {
    const at = { class: right[i] ? "number" : null };
    return i ? el("td", at, right[i] ? number(value) : (value ?? "–")) : el("th", { scope: "row" }, value);
  };
  return el(
    "div",
    { class: "scroll tall", tabindex: 0, role: "region", "aria-label": caption },
    el(
      "table",
      { class: "plain" },
      el("caption", { class: "hush" }, caption),
      el("thead", {}, el("tr", {}, head.map((text, i) => el("th", { scope: "col", class: right[i] ? "number" : null }, text)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell(row))))),
    ),
  );
}
