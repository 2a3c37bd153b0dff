// Interactive figures of the segedu book: <seg-figure name="metric-lab" state='{"rows": 24, ...}'>a still picture</seg-figure>
//
// One file, no dependency, nothing fetched. A figure is one function (state, tell) -> element in FIGURES at the end; `tell`
// hands its numbers out. The same module is the front end of the anywidget in segedu/widgets.py (default export).

const VOID = 255;

// ---- page parts -----------------------------------------------------------------------------------------------------

const STYLE = `
:host { display: block; margin: 1rem 0; max-width: 50rem; color: var(--pst-color-text-base, var(--jp-ui-font-color1, inherit)); }
:host([hidden]) { display: none; }
.figure {
  --accent: var(--pst-color-primary, var(--jp-brand-color1, currentColor));
  --line: color-mix(in srgb, currentColor 30%, transparent);
  --soft: color-mix(in srgb, currentColor 9%, transparent);
  container-type: inline-size; box-sizing: border-box; padding: 0.9rem;
  border: 1px solid var(--line); border-radius: 0.5rem;
  font: 0.875rem/1.45 var(--pst-font-family-base, var(--jp-ui-font-family, system-ui, sans-serif));
  font-variant-numeric: tabular-nums; text-align: left;
}
* { box-sizing: border-box; }
p { margin: 0 0 0.7rem; }
p.title { font-size: 1rem; font-weight: 650; margin-bottom: 0.15rem; }
p.hint { font-size: 0.8rem; margin: 0.5rem 0 0; }
p.note { min-height: 2.9em; }
.row { display: flex; flex-wrap: wrap; gap: 0.4rem; align-items: center; margin: 0 0 0.7rem; }
.row.wide { gap: 0.4rem 1.1rem; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
fieldset > legend { padding: 0; float: left; margin: 0.22rem 0.5rem 0 0; font-weight: 600; }
fieldset > .row { margin: 0; }
button, label.chip {
  font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: 0.4rem;
  padding: 0.22rem 0.6rem; min-height: 1.9rem; cursor: pointer; display: inline-flex; align-items: center; gap: 0.35rem;
}
button:hover, label.chip:hover { border-color: currentColor; }
button[aria-pressed="true"], label.chip:has(:checked) { border-color: currentColor; box-shadow: inset 0 0 0 1px currentColor; font-weight: 650; }
label.chip input { position: absolute; opacity: 0; width: 1px; height: 1px; }
:focus-visible, label.chip:has(:focus-visible) { outline: 3px solid var(--accent); outline-offset: 2px; }
label.chip input:focus-visible { outline: none; }
label.check { display: inline-flex; align-items: center; gap: 0.4rem; min-height: 1.9rem; cursor: pointer; }
label.check input { width: 1.05rem; height: 1.05rem; margin: 0; accent-color: var(--accent); }
kbd { font: 0.72rem/1 ui-monospace, monospace; border: 1px solid var(--line); border-radius: 0.2rem; padding: 0.1rem 0.22rem; }
.swatch { width: 0.95em; height: 0.95em; flex: none; display: inline-block; vertical-align: -0.12em; border: 1px solid var(--line); border-radius: 0.15em; }
.slider { display: grid; grid-template-columns: 1fr auto; gap: 0 0.6rem; margin-bottom: 0.35rem; }
.slider input { grid-column: 1 / -1; width: 100%; height: 1.5rem; margin: 0; accent-color: var(--accent); }
.pictures { display: grid; gap: 0.7rem; margin-bottom: 0.7rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 0.2rem; }
canvas { display: block; width: 100%; height: auto; border-radius: 0.15rem; outline: 1px solid var(--line); }
canvas:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
canvas.paint { cursor: crosshair; touch-action: none; }
canvas.probe { cursor: crosshair; touch-action: pan-y; }
.columns { display: grid; gap: 0.9rem 1.5rem; align-items: start; }
.columns > * { min-width: 0; }
table { border-collapse: collapse; width: 100%; font: inherit; color: inherit; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.2rem; }
th { font-weight: 400; text-align: left; }
td { text-align: right; }
th, td { padding: 0.1rem 0.35rem 0.1rem 0; border: 0; background: none; }
.meters th { width: 1%; white-space: nowrap; }
.meters td.bar { padding-right: 0.6rem; }
.meters td.value { width: 3.2em; padding-right: 0; }
.track { display: block; height: 0.6rem; border-radius: 0.3rem; background: var(--soft); box-shadow: inset 0 0 0 1px var(--line); overflow: hidden; }
.track i { display: block; height: 100%; width: 0; background: var(--accent); }
.first th, .first td.value { font-weight: 700; }
table + table { margin-top: 0.9rem; }
.scroll { overflow-x: auto; }
.matrix { font-size: 0.78rem; }
.matrix thead th { vertical-align: bottom; padding: 0 0 0.25rem; }
.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); display: inline-block; }
.matrix tbody th { padding-right: 0.4rem; white-space: nowrap; }
.matrix thead th + th, .matrix td { text-align: center; padding-inline: 0.15rem; }
.matrix td { border: 1px solid var(--line); min-width: 1.6rem; height: 1.7rem; }
.matrix td.right { font-weight: 700; box-shadow: inset 0 0 0 1px currentColor; }
.numbers { font-size: 0.82rem; }
.numbers th { white-space: nowrap; }
.numbers thead th + th { text-align: right; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.15rem 0.8rem; padding: 0; margin: 0.7rem 0; font-size: 0.8rem; }
.silent { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none !important; }
@media (prefers-reduced-motion: no-preference) { .track i { transition: width 0.15s; } }
.two { grid-template-columns: 1fr 1fr; }
.small-large { grid-template-columns: 2fr 3fr; }
@container (min-width: 34rem) {
  .small-large { grid-template-columns: 1fr 1fr; }
  .columns { grid-template-columns: 1fr 1fr; }
  .columns.large-small { grid-template-columns: 3fr 2fr; }
}
`;

