// Try a prompt: what each token makes the features do, and what one feature does over the text; two prompts side by side.

import {go, note, to} from "./address.js";
import {chip, count, h, plain, say, short, visible} from "./dom.js";
import {shade} from "./examples.js";
import {source} from "./source.js";

const SHOWN = 12;

export async function drawPrompt({sae, query, main, current}) {
  const texts = [query.text ?? "", query.other ?? ""];
  const comparing = query.other !== undefined;
  let feature = /^\d+$/.test(query.feature ?? "") ? Number(query.feature) : null;
  let reads = [];
  let at = [null, null];

  const boxes = [0, 1].map((side) => h("textarea", {rows: 4, spellcheck: "false", "data-testid": side ? "other" : "prompt", placeholder: side ? "Another text to compare" : "Some text to read",
    "aria-label": side ? "The other prompt" : "Prompt", value: texts[side], on: {keydown: (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
    }}}));
  const out = h("div.reads", {"data-testid": "reads"});
  const panel = h("div.ranked", {"data-testid": "ranked"});
  const compare = h("button", {type: "button", "data-testid": "compare", on: {click: () => go(address({other: comparing ? undefined : boxes[0].value}))}},
    comparing ? "Only one" : "Compare with another");
  const button = h("button.strong", {type: "button", "data-testid": "read", on: {click: () => run()}}, "Read it");

  main.replaceChildren(
    h("div.heading", h("h1", "Try a prompt"), h("p.found", `The model reads a text; the SAE of layer ${sae.layer} says which features fire on each token.`)),
    h("div.prompts", {"class": comparing ? "both" : null}, boxes.slice(0, comparing ? 2 : 1)),
    h("div.actions", button, compare, h("small", "Ctrl + Enter reads")), h("div.columns", out, panel));

  function address(changes = {}) {
    return to(sae.slug, "prompt", "", {text: boxes[0].value, other: comparing ? boxes[1].value || " " : undefined, feature: feature ?? "", ...changes});
  }

  async function run() {
    const wanted = boxes.slice(0, comparing ? 2 : 1).map((box) => box.value);
    if (!wanted[0]) {
      say("Write some text first.", true);
      return;
    }
    note(address());
    button.disabled = true;
    out.setAttribute("aria-busy", "true");
    try {
      const fresh = await Promise.all(wanted.map((text) => text.trim() ? source.prompt(sae.slug, text) : null));
      if (!current()) return;
      reads = fresh.filter(Boolean);
      at = [null, null];
      show();
    } catch (error) {
      out.replaceChildren(h("p.bad", {role: "alert", "data-testid": "problem"}, plain(error.message, 2000)));
      panel.replaceChildren();
    } finally {
      button.disabled = false;
      out.removeAttribute("aria-busy");
    }
  }

  /** The activation of a feature on a token; 0 where it is not active. */
  const valueOf = (read, place, wanted) => read.active[place].find(([number]) => number === wanted)?.[1] ?? 0;

  function show() {
    const max = Math.max(...reads.flatMap((read) => read.active.map((active, place) => feature === null ? active[0]?.[1] ?? 0 : valueOf(read, place, feature))), 1e-9);
    out.replaceChildren(...reads.map((read, side) => h("section.read", {"aria-label": side ? "The other prompt" : "Prompt"},
      h("h2", feature === null ? "Strongest feature of each token" : ["Feature ", h("a", {href: to(sae.slug, "feature", feature)}, String(feature)), " ",
        h("button.link", {type: "button", "data-testid": "all-features", on: {click: () => choose(null)}}, "all features")]),
      h("div.text.tall", read.tokens.map((token, place) => {
        const value = feature === null ? read.active[place][0]?.[1] ?? 0 : valueOf(read, place, feature);
        return h("span.t.pick", {role: "button", tabindex: "0", "data-testid": "token", "data-value": value, "data-tip": `${plain(token.text, 60)}  ${value}\nposition ${place}, token ${token.id}`,
          "aria-pressed": String(at[side] === place), "class": at[side] === place ? "at" : null, vars: value > 0 ? {"--a": shade(value, max)} : {},
          on: {click: () => pick(side, place), keydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(side, place); } }}},
        visible(token.text, {lines: true, longest: 120}));
      })), reads.length > 1 ? null : h("p.found", `${count(read.tokens.length)} tokens`))));
    rank();
  }

  function pick(side, place) {
    at[side] = at[side] === place ? null : place;
    const focused = place;
    show();
    out.querySelectorAll("section")[side].querySelectorAll(".t")[focused]?.focus();
  }

  function choose(wanted) {
    feature = wanted;
    note(address());
    show();
  }

  /** What stands beside the text: features of the chosen token, or of the whole text. */
  function rank() {
    const tables = reads.map((read, side) => {
      const place = at[side];
      const found = new Map();
      (place === null ? read.active : [read.active[place]]).forEach((active) => active.forEach(([number, value]) => {
        const old = found.get(number) ?? {value: 0, tokens: 0};
        found.set(number, {value: Math.max(old.value, value), tokens: old.tokens + 1});
      }));
      return {read, place, found};
    });
    panel.replaceChildren(...tables.map(({read, place, found}, side) => {
      const other = tables.length > 1 ? tables[1 - side].found : null;
      const ranked = [...found].sort(([, one], [, two]) => two.value - one.value);
      return h("section.block", h("h2", place === null ? `Features of ${tables.length > 1 ? (side ? "the other text" : "the first text") : "the text"}` : ["Features of ", chip(read.tokens[place].text)]),
        h("ul.others.ranked", ranked.slice(0, place === null ? SHOWN * 2 : ranked.length).map(([number, {value, tokens}]) => h("li", {"data-testid": "ranked-feature", "data-feature": number, "data-value": value, "class": number === feature ? "chosen" : null},
          h("button.link", {type: "button", title: "Its activations over the text", on: {click: () => choose(number)}}, String(number)),
          read.labels[number] ? h("bdi.named", plain(read.labels[number], 60)) : "",
          other && !other.has(number) ? h("span.only", "only here") : "",
          place === null ? h("span.number.soft", `${count(tokens)} ·`) : "",
          h("span.number", {"data-tip": String(value)}, short(value)),
          h("a.more", {href: to(sae.slug, "feature", number), "aria-label": `Page of feature ${number}`}, "→")))));
    }));
  }

  if (texts[0]) await run();
  else out.replaceChildren(h("div.empty", h("p", "Nothing read yet."), h("p", "Click a token to see its features, a feature to see where it fires.")));
  return {};
}
