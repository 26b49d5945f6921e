"use strict";
// Draws the runs of #data. All that runs hold becomes text nodes and attributes of ours: nothing of it is markup.
const KINDS = { skip: "skipped update", rollback: "rollback", preemption: "stopped", restart: "restart", failure: "failure", note: "note" };
const FIGURES = [
  ["loss", "Loss", ""], ["lr", "Learning rate", ""], ["grad_norm", "Gradient norm", ""],
  ["samples_per_second", "Samples a second", "/s"], ["peak_memory_gib", "Peak memory", "GiB"],
  ["data_wait_seconds", "Wait for data, a step", "s"],
];
const VALIDATED = [
  ["loss", "Validation loss", ""], ["hole_psnr", "PSNR in the hole", "dB"], ["keep_psnr", "PSNR outside", "dB"],
  ["seam_error", "Seam error", ""], ["color_shift", "Colour shift", ""],
];
const SVG = "http://www.w3.org/2000/svg";
const $ = id => document.getElementById(id);
let shown = JSON.parse($("data").textContent);
const hidden = new Set();  // folders of runs that are left out of the curves
let smoothing = 0, axis = "step", log = false, split = null, at = null;  // at: the step of the grids; null: the last

function put(parent, ...children) {
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) parent.append(child);
  return parent;
}
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== false) node.setAttribute(name, value);
  return put(node, children);
}
function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}
const replace = (id, ...children) => { const node = $(id); node.replaceChildren(); return put(node, children); };
const color = index => `var(--r${index % 6})`;
function show(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("e+", "e").replace(/\.?0+e/, "e");
  return String(+value.toPrecision(size >= 1000 ? 6 : 4));
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}
const hours = value => value === null ? "–" : value > 0 && value < 0.001 ? "< 0.001" : value >= 100 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value && value.toPrecision(2);
const when = time => time === null ? "–" : new Date(time * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

// --- places on the axis ---------------------------------------------------------------------------------------------
function began(run) { return run.sessions.length ? run.sessions[0].begin : run.clock ? run.clock.y[0] : null; }
function between(from, to, value) {  // of two rising lists
  if (!from.length) return null;
  let low = 0, high = from.length - 1;
  if (value <= from[0]) return to[0];
  if (value >= from[high]) return to[high];
  while (high - low > 1) { const middle = (low + high) >> 1; if (from[middle] <= value) low = middle; else high = middle; }
  const share = from[high] === from[low] ? 0 : (value - from[low]) / (from[high] - from[low]);
  return to[low] + share * (to[high] - to[low]);
}
function placeOf(run, step, clock = run.clock) {  // clock: of steps that were undone, their own
  if (axis === "step") return step;
  if (!clock) return null;
  const time = between(clock.x, clock.y, step);
  return time === null ? null : (time - began(run)) / 3600;
}
function placeOfMark(run, mark) {
  if (axis === "hours" && mark.time !== null) return (mark.time - began(run)) / 3600;
  if (mark.step !== null) return placeOf(run, mark.step);
  if (mark.time === null || !run.clock) return null;
  const step = between(run.clock.y, run.clock.x, mark.time);
  return step === null ? null : placeOf(run, Math.round(step));
}

// --- curves ---------------------------------------------------------------------------------------------------------
function smooth(values) {  // an average that forgets; gaps stay gaps
  const keep = smoothing / 100;
  let mean = 0, weight = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = keep * mean + (1 - keep) * value; weight = keep * weight + (1 - keep);
    return mean / weight;
  });
}
function ticksOf(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const stride = [1, 2, 5, 10].map(each => each * power).find(each => each >= raw * .999) || raw;
  const found = [];
  for (let value = Math.ceil(low / stride) * stride; value <= high + stride * 1e-6; value += stride) found.push(+value.toPrecision(10));
  return found;
}
function seriesOf(figure, ofValidation) {
  const found = [];
  shown.runs.forEach((run, index) => {
    if (hidden.has(run.folder)) return;
    const add = (curve, look, name) => { if (curve) found.push({ run, index, curve, look, name }); };
    if (ofValidation) {
      add(run.validation.holdout[figure], "line", "held out");
      add(run.validation.train[figure], "dashed", "trained");
      return;
    }
    if (figure === "loss") run.undone.forEach(curve => add(curve, "undone", "undone"));
    add(run.curves[figure], "line", "");
  });
  return found;
}
function drawChart(title, unit, series, canBeLog) {
  const box = el("div", { class: "panel" }), told = el("small");
  put(box, el("h3", {}, title + (unit ? ` (${unit})` : ""), told));
  const width = Math.max($("charts").clientWidth ? chartWidth() : 320, 200), height = 176, left = 50, right = 10, top = 12, bottom = 20;
  const useLog = log && canBeLog;
  const scale = value => value === null || (useLog && value <= 0) ? null : useLog ? Math.log10(value) : value;
  const lines = series.map(each => {
    const x = each.curve.x.map(step => placeOf(each.run, step, each.curve.clock || each.run.clock)), raw = each.curve.y.map(scale);
    const isSmoothed = smoothing > 0 && each.look === "line" && canBeLog;
    return { ...each, x, raw, y: isSmoothed ? smooth(raw) : raw, isSmoothed };
  });
  const main = lines.filter(each => each.look !== "undone");
  const ys = (main.length ? main : lines).flatMap(each => each.raw).filter(value => value !== null);
  const xs = lines.flatMap(each => each.x).filter(value => value !== null);
  if (!ys.length || !xs.length) return null;
  let low = Math.min(...ys), high = Math.max(...ys);
  if (low === high) { const room = Math.abs(low) * .1 || 1; low -= room; high += room; }
  const room = (high - low) * .06; high += room; low = low >= 0 && low - room < 0 && !useLog ? 0 : low - room;
  let first = Math.min(...xs), last = Math.max(...xs);
  if (first === last) { first -= 1; last += 1; }
  const px = value => left + (width - left - right) * (value - first) / (last - first);
  const py = value => top + (height - top - bottom) * (high - value) / (high - low);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  const told10 = value => show(useLog ? 10 ** value : value);
  for (const value of ticksOf(low, high, 4)) {
    drawing.append(svg("line", { x1: left, x2: width - right, y1: py(value), y2: py(value) }));
    drawing.append(svg("text", { x: left - 6, y: py(value) + 3.5, class: "end" }, told10(value)));
  }
  for (const value of ticksOf(first, last, Math.max(2, Math.floor(width / 90))))
    drawing.append(svg("text", { x: px(value), y: height - 4, class: px(value) > width - 24 ? "end" : "" }, show(value) + (axis === "hours" ? " h" : "")));
  for (const run of new Set(lines.map(each => each.run))) for (const mark of run.marks) {
    const place = placeOfMark(run, mark);
    if (place === null || place < first || place > last) continue;
    const x = px(place), fill = `var(--${mark.kind})`;
    const line = svg("line", { x1: x, x2: x, y1: top - 4, y2: height - bottom, class: "mark", style: `stroke: ${fill}`, "stroke-dasharray": mark.kind === "skip" ? "2 4" : "none" });
    const flag = svg("circle", { cx: x, cy: top - 5, r: 3.2, class: "flag", style: `fill: ${fill}`, "data-kind": mark.kind });
    for (const node of [line, flag]) node.append(svg("title", {}, `${KINDS[mark.kind]}${mark.step === null ? "" : ` at step ${mark.step}`}: ${mark.text}`));
    drawing.append(line, flag);
  }
  for (const each of lines) {
    const draw = (ys, name) => {
      let part = [];
      const end = () => {
        if (part.length === 1) drawing.append(svg("circle", { cx: part[0][0], cy: part[0][1], r: 2, class: "dot", style: `fill: ${color(each.index)}` }));
        if (part.length > 1) drawing.append(svg("polyline", { points: part.map(point => point.map(value => value.toFixed(1)).join()).join(" "), class: name, style: `stroke: ${color(each.index)}` }));
        part = [];
      };
      ys.forEach((value, number) => {
        if (value === null || each.x[number] === null) return end();
        part.push([px(each.x[number]), Math.min(Math.max(py(value), top - 4), height - bottom + 4)]);
      });
      end();
    };
    if (each.isSmoothed) draw(each.raw, "raw");
    draw(each.y, each.look);
  }
  const cursor = svg("line", { y1: top, y2: height - bottom, class: "cursor", visibility: "hidden" });
  drawing.append(cursor);
  const several = shown.runs.length > 1;
  const tell = place => {
    const parts = [];
    for (const each of main) {
      if (several && each.look === "dashed") continue;
      let best = -1;
      each.x.forEach((x, number) => { if (x !== null && each.y[number] !== null && (best < 0 || Math.abs(x - place) < Math.abs(each.x[best] - place))) best = number; });
      if (best >= 0) parts.push(el("span", { style: several ? `color: ${color(each.index)}` : null, title: each.run.name }, each.look === "dashed" ? `(${told10(each.y[best])})` : told10(each.y[best])));
    }
    told.replaceChildren(...parts.slice(0, 4), parts.length > 4 ? " …" : "");
  };
  tell(last);
  drawing.addEventListener("pointermove", event => {
    const area = drawing.getBoundingClientRect(), x = (event.clientX - area.left) * width / area.width;
    const place = first + (x - left) / (width - left - right) * (last - first);
    if (place < first || place > last) return;
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    tell(place);
    told.prepend(axis === "step" ? `step ${Math.round(place)}: ` : `${place.toFixed(2)} h: `);
  });
  drawing.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); tell(last); });
  return put(box, drawing);
}
function chartWidth() {  // of a panel's inside, as the grid will make it
  const total = $("charts").clientWidth, columns = Math.max(1, Math.floor((total + 16) / (352 + 16)));
  return (total - 16 * (columns - 1)) / columns - 34;
}
function drawCharts() {
  const runs = shown.runs, canTime = runs.length > 0 && runs.every(run => run.clock);
  $("axis").disabled = !canTime;
  if (!canTime) axis = $("axis").value = "step";
  replace("legend", runs.length < 2 ? [] : runs.map((run, index) => {
    const box = el("input", { type: "checkbox" });
    box.checked = !hidden.has(run.folder);
    box.addEventListener("input", () => { box.checked ? hidden.delete(run.folder) : hidden.add(run.folder); drawCharts(); });
    return el("label", { title: run.folder }, box, el("i", { style: `background: ${color(index)}` }), run.name);
  }));
  replace("charts",
    FIGURES.map(([name, title, unit]) => drawChart(title, unit, seriesOf(name, false), name !== "lr")),
    VALIDATED.map(([name, title, unit]) => drawChart(title, unit, seriesOf(name, true), false)));
  const kinds = new Set(runs.filter(run => !hidden.has(run.folder)).flatMap(run => run.marks.map(mark => mark.kind)));
  const undone = runs.some(run => run.undone.length), validated = runs.some(run => Object.keys(run.validation.train).length);
  replace("marks-legend", Object.keys(KINDS).filter(kind => kinds.has(kind)).map(kind => el("span", {}, el("i", { class: "key", style: `background: var(--${kind})` }), KINDS[kind])),
    undone && el("span", {}, "thin dashes: steps that were undone"), validated && el("span", {}, "validation: dashed, in brackets: on trained pictures"));
}

