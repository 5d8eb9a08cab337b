"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [first, last] = data.span;
  const width = Math.max(1, last - first);

  // The nearest point of a curve: its steps are in order.
  function nearest(points, step) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < step) low = middle; else high = middle;
    }
    if (high < 0) return null;
    return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
  }

  document.querySelectorAll("[data-chart]").forEach((figure, place) => {
    const curves = data.charts[place].filter((curve) => curve.points.length);
    const area = figure.querySelector(".area"), cursor = figure.querySelector(".cursor");
    const output = figure.querySelector("output");
    const steps = [...new Set([...curves.flatMap((curve) => curve.points.map((point) => point[0])),
                               ...data.marks.map((mark) => mark[0])])].sort((a, b) => a - b);
    let current = -1;

    function show(index) {
      if (!steps.length) return;
      current = Math.min(steps.length - 1, Math.max(0, index));
      const step = steps[current];
      cursor.hidden = false;
      cursor.style.left = `${(100 * (step - first)) / width}%`;
      const values = curves.map((curve) => {
        const point = nearest(curve.points, step);
        const at = point[0] === step ? "" : ` (step ${point[0]})`;
        return `${curve.name} ${Number(point[1].toPrecision(6))}${at}`;
      });
      const marks = data.marks.filter((mark) => mark[0] === step).map((mark) => mark[1]);
      output.textContent = [`step ${step}`, ...values, ...marks].join(" · ");
    }

    function closest(step) {
      let best = 0;
      steps.forEach((each, index) => {
        if (Math.abs(each - step) < Math.abs(steps[best] - step)) best = index;
      });
      return best;
    }

    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      show(closest(first + (width * (event.clientX - box.left)) / box.width));
    });
    figure.addEventListener("keydown", (event) => {
      const page = Math.max(1, Math.round(steps.length / 20));
      const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page };
      if (event.key in moves) show(current + moves[event.key]);
      else if (event.key === "Home") show(0);
      else if (event.key === "End") show(steps.length - 1);
      else if (event.key === "Escape") { cursor.hidden = true; output.textContent = "\u00a0"; current = -1; return; }
      else return;
      event.preventDefault();
    });
  });

  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  const copy = document.getElementById("copy");
  if (copy) copy.addEventListener("click", async () => {
    const text = document.getElementById("paste");
    try {
      await navigator.clipboard.writeText(text.textContent);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      copy.textContent = "Selected";
    }
  });
})();
