/* Which view is shown follows the address: #runs, #run=3, #compare=1,4. So the browser's way back works, and a view can be told. */

const MAIN = document.getElementById("main");
const THEME = document.getElementById("theme");

function route() {
  const count = DATA.runs.length;
  const index = (text, otherwise) => (/^\d+$/.test(text ?? "") && Number(text) < count ? Number(text) : otherwise);
  const [view, rest] = location.hash.slice(1).split("=");
  const [a, b] = (rest ?? "").split(",");
  if (count === 1 || view === "run") return { view: "run", make: () => ({ node: runView(index(a, 0)) }) };
  if (view === "compare") {
    const [left, right] = rest ? [index(a, 0), index(b, 1)] : bestTwo();
    return { view: "compare", make: () => ({ node: compareView(left, right) }) };
  }
  return { view: "runs", make: overview };
}

/* The two runs that are worth a look first: the best by the page's figure, of those that have samples. */
function bestTwo() {
  const column = DATA.columns.findIndex((each) => each.key === DATA.metric);
  const sign = DATA.columns[column]?.better > 0 ? -1 : 1;
  const having = DATA.runs.filter((run) => run.previews.samples);
  const ranked = having.toSorted((a, b) => compare(a.cells[column], b.cells[column], sign)).map((run) => DATA.runs.indexOf(run));
  return ranked.length > 1 ? ranked.slice(0, 2) : [0, 1];
}

function show(moved) {
  if (location.hash === "#main") return; // the link that skips to the content
  const focused = document.activeElement?.closest("label.field")?.firstChild?.textContent;
  const { view, make } = route();
  const { node, start } = make();
  MAIN.replaceChildren(node);
  start?.();
  for (const link of document.querySelectorAll("#views a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  drawAll();
  if (!moved) return;
  const again = [...MAIN.querySelectorAll("label.field")].find((label) => focused && label.firstChild.textContent === focused);
  if (again) again.querySelector("select, input").focus(); // a choice keeps the focus that it had
  else {
    scrollTo(0, 0);
    MAIN.focus({ preventScroll: true });
  }
}

function dress(name) {
  document.documentElement.dataset.theme = name;
  THEME.textContent = name === "dark" ? "Light" : "Dark";
  THEME.setAttribute("aria-label", name === "dark" ? "Light colours" : "Dark colours");
}

function remembered() {
  try {
    return localStorage.getItem("diffusion-report-theme");
  } catch {
    return null; // a browser that keeps nothing for files
  }
}

const DARK = matchMedia("(prefers-color-scheme: dark)");
dress(remembered() ?? (DARK.matches ? "dark" : "light"));
DARK.addEventListener("change", () => {
  if (remembered() === null) {
    dress(DARK.matches ? "dark" : "light");
    drawAll();
  }
});
THEME.addEventListener("click", () => {
  const name = theme() === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("diffusion-report-theme", name);
  } catch {
    // then for this page alone
  }
  dress(name);
  drawAll();
});

if (DATA.runs.length > 1) {
  const views = [["runs", "All runs"], ["run", "One run"], ["compare", "Side by side"]];
  document.getElementById("views").append(...views.map(([view, text]) => el("a", { href: `#${view}`, "data-view": view }, text)));
}
addEventListener("hashchange", () => show(true));
show(false);
