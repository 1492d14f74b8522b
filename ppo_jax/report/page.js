// A pointer over a chart reads its values; without this script the page is complete.
"use strict";
for (const chart of document.querySelectorAll("[data-readout]")) {
  const plot = chart.querySelector(".plot");
  if (!plot) continue;
  const { range, lines } = JSON.parse(chart.dataset.readout);
  const steps = [...new Set(lines.flatMap((line) => line.points.map(([step]) => step)))].sort((a, b) => a - b);
  const hair = document.createElement("div");
  const tip = document.createElement("div");
  hair.className = "hair";
  tip.className = "tip";

  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = range[0] + ((event.clientX - box.left) / box.width) * (range[1] - range[0]);
    const step = steps.reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
    const left = (step - range[0]) / (range[1] - range[0]);
    const title = document.createElement("b");
    title.textContent = `iteration ${step}`;
    tip.replaceChildren(title);
    for (const line of lines) {
      const point = line.points.find(([at]) => at === step);
      if (!point) continue;
      const row = document.createElement("div");
      row.className = `c${line.color}`;
      row.textContent = `${line.label}: ${point[1]}`;
      tip.append(row);
    }
    plot.append(hair, tip);
    hair.style.left = `${100 * left}%`;
    tip.style.left = left < 0.5 ? `calc(${100 * left}% + 10px)` : "auto";
    tip.style.right = left < 0.5 ? "auto" : `calc(${100 * (1 - left)}% + 10px)`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => {
    hair.remove();
    tip.remove();
  });
}
