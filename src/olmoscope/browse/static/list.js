// The list of features, page by page, with sorting, filters and search.

import {LIST_KEYS, go, listPart, note, to} from "./address.js";
import {chip, count, h, percent, plain, say, short} from "./dom.js";
import {source} from "./source.js";

const PAGE = 50;
const COLUMNS = [
  {name: "Feature", sort: "feature", first: "false"},
  {name: "Label", sort: "score", help: "Sorted by the score of a proposed label: its detection AUROC on held-out text",
    text: true},
  {name: "Prefers", help: "Tokens on which it fires more often than on others"},
  {name: "Promotes", help: "Output tokens that its direction makes more likely"},
  {name: "Density", sort: "density", help: "Share of tokens on which it fires"},
  {name: "Typical", sort: "mean", help: "Mean activation where it fires"},
  {name: "Max", sort: "max", help: "Largest activation seen"},
];

export async function drawList({sae, query, main, current}) {
  let state = {...listPart(query), offset: query.offset ?? ""};
  let fetching = new AbortController();
  const table = h("div.table", {"data-testid": "list"});
  const found = h("p.found", {"data-testid": "found", "aria-live": "polite"});
  const pages = h("nav.pages", {"aria-label": "Pages of the list"});

  const random = async () => {
    const {feature} = await source.random(sae.slug, listPart(state));
    if (!current()) return;
    if (feature === null) say("No feature matches.", true);
    else go(to(sae.slug, "feature", feature, listPart(state)));
  };
  const unlabelled = async () => {
    const {feature} = await source.unlabelled(sae.slug, sae.d_sae, listPart(state));
    if (!current()) return;
    if (feature === null) say("All features have labels.");
    else go(to(sae.slug, "feature", feature, listPart(state)));
  };

  async function refresh(changes = {}) {
    state = {...state, offset: "", ...changes};
    note(to(sae.slug, "features", "", state));
    await show();
  }

  async function show() {
    fetching.abort();
    fetching = new AbortController();
    const {signal} = fetching;
    table.setAttribute("aria-busy", "true");
    let page;
    try {
      const sent = Object.fromEntries(Object.entries({...state, limit: PAGE}).filter(([, value]) => value !== ""));
      page = await source.features(sae.slug, sent, signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      found.textContent = plain(error.message);
      table.replaceChildren();
      pages.replaceChildren();
      table.removeAttribute("aria-busy");
      return;
    }
    if (signal.aborted) return;
    table.removeAttribute("aria-busy");
    const offset = Number(state.offset || 0);
    const number = page.total === sae.d_sae ? count(page.total) : `${count(page.total)} of ${count(sae.d_sae)}`;
    found.replaceChildren(`${number} features`, sorted() === "telling"
      ? h("span", {title: "Largest activation times −log density: strong, and rare elsewhere"}, ", most telling first")
      : "");
    table.replaceChildren(page.lines.length ? rows(page.lines) : nothing());
    const jump = (place, text, label) => h("button", {type: "button",
      disabled: place < 0 || place >= page.total || place === offset,
      "aria-label": label, "data-testid": label.toLowerCase().replaceAll(" ", "-"),
        on: {click: () => refresh({offset: place || ""})}}, text);
    const last = Math.max(0, Math.floor((page.total - 1) / PAGE) * PAGE);
    pages.replaceChildren(...(page.total > PAGE ? [jump(0, "⇤", "First page"),
      jump(offset - PAGE, "←", "Previous page"),
      h("span", `${count(offset + 1)}–${count(Math.min(offset + PAGE, page.total))} of ${count(page.total)}`),
      jump(offset + PAGE, "→", "Next page"), jump(last, "⇥", "Last page")] : []));
  }

  function sorted() {
    return state.sort || "telling";
  }

  function nothing() {
    return h("div.empty", {"data-testid": "nothing"}, h("p", "No feature matches."),
      h("p", h("a", {href: to(sae.slug, "features")}, "Show all features")));
  }

  function rows(lines) {
    const descending = (state.descending ?? "true") === "true";
    const head = COLUMNS.map(({name, sort, help, first = "true", text}) => {
      if (!sort) return h("th", {scope: "col", title: help}, name);
      const isSorted = sort === sorted();
      const turned = isSorted ? String(!descending) : first;
      return h("th", {scope: "col", title: help, "aria-sort": isSorted ? (descending ? "descending" : "ascending")
        : null, "class": sort === "feature" || text ? null : "number"},
        h("button.sort", {type: "button", "data-testid": `sort-${sort}`,
          on: {click: () => refresh({sort, descending: turned})}},
          name, h("span", {"aria-hidden": "true"}, isSorted ? (descending ? " ↓" : " ↑") : "")));
    });
    return h("table", h("thead", h("tr", head)), h("tbody", lines.map((line) => row(line))));
  }

  function row(line) {
    const address = to(sae.slug, "feature", line.feature, listPart(state));
    const dead = line.rows === 0;
    const width = dead ? 0 : Math.max(2, 100 * (1 + Math.log10(line.density) / 5));
    return h("tr", {"data-testid": "line", "data-feature": line.feature, "class": dead ? "dead" : null,
      on: {click: (event) => event.target.closest("a") || getSelection().toString() || go(address)}},
    h("th.feature", {scope: "row"}, h("a", {href: address}, String(line.feature))),
    h("td.label", {"data-name": "Label"}, typeof line.score === "number" ? h("span.score", {"data-tip":
      `detection AUROC of a proposed label: ${line.score}\n95% interval: ${line.interval.join(" to ")}\nproposed by ${
        plain(line.labeller, 80)}`}, line.score.toFixed(2), h("small", ` ${line.interval.map((end) => end.toFixed(2))
      .join("–")} `)) : "",
    line.label ? h("bdi", plain(line.label, 120)) : h("span.none", "–")),
    h("td.chips", {"data-name": "Prefers"}, dead ? h("span.none", "never fired")
      : line.tokens.slice(0, 4).map((text) => chip(text, {longest: 16}))),
    h("td.chips", {"data-name": "Promotes"}, line.promoted === null
      ? h("span.none", {title: sae.no_promoted}, "–") : line.promoted.slice(0, 4).map((text) => chip(text, {longest: 16}))),
    h("td.number.bar", {"data-name": "Density", vars: {"--width": `${width}%`},
      "data-tip": `${count(line.rows)} tokens, ${line.density}`}, percent(line.density)),
    h("td.number", {"data-name": "Typical", "data-tip": String(line.mean)}, dead ? "–" : short(line.mean)),
    h("td.number", {"data-name": "Max", "data-tip": String(line.max)}, dead ? "–" : short(line.max)));
  }

  let typing;
  const later = (changes) => {
    clearTimeout(typing);
    typing = setTimeout(() => refresh(changes), 150);
  };
  const field = (key, label, hint, rest, change) => h("label", h("span", label),
    h("input", {type: "text", placeholder: hint,
    spellcheck: "false", autocomplete: "off", "data-testid": `filter-${key}`, ...rest, on: {input: change}}));
  const words = (key, label) => field(key, label, "token", {size: 9, value: state[key] ?? ""},
    (event) => later({[key]: event.target.value}));
  /** A number, shown multiplied by `scale` (100 for percentages). */
  const bound = (key, label, hint, scale) => field(key, label, hint,
    {size: 5, inputmode: "decimal", value: state[key] ? String(Number((Number(state[key]) * scale).toPrecision(12)))
      : ""},
    (event) => {
      const text = event.target.value.replace("%", "").replace(",", ".").trim();
      const wrong = Number.isNaN(Number(text));
      event.target.toggleAttribute("aria-invalid", wrong);
      if (!wrong) later({[key]: text === "" ? "" : String(Number(text) / scale)});
    });
  const select = (key, label, choices) => h("label", h("span", label), h("select", {"data-testid": `filter-${key}`,
    on: {change: (event) => refresh({[key]: event.target.value})}},
  choices.map(([value, text]) => h("option", {value, selected: (state[key] ?? "") === value}, text))));
  const filters = h("details.filters", {open: LIST_KEYS.slice(3).some((key) => state[key]) || innerWidth > 700},
    h("summary", "Filter"),
    h("div.fields",
      bound("min_density", "Density from", "0 %", 100), bound("max_density", "to", "100 %", 100),
      bound("min_max", "Max from", "0", 1), bound("max_max", "to", "any", 1),
      words("token", "Prefers"), !sae.no_promoted && words("promoted", "Promotes"),
      select("dead", "Fires", [["", "any"], ["false", "yes"], ["true", "never (dead)"]]),
      select("labelled", "Label", [["", "any"], ["true", "has one"], ["false", "has none"]]),
      bound("min_score", "Score from", "0", 1)));

  const searching = state.search ? h("p.searching", "Labels and tokens with ", chip(state.search, {longest: 80}), " ",
    h("a", {href: to(sae.slug, "features", "", {...state, search: "", offset: ""})}, "clear")) : null;
  const fresh = [h("div.heading", h("h1", "Features"), found, h("div.actions",
    h("button", {type: "button", "data-testid": "random", title: "A random feature of this list (r)",
      on: {click: random}}, "Random"),
    source.live && h("button", {type: "button", "data-testid": "unlabelled", title: "The first feature without a label (u)",
      on: {click: unlabelled}}, "Next unlabelled"))),
  filters, searching, table, pages];
  await show();
  if (!current()) return null;
  main.replaceChildren(...fresh.filter(Boolean));

  const step = (by) => {
    const links = [...table.querySelectorAll("th.feature a")];
    const at = links.indexOf(document.activeElement);
    links[Math.min(Math.max(at + by, 0), links.length - 1)]?.focus();
  };
  return {keys: {r: random, u: source.live ? unlabelled : undefined, j: () => step(1), k: () => step(-1)},
    leave: () => { clearTimeout(typing); fetching.abort(); }};
}
