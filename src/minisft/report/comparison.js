const COLORS = 8;  // colours; the first curves are the widest, so that coinciding curves stay visible

function drawCurves() {
  const weight = +document.getElementById("smooth").value / 100;
  const log = document.getElementById("log").checked;
  for (const [key, label] of [["loss", "Loss by step"], ["grad_norm", "Gradient norm by step"]]) {
    const figure = document.getElementById(key);
    const series = data.names.map((name, index) => ({
      name, points: smoothed(data.curves[key][index], weight),
      color: `c${index % COLORS} wide${Math.max(0, Math.min(data.names.length, 4) - 1 - index)}`,
    }));
    chart(figure, series, {log, label: `${label}, of ${data.names.join(", ")}`});
  }
}

if (document.getElementById("loss")) {
  drawCurves();
  for (const id of ["log", "smooth"]) document.getElementById(id).addEventListener("input", drawCurves);
}
