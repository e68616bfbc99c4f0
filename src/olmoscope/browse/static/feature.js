// One feature: everything that the index has on it, and its label.

import {go, listPart, to} from "./address.js";
import {beam, histogram, lifts} from "./charts.js";
import {copyMenu} from "./copy.js";
import {chip, count, h, percent, plain, say, short} from "./dom.js";
import {example} from "./examples.js";
import {labelBox} from "./labels.js";
import {source} from "./source.js";

export async function drawFeature({sae, number, query, main, current}) {
  if (!/^\d+$/.test(number) || Number(number) >= sae.d_sae) {
    throw new Error(`There is no feature ${plain(number, 40)}: features go from 0 to ${count(sae.d_sae - 1)}.`);
  }
  const feature = await source.feature(sae.slug, Number(number));
  if (!current()) return null;
  const list = listPart(query);
  const link = (other) => to(sae.slug, "feature", other, list);
  const label = labelBox(sae, feature);
  const drawn = [];
  const around = {previous: null, next: null};
  const step = (side, sign, title) => h("a.step", {title, "aria-label": title, "data-testid": side, role: "link",
    "aria-disabled": "true"}, sign);
  const previous = step("previous", "←", "Previous feature of the list (k)");
  const next = step("next", "→", "Next feature of the list (j)");
  const place = h("span.place");

  main.replaceChildren(
    h("div.heading.feature", h("div.title", previous, h("h1", {"data-testid": "title"}, h("span.of", "Feature "),
      String(feature.feature)), next, place),
      label.element, h("div.actions", copyMenu(sae, feature),
        source.live && h("a.button", {href: to(sae.slug, "steer", "", {edits: `${feature.feature}:add:4`})}, "Steer"))),
    facts(feature),
    feature.rows === 0 ? dead(sae, feature, link) : h("div.columns", groups(sae, feature, drawn, current),
      side(sae, feature, link)));

  source.around(sae.slug, feature.feature, list).then((found) => {
    if (!current()) return;
    Object.assign(around, found);
    for (const [node, other] of [[previous, found.previous], [next, found.next]]) {
      if (other === null) continue;
      node.href = link(other);
      node.removeAttribute("aria-disabled");
    }
    place.textContent = found.place === null ? "not in the list" : `${count(found.place + 1)} of ${count(found.total)}`;
  }, (error) => say(error.message, true));

  const move = (other, none) => other === null ? say(none) : go(link(other));
  const chosen = async (asked, none) => {
    const {feature: other} = await asked;
    if (current()) move(other, none);
  };
  return {
    leave: label.leave,
    keys: {
      j: () => move(around.next, "This is the last feature of the list."),
      k: () => move(around.previous, "This is the first feature of the list."),
      r: () => chosen(source.random(sae.slug, list), "The list is empty."),
      u: source.live ? () => chosen(source.unlabelled(sae.slug, feature.feature, list), "All features have labels.")
        : undefined,
      l: source.live ? label.edit : undefined,
      a: source.live ? label.accept : undefined,
      x: source.live ? label.reject : undefined,
      e: () => {
        const open = !drawn.some((one) => one.element.classList.contains("wide"));
        drawn.forEach((one) => one.toggle(open));
      },
      c: () => document.querySelector('[data-testid="copy-markdown"]').click(),
    },
  };
}

function facts(feature) {
  const fact = (name, value, exact, help) => h("div", {title: help}, h("dt", name),
    h("dd", {"data-tip": exact, "data-testid": `fact-${name.toLowerCase()}`}, value));
  return h("dl.facts",
    fact("Density", percent(feature.density), String(feature.density), "Share of tokens on which it fires"),
    fact("Fires on", `${count(feature.rows)} tokens`, String(feature.rows), "Tokens of the index on which it fires"),
    fact("Typical", short(feature.mean), String(feature.mean), "Mean activation where it fires: the unit of steering"),
    fact("Max", short(feature.max), String(feature.max), "Largest activation in the index"));
}

function dead(sae, feature, link) {
  return h("div.columns", h("section.empty", {"data-testid": "dead"}, h("h2", "This feature never fired"),
    h("p", `It fired on none of the ${count(sae.rows)} tokens of the index. It may still fire on other text.`)),
  side(sae, feature, link));
}

