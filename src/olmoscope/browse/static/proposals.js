// Labels that programs propose for a feature, with their scores side by side, to be accepted or rejected.

import {h, plain, say} from "./dom.js";
import {source} from "./source.js";

const FIGURES = [
  ["detection", "detection", "AUROC for distinguishing held-out text in which the feature fires from text in which it does not"],
  ["on_lines", "same lines", "The same on the few lines on which all labels of a feature are judged; use it to compare labels"],
  ["fuzzing", "which token", "AUROC for distinguishing the tokens on which it fires from others of the same text"],
  ["intruder", "intruder", "Share of groups of five texts in which the one without the feature is found"],
  ["output", "output", "AUROC for distinguishing the tokens that it promotes from those that it suppresses"],
  ["clamped", "clamped", "AUROC for distinguishing the tokens that become likelier when it is clamped from those that become less likely"],
];

/** The proposals of a feature. `changed` is called when one was accepted or rejected. */
export function proposalList(sae, feature, changed) {
  let proposals = feature.proposals ?? [];
  const element = h("div.proposals", {"data-testid": "proposals"});
  const best = () => proposals.find((one) => one.verdict !== "rejected") ?? null;

  async function judge(proposal, verdict) {
    try {
      ({proposals} = await source.judge(sae.slug, proposal.id, verdict));
      feature.proposals = proposals;
      say(verdict === null ? "Taken back" : verdict === "accepted" ? "Accepted" : "Rejected");
      show();
      changed();
    } catch (error) {
      say(error.message, true);
    }
  }

  function judgeBest(verdict) {
    const proposal = best();
    if (proposal) judge(proposal, verdict);
    else say("No proposed label is left.");
  }

  const button = (proposal, verdict, name, key) => h("button.quiet", {type: "button",
    "data-testid": verdict, "aria-pressed": String(proposal.verdict === verdict),
    title: proposal === best() ? `${name} (${key})` : name,
    on: {click: () => judge(proposal, proposal.verdict === verdict ? null : verdict)}}, name);

  function show() {
    element.hidden = proposals.length === 0;
    element.replaceChildren(h("table.pairs.scores", h("thead", h("tr", h("th", {scope: "col"}, "Proposed label"),
      FIGURES.filter(([key]) => proposals.some((one) => scoreOf(one, key)))
        .map(([, name, help]) => h("th.number", {scope: "col", title: help}, name)),
      source.live ? h("th", {scope: "col"}, "Verdict") : null)),
    h("tbody", proposals.map((one) => h("tr", {"class": one.verdict ?? null, "data-testid": "proposal"},
      h("th", {scope: "row"}, h("bdi", plain(one.label, 300)), h("small", plain(one.labeller, 80))),
      FIGURES.filter(([key]) => proposals.some((other) => scoreOf(other, key))).map(([key]) => figure(scoreOf(one, key))),
      source.live ? h("td", button(one, "accepted", "Accept", "a"), button(one, "rejected", "Reject", "x")) : null)))));
  }

  show();
  return {element, best, judgeBest};
}

function scoreOf(proposal, key) {
  return key === "on_lines" ? proposal.scores.on_lines?.detection : proposal.scores[key];
}

function figure(score) {
  if (!score) return h("td.number.soft", {title: "not measured"}, "–");
  return h("td.number", {"data-tip": String(score.value)}, score.value.toFixed(2),
    h("span.soft", {title: "95% interval"}, ` ${score.low.toFixed(2)} – ${score.high.toFixed(2)}`));
}