function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
const fixed = (value, digits = 3) => (Number.isNaN(value) ? "–" : value.toFixed(digits).replace(/^-(0\.0*)$/, "$1"));

function swatch(colour) {
  return h("span", { class: "swatch", style: `background: ${colour === VOID ? HATCH : css(colour)}` });
}
const HATCH = "repeating-linear-gradient(135deg, #fff 0 3px, #777 3px 4px)";

function frame(title, lead, ...parts) {
  const say = h("p", { class: "silent", "aria-live": "polite" });
  const head = [h("p", { class: "title" }, title), h("p", {}, lead)];
  const element = h("div", { class: "figure", role: "group", "aria-label": title }, ...head, ...parts, say);
  const later = settle(500);
  let opened = false; // what the figure opens on is no news
  const announce = (text) => (opened ? later(() => (say.textContent = text)) : (opened = true));
  return { element, announce };
}

/** Runs the last function handed in, once it has been quiet for so many milliseconds. */
function settle(milliseconds) {
  let timer;
  return (action) => {
    clearTimeout(timer);
    timer = setTimeout(action, milliseconds);
  };
}

/** A row of buttons; `press(i)` marks one as the current state, `press()` none. */
function presets(label, names, act) {
  const buttons = names.map((name, i) => h("button", { type: "button", "aria-pressed": "false", click: () => act(i) }, name));
  const press = (which) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === which)));
  return { element: h("div", { class: "row", role: "group", "aria-label": label }, ...buttons), press };
}

/** One of several, as native radio buttons. `options`: {text, colour?, key?}. */
function choice(label, options, act) {
  const inputs = options.map((_, i) => h("input", { type: "radio", name: label, change: () => act(i) }));
  const chips = options.map(({ text, colour, key }, i) =>
    h("label", { class: "chip" }, inputs[i], ...(colour ? [swatch(colour)] : []), text, ...(key ? [h("kbd", { "aria-hidden": "true" }, key)] : [])));
  inputs[0].checked = true;
  const pick = (i) => (inputs[i].checked = true);
  return { element: h("fieldset", {}, h("legend", {}, label), h("div", { class: "row" }, ...chips)), pick };
}

function toggle(label, checked, act) {
  return h("label", { class: "check" }, h("input", { type: "checkbox", checked, change: (e) => act(e.target.checked) }), label);
}

function slider(label, { min = 0, max = 1, step = 0.05, value }, act) {
  const input = h("input", { type: "range", min, max, step, value, input: () => (show(), act(+input.value)) });
  const shown = h("b", { "aria-hidden": "true" });
  const show = () => (shown.textContent = (+input.value).toFixed(2));
  show();
  return {
    element: h("label", { class: "slider" }, h("span", {}, label), shown, input),
    set: (to) => ((input.value = to), show()),
  };
}

