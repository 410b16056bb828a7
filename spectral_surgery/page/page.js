const adapters = JSON.parse(document.getElementById("data").textContent);
const TABLE = [["rank", "r"], ["scale", "scale"], ["delta_norm", "delta"], ["effective_rank", "effective rank"],
  ["participation_ratio", "participation"], ["stable_rank", "stable rank"], ["nuclear", "nuclear"],
  ["frobenius", "Frobenius"], ["spectral", "spectral"], ["cancellation", "cancellation"], ["closest_pair", "closest pair"]];
const BASED = [["relative_norm", "of W"], ["intruders", "intruders"], ["top_overlap_output", "in W's top, out"],
  ["top_overlap_input", "in W's top, in"]];
const QUANTITIES = [["delta_norm", "norm of delta"], ["effective_rank", "effective rank"],
  ["participation_ratio", "participation ratio"], ["stable_rank", "stable rank"],
  ["energy", "energy of the first component"], ["cancellation", "cancellation"]];

let adapter = adapters[0];

function layersOf() {
  return [...new Set(adapter.groups.flatMap((group) => group.layers))].sort((a, b) => a - b);
}

function moduleText(path, extra = "") {
  const m = adapter.modules[path];
  const base = m.base ? `\n${show(100 * m.base.relative_norm)} % of the base weight, ${m.base.intruders} intruders`
    + (m.base.undecided ? `, ${m.base.undecided} undecided` : "") : "";
  return `${path}${extra}\ndelta ${show(m.delta_norm)}, scale ${show(m.scale)}\nrank ${m.rank}: effective `
    + `${show(m.effective_rank)}, stable ${show(m.stable_rank)}\nS ${show(m.S[0])} to ${show(m.S[m.S.length - 1])}${base}`;
}

function drawMap() {
  const quantity = $("quantity").value;
  const layers = layersOf();
  const of = (path) => {
    const m = adapter.modules[path];
    if (quantity === "energy") return m.S.length && m.frobenius ? (m.S[0] / m.frobenius) ** 2 : null;
    return quantity === "relative_norm" ? (m.base ? m.base.relative_norm : null) : m[quantity];
  };
  const at = adapter.groups.map((group) => Object.fromEntries(group.layers.map((n, i) => [n, group.paths[i]])));
  const path = (i, j) => at[i][layers[j]];
  heatmap("map", {
    rows: adapter.groups.map((group) => group.name), columns: layers.map(layerName), cell: 26, left: labelRoom(adapter.groups), across: "layer",
    value: (i, j) => (path(i, j) === undefined ? undefined : of(path(i, j))),
    text: (i, j, v) => moduleText(path(i, j), `\n${$("quantity").selectedOptions[0].text}: ${show(v)}`),
    scale: range(Object.keys(adapter.modules).map(of)),
  });
  $("map-note").textContent = "One cell a module. Delta is what is added to the weight, scale B A; its norm is Frobenius.";
}

const SIGNS = { 1: ["harmful", "▲", "#b35806"], 0: ["neutral", "·", "#6b6b75"], "-1": ["helpful", "▼", "#1f5fa8"] };

function drawFan() {
  const group = adapter.groups[Number($("kind").value)];
  const { svg, width } = canvas("fan", 330);
  const modules = group.paths.map((path) => adapter.modules[path]);
  const values = modules.flatMap((m) => m.S).filter((v) => v > 0);
  if (!values.length) return;
  const top = Math.max(...values), low = Math.max(Math.min(...values), top * 1e-4);
  const longest = Math.max(...modules.map((m) => m.S.length));
  const whole = Array.from({ length: longest }, (_, i) => i + 1);
  const { X, Y } = axes(svg, width, 330, { x: [1, Math.max(2, longest)], y: [Math.min(low, top / 1.5), top], log: true, whole,
    xlabel: "component", ylabel: "singular value of B A (logarithmic)" });
  let told = false;
  modules.forEach((m, i) => {
    const share = modules.length > 1 ? i / (modules.length - 1) : 0;
    const points = m.S.map((v, k) => [X(k + 1), Y(Math.max(v, Math.min(low, top / 1.5)))]);
    svg.append(node("path", { d: line(points), fill: "none", stroke: colour(share * 0.9), "stroke-width": 1.6 }));
    points.forEach(([x, y], k) => {
      const answer = m.response;
      told = told || Boolean(answer);
      const [word, mark, ink] = answer ? SIGNS[answer.sign[k]] : ["", "", colour(share * 0.9)];
      const dot = answer && word !== "neutral"
        ? node("text", { x, y: y + 5, "text-anchor": "middle", style: `fill:${ink};font-size:14px`, class: "dot" }, mark)
        : node("circle", { cx: x, cy: y, r: 3, fill: answer ? ink : colour(share * 0.9), class: "dot" });
      const heard = answer ? `\n${word}: dL/dS ${show(answer.mean[k])} ± ${show(answer.standard_error[k], 2)}` : "";
      tip(dot, `${group.paths[i]}\ncomponent ${k + 1}: S ${show(m.S[k])}${heard}`);
      svg.append(dot);
    });
  });
  const first = layerName(group.layers[0]), last = layerName(group.layers[group.layers.length - 1]);
  $("fan-note").textContent = `One line a module, dark is layer ${first}, bright is layer ${last}.`
    + (told ? ` ▲ harmful and ▼ helpful are significant on ${adapter.examples} rows; the value after ± is a standard error.` : "");
}

