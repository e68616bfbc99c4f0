// Try a prompt: which features fire on each token, and how one feature fires over the text; for one or two prompts.

import {go, note, to} from "./address.js";
import {chip, count, h, plain, say, short, visible} from "./dom.js";
import {shade} from "./examples.js";
import {source} from "./source.js";
import {suggest} from "./suggest.js";

const SHOWN = 24;
const BESIDE = 5;
/** Orders for the features of a whole text. */
const ORDERS = {
  telling: {title: "most telling", help: "activation times −log density: strong, and rare elsewhere",
    score: (value, density) => value * -Math.log(density || 1e-9)},
  strong: {title: "strongest", help: "largest activation", score: (value) => value},
};

/** Load the model while the user is still writing, and say so; if it fails, say why. */
export async function wakeModel(sae, place, current) {
  const slow = setTimeout(() => { place.textContent = "loading the model …"; }, 300);
  try {
    const {model} = await source.wake(sae.slug);
    if (current() && place.textContent.startsWith("loading")) place.textContent = `${plain(model, 80)} is ready`;
  } catch (error) {
    if (!current()) return;
    place.textContent = plain(error.message, 2000);
    place.classList.add("bad");
  } finally {
    clearTimeout(slow);
  }
}

export async function drawPrompt({sae, query, main, current}) {
  const texts = [query.text ?? "", query.other ?? ""];
  const comparing = query.other !== undefined;
  let feature = /^\d+$/.test(query.feature ?? "") ? Number(query.feature) : null;
  let reads = [];
  let at = [null, null];
  let order = "telling";
  const state = h("small", {role: "status", "data-testid": "model-state"});

  const boxes = [0, 1].map((side) => h("textarea", {rows: 4, spellcheck: "false",
    "data-testid": side ? "other" : "prompt", placeholder: side ? "Another text to compare" : "A text to read",
    "aria-label": side ? "The other prompt" : "Prompt", value: texts[side], on: {keydown: (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
    }}}));
  const out = h("div.reads", {"data-testid": "reads"});
  const panel = h("div.ranked", {"data-testid": "ranked"});
  const answer = h("div", out, panel);
  const compare = h("button", {type: "button", "data-testid": "compare",
    on: {click: () => go(address({other: comparing ? undefined : boxes[0].value}))}},
    comparing ? "One prompt only" : "Compare with another");
  const button = h("button.strong", {type: "button", "data-testid": "read", on: {click: () => run()}}, "Read it");

  main.replaceChildren(
    h("div.heading", h("h1", "Try a prompt"), h("p.found",
      `The model reads a text; the SAE of ${sae.site} says which features fire on each token.`)),
    h("div.prompts", {"class": comparing ? "both" : null}, boxes.slice(0, comparing ? 2 : 1)),
    h("div.actions", button, compare, h("small", "Ctrl + Enter reads"), state),
    answer);

  function address(changes = {}) {
    return to(sae.slug, "prompt", "", {text: boxes[0].value, other: comparing ? boxes[1].value || " " : undefined,
      feature: feature ?? "", ...changes});
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
    const max = feature === null ? 0 : Math.max(...reads.flatMap((read) =>
      read.active.map((_, place) => valueOf(read, place, feature))));
    out.replaceChildren(...reads.map((read, side) => h("section.read",
      {"aria-label": side ? "The other prompt" : "Prompt"},
      h("h2", feature === null ? `${count(read.tokens.length)} tokens`
        : ["Feature ", h("a", {href: to(sae.slug, "feature", feature)}, String(feature)), " over the text",
        h("button.link", {type: "button", "data-testid": "all-features", on: {click: () => choose(null)}},
          "all features")]),
      h("div.text.tall", {"class": feature === null ? "cut" : null}, read.tokens.map((token, place) => {
        const value = feature === null ? null : valueOf(read, place, feature);
        const top = read.active[place][0];
        return h("span.t.pick", {role: "button", tabindex: "0", "data-testid": "token", "data-value": value,
          "data-tip": `${plain(token.text, 60)}  ${value ?? (top ? `strongest: ${top[0]} at ${short(top[1])}` : "nothing fires")}\nposition ${place}, token ${token.id}`,
          "aria-pressed": String(at[side] === place), "class": at[side] === place ? "at" : null,
            vars: value > 0 ? {"--a": shade(value, max)} : {},
          on: {click: () => pick(side, place), keydown: (event) => { if (event.key === "Enter"
            || event.key === " ") { event.preventDefault(); pick(side, place); } }}},
        visible(token.text, {lines: true, longest: 120}));
      })),
      feature === null && reads.length === 1 ? tokenByToken(read) : null)));
    answer.className = comparing ? "comparing" : "columns";
    rank();
  }

  /** Below the text: each token with its strongest features. */
  function tokenByToken(read) {
    const most = Math.max(...read.active.map((active) => active[0]?.[1] ?? 0), 1e-9);
    return h("ol.tokens", {"data-testid": "tokens"}, read.tokens.map((token, place) =>
      h("li", chip(token.text, {longest: 24}),
      h("span.tops", read.active[place].slice(0, BESIDE).map(([number, value]) =>
        h("button.top", {type: "button", "data-testid": "top", "data-feature": number, "data-value": value,
        "data-tip": `${number}  ${value}${read.labels[number] ? `\n${plain(read.labels[number], 80)}` : ""}`,
          vars: {"--a": shade(value, most)}, on: {click: () => choose(number)}},
      read.labels[number] ? h("bdi", plain(read.labels[number], 22)) : String(number))),
        read.active[place].length ? "" : h("span.none", "nothing fires")))));
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

  /** Beside the text: features of the chosen token, or of the whole text. */
  function rank() {
    const choices = h("select", {"aria-label": "Order", "data-testid": "order",
      on: {change: (event) => { order = event.target.value; rank(); }}},
      Object.entries(ORDERS).map(([name, {title, help}]) =>
        h("option", {value: name, title: help, selected: name === order}, title)));
    const tables = reads.map((read, side) => {
      const place = at[side];
      const found = new Map();
      (place === null ? read.active : [read.active[place]]).forEach((active) => active.forEach(([number, value]) => {
        const old = found.get(number) ?? {value: 0, tokens: 0};
        found.set(number, {value: Math.max(old.value, value), tokens: old.tokens + 1});
      }));
      return {read, place, found};
    });
    const sections = tables.map(({read, place, found}, side) => {
      const other = tables.length > 1 ? tables[1 - side].found : null;
      const {score} = ORDERS[place === null ? order : "strong"];
      const ranked = [...found].sort(([a, one], [b, two]) =>
        score(two.value, read.density[b]) - score(one.value, read.density[a]));
      const shown = place === null ? ranked.slice(0, SHOWN) : ranked;
      const chosen = ranked.find(([number]) => number === feature);
      if (chosen && !shown.includes(chosen)) shown.unshift(chosen);
      return h("section.block", h("h2.split", place === null
        ? `Features of ${tables.length > 1 ? (side ? "the other text" : "the first text") : "the text"}`
        : ["Features of ", chip(read.tokens[place].text)], place === null && side === 0 ? choices : ""),
        h("ul.others.ranked", shown.map(([number, {value, tokens}]) =>
          h("li", {"data-testid": "ranked-feature", "data-feature": number, "data-value": value,
          "class": number === feature ? "chosen" : null},
          h("button.link", {type: "button", title: "Its activations over the text", on: {click: () => choose(number)}},
            String(number)),
          read.labels[number] ? h("bdi.named", plain(read.labels[number], 60)) : "",
          other && !other.has(number) ? h("span.only", "only here") : "",
          place === null ? h("span.number.soft", {title: "tokens on which it fires"}, `on ${count(tokens)}`) : "",
          h("span.number", {"data-tip": String(value)}, short(value)),
          h("a.more", {href: to(sae.slug, "feature", number), "aria-label": `Page of feature ${number}`}, "→")))));
    });
    if (reads.length > 1) {
      out.querySelectorAll("section.read").forEach((read, side) => {
        read.querySelector(".block")?.remove();
        read.append(sections[side]);
      });
    } else panel.replaceChildren(...sections);
  }

  if (texts[0]) await run();
  else {
    wakeModel(sae, state, current);
    out.replaceChildren(h("div.empty", h("p", "No text has been read yet."),
      h("p", "Click a token to see its features, or a feature to see where it fires.")));
    if (query.text === undefined) await suggest(boxes[0], sae);
  }
  return {};
}
