"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);
const element = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  made.append(...children);
  return made;
};
const breakable = (name) => name.split(/(?<=_)/).flatMap((part) => [part, element("wbr")]);
const data = JSON.parse(one("#data-of-runs")?.textContent ?? "{}");

/* Sorting: a heading's first click sorts upwards; empty cells stay last. */
function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, i) => one(".sort", head)?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows], value = (row) => row.cells[i].dataset.value;
    const numeric = rows.every((row) => value(row) === undefined || !Number.isNaN(Number(value(row))));
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const order = numeric ? x - y : x.localeCompare(y);
      return down ? -order : order;
    }).forEach((row) => body.append(row));
  }));
}

/* The filter hides every row, sentence and picture of the runs that it leaves out, wherever they stand on the page. */
function filter() {
  const form = one("#filter"), badge = one(".filtered");
  if (!form) return;
  const words = one("input[type=search]", form), boxes = all("[name=role]", form);
  const show = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const roles = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const shown = new Set(data.runs.filter((run) => {
      const text = `${run.label} ${run.role} ${run.router} ${run.description}`.toLowerCase();
      return (!boxes.length || roles.has(run.role)) && wanted.every((word) => text.includes(word));
    }).map((run) => run.label));
    all("[data-run]").forEach((part) => { part.hidden = !shown.has(part.dataset.run); });
    badge.hidden = shown.size === data.runs.length;
    one("span", badge).textContent = shown.size
      ? `${shown.size} of ${data.runs.length} runs shown` : "No run fits the filter";
    fold();
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  one("button", badge).addEventListener("click", () => {
    words.value = "";
    boxes.forEach((box) => { box.checked = true; });
    show();
    words.focus({preventScroll: true});
  });
  form.hidden = false;
  show();
}

/* Long rows of pictures show the first ones; a button brings the others. */
const FOLDED = 8;
function fold() {
  all(".figures.foldable").forEach((figures) => {
    const chosen = all("figure", figures).filter((figure) => !figure.hidden);
    const open = figures.dataset.open !== undefined;
    all("figure", figures).forEach((figure) => figure.classList.remove("folded"));
    chosen.slice(FOLDED).forEach((figure) => figure.classList.toggle("folded", !open));
    const button = figures.nextElementSibling;
    button.hidden = chosen.length <= FOLDED;
    button.textContent = open ? "Show fewer" : `Show all ${chosen.length}`;
    button.setAttribute("aria-expanded", open);
    button.onclick = () => {
      if (open) delete figures.dataset.open; else figures.dataset.open = "";
      fold();
    };
  });
}