/** Examples by group; the first group is shown at once, the others after it has been painted. */
function groups(sae, feature, drawn, current) {
  const widen = (one) => source.live ? (before, after) =>
    source.window(sae.slug, feature.feature, one.place, before, after) : null;
  const place = h("div.examples");
  const left = feature.groups.filter((group) => group.examples.length > 0);
  const draw = () => {
    const group = left.shift();
    if (!group) return;
    const title = group.kind === "top" ? "Strongest" : group.kind === "random" ? "Drawn at random"
      : `${short(group.low)} – ${short(group.high)}`;
    const examples = [...group.examples].sort((one, two) => two.value - one.value).map((one) =>
      example(one, feature.texts, feature.max, widen(one)));
    drawn.push(...examples);
    place.append(h("section.group", {"data-testid": `group-${group.kind}`},
      h("h2", title, h("small", group.kind === "interval" ? `${count(group.rows)} tokens` : "")),
        examples.map((one) => one.element)));
  };
  const rest = () => {
    if (!current() || !left.length) return;
    draw();
    setTimeout(rest);
  };
  draw();
  requestAnimationFrame(() => setTimeout(rest));
  return place;
}

function side(sae, feature, link) {
  const name = (other) => feature.labels[other] ? h("bdi.named", plain(feature.labels[other], 80)) : null;
  const text = (id) => feature.texts[id] ?? "";
  const most = Math.max(...[...feature.promoted ?? [], ...feature.suppressed ?? []].map((one) => Math.abs(one.logit)), 0);
  const logits = (items, kind) => h("ol.logits", {"data-testid": kind},
    items.map((one) => h("li", {"data-tip": `${plain(text(one.token), 60)}\n${one.logit}`},
    chip(text(one.token), {longest: 18}), beam(one.logit, most, kind), h("span.number", short(one.logit)))));
  const block = (title, help, ...content) => h("section.block", h("h2", {title: help}, title), content);
  const others = (items, figure) => h("ul.others", items.map((one) =>
    h("li", h("a", {href: link(one.feature)}, String(one.feature)), name(one.feature), figure(one))));

  return h("aside.side",
    feature.rows > 0 && block("Activations", "Number of tokens by activation; both scales are logarithmic",
      histogram(feature.histogram, {
      name: `Histogram of activations, from ${short(feature.histogram.edges[0])} to ${short(feature.max)}`,
        log: true})),
    (feature.promoted === null || feature.promoted.length > 0) && block("Output tokens",
      "What its direction adds to the logits of output tokens",
      feature.promoted === null ? h("p.none", {"data-testid": "no-promoted"}, `Not computed: ${plain(sae.no_promoted, 300)}.`)
        : h("div.two", h("div", h("h3", "promotes"), logits(feature.promoted, "promoted")),
        h("div", h("h3", "suppresses"), logits(feature.suppressed, "suppressed")))),
    feature.tokens.length > 0 && block("Prefers tokens", "Tokens on which it fires more often than on others",
      h("ul.preferred", {"data-testid": "preferred"}, feature.tokens.map((one) => h("li",
        {"data-tip": `fires on ${count(one.rows)} of these\n${one.lift}× as often as on any token\nmean ${one.mean}`},
        h("a", {href: to(sae.slug, "features", "", {token: text(one.token)}), title: "Features that prefer it"},
          chip(text(one.token), {longest: 24})), h("span.number", `${short(one.lift)}×`),
          h("span.number.soft", `on ${count(one.rows)}`))))),
    feature.companions.length > 0 && block("Fires together with",
      "Features on the same tokens; ×: how much more often than by chance",
      others(feature.companions, (one) => h("span.number",
        {"data-tip": `${one.rows} tokens of the sample, lift ${one.lift}`}, `${short(one.lift)}×`))),
    feature.neighbours.length > 0 && block("Points the same way", "Cosine of the decoder directions",
      others(feature.neighbours, (one) => h("span.number", {"data-tip": `cosine ${one.cosine}`}, short(one.cosine)))),
    feature.sources.length > 1 && block("Text sources", "How much more often than by chance",
      h("ul.preferred", feature.sources.map((one) => h("li", {"data-tip": `${one.rows} tokens, ${one.lift}`},
        h("bdi", plain(one.source, 60)), h("span.number", `${short(one.lift)}×`),
        h("span.number.soft", `on ${count(one.rows)}`))))),
    feature.positions.length > 1 && block("Position in the sequence",
      "How much more often than by chance; the line is 1",
      lifts(feature.positions.map((one) => ({...one, name: one.first === one.last ? `position ${one.first}`
        : `${count(one.first)}–${count(one.last)}`})),
        {name: "How often it fires at each position"})));
}
