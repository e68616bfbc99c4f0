// Copies a feature as a link, as JSON, or as Markdown for a note.

import {h, percent, plain, say, short} from "./dom.js";

export function copyMenu(sae, feature) {
  const button = (name, test, make) => h("button", {type: "button", "data-testid": test,
    on: {click: () => copy(make(), name)}}, name);
  return h("details.menu", h("summary", {"data-testid": "copy"}, "Copy"), h("div",
    button("Link", "copy-link", () => location.href),
    button("JSON", "copy-json", () => JSON.stringify({sae: sae.name, model: sae.model, site: sae.site, ...feature},
      null, 1)),
    button("Markdown", "copy-markdown", () => markdown(sae, feature))));
}

/** Text with backslashes before characters that Markdown or HTML would read as markup. */
const escaped = (text) => plain(text, 300).replace(/[\\`*_{}[\]()<>#+!|~&]/g, "\\$&");
const code = (text) => {
  const shown = plain(text, 60);
  const fence = "`".repeat(Math.max(0, ...[...shown.matchAll(/`+/g)].map((match) => match[0].length)) + 1);
  return fence.length > 1 ? `${fence} ${shown} ${fence}` : `${fence}${shown}${fence}`;
};

export function markdown(sae, feature) {
  const text = (id) => feature.texts[id] ?? "";
  const label = feature.entry?.label ? `: ${escaped(feature.entry.label)}` : "";
  const logits = (items) => items.map((one) => code(text(one.token))).join(" ");
  const line = ({window: one}) => one.ids.map((id, place) =>
    place === one.at ? `**${escaped(text(id))}**` : escaped(text(id))).join("");
  const top = feature.groups.find((group) => group.kind === "top")?.examples ?? [];
  return [`## Feature ${feature.feature}${label}`, "",
    `${escaped(sae.name)}, ${sae.site} of ${escaped(sae.model)}. Fires on ${percent(feature.density)} of tokens, typically at `
      + `${short(feature.mean)}, at most ${short(feature.max)}.`, "",
    ...(feature.entry?.note ? [escaped(feature.entry.note), ""] : []),
    ...(feature.promoted ? [`Promotes ${logits(feature.promoted)}`, "", `Suppresses ${logits(feature.suppressed)}`, ""]
      : []),
    ...top.slice(0, 10).map((window) => `- ${short(window.value)} ${line({window})}`), "", `<${location.href}>`,
      ""].join("\n");
}

async function copy(text, name) {
  try {
    await navigator.clipboard.writeText(text);
    say(`${name} copied`);
  } catch {
    // Browsers allow only secure pages to use the clipboard; otherwise show a text to copy by hand.
    const box = h("textarea", {readonly: true, rows: 12, "aria-label": name, value: text});
    const dialog = h("dialog.help", h("h2", `Copy this ${name}`), box,
      h("button", {type: "button", on: {click: () => dialog.remove()}}, "Close"));
    document.body.append(dialog);
    dialog.showModal();
    box.select();
  }
}