/* Definitions open in a dialog; without this script the link leads to the list of definitions. */
function definitions() {
  const dialog = one("#definition");
  if (!dialog) return;
  const body = one("div", dialog), link = one("a", dialog);
  all(".what").forEach((what) => {
    what.setAttribute("role", "button");
    what.setAttribute("aria-haspopup", "dialog");
    const open = (event) => {
      const source = one(what.getAttribute("href"));
      if (!source) return;
      event.preventDefault();
      const title = element("h2", {id: "definition-title"}, one("summary", source).textContent);
      body.replaceChildren(title, ...[...source.children].slice(1).map((child) => child.cloneNode(true)));
      link.href = what.getAttribute("href");
      dialog.showModal();
    };
    what.addEventListener("click", open);
    what.addEventListener("keydown", (event) => { if (event.key === " ") open(event); });
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  link.addEventListener("click", () => { dialog.close(); openTarget(link.hash); });
}

function openTarget(hash) {
  const target = hash.length > 1 ? document.getElementById(decodeURIComponent(hash.slice(1))) : null;
  if (target?.tagName === "DETAILS") target.open = true;
}

/* The navigation marks the section that is being read. */
function navigation() {
  const links = new Map(all(".sections a").map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const observer = new IntersectionObserver((entries) => {
    entries.forEach(({target, isIntersecting}) => (isIntersecting ? seen.add(target.id) : seen.delete(target.id)));
    const current = [...links.keys()].find((id) => seen.has(id));
    if (!current) return;
    links.forEach((link, id) => (id === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
    const list = one(".sections ul"), link = links.get(current);
    list.scrollLeft = link.offsetLeft - (list.clientWidth - link.offsetWidth) / 2;
  }, {rootMargin: "-15% 0px -60% 0px"});
  links.forEach((link, id) => { const section = document.getElementById(id); if (section) observer.observe(section); });
}

/* Two runs side by side. Differences are the first run's value less the second's. */
const UNITS = {"%": {scale: 100, name: " points"}, M: {scale: 1e-6, name: " M"}};
const signed = (value, digits) => {
  const text = Math.abs(value).toFixed(digits);
  return `${Number(text) === 0 ? "" : value < 0 ? "−" : "+"}${text.replace(/\B(?=(\d{3})+(?!\d|.*\.))/g, ",")}`;
};

function difference(a, b) {
  if (a.value === null || b.value === null) return "–";
  const digits = Math.max(...[a, b].map(({text}) => (text.match(/\.(\d+)/)?.[1] ?? "").length));
  const {scale, name} = UNITS[a.text.at(-1)] ?? {scale: 1, name: ""};
  return signed((a.value - b.value) * scale, digits) + name;
}

function lead(first, second) {
  if (first === second) return null;
  const [i, j] = first < second ? [first, second] : [second, first];
  const found = data.pairs.leads[i][j - i - 1];
  if (!found) return null;
  const [value, low, high, over] = found;
  const where = data.pairs.over[over];
  return first < second ? {value, low, high, where} : {value: -value, low: -high, high: -low, where};
}

function sentence(one_, other, gap) {
  if (!gap) return ["caution", `The losses of ${one_.label} and ${other.label} cannot be compared: no seed finished in both with a finite loss, or their tokenizers differ.`];
  const bounds = `bootstrap interval of the difference [${signed(gap.low, 3)}, ${signed(gap.high, 3)}] over ${where(gap)}`;
  const size = `${Math.abs(gap.value).toFixed(3)} nats per token`;
  const causal = [one_, other].filter((run) => !run.causal).map((run) => ` ${run.label} is not causal: its loss is not one of a language model.`).join("");
  if (gap.low <= 0 && gap.high >= 0) return ["caution", `Within noise: the losses differ by ${size}, ${bounds}.${causal}`];
  const [better, worse] = gap.value < 0 ? [one_, other] : [other, one_];
  return ["good", `${better.label} is better: its loss is ${size} below that of ${worse.label}, ${bounds}.${causal}`];
}

const where = (gap) => gap.where + (gap.where === "seeds" ? "" : " (one seed: the noise of training is not in it)");

function cell(content) {
  return element("td", {}, content.text, ...(content.note ? [element("span", {class: "note"}, content.note)] : []));
}

function tableOf(caption, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => element("th", {scope: "col"}, ...breakable(text))));
  const table = element("table", {}, element("caption", {class: "sr"}, caption), element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", {class: "scroll"}, table);
}

function domainRows(first, second) {
  const differences = data.domains.map((_, d) =>
    first.domains[d] === null || second.domains[d] === null ? null : first.domains[d] - second.domains[d]);
  const bound = Math.max(1e-9, ...differences.filter((value) => value !== null).map(Math.abs));
  return data.domains.map((domain, d) => {
    const value = differences[d], bar = element("i", {class: value < 0 ? "lower" : "higher"});
    bar.style.width = `${(50 * Math.abs(value ?? 0)) / bound}%`;
    const losses = [first, second].map((run) => element("td", {}, run.domains[d]?.toFixed(3) ?? "–"));
    const shown = element("td", {}, value === null ? "–" : signed(value, 3));
    return element("tr", {}, element("th", {scope: "row"}, domain), ...losses, shown,
      element("td", {"aria-hidden": "true"}, element("span", {class: "diverging"}, bar)));
  });
}

function pairwise() {
  const section = one("#compare");
  if (!section) return;
  const [left, right] = all("select", section), verdict = one(".headline", section);
  const index = (label) => data.runs.findIndex((run) => run.label === label);
  const show = () => {
    const [i, j] = [left, right].map((select) => index(select.value));
    const [first, second] = [data.runs[i], data.runs[j]];
    const [tone, text] = i === j ? ["caution", "Choose two different runs."] : sentence(first, second, lead(i, j));
    verdict.className = `headline ${tone}`;
    verdict.textContent = text;
    const heads = [first.label, second.label, "difference"];
    const rows = data.metrics.map((name, m) => element("tr", {}, element("th", {scope: "row"}, name),
      cell(first.cells[m]), cell(second.cells[m]), element("td", {}, difference(first.cells[m], second.cells[m]))));
    one(".pair-tables", section).replaceChildren(
      tableOf("Metrics of the two runs", ["", ...heads], rows),
      tableOf("Loss by domain of the two runs", ["Domain", ...heads, ""], domainRows(first, second)));
    const maps = [first, second].map((run) => one(`#routing figure[data-run="${CSS.escape(run.label)}"]`)).map((figure, n) => {
      if (!figure) return element("p", {class: "quiet"}, `${[first, second][n].label} has no picture of its experts.`);
      const copy = figure.cloneNode(true);
      copy.hidden = false;
      copy.removeAttribute("data-run");
      copy.classList.remove("folded");
      one("img", copy).loading = "eager";
      return copy;
    });
    one(".pair-maps", section).replaceChildren(...maps);
  };
  const read = () => {
    const found = new URLSearchParams(location.hash.slice(1));
    if (index(found.get("compare")) < 0 || index(found.get("with")) < 0) return false;
    [left.value, right.value] = [found.get("compare"), found.get("with")];
    return true;
  };
  [left, right].forEach((select) => select.addEventListener("change", () => {
    history.replaceState(null, "", `#compare=${left.value}&with=${right.value}`);
    section.classList.remove("screen");
    show();
  }));
  const follow = () => {
    if (!read()) return;
    section.classList.remove("screen");
    show();
    section.scrollIntoView();
  };
  window.addEventListener("hashchange", follow);
  section.hidden = false;
  show();
  follow();
}

all("table.sortable").forEach(sortable);
filter();
fold();
definitions();
navigation();
pairwise();
window.addEventListener("hashchange", () => openTarget(location.hash));
window.addEventListener("beforeprint", () => all("img[loading]").forEach((image) => { image.loading = "eager"; }));
openTarget(location.hash);
