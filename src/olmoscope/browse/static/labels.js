// Shows the label and note of a feature, with editing in place and their history; and the proposals of programs.

import {h, plain, say} from "./dom.js";
import {proposalList} from "./proposals.js";
import {source} from "./source.js";

export function labelBox(sae, feature) {
  let entry = feature.entry;
  let editing = false;
  const element = h("div.labelbox", {"data-testid": "label-box"});
  const proposals = proposalList(sae, feature, () => { if (!editing) show(); });

  function show() {
    editing = false;
    const label = entry?.label ?? "";
    const note = entry?.note ?? "";
    const proposed = label ? null : proposals.best();
    element.replaceChildren(
      h("div.labelline", label || proposed
        ? h("bdi.label", {"data-testid": "label"}, plain(label || proposed.label, 20000))
        : h("span.none", {"data-testid": "label"}, source.live ? "no label yet" : "no label"),
        proposed && h("small", `proposed by ${plain(proposed.labeller, 80)}`),
        source.live && h("button.quiet", {type: "button", "data-testid": "edit-label", title: "Write a label (l)",
          on: {click: edit}}, label || note ? "Edit" : "Label it"),
        source.live && entry && h("button.quiet", {type: "button", "data-testid": "history", on: {click: history}},
          "History")) || "",
      note ? h("p.note", {"data-testid": "note"}, plainLines(note)) : "", proposals.element);
  }

  function edit() {
    editing = true;
    const label = h("input", {type: "text", "aria-label": "Label", "data-testid": "label-input",
      placeholder: "What does this feature represent?", maxlength: 2000, value: entry?.label ?? ""});
    const note = h("textarea", {rows: 3, "aria-label": "Note", "data-testid": "note-input",
      placeholder: "Notes: evidence, doubts, links", maxlength: 20000, value: entry?.note ?? ""});
    const save = async () => {
      try {
        ({entry} = await source.label(sae.slug, feature.feature, {label: label.value, note: note.value}));
        feature.entry = entry;
        say("Saved");
        show();
      } catch (error) {
        say(error.message, true); // the typed text stays
      }
    };
    const keys = (event) => {
      if (event.key === "Escape") show();
      else if (event.key === "Enter" && (event.target === label || event.ctrlKey || event.metaKey)) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    element.replaceChildren(h("div.editor", {on: {keydown: keys}}, label, note, h("div.actions",
      h("button.strong", {type: "button", "data-testid": "save-label", on: {click: save}}, "Save"),
      h("button", {type: "button", on: {click: show}}, "Cancel"),
        h("small", "Enter saves, Escape cancels"))));
    label.select();
  }

  async function history() {
    const {entries} = await source.history(sae.slug, feature.feature);
    const dialog = h("dialog.help", {"aria-label": "History", "data-testid": "history-list"},
      h("h2", `History of feature ${feature.feature}`),
      h("ol.history", entries.map((one) => h("li", h("time", {datetime: one.written},
        new Date(one.written).toLocaleString()), one.author ? h("bdi", ` ${plain(one.author, 80)}`) : "",
        h("div", one.label ? h("bdi.label", plain(one.label, 20000)) : h("span.none", "label removed")),
          one.note ? h("p.note", plainLines(one.note)) : ""))),
      h("button", {type: "button", on: {click: () => dialog.remove()}}, "Close"));
    document.body.append(dialog);
    dialog.showModal();
    dialog.addEventListener("close", () => dialog.remove());
  }

  show();
  return {element, edit, accept: () => proposals.judgeBest("accepted"), reject: () => proposals.judgeBest("rejected"),
    leave: () => { if (editing) say("The label was not saved."); }};
}

/** A note with its line breaks; all other invisible characters are made visible. */
const plainLines = (text) => text.split("\n").map((line, place) => [place ? h("br") : "", plain(line, 20000)]);
