"use strict";
// The value of every curve at the step nearest to the pointer. All text is set as text. Listens to
// the whole document, so that a chart may change meanwhile.
{
  const make = (name) => {
    const made = Object.assign(document.createElement("div"), { className: name, hidden: true });
    made.dataset.own = ""; // not a part of the page that was written
    return made;
  };
  const rule = make("rule");
  const tip = make("tip");
  let text, range, series, steps; // of the chart that was pointed at last
  const read = (plot) => {
    if (plot.dataset.series === text) return;
    text = plot.dataset.series;
    range = JSON.parse(plot.dataset.range);
    series = JSON.parse(text);
    steps = [...new Set(series.flatMap((one) => one.at.map((point) => point[0])))];
  };
  const hide = () => { rule.hidden = tip.hidden = true; };
  const show = (event) => {
    const area = event.target.closest?.(".area");
    if (!area) return hide();
    read(area.closest(".plot"));
    if (rule.parentNode !== area) area.append(rule, tip);
    const [left, right] = range;
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
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.documentElement.addEventListener("pointerleave", hide);
}
