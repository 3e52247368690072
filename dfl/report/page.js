// Draws the charts of a report from the JSON in the page: charts.py says what a chart holds. No library, no network.
"use strict";
const NS = "http://www.w3.org/2000/svg";
const DASHES = { main: "", consensus: "7 3", baseline: "2 3", peer: "" };
const SERIES_DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 4", "12 4", "2 6", "6 2 2 2"];
// cividis (Nuñez, Anderton and Renslow, 2018): the same order of lightness for every eye
const RAMP = [[0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 112], [125, 124, 120], [155, 148, 119], [188, 174, 108], [222, 201, 85], [254, 232, 56]];

function make(parent, name, attributes = {}, text) {
  const svg = name === "svg" || parent.namespaceURI === NS;
  const node = svg ? document.createElementNS(NS, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
const short = (v) => v === null || v === undefined ? "–" : typeof v !== "number" ? String(v) :
  v !== 0 && (Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3) ? v.toExponential(2).replace(/\.?0+e/, "e") : String(Number(v.toPrecision(4)));
const inCell = (v) => v !== null && Math.abs(v) >= 1e-3 && Math.abs(v) < 1e5 ? String(Number(v.toPrecision(3))) : short(v);
const colour = (k) => `var(--c${k % 8})`;
const dash = (line) => line.role in DASHES ? DASHES[line.role] : SERIES_DASHES[line.colour % 8];
const shown = (values) => values.filter((v) => v !== null && v !== undefined);

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= rough);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(Number(v.toPrecision(12)));
  return found;
}

function scale(low, high, from, to, log) {
  const f = log ? Math.log10 : (v) => v;
  if (low === high) [low, high] = log ? [low / 2, high * 2] : low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  const at = (v) => from + (f(v) - f(low)) / (f(high) - f(low)) * (to - from);
  at.low = low; at.high = high;
  at.ticks = (most) => {
    if (!log) return ticks(low, high, most);
    const a = Math.ceil(Math.log10(low) - 1e-9), b = Math.floor(Math.log10(high) + 1e-9), every = Math.max(1, Math.ceil((b - a + 1) / most));
    const powers = []; for (let k = a; k <= b; k += every) powers.push(10 ** k);
    return powers.length > 1 ? powers : ticks(low, high, most).filter((v) => v > 0);
  };
  return at;
}

// A frame with axes; returns the drawing area. Labels of y stand above the axis: no room is lost on a narrow screen.
function frame(svg, width, height, x, y, names) {
  for (const v of y.ticks(5)) {
    make(svg, "line", { x1: 48, x2: width - 8, y1: y(v), y2: y(v), class: "axis" });
    make(svg, "text", { x: 43, y: y(v) + 4, "text-anchor": "end" }, short(v));
  }
  const stops = x ? x.ticks(width < 420 ? 4 : 7).filter((v) => names.x !== "round" || Number.isInteger(v)) : [];
  for (const v of stops) make(svg, "text", { x: Math.min(x(v), width - 3.3 * short(v).length), y: height - 20, "text-anchor": "middle" }, short(v));
  make(svg, "text", { x: 4, y: 12 }, names.y);
  make(svg, "text", { x: width - 8, y: height - 4, "text-anchor": "end" }, names.x);
}

function path(line, x, y, key) {
  let d = "", pen = false;
  line.x.forEach((at, k) => {
    const v = line[key][k];
    if (v === null || at === null) { pen = false; return; }
    d += `${pen ? "L" : "M"}${x(at).toFixed(1)} ${y(v).toFixed(1)}`;
    pen = true;
  });
  return d;
}

function band(line, x, y) {
  let d = "", run = [];
  const close = () => {
    if (run.length > 1) d += "M" + run.map((k) => `${x(line.x[k]).toFixed(1)} ${y(line.hi[k]).toFixed(1)}`).join("L") + "L" +
      run.reverse().map((k) => `${x(line.x[k]).toFixed(1)} ${y(line.lo[k]).toFixed(1)}`).join("L") + "Z";
    run = [];
  };
  line.x.forEach((_, k) => line.lo[k] === null || line.hi[k] === null || line.x[k] === null ? close() : run.push(k));
  close();
  return d;
}

const groupOf = (line) => line.role === "peer" ? "each peer" : line.name;

