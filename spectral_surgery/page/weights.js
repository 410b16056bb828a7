const found = JSON.parse(document.getElementById("data").textContent);
const modules = Object.fromEntries(found.modules.map((m) => [m.module, m]));
const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
const QUANTITIES = {
  change: ["size of the change, relative to the weight", (m) => m.change],
  ratio: ["ratio of the largest singular values", (m) => m.ratio[0]],
  index: ["mean |cos| by index, output side", (m) => mean(m.output_by_index)],
  best: ["mean |cos| of best partners, output side", (m) => mean(m.output_best)],
  new: ["new directions among the first ten", (m) => m.nearness.high.filter((v) => v < 0.5).length],
};
const FIGURES = { output_by_index: "output side, by index", output_best: "output side, best partner",
  output_angles: "output side, principal angles", input_by_index: "input side, by index",
  input_best: "input side, best partner", input_angles: "input side, principal angles" };

function drawMap() {
  const [words, of] = QUANTITIES[$("quantity").value];
  const layers = [...new Set(found.groups.flatMap((group) => group.layers))].sort((a, b) => a - b);
  const path = (i, j) => found.groups[i].paths[found.groups[i].layers.indexOf(layers[j])];
  heatmap("map", {
    rows: found.groups.map((group) => group.name), columns: layers.map(layerName), cell: 26, left: labelRoom(found.groups),
    across: "layer", value: (i, j) => (path(i, j) === undefined ? undefined : of(modules[path(i, j)])),
    text: (i, j, v) => `${path(i, j)}\n${words}: ${show(v)}\nchange ${show(100 * modules[path(i, j)].change)} % of the weight`,
    scale: range(found.modules.map(of)),
  });
  $("map-note").textContent = `One cell a weight. ${found.missing} matrices are in one of the two only.`;
}

/** One line a layer of a kind: values by index. */
function lines(id, kind, of, { log, ylabel, chance, low, high }) {
  const group = found.groups[Number(kind)];
  const { svg, width } = canvas(id, 320);
  const series = group.paths.map((path) => of(modules[path]));
  const longest = Math.max(...series.map((values) => values.length));
  const { X, Y } = axes(svg, width, 320, { x: [1, Math.max(2, longest)], y: [low(series.flat()), high(series.flat())], log,
    whole: Array.from({ length: longest }, (_, i) => i + 1), xlabel: "singular direction", ylabel });
  if (chance !== undefined) svg.append(node("path", { d: `M${X(1)} ${Y(chance)}H${X(Math.max(2, longest))}`, stroke: "#6b6b75",
    "stroke-dasharray": "5 4" }));
  series.forEach((values, i) => {
    const ink = colour(0.9 * (series.length > 1 ? i / (series.length - 1) : 0));
    const points = values.map((v, k) => [X(k + 1), Y(v)]);
    svg.append(node("path", { d: line(points), fill: "none", stroke: ink, "stroke-width": 1.4 }));
    points.forEach(([cx, cy], k) => {
      const dot = node("circle", { cx, cy, r: 3, fill: ink, class: "dot" });
      const m = modules[group.paths[i]];
      tip(dot, `${group.paths[i]}\ndirection ${k + 1}: ${show(values[k])}\nS ${show(m.before[k])} before, ${show(m.after[k])} after`
        + (chance === undefined ? "" : `\nchance ${show(chance)}`));
      svg.append(dot);
    });
  });
  return group;
}

const inks = (group) => `One line a layer, dark is layer ${layerName(group.layers[0])}, bright is layer `
  + `${layerName(group.layers[group.layers.length - 1])}.`;

function drawRatio() {
  const group = lines("ratio", $("kind").value, (m) => m.ratio.map((v) => (v === null ? 1 : v)), { log: false,
    ylabel: "singular value after over before", chance: 1, low: (all) => Math.min(0.98, ...all), high: (all) => Math.max(1.02, ...all) });
  $("ratio-note").textContent = `${inks(group)} Dashed: no change.`;
}

function drawCosine() {
  const figure = $("figure").value;
  const angles = figure.endsWith("angles");
  const first = modules[found.groups[Number($("cosine-kind").value)].paths[0]];
  const chance = first[`${figure.replace("_by_index", "")}_by_chance`];
  const group = lines("cosine", $("cosine-kind").value, (m) => m[figure], { log: false,
    ylabel: angles ? "principal angle, degrees" : "|cos|", chance: angles ? undefined : chance.mean,
    low: () => 0, high: () => (angles ? 90 : 1) });
  $("cosine-note").textContent = `${inks(group)} ${angles ? "Ascending, between the two leading subspaces."
    : `Dashed: what random directions give, ${show(chance.mean)}.`} `
    + `Computed to a residual of ${show(Math.max(...found.modules.map((m) => m.residual)), 1)} of the largest singular value.`;
}

const kinds = found.groups.map((group, i) => [i, group.name]);
options("quantity", Object.entries(QUANTITIES).map(([key, [words]]) => [key, words]), drawMap);
options("kind", kinds, drawRatio);
options("cosine-kind", kinds, drawCosine);
options("figure", Object.entries(FIGURES), drawCosine);
$("headline").textContent = `${found.after} against ${found.before}: ${found.modules.length} weights`;
const draw = () => { drawMap(); drawRatio(); drawCosine(); };
draw();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
document.body.dataset.ready = "yes";
