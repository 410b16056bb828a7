"use strict";
const $ = (id) => document.getElementById(id);
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55",
  "#fee838"].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));

function show(value, digits = 3) {
  return value === null || value === undefined ? "not defined" : String(Number(value.toPrecision(digits)));
}

function colour(share) {
  const at = Math.max(0, Math.min(1, share)) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const mix = CIVIDIS[low].map((part, i) => Math.round(part + (CIVIDIS[low + 1][i] - part) * (at - low)));
  return `rgb(${mix.join(",")})`;
}

function node(tag, attributes = {}, ...inner) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...inner);
  return made;
}

function tip(target, text) {
  const place = (event) => {
    const box = $("tip");
    box.textContent = text;
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 6))}px`;
    box.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
  };
  target.addEventListener("pointerenter", place);
  target.addEventListener("pointermove", place);
  target.addEventListener("pointerleave", () => { $("tip").hidden = true; });
}

function options(id, list, redraw) {
  const select = $(id);
  const before = select.value;
  select.replaceChildren(...list.map(([value, label]) => new Option(label, value)));
  if (list.some(([value]) => String(value) === before)) select.value = before;
  select.onchange = redraw;
}

function canvas(id, height) {
  const width = Math.max(280, $(id).clientWidth);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  $(id).replaceChildren(svg);
  return { svg, width };
}

const every = (count, room) => Math.max(1, Math.ceil(count / Math.max(2, Math.floor(room / 34))));

/** A scale of colours; `log` runs from `low` to `high` in equal ratios. */
function ramp(low, high, log) {
  const share = (value) => log
    ? Math.log(Math.max(value, low) / low) / Math.log(high / low)
    : (value - low) / (high - low || 1);
  return { low, high, log, colour: (value) => (value === null ? "url(#hatch)" : colour(share(value))) };
}

function hatch() {
  return node("defs", {}, node("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse" },
    node("rect", { width: 6, height: 6, fill: "#fff" }), node("path", { d: "M0 6L6 0", stroke: "#999" })));
}

/** Cells with row and column labels and a bar that explains the colours. */
function heatmap(id, { rows, columns, value, text, scale, cell, left, across, down }) {
  const width = Math.max(280, $(id).clientWidth);
  const w = (width - left - 6) / columns.length;
  const h = cell || w;
  const { svg } = canvas(id, rows.length * h + 84);
  svg.append(hatch());
  const nth = cell ? 1 : every(rows.length, rows.length * h * 1.6);
  rows.forEach((row, i) => {
    if (i % nth === 0) svg.append(node("text", { x: left - 6, y: i * h + h / 2 + 4, "text-anchor": "end" }, row));
    columns.forEach((_, j) => {
      const v = value(i, j);
      if (v === undefined) return;
      const rect = node("rect", { x: left + j * w, y: i * h, width: w + 0.4, height: h - (cell ? 1.5 : -0.4),
        fill: scale.colour(v), class: "cell" });
      tip(rect, text(i, j, v));
      svg.append(rect);
    });
  });
  const bottom = rows.length * h;
  columns.forEach((column, j) => {
    if (j % every(columns.length, width - left) === 0)
      svg.append(node("text", { x: left + (j + 0.5) * w, y: bottom + 14, "text-anchor": "middle" }, column));
  });
  svg.append(node("text", { x: left, y: bottom + 31, class: "soft" }, across));
  if (down) svg.append(node("text", { x: 12, y: bottom / 2, class: "soft", "text-anchor": "middle",
    transform: `rotate(-90 12 ${bottom / 2})` }, down));
  legend(svg, scale, left, bottom + 42, Math.min(300, width - left - 20));
}

function legend(svg, scale, x, y, length) {
  for (let i = 0; i < 60; i++)
    svg.append(node("rect", { x: x + (i * length) / 60, y, width: length / 60 + 0.5, height: 12, fill: colour(i / 59) }));
  [0, 0.5, 1].forEach((share) => {
    const v = scale.log ? scale.low * (scale.high / scale.low) ** share : scale.low + (scale.high - scale.low) * share;
    const told = share === 0 && scale.chance ? " (chance)" : share === 1 && scale.capped ? " or more" : "";
    const label = show(v, 2) + told;
    svg.append(node("text", { x: x + share * length, y: y + 27,
      "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle" }, label));
  });
}

/** Pixels that the longest name of a kind takes. */
const labelRoom = (groups) => Math.min(150, 14 + 7 * Math.max(...groups.map((group) => group.name.length)));

const layerName = (number) => (number < 0 ? "-" : String(number));

/** From zero to the largest value, or to 2.5 medians where one value would leave the rest without contrast. */
function range(values) {
  const finite = values.filter((value) => value !== null && value !== undefined).sort((a, b) => a - b);
  const top = finite.length ? finite[finite.length - 1] : 1;
  const cap = 2.5 * finite[Math.floor(finite.length / 2)];
  return { ...ramp(0, (cap > 0 ? Math.min(top, cap) : top) || 1, false), capped: cap > 0 && top > cap };
}

function line(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

/** Axes with a linear or logarithmic y; returns the two maps from values to pixels. */
function axes(svg, width, height, { x: [x0, x1], y: [y0, y1], log, xlabel, ylabel, whole }) {
  const left = 56, bottom = height - 38, right = width - 12, top = 20;
  const X = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (right - left);
  const share = (v) => (log ? Math.log(v / y0) / Math.log(y1 / y0) : (v - y0) / (y1 - y0 || 1));
  const Y = (v) => bottom - share(v) * (bottom - top);
  for (let i = 0; i <= 4; i++) {
    const v = log ? y0 * (y1 / y0) ** (i / 4) : y0 + ((y1 - y0) * i) / 4;
    svg.append(node("path", { d: `M${left} ${Y(v)}H${right}`, stroke: "#e4e4ea" }),
      node("text", { x: left - 6, y: Y(v) + 4, "text-anchor": "end" }, show(v, log ? 2 : 3)));
  }
  const step = every(whole.length, right - left);
  whole.forEach((v, i) => {
    if (i % step === 0) svg.append(node("text", { x: X(v), y: bottom + 16, "text-anchor": "middle" }, layerName(v)));
  });
  svg.append(node("text", { x: right, y: bottom + 33, "text-anchor": "end", class: "soft" }, xlabel),
    node("text", { x: 4, y: 11, class: "soft" }, ylabel));
  return { X, Y };
}
