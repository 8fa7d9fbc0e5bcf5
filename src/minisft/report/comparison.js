function drawCurves() {
  const weight = +document.getElementById("smooth").value / 100;
  const log = document.getElementById("log").checked;
  for (const [key, label] of [["loss", "Loss by step"], ["grad_norm", "Gradient norm by step"]]) {
    const figure = document.getElementById(key);
    const series = data.names.map((name, index) => ({
      name, points: smoothed(data.curves[key][index], weight), color: data.styles[index],
    }));
    chart(figure, series, {log, label: `${label}, of ${data.names.join(", ")}`});
  }
}

if (document.getElementById("loss")) {
  drawCurves();
  for (const id of ["log", "smooth"]) document.getElementById(id).addEventListener("input", drawCurves);
}
if (document.getElementById("rungs"))
  chart(document.getElementById("rungs"), data.rungs, {label: "Held-out results of each trial at its rungs, by step"});
