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

// series: curves, each {name, points: [[x, y, low?, high?]], color, dots, level, levelName, ring, select}
//   level: a dotted horizontal line; ring: the x of a point with a ring; select(index): called when a dot is clicked
// options: {label: what the chart shows, unit: the name of its y axis, log, zero}
function chart(figure, series, options) {
  const width = 640, height = 340, left = 48, right = 20, top = options.unit ? 36 : 14, bottom = 46;
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
  if (options.unit) add("text", {x: 0, y: 18, class: "axis"}, options.unit);
  series.forEach((curve) => {
    if (curve.level !== undefined)
      add("line", {x1: left, x2: width - right, y1: Y(curve.level), y2: Y(curve.level), class: `dash ${curve.color}`});
    if (curve.points.length > 1)
      add("path", {d: "M" + curve.points.map((p) => `${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("L"), class: curve.color});
    if (!curve.dots) return;
    curve.points.forEach((p, index) => {
      if (p.length > 2) add("line", {x1: X(p[0]), x2: X(p[0]), y1: Y(p[2]), y2: Y(p[3]), class: curve.color});
      if (p[0] === curve.ring) add("circle", {cx: X(p[0]), cy: Y(p[1]), r: 8, class: `ring ${curve.color}`});
      const dot = add("circle", {cx: X(p[0]), cy: Y(p[1]), r: 4, class: `dot ${curve.color}`});
      if (!curve.select) return;
      dot.classList.add("chosen");
      dot.addEventListener("click", () => curve.select(index));
    });
  });
  series.filter((curve) => curve.levelName).forEach((curve) => {
    const above = Y(curve.level) - 6;  // below the line where the save button, in the corner, would cover the name
    add("text", {x: width - right, y: above < 56 ? above + 30 : above, "text-anchor": "end", class: "level"}, curve.levelName);
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
  const save = element("button", {type: "button", class: "save", title: "Save this picture as SVG, for slides and papers"}, "save");
  save.setAttribute("aria-label", `Save as a picture: ${options.label}`);
  save.addEventListener("click", () => savePicture(svg, series, options.label));
  figure.replaceChildren(svg, tip, save, figure.querySelector("figcaption") || "");
}

// A chart as an SVG file of its own: its styles stand in its elements, with a title and the names of the curves above it.
function savePicture(svg, series, label) {
  const copy = svg.cloneNode(true), {width, height} = svg.viewBox.baseVal;
  const kept = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-family", "paint-order"];
  const drawn = [...svg.querySelectorAll("*")], copied = [...copy.querySelectorAll("*")];
  drawn.forEach((node, index) => {
    const style = getComputedStyle(node);
    for (const name of kept) copied[index].style.setProperty(name, style.getPropertyValue(name));
    if (node.tagName === "text") copied[index].style.setProperty("font-size", "13px");
  });
  const page = getComputedStyle(document.body), head = 56;
  copy.setAttribute("viewBox", `0 ${-head} ${width} ${height + head}`);
  copy.setAttribute("width", 2 * width);
  copy.setAttribute("height", 2 * (height + head));
  copy.prepend(element("svg:rect", {x: 0, y: -head, width, height: height + head, fill: page.backgroundColor}));
  const write = (x, y, text, size, color) => copy.append(element("svg:text", {x, y, fill: color, style: `font: ${size}px ${page.fontFamily}`}, text));
  write(4, -head + 22, label, 17, page.color);
  let x = 4;
  series.forEach((curve) => {
    const line = svg.querySelectorAll(`path.${curve.color.split(" ")[0]}, circle.${curve.color.split(" ")[0]}`)[0];
    write(x, -head + 44, `\u25cf ${curve.name}`, 14, line ? getComputedStyle(line).stroke : page.color);
    x += 14 + 8.5 * (curve.name.length + 2);
  });
  const url = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], {type: "image/svg+xml"}));
  const link = element("a", {href: url, download: `${label.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60)}.svg`});
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function smoothed(points, weight) {
  let value;
  return points.map(([x, y]) => { value = value === undefined ? y : weight * value + (1 - weight) * y; return [x, value]; });
}
