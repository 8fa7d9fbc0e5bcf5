"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";

function element(name, attributes, text) {
  const node = name.startsWith("svg:")
    ? document.createElementNS(NS, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;  // never innerHTML, which would run what a model wrote
  return node;
}

function short(value) {
  const size = Math.abs(value);
  return size >= 1e6 ? (value / 1e6).toPrecision(3) + "M" : size >= 100 ? value.toFixed(0)
    : size >= 1 ? String(+value.toFixed(2)) : String(+value.toPrecision(3));
}

function ticks(low, high, log) {
  if (log) {
    const marks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of [1, 2, 5]) marks.push(digit * 10 ** power);
    return marks.filter((mark) => mark >= low && mark <= high);
  }
  const unit = 10 ** Math.floor(Math.log10((high - low) / 4 || 1));
  const spacing = [1, 2, 5, 10].map((times) => times * unit).find((width) => (high - low) / width <= 6);
  const marks = [];
  for (let mark = Math.ceil(low / spacing) * spacing; mark <= high + spacing / 1e6; mark += spacing) marks.push(mark);
  return marks;
}

// series: curves, each {name, points: [[x, y, low?, high?]], color, dots, level}; level: a dotted horizontal line
function chart(figure, series, options) {
  const width = 640, height = 320, left = 48, right = 20, top = 12, bottom = 46;
  const points = series.flatMap((curve) => curve.points);
  if (!points.length) { figure.replaceChildren(element("p", {class: "soft"}, "Nothing to draw yet.")); return; }
  const xs = points.map((point) => point[0]);
  const ys = [...points.flatMap((point) => point.slice(1)), ...series.filter((curve) => curve.level !== undefined).map((curve) => curve.level)];
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let y0 = options.zero ? 0 : Math.min(...ys), y1 = Math.max(...ys);
  const log = options.log && y0 > 0;
  if (!log && !options.zero) y0 = Math.max(0, y0 - (y1 - y0) * 0.05);
  if (y1 <= y0) y1 = y0 + 1;
  const scale = log ? Math.log : (value) => value;
  const X = (x) => left + (x - x0) / (x1 - x0) * (width - left - right);
  const Y = (y) => height - bottom - (scale(y) - scale(y0)) / (scale(y1) - scale(y0)) * (height - top - bottom);
  const svg = element("svg:svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.label});
  const add = (name, attributes, text) => { const node = element("svg:" + name, attributes, text); svg.append(node); return node; };
  for (const mark of ticks(y0, y1, log)) {
    add("line", {x1: left, x2: width - right, y1: Y(mark), y2: Y(mark), class: "grid"});
    add("text", {x: left - 6, y: Y(mark) + 4, "text-anchor": "end"}, short(mark));
  }
  for (const mark of ticks(x0, x1, false)) add("text", {x: X(mark), y: height - 27, "text-anchor": "middle"}, short(mark));
  add("text", {x: width - right, y: height - 5, "text-anchor": "end"}, "step");
  series.forEach((curve) => {
    if (curve.level !== undefined)
      add("line", {x1: left, x2: width - right, y1: Y(curve.level), y2: Y(curve.level), class: `dash ${curve.color}`});
    if (curve.points.length > 1)
      add("path", {d: "M" + curve.points.map((p) => `${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("L"), class: curve.color});
    if (!curve.dots) return;
    for (const p of curve.points) {
      if (p.length > 2) add("line", {x1: X(p[0]), x2: X(p[0]), y1: Y(p[2]), y2: Y(p[3]), class: curve.color});
      add("circle", {cx: X(p[0]), cy: Y(p[1]), r: 3.5, class: `dot ${curve.color}`});
    }
  });
  const cross = add("line", {y1: top, y2: height - bottom, class: "grid", visibility: "hidden"});
  const tip = element("div", {class: "tip"});
  svg.addEventListener("pointerleave", () => { tip.style.display = "none"; cross.setAttribute("visibility", "hidden"); });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pointerStep = x0 + ((event.clientX - box.left) / box.width * width - left) / (width - left - right) * (x1 - x0);
    const nearest = series.filter((curve) => curve.points.length).map((curve) => [curve, curve.points.reduce((best, point) =>
      Math.abs(point[0] - pointerStep) < Math.abs(best[0] - pointerStep) ? point : best)]);
    const distance = Math.min(...nearest.map(([, point]) => Math.abs(point[0] - pointerStep)));
    const hits = nearest.filter(([, point]) => Math.abs(point[0] - pointerStep) === distance);
    const lines = hits.map(([curve, p]) => `${curve.name}: ${p[1].toPrecision(4)}` + (p.length > 2 ? ` [${short(p[2])}, ${short(p[3])}]` : ""));
    tip.textContent = [`step ${hits[0][1][0]}`, ...lines].join("\n");
    const crossX = X(hits[0][1][0]);
    cross.setAttribute("x1", crossX); cross.setAttribute("x2", crossX); cross.setAttribute("visibility", "visible");
    tip.style.display = "block"; tip.style.top = "0.5rem";
    tip.style.left = crossX < width / 2 ? `${crossX / width * 100 + 2}%` : "auto";
    tip.style.right = crossX < width / 2 ? "auto" : `${102 - crossX / width * 100}%`;
  });
  figure.replaceChildren(svg, tip, figure.querySelector("figcaption") || "");
}

function smoothed(points, weight) {
  let value;
  return points.map(([x, y]) => { value = value === undefined ? y : weight * value + (1 - weight) * y; return [x, value]; });
}
