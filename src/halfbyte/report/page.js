"use strict";
// The value of every curve at the step nearest to the pointer. All text is set as text.
for (const plot of document.querySelectorAll(".plot")) {
  const area = plot.querySelector(".area");
  const [left, right] = JSON.parse(plot.dataset.range);
  const series = JSON.parse(plot.dataset.series);
  const steps = [...new Set(series.flatMap((one) => one.at.map((point) => point[0])))];
  const rule = Object.assign(document.createElement("div"), { className: "rule", hidden: true });
  const tip = Object.assign(document.createElement("div"), { className: "tip", hidden: true });
  area.append(rule, tip);
  const show = (event) => {
    const box = area.getBoundingClientRect();
    const x = left + ((event.clientX - box.left) / box.width) * (right - left);
    const near = (a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a);
    const step = steps.reduce(near);
    tip.replaceChildren(Object.assign(document.createElement("div"), {
      textContent: `step ${Math.round(step).toLocaleString("en")}`,
    }));
    for (const one of series) {
      const point = one.at.find((candidate) => candidate[0] === step);
      if (!point) continue;
      const row = document.createElement("div");
      const mark = document.createElement("i");
      mark.className = `c${one.color}`;
      row.append(mark, `${one.name}  ${point[2]}`);
      tip.append(row);
    }
    rule.hidden = tip.hidden = false;
    const place = ((step - left) / (right - left)) * box.width;
    rule.style.left = `${place}px`;
    const beside = place + 12 + tip.offsetWidth > box.width ? place - 12 - tip.offsetWidth : place + 12;
    tip.style.left = `${Math.max(-box.left + 4, beside)}px`;
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => { rule.hidden = tip.hidden = true; });
}
