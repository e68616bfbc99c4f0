// Small charts as SVG. Every bar carries its exact figures.

import {count, short, svg} from "./dom.js";

const WIDTH = 320;

/** Bars of equal width (log bins); the axis names the first, middle and last edge.
 * @param counts of each bin; log: whether heights are logarithms
 */
export function histogram({edges, counts}, {name, unit = "tokens", height = 84, log = false, format = short,
  marks = []}) {
  const most = Math.max(...counts, 1);
  const scale = (value) => log ? (Math.log10(value) + 0.5) / (Math.log10(most) + 0.5) : value / most;
  const wide = WIDTH / Math.max(counts.length, 1);
  const bars = counts.map((value, place) => {
    const tall = value > 0 ? Math.max(1.5, scale(value) * height) : 0;
    return svg("g.bar", {"data-tip": `${format(edges[place])} to ${format(edges[place + 1])}\n${count(value)} ${unit}`},
      svg("rect.hit", {x: place * wide, y: 0, width: wide, height}),
      svg("rect.fill", {x: place * wide + 0.5, y: height - tall, width: Math.max(0.5, wide - 1), height: tall, rx: 1}));
  });
  const ticks = [0, Math.round(counts.length / 2), counts.length].filter((place, at, all) => all.indexOf(place) === at);
  const axis = ticks.map((place, at) => svg("text.tick", {x: place * wide, y: height + 14,
    "text-anchor": at === 0 ? "start" : at === ticks.length - 1 ? "end" : "middle"}, format(edges[place])));
  const lines = marks.filter(({at}) => at >= 0 && at <= 1).map(({at, text}) => svg("g.mark",
    svg("line", {x1: at * WIDTH, x2: at * WIDTH, y1: 0, y2: height}), svg("title", text)));
  return svg("svg.chart", {viewBox: `0 0 ${WIDTH} ${height + 18}`, role: "img", "aria-label": name},
    bars, lines, svg("line.axis", {x1: 0, x2: WIDTH, y1: height, y2: height}), axis);
}

/** How many times more often than expected, as a bar for each item, with a line at 1.
 * @param items [{name, lift, rows}]
 */
export function lifts(items, {name, height = 56}) {
  const top = Math.max(...items.map((item) => item.lift), 1.25);
  const wide = WIDTH / Math.max(items.length, 1);
  const bars = items.map((item, place) => svg("g.bar",
    {"data-tip": `${item.name}\n${short(item.lift)}× as often as on average, ${count(item.rows)} tokens`},
    svg("rect.hit", {x: place * wide, y: 0, width: wide, height}),
    svg("rect.fill", {x: place * wide + 1, y: height * (1 - item.lift / top), width: Math.max(1, wide - 2),
      height: height * item.lift / top, rx: 1})));
  const one = height * (1 - 1 / top);
  const axis = items.length ? [svg("text.tick", {x: 0, y: height + 14}, items[0].name),
    svg("text.tick", {x: WIDTH, y: height + 14, "text-anchor": "end"}, items[items.length - 1].name)] : [];
  return svg("svg.chart", {viewBox: `0 0 ${WIDTH} ${height + 18}`, role: "img", "aria-label": name}, bars,
    svg("line.one", {x1: 0, x2: WIDTH, y1: one, y2: one}),
      svg("line.axis", {x1: 0, x2: WIDTH, y1: height, y2: height}), axis);
}

/** One horizontal bar, to put beside a name: `value` relative to `most`. */
export function beam(value, most, kind) {
  const width = most > 0 ? Math.max(1, 100 * Math.abs(value) / most) : 0;
  return svg(`svg.beam.${kind}`, {viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true"},
    svg("rect.fill", {x: 0, y: 0, width, height: 8, rx: 1}));
}

