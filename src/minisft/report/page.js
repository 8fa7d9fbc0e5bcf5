const get = (id) => document.getElementById(id);
const MOST_WORDS = 1200;  // words of a text up to which the words of two texts are compared
const PRINTED = 5;  // rows that are printed, the first ones of the chosen order

function drawLoss() {
  const weight = +get("smooth").value / 100;
  chart(get("loss"), [
    {name: "training", points: smoothed(data.train, weight), color: "c0"},
    {name: "held-out", points: data.test, color: "c1", dots: true},
  ], {log: get("log").checked, unit: "loss", label: "Loss per supervised token by step"});
}

function drawSources() {
  const figure = get("sources");
  if (!figure) return;
  const weight = +get("smooth").value / 100;
  const curves = data.sources.map(({short: name, points}, index) => ({name, points: smoothed(points, weight), color: `c${index % 8}`}));
  chart(figure, curves, {log: get("log").checked, unit: "loss", label: "Training loss per supervised token of each source, by step"});
}

function drawScores() {
  Object.entries(data.scores).forEach(([metric, {title: name, figure: id, points, constant}], index) => {
    const figure = get(id);
    const intervals = points.some((point) => point.length > 2) ? ", with 95 % intervals" : "";
    const best = points[data.systems.indexOf(data.best)];
    chart(figure, [{
      name, points, color: `c${index % 8}`, dots: true, ring: best && best[0],
      ...(constant === null ? {} : {level: constant, levelName: "constant baseline"}),
      select: (place) => showRows(data.systems[place], metric),
    }], {zero: true, unit: name, label: `${name} by step${intervals}`});
  });
}

// --- the answers -------------------------------------------------------------------------------------------

let shown = [], current = 0;

const scoresOf = (row) => row.scores[get("metric").value];  // of all models; undefined for the user's own prompts
const title = (metric) => data.scores[metric].title;
const systemIndex = () => data.systems.indexOf(get("system").value);

function key(row) {
  const scores = scoresOf(row), order = get("order").value;
  if (order === "file" || !scores) return row.number === undefined ? -1 : row.number;
  const sign = data.scores[get("metric").value].lower ? -1 : 1;  // of a better score
  const own = sign * scores[systemIndex()], gain = own - sign * scores[0];
  return order === "worst" ? own : order === "worsened" ? gain : -gain;
}

function search() {
  const words = get("search").value.toLowerCase();
  const matches = (row) => [row.title, row.prompt, row.reference || "", ...row.texts].some((text) => text.toLowerCase().includes(words));
  shown = data.examples.map((row, index) => [row.number === undefined ? 0 : 1, key(row), index])  // one's own prompts come first
    .filter(([, , index]) => matches(data.examples[index]))
    .sort((one, other) => one[0] - other[0] || one[1] - other[1] || one[2] - other[2]).map(([, , index]) => index);
  current = 0;
  get("pick").replaceChildren(...shown.map((index, position) => element("option", {value: position}, describe(data.examples[index]))));
  fillPrinted();
  showExample();
}

function fillPrinted() {
  get("printed").replaceChildren(...shown.slice(0, PRINTED).map((index) => {
    const row = data.examples[index], whole = element("section", {});
    const texts = element("div", {class: "pair"});
    whole.append(element("h3", {}, describe(row)), texts, cards(row));
    texts.append(labelled("Prompt", [row.prompt]), ...(row.reference === null ? [] : [labelled("Reference", reference(row))]));
    return whole;
  }));
}

function describe(row) {
  const scores = scoresOf(row);
  if (!scores) return row.title;
  const own = scores[systemIndex()], gain = own - scores[0];
  const change = systemIndex() === 0 ? "" : ` (${gain < 0 ? "\u2212" : "+"}${short(Math.abs(gain))})`;
  return `${row.title}: ${title(get("metric").value)} ${short(own)}${change}`;
}

function showExample() {
  const row = data.examples[shown[current]];
  get("position").textContent = row ? `${current + 1} of ${shown.length}` : "nothing found";
  get("asked").textContent = row ? row.prompt : "";
  get("wanted").replaceChildren();
  get("cards").replaceChildren();
  get("known").hidden = Boolean(row) && row.reference === null;  // the user's own prompt has no reference
  if (!row) return;
  get("pick").value = String(current);
  get("wanted").append(...reference(row));
  get("cards").replaceChildren(...cards(row).childNodes);
}

// The nodes of a reference, with the words that the chosen model's answer lacks marked.
function reference(row) {
  const text = row.reference || "";
  return get("against").value === "reference" ? marked(text, row.texts[row.outputs[systemIndex()]], "ins") : [text];
}