function drawLines(chart, state, svg, width) {
  const variant = chart.variants[state.variant], height = width < 420 ? 240 : 280;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const visible = variant.series.filter((line) => !state.hidden.has(groupOf(line)));
  const xs = shown(visible.flatMap((line) => line.x)), ys = shown(visible.flatMap((line) => [...line.y, ...(line.lo || []), ...(line.hi || [])]));
  if (!ys.length) { make(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing chosen"); return null; }
  let low = Math.min(...ys), high = Math.max(...ys);
  if (!variant.log) { const room = (high - low) * 0.04; low = low >= 0 && low - room < 0 ? 0 : low - room; high += room; }
  const x = scale(Math.min(...xs), Math.max(...xs), 56, width - 14, false), y = scale(low, high, height - 38, 20, variant.log);
  frame(svg, width, height, x, y, { x: chart.x, y: variant.y + (variant.log ? " (log)" : "") });
  const order = { peer: 0, main: 2 }, thin = Math.min(0.6, Math.max(0.15, 8 / visible.length));
  for (const line of [...visible].sort((a, b) => (order[a.role] ?? 1) - (order[b.role] ?? 1))) {
    const faint = line.role === "peer";
    if (line.lo) make(svg, "path", { d: band(line, x, y), fill: colour(line.colour), opacity: 0.16 });
    make(svg, "path", { d: path(line, x, y, "y"), fill: "none", stroke: colour(line.colour), "stroke-width": faint ? 0.8 : 2,
      opacity: faint ? thin : 1, "stroke-dasharray": dash(line), "stroke-linejoin": "round" });
    if (line.x.length <= (faint ? 1 : 30)) line.x.forEach((at, k) => at !== null && line.y[k] !== null &&
      make(svg, "circle", { cx: x(at), cy: y(line.y[k]), r: faint ? 1.5 : 2.6, fill: colour(line.colour) }));
  }
  const stops = [...new Set(xs)].sort((a, b) => a - b);
  return { stops, x, bottom: height - 38, read: (at) => [[chart.x, short(at)], ...readLines(visible, at)] };
}

// Values at `at`: of a line without a point there, the last one before it.
function readLines(visible, at) {
  const found = [], peers = [];
  for (const line of visible) {
    let k = -1;
    line.x.forEach((v, i) => { if (v !== null && v <= at && line.y[i] !== null) k = i; });
    if (k < 0) continue;
    const range = line.lo ? ` (${short(line.lo[k])} to ${short(line.hi[k])})` : "";
    (line.role === "peer" ? peers : found).push([line.name, short(line.y[k]) + range]);
  }
  return [...found, ...(peers.length <= 16 ? peers : [])];
}

function drawBars(chart, state, svg, width) {
  const variant = chart.variants[state.variant], height = width < 420 ? 240 : 280, num = variant.x.length;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const visible = variant.series.filter((part) => !state.hidden.has(part.name));
  const totals = variant.x.map((_, k) => visible.reduce((sum, part) => sum + part.y[k], 0));
  const y = scale(0, Math.max(...totals) || 1, height - 38, 20, false), step = (width - 66) / num, left = (k) => 54 + k * step;
  frame(svg, width, height, null, y, { x: chart.x, y: variant.y });
  const every = Math.ceil(num / (width < 420 ? 5 : 10));
  variant.x.forEach((name, k) => {
    let sum = 0;
    for (const part of visible) {
      const h = y(sum) - y(sum + part.y[k]);
      if (h > 0) make(svg, "rect", { x: left(k) + step * 0.08, y: y(sum + part.y[k]), width: step * 0.84, height: h, fill: colour(part.colour), stroke: "var(--panel)", "stroke-width": Math.min(1, step / 12) });
      sum += part.y[k];
    }
    if (k % every === 0) make(svg, "text", { x: left(k) + step / 2, y: height - 20, "text-anchor": "middle" }, name);
  });
  const stops = variant.x.map((_, k) => k), x = (k) => left(k) + step / 2;
  return { stops, x, bottom: height - 38, read: (k) => [[chart.x, variant.x[k]], ...visible.map((p) => [p.name, short(p.y[k])]), ["sum", short(totals[k])]] };
}

function ramp(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), k = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[k].map((v, i) => Math.round(v + (RAMP[k + 1][i] - v) * (at - k)));
}

function tail(text, room) {
  const most = Math.max(4, Math.floor(room / 6.1));
  return text.length <= most ? text : "…" + text.slice(text.length - most + 1);
}

function drawHeat(chart, state, svg, width) {
  const { rows, columns, values, unit, row, column, counts } = chart.variants[state.variant];
  const margin = Math.min(width * 0.34, 12 + 6.4 * Math.max(...rows.map((r) => r.length))), cell = (width - margin - 6) / columns.length;
  const height = Math.max(rows.length > 60 ? 1 : 15, Math.min(30, 420 / rows.length)), top = 18, bottom = top + height * rows.length;
  svg.setAttribute("viewBox", `0 0 ${width} ${bottom + 64}`);
  const known = shown(values.flat()), low = Math.min(...known), high = Math.max(...known);
  const share = (v) => high > low ? (v - low) / (high - low) : 0.5;
  make(svg, "text", { x: 2, y: 11 }, row);
  const rowStep = Math.ceil(12 / height), wide = Math.max(...columns.map((c) => c.length)) * 6.4 + 8, columnStep = Math.ceil(Math.min(wide, 90) / cell);
  // numbers in all cells, or in none
  const written = height >= 14 && known.every((v) => cell > 6.6 * inCell(v).length + 4);
  rows.forEach((name, i) => {
    if (i % rowStep === 0) make(svg, "text", { x: margin - 5, y: top + height * (i + 0.5) + 4, "text-anchor": "end" }, tail(name, margin - 8));
    columns.forEach((_, j) => {
      const v = values[i][j], [r, g, b] = v === null ? [0, 0, 0] : ramp(share(v)), x = margin + j * cell, y = top + i * height;
      make(svg, "rect", { x, y, width: Math.max(cell - (cell > 8 ? 1 : 0), 0.5), height: Math.max(height - (height > 8 ? 1 : 0), 0.5),
        fill: v === null ? "none" : `rgb(${r},${g},${b})`, stroke: v === null && cell > 8 ? "var(--line)" : "none" });
      if (v !== null && written) {
        const text = make(svg, "text", { x: x + cell / 2, y: y + height / 2 + 4, "text-anchor": "middle" }, inCell(v));
        text.style.fill = 0.3 * r + 0.59 * g + 0.11 * b > 130 ? "#111" : "#fff";
      }
    });
  });
  columns.forEach((name, j) => {
    const text = tail(name, Math.max(cell * columnStep, 30)), x = margin + (j + 0.5) * cell;
    if (j % columnStep === 0 && x + 3.2 * text.length < width) make(svg, "text", { x, y: bottom + 14, "text-anchor": "middle" }, text);
  });
  make(svg, "text", { x: width - 6, y: bottom + 29, "text-anchor": "end" }, column);
  const bar = Math.min(160, width / 2);
  for (let k = 0; k < 32; k++) { const [r, g, b] = ramp(k / 31); make(svg, "rect", { x: margin + k * bar / 32, y: bottom + 36, width: bar / 32 + 0.5, height: 8, fill: `rgb(${r},${g},${b})` }); }
  make(svg, "text", { x: margin, y: bottom + 58 }, short(low));
  make(svg, "text", { x: margin + bar, y: bottom + 58, "text-anchor": "end" }, `${short(high)}`);
  make(svg, "text", { x: margin + bar + 6, y: bottom + 45 }, unit);
  const stops = rows.flatMap((_, i) => columns.map((_, j) => [i, j]));
  return { stops, heat: true, columns: columns.length,
    find: (px, py) => { const i = Math.floor((py - top) / height), j = Math.floor((px - margin) / cell); return i >= 0 && j >= 0 && i < rows.length && j < columns.length ? i * columns.length + j : -1; },
    box: ([i, j]) => ({ x: margin + j * cell, y: top + i * height, width: cell, height }),
    read: ([i, j]) => [[row, rows[i]], [column, columns[j]], [unit, short(values[i][j])], ...(counts ? [["mean of", `${counts[i][j]} run(s)`]] : [])] };
}

// Differences with their intervals, one under the other; what left of zero is worse than the baseline.
function drawForest(chart, state, svg, width) {
  const { rows, x: unit } = chart.variants[state.variant], step = 26, top = 8, bottom = top + step * rows.length;
  const margin = Math.min(width * 0.42, 14 + 6.6 * Math.max(...rows.map((row) => row.name.length)));
  svg.setAttribute("viewBox", `0 0 ${width} ${bottom + 40}`);
  const values = [0, ...shown(rows.flatMap((row) => [row.mean, row.lo, row.hi, ...row.points]))];
  const room = (Math.max(...values) - Math.min(...values)) * 0.05;
  const x = scale(Math.min(...values) - room, Math.max(...values) + room, margin + 6, width - 12, false);
  for (const v of x.ticks(width < 420 ? 4 : 8)) {
    make(svg, "line", { x1: x(v), x2: x(v), y1: top, y2: bottom, class: "axis", "stroke-width": v === 0 ? 2.5 : 1 });
    make(svg, "text", { x: x(v), y: bottom + 14, "text-anchor": "middle" }, short(v));
  }
  make(svg, "text", { x: width - 8, y: bottom + 32, "text-anchor": "end" }, unit);
  rows.forEach((row, i) => {
    const y = top + step * (i + 0.5);
    make(svg, "text", { x: margin - 4, y: y + 4, "text-anchor": "end" }, tail(row.name, margin - 8));
    for (const v of row.points) make(svg, "circle", { cx: x(v), cy: y, r: 3, fill: "none", stroke: colour(1), opacity: 0.8 });
    if (row.lo !== null) make(svg, "line", { x1: x(row.lo), x2: x(row.hi), y1: y, y2: y, stroke: colour(0), "stroke-width": 2.5 });
    make(svg, "rect", { x: x(row.mean) - 4, y: y - 4, width: 8, height: 8, fill: row.lo === null ? "var(--panel)" : colour(0), stroke: colour(0), "stroke-width": 2 });
  });
  const interval = (row) => row.lo === null ? "none" : `${short(row.lo)} to ${short(row.hi)}`;
  return { stops: rows, heat: true, columns: 1,
    find: (px, py) => { const i = Math.floor((py - top) / step); return i >= 0 && i < rows.length ? i : -1; },
    box: (row) => ({ x: 2, y: top + step * rows.indexOf(row) + 1, width: width - 4, height: step - 2 }),
    read: (row) => [[row.name, `${short(row.mean)} ${unit}`], ["95 % interval", interval(row)], ["pairs", row.pairs], ...(row.points.length ? [["one by one", row.points.map(short).join(", ")]] : [])] };
}

function bits(text) {
  const bytes = atob(text);
  return (k) => (bytes.charCodeAt(k >> 3) >> (7 - (k & 7))) & 1;
}

function drawGraph(chart, state, svg, width) {
  const n = chart.peers, size = Math.min(width, 460), left = (width - size) / 2, room = 18, radius = Math.max(2.5, Math.min(11, 130 / n));
  svg.setAttribute("viewBox", `0 0 ${width} ${size}`);
  const at = [0, 1].map((k) => {
    const along = chart.positions.map((p) => p[k]), low = Math.min(...along), high = Math.max(...along);
    return low < high ? scale(low, high, room, size - room, false) : () => size / 2;
  });
  const place = chart.positions.map((p) => [left + at[0](p[0]), at[1](p[1])]), receives = bits(chart.frames[state.frame]);
  const degree = new Array(n).fill(0), links = [];
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) {
    if (!receives(i * n + j)) continue;
    degree[i]++;
    if (chart.directed || i < j) links.push([j, i]);
  }
  const draw = (some) => some.map(([j, i]) => `M${place[j].map((v) => v.toFixed(1)).join(" ")}L${place[i].map((v) => v.toFixed(1)).join(" ")}`).join("");
  make(svg, "path", { d: draw(links), stroke: colour(1), "stroke-width": n > 40 ? 0.8 : 1.6, fill: "none", opacity: links.length > 400 ? 0.45 : 0.85 });
  if (chart.directed && n <= 40) for (const [j, i] of links) {  // a dot near the receiver: Who receives from whom
    const share = 0.8, [a, b] = [place[j], place[i]];
    make(svg, "circle", { cx: a[0] + (b[0] - a[0]) * share, cy: a[1] + (b[1] - a[1]) * share, r: 2.2, fill: colour(1) });
  }
  place.forEach(([x, y], i) => {
    make(svg, "circle", { cx: x, cy: y, r: radius, fill: degree[i] ? colour(0) : "var(--panel)", stroke: colour(0), "stroke-width": 1.5 });
    if (radius > 7) { const text = make(svg, "text", { x, y: y + 4, "text-anchor": "middle" }, i); text.style.fill = degree[i] ? "var(--ground)" : "var(--ink)"; }
  });
  const alone = degree.filter((v) => !v).length;
  state.said = [["round", chart.rounds[state.frame]], [chart.directed ? "arcs" : "links", links.length], ["peers that receive from nobody", alone]];
  const neighbours = (i) => [...Array(n).keys()].filter((j) => receives(i * n + j));
  return { stops: place.map((_, i) => i), peers: place, star: (i) => draw(neighbours(i).map((j) => [j, i])), read: (i) => [...state.said, [`peer ${i} receives from`, neighbours(i).join(", ") || "nobody"]] };
}

