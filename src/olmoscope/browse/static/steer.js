// Steer: continues a text twice from the same seed, unchanged and with chosen features changed.

import {note, to} from "./address.js";
import {h, plain, say, short, visible} from "./dom.js";
import {wakeModel} from "./prompt.js";
import {source} from "./source.js";
import {suggest} from "./suggest.js";

/** Edits in an address: 12:add:4,7:clamp:0 */
const parse = (text) => (text ?? "").split(",").map((one) =>
  /^(\d+):(add|clamp):(-?\d+(?:\.\d+)?)$/.exec(one)).filter(Boolean)
  .map(([, feature, mode, strength]) => ({feature: Number(feature), mode, strength: Number(strength)}));

export async function drawSteer({sae, query, main, current}) {
  let edits = parse(query.edits);
  let running = null;
  const prompt = h("textarea", {rows: 3, spellcheck: "false", "aria-label": "Prompt", "data-testid": "prompt",
    placeholder: "Beginning of the text", value: query.text ?? "",
    on: {keydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(); }}});
  const field = (name, label, value, rest) => h("label", h("span", label),
    h("input", {type: "number", "data-testid": name, value: query[name] ?? value, ...rest}));
  const tokens = field("tokens", "Tokens", "60", {min: 1, max: 512});
  const temperature = field("temperature", "Temperature", "0.8", {min: 0, max: 5, step: 0.1});
  const seed = field("seed", "Seed", "0", {min: 0, step: 1});
  const read = (label) => label.querySelector("input").value;
  const rows = h("div.edits", {"data-testid": "edits"});
  const start = h("button.strong", {type: "button", "data-testid": "generate", on: {click: () => run()}}, "Generate");
  const stop = h("button", {type: "button", "data-testid": "stop", disabled: true,
    on: {click: () => running?.abort()}}, "Stop");
  const panes = Object.fromEntries(["plain", "steered"].map((side) =>
    [side, h("div.text.tall.writing", {"data-testid": side, "aria-live": "off"})]));
  const state = h("p.found", {role: "status", "data-testid": "state"});

  const adding = h("input", {type: "text", inputmode: "numeric", size: 8, placeholder: "feature",
    "aria-label": "Number of a feature to add", "data-testid": "add-number",
    on: {keydown: (event) => { if (event.key === "Enter") add(); }}});

  main.replaceChildren(
    h("div.heading", h("h1", "Steer"),
      h("p.found", `Changes features of ${sae.site} while the model writes. Strength is in units of a feature's typical activation: its mean where it fires.`)),
    prompt, rows,
    h("div.fields", h("label", h("span", "Another feature"),
      h("span.join", adding, h("button", {type: "button", "data-testid": "add", on: {click: add}}, "Add"))), tokens,
      temperature, seed),
    h("div.actions", start, stop, state),
    h("div.sides", h("section", h("h2", "Unchanged"), panes.plain), h("section", h("h2", "Steered"), panes.steered)));

  function address() {
    return to(sae.slug, "steer", "", {text: prompt.value,
      edits: edits.map((one) => `${one.feature}:${one.mode}:${one.strength}`).join(","),
      tokens: read(tokens), temperature: read(temperature), seed: read(seed)});
  }

  function add() {
    const number = Number(adding.value.trim().replace("#", ""));
    if (!/^#?\d+$/.test(adding.value.trim()) || number >= sae.d_sae) {
      say(`A feature is a number from 0 to ${sae.d_sae - 1}.`, true);
      return;
    }
    edits.push({feature: number, mode: "add", strength: 4});
    adding.value = "";
    list();
  }

  async function list() {
    rows.replaceChildren(...(edits.length ? edits.map(row)
      : [h("p.none", {"data-testid": "no-edits"},
      "No feature chosen: both texts will be the same. Add one by its number, or press Steer on a feature's page.")]));
    note(address());
  }

  function row(edit) {
    const range = h("input", {type: "range", min: -10, max: 20, step: 0.5,
      "aria-label": `Strength of feature ${edit.feature}`, value: edit.strength,
      on: {input: (event) => set(event.target.value)}});
    const exact = h("input", {type: "number", step: "any", min: -1000, max: 1000, "aria-label": "Exact strength",
      "data-testid": "strength", value: edit.strength, on: {input: (event) => set(event.target.value)}});
    const unit = h("span.soft");
    let typical = null;
    const set = (value) => {
      if (value === "" || !Number.isFinite(Number(value))) return;
      edit.strength = Number(value);
      for (const input of [range, exact]) if (input !== document.activeElement) input.value = value;
      tell();
      note(address());
    };
    const tell = () => {
      unit.textContent = typical === null ? "" : typical === 0 ? "never fired: no unit"
        : `× ${short(typical)} = ${short(typical * edit.strength)}`;
    };
    const name = h("bdi.named");
    source.feature(sae.slug, edit.feature).then((feature) => {
      typical = feature.mean;
      name.textContent = plain(feature.entry?.label ?? "", 80);
      tell();
    }, (error) => { unit.textContent = plain(error.message); });
    return h("div.edit", {"data-testid": "edit"}, h("a", {href: to(sae.slug, "feature", edit.feature)},
      String(edit.feature)), name,
      h("select", {"aria-label": "What to do", "data-testid": "mode",
        on: {change: (event) => { edit.mode = event.target.value; note(address()); }}},
        [["add", "add"], ["clamp", "clamp to"]].map(([value, text]) =>
          h("option", {value, selected: value === edit.mode}, text))),
      range, exact, unit, h("button.quiet", {type: "button", "aria-label": `Remove feature ${edit.feature}`,
        on: {click: () => { edits = edits.filter((one) => one !== edit); list(); }}}, "×"));
  }

  async function run() {
    if (!prompt.value) {
      say("Write the beginning of the text.", true);
      return;
    }
    note(address());
    running?.abort();
    const mine = running = new AbortController();
    start.disabled = true;
    stop.disabled = false;
    state.textContent = "writing …";
    state.classList.remove("bad");
    for (const pane of Object.values(panes)) pane.replaceChildren(h("span.given",
      visible(prompt.value, {lines: true, longest: 100000})));
    try {
      await source.steer(sae.slug, {text: prompt.value, edits, tokens: Number(read(tokens)),
        temperature: Number(read(temperature)), seed: Number(read(seed))}, (line) => {
        if (line.error) throw new Error(line.error);
        if (!line.side) return;
        if (line.text) panes[line.side].append(...visible(line.text, {lines: true, longest: 100000}));
        if (line.ended) panes[line.side].append(h("span.document", {title: "The text ended here"}));
      }, mine.signal);
      if (current()) state.textContent = panes.plain.textContent === panes.steered.textContent
        ? "Finished: both texts are the same." : "Finished.";
    } catch (error) {
      if (!current()) return;
      state.textContent = error.name === "AbortError" ? "Stopped." : plain(error.message, 2000);
      state.classList.toggle("bad", error.name !== "AbortError");
    } finally {
      if (running === mine) {
        start.disabled = false;
        stop.disabled = true;
      }
    }
  }

  wakeModel(sae, state, current);
  if (query.text === undefined) await suggest(prompt, sae);
  await list();
  return {leave: () => running?.abort()};
}
