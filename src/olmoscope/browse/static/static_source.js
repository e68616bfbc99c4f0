// The data of a static site: plain files beside this page. browse/export.py writes them; this module reads and searches
// them.

import {plain} from "./dom.js";

/** Gives the server's answers, except for those that need a model or storage. */
export class StaticSource {
  live = false;
  #lists = new Map();
  #parts = new Map();

  saes = () => json("data/saes.json");
  about = (sae) => json(`data/${part(sae)}/about.json`);
  document = (sae, name) => `data/${part(sae)}/${name}`;
  window = () => Promise.reject(new Error("A static site has no more text."));

  /** The columns of the list; loaded once. */
  #list(sae) {
    if (!this.#lists.has(sae)) this.#lists.set(sae, json(`data/${part(sae)}/list.json.gz`).then(prepared));
    return this.#lists.get(sae);
  }

  async #order(sae, query) {
    const list = await this.#list(sae);
    const {sort = "telling", search = "", token, promoted, dead, labelled} = query;
    const down = (query.descending ?? "true") === "true" ? -1 : 1;
    const bounds = [["density", query.min_density, query.max_density], ["max", query.min_max, query.max_max],
      ["score", query.min_score, undefined]]
      .filter(([, low, high]) => low !== undefined || high !== undefined);
    const wanted = search.trim().toLowerCase();
    const found = [];
    for (let place = 0; place < list.feature.length; place++) {
      if (wanted && !list.searched[place].includes(wanted)) continue;
      if (token && !has(list.tokens[place], token)) continue;
      if (promoted && !has(list.promoted[place] ?? [], promoted)) continue;
      if (dead !== undefined && (list.rows[place] === 0) !== (dead === "true")) continue;
      if (labelled !== undefined && (list.label[place] !== "") !== (labelled === "true")) continue;
      if (bounds.some(([key, low, high]) => list[key][place] === null || list[key][place] < Number(low ?? -Infinity)
        || list[key][place] > Number(high ?? Infinity))) continue;
      found.push(place);
    }
    const column = list[sort];
    if (!column) throw new Error(`The address is wrong: there is no column ${plain(sort, 40)}.`);
    const unknown = (place) => Number(column[place] === null);  // last in either direction, as on the live page
    return found.sort((one, two) => unknown(one) - unknown(two)
      || down * (column[one] < column[two] ? -1 : column[one] > column[two] ? 1 : 0) || one - two);
  }

  async features(sae, query) {
    const list = await this.#list(sae);
    const order = await this.#order(sae, query);
    const from = Number(query.offset ?? 0);
    const lines = order.slice(from, from + Number(query.limit ?? 50)).map((place) =>
      Object.fromEntries(["feature", "rows", "density", "max", "mean", "tokens", "promoted",
        "label", "score", "interval", "labeller"].map((key) => [key, list[key][place]])));
    return {total: order.length, lines};
  }

  async around(sae, feature, query) {
    const list = await this.#list(sae);
    const order = await this.#order(sae, query);
    const place = order.findIndex((one) => list.feature[one] === feature);
    const at = (one) => one === undefined ? null : list.feature[one];
    return {place: place < 0 ? null : place, total: order.length, previous: place > 0 ? at(order[place - 1]) : null,
      next: place < 0 ? null : at(order[place + 1])};
  }

  async random(sae, query) {
    const list = await this.#list(sae);
    const order = await this.#order(sae, query);
    return {feature: order.length ? list.feature[order[Math.floor(Math.random() * order.length)]] : null};
  }

  async feature(sae, feature) {
    const {per_part: size, digits} = await this.about(sae);
    const number = Math.floor(feature / size);
    const name = `data/${part(sae)}/features/part-${String(number).padStart(digits, "0")}.json.gz`;
    if (!this.#parts.has(name)) {
      if (this.#parts.size > 20) this.#parts.clear();
      this.#parts.set(name, json(name));
    }
    const {features, texts} = await this.#parts.get(name);
    const found = features[feature - number * size];
    if (!found) throw new Error(`Feature ${feature} is not on this site.`);
    return {...found, texts};
  }
}

const part = encodeURIComponent;
const has = (texts, wanted) => texts.some((text) => text.toLowerCase().includes(wanted.toLowerCase()));

function prepared(list) {
  list.feature = list.rows.map((_, place) => place);
  list.telling = list.rows.map((rows, place) => rows ? -list.max[place] * Math.log(list.density[place]) : -1);
  list.searched = list.rows.map((_, place) => [...list.tokens[place], ...list.promoted[place] ?? [],
    list.label[place]].join("\n").toLowerCase());
  return list;
}

const cache = new Map();

/** A JSON file; `.gz` ones are unpacked here,
  unless the web server has said that they are packed and the browser did. */
function json(name) {
  if (!cache.has(name)) {
    const got = load(name);
    got.catch(() => cache.delete(name));
    if (name.endsWith(".json")) cache.set(name, got);
    return got;
  }
  return cache.get(name);
}

async function load(name) {
  let answer;
  try {
    answer = await fetch(name);
  } catch (error) {
    throw new Error("The files of this site cannot be read. The browser needs a web server: run `python -m http.server` in the site's folder.", {cause: error});
  }
  if (!answer.ok) throw new Error(`${name} is missing from this site (${answer.status}).`);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return JSON.parse(new TextDecoder().decode(bytes));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}