function cards(row) {
  const all = get("all").checked, chosen = systemIndex(), against = get("against").value, scores = scoresOf(row);
  const box = element("div", {class: "cards"});
  data.systems.forEach((name, index) => {
    if (!all && index !== 0 && index !== chosen) return;
    const label = name + (name === data.best ? ` (${data.bestLabel})` : "") + (scores ? `, ${title(get("metric").value)} ${short(scores[index])}` : "");
    const text = row.texts[row.outputs[index]];
    // The base model's answer is usually another one throughout: marks are for the models that learned.
    const other = index === 0 && chosen !== 0 ? null : against === "base" ? row.texts[row.outputs[0]] : against === "reference" ? row.reference : null;
    const card = labelled(label, !text ? ["(empty)"] : other === null ? [text] : marked(text, other, "del"));
    card.className = "card";
    box.append(card);
  });
  return box;
}

function labelled(title, nodes) {
  const box = element("div", {}), text = element("pre", {tabindex: "0"});
  text.append(...nodes);
  box.append(element("h3", {}, title), text);
  return box;
}

// The nodes of a text in which the words outside its longest common subsequence with another text are marked.
function marked(text, other, tag) {
  const split = (whole) => whole.match(/\s+|[\p{L}\p{N}]+|[^\s\p{L}\p{N}]/gu) || [];
  const own = split(text), theirs = split(other).filter((word) => word.trim());
  const words = own.map((word, index) => index).filter((index) => own[index].trim());
  if (words.length > MOST_WORDS || theirs.length > MOST_WORDS) return [text];
  const length = Array.from({length: words.length + 1}, () => new Uint16Array(theirs.length + 1));
  for (let i = words.length - 1; i >= 0; i--)
    for (let j = theirs.length - 1; j >= 0; j--)
      length[i][j] = own[words[i]] === theirs[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
  const alone = new Set();
  for (let i = 0, j = 0; i < words.length;) {
    if (j < theirs.length && own[words[i]] === theirs[j]) { i++; j++; }
    else if (j < theirs.length && length[i][j + 1] >= length[i + 1][j]) j++;
    else alone.add(words[i++]);
  }
  const nodes = [];
  let run = "";
  const close = (isMarked) => { if (run) nodes.push(isMarked ? element(tag, {}, run) : run); run = ""; };
  let inside = false;
  own.forEach((word, index) => {
    // Space between two marked words is marked too.
    const marks = word.trim() ? alone.has(index) : inside && alone.has(index + 1);
    if (marks !== inside) { close(inside); inside = marks; }
    run += word;
  });
  close(inside);
  return nodes;
}

function move(steps) {
  if (shown.length) current = (current + steps + shown.length) % shown.length;
  showExample();
}

// The rows behind a score: the worst answers of a model by a metric.
function showRows(system, metric) {
  get("system").value = system;
  if ([...get("metric").options].some((option) => option.value === metric)) get("metric").value = metric;
  get("order").value = "worst";
  get("search").value = "";
  search();
  get("examples").scrollIntoView();
}

// Make each score of the table a link to the rows behind it.
function linkScores() {
  const table = document.querySelector("[aria-labelledby=scores] table");
  if (!table || !data.examples.length) return;
  const heads = [...table.querySelector("thead tr").children].map((cell) => cell.textContent);
  [...table.querySelectorAll("tbody tr")].slice(0, data.systems.length).forEach((line, index) => {
    for (const [metric, {title: name}] of Object.entries(data.scores || {})) {
      const cell = line.children[heads.indexOf(name)];
      if (!cell || !cell.textContent) continue;
      const link = element("a", {href: "#examples", title: `The worst answers of ${data.systems[index]} by ${name}`}, cell.textContent);
      link.addEventListener("click", (event) => { event.preventDefault(); showRows(data.systems[index], metric); });
      cell.replaceChildren(link);
    }
  });
}

if (get("loss")) {
  const draw = () => { drawLoss(); drawSources(); };
  draw();
  for (const id of ["log", "smooth"]) get(id).addEventListener("input", draw);
}
if (data.scores) drawScores();
if (get("cards")) {
  const known = Object.keys(data.scores || {}).filter((metric) => data.examples.some((row) => row.scores[metric]));
  get("metric").replaceChildren(...known.map((metric) => element("option", {value: metric}, title(metric))));
  if (known.includes(data.answerMetric)) get("metric").value = data.answerMetric;
  get("system").replaceChildren(...data.systems.map((name) =>
    element("option", {value: name}, name + (name === data.best ? ` (${data.bestLabel})` : ""))));
  get("system").value = data.best || data.systems[0];
  get("search").addEventListener("input", search);
  for (const id of ["system", "order", "metric"]) get(id).addEventListener("change", search);
  for (const id of ["all", "against"]) get(id).addEventListener("change", () => { fillPrinted(); showExample(); });
  get("pick").addEventListener("change", (event) => { current = +event.target.value; showExample(); });
  get("previous").addEventListener("click", () => move(-1));
  get("next").addEventListener("click", () => move(1));
  search();
  linkScores();
}