const DRAW = { lines: drawLines, bars: drawBars, heat: drawHeat, forest: drawForest, graph: drawGraph };

function say(readout, pairs) {
  readout.replaceChildren();
  pairs.forEach(([name, value], k) => { if (k) readout.append(" · "); readout.append(`${name} `); make(readout, "b", {}, value); });
}

function legend(chart, state, box, redraw) {
  box.replaceChildren();
  const lines = chart.kind === "lines" || chart.kind === "bars" ? chart.variants[state.variant].series : [];
  const groups = new Map(lines.map((line) => [groupOf(line), line]));
  for (const [name, line] of groups) {
    const button = make(box, "button", { type: "button", "aria-pressed": !state.hidden.has(name), title: "show or hide" });
    const sample = make(button, "svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    if (chart.kind === "bars") make(sample, "rect", { x: 6, y: 0, width: 12, height: 10, fill: colour(line.colour) });
    else make(sample, "line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour(line.colour), "stroke-width": line.role === "peer" ? 1 : 2.5, "stroke-dasharray": dash(line) });
    make(button, "span", {}, name);
    button.addEventListener("click", () => {
      state.hidden.has(name) ? state.hidden.delete(name) : state.hidden.add(name);
      button.setAttribute("aria-pressed", !state.hidden.has(name));
      redraw();
    });
  }
}

// The same numbers as a table, for who cannot see or wants to copy them.
function numbers(chart, state, box) {
  box.replaceChildren();
  const variant = chart.variants ? chart.variants[state.variant] : null;
  const table = make(box, "table"), head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
  const line = (cells) => { const tr = make(body, "tr"); cells.forEach((v, k) => make(tr, k ? "td" : "th", k ? {} : { scope: "row" }, short(v))); };
  const titles = (names) => names.forEach((name) => make(head, "th", { scope: "col" }, name));
  if (chart.kind === "lines") {
    const columns = variant.series.flatMap((s) => [[s.name, s, "y"], ...(s.lo ? [[`${s.name}: from`, s, "lo"], [`${s.name}: to`, s, "hi"]] : [])]);
    titles([chart.x, ...columns.map((c) => c[0])]);
    const stops = [...new Set(variant.series.flatMap((s) => s.x))].sort((a, b) => a - b);
    for (const at of stops) line([at, ...columns.map(([, s, key]) => { const k = s.x.indexOf(at); return k < 0 ? null : s[key][k]; })]);
  } else if (chart.kind === "bars") {
    titles([chart.x, ...variant.series.map((s) => s.name)]);
    variant.x.forEach((name, k) => line([name, ...variant.series.map((s) => s.y[k])]));
  } else if (chart.kind === "heat") {
    titles([`${variant.row} \\ ${variant.column}`, ...variant.columns]);
    variant.rows.forEach((name, i) => line([name, ...variant.values[i]]));
  } else if (chart.kind === "forest") {
    titles(["", variant.x, "from", "to", "pairs"]);
    for (const row of variant.rows) line([row.name, row.mean, row.lo, row.hi, row.pairs]);
  } else {
    titles(["round", "peer receives from"]);
    const receives = bits(chart.frames[state.frame]), n = chart.peers;
    for (let i = 0; i < n; i++) line([`${chart.rounds[state.frame]}: ${i}`, [...Array(n).keys()].filter((j) => receives(i * n + j)).join(", ") || "nobody"]);
  }
}

const alike = new Map();

function setUp(figure, chart) {
  const state = { variant: 0, hidden: new Set(), frame: 0, cursor: -1 }, plot = figure.querySelector(".plot");
  const controls = make(plot, "div", { class: "controls" });
  if (chart.variants && chart.variants.length > 1) {
    const select = make(make(controls, "label", {}, `${chart.choose}: `), "select", { "aria-label": `${chart.title}: ${chart.choose}` });
    chart.variants.forEach((v, k) => make(select, "option", { value: k }, v.name));
    const choose = (k) => { select.value = state.variant = k; state.hidden.clear(); restart(); };
    const names = JSON.stringify([chart.choose, ...chart.variants.map((v) => v.name)]);
    alike.set(names, [...(alike.get(names) || []), choose]);
    // charts with the same choices show the same one
    select.addEventListener("change", () => alike.get(names).forEach((other) => other(Number(select.value))));
  }
  const keys = make(plot, "div", { class: "controls" }), holder = make(plot, "div");
  const readout = make(plot, "output", { class: "readout", "aria-live": "polite" });
  readout.style.display = "block";
  if (chart.kind === "graph" && chart.frames.length > 1) slider(chart, state, controls, () => draw());
  const details = make(figure, "details"), summary = make(details, "summary", {}, "numbers");
  summary.title = "the same numbers as a table";
  const box = make(details, "div", { class: "numbers", tabindex: 0, role: "region", "aria-label": `Numbers of ${chart.title}` });
  details.addEventListener("toggle", () => details.open && numbers(chart, state, box));

  let drawn = null, marker = null, svg = null, width = 0;
  function draw() {
    const again = svg === document.activeElement;
    holder.replaceChildren();
    svg = make(holder, "svg", { role: "img", tabindex: 0, "aria-label": `${chart.title}. ${chart.text} Arrow keys read values.` });
    width = Math.max(240, holder.clientWidth);
    drawn = DRAW[chart.kind](chart, state, svg, width);
    marker = null;
    rest();
    if (drawn) listen();
    if (again) svg.focus();
    if (details.open) numbers(chart, state, box);
  }
  const rest = () => { state.cursor = -1; if (marker) marker.remove(); marker = null; state.said ? say(readout, state.said) : readout.replaceChildren("Point, or use the arrow keys, to read values."); };
  function point(k) {
    if (k < 0 || k >= drawn.stops.length) return;
    state.cursor = k;
    if (marker) marker.remove();
    const stop = drawn.stops[k];
    if (drawn.heat) marker = make(svg, "rect", { ...drawn.box(stop), fill: "none", stroke: "var(--c1)", "stroke-width": 2 });
    else if (drawn.peers) {
      marker = make(svg, "g", { fill: "none", stroke: "var(--ink)", "stroke-width": 2 });
      make(marker, "path", { d: drawn.star(stop) });
      make(marker, "circle", { cx: drawn.peers[stop][0], cy: drawn.peers[stop][1], r: 13 });
    }
    else marker = make(svg, "line", { x1: drawn.x(stop), x2: drawn.x(stop), y1: 18, y2: drawn.bottom, class: "cursor" });
    say(readout, drawn.read(stop));
  }
  function nearest(px, py) {
    if (drawn.heat) return drawn.find(px, py);
    const far = drawn.peers ? drawn.peers.map(([x, y]) => (x - px) ** 2 + (y - py) ** 2) : drawn.stops.map((s) => Math.abs(drawn.x(s) - px));
    return far.indexOf(Math.min(...far));
  }
  function listen() {
    svg.addEventListener("pointermove", (event) => {
      const r = svg.getBoundingClientRect(), zoom = width / r.width;
      point(nearest((event.clientX - r.left) * zoom, (event.clientY - r.top) * zoom));
    });
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && rest());
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -(drawn.columns || 1), ArrowDown: drawn.columns || 1 }[event.key];
      if (event.key === "Escape") rest();
      if (!step) return;
      event.preventDefault();
      point(state.cursor < 0 ? 0 : state.cursor + step);
    });
  }
  const restart = () => { legend(chart, state, keys, draw); draw(); };
  restart();
  new ResizeObserver(() => { if (Math.abs(holder.clientWidth - width) > 1) draw(); }).observe(holder);
}

function slider(chart, state, controls, draw) {
  const last = chart.frames.length - 1, label = make(controls, "label", {}, "round ");
  label.style.flex = "1 1 100%";
  const input = make(label, "input", { type: "range", min: 0, max: last, value: 0, "aria-label": "round" });
  const shownRound = make(label, "span", {}, chart.rounds[0]);
  const button = make(controls, "button", { type: "button" }, "play");
  const go = (k) => { state.frame = k; input.value = k; shownRound.textContent = chart.rounds[k]; input.setAttribute("aria-valuetext", `round ${chart.rounds[k]}`); draw(); };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  input.addEventListener("input", () => { stop(); go(Number(input.value)); });
  button.addEventListener("click", () => {
    if (timer) { stop(); return; }
    button.textContent = "stop";
    timer = setInterval(() => go(state.frame === last ? 0 : state.frame + 1), 600);
  });
}

const charts = JSON.parse(document.getElementById("data").textContent);
for (const figure of document.querySelectorAll("figure[data-chart]")) setUp(figure, charts[Number(figure.dataset.chart)]);
