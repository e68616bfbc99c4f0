// The frame of the page: the view for the address, the bar above it, and the keys.

import {go, read, to} from "./address.js";
import {count, h, plain, say} from "./dom.js";
import {toggleHelp} from "./help.js";
import {source} from "./source.js";
import {hideTip, watchTips} from "./tip.js";

/** Each page's program is fetched when it is first needed. */
const PAGES = {
  features: {title: "Features", load: () => import("./list.js"), draw: "drawList", key: "f"},
  feature: {title: "Feature", load: () => import("./feature.js"), draw: "drawFeature"},
  prompt: {title: "Try a prompt", load: () => import("./prompt.js"), draw: "drawPrompt", key: "t", live: true},
  steer: {title: "Steer", load: () => import("./steer.js"), draw: "drawSteer", key: "s", live: true},
  about: {title: "This SAE", load: () => import("./about.js"), draw: "drawAbout", key: "a"},
};
const main = document.getElementById("main");
let saes = [];
let keys = {};
let drawing = 0;
let leave = () => {};

async function draw() {
  const address = read();
  const sae = saes.find((one) => one.slug === address.sae) ?? (address.sae ? null : saes[0]);
  const name = address.page || "features";
  const page = PAGES[name];
  const turn = ++drawing;
  hideTip();
  leave();
  leave = () => {};
  keys = {};
  if (!sae || !page || (page.live && !source.live)) {
    bar(sae ?? saes[0], "");
    main.replaceChildren(h("section.empty", h("h1", "Nothing here"),
      h("p", `There is no page ${plain(location.hash)}.`), h("p", h("a", {href: "#/"}, "All features"))));
    drawn();
    return;
  }
  bar(sae, name);
  document.title = `${page.title}${address.number ? ` ${plain(address.number, 20)}` : ""} · ${plain(sae.name, 60)} · Olmoscope`;
  main.setAttribute("aria-busy", "true");
  try {
    const program = await page.load();
    if (turn !== drawing) return;
    const view = await program[page.draw]({sae, number: address.number, query: address.query, main,
      current: () => turn === drawing});
    if (turn === drawing && view) {
      keys = view.keys ?? {};
      leave = view.leave ?? leave;
    }
  } catch (error) {
    if (turn === drawing) main.replaceChildren(failure(error));
  }
  if (turn === drawing) drawn();
}

/** Signals that the view is drawn, for tests and measurements. */
function drawn() {
  main.removeAttribute("aria-busy");
  main.dataset.drawn = location.hash;
  performance.mark("olmoscope:drawn");
}

function failure(error) {
  return h("section.empty", {role: "alert", "data-testid": "failure"}, h("h1", "That did not work"),
    h("p", plain(error.message, 2000)),
    h("p", h("a", {href: "#/"}, "All features")));
}

function bar(sae, current) {
  const links = Object.entries(PAGES).filter(([, page]) => page.key && (!page.live || source.live))
    .map(([name, page]) => h("a", {href: to(sae.slug, name), "aria-current": name === current ? "page" : null},
      page.title));
  const jump = h("input", {type: "search", placeholder: "Search or number",
    "aria-label": "Search tokens and labels, or go to a feature by its number",
    "data-testid": "jump", autocomplete: "off", spellcheck: "false",
      value: current === "features" ? read().query.search ?? "" : "",
    on: {input: (event) => searched(sae, event.target.value, current), keydown: (event) => entered(event, sae)}});
  const choose = h("select", {"aria-label": "Which SAE", "data-testid": "sae",
    on: {change: (event) => switched(event.target.value, current)}},
    saes.map((one) => h("option", {value: one.slug, selected: one === sae}, plain(one.name, 80))));
  const kept = document.querySelector("#bar input");
  if (kept && document.activeElement === kept && current === "features" && kept.dataset.sae === sae.slug) {
    document.querySelectorAll("#bar nav a").forEach((link, place) => {
      if (links[place].hasAttribute("aria-current")) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    return; // the user is typing in it
  }
  jump.dataset.sae = sae.slug;
  document.getElementById("bar").replaceChildren(
    h("a.name", {href: to(sae.slug, "features")}, h("span.lens", {"aria-hidden": "true"}), "Olmoscope"),
    saes.length > 1 ? choose : h("span.one", {title: plain(sae.name)}, plain(sae.name, 80)),
    h("nav", {"aria-label": "Pages"}, links), jump,
    h("button.quiet", {type: "button", title: "Keys (?)", "aria-label": "Help: keys", "data-testid": "help-button",
      on: {click: toggleHelp}}, "?"));
}

let typing;
function searched(sae, text, current) {
  clearTimeout(typing);
  if (/^\s*#?\d+\s*$/.test(text)) return; // wait for Enter after a number
  typing = setTimeout(() => {
    const {query} = read();
    go(to(sae.slug, "features", "", {...(current === "features" ? query : {}), search: text.trim(), offset: ""}),
      current === "features");
  }, 120);
}

function entered(event, sae) {
  const number = /^\s*#?(\d+)\s*$/.exec(event.target.value)?.[1];
  if (event.key === "Escape") event.target.blur();
  if (event.key !== "Enter" || number === undefined) return;
  if (Number(number) < sae.d_sae) {
    event.target.value = "";
    go(to(sae.slug, "feature", number));
    main.focus();
  } else say(`There is no feature ${number}: features go from 0 to ${count(sae.d_sae - 1)}.`, true);
}

function switched(slug, current) {
  const {query} = read();
  const kept = current === "prompt" ? {text: query.text, other: query.other} : current === "steer" ? {text: query.text}
    : {};
  go(to(slug, current === "feature" ? "features" : current, "", kept));
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
  const {sae: slug} = read();
  const sae = slug || saes[0]?.slug;
  const everywhere = {
    "?": toggleHelp,
    "/": () => document.querySelector("#bar input").select(),
    Escape: () => document.querySelector("dialog[open]")?.close(),
    ...Object.fromEntries(Object.entries(PAGES).filter(([, page]) => page.key && (!page.live || source.live))
      .map(([name, page]) => [page.key, () => go(to(sae, name))])),
  };
  const run = keys[event.key] ?? everywhere[event.key];
  if (run) {
    event.preventDefault();
    run();
  }
});

try {
  ({saes} = await source.saes());
  watchTips();
  addEventListener("hashchange", draw);
  await draw();
} catch (error) {
  main.replaceChildren(failure(error));
}
