"use strict";
// Values under the pointer, or under the arrow keys, of every chart.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll(".chart")) {
  const { x, px, rows } = JSON.parse(svg.dataset.hover);
  const cross = svg.querySelector(".cross");
  const line = cross.querySelector("line");
  const dots = [...cross.querySelectorAll("circle")];
  let at = x.length - 1;
  const show = (index) => {
    at = Math.max(0, Math.min(x.length - 1, index));
    line.setAttribute("x1", px[at]);
    line.setAttribute("x2", px[at]);
    rows.forEach((row, i) => {
      dots[i].setAttribute("visibility", row.py[at] === null ? "hidden" : "visible");
      dots[i].setAttribute("cx", px[at]);
      dots[i].setAttribute("cy", row.py[at] ?? 0);
    });
    cross.setAttribute("visibility", "visible");
    tip.textContent = [x[at], ...rows.filter((r) => r.v[at] !== null).map((r) => `${r.name}  ${r.v[at]}`)].join("\n");
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const left = box.left + (px[at] / svg.viewBox.baseVal.width) * box.width;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const flip = left + 14 > room;
    tip.style.left = `${Math.max(8, flip ? left - 14 - tip.offsetWidth : left + 14)}px`;
    tip.style.top = `${Math.max(8, box.top + 8)}px`;
  };
  const hide = () => {
    tip.hidden = true;
    for (const node of [cross, ...dots]) node.setAttribute("visibility", "hidden");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const here = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let best = 0;
    px.forEach((p, i) => { if (Math.abs(p - here) < Math.abs(px[best] - here)) best = i; });
    show(best);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(at); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); show(at + step); }
    if (event.key === "Escape") hide();
  });
}
