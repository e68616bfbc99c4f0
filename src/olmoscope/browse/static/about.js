// The SAE as a whole: its evaluation, the density of its features, its settings, its provenance.

import {histogram} from "./charts.js";
import {count, h, percent, plain, say, short} from "./dom.js";
import {source} from "./source.js";

const FIGURES = [
  ["fvu", "FVU", "Fraction of variance unexplained; 0 is perfect"],
  ["nmse", "NMSE", "Mean of ‖x − x̂‖² / ‖x‖²; 0 is perfect"],
  ["cosine", "Cosine", "Cosine of a row and its reconstruction; 1 is perfect"],
  ["l2_ratio", "Length ratio", "‖x̂‖ / ‖x‖"],
  ["relative_reconstruction_bias", "Bias", "Relative reconstruction bias: under 1, reconstructions are too short"],
];
const OF_LANGUAGE = [
  ["delta_ce", "ΔCE, nats", "Cross-entropy added when x̂ replaces x; 0 is perfect"],
  ["loss_recovered_zero", "Loss recovered (zero)", "1 is no harm; 0 is as bad as zeros instead of x"],
  ["loss_recovered_mean", "Loss recovered (mean)", "1 is no harm; 0 is as bad as the mean instead of x"],
  ["kl", "KL, nats", "KL divergence from the model's predictions with x to those with x̂; 0 is perfect"],
];
/** Names as in browse/documents.py. */
const DOCUMENTS = {"report.html": "Evaluation report", "card.md": "Model card"};

export async function drawAbout({sae, main, current}) {
  const about = await source.about(sae.slug);
  if (!current()) return null;
  const {info} = about;
  const block = (title, ...content) => h("section.block", h("h2", title), content);
  main.replaceChildren(
    h("div.heading", h("h1", plain(about.name, 200)), h("p.found",
      `${about.site} of ${plain(about.model, 200)}`), documents(sae, about)),
    h("dl.facts",
      [["Features", count(about.d_sae)], ["Dead here", `${count(about.dead)} (${percent(about.dead / about.d_sae)})`],
        ["Width of the model", count(about.d_model)],
        ["Tokens indexed", count(about.rows)], ["Firings", count(info.firings)], ["Documents", count(info.documents)],
          ["Labelled", count(about.labelled)]]
        .map(([name, value]) => h("div", h("dt", name), h("dd", value)))),
    h("div.columns.even",
      h("div", evaluation(info.evaluation, block),
        block("Density", h("p.found",
          "Features by the share of tokens on which they fire, in half decades; features that never fired are left out."),
          histogram(about.density, {name: "Features by density", unit: "features", format: percent})),
        source.live && labels(sae, block)),
      h("div", block("Text", table(Object.entries(info.sources).map(([name, rows]) =>
        [name, `${count(rows)} tokens`]))),
        block("Settings", table(flat({sae: info.sae, filter: info.filter, options: info.options, store: info.store,
          unembedding: info.unembedding ?? `none: ${info.no_unembedding}`}))),
        block("Model", table(flat(info.model))), block("Provenance", table(flat(info.provenance))))));
  return {};
}

function evaluation(figures, block) {
  if (!figures) return block("Evaluation", h("p.none", {"data-testid": "no-evaluation"},
    "There was no evaluation when the index was made: run olmoscope evaluate, then olmoscope index."));
  const row = (key, name, help, value, shown, interval) => h("tr", {title: help}, h("th", {scope: "row"}, name),
    h("td", {"data-tip": String(value), "data-testid": `figure-${key}`}, shown,
      interval ? h("span.soft", {title: "95% interval"}, ` ${short(interval[0])} – ${short(interval[1])}`) : ""));
  const known = (figures, list) => list.filter(([key]) => typeof figures[key] === "number")
    .map(([key, name, help]) => row(key, name, help, figures[key], short(figures[key]), figures.intervals?.[key]));
  const {l0, dead, language} = figures;
  const rows = known(figures, FIGURES);
  if (l0) rows.push(row("l0", "L0", "Mean number of active latents per row", l0.mean, short(l0.mean),
    figures.intervals?.l0));
  if (dead) rows.push(row("dead", "Dead", `Latents that fired on none of ${count(dead.window)} tokens`, dead.share,
    percent(dead.share)));
  if (language) rows.push(...known(language, OF_LANGUAGE));
  return block("Evaluation", h("p.found", typeof figures.rows === "number"
    ? `On ${count(figures.rows)} held-out tokens` : ""),
    h("table.pairs", {"data-testid": "evaluation"}, h("tbody", rows)));
}

/** Links to what else tells of this SAE; only to what is there. */
function documents(sae, about) {
  const links = about.documents.map((name) => [source.document(sae.slug, name), DOCUMENTS[name]]);
  if (about.hub) links.push([about.hub, "On the Hugging Face hub"]);
  return links.length > 0 && h("nav.actions", {"aria-label": "About this SAE", "data-testid": "documents"},
    links.map(([href, text]) => h("a.button", {href}, text)));
}

function labels(sae, block) {
  const input = h("input.hidden", {type: "file", accept: ".jsonl,.ndjson,.json", "aria-label": "File of labels",
    "data-testid": "labels-file", on: {change: async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    try {
      const {new: fresh} = await source.importLabels(sae.slug, await file.text());
      say(`${count(fresh)} new entries`);
    } catch (error) {
      say(error.message, true);
    }
    event.target.value = "";
  }}});
  return block("Labels", h("p.found", "Kept beside the index in labels.sqlite, with their history."),
    h("div.actions", h("a.button", {href: source.labelsAddress(sae.slug), download: `labels-${sae.slug}.jsonl`,
      "data-testid": "export-labels"}, "Export as JSONL"),
      h("label.button", "Import JSONL", input)));
}

/** A tree of settings as rows: a.b.c and its value. */
function flat(tree, prefix = "") {
  return Object.entries(tree).flatMap(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value)
    ? flat(value, `${prefix}${key}.`) : [[prefix + key,
      value === null ? "none" : typeof value === "string" ? value : JSON.stringify(value)]]);
}

const table = (rows) => h("table.pairs", h("tbody", rows.map(([name, value]) =>
  h("tr", h("th", {scope: "row"}, plain(String(name), 100)), h("td", h("bdi", plain(String(value), 300)))))));