/** A table of named shares of 1, each with a bar. */
function meters(caption, names, colours = []) {
  const rows = names.map((name, i) => {
    const bar = h("i");
    const value = h("td", { class: "value" });
    const head = h("th", { scope: "row" }, ...(colours[i] ? [swatch(colours[i]), " "] : []), name);
    const track = h("td", { class: "bar", "aria-hidden": "true" }, h("span", { class: "track" }, bar));
    return { element: h("tr", {}, head, track, value), bar, value };
  });
  const set = (values) => rows.forEach((row, i) => {
    row.element.hidden = values[i] === undefined;
    if (row.element.hidden) return;
    row.value.textContent = fixed(values[i]);
    row.bar.style.width = `${100 * (values[i] || 0)}%`;
  });
  const body = h("tbody", {}, ...rows.map((row) => row.element));
  return { element: h("table", { class: "meters" }, h("caption", {}, caption), body), rows, set };
}

function matrixTable(caption) {
  const table = h("table", { class: "matrix" });
  const set = (matrix, names) => {
    const k = names.length;
    const head = h("tr", {}, h("th", { scope: "col" }, "truth ↓ said →"), ...names.map((name) => h("th", { scope: "col" }, h("span", {}, name))));
    const rows = names.map((name, i) => {
      const total = matrix.slice(i * k, i * k + k).reduce((a, b) => a + b, 0);
      const cells = names.map((_, j) => {
        const count = matrix[i * k + j];
        const tint = `background: color-mix(in srgb, var(--accent) ${total ? Math.round((35 * count) / total) : 0}%, transparent)`;
        return h("td", { class: i === j ? "right" : null, style: tint }, String(count));
      });
      return h("tr", {}, h("th", { scope: "row" }, name), ...cells);
    });
    table.replaceChildren(h("caption", {}, caption), h("thead", {}, head), h("tbody", {}, ...rows));
  };
  return { element: h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, table), set };
}

function legend(classes, palette) {
  const items = classes.map((name, k) => h("li", {}, swatch(palette[k]), " ", name));
  return h("ul", { class: "legend", "aria-label": "Colours of the classes" }, ...items, h("li", {}, swatch(VOID), " void"));
}

// ---- pictures -------------------------------------------------------------------------------------------------------

/** A canvas over rows x cols cells of `cell` canvas pixels. `at(event)` is the cell under a pointer. */
function picture(title, rows, cols, cell, props) {
  const canvas = h("canvas", { width: cols * cell, height: rows * cell, ...props });
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const place = (offset, size, n) => Math.min(n - 1, Math.max(0, Math.floor((offset / size) * n)));
    return [place(event.clientY - box.top, box.height, rows), place(event.clientX - box.left, box.width, cols)];
  };
  const caption = h("figcaption", {}, title);
  return { element: h("figure", {}, caption, canvas), canvas, caption, context: canvas.getContext("2d"), rows, cols, cell, at };
}

/** Fills the picture with one colour [r, g, b] for each cell, or hatches it where the colour is void. */
function fill({ context, rows, cols, cell }, colourOf) {
  const pixels = new ImageData(cols, rows);
  const hatched = [];
  for (let i = 0; i < rows * cols; i++) {
    const colour = colourOf(i);
    if (colour === VOID) hatched.push(i);
    pixels.data.set(colour === VOID ? [255, 255, 255] : colour, 4 * i);
    pixels.data[4 * i + 3] = 255;
  }
  const small = h("canvas", { width: cols, height: rows });
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, cols * cell, rows * cell);
  context.strokeStyle = "#777";
  context.lineWidth = Math.max(1, cell / 12);
  context.beginPath();
  for (const i of hatched) {
    const [x, y] = [(i % cols) * cell, Math.floor(i / cols) * cell];
    context.moveTo(x, y + cell);
    context.lineTo(x + cell, y);
  }
  context.stroke();
}

/** Crosses out one cell, in black or white, whichever is seen on its colour. */
function cross({ context, cols, cell }, i, [r, g, b]) {
  const [x, y, gap] = [(i % cols) * cell, Math.floor(i / cols) * cell, 0.28 * cell];
  context.strokeStyle = 0.3 * r + 0.59 * g + 0.11 * b > 120 ? "#000" : "#fff";
  context.lineWidth = cell / 11;
  context.beginPath();
  context.moveTo(x + gap, y + gap);
  context.lineTo(x + cell - gap, y + cell - gap);
  context.moveTo(x + cell - gap, y + gap);
  context.lineTo(x + gap, y + cell - gap);
  context.stroke();
}

