// An initial text, so that a page with an empty box shows something after one click.

import {source} from "./source.js";

/** Fill an empty box with the text around the strongest example of the first feature of the list, if any feature
 * fired. If the user writes something meanwhile, it stays. */
export async function suggest(box, sae) {
  const {lines: [line]} = await source.features(sae.slug, {dead: "false", limit: 1});
  if (!line) return;
  const {groups: [{examples: [window]}], texts} = await source.feature(sae.slug, line.feature);
  const start = Math.max(0, ...window.starts.filter((place) => place <= window.at));
  const end = Math.min(window.ids.length, ...window.starts.filter((place) => place > window.at));
  const text = window.ids.slice(start, end).map((id) => texts[id] ?? "").join("");
  box.value ||= text;
}