function drawMatrix() {
  const figure = $("figure").value;
  const inside = adapter.matrices.filter((m) => m.group === $("matrix-kind").value);
  const m = inside.find((one) => one.side === $("side").value) || inside[0];
  const chance = m[`${figure}_by_chance`];
  const scale = { ...ramp(chance.mean, 1, true), chance: true };
  const word = figure === "overlap" ? `overlap at k = ${m.k}` : "|cos| of first directions";
  heatmap("matrix", {
    rows: m.layers.map(layerName), columns: m.layers.map(layerName), left: 44, across: "layer", down: "layer", scale,
    value: (i, j) => m[figure][i][j],
    text: (i, j, v) => `${m.group} ${m.side}, layers ${layerName(m.layers[i])} and ${layerName(m.layers[j])}\n${word}: `
      + `${show(v)}\nchance ${show(chance.mean)}`,
  });
  const place = m.shared ? `in the ${m.space}` : `each in its own ${m.space}: only copies of a layer would stand out`;
  $("matrix-note").textContent = `${m.group} ${m.side}, ${m.dimension} dimensions, ${place}. Colours run in equal ratios `
    + `from chance to one. Mean overlap off the diagonal ${show(m.overlap_mean)}; of random adapters 99 % lie in `
    + `${show(m.overlap_by_chance.low)} to ${show(m.overlap_by_chance.high)}. Hatched: not well defined.`;
}

function drawCurve() {
  const c = adapter.curves[Number($("pair").value)];
  const { svg, width } = canvas("curve", 300);
  const floor = c.overlap_by_chance.mean / 3;
  const all = [...c.overlap, ...c.cosine].filter((v) => v !== null);
  const { X, Y } = axes(svg, width, 300, { x: [c.layers[0], c.layers[c.layers.length - 1]], whole: c.layers, log: true,
    y: [floor, Math.min(1, 1.5 * Math.max(...all, c.cosine_by_chance.high))], xlabel: "layer",
    ylabel: "● overlap  ○ |cos|  (logarithmic)" });
  [["overlap", "#00224e", "#00224e"], ["cosine", "#9a7400", "#ffffff"]].forEach(([figure, ink, fill]) => {
    const chance = c[`${figure}_by_chance`];
    const low = Y(Math.max(chance.low, floor));
    svg.append(node("rect", { x: X(c.layers[0]), width: X(c.layers[c.layers.length - 1]) - X(c.layers[0]) || 4,
      y: Y(chance.high), height: Math.max(1, low - Y(chance.high)), fill: ink, opacity: 0.11 }));
    const points = c.layers.map((n, i) => [n, c[figure][i]]).filter(([, v]) => v !== null);
    const drawn = points.map(([n, v]) => [X(n), Y(Math.max(v, floor))]);
    svg.append(node("path", { d: line(drawn), fill: "none", stroke: ink, "stroke-width": 1.6 }));
    drawn.forEach(([cx, cy], i) => {
      const dot = node("circle", { cx, cy, r: 4, fill, stroke: ink, "stroke-width": 1.5, class: "dot" });
      tip(dot, `layer ${layerName(points[i][0])}\n${figure === "cosine" ? "|cos|" : figure} ${show(points[i][1])}\nchance `
        + `${show(chance.mean)}, 99 % in ${show(chance.low)} to ${show(chance.high)}`);
      svg.append(dot);
    });
  });
  $("curve-note").textContent = `${c.first} with ${c.second}: leading directions in the ${c.space}, overlap at k = ${c.k}. `
    + "Bands hold 99 % of random directions.";
}