const labelColour = (labels, palette) => (i) => (labels[i] === VOID ? VOID : palette[labels[i]]);

/** A frame that is seen on every colour, around `size` x `size` cells. */
function mark({ context, cell }, row, col, size = 1) {
  const reach = (size - 1) / 2;
  const box = [(col - reach) * cell, (row - reach) * cell, size * cell, size * cell];
  for (const [colour, width] of [["#000", 5], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(...box);
  }
}

/** Arrow keys move a cell (with shift: `leap` cells), space and enter act, digits choose. */
function steer({ canvas, rows, cols }, cursor, { leap = 4, moved, act, digit }) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const inside = (value, n) => Math.min(n - 1, Math.max(0, value));
  canvas.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (step) {
      const far = event.shiftKey ? leap : 1;
      cursor.row = inside(cursor.row + far * step[0], rows);
      cursor.col = inside(cursor.col + far * step[1], cols);
      moved();
    } else if (act && (event.key === " " || event.key === "Enter")) act();
    else if (!(digit && /^[1-9]$/.test(event.key) && !event.ctrlKey && !event.metaKey && digit(+event.key))) return;
    event.preventDefault();
    event.stopPropagation();
  });
}

// ---- numbers --------------------------------------------------------------------------------------------------------

/** [value, count, value, count, ...] -> labels; `pack` is the reverse. */
function unpack(runs) {
  const labels = [];
  for (let i = 0; i < runs.length; i += 2) for (let n = 0; n < runs[i + 1]; n++) labels.push(runs[i]);
  return Uint8Array.from(labels);
}

function pack(labels) {
  const runs = [];
  for (const value of labels) {
    if (runs.length && runs[runs.length - 2] === value) runs[runs.length - 1]++;
    else runs.push(value, 1);
  }
  return runs;
}

/** As segedu.metrics.confusion_matrix: K x K counts in one array, rows = target, void left out. */
function confusion(labels, target, k) {
  const matrix = new Array(k * k).fill(0);
  for (let i = 0; i < target.length; i++) if (target[i] !== VOID) matrix[target[i] * k + labels[i]]++;
  return matrix;
}

/** As segedu.metrics.Scores. NaN: a class that is not there. */
function scoresOf(matrix, k) {
  const classes = [...Array(k).keys()];
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = (values) => ((values = values.filter((v) => !Number.isNaN(v))), sum(values) / values.length);
  const right = classes.map((i) => matrix[i * k + i]);
  const pixels = classes.map((i) => sum(classes.map((j) => matrix[i * k + j])));
  const said = classes.map((j) => sum(classes.map((i) => matrix[i * k + j])));
  const iou = classes.map((i) => right[i] / (pixels[i] + said[i] - right[i]));
  const accuracy = classes.map((i) => right[i] / pixels[i]);
  const weighted = classes.filter((i) => pixels[i] > 0).map((i) => pixels[i] * iou[i]);
  return {
    pixel_accuracy: sum(right) / sum(pixels), mean_accuracy: mean(accuracy), miou: mean(iou),
    fw_iou: sum(weighted) / sum(pixels), iou, accuracy,
  };
}

/** As segedu.metrics.boundary_f1 of one picture; `tolerance` in shares of the diagonal. */
function boundaryF1(labels, target, k, rows, cols, tolerance) {
  labels = labels.map((value, i) => (target[i] === VOID ? VOID : value));
  const [true_, said] = [boundary(target, rows, cols), boundary(labels, rows, cols)];
  const radius = tolerance * Math.hypot(rows, cols);
  const disc = [];
  for (let dy = -Math.floor(radius); dy <= radius; dy++) {
    const half = Math.floor(Math.sqrt(Math.max(radius ** 2 - dy ** 2, 0)) + 1e-9);
    for (let dx = -half; dx <= half; dx++) disc.push([dy, dx]);
  }
  const near = (edge, of, i, c) => {
    const [row, col] = [Math.floor(i / cols), i % cols];
    return disc.some(([dy, dx]) => {
      const [y, x] = [row + dy, col + dx];
      return y >= 0 && y < rows && x >= 0 && x < cols && edge[y * cols + x] && of[y * cols + x] === c;
    });
  };
  const share = (edge, of, other, otherOf, c) => {
    let [all, hit] = [0, 0];
    for (let i = 0; i < of.length; i++) if (edge[i] && of[i] === c) (all++, (hit += near(other, otherOf, i, c)));
    return { all, share: hit / all };
  };
  const values = [];
  for (let c = 0; c < k; c++) {
    if (!target.includes(c)) continue;
    const precision = share(said, labels, true_, target, c);
    const recall = share(true_, target, said, labels, c);
    if (recall.all === 0) values.push(+labels.every((value, i) => value === target[i]));
    else values.push((2 * precision.share * recall.share) / (precision.share + recall.share) || 0);
  }
  return values.reduce((a, b) => a + b, 0) / values.length;
}

