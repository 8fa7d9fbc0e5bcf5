function drawLoss() {
  const weight = +document.getElementById("smooth").value / 100;
  chart(document.getElementById("loss"), [
    {name: "training", points: smoothed(data.train, weight), color: "c0"},
    {name: "held-out", points: data.test, color: "c1", dots: true},
  ], {log: document.getElementById("log").checked, label: "Loss per supervised token by step"});
}

function drawSources() {
  const figure = document.getElementById("sources");
  if (!figure) return;
  const weight = +document.getElementById("smooth").value / 100;
  const curves = data.sources.map(({name, points}, index) => ({name, points: smoothed(points, weight), color: `c${index % 8}`}));
  chart(figure, curves, {log: document.getElementById("log").checked, label: "Training loss per supervised token of each source, by step"});
}

function drawScores() {
  for (const [index, {title, figure: id, points, constant}] of Object.values(data.scores).entries()) {
    const figure = document.getElementById(id), color = `c${index % 8}`;
    const intervals = points.some((point) => point.length > 2) ? ", with 95 % intervals" : "";
    chart(figure, [{name: title, points, color, dots: true, level: constant}], {zero: true, label: `${title} by step${intervals}`});
  }
}

let shown = [], current = 0;

function showExample() {
  const cards = document.getElementById("cards");
  const row = data.examples[shown[current]];
  document.getElementById("position").textContent = row ? `${current + 1} of ${shown.length}` : "nothing found";
  cards.replaceChildren();
  document.getElementById("asked").textContent = row ? row.prompt : "";
  document.getElementById("wanted").textContent = row ? row.reference || "" : "";
  document.getElementById("known").hidden = Boolean(row) && row.reference === null;  // the user's own prompt has no reference
  if (!row) return;
  document.getElementById("pick").value = String(current);
  const all = document.getElementById("all").checked;
  data.systems.forEach((name, index) => {
    if (!all && name !== "base" && name !== data.best) return;
    const card = element("div", {class: "card"});
    const score = row.scores[index];
    card.append(element("h3", {}, name + (name === data.best ? ` (${data.bestLabel})` : "") + (score === null ? "" : `, ${data.scoreName} ${score}`)));
    card.append(element("pre", {}, row.texts[row.outputs[index]] || "(empty)"));
    cards.append(card);
  });
}

function search() {
  const words = document.getElementById("search").value.toLowerCase();
  const matches = (row) => [row.title, row.prompt, row.reference || "", ...row.texts].some((text) => text.toLowerCase().includes(words));
  shown = data.examples.map((_, index) => index).filter((index) => matches(data.examples[index]));
  current = 0;
  document.getElementById("pick").replaceChildren(...shown.map((index, position) =>
    element("option", {value: position}, data.examples[index].title)));
  showExample();
}

function move(steps) {
  if (shown.length) current = (current + steps + shown.length) % shown.length;
  showExample();
}

if (document.getElementById("loss")) {
  const draw = () => { drawLoss(); drawSources(); };
  draw();
  for (const id of ["log", "smooth"]) document.getElementById(id).addEventListener("input", draw);
}
if (data.scores) drawScores();
if (document.getElementById("cards")) {
  document.getElementById("search").addEventListener("input", search);
  document.getElementById("all").addEventListener("change", showExample);
  document.getElementById("pick").addEventListener("change", (event) => { current = +event.target.value; showExample(); });
  document.getElementById("previous").addEventListener("click", () => move(-1));
  document.getElementById("next").addEventListener("click", () => move(1));
  search();
}
