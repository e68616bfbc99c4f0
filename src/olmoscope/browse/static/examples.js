// Pieces of text in which each token is shaded by the activation of a feature.

import {count, h, plain, say, short, visible} from "./dom.js";
import {showTip, tipLater} from "./tip.js";

const WIDER = [24, 100, 400];
/** Tokens on each side of the example, for each step of "more text". */

/** The tokens of a window as nodes.
 * @param lines whether line breaks break the line (otherwise they are shown only as signs)
 * @param max the activation of full colour
 */
export function tokens(window, texts, max, lines) {
  const leftOut = new Set(window.left_out);
  const starts = new Set(window.starts);
  return window.ids.flatMap((id, place) => {
    const text = texts[id] ?? "";
    const value = window.values[place];
    const node = document.createElement("span"); // there are thousands on a page, so this must be fast
    node.className = place === window.at ? "t at" : leftOut.has(place) ? "t out" : "t";
    if (value > 0) {
      node.dataset.value = value;
      node.style.setProperty("--a", shade(value, max));
    }
    if (text === "") node.append(h("span.sign", "empty"));
    else node.append(...visible(text, {lines, longest: 120}));
    tipLater(node, () =>
      `${plain(text, 60)}  ${leftOut.has(place) ? "left out of the index" : value}\nposition ${count(window.position + place)}, token ${id}`);
    return starts.has(place) && place > 0 ? [h("span.document", {title: "A new document begins"}), node] : [node];
  });
}

/** The share of the full colour: linear, but the least is visible. */
export const shade = (value, max) => (0.08 + 0.92 * Math.min(1, value / (max || 1))).toFixed(3);

/** One example: its text, with more context on request.
 * @param widen (before, after) -> {window, texts}; null if there is no more text
 */
export function example(window, texts, max, widen) {
  let shown = {window, texts};
  let step = 0;
  const text = h("div.text", {tabindex: "0", role: "group",
    "aria-label": `Example, activation ${short(window.value)}, on ${plain(texts[window.ids[window.at]] ?? "", 30)}`,
    on: {keydown: walk, click: (event) => !getSelection().toString() && step === 0 && show(1)}});
  const about = h("div.about");
  const button = h("button.more", {type: "button", "data-testid": "expand", "aria-expanded": "false",
    "aria-label": "More text around it",
    on: {click: () => show(step === 0 ? 1 : 0)}}, "⋯");
  const element = h("article.example", {"data-testid": "example", "data-place": window.place},
    h("span.value", {"data-tip": String(window.value)}, short(window.value)), text, button, about);

  function draw() {
    text.replaceChildren(...tokens(shown.window, shown.texts, max, step > 0));
    element.classList.toggle("wide", step > 0);
    button.setAttribute("aria-expanded", String(step > 0));
    const {document: number, source: name, sequence, position, at, more_before: before,
      more_after: after} = shown.window;
    const larger = step > 0 && step < WIDER.length - 1 && widen && (before || after);
    button.textContent = step === 0 ? "⋯" : "–";
    button.title = step === 0 ? "More text, with its line breaks (e)" : "Less text";
    about.replaceChildren(...(step === 0 ? [] : [
      h("span", `${plain(name, 60)} · document ${count(number)} · sequence ${count(sequence)} · position ${count(position + at)}`),
      larger ? h("button.link", {type: "button", "data-testid": "wider", on: {click: () => show(step + 1)}},
        "Even more text") : "",
    ]));
  }

  async function show(wanted) {
    const {more_before: before, more_after: after} = window;
    let next = {window, texts};
    if (wanted > 0 && widen && (before || after)) {
      try {
        next = await widen(WIDER[wanted], WIDER[wanted]);
      } catch (error) {
        say(error.message, true);
        return;
      }
    }
    shown = next;
    step = wanted;
    draw();
  }

  /** Arrow keys go from token to token and show their figures. */
  function walk(event) {
    if (event.key === "Enter") return show(step === 0 ? 1 : 0);
    if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return undefined;
    event.preventDefault();
    const all = [...text.querySelectorAll(".t")];
    const old = all.findIndex((node) => node.classList.contains("here"));
    const begin = old < 0 ? shown.window.at : old + (event.key === "ArrowRight" ? 1 : -1);
    const now = Math.min(Math.max(begin, 0), all.length - 1);
    all[old]?.classList.remove("here");
    all[now].classList.add("here");
    showTip(all[now]);
    return undefined;
  }

  draw();
  return {element, toggle: (open) => show(open ? 1 : 0)};
}