/** Cells that have a 4-neighbour of another label. */
function boundary(labels, rows, cols) {
  return labels.map((value, i) => {
    const col = i % cols;
    const other = (j, inside) => inside && labels[j] !== value;
    return +(other(i - 1, col > 0) || other(i + 1, col < cols - 1) || other(i - cols, i >= cols) || other(i + cols, i + cols < rows * cols));
  });
}

const SCORES = [["mean IU", "miou"], ["pixel accuracy", "pixel_accuracy"], ["mean accuracy", "mean_accuracy"], ["frequency weighted IU", "fw_iou"], ["boundary F1", "boundary_f1"]];

// ---- metric lab: paint a prediction, watch the scores (chapter 01) ---------------------------------------------------

function metricLab(state, tell) {
  const { rows, cols, classes, palette } = state;
  const k = classes.length;
  const target = unpack(state.target);
  const labels = unpack(state.presets[0].labels);
  const cursor = { row: rows >> 1, col: cols >> 1, seen: false };
  let [brush, size, countVoid, marking] = [state.brush, 1, false, true];

  const truth = picture("Truth", rows, cols, 20, { role: "img", "aria-label": `Truth: ${shares(target)}` });
  const canvasProps = { class: "paint", role: "application", tabindex: "0", "aria-label": "Prediction, to paint", "aria-describedby": "keys" };
  const paper = picture("Prediction (paint here)", rows, cols, 20, canvasProps);
  const where = h("p", { class: "hint" });
  const note = h("p", { class: "note" });
  const starts = presets("Start from a prediction", state.presets.map((preset) => preset.name), (i) => {
    labels.set(unpack(state.presets[i].labels));
    start(i);
    update();
  });
  const start = (i) => {
    starts.press(i);
    note.textContent = i === undefined ? "Your own painting." : state.presets[i].note;
  };
  const brushes = choice("Paint", classes.map((text, i) => ({ text, colour: palette[i], key: String(i + 1) })), (i) => (brush = i));
  brushes.pick(brush);
  const sizes = choice("Brush", [{ text: "1 cell" }, { text: "3 × 3" }], (i) => (size = i ? 3 : 1));
  const overall = meters("Scores", SCORES.map(([name]) => name));
  overall.rows[0].element.className = "first";
  const perClass = meters("IU of each class", [...classes, "void"], [...palette, VOID]);
  const table = matrixTable("Confusion matrix (cells)");

  const { element, announce } = frame(
    state.title, state.lead, starts.element, note,
    h("div", { class: "pictures small-large" }, truth.element, paper.element),
    h("div", { class: "row wide" }, brushes.element, sizes.element),
    h("div", { class: "row wide" },
      toggle("Count void (striped) as a class", false, (on) => ((countVoid = on), update())),
      toggle("Cross out wrong cells", true, (on) => ((marking = on), draw()))),
    h("div", { class: "columns" }, h("div", {}, overall.element, perClass.element), h("div", {}, table.element, where)),
    h("p", { class: "hint", id: "keys" },
      `Keys in the prediction: arrows move (with shift 4 cells), space paints, 1 to ${k} choose a class. ` +
      `Boundary F1 counts an edge as found within ${+(state.tolerance * Math.hypot(rows, cols)).toFixed(2)} cell.`),
  );

  function shares(of) {
    const labelled = of.filter((value) => value !== VOID).length;
    return classes.map((name, c) => `${name} ${Math.round((100 * of.filter((v) => v === c).length) / labelled)} %`).join(", ");
  }

  function draw() {
    fill(truth, labelColour(target, palette));
    fill(paper, labelColour(labels, palette));
    const wrong = (i) => labels[i] !== target[i] && (countVoid || target[i] !== VOID);
    for (let i = 0; marking && i < labels.length; i++) if (wrong(i)) cross(paper, i, palette[labels[i]]);
    if (!cursor.seen) return;
    mark(truth, cursor.row, cursor.col);
    mark(paper, cursor.row, cursor.col, size);
  }

  function point() {
    const i = cursor.row * cols + cursor.col;
    const name = (value) => (value === VOID ? "void" : classes[value]);
    where.textContent = `Row ${cursor.row + 1}, column ${cursor.col + 1}: truth ${name(target[i])}, prediction ${name(labels[i])}.`;
    return where.textContent;
  }

  function update() {
    const kinds = countVoid ? k + 1 : k;
    const wanted = countVoid ? target.map((value) => (value === VOID ? k : value)) : target;
    const matrix = confusion(labels, wanted, kinds);
    const scores = { ...scoresOf(matrix, kinds), boundary_f1: boundaryF1(labels, wanted, kinds, rows, cols, state.tolerance) };
    overall.set(SCORES.map(([, key]) => scores[key]));
    perClass.set(scores.iou);
    table.set(matrix, [...classes, "void"].slice(0, kinds));
    draw();
    point();
    announce(SCORES.map(([name, key]) => `${name} ${fixed(scores[key])}`).join(", "));
    tell({ labels: pack(labels), count_void: countVoid, matrix, ...scores });
  }

  function stroke() {
    const reach = (size - 1) / 2;
    for (let row = Math.max(0, cursor.row - reach); row <= Math.min(rows - 1, cursor.row + reach); row++)
      for (let col = Math.max(0, cursor.col - reach); col <= Math.min(cols - 1, cursor.col + reach); col++)
        labels[row * cols + col] = brush;
  }

  function paintTo(row, col) {
    const steps = Math.max(Math.abs(row - cursor.row), Math.abs(col - cursor.col), 1);
    const [fromRow, fromCol] = [cursor.row, cursor.col];
    for (let s = 1; s <= steps; s++) {
      cursor.row = Math.round(fromRow + ((row - fromRow) * s) / steps);
      cursor.col = Math.round(fromCol + ((col - fromCol) * s) / steps);
      stroke();
    }
    start();
    update();
  }

  let down = false;
  const look = (seen) => ((cursor.seen = seen), draw());
  paper.canvas.addEventListener("pointerdown", (event) => {
    down = true;
    paper.canvas.setPointerCapture(event.pointerId);
    [cursor.row, cursor.col] = paper.at(event);
    paintTo(cursor.row, cursor.col);
  });
  paper.canvas.addEventListener("pointermove", (event) => {
    const [row, col] = paper.at(event);
    cursor.seen = true;
    if (down) return paintTo(row, col);
    [cursor.row, cursor.col] = [row, col];
    draw();
    point();
  });
  for (const type of ["pointerup", "pointercancel"]) paper.canvas.addEventListener(type, () => (down = false));
  paper.canvas.addEventListener("pointerleave", () => look(element.getRootNode().activeElement === paper.canvas));
  paper.canvas.addEventListener("focus", () => look(true));
  paper.canvas.addEventListener("blur", () => look(false));
  steer(paper, cursor, {
    moved: () => (look(true), announce(point())),
    act: () => (stroke(), start(), update()),
    digit: (n) => n <= k && (brushes.pick((brush = n - 1)), announce(`paint ${classes[brush]}`), true),
  });
  start(0);
  update();
  return element;
}