// --- the rest of the page -------------------------------------------------------------------------------------------
const tile = (value, what) => el("div", {}, el("b", {}, value), el("span", {}, what));
function drawHead() {
  replace("head", el("p", { class: "eyebrow" }, shown.live ? "fluxfill watch" : "fluxfill report"), shown.runs.map(run => {
    const { state, reason, step, steps, seconds_per_step: pace, seconds_left: left, best } = run.status;
    const loss = run.curves.loss && run.curves.loss.y.at(-1);
    const of = steps ? `step of ${steps.toLocaleString("en")}` : "step";
    return el("div", { class: "run" },
      el("h1", {}, run.name, el("span", { class: `state ${/^\w+$/.test(state) ? state : ""}` }, state)),
      reason && state !== "finished" && el("p", { class: "reason" }, reason),
      el("div", { class: "tiles" },
        tile(step === null ? "–" : step.toLocaleString("en"), of),
        tile(loss === null ? "not finite" : show(loss), "loss, last step"),
        best && tile(`${best.hole_psnr.toFixed(2)} dB`, `best PSNR in the hole, step ${best.step}`),
        tile(pace === null ? "–" : pace >= 90 ? duration(pace) : `${show(pace)} s`, "a step"),
        left !== null && tile(duration(left), "left"),
        tile(hours(run.cost.total === null ? run.cost.kept : run.cost.total), run.cost.unit)));
  }));
}
function table(head, rows, kind = "") {
  return el("div", { class: "wide" }, el("table", { class: kind }, el("thead", {}, el("tr", {}, head.map(text => el("th", {}, text)))), el("tbody", {}, rows)));
}
function drawGrids() {
  const runs = shown.runs.filter(run => run.grids.length);
  const steps = [...new Set(runs.flatMap(run => run.grids.map(grid => grid.step)))].sort((a, b) => a - b);
  const splits = ["holdout", "train"].filter(name => runs.some(run => run.grids.some(grid => grid[name])));
  if (!steps.length) return replace("grids");
  if (!splits.includes(split)) split = splits[0];
  const slide = el("input", { type: "range", id: "grid-step", min: 0, max: steps.length - 1, "aria-label": "step of the pictures" });
  slide.value = at === null || !steps.includes(at) ? steps.length - 1 : steps.indexOf(at);
  const choose = el("select", { id: "grid-split", "aria-label": "which pictures" }, splits.map(name => el("option", { value: name }, name === "holdout" ? "held-out pictures" : "trained pictures")));
  choose.value = split;
  const told = el("output"), place = el("div", { class: "grids" });
  const figures = runs.map(run => {
    const image = el("img", { alt: "" }), link = el("a", {}, image), caption = el("figcaption");
    return { run, image, link, caption, figure: el("figure", {}, link, caption) };
  });
  const draw = () => {
    const step = steps[slide.value];
    told.textContent = `step ${step}`;
    for (const { run, image, link, caption, figure } of figures) {
      const grid = run.grids.filter(each => each.step <= step && each[split]).at(-1) || run.grids.find(each => each[split]);
      figure.hidden = !grid;
      if (!grid) continue;
      if (image.getAttribute("src") !== grid[split]) { image.src = grid[split]; if (shown.live) link.href = grid[split]; }
      image.alt = `${run.name}, step ${grid.step}`;
      caption.textContent = runs.length > 1 ? `${run.name}, step ${grid.step}` : `step ${grid.step}`;
    }
  };
  slide.addEventListener("input", () => { at = +slide.value === steps.length - 1 ? null : steps[slide.value]; draw(); });
  choose.addEventListener("input", () => { split = choose.value; draw(); });
  replace("grids", el("h2", {}, "Pictures"), el("div", { class: "grid-tools" }, steps.length > 1 && el("label", {}, slide, told), choose), put(place, figures.map(each => each.figure)));
  draw();
}
function ofEach(id, title, draw) {  // a section with a part for each run that has one
  const parts = shown.runs.map(run => [run, draw(run)]).filter(([, part]) => part);
  replace(id, parts.length > 0 && el("h2", {}, title), parts.map(([run, part]) => [shown.runs.length > 1 && el("h3", {}, run.name), part]));
}
function drawEvents() {
  ofEach("events", "What befell it", run => run.marks.length && table(["", "step", "when", "what"], [...run.marks].reverse().slice(0, 100).map(mark =>
    el("tr", {}, el("td", {}, el("i", { class: "key", style: `background: var(--${mark.kind})` }), KINDS[mark.kind]),
      el("td", {}, mark.step === null ? "–" : mark.step), el("td", {}, when(mark.time)), el("td", { class: "text" }, mark.text)))));
}
function drawCost() {
  ofEach("cost", "Cost", run => {
    const { unit, total, kept, undone, waiting } = run.cost;
    if (total === null && !kept) return null;
    return [el("div", { class: "tiles" },
      total !== null && tile(hours(total), `${unit} in all`), tile(hours(kept), "in steps that count"),
      tile(hours(undone), "in steps that were undone"), tile(hours(waiting), "waiting for data"),
      total !== null && tile(hours(Math.max(total - kept - undone, 0)), "starts, validation, saves")),
    total === null && el("p", { class: "dim" }, "How many GPUs it ran on was not recorded: hours of one process.")];
  });
}
function drawMachines() {
  ofEach("machines", "Hardware and versions", run => {
    if (!run.sessions.length) return null;
    const last = run.sessions.at(-1), versions = Object.entries(last.versions);
    const end = each => each.code === null ? "–" : each.code === 0 ? "done" : each.code === 75 ? "stopped" : `code ${each.code}`;
    return [table(["start", "from step", "on", "engine", "hours", "end"], run.sessions.map(each => el("tr", {},
      el("td", {}, when(each.begin)), el("td", {}, each.step),
      el("td", { class: "text" }, `${each.processes} x ${each.gpus.join(" + ") || "CPU process"}${each.nodes > 1 ? `, ${each.nodes} nodes` : ""} (${each.host})`),
      el("td", {}, each.engine), el("td", {}, hours(each.hours)), el("td", { title: each.reason }, end(each))))),
    el("details", {}, el("summary", {}, "Versions"), el("dl", {}, versions.map(([name, version]) => [el("dt", {}, name), el("dd", { class: "mono" }, version)]),
      last.commit && [el("dt", {}, "commit"), el("dd", { class: "mono" }, last.commit)]))];
  });
}
function drawSettings() {
  ofEach("settings", "Config", run => {
    const { recipe, settings } = run.settings, differing = settings.filter(each => each.recipe !== null);
    if (!settings.length) return null;
    const row = (each, differs) => el("tr", { class: differs ? "differs" : "" },
      el("td", { class: "mono key-name" }, each.key.split(/(?<=[._])/).flatMap(part => [part, el("wbr")])), el("td", { class: "mono" }, each.value), differs && el("td", { class: "mono old" }, each.recipe));
    return [el("p", { class: "lead" }, `The nearest recipe is ${recipe}; ${differing.length} of ${settings.length} values differ from it.`),
      differing.length > 0 && table(["key", "here", recipe], differing.map(each => row(each, true)), "more"),
      el("details", {}, el("summary", {}, "The whole config"), table(["key", "value"], settings.map(each => row(each, false)), "more"))];
  });
}
function drawAll() {
  const open = [...document.querySelectorAll("details")].map(each => each.open);
  drawHead(); drawCharts(); drawGrids(); drawEvents(); drawCost(); drawMachines(); drawSettings();
  document.querySelectorAll("details").forEach((each, number) => { each.open = Boolean(open[number]); });
}
$("smooth").addEventListener("input", () => { smoothing = +$("smooth").value; $("smoothed").textContent = smoothing ? (smoothing / 100).toFixed(2) : "off"; drawCharts(); });
$("axis").addEventListener("input", () => { axis = $("axis").value; drawCharts(); });
$("log").addEventListener("input", () => { log = $("log").checked; drawCharts(); });
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawCharts(); } });
drawAll();

// --- live -----------------------------------------------------------------------------------------------------------
let before = "";
async function refresh() {
  try {
    const answer = await fetch("data.json", { cache: "no-cache" });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const text = await answer.text();
    $("fresh").textContent = "live";
    if (text !== before) { before = text; shown = JSON.parse(text); drawAll(); }
  } catch (error) {
    $("fresh").textContent = "no answer: fluxfill watch has ended, or the line to it";
  }
  setTimeout(refresh, 2000);
}
if (shown.live) refresh();