function drawCompare() {
  const other = adapter.against[$("other").value];
  const relation = $("relation").value;
  const layers = layersOf();
  const find = (name, side) => other.curves.find((curve) => curve.first === `${name} ${side}`);
  const value = (i, j) => {
    const group = adapter.groups[i];
    const path = group.paths[group.layers.indexOf(layers[j])];
    if (path === undefined || other.cosine[path] === undefined) return undefined;
    if (relation === "cosine") return Math.abs(other.cosine[path]);
    const curve = find(group.name, relation);
    return curve ? curve.overlap[curve.layers.indexOf(layers[j])] : undefined;
  };
  heatmap("compare", {
    rows: adapter.groups.map((group) => group.name), columns: layers.map(layerName), cell: 26, left: labelRoom(adapter.groups), across: "layer",
    scale: ramp(0, 1, false), value,
    text: (i, j, v) => {
      const group = adapter.groups[i];
      const path = group.paths[group.layers.indexOf(layers[j])];
      return `${path}\ncosine of deltas ${show(other.cosine[path])}\nstrength ${show(other.strength[path])} of the other`
        + (relation === "cosine" ? "" : `\n${relation} overlap ${show(v)}, chance ${show(find(group.name, relation).overlap_by_chance.mean)}`);
    },
  });
  $("compare-note").textContent = `${other.missing} modules are in one of the two only. The cosine of two deltas is one for `
    + "copies and for rescalings, and near zero for unrelated adapters; its size is shown.";
}

function drawFindings() {
  const found = adapter.findings.map((finding) => {
    const item = document.createElement("li");
    item.className = finding.severity;
    const word = document.createElement("b");
    word.textContent = finding.severity;
    const code = document.createElement("code");
    code.textContent = finding.code;
    const rest = document.createElement("p");
    rest.textContent = `${finding.evidence} ${finding.advice}`;
    item.append(word, `${finding.what} `, code, rest);
    return item;
  });
  const none = document.createElement("li");
  none.textContent = "Nothing stands out.";
  $("findings").replaceChildren(...(found.length ? found : [none]));
}

function drawTable() {
  const head = document.createElement("tr");
  const based = Object.values(adapter.modules).some((m) => m.base) ? BASED : [];
  head.append(...["module", ...[...TABLE, ...based].map(([, label]) => label)].map((label) => {
    const cell = document.createElement("th");
    cell.textContent = label;
    return cell;
  }));
  const rows = Object.entries(adapter.modules).map(([path, m]) => {
    const row = document.createElement("tr");
    row.append(...[path, ...TABLE.map(([key]) => show(m[key], 4)), ...based.map(([key]) => show(m.base?.[key]))].map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  });
  $("table").replaceChildren(head, ...rows);
}

function draw() {
  drawMap();
  drawFan();
  if (adapter.matrices.length) drawMatrix();
  if (adapter.curves.length) drawCurve();
  if (Object.keys(adapter.against).length) drawCompare();
}

function choose() {
  adapter = adapters[Number($("adapter").value)];
  const based = Object.values(adapter.modules).some((m) => m.base);
  const others = Object.keys(adapter.against);
  options("quantity", based ? [...QUANTITIES, ["relative_norm", "norm relative to the base weight"]] : QUANTITIES, drawMap);
  options("kind", adapter.groups.map((group, i) => [i, group.name]), drawFan);
  options("matrix-kind", [...new Set(adapter.matrices.map((m) => m.group))].map((name) => [name, name]), drawMatrix);
  options("side", [["output", "output"], ["input", "input"]], drawMatrix);
  options("figure", [["overlap", "subspace overlap"], ["cosine", "|cos| of first directions"]], drawMatrix);
  options("pair", adapter.curves.map((c, i) => [i, `${c.first} with ${c.second}`]), drawCurve);
  options("other", others.map((name) => [name, name]), drawCompare);
  options("relation", [["cosine", "cosine of deltas"], ["output", "overlap of output directions"],
    ["input", "overlap of input directions"]], drawCompare);
  const usual = adapter.curves.findIndex((c) => c.first === "o_proj output" && c.second === "down_proj output");
  if (usual >= 0) $("pair").value = usual;
  if (adapter.matrices.some((m) => m.group === "o_proj")) $("matrix-kind").value = "o_proj";
  $("s-matrix").hidden = !adapter.matrices.length;
  $("s-curve").hidden = !adapter.curves.length;
  $("s-other").hidden = !others.length;
  $("headline").textContent = adapter.headline;
  drawFindings();
  drawTable();
  draw();
}

options("adapter", adapters.map((one, i) => [i, one.name]), choose);
$("adapter-choice").hidden = adapters.length < 2;
choose();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
document.body.dataset.ready = "yes";