// ---- skip mixer: how much of each score map goes into the sum (chapter 02) ------------------------------------------

/** The 1-D taps of FCN's bilinear kernel. */
function taps(kernel) {
  const factor = Math.floor((kernel + 1) / 2);
  const centre = kernel % 2 ? factor - 1 : factor - 0.5;
  return Float64Array.from({ length: kernel }, (_, i) => 1 - Math.abs(i - centre) / factor);
}

/** Transposed convolution along one axis, then a crop: (outer, n, inner) -> (outer, size, inner). */
function stretch(data, outer, n, inner, { kernel, stride, crop }, size) {
  const weight = taps(kernel);
  const out = new Float64Array(outer * size * inner);
  for (let a = 0; a < n; a++) {
    for (let t = 0; t < kernel; t++) {
      const p = a * stride + t - crop;
      if (p < 0 || p >= size) continue;
      for (let o = 0; o < outer; o++)
        for (let i = 0; i < inner; i++) out[(o * size + p) * inner + i] += weight[t] * data[(o * n + a) * inner + i];
    }
  }
  return out;
}

/** FCN's upsampling of K score maps: a bilinear transposed convolution cut to (height, width). */
function upsample({ data, shape: [k, rows, cols] }, step, height, width) {
  const tall = stretch(data, k, rows, cols, step, height);
  return { data: stretch(tall, k * height, cols, 1, step, width), shape: [k, height, width] };
}

/** {shape, scale, data: base64 of little-endian int16} -> {shape, data}. */
function unquantise({ shape, scale, data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return { shape, data: Float64Array.from({ length: bytes.length / 2 }, (_, i) => scale * view.getInt16(2 * i, true)) };
}

function skipMixer(state, tell) {
  const { classes, palette, rows, cols, scenes, steps } = state;
  const k = classes.length;
  const size = rows * cols;
  const cursor = { row: rows >> 1, col: cols >> 1 };
  const weights = [1, 0, 0];
  const names = ["stride 32", "stride 16", "stride 8"];
  const settings = [[1, 0, 0], [1, 1, 0], [1, 1, 1]];
  let scene, parts, target, shown, labels, mixed;

  const views = [
    picture("Image", rows, cols, 4, { class: "probe", role: "img" }),
    picture("Truth", rows, cols, 4, { class: "probe", role: "img" }),
    picture("Prediction", rows, cols, 4, { class: "probe", role: "application", tabindex: "0", "aria-label": "Prediction, move the pixel", "aria-describedby": "keys" }),
    picture("Errors", rows, cols, 4, { class: "probe", role: "img" }),
  ];
  const [image, truth, prediction, errors] = views;
  const which = choice("Scene", scenes.map((_, i) => ({ text: String(i + 1) })), (i) => open(i));
  const mixes = presets("Weights", ["32 only", "32 + 16", "32 + 16 + 8"], (i) => {
    settings[i].forEach((value, s) => (weights[s] = value));
    sliders.forEach((control, s) => control.set(weights[s]));
    update();
  });
  const sliders = names.map((name, s) => slider(`Weight of the ${name} scores`, { value: weights[s] }, (value) => ((weights[s] = value), update())));
  const overall = meters("Scores of this picture", ["mean IU", "pixel accuracy", "boundary F1"]);
  overall.rows[0].element.className = "first";
  const perClass = meters("IU of each class", classes, palette);
  const here = h("table", { class: "numbers" });

  const { element, announce } = frame(
    state.title, state.lead, which.element,
    h("div", { class: "columns large-small", style: "margin-top: 0.7rem" },
      h("div", {}, h("div", { class: "pictures two" }, ...views.map((view) => view.element))),
      h("div", {}, mixes.element, ...sliders.map((control) => control.element), overall.element)),
    legend(classes, palette),
    h("div", { class: "columns" }, h("div", {}, here), perClass.element),
    h("p", { class: "hint", id: "keys" },
      "The stride 32 scores were trained as one part of the sum: alone they are not an FCN-32s. " +
      "Point at a picture to look into a pixel. Keys in the prediction: arrows move the pixel, with shift 8 pixels. " +
      `Boundary F1 counts an edge as found within ${(state.tolerance * Math.hypot(rows, cols)).toFixed(1)} pixels.`),
  );

  function open(i) {
    scene = scenes[i];
    target = unpack(scene.target);
    const maps = scene.scores.map(unquantise);
    const sizes = [...maps.slice(1).map((map) => map.shape.slice(1)), [rows, cols]];
    parts = maps.map((map, s) => {
      for (let n = s; n < steps.length; n++) map = upsample(map, steps[n], ...sizes[n]);
      return map.data;
    });
    shown = null;
    const loading = new Image();
    loading.onload = () => scene === scenes[i] && ((shown = loading), draw());
    loading.src = scene.image;
    image.canvas.setAttribute("aria-label", `Image of scene ${i + 1}`);
    const there = classes.filter((_, c) => target.includes(c));
    truth.canvas.setAttribute("aria-label", `Truth of scene ${i + 1}: ${there.join(", ")}`);
    update();
  }

  function draw() {
    image.context.imageSmoothingEnabled = false;
    if (shown) image.context.drawImage(shown, 0, 0, image.canvas.width, image.canvas.height);
    fill(truth, labelColour(target, palette));
    fill(prediction, labelColour(labels, palette));
    fill(errors, (i) => (target[i] === VOID ? VOID : labels[i] === target[i] ? [238, 238, 238] : [176, 24, 40]));
    for (const view of views) mark(view, cursor.row, cursor.col, 3);
  }

  function probe() {
    const i = cursor.row * cols + cursor.col;
    const top = Math.max(...classes.map((_, c) => mixed[c * size + i]));
    const powers = classes.map((_, c) => Math.exp(mixed[c * size + i] - top));
    const total = powers.reduce((a, b) => a + b, 0);
    const order = classes.map((_, c) => c).sort((a, b) => powers[b] - powers[a]);
    const kept = order.slice(0, 5);
    if (target[i] !== VOID && !kept.includes(target[i])) kept[4] = target[i];
    const truthName = target[i] === VOID ? "void" : classes[target[i]];
    const head = ["scores by stride", "32", "16", "8", "probability"];
    const lines = kept.map((c) => {
      const numbers = parts.map((part, s) => fixed(weights[s] * part[c * size + i], 1));
      return h("tr", {}, h("th", { scope: "row" }, swatch(palette[c]), " ", classes[c]), ...[...numbers, fixed(powers[c] / total, 2)].map((text) => h("td", {}, text)));
    });
    here.replaceChildren(
      h("caption", {}, `Pixel in row ${cursor.row + 1}, column ${cursor.col + 1}: truth ${truthName}, prediction ${classes[labels[i]]}`),
      h("thead", {}, h("tr", {}, ...head.map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, ...lines),
    );
    return `Row ${cursor.row + 1}, column ${cursor.col + 1}: truth ${truthName}, prediction ${classes[order[0]]} with probability ${fixed(powers[order[0]] / total, 2)}`;
  }

  function update() {
    mixed = new Float64Array(k * size);
    for (let i = 0; i < mixed.length; i++) mixed[i] = weights[0] * parts[0][i] + weights[1] * parts[1][i] + weights[2] * parts[2][i];
    labels = new Uint8Array(size);
    for (let i = 0; i < size; i++) for (let c = 1; c < k; c++) if (mixed[c * size + i] > mixed[labels[i] * size + i]) labels[i] = c;
    const scores = { ...scoresOf(confusion(labels, target, k), k), boundary_f1: boundaryF1(labels, target, k, rows, cols, state.tolerance) };
    overall.set([scores.miou, scores.pixel_accuracy, scores.boundary_f1]);
    perClass.set(scores.iou);
    mixes.press(settings.findIndex((setting) => setting.every((value, s) => value === weights[s])));
    errors.canvas.setAttribute("aria-label", `Errors: ${fixed(100 * (1 - scores.pixel_accuracy), 1)} % of the pixels are wrong`);
    draw();
    probe();
    announce(`mean IU ${fixed(scores.miou)}, pixel accuracy ${fixed(scores.pixel_accuracy)}, boundary F1 ${fixed(scores.boundary_f1)}`);
    tell({ scene: scene.name, weights: [...weights], labels: pack(labels), ...scores });
  }

  const look = () => (draw(), probe());
  for (const view of views)
    for (const type of ["pointerdown", "pointermove"])
      view.canvas.addEventListener(type, (event) => (([cursor.row, cursor.col] = view.at(event)), look()));
  steer(prediction, cursor, { leap: 8, moved: () => announce(look()) });
  open(0);
  return element;
}

// ---- the element and the widget -------------------------------------------------------------------------------------

const FIGURES = { "metric-lab": metricLab, "skip-mixer": skipMixer };

/** Shows a figure in the shadow of `host`. `emit(value)` gets its numbers; `host.value` holds the last. */
export function mount(host, name, state, emit = () => {}) {
  if (!FIGURES[name]) throw new Error(`there is no figure "${name}"; there is ${Object.keys(FIGURES).join(", ")}`);
  const figure = FIGURES[name](state, (value) => emit((host.value = value)));
  host.dataset.lmSuppressShortcuts = "true"; // JupyterLab would take the arrow keys
  host.attachShadow({ mode: "open" }).append(h("style", {}, STYLE), figure);
}

class SegFigure extends HTMLElement {
  connectedCallback() {
    if (!this.shadowRoot) mount(this, this.getAttribute("name"), JSON.parse(this.getAttribute("state")));
  }
}

// A notebook loads this module once for each widget.
if (!customElements.get("seg-figure")) customElements.define("seg-figure", SegFigure);

function render({ model, el }) {
  const host = h("div");
  const later = settle(300);
  el.append(host);
  mount(host, model.get("name"), model.get("state"), (value) => later(() => (model.set("value", value), model.save_changes())));
}

export default { render };
