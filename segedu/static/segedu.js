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
p.below { margin: 0.6rem 0 0; }
.row { display: flex; flex-wrap: wrap; gap: 0.4rem; align-items: center; margin: 0 0 0.7rem; }
.row.wide { gap: 0.4rem 1.1rem; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
fieldset > legend { padding: 0; float: left; margin: 0.22rem 0.5rem 0 0; font-weight: 600; }
fieldset > .row { margin: 0; }
.figure > fieldset { margin-bottom: 0.7rem; }
.knobs fieldset, .knobs .row { margin-bottom: 0.4rem; }
.knobs fieldset > .row { margin: 0; }
button, label.chip {
  font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: 0.4rem;
  padding: 0.22rem 0.6rem; min-height: 1.9rem; cursor: pointer; display: inline-flex; align-items: center; gap: 0.35rem;
}
button:not(:disabled):hover, label.chip:hover { border-color: currentColor; }
button:disabled { opacity: 0.5; cursor: default; }
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
.slider input:focus-visible { outline-offset: -2px; }
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
.numbers thead th + th { text-align: right; vertical-align: bottom; }
.numbers.stack th { white-space: normal; }
.numbers tr[aria-current] { background: var(--soft); outline: 1px solid currentColor; }
.columns + .note { margin-top: 0.6rem; }
summary { cursor: pointer; font-weight: 600; min-height: 1.9rem; }
textarea {
  display: block; width: 100%; margin-bottom: 0.4rem; padding: 0.5rem; resize: vertical; field-sizing: content; color: inherit; background: var(--soft);
  border: 1px solid var(--line); border-radius: 0.4rem; font: 0.75rem/1.45 ui-monospace, monospace;
}
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.15rem 0.8rem; padding: 0; margin: 0.7rem 0; font-size: 0.8rem; }
.silent { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none !important; }
@media (prefers-reduced-motion: no-preference) { .track i { transition: width 0.15s; } }
.levels { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: 0.7rem; margin-bottom: 0.7rem; }
.levels > div { display: grid; gap: 0.4rem; align-content: start; max-width: 15rem; }
.two { grid-template-columns: 1fr 1fr; }
.small-large { grid-template-columns: 2fr 3fr; }
.three { grid-template-columns: 1fr 1fr; }
.three > :last-child { grid-column: 1 / -1; }
@container (min-width: 34rem) {
  .small-large { grid-template-columns: 1fr 1fr; }
  .three { grid-template-columns: 1fr 1fr 1fr; }
  .three > :last-child { grid-column: auto; }
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
const clamp = (value, n) => Math.min(n - 1, Math.max(0, value));
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

/** One of several, as native radio buttons. `options`: {text, colour?, key?}; `limit(n)` offers only the first n, `offer(shown)` those i with shown(i). */
function choice(label, options, act) {
  const inputs = options.map((_, i) => h("input", { type: "radio", name: label, change: () => act(i) }));
  const chips = options.map(({ text, colour, key }, i) =>
    h("label", { class: "chip" }, inputs[i], ...(colour ? [swatch(colour)] : []), text, ...(key ? [h("kbd", { "aria-hidden": "true" }, key)] : [])));
  inputs[0].checked = true;
  const pick = (i) => (inputs[i].checked = true);
  const offer = (shown) => chips.forEach((chip, i) => (chip.hidden = !shown(i)));
  const limit = (n) => offer((i) => i < n);
  return { element: h("fieldset", {}, h("legend", {}, label), h("div", { class: "row" }, ...chips)), pick, limit, offer };
}

function toggle(label, checked, act) {
  return h("label", { class: "check" }, h("input", { type: "checkbox", checked, change: (e) => act(e.target.checked) }), label);
}

function slider(label, { min = 0, max = 1, step = 0.05, value, text = (value) => value.toFixed(2) }, act) {
  const input = h("input", { type: "range", min, max, step, value, input: () => (show(), act(+input.value)) });
  const shown = h("b", { "aria-hidden": "true" });
  const show = () => {
    shown.textContent = text(+input.value);
    input.setAttribute("aria-valuetext", shown.textContent);
  };
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
  const caption = h("figcaption", {}, title);
  const view = { element: h("figure", {}, caption, canvas), canvas, caption, context: canvas.getContext("2d"), rows, cols, cell };
  view.at = (event) => {
    const box = canvas.getBoundingClientRect();
    const place = (offset, size, n) => clamp(Math.floor((offset / size) * n), n);
    return [place(event.clientY - box.top, box.height, view.rows), place(event.clientX - box.left, box.width, view.cols)];
  };
  return view;
}

/** Divides the same canvas into other cells. */
const divide = (view, rows, cols) => Object.assign(view, { rows, cols, cell: view.canvas.width / cols });

/** Fills the picture with one colour [r, g, b] for each cell, or hatches it where the colour is void. */
function fill({ canvas, context, rows, cols, cell }, colourOf) {
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
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
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

/** Black or white, whichever is seen on a colour. */
const inkOn = ([r, g, b]) => (0.3 * r + 0.59 * g + 0.11 * b > 110 ? "#000" : "#fff");

/** Crosses out one cell. */
function cross({ context, cols, cell }, i, colour) {
  const [x, y, gap] = [(i % cols) * cell, Math.floor(i / cols) * cell, 0.28 * cell];
  context.strokeStyle = inkOn(colour);
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
const mark = (view, row, col, size = 1) => outline(view, row - (size - 1) / 2, col - (size - 1) / 2, size, size);

/** A frame around height x width cells from (row, col) on, of black and white lines so wide. */
function outline({ canvas, context, rows, cols }, row, col, height, width, [black, white] = [5, 2]) {
  const [dy, dx] = [canvas.height / rows, canvas.width / cols];
  for (const [colour, line] of [["#000", black], ["#fff", white]]) {
    context.strokeStyle = colour;
    context.lineWidth = line;
    context.strokeRect(col * dx, row * dy, width * dx, height * dy);
  }
}

/** White at 0, blue up to `top`, orange down to -top. */
function heat(value, top) {
  const share = Math.min(1, Math.abs(value) / (top || 1));
  return (value < 0 ? [213, 94, 0] : [0, 114, 178]).map((ink) => Math.round(255 + (ink - 255) * share));
}

/** Arrow keys move a cell (with shift: `leap` cells), space and enter act, `typed(key)` says whether it took another key. */
function steer(view, cursor, { leap = 4, moved, act, typed = () => false }) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  view.canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = steps[event.key];
    if (step) {
      const far = event.shiftKey ? leap : 1;
      cursor.row = clamp(cursor.row + far * step[0], view.rows);
      cursor.col = clamp(cursor.col + far * step[1], view.cols);
      moved();
    } else if (act && (event.key === " " || event.key === "Enter")) act();
    else if (!typed(event.key)) return;
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
    typed: (key) => key >= 1 && key <= k && (brushes.pick((brush = key - 1)), announce(`paint ${classes[brush]}`), true),
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
    h("div", { class: "columns large-small" },
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

// ---- upsampling lab: what each way of upsampling puts where (chapter 03) ---------------------------------------------

/**
 * Transposed convolution of n x n values as its stamps: for each value a Map (cell of the output -> weight).
 * The outermost values are first repeated `edge` times around the map.
 */
function stampsOf({ kernel, stride, padding, edge = 0 }, n) {
  const k = Math.sqrt(kernel.length);
  const size = (n - 1) * stride - 2 * padding + k;
  const stamps = Array.from({ length: n * n }, () => new Map());
  for (let row = -edge; row < n + edge; row++) {
    for (let col = -edge; col < n + edge; col++) {
      const stamp = stamps[clamp(row, n) * n + clamp(col, n)];
      kernel.forEach((weight, i) => {
        const [y, x] = [row * stride - padding + Math.floor(i / k), col * stride - padding + (i % k)];
        if (y < 0 || y >= size || x < 0 || x >= size) return;
        stamp.set(y * size + x, (stamp.get(y * size + x) || 0) + weight);
      });
    }
  }
  return { stamps, size };
}

/** 2 x 2 max pooling of n x n values: the cell of each maximum, the first of equals. */
function switchesOf(values, n) {
  return Array.from({ length: (n * n) / 4 }, (_, i) => {
    const corner = 2 * Math.floor(i / (n / 2)) * n + 2 * (i % (n / 2));
    return [corner, corner + 1, corner + n, corner + n + 1].reduce((best, cell) => (values[cell] > values[best] ? cell : best));
  });
}

/** What a transposed convolution makes of a map of ones, away from the border: its least and its largest value. */
function flatRange(kernel, stride) {
  const k = Math.sqrt(kernel.length);
  const sums = new Array(stride * stride).fill(0);
  kernel.forEach((weight, i) => (sums[(Math.floor(i / k) % stride) * stride + ((i % k) % stride)] += weight));
  return [Math.min(...sums), Math.max(...sums)];
}

/** k x k weights in one array. */
const ones = (k) => new Array(k * k).fill(1);
const bilinear = (k) => [...taps(k)].flatMap((a) => [...taps(k)].map((b) => a * b));

const short = (value, digits = 2) => String(+value.toFixed(digits)).replace("-", "−");
const place = (i, cols) => `(${Math.floor(i / cols)}, ${i % cols})`;

/** Colours and numbers in the cells of a square picture, rings around the cells in `ringed`, small text under the numbers. */
function write(view, values, { ringed = [], under = [], colourOf } = {}) {
  const n = Math.sqrt(values.length);
  const top = Math.max(...values.map(Math.abs));
  const colours = values.map((value, i) => (colourOf ? colourOf(i) : heat(value, top)));
  divide(view, n, n);
  fill(view, (i) => colours[i]);
  const { context, cell } = view;
  context.strokeStyle = "#0004";
  context.lineWidth = 1;
  for (let i = 0; i < values.length; i++) context.strokeRect((i % n) * cell, Math.floor(i / n) * cell, cell, cell);
  context.textAlign = "center";
  context.textBaseline = "middle";
  values.forEach((value, i) => {
    if (colours[i] === VOID) return;
    const [x, y] = [((i % n) + 0.5) * cell, (Math.floor(i / n) + 0.53) * cell];
    const text = short(value);
    context.fillStyle = context.strokeStyle = inkOn(colours[i]);
    context.font = `${cell * Math.min(0.4, 1.5 / text.length)}px system-ui, sans-serif`;
    context.fillText(text, x, y);
    context.font = `${0.15 * cell}px system-ui, sans-serif`;
    if (under[i]) context.fillText(under[i], x, y + 0.32 * cell);
    if (!ringed.includes(i)) return;
    context.lineWidth = 2;
    context.beginPath();
    context.arc(x, y - 0.03 * cell, 0.36 * cell, 0, 7);
    context.stroke();
  });
}

function upsamplingLab(state, tell) {
  const n = 4;
  const [NEAREST, BILINEAR, UNPOOL, CONV] = [0, 1, 2, 3];
  const fixedKernels = [{ kernel: ones(2), stride: 2, padding: 0 }, { kernel: bilinear(4), stride: 2, padding: 1, edge: 1 }];
  const own = {}; // the reader's transposed convolution
  const input = [];
  let [method, corner, chosen] = [CONV, false, null];
  let used, source, stamps, size, switches, places, output, counts; // all that `update` works out

  // `chosen` is the picture whose cell was touched last. Output and counts share a cell.
  const grid = (title, label, cell, cursor = { row: 1, col: 1 }) => {
    const props = { class: "probe", role: "application", tabindex: "0", "aria-label": label, "aria-describedby": "keys" };
    const view = Object.assign(picture(title, n, n, cell, props), { cursor });
    const choose = () => ((chosen = view), show());
    view.canvas.addEventListener("pointerdown", (event) => (([cursor.row, cursor.col] = view.at(event)), choose()));
    view.canvas.addEventListener("focus", choose);
    steer(view, cursor, { moved: choose, typed: (key) => (/^[0-9]$/.test(key) ? edit(() => +key) : "+=".includes(key) ? more() : "-−".includes(key) && less()) });
    return view;
  };
  const [from, middle, to] = [grid("Input", "Input map, to edit", 90), grid("Kernel", "Kernel", 90), grid("Output", "Output map", 150)];
  const reach = grid("Stamps on each cell", "Number of stamps on each cell of the output", 150, to.cursor);

  const ways = choice("Method", ["nearest", "bilinear", "unpooling", "transposed convolution"].map((text) => ({ text })), (i) => ((method = i), change()));
  const setups = presets("Transposed convolutions", state.presets.map((preset) => preset.name), (i) => open(i));
  const sizes = choice("Kernel size", ["2", "3", "4"].map((text) => ({ text })), (i) => (setKernel(filled, i + 2), change()));
  const strides = choice("Stride", ["1", "2", "3"].map((text) => ({ text })), (i) => ((own.stride = i + 1), change()));
  const paddings = choice("Padding", ["0", "1", "2", "3"].map((text) => ({ text })), (i) => ((own.padding = i), change()));
  const kernels = presets("Kernel weights", ["kernel: all 1", "kernel: bilinear"], (i) => (setKernel([ones, bilinear][i]), change()));
  const inputs = presets("Input values", state.maps.map((map) => `input: ${map.name}`), (i) => (input.splice(0, n * n, ...state.maps[i].values), change()));
  const knobs = h("div", {}, sizes.element, strides.element, paddings.element, kernels.element);
  const cornering = toggle("Put values in the corner, not at their switch", false, (on) => ((corner = on), change()));
  const [minus, plus] = [h("button", { type: "button", "aria-label": "less", click: () => less() }, "−"), h("button", { type: "button", "aria-label": "more", click: () => more() }, "+")];
  const [arithmetic, note, where] = [h("p"), h("p", { class: "note" }), h("p", { class: "note below" })];

  const { element, announce } = frame(
    state.title, state.lead, ways.element, setups.element,
    h("div", { class: "columns" },
      h("div", { class: "pictures two" }, from.element, middle.element),
      h("div", { class: "knobs" }, inputs.element, knobs, cornering, h("div", { class: "row" }, minus, plus, "change the chosen cell"))),
    arithmetic, note, h("div", { class: "columns" }, to.element, reach.element), where,
    h("p", { class: "hint", id: "keys" },
      "Click a cell to choose it. Keys in a map: arrows move, + and − change a value of the input or the kernel, 0 to 9 set it. Rows and columns are counted from 0, as in the code."),
  );

  let filled = ones;
  function setKernel(weights, k = Math.sqrt(own.kernel.length)) {
    filled = weights;
    own.kernel = weights(k);
    own.padding = Math.min(own.padding, k - 1);
  }

  function open(i) {
    const { kernel, stride, padding, map } = state.presets[i];
    Object.assign(own, { kernel: [...kernel], stride, padding });
    input.splice(0, n * n, ...state.maps[map].values);
    method = CONV;
    change(i);
  }

  /** Other settings, or another value: the controls follow. */
  function change(preset) {
    const k = Math.sqrt(own.kernel.length);
    const same = (a, b) => a.every((value, i) => value === b[i]);
    ways.pick(method);
    sizes.pick(k - 2);
    strides.pick(own.stride - 1);
    paddings.limit(k);
    paddings.pick(own.padding);
    setups.press(preset);
    kernels.press([ones, bilinear].findIndex((weights) => same(weights(k), own.kernel)));
    inputs.press(state.maps.findIndex((map) => same(map.values, input)));
    setups.element.hidden = method !== CONV;
    knobs.hidden = method !== CONV;
    cornering.hidden = method !== UNPOOL;
    update();
  }

  const at = ({ cursor, cols }) => cursor.row * cols + cursor.col;
  const more = () => edit((value, step) => value + step);
  const less = () => edit((value, step) => value - step);
  const editable = () => chosen === from || (chosen === middle && method === CONV);
  function edit(next) {
    if (!editable()) return false;
    const [values, step] = chosen === from ? [input, 1] : [own.kernel, 0.25];
    values[at(chosen)] = next(values[at(chosen)], step);
    change();
    return true;
  }

  function update() {
    used = method === CONV ? own : fixedKernels[method];
    switches = switchesOf(input, n);
    if (method === UNPOOL) {
      places = switches.map((cell, i) => (corner ? 2 * Math.floor(i / 2) * n + 2 * (i % 2) : cell));
      source = switches.map((cell) => input[cell]);
      [stamps, size] = [places.map((cell) => new Map([[cell, 1]])), n];
    } else ({ stamps, size } = stampsOf(used, n)), (source = input);
    output = new Array(size * size).fill(0);
    counts = new Array(size * size).fill(0);
    stamps.forEach((stamp, i) => stamp.forEach((weight, cell) => ((output[cell] += weight * source[i]), counts[cell]++)));
    const facts = method === CONV ? convolved() : method === UNPOOL ? unpooled() : resized();
    for (const [view, values] of [[from, input], [middle, method === UNPOOL ? source : used.kernel], [to, output]]) {
      divide(view, Math.sqrt(values.length), Math.sqrt(values.length));
      Object.assign(view.cursor, { row: clamp(view.cursor.row, view.rows), col: clamp(view.cursor.col, view.cols) });
    }
    middle.caption.textContent = method === UNPOOL ? "Pooled" : method === CONV ? "Kernel" : "Kernel (fixed)";
    to.caption.textContent = `Output, ${size} × ${size}`;
    show();
    announce(`${arithmetic.textContent} ${note.textContent}`);
    tell({ method, input: [...input], ...(method === UNPOOL ? { corner, switches, places } : used), size, output, counts, ...facts });
  }

  function convolved() {
    const { kernel, stride, padding } = own;
    const k = Math.sqrt(kernel.length);
    const [least, most] = flatRange(ones(k), stride);
    const [low, high] = flatRange(kernel, stride);
    const cut = 1 - counts.reduce((a, b) => a + b, 0) / (n * n * k * k);
    arithmetic.textContent = `Output size (n − 1) s − 2 p + k = (${n} − 1) · ${stride} − 2 · ${padding} + ${k} = ${size}.`;
    note.textContent =
      `Away from the border ${least === most ? `every cell gets ${most} stamp${most > 1 ? "s" : ""}` : `cells get ${least} to ${most} stamps`}. ` +
      `A flat map of 1 comes out there ${low === high ? `flat, at ${short(low)}` : `as ${short(low)} to ${short(high)}: a checkerboard`}. ` +
      `${cut ? `The padding cuts off ${fixed(100 * cut, 0)} % of the stamps.` : "No part of a stamp is cut off."}`;
    return { flat: [low, high], cut };
  }

  function unpooled() {
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    const right = places.filter((cell, i) => cell === switches[i]).length;
    arithmetic.textContent = `Pooling takes ${n} to ${n / 2}, unpooling ${n / 2} to ${n}. Rings: the switches, where each maximum stood.`;
    note.textContent =
      `Kept: ${source.length} of ${input.length} values, the maxima, with ${short(sum(source))} of the sum of ${short(sum(input))}; ` +
      `${right} of ${source.length} at their old place. Lost: the other ${input.length - source.length} values. Their cells are 0.`;
    return { kept: source.length / input.length, right };
  }

  function resized() {
    const block = (i) => [0, 1, size, size + 1].map((step) => 2 * Math.floor(i / n) * size + 2 * (i % n) + step);
    const kept = input.filter((value, i) => block(i).some((cell) => output[cell] === value)).length;
    const [before, after] = [Math.max(...input), Math.max(...output)];
    arithmetic.textContent = `Output size 2 n = 2 · ${n} = ${size}. ${method === NEAREST ? "Each value fills 2 × 2 cells." : "Each cell mixes the nearest values by distance; beyond the rim the last value is repeated."}`;
    note.textContent =
      `Kept: ${kept} of ${input.length} values still stand in their own 2 × 2 cells. The largest goes from ${short(before)} to ${short(after)}. ` +
      (method === NEAREST ? "Nothing new comes in: each block is one value, with a step at its rim." : "The cells between are new, mixed values, so there are no steps.");
    return { kept: kept / input.length };
  }

  /** Draws, marks what belongs together and says it. */
  function show() {
    const unpooling = method === UNPOOL;
    write(from, input, { ringed: unpooling ? switches : [] });
    write(middle, unpooling ? source : used.kernel, { under: unpooling ? switches.map((i) => `switch ${place(i, n)}`) : [] });
    write(to, output);
    write(reach, counts);
    minus.disabled = plus.disabled = !editable();
    const sources = unpooling ? middle : from;
    if (!chosen) return (where.textContent = "Choose a cell of the input to see its stamp, or a cell of the output to see where it comes from.");
    const cell = at(chosen);
    const name = (view, i) => `${view.caption.textContent.split(/[,(]/)[0].trim().toLowerCase()} ${place(i, view.cols)}`;
    const around = (view, cells) => {
      const [rows, cols] = [cells.map((i) => Math.floor(i / view.cols)), cells.map((i) => i % view.cols)];
      const [top, left] = [Math.min(...rows), Math.min(...cols)];
      if (cells.length) outline(view, top, left, Math.max(...rows) - top + 1, Math.max(...cols) - left + 1);
    };
    if (chosen === to || chosen === reach) {
      const reaching = stamps.flatMap((stamp, i) => (stamp.has(cell) ? [i] : []));
      const terms = reaching.map((i) => `${short(source[i])} × ${short(stamps[i].get(cell), 4)}`);
      around(to, [cell]);
      around(reach, [cell]);
      around(sources, reaching);
      const sum = terms.length > 4 ? `${terms.length} values times their weights` : terms.join(" + ") || "nothing reaches it";
      where.textContent = `Chosen: ${name(to, cell)}: ${short(output[cell], 4)} = ${sum}.`;
    } else {
      const values = chosen === from ? input : unpooling ? source : used.kernel;
      const i = chosen === sources ? cell : unpooling ? switches.indexOf(cell) : -1; // which value of the source
      around(chosen, [cell]);
      if (i >= 0) for (const [view, cells] of [[sources, [i]], [to, [...stamps[i].keys()]], [reach, [...stamps[i].keys()]]]) around(view, cells);
      const fate =
        chosen === middle && !unpooling ? "one weight, in every stamp"
        : i < 0 ? "not the largest of its 2 × 2 cells: lost"
        : unpooling ? `goes to ${name(to, places[i])}`
        : `its stamp covers ${stamps[i].size} cells of the output`;
      where.textContent = `Chosen: ${name(chosen, cell)}: ${short(values[cell], 4)}, ${fate}.`;
    }
    announce(where.textContent);
  }

  open(0);
  return element;
}

// ---- layer scrubber: the way of a picture through the layers of a network (chapter 06) -------------------------------

/** The grey values of a picture of rows x cols, as `then(bytes)` once it is there. */
function greys(url, rows, cols, then) {
  const image = new Image();
  image.onload = () => {
    const context = h("canvas", { width: cols, height: rows }).getContext("2d");
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, cols, rows);
    then(Uint8Array.from({ length: rows * cols }, (_, i) => data[4 * i]));
  };
  image.src = url;
}

function layerScrubber(state, tell) {
  const { rows, cols, classes, palette, layers, scenes } = state;
  const answers = classes.length > 0;
  const stops = [{ title: "input", rows, cols }, ...layers, ...(answers ? [{ title: "answer", rows, cols }] : [])];
  const place = { y: 0.5, x: 0.5, seen: false }; // shares of height and width, the same in every layer
  const cursor = { row: 0, col: 0 };
  let [scene, stop, rank, timer] = [scenes[0], 0, 0, null];
  let shown, labels, grey;

  const cell = Math.max(1, Math.round(448 / cols));
  const image = picture("Picture", rows, cols, cell, { class: "probe", role: "img" });
  const map = picture("", rows, cols, cell, { class: "probe", role: "application", tabindex: "0", "aria-describedby": "keys" });
  const which = choice("Picture", scenes.map((_, i) => ({ text: String(i + 1) })), (i) => open(i));
  const ranks = choice("Channel", scenes[0].maps[0].map((_, i) => ({ text: ["strongest", "2nd", "3rd"][i] || `${i + 1}th` })), (i) => ((rank = i), update()));
  const layer = slider("Layer", { max: stops.length - 1, step: 1, value: 0, text: (i) => stops[i].title }, (i) => (halt(), go(i)));
  const play = h("button", { type: "button", hidden: matchMedia("(prefers-reduced-motion: reduce)").matches, click: () => (timer ? halt() : run()) }, "Play");
  const [facts, where] = [h("p", { class: "note" }), h("p", { class: "note below" })];
  const density = meters("Share of the cells that are not 0", layers.map(({ title }) => title));
  const colours = answers ? legend(classes, palette) : "";

  const { element, announce } = frame(
    state.title, state.lead,
    h("div", { class: "row wide" }, which.element, ranks.element),
    layer.element, h("div", { class: "row" }, play), facts,
    h("div", { class: "columns" }, image.element, map.element), where, colours, density.element,
    h("p", { class: "hint", id: "keys" },
      "Keys on the slider: left and right. Point at a picture to mark the same place in both. Keys in the map: arrows move the mark, with shift 4 cells; " +
      "+ and − go to the next layer and to the one before. White is 0, blue above, orange below; each map has its own scale, by the root of the value. Rows and columns are counted from 0."),
  );

  function open(i) {
    scene = scenes[i];
    shown = labels = null;
    grey = layers.map(() => []);
    const load = (url, at, keep) => greys(url, stops[at].rows, stops[at].cols, (bytes) => {
      if (scene !== scenes[i]) return;
      keep(bytes);
      if (at === stop) update();
    });
    scene.maps.forEach((maps, l) => maps.forEach((one, r) => load(one.grey, l + 1, (bytes) => (grey[l][r] = bytes))));
    if (answers) load(scene.labels, stops.length - 1, (bytes) => (labels = bytes));
    const loading = new Image();
    loading.onload = () => scene === scenes[i] && ((shown = loading), draw());
    loading.src = scene.image;
    image.canvas.setAttribute("aria-label", `Picture ${i + 1}`);
    update();
  }

  function go(i) {
    stop = clamp(i, stops.length);
    layer.set(stop);
    update();
    return true;
  }

  function run() {
    if (stop === stops.length - 1) go(0);
    play.textContent = "Pause";
    timer = setInterval(() => (go(stop + 1), stop === stops.length - 1 && halt()), 900);
  }

  function halt() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  /** The map of this stop: {channel, low, high, zeros, grey}, black being low, white high; none at the input and the answer. */
  const current = () => scene.maps[stop - 1]?.[rank];
  const square = (root) => root * Math.abs(root);
  /** The root of a value, with its sign: so are maps kept and coloured, as most values are far below the largest. */
  function rootAt(i) {
    const { low, high } = current();
    const bytes = grey[stop - 1][rank];
    return bytes ? low + (bytes[i] / 255) * (high - low) : NaN;
  }

  function draw() {
    const one = current();
    if (shown) image.context.drawImage(shown, 0, 0, image.canvas.width, image.canvas.height);
    if (one) {
      const top = Math.max(-one.low, one.high);
      const { length } = grey[stop - 1][rank] || [];
      fill(map, (i) => (length ? heat(rootAt(i), top) : VOID));
    } else if (stop) fill(map, labels ? labelColour(labels, palette) : () => VOID);
    else if (shown) map.context.drawImage(shown, 0, 0, map.canvas.width, map.canvas.height);
    if (place.seen) for (const view of [image, map]) mark(view, cursor.row, cursor.col, map.cell < 8 ? 3 : 1);
  }

  function point() {
    const i = cursor.row * map.cols + cursor.col;
    const what = current() ? short(square(rootAt(i)), 3) : stop ? classes[labels?.[i]] || "–" : "a pixel of the picture";
    where.textContent = `Row ${cursor.row}, column ${cursor.col}: ${what}.`;
    return where.textContent;
  }

  function update() {
    const { title, rows: height, cols: width, channels } = stops[stop];
    const one = current();
    for (const view of [image, map]) divide(view, height, width);
    cursor.row = clamp(Math.floor(place.y * height), height);
    cursor.col = clamp(Math.floor(place.x * width), width);
    map.caption.textContent = one ? `${title}, channel ${one.channel}` : title;
    map.canvas.setAttribute("aria-label", `${map.caption.textContent}: move the mark`);
    const head = `${title} (${stop} of ${stops.length - 1}): ${height} × ${width} cells`;
    facts.textContent = one
      ? `${head}, ${channels} channels. A cell stands for ${short(rows / height)} × ${short(cols / width)} pixels. ` +
        `Channel ${one.channel} reaches ${short(square(one.high))}; ${fixed(100 * (1 - one.zeros), 1)} % of its cells are not 0.`
      : stop ? `${head}. The class with the highest score in each pixel.` : `${head}, 3 colours.`;
    density.set(scene.maps.map((maps) => maps[rank] && 1 - maps[rank].zeros));
    density.rows.forEach((row, l) => (row.element.className = l === stop - 1 ? "first" : ""));
    if (answers) colours.hidden = stop < stops.length - 1;
    draw();
    point();
    announce(facts.textContent);
    report();
  }

  const report = () => tell({
    picture: scenes.indexOf(scene), stop, title: stops[stop].title, size: [map.rows, map.cols], cell: [cursor.row, cursor.col],
    ...(current() ? { channel: current().channel, value: square(rootAt(cursor.row * map.cols + cursor.col)), zeros: current().zeros, maximum: square(current().high) } : {}),
  });

  function look() {
    [place.y, place.x] = [(cursor.row + 0.5) / map.rows, (cursor.col + 0.5) / map.cols];
    place.seen = true;
    draw();
    report();
    return point();
  }

  for (const view of [image, map])
    for (const type of ["pointerdown", "pointermove"])
      view.canvas.addEventListener(type, (event) => (([cursor.row, cursor.col] = view.at(event)), look()));
  map.canvas.addEventListener("focus", look);
  steer(map, cursor, { moved: () => announce(look()), typed: (key) => (halt(), ("+=".includes(key) && go(stop + 1)) || ("-−".includes(key) && go(stop - 1))) });
  open(0);
  return element;
}

// ---- field lab: what one cell of a stack of layers sees (chapter 07) -------------------------------------------------

const LARGEST = 161; // pixels of a field that is drawn
const [CONV, POOL] = ["convolution", "pooling"];
const KERNELS = { [CONV]: [1, 2, 3, 5, 7], [POOL]: [2, 3] };
const [STRIDES, RATES] = [[1, 2], [1, 2, 3, 4, 5, 6, 8, 12, 16]];

/**
 * For every layer of a stack, along one axis: `extent`, what its kernel spans of the layer before; `step`, the pixels between
 * two taps; `counts`, the paths from each pixel of the field to one cell; `jump`, the pixels from one cell to the next.
 */
function fieldsOf(layers) {
  let [counts, jump] = [[1], 1];
  return layers.map(({ kernel, stride, rate }) => {
    const step = rate * jump;
    const wider = new Array(counts.length + step * (kernel - 1)).fill(0);
    for (let tap = 0; tap < kernel; tap++) counts.forEach((paths, i) => (wider[i + tap * step] += paths));
    counts = wider;
    jump *= stride;
    return { extent: rate * (kernel - 1) + 1, step, counts, jump, size: counts.length, used: counts.filter((paths) => paths).length ** 2 };
  });
}

/** The stack in Python. Padding keeps the size where it can and does not change the field. */
function codeOf(layers, { size, jump }) {
  let channels = 3;
  const lines = layers.map(({ kind, kernel, stride, rate }) => {
    const padding = kind === CONV ? Math.floor((rate * (kernel - 1)) / 2) : 0;
    const values = kind === CONV ? [channels, 8, kernel] : [kernel];
    if (kind === CONV) channels = 8;
    if (stride > 1 || kind === POOL) values.push(`stride=${stride}`);
    if (padding) values.push(`padding=${padding}`);
    if (rate > 1) values.push(`dilation=${rate}`);
    return `    nn.${kind === CONV ? "Conv2d" : "MaxPool2d"}(${values.join(", ")}),\n`;
  });
  const room = size > 2000 ? `, image_size=(${4 * size}, ${4 * size})` : "";
  return (
    `import segedu as sg\nfrom torch import nn\n\nstack = nn.Sequential(\n${lines.join("")})\n` +
    `print(sg.receptive_field(stack, "${layers.length - 1}"${room}))\n# size ${size}, stride ${jump}\n`
  );
}

const divisor = (a, b) => (b ? divisor(b, a % b) : a);
const nByN = (n) => `${n} × ${n}`;

function fieldLab(state, tell) {
  const cursor = { row: 0, col: 0, seen: false };
  let layers, chosen, fields;

  const view = picture("", 1, 1, 644, { class: "probe", role: "application", tabindex: "0", "aria-describedby": "keys" });
  const stacks = presets("Stacks", state.presets.map((preset) => preset.name), (i) => open(i));
  const which = choice("Layer", state.names.map((text) => ({ text })), (i) => ((chosen = i), update()));
  const set = (key, values) => (i) => ((layers[chosen][key] = values[i]), update());
  const knob = (label, key, values) => choice(label, values.map((text) => ({ text })), set(key, values));
  const kinds = choice("Kind", [{ text: CONV }, { text: POOL }], (i) => {
    const layer = layers[chosen];
    layer.kind = [CONV, POOL][i];
    if (!KERNELS[layer.kind].includes(layer.kernel)) layer.kernel = 2;
    update();
  });
  const sizes = { [CONV]: knob("Kernel", "kernel", KERNELS[CONV]), [POOL]: knob("Window", "kernel", KERNELS[POOL]) };
  const [strides, rates] = [knob("Stride", "stride", STRIDES), knob("Rate", "rate", RATES)];
  const add = h("button", { type: "button", click: () => (layers.push({ kind: CONV, kernel: 3, stride: 1, rate: 1 }), last()) }, "Add a layer");
  const remove = h("button", { type: "button", click: () => (layers.pop(), last()) }, "Remove the last");
  const table = h("table", { class: "numbers stack" });
  const [note, refusal, row, where] = [h("p", { class: "note" }), h("p"), h("p"), h("p", { class: "note below" })];
  const code = h("textarea", { readonly: true, spellcheck: "false", "aria-label": "The same stack as code" });
  const copied = h("span", { role: "status" });
  const copy = h("button", { type: "button", click: () => {
    code.select();
    copied.textContent = document.execCommand("copy") ? "Copied." : "Selected: copy it with Ctrl+C.";
  } }, "Copy");

  const { element, announce } = frame(
    state.title, state.lead, stacks.element,
    h("div", { class: "columns" },
      h("div", { class: "knobs" }, which.element, h("div", { class: "row" }, add, remove),
        ...[kinds, sizes[CONV], sizes[POOL], strides, rates].map((control) => control.element)),
      table),
    note,
    h("div", { class: "columns" },
      h("div", {}, view.element, refusal, where),
      h("div", {}, row, h("details", {}, h("summary", {}, "The same stack as code"), code, h("div", { class: "row" }, copy, copied)))),
    h("p", { class: "hint", id: "keys" },
      "Point at a pixel to count its paths. Keys in the picture: arrows move, with shift 4 pixels. The more paths, the darker (by the root of their number); " +
      "holes are striped. Rows and columns are counted from 0. The theory counts paths; how much each one weighs is up to the trained weights."),
  );

  function open(i) {
    layers = state.presets[i].layers.map((layer) => ({ ...layer }));
    cursor.seen = false;
    last();
  }

  function last() {
    chosen = layers.length - 1;
    update();
  }

  function update() {
    const { kind, kernel, stride, rate } = layers[chosen];
    fields = fieldsOf(layers);
    const { size, used } = fields[chosen];
    stacks.press(state.presets.findIndex((preset) => preset.layers.length === layers.length &&
      preset.layers.every((layer, i) => Object.keys(layer).every((key) => layer[key] === layers[i][key]))));
    which.limit(layers.length);
    which.pick(chosen);
    kinds.pick([CONV, POOL].indexOf(kind));
    for (const one of [CONV, POOL]) sizes[one].element.hidden = one !== kind;
    sizes[kind].pick(KERNELS[kind].indexOf(kernel));
    strides.pick(STRIDES.indexOf(stride));
    rates.pick(RATES.indexOf(rate));
    add.disabled = layers.length === state.names.length;
    remove.disabled = layers.length === 1;
    list();
    note.textContent = `${chosen === layers.length - 1 ? "The last layer" : `Layer ${chosen + 1}`} sees ${nByN(size)} pixels; ${used} of ${size ** 2} are used, ${holes()}`;
    refusal.hidden = size <= LARGEST;
    view.element.hidden = size > LARGEST;
    refusal.textContent = `Not drawn: ${nByN(size)} pixels are too many to tell apart here, ${nByN(LARGEST)} are the most. The numbers still hold.`;
    const { counts } = fields[chosen];
    row.textContent = `Paths along one row: ${counts.slice(0, 31).join(" ")}${size > 31 ? ` … (${size} numbers, the same backwards)` : ""}. A pixel has the number of its row times that of its column.`;
    code.value = codeOf(layers, fields[layers.length - 1]);
    code.rows = layers.length + 8;
    copied.textContent = "";
    view.caption.textContent = `What one cell of layer ${chosen + 1} sees, ${nByN(size)}`;
    view.canvas.setAttribute("aria-label", `Paths from each pixel to one cell of layer ${chosen + 1}`);
    divide(view, Math.min(size, LARGEST), Math.min(size, LARGEST));
    if (!cursor.seen) cursor.row = cursor.col = size >> 1;
    Object.assign(cursor, { row: clamp(cursor.row, view.rows), col: clamp(cursor.col, view.cols) });
    look();
    announce(refusal.hidden ? note.textContent : `${note.textContent} ${refusal.textContent}`);
  }

  function holes() {
    const { size, used } = fields[chosen];
    if (used === size ** 2) return "there are no holes.";
    const steps = fields.slice(0, chosen + 1).flatMap(({ step }, i) => (layers[i].kernel > 1 ? [step] : []));
    const common = steps.reduce(divisor);
    return `${size ** 2 - used} are holes. ` + (common > 1
      ? `All taps lie multiples of ${common} pixels apart, so paths reach only one row and one column in ${common}.`
      : "Some taps are so far apart that the other layers do not fill the gaps.");
  }

  function list() {
    const head = ["layer", "extent", "field", "stride", "used"].map((text) => h("th", { scope: "col" }, text));
    const lines = layers.map(({ kind, kernel, stride, rate }, i) => {
      const name = `${i + 1}. ${kind === CONV ? "conv" : "pool"} ${nByN(kernel)}${rate > 1 ? `, rate ${rate}` : ""}${stride > 1 ? `, stride ${stride}` : ""}`;
      const { extent, size, jump, used } = fields[i];
      const cells = [extent, size, jump, `${used} of ${size ** 2}`].map((text) => h("td", {}, String(text)));
      return h("tr", { "aria-current": i === chosen ? "true" : null }, h("th", { scope: "row" }, name), ...cells);
    });
    table.replaceChildren(h("caption", {}, "Extent of each kernel, field and stride of its cells, pixels used"), h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...lines));
  }

  /** Draws the field, marks the pixel and says what leads to it. */
  function look() {
    const { counts, size } = fields[chosen];
    const paths = counts[cursor.row] * counts[cursor.col];
    const drawn = size <= LARGEST;
    if (drawn) {
      const values = counts.flatMap((down) => counts.map((across) => down * across));
      const top = Math.max(...counts) ** 2;
      const colourOf = (i) => (values[i] ? heat(0.15 + 0.85 * Math.sqrt(values[i] / top), 1) : VOID);
      if (size <= 15) write(view, values, { colourOf });
      else fill(view, colourOf);
      if (cursor.seen) mark(view, cursor.row, cursor.col, view.cell < 8 ? 3 : 1);
    }
    where.textContent = !drawn ? "" : `Row ${cursor.row}, column ${cursor.col}: ${paths ? `${paths} ${paths > 1 ? "paths" : "path"}, ${counts[cursor.row]} × ${counts[cursor.col]}` : "no path, a hole"}.`;
    const of = (key) => fields.map((field) => field[key]);
    tell({
      layers: layers.map((layer) => ({ ...layer })), chosen, extents: of("extent"), fields: of("size"), jumps: of("jump"), used: of("used"),
      total: of("size").map((n) => n ** 2), counts, drawn, cell: [cursor.row, cursor.col], paths,
    });
    return where.textContent;
  }

  const seen = (is) => ((cursor.seen = is), look());
  for (const type of ["pointerdown", "pointermove"])
    view.canvas.addEventListener(type, (event) => (([cursor.row, cursor.col] = view.at(event)), seen(true)));
  view.canvas.addEventListener("focus", () => seen(true));
  steer(view, cursor, { moved: () => announce(seen(true)) });
  open(0);
  return element;
}

// ---- CRF playground: exact mean field of a small photo (chapter 08) --------------------------------------------------

const MOST_STEPS = 20;
const minus = (value, digits) => fixed(value, digits).replace("-", "−");

const gaussian = (length, deviation) => Float64Array.from({ length }, (_, d) => Math.exp(-((d / deviation) ** 2) / 2));

/** Colour and place, all pairs of pixels: k as in segedu.crf.exact.kernel before its rows and columns are multiplied by `scale`; `all`, the sums of its rows after. */
function pairs({ rows, cols }, rgb, sxy, srgb) {
  const n = rows * cols;
  const [k, scale, all] = [new Float32Array(n * n), new Float64Array(n), new Float64Array(n)];
  const [place, colour] = [gaussian(Math.max(rows, cols), sxy), gaussian(256, srgb)]; // the exponential of a sum is a product
  for (let i = 0, e = 0; i < n; i++) {
    const [y, x, r, g, b] = [Math.floor(i / cols), i % cols, rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2]];
    let sum = 0;
    for (let row = 0, j = 0; row < rows; row++) {
      const down = place[Math.abs(row - y)];
      for (let col = 0; col < cols; col++, e++, j += 3) {
        k[e] = down * place[Math.abs(col - x)] * colour[Math.abs(rgb[j] - r)] * colour[Math.abs(rgb[j + 1] - g)] * colour[Math.abs(rgb[j + 2] - b)];
        sum += k[e];
      }
    }
    scale[i] = 1 / Math.sqrt(sum);
  }
  for (let i = 0, e = 0; i < n; i++) {
    let sum = 0;
    for (let j = 0; j < n; j++, e++) sum += k[e] * scale[j];
    all[i] = scale[i] * sum;
  }
  return { k, scale, all };
}

/** Place alone is a product of one kernel for the rows and one for the columns: this one, n x n, normalised. */
function axis(n, deviation) {
  const near = gaussian(n, deviation);
  const k = Float64Array.from({ length: n * n }, (_, e) => near[Math.abs(Math.floor(e / n) - (e % n))]);
  const root = near.map((_, i) => Math.sqrt(k.subarray(i * n, i * n + n).reduce((a, b) => a + b)));
  return k.map((value, e) => value / root[Math.floor(e / n)] / root[e % n]);
}

/** Messages by colour and place: every pixel of q (3 classes x pixels) sends to every pixel. A phone has 0.3 s for ten of these. */
function sendByColour({ k, scale, all }, q) {
  const n = scale.length;
  const [first, second] = [0, n].map((c) => scale.map((value, j) => value * q[c + j]));
  const messages = new Float64Array(3 * n);
  for (let i = 0, e = 0; i < n; i++) {
    let [a, b] = [0, 0];
    for (let j = 0; j < n; j++, e++) {
      a += k[e] * first[j];
      b += k[e] * second[j];
    }
    messages[i] = a * scale[i];
    messages[n + i] = b * scale[i];
    messages[2 * n + i] = all[i] - (a + b) * scale[i]; // the three are shares of 1
  }
  return messages;
}

/** Messages by place alone: along the rows, then along the columns. */
function sendByPlace({ down, across }, q, rows, cols) {
  const along = (from, kernel, n, stride) => from.map((_, e) => {
    const i = Math.floor(e / stride) % n;
    let sum = 0;
    for (let j = 0; j < n; j++) sum += kernel[i * n + j] * from[e + (j - i) * stride];
    return sum;
  });
  return along(along(q, across, cols, 1), down, rows, cols);
}

function softmax(scores) {
  const top = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}

/** A line between cells of different labels. */
function trace({ context, rows, cols, cell }, labels) {
  context.beginPath();
  for (let i = 0; i < rows * cols; i++) {
    const [x, y] = [i % cols, Math.floor(i / cols)];
    if (x && labels[i] !== labels[i - 1]) (context.moveTo(x * cell, y * cell), context.lineTo(x * cell, (y + 1) * cell));
    if (y && labels[i] !== labels[i - cols]) (context.moveTo(x * cell, y * cell), context.lineTo((x + 1) * cell, y * cell));
  }
  for (const [colour, line] of [["#000", 4], ["#fff", 1.5]]) {
    context.strokeStyle = colour;
    context.lineWidth = line;
    context.stroke();
  }
}

function crfPlayground(state, tell) {
  const { rows, cols, classes, palette, p } = state;
  const [n, k] = [rows * cols, classes.length];
  const rgb = Uint8Array.from(atob(state.photo), (character) => character.charCodeAt(0));
  const [network, target] = [unpack(state.network), unpack(state.target)];
  const score = (i, c) => Math.log(network[i] === c ? p : (1 - p) / (k - 1)); // minus the unary
  const colourOf = (i) => [...rgb.subarray(3 * i, 3 * i + 3)];
  const blend = (a, b, share) => a.map((value, c) => Math.round(value + (b[c] - value) * share));
  const paper = (i) => new Array(3).fill(90 + 0.6 * colourOf(i).reduce((a, b) => a + b) / 3); // a pale grey print
  const cursor = { row: state.pixel[0], col: state.pixel[1] };
  let [set, view, known] = [{}, 0, {}];
  let colour, place; // the kernels
  let q, arrived, arriving, labels, trail, told; // `arrived`: the messages that made q; `arriving`: those of q, for the next step

  const photo = picture("Photo", rows, cols, 10, { class: "probe", role: "img", "aria-label": `Photo: ${state.alt}` });
  const answer = picture("Labels", rows, cols, 10, { class: "probe", role: "img" });
  const third = picture("", rows, cols, 10, { class: "probe", role: "application", tabindex: "0", "aria-describedby": "keys" });
  const starts = presets("Settings, 10 steps each", state.presets.map(({ name }) => name), (i) => open(i));
  const button = (text, act) => h("button", { type: "button", click: act }, text);
  const step = button("Step", () => go(trail.length));
  const steps = button("10 steps", () => go(trail.length + 9));
  const restart = button("Restart", () => go(0));
  const knob = (key, label, min, max, by, unit = "") =>
    [key, slider(`${key}: ${label}`, { min, max, step: by, value: min, text: (value) => short(value) + unit }, (value) => ((set[key] = value), go(trail.length - 1)))];
  const knobs = Object.fromEntries([
    knob("w", "weight of colour and place", 0, 15, 0.5),
    knob("sxy", "its range in place (θα)", 1, 30, 1, " px"),
    knob("srgb", "its range in colour (θβ)", 5, 200, 5, " of 255"),
    knob("w_smooth", "weight of place alone", 0, 15, 0.5),
    knob("sxy_smooth", "its range (θγ)", 0.5, 12, 0.5, " px"),
  ]);
  const views = choice("Third picture", ["messages", ...classes.map((name) => `Q of ${name}`)].map((text) => ({ text })), (i) => ((view = i), look()));
  const [status, note, where] = [h("p"), h("p", { class: "note" }), h("p", { class: "note" })];
  const [pixel, course] = [h("table", { class: "numbers stack" }), h("table", { class: "numbers meters" })];

  const { element, announce } = frame(
    state.title, state.lead, starts.element, note,
    h("div", { class: "columns" },
      h("div", {}, knobs.w.element, knobs.sxy.element, knobs.srgb.element),
      h("div", {}, knobs.w_smooth.element, knobs.sxy_smooth.element, h("div", { class: "row" }, step, steps, restart))),
    status, views.element,
    h("div", { class: "pictures three" }, photo.element, answer.element, third.element),
    h("ul", { class: "legend", "aria-label": "Colours of the classes" }, ...classes.map((name, c) => h("li", {}, swatch(palette[c]), " ", name))),
    where, h("div", { class: "columns large-small" }, pixel, h("div", {}, course)),
    h("p", { class: "hint", id: "keys" }, "Point at a picture to choose a pixel. Keys in the third picture: arrows move, with shift 4 pixels; + takes a step. The redder a pixel, the more it weighs (by the root). ", state.hint),
  );

  function open(i, count = 10) {
    set = { ...state.presets[i].set };
    for (const key in knobs) knobs[key].set(set[key]);
    go(count);
  }

  /** Sets up what has changed, then takes the steps from the start. */
  function go(count) {
    const changed = (...keys) => keys.some((key) => set[key] !== known[key]);
    const fresh = changed(...Object.keys(set));
    if (changed("sxy", "srgb")) colour = pairs(state, rgb, set.sxy, set.srgb);
    if (changed("sxy_smooth")) place = { down: axis(rows, set.sxy_smooth), across: axis(cols, set.sxy_smooth) };
    known = { ...set };
    if (fresh || count < trail.length) [trail, arriving] = [[], null];
    while (trail.length <= Math.min(count, MOST_STEPS)) update();
    told = Array.from(q, (value) => +value.toFixed(6));
    const which = state.presets.findIndex((preset) => Object.keys(set).every((key) => preset.set[key] === set[key]));
    starts.press(which);
    note.textContent = which < 0 ? "Settings of your own." : state.presets[which].note;
    for (const one of [step, steps]) one.disabled = trail.length > MOST_STEPS;
    restart.disabled = trail.length === 1;
    tabulate();
    look();
    announce(status.textContent);
  }

  /** What pixel i hears of class c, both kernels weighted: with Potts, less all other classes is the same as plus the own. */
  const heard = ({ colour, place }, e) => set.w * colour[e] + set.w_smooth * place[e];

  /** One step of mean field; the first is softmax(-unary). */
  function update() {
    const [past, first] = [labels, !arriving];
    [q, labels, arrived] = [new Float64Array(k * n), new Uint8Array(n), arriving];
    for (let i = 0; i < n; i++) {
      const shares = softmax(classes.map((_, c) => score(i, c) + (first ? 0 : heard(arrived, c * n + i))));
      shares.forEach((share, c) => (q[c * n + i] = share));
      labels[i] = shares.indexOf(Math.max(...shares));
    }
    arriving = { colour: sendByColour(colour, q), place: sendByPlace(place, q, rows, cols) };
    let energy = 0;
    q.forEach((share, e) => (energy += share && share * (Math.log(share) - score(e % n, Math.floor(e / n)) - heard(arriving, e) / 2)));
    const count = (differ) => labels.reduce((sum, label, i) => sum + differ(label, i), 0);
    trail.push({ changed: first ? 0 : count((label, i) => label !== past[i]), wrong: count((label, i) => label !== target[i]), energy });
  }

  function tabulate() {
    const last = trail.length - 1;
    const { changed, wrong, energy } = trail[last];
    status.textContent = last
      ? `Step ${last}: ${changed} of ${n} pixels changed their label, ${wrong} are wrong. The free energy fell by ${fixed(trail[last - 1].energy - energy, 1)} to ${minus(energy, 1)}.`
      : `Step 0: what the network says, ${wrong} of ${n} pixels wrong. No message was sent yet.`;
    const [high, low] = [Math.max, Math.min].map((pick) => pick(...trail.map((one) => one.energy)));
    const lines = trail.map((one, t) => {
      const bar = h("i", { style: `width: ${100 * (high > low ? (one.energy - low) / (high - low) : 1)}%` });
      const cells = [t ? one.changed : "–", one.wrong, minus(one.energy, 1)].map((text) => h("td", {}, String(text)));
      return h("tr", {}, h("th", { scope: "row" }, String(t)), ...cells, h("td", { class: "bar", "aria-hidden": "true" }, h("span", { class: "track" }, bar)));
    });
    const head = ["step", "changed", "wrong", "free energy", ""].map((text) => h(text ? "th" : "td", text ? { scope: "col" } : {}, text));
    course.replaceChildren(h("caption", {}, "Labels that changed, wrong labels"), h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...lines.slice(-11)));
  }

  /** Draws the pictures and does the five steps at the pixel once more, in numbers. */
  function look() {
    const at = cursor.row * cols + cursor.col;
    const [across, down] = [(i) => place.across[cursor.col * cols + (i % cols)], (i) => place.down[cursor.row * rows + Math.floor(i / cols)]];
    const sent = Float64Array.from(labels, (_, i) =>
      set.w * colour.k[at * n + i] * colour.scale[at] * colour.scale[i] + set.w_smooth * across(i) * down(i));
    const ranked = sent.slice().sort().reverse();
    fill(photo, colourOf);
    fill(answer, (i) => blend(paper(i), palette[labels[i]], 0.65));
    fill(third, (i) => (view ? heat(q[(view - 1) * n + i], 1) : blend(paper(i), [190, 60, 0], Math.sqrt(Math.min(1, sent[i] / (ranked[9] || 1))))));
    for (const one of [answer, third]) trace(one, target);
    for (const one of [photo, answer, third]) mark(one, cursor.row, cursor.col, 3);
    const t = trail.length - 1;
    const name = `(${cursor.row}, ${cursor.col})`;
    answer.caption.textContent = t ? `Labels after step ${t}` : "Labels of the network";
    answer.canvas.setAttribute("aria-label", `${answer.caption.textContent}: ${trail[t].wrong} of ${n} pixels wrong`);
    third.caption.textContent = view ? `Q of ${classes[view - 1]}` : `Messages to ${name}`;
    third.canvas.setAttribute("aria-label", `${third.caption.textContent}: move the pixel`);

    const unary = classes.map((_, c) => score(at, c));
    const part = (messages, weight = 1) => arrived && classes.map((_, c) => weight * messages[c * n + at]);
    const [byColour, byPlace] = [part(arrived?.colour, set.w), part(arrived?.place, set.w_smooth)];
    const all = byColour?.reduce((sum, value, c) => sum + value + byPlace[c], 0);
    const penalty = byColour?.map((value, c) => value + byPlace[c] - all);
    const total = unary.map((value, c) => value + (penalty ? penalty[c] : 0));
    const shares = classes.map((_, c) => q[c * n + at]);
    const lines = [
      ["1 Message passing: Q of all pixels, by colour and place", part(arrived?.colour)], ["1 the same by place alone", part(arrived?.place)],
      [`2 Weighting: colour and place × ${short(set.w)}`, byColour], [`2 place alone × ${short(set.w_smooth)}`, byPlace],
      ["3 Compatibility (Potts): minus what the other classes got", penalty],
      ["4 Adding the unary: −U, the log of the network's p", unary], ["4 the sum of 3 and −U", total],
      ["5 Normalising: Q, softmax of the sum", shares],
    ].map(([text, values]) => h("tr", {}, h("th", { scope: "row" }, text), ...classes.map((_, c) => h("td", {}, values ? minus(values[c]) : "–"))));
    const head = [`step ${t}`, ...classes].map((text) => h("th", { scope: "col" }, text));
    pixel.replaceChildren(h("caption", {}, `The five steps at ${name}`), h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...lines));

    let [weight, same, half, most] = [0, 0, 0, 0];
    sent.forEach((value, j) => ((weight += value), (same += value * (target[j] === target[at]))));
    for (const value of ranked) if (half < weight / 2) ((half += value), most++);
    where.textContent = `Row ${cursor.row}, column ${cursor.col} is ${classes[target[at]]} and labelled ${classes[labels[at]]}. ` + (weight
      ? `Half of the weight of its messages comes from ${most} ${most > 1 ? "pixels" : "pixel"}. ${fixed((100 * same) / weight, 0)}\u00a0% comes from pixels that are ${classes[target[at]]} too.`
      : "Both weights are 0: it hears nobody.");
    tell({ ...set, steps: t, q: told, trail, cell: [cursor.row, cursor.col], unary, colour: byColour, place: byPlace, most, same: same / weight || 0, weight });
    return where.textContent;
  }

  for (const one of [photo, answer, third])
    for (const type of ["pointerdown", "pointermove"])
      one.canvas.addEventListener(type, (event) => (([cursor.row, cursor.col] = one.at(event)), look()));
  steer(third, cursor, { moved: () => announce(look()), typed: (key) => "+=".includes(key) && (go(trail.length), true) });
  open(0, 0);
  return element;
}

// ---- ASPP lab: which taps of dilated kernels lie on the map (chapters 09, 10) ----------------------------------------

const TAPS = [9, 6, 4, 3, 2, 1]; // so many of nine can lie on a map; 3 only where it is not square
const WIDEST = 72;

/** Along an axis of n cells, at each: how many of three taps, `rate` apart, lie on it. */
const onAxis = (rate, n) => Array.from({ length: n }, (_, i) => 1 + (i >= rate) + (i + rate < n));

/** As segedu.models.deeplab_v3.valid_weights, row by row. */
function validTaps(rate, { rows, cols }) {
  const across = onAxis(rate, cols);
  return onAxis(rate, rows).flatMap((down) => across.map((count) => down * count));
}

/** The field of a cell of DeepLab v3's ResNet-101, along its longest path: a stage's first 3 x 3 keeps the rate before, multi-grid 1, 2, 4 in the last. */
function trunkField(stride) {
  const conv = (stride, rate, kernel = 3) => ({ kernel, stride, rate });
  const stage = (units, stride, rate) => [conv(stride, 1), ...new Array(units - 1).fill(conv(1, rate))];
  const last = [1, 2, 4].map((grid) => conv(1, (grid * 32) / stride));
  return fieldsOf([conv(2, 1, 7), conv(2, 1), ...stage(3, 1, 1), ...stage(4, 2, 1), ...stage(23, stride / 8, 16 / stride), ...last]).at(-1).size;
}

function asppLab(state, tell) {
  const { palette, colours } = state;
  const cursor = { row: state.cell[0], col: state.cell[1] };
  let map = state.maps[state.map];
  let rates, one, pooling, chosen; // the branches: 3 x 3 of these rates, 1 x 1, image pooling; which rate is looked at
  let curve, kinds, trunk; // of the map: cells by valid taps (as TAPS) for each rate, the counts that occur, field of the net before

  const reach = picture("", 1, 1, 660, { class: "probe", role: "img" });
  const counts = picture("", 1, 1, 660, { class: "probe", role: "application", tabindex: "0", "aria-describedby": "keys" });
  const chart = picture(`Cells by valid taps at rates 1 to ${WIDEST} (height: all cells)`, 22, WIDEST, 10, { class: "probe", role: "img" });
  const maps = choice("Map", state.maps, (i) => (measure(i), update()));
  const sets = presets("Branches", state.presets.map(({ name }) => name), (i) => open(i));
  const which = choice("Branch", colours.map((colour, i) => ({ text: String(i + 1), colour })), (i) => ((chosen = i), update()));
  const rate = slider("Rate of this branch", { min: 1, max: WIDEST, step: 1, value: 1, text: (value) => `${value} ${value > 1 ? "cells" : "cell"}` }, (value) => turn(value));
  const single = toggle("1 × 1", false, (on) => ((one = on), update()));
  const whole = toggle("Image pooling", false, (on) => ((pooling = on), update()));
  const [note, status, where, trunkNote] = [h("p", { class: "note" }), h("p", { class: "note" }), h("p", { class: "note" }), h("span")];
  const [fields, shares] = [h("table", { class: "numbers stack" }), h("table", { class: "numbers stack" })];
  const key = h("ul", { class: "legend", "aria-label": "Colours of the counts" });
  const ticks = [18, 36, 54, 72].map((tick) => h("span", { style: "flex: 1; text-align: right" }, String(tick)));

  const { element, announce } = frame(
    state.title, state.lead, maps.element, sets.element, note,
    h("div", { class: "row wide" }, which.element, single, whole), rate.element, status,
    h("div", { class: "columns" }, reach.element, counts.element), key, where,
    h("div", { class: "columns" }, h("div", {}, fields), h("div", {}, shares)),
    h("div", { style: "margin-top: 0.9rem" }, chart.element, h("div", { "aria-hidden": "true", style: "display: flex" }, ...ticks)),
    h("p", { class: "hint", id: "keys" },
      "Point at a picture to choose a cell. Keys in the map of valid taps: arrows move, with shift 4 cells; + and − change the rate. Press on the curve to take its rate. " +
      "In the curve the frames are the rates above, the black line is the mean share of valid taps. Rows and columns are counted from 0. ", trunkNote),
  );

  function open(i) {
    ({ one, pooling } = state.presets[i]);
    rates = [...state.presets[i].rates];
    chosen = rates.length - 1;
    update();
  }

  function turn(to) {
    rates[chosen] = Math.min(WIDEST, Math.max(1, to));
    update();
    return true;
  }

  /** Takes a map, and the cell at the same place of it. */
  function measure(i) {
    const { rows, cols } = map;
    map = state.maps[i];
    Object.assign(cursor, { row: Math.floor(((cursor.row + 0.5) / rows) * map.rows), col: Math.floor(((cursor.col + 0.5) / cols) * map.cols) });
    curve = Array.from({ length: WIDEST }, (_, i) => {
      const valid = validTaps(i + 1, map);
      return TAPS.map((n) => valid.filter((count) => count === n).length);
    });
    kinds = TAPS.filter((_, k) => curve.some((cells) => cells[k]));
    trunk = trunkField(map.stride);
  }

  const share = (rate, k) => curve[rate - 1][k] / (map.rows * map.cols);
  const mean = (rate) => TAPS.reduce((sum, n, k) => sum + n * share(rate, k), 0);
  /** Rows and columns of the kernel that ever meet the map. */
  const left = (rate) => [map.rows, map.cols].map((n) => (rate < n ? 3 : 1));
  const both = ([down, across], text = String) => (down === across ? text(down) : `${text(down)} × ${text(across)}`);
  const field = (rate) => left(rate).map((taps) => (taps - 1) * rate + 1);
  const pixels = (field) => field.map((cells) => trunk + (cells - 1) * map.stride);

  /** What the rate that is looked at does on this map, and which branches are a 1 x 1 on it. */
  function words() {
    const { rows, cols } = map;
    const now = rates[chosen];
    const dead = rates.filter((rate) => Math.max(...left(rate)) === 1);
    const several = dead.length > 1;
    const padded = "lie in the padding at every cell";
    const degenerate = !dead.length ? "" : `${several ? `Rates ${dead.slice(0, -1).join(", ")} and ${dead.at(-1)} are` : `Rate ${dead[0]} is`} not below the ` +
      `sides of this map, ${both([rows, cols])} cells: all eight outer taps ${padded}. ${several ? "These branches have become 1 × 1 convolutions." : "This branch has become a 1 × 1 convolution."}`;
    if (dead.includes(now)) return degenerate;
    const full = curve[now - 1][0];
    const here = now >= rows ? `not below the map's ${rows} rows: the taps above and below ${padded}. This branch has become a 1 × 3 convolution`
      : `${full || "no"} ${full > 1 ? "cells" : "cell"} of ${rows * cols} ${full > 1 ? "have" : "has"} all nine taps on the map`;
    return `Rate ${now}${now >= rows ? " is" : ":"} ${here}. ${degenerate}`;
  }

  function update() {
    const { rows, cols } = map;
    const is = state.presets.findIndex((preset) => preset.one === one && preset.pooling === pooling && String(preset.rates) === String(rates));
    maps.pick(state.maps.indexOf(map));
    sets.press(is);
    const preset = state.presets[is];
    note.textContent = !preset ? "Branches of your own." : preset.note + (preset.stride === map.stride ? "" : ` The map chosen above has stride ${map.stride}.`);
    which.limit(rates.length);
    which.pick(chosen);
    [single.firstChild.checked, whole.firstChild.checked] = [one, pooling];
    rate.set(rates[chosen]);
    status.textContent = words();
    trunkNote.textContent = `Fields in pixels are those behind DeepLab v3's ResNet-101 at stride ${map.stride}, added up layer by layer; one cell of it sees ${trunk} itself.`;
    counts.caption.textContent = `Valid taps, rate ${rates[chosen]}`;
    key.replaceChildren(...kinds.map((n) => h("li", {}, swatch(palette[TAPS.indexOf(n)]), ` ${n} ${n > 1 ? "taps" : "tap"}`)));
    counts.canvas.height = Math.round((counts.canvas.width * rows) / cols);
    divide(counts, rows, cols);
    const percent = (value) => (value === 0 ? "–" : value < 0.001 ? "< 0.1" : fixed(100 * value, 1));
    const line = (name, cells, i) => h("tr", { "aria-current": i === chosen ? "true" : null }, h("th", { scope: "row" }, ...name), ...cells.map((text) => h("td", {}, text)));
    const tabulate = (table, caption, names, lines) => table.replaceChildren(h("caption", {}, caption),
      h("thead", {}, h("tr", {}, ...names.map((text) => h("th", { scope: "col" }, text)))), h("tbody", {}, ...lines));
    tabulate(shares, "% of the cells by valid taps, and the mean", ["rate", ...kinds.map(String), "mean"], rates.map((rate, i) =>
      line([swatch(colours[i]), ` ${rate}`], [...kinds.map((n) => percent(share(rate, TAPS.indexOf(n)))), fixed(mean(rate), 2)], i)));
    tabulate(fields, "Each branch: what is left of it, and its field", ["branch", "acts as", "cells", "pixels"], [
      ...rates.map((rate, i) => line([swatch(colours[i]), ` 3 × 3, rate ${rate}`], [left(rate).join(" × "), both(field(rate)), both(pixels(field(rate)))], i)),
      ...(one ? [line(["1 × 1"], ["1 × 1", "1", String(trunk)])] : []),
      ...(pooling ? [line(["image pooling"], ["mean", both([rows, cols]), "all"])] : []),
    ]);
    plot();
    announce(`${status.textContent} ${look()}`);
  }

  /** The shares of all rates, stacked from nine taps up, and the mean. */
  function plot() {
    const { canvas, context, cell } = chart;
    curve.forEach((cells, r) => {
      let top = canvas.height;
      cells.forEach((_, k) => {
        const height = share(r + 1, k) * canvas.height;
        context.fillStyle = css(palette[k]);
        context.fillRect(r * cell, top - height, cell, height);
        top -= height;
      });
    });
    for (const [colour, line] of [["#fff", 6], ["#000", 2.5]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.beginPath();
      curve.forEach((_, r) => context.lineTo((r + 0.5) * cell, (1 - mean(r + 1) / 9) * canvas.height));
      context.stroke();
    }
    for (const rate of rates) outline({ canvas, context, rows: 1, cols: WIDEST }, 0, rate - 1, 1, 1);
    const spoken = rates.map((rate) => `rate ${rate}: mean ${fixed(mean(rate) / 9, 3)}`);
    canvas.setAttribute("aria-label", `Curve of the shares and of the mean share of valid taps; ${spoken.join(", ")}`);
  }

  /** Draws the taps at the cell and the map, and says how many are valid. */
  function look() {
    const { rows, cols } = map;
    const valid = validTaps(rates[chosen], map);
    fill(counts, (i) => palette[TAPS.indexOf(valid[i])]);
    mark(counts, cursor.row, cursor.col, counts.cell < 12 ? 3 : 1);
    const pad = Math.max(...rates);
    ground(pad);
    const taps = rates.map((rate, i) => {
      const found = [];
      for (const dy of [-rate, 0, rate]) for (const dx of [-rate, 0, rate]) {
        const [row, col] = [cursor.row + dy, cursor.col + dx];
        found.push({ row, col, valid: row >= 0 && row < rows && col >= 0 && col < cols });
      }
      stamp(found, pad, rate, colours[i]);
      return found;
    });
    const here = taps.map((found) => found.filter((tap) => tap.valid).length);
    const name = `row ${cursor.row}, column ${cursor.col}`;
    reach.caption.textContent = `Taps at ${name}, with the padding`;
    reach.canvas.setAttribute("aria-label", `Taps of ${rates.length > 1 ? `${rates.length} branches` : "the branch"} at ${name}; those in the padding are crossed out`);
    counts.canvas.setAttribute("aria-label", `${counts.caption.textContent}: move the cell`);
    where.textContent = `Taps on the map at ${name}: ${rates.map((rate, i) => `${here[i]}${i ? "" : " of 9"} at rate ${rate}`).join(", ")}.` +
      `${one ? " The 1 × 1 has its one." : ""}${pooling ? ` Image pooling takes all ${rows * cols} cells.` : ""}`;
    tell({
      map: [rows, cols], stride: map.stride, rates: [...rates], one, pooling, chosen, cell: [cursor.row, cursor.col], taps, here, counts: valid,
      curve, means: rates.map(mean), kernels: rates.map(left), fields: rates.map(field), pixels: rates.map((rate) => pixels(field(rate))), trunk,
    });
    return where.textContent;
  }

  /** The map, white, in its padding, striped. */
  function ground(pad) {
    const { rows, cols } = map;
    const { canvas, context } = reach;
    canvas.height = Math.round((canvas.width * (rows + 2 * pad)) / (cols + 2 * pad));
    divide(reach, rows + 2 * pad, cols + 2 * pad);
    const [{ width, height }, { cell }] = [canvas, reach];
    context.fillStyle = "#e9e9e9";
    context.fillRect(0, 0, width, height);
    context.strokeStyle = "#b5b5b5";
    context.lineWidth = 1.5;
    context.beginPath();
    for (let x = -height; x < width; x += 12) (context.moveTo(x, height), context.lineTo(x + height, 0));
    context.stroke();
    context.fillStyle = "#fff";
    context.fillRect(pad * cell, pad * cell, cols * cell, rows * cell);
    if (pooling) outline(reach, pad, pad, rows, cols);
  }

  /** A square of nine taps: dots on the map, crosses in the padding. The middle is that of all branches. */
  function stamp(taps, pad, rate, colour) {
    const { context, cell } = reach;
    const at = (i) => (pad + i + 0.5) * cell;
    const size = Math.min(13, 0.45 * cell * rate);
    context.strokeStyle = css(colour);
    context.lineWidth = 1.5;
    context.strokeRect(at(taps[0].col), at(taps[0].row), 2 * rate * cell, 2 * rate * cell);
    for (const { row, col, valid } of taps) {
      const [x, y, arm] = [at(col), at(row), 0.8 * size];
      context.fillStyle = row === cursor.row && col === cursor.col ? "#000" : css(colour);
      context.beginPath();
      if (valid) (context.arc(x, y, size, 0, 7), context.fill());
      else (context.moveTo(x - arm, y - arm), context.lineTo(x + arm, y + arm), context.moveTo(x + arm, y - arm), context.lineTo(x - arm, y + arm));
      for (const [ink, line] of valid ? [["#fff", 2]] : [["#fff", 8], [css(colour), 4]]) ((context.strokeStyle = ink), (context.lineWidth = line), context.stroke());
    }
  }

  const pressed = (event) => event.type === "pointerdown" || event.buttons;
  for (const type of ["pointerdown", "pointermove"]) {
    counts.canvas.addEventListener(type, (event) => (([cursor.row, cursor.col] = counts.at(event)), look()));
    reach.canvas.addEventListener(type, (event) => {
      const pad = Math.max(...rates);
      const [row, col] = reach.at(event);
      Object.assign(cursor, { row: clamp(row - pad, map.rows), col: clamp(col - pad, map.cols) });
      look();
    });
    chart.canvas.addEventListener(type, (event) => pressed(event) && turn(chart.at(event)[1] + 1));
  }
  steer(counts, cursor, { moved: () => announce(look()), typed: (key) => ("+=".includes(key) && turn(rates[chosen] + 1)) || ("-−".includes(key) && turn(rates[chosen] - 1)) });
  measure(state.map);
  open(state.set);
  return element;
}

// ---- pyramid lab: the bins of adaptive pooling, and what a cell is told of them (chapter 11) -------------------------

const [CHANNELS, MOST_BINS] = [2048, 8]; // channels of the map that PSPNet pools

/** Adaptive pooling along an axis of n cells, as torch cuts it: [first, last + 1] of each bin. Neighbours overlap where a border falls inside a cell. */
const cuts = (n, bins) => Array.from({ length: bins }, (_, i) => [Math.floor((i * n) / bins), Math.ceil(((i + 1) * n) / bins)]);

/** The means of rows x cols bins of one channel. */
function pooled(map, rows, cols) {
  const across = cuts(map.cols, cols);
  const values = cuts(map.rows, rows).flatMap(([top, bottom]) => across.map(([left, right]) => {
    let sum = 0;
    for (let row = top; row < bottom; row++) for (let col = left; col < right; col++) sum += map.values[row * map.cols + col];
    return sum / ((bottom - top) * (right - left));
  }));
  return { rows, cols, values };
}

/** A channel enlarged to height x width, bilinear, corner cells on corner cells (align_corners=True): its value at (row, col). */
function enlarged({ rows, cols, values }, height, width) {
  const place = (i, n, size) => (size > 1 ? (i * (n - 1)) / (size - 1) : 0);
  return (row, col) => {
    const [y, x] = [place(row, rows, height), place(col, cols, width)];
    const [top, left] = [Math.floor(y), Math.floor(x)];
    const [bottom, right] = [clamp(top + 1, rows), clamp(left + 1, cols)];
    const along = (row) => values[row * cols + left] + (x - left) * (values[row * cols + right] - values[row * cols + left]);
    return along(top) + (y - top) * (along(bottom) - along(top));
  };
}

function pyramidLab(state, tell) {
  const { rows, cols, left, names } = state;
  const scenes = state.scenes.map(({ rgb, labels }) => {
    const bytes = Uint8Array.from(atob(rgb), (character) => character.charCodeAt(0));
    const [r, g, b] = [0, 1, 2].map((c) => Float64Array.from({ length: rows * cols }, (_, i) => bytes[3 * i + c]));
    const [water, road] = [1, 2].map((label) => unpack(labels).map((value) => +(value === label)));
    return { bytes, channels: [[r, g, b], [r.map((value, i) => (value + g[i] + b[i]) / 3)], [b], [water], [road]] };
  });
  const views = [
    { text: "colour", digits: 0, unit: " of 255", colourOf: (value) => value.map(Math.round) },
    { text: "brightness", digits: 0, unit: " of 255", colourOf: ([value]) => new Array(3).fill(Math.round(value)) },
    { text: "blue", digits: 0, unit: " of 255", colourOf: ([value]) => heat(value, 255) },
    { text: "water (labels)", digits: 2, unit: "", colourOf: ([value]) => heat(value, 1) },
    { text: "road (labels)", digits: 2, unit: "", colourOf: ([value]) => heat(value, 1) },
  ];
  const cursor = { row: 0, col: 0 };
  let [map, scene, channel, levels, level] = [state.maps[state.map], 0, 0, [], 0]; // levels: bins a side, of each; level: the one drawn over the picture
  let maps, means; // of each scene: its channels as cells of the map, and of each level the channels as bins

  const photo = picture("", 1, 1, 660, { class: "probe", role: "application", tabindex: "0", "aria-describedby": "keys" });
  const cells = picture("", 1, 1, 660, { class: "probe", role: "img" });
  const panels = Array.from({ length: MOST_BINS }, () => [0, 1].map(() => picture("", 1, 1, 240, { role: "img" })));
  const pairs = panels.map(([blocks, smooth]) => h("div", {}, blocks.element, smooth.element));
  const sizes = choice("Map", state.maps, (i) => (measure(state.maps[i]), update()));
  const pictures = choice("Picture", names.map((text) => ({ text })), (i) => ((scene = i), update()));
  const kinds = choice("Channel", views, (i) => ((channel = i), measure(map), update()));
  const sets = presets("Pyramids", state.presets.map(({ name }) => name), (i) => open(i));
  const boxes = panels.map((_, i) => toggle(`${i + 1}`, false, (on) => switchLevel(i + 1, on)));
  const which = choice("Drawn over the picture", panels.map((_, i) => ({ text: nByN(i + 1) })), (i) => ((level = i + 1), update()));
  const [note, status, where, verdict] = [h("p", { class: "note" }), h("p"), h("p", { style: "margin-top: 0.6rem" }), h("p", { class: "note" })];
  const [lies, given] = [h("table", { class: "numbers stack" }), h("table", { class: "numbers stack" })];

  const { element, announce } = frame(
    state.title, state.lead, pictures.element, sizes.element, kinds.element, sets.element,
    h("fieldset", {}, h("legend", {}, "Levels, in bins a side"), h("div", { class: "row wide" }, ...boxes)), note,
    which.element, status,
    h("div", { class: "columns" }, photo.element, cells.element), where,
    h("p", { style: "font-weight: 600; margin: 0" }, "The means of the bins, and the same enlarged to the size of the map"),
    h("div", { class: "levels" }, ...pairs),
    verdict, given, lies,
    h("p", { class: "hint", id: "keys" },
      "Point at a picture to choose a cell. Keys in the first picture: arrows move, with shift 4 cells; 1 to 8 choose the level that is drawn, of those that are on; space changes the picture. " +
      "Rows, columns and bins are counted from 0. The picture is divided evenly among the cells of the map; in the network a cell also sees far beyond its part. " +
      "Here a channel is a colour or what the labels say. PSPNet pools 2048 learned channels in the same way."),
  );

  function open(i) {
    levels = [...state.presets[i].bins];
    level = levels.at(-1);
    measure(map);
    update();
  }

  function switchLevel(n, on) {
    const now = levels.filter((one) => one !== n).concat(on ? [n] : []).sort((a, b) => a - b);
    if (now.length) levels = now;
    if (on || !levels.includes(level)) level = on ? n : levels.at(-1);
    measure(map);
    update();
    if (!now.length) note.textContent = "One level has to stay: without any, the head has the map alone.";
  }

  /** Takes a map and the cell at the same place of it; pools both pictures. A square map is of the square part of the picture. */
  function measure(to) {
    const [before, beside] = part(map);
    const [y, x] = [(cursor.row + 0.5) / map.rows, before + ((cursor.col + 0.5) / map.cols) * beside];
    map = to;
    const [from, width] = part(map);
    Object.assign(cursor, { row: Math.floor(y * map.rows), col: clamp(Math.floor(((x - from) / width) * map.cols), map.cols) });
    maps = scenes.map(({ channels }) => channels[channel].map((values) => {
      const cut = width === cols ? values : Float64Array.from({ length: rows * width }, (_, i) => values[Math.floor(i / width) * cols + from + (i % width)]);
      return pooled({ rows, cols: width, values: cut }, map.rows, map.cols);
    }));
    means = maps.map((channels) => levels.map((n) => channels.map((one) => pooled(one, n, n))));
  }

  /** First column and width of the part of the picture that a map is of. */
  const part = (map) => (map.rows === map.cols ? [left, rows] : [0, cols]);
  /** [first, last + 1] cells -> pixels of the picture. */
  const pixels = ([first, end], n, size) => [Math.floor((first * size) / n), Math.ceil((end * size) / n)];
  const range = ([first, end]) => (end - first > 1 ? `${first}–${end - 1}` : String(first));
  const box = (down, across) => `${range(down)} × ${range(across)}`;
  const text = (value) => h("span", {}, swatch(views[channel].colourOf(value)), ` ${value.map((one) => fixed(one, views[channel].digits)).join(" ")}`);
  const named = (n) => (n > 1 ? `${nByN(n)} bins` : "1 bin");
  const width = () => Math.floor(CHANNELS / levels.length);
  /** The numbers of the bins along an axis that a cell lies in: two where they overlap. */
  const inside = (i, n, bins) => cuts(n, bins).flatMap(([first, end], bin) => (first <= i && i < end ? [bin] : []));

  /** How an axis is cut, in words. */
  function sides(n, names) {
    const bins = cuts(n, level);
    if (n % level === 0) return `${n} ${names}: ${level} bins of ${n / level}, none overlap.`;
    const shared = bins.slice(1).flatMap(([first], i) => (first < bins[i][1] ? [first] : []));
    return `${n} ${names} do not divide by ${level}: the bins are ${bins.map(range).join(", ")}. In two bins: ${shared.join(", ")}.`;
  }

  function update() {
    const is = state.presets.findIndex(({ bins }) => String(bins) === String(levels));
    sets.press(is);
    sizes.pick(state.maps.indexOf(map));
    pictures.pick(scene);
    kinds.pick(channel);
    boxes.forEach((label, i) => (label.firstChild.checked = levels.includes(i + 1)));
    which.offer((i) => levels.includes(i + 1));
    which.pick(level - 1);
    const n = levels.length;
    const sum = CHANNELS + n * width();
    note.textContent = `${is < 0 ? "A pyramid of your own." : state.presets[is].note} Channels: ${CHANNELS} + ${n} × ${CHANNELS}/${n} = ` +
      `${CHANNELS} + ${n} × ${width()} = ${sum}${CHANNELS % n ? " (rounded down)" : ""}. Each level's own 1 × 1 convolution makes ${width()} channels of its ${CHANNELS}${n > 1 ? `; it multiplies nothing by 1/${n}` : ""}.`;
    status.textContent = level === 1 ? `1 bin: the whole map of ${map.rows} × ${map.cols} cells.`
      : `${named(level)}. ${map.rows === map.cols ? sides(map.rows, "rows and columns") : `${sides(map.rows, "rows")} ${sides(map.cols, "columns")}`}`;
    const [, across] = part(map);
    for (const view of [photo, cells]) {
      view.canvas.height = Math.round((view.canvas.width * rows) / across);
      divide(view, map.rows, map.cols);
    }
    photo.caption.textContent = `${names[scene]}, ${named(level)}`;
    cells.caption.textContent = `${views[channel].text}, as a map of ${map.rows} × ${map.cols}`;
    cells.canvas.setAttribute("aria-label", `Map of ${map.rows} by ${map.cols} cells: ${views[channel].text}, with the bins`);
    draw();
    announce(`${note.textContent} ${status.textContent} ${look()}`);
  }

  /** The means of every level, as blocks and enlarged. */
  function draw() {
    panels.forEach((pair, i) => {
      const at = levels.indexOf(i + 1);
      pairs[i].hidden = at < 0;
      if (at < 0) return;
      const own = means[scene][at];
      const whole = own.map((one) => enlarged(one, map.rows, map.cols));
      const shown = [
        [i + 1, i + 1, named(i + 1), (e) => own.map((one) => one.values[e])],
        [map.rows, map.cols, "enlarged", (e) => whole.map((at) => at(Math.floor(e / map.cols), e % map.cols))],
      ];
      shown.forEach(([down, across, title, valueOf], k) => {
        const view = pair[k];
        view.canvas.height = Math.round((view.canvas.width * rows) / part(map)[1]);
        divide(view, down, across);
        const colours = Array.from({ length: down * across }, (_, e) => views[channel].colourOf(valueOf(e)));
        view.paint = () => fill(view, (e) => colours[e]);
        view.caption.textContent = title;
        view.canvas.setAttribute("aria-label", `${views[channel].text}, means of ${named(i + 1)}${k ? ", enlarged" : ""}`);
      });
    });
  }

  /** Draws the bins of the level over a picture; what lies in two of them is pale. */
  function bars(view) {
    const { canvas, context } = view;
    const [down, across] = [cuts(map.rows, level), cuts(map.cols, level)];
    const [dy, dx] = [canvas.height / map.rows, canvas.width / map.cols];
    context.fillStyle = "rgb(255 255 255 / 0.35)";
    down.slice(1).forEach(([first], i) => context.fillRect(0, first * dy, canvas.width, (down[i][1] - first) * dy));
    across.slice(1).forEach(([first], i) => context.fillRect(first * dx, 0, (across[i][1] - first) * dx, canvas.height));
    for (const [colour, line] of [["#000", 3], ["#fff", 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      for (const [top, bottom] of down) for (const [from, to] of across) context.strokeRect(from * dx, top * dy, (to - from) * dx, (bottom - top) * dy);
    }
  }

  /** Draws the cell and its bins, and says what it is given. */
  function look() {
    const { row, col } = cursor;
    const [from, wide] = part(map);
    const found = levels.map((n) => ({ n, down: inside(row, map.rows, n), across: inside(col, map.cols, n) }));
    const here = found[levels.indexOf(level)];

    photo.rows = rows;
    photo.cols = wide;
    fill(photo, (i) => [...scenes[scene].bytes.subarray(3 * (Math.floor(i / wide) * cols + from + (i % wide))).subarray(0, 3)]);
    divide(photo, map.rows, map.cols);
    fill(cells, (i) => views[channel].colourOf(maps[scene].map((one) => one.values[i])));
    for (const view of [photo, cells]) {
      bars(view);
      for (const i of here.down) for (const j of here.across) {
        const [[top, bottom], [first, end]] = [cuts(map.rows, level)[i], cuts(map.cols, level)[j]];
        outline(view, top, first, bottom - top, end - first, [11, 5]);
      }
      mark(view, row, col, map.rows > 30 ? 3 : 1);
    }
    found.forEach(({ n, down, across }) => {
      const [blocks, smooth] = panels[n - 1];
      blocks.paint();
      smooth.paint();
      for (const i of down) for (const j of across) mark(blocks, i, j);
      mark(smooth, row, col, map.rows > 30 ? 3 : 1);
    });

    const line = (name, cells, current) => h("tr", { "aria-current": current ? "true" : null }, h("th", { scope: "row" }, name), ...cells.map((cell) => h("td", {}, cell)));
    const tabulate = (table, caption, heads, lines) => table.replaceChildren(h("caption", {}, caption),
      h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, ...lines));
    tabulate(lies, "The bins that the cell lies in", ["bin", "cells", "pixels", "mean"], found.flatMap(({ n, down, across }, at) =>
      down.flatMap((i) => across.map((j) => {
        const [a, b] = [cuts(map.rows, n)[i], cuts(map.cols, n)[j]];
        const mean = means[scene][at].map((one) => one.values[i * n + j]);
        return line(`(${i}, ${j}) of ${nByN(n)}`, [box(a, b), box(pixels(a, map.rows, map.height), pixels(b, map.cols, map.width)), text(mean)], n === level);
      }))));

    const values = scenes.map((_, s) => [
      maps[s].map((one) => one.values[row * map.cols + col]),
      ...means[s].map((channels) => channels.map((one) => enlarged(one, map.rows, map.cols)(row, col))),
    ]);
    const apart = values[0].map((value, k) => value.reduce((sum, one, c) => sum + Math.abs(one - values[1][k][c]), 0) / value.length);
    const sources = ["the cell itself", ...levels.map((n) => `from ${named(n)}`)];
    tabulate(given, "What the head is given at this cell", ["source", "channels", ...names, "apart"], sources.map((name, k) => line(name,
      [String(k ? width() : CHANNELS), ...values.map((of) => text(of[k])), fixed(apart[k], views[channel].digits)], k && levels[k - 1] === level)));

    where.textContent = `Row ${row}, column ${col} lies in ${here.down.length * here.across.length > 1 ? "bins" : "bin"} ` +
      `${here.down.flatMap((i) => here.across.map((j) => `(${i}, ${j})`)).join(", ")} of ${nByN(level)}.`;
    const digits = views[channel].digits;
    const most = apart.indexOf(Math.max(...apart.slice(1)), 1);
    const same = apart[0] < 1e-9 ? "the cell itself is the same: alone it cannot tell them apart" : `the cell itself is ${fixed(apart[0], digits)}${views[channel].unit} apart`;
    verdict.textContent = `In the two pictures ${same}. ` + (apart[most] < 0.5 * 10 ** -digits ? "No level differs either." :
      `Of the levels, ${named(levels[most - 1])} ${levels[most - 1] > 1 ? "are" : "is"} furthest apart: ${fixed(apart[most], digits)}${views[channel].unit}.`);
    photo.canvas.setAttribute("aria-label", `${names[scene]}: move the cell`);
    tell({
      map: [map.rows, map.cols], pixels: [map.height, map.width], scene, channel, levels: [...levels], level, cell: [row, col], width: width(), total: CHANNELS + levels.length * width(),
      bins: found.map(({ down, across }) => [down, across]), cuts: levels.map((n) => [cuts(map.rows, n), cuts(map.cols, n)]),
      means: means.map((of) => of.map((channels) => channels.map((one) => one.values))), values, apart,
    });
    return `${where.textContent} ${verdict.textContent}`;
  }

  for (const view of [photo, cells])
    for (const type of ["pointerdown", "pointermove"])
      view.canvas.addEventListener(type, (event) => (([cursor.row, cursor.col] = view.at(event)), look()));
  steer(photo, cursor, {
    moved: () => announce(look()),
    act: () => ((scene = 1 - scene), update()),
    typed: (key) => levels.includes(+key) && ((level = +key), update(), true),
  });
  [cursor.row, cursor.col] = state.cell;
  open(0);
  return element;
}

// ---- trellis: the paths of Auto-DeepLab's search, their probabilities, and other networks as paths (chapter 14) -------

const LEVELS = [4, 8, 16, 32]; // strides
const stride = (level) => `stride ${LEVELS[level]}`;
const thousands = (n) => n.toLocaleString("en-GB");

/** All edges of a trellis as {layer, from, to}, layer by layer: from a level after `layer` layers (0: the stem, at level 0) to one after the next. */
function edgesOf(layers) {
  const edges = [];
  for (let layer = 0; layer < layers; layer++)
    for (let from = 0; from <= Math.min(layer, LEVELS.length - 1); from++)
      for (const to of [from - 1, from, from + 1]) if (LEVELS[to]) edges.push({ layer, from, to });
  return edges;
}

/** What arrives at every node from the stem on: ahead[layer][level], when each edge passes on its `share` of what its node has. */
function flow(edges, layers, share) {
  const ahead = Array.from({ length: layers + 1 }, () => new Array(LEVELS.length).fill(0));
  ahead[0][0] = 1;
  for (const edge of edges) ahead[edge.layer + 1][edge.to] += ahead[edge.layer][edge.from] * share(edge);
  return ahead;
}

/** The path of the highest product of betas: the level after each layer (Viterbi). */
function likeliest(edges, layers, beta) {
  const best = Array.from({ length: layers + 1 }, () => new Array(LEVELS.length).fill(-1));
  const came = best.map((levels) => [...levels]);
  best[0][0] = 1;
  for (const edge of edges) {
    const product = best[edge.layer][edge.from] * beta(edge);
    if (product < best[edge.layer + 1][edge.to]) continue;
    best[edge.layer + 1][edge.to] = product;
    came[edge.layer + 1][edge.to] = edge.from;
  }
  const path = [best[layers].indexOf(Math.max(...best[layers]))];
  for (let layer = layers; layer > 1; layer--) path.unshift(came[layer][path[0]]);
  return path;
}

function trellis(state, tell) {
  const { layers, steps } = state;
  const bytes = new DataView(Uint8Array.from(atob(state.history), (character) => character.charCodeAt(0)).buffer);
  const data = Float64Array.from({ length: bytes.byteLength / 4 }, (_, i) => bytes.getFloat32(4 * i, true));
  const edges = edgesOf(layers);
  const [MOST, OWN] = [0, state.paths.length + 1];
  const names = ["Most probable", ...state.paths.map(({ name }) => name), "Your own"];
  const [left, top, right, bottom] = [150, 60, 60, 120];
  let moment = steps.length - 1;
  let shown = state.shown;
  let [own, refused, timer] = [[], "", null];
  let edge = edges.find(({ layer, from, to }) => layer === Math.min(2, layers - 1) && from === 0 && to === 1);

  const view = picture("", 10, layers, 10, { class: "probe", role: "application", tabindex: "0", "aria-describedby": "keys" });
  Object.assign(view.canvas, { width: 1300, height: 720 });
  const [dx, dy] = [(view.canvas.width - left - right) / layers, (view.canvas.height - top - bottom) / (LEVELS.length - 1)];
  const [x, y] = [(layer) => left + layer * dx, (level) => top + level * dy];
  const when = slider("Moment of the search", { min: 0, max: steps.length - 1, step: 1, value: moment, text: (i) => `step ${thousands(steps[i])} (${i + 1} of ${steps.length})` }, (i) => (halt(), go(i)));
  const play = h("button", { type: "button", hidden: matchMedia("(prefers-reduced-motion: reduce)").matches, click: () => (timer ? halt() : run()) }, "Play");
  const which = choice("Path", names.map((text) => ({ text })), (i) => ((shown = i), (refused = ""), update()));
  const anew = h("button", { type: "button", click: () => ((own = []), (shown = OWN), (refused = ""), update()) }, "Draw your own anew");
  const [note, refusal, where, lengths] = [h("p", { class: "note" }), h("p"), h("p", { class: "note", style: "margin-top: 0.6rem" }), h("p", { class: "below" })];
  const table = h("table", { class: "numbers stack" });
  const searched = h("div", {}, when.element, h("div", { class: "row" }, play));
  searched.hidden = steps.length < 2;

  const { element, announce } = frame(
    state.title, state.lead, searched, which.element, note, view.element, where,
    h("div", { class: "row" }, anew), refusal, table, lengths,
    h("p", { class: "hint", id: "keys" },
      "Blue: the steps, the wider the more probable. Orange: the path chosen above. Black dashes: the most probable path. Point at a step for its beta; press on a node to lead your own path there. " +
      "Keys in the picture: left and right change the layer, up and down the step; Enter takes that step; 1 to 4 lead your path on to stride 4, 8, 16 or 32, Backspace takes one back."),
  );

  const at = ({ layer, from, to }) => data[((moment * layers + layer) * LEVELS.length + from) * 3 + to - from + 1];
  const number = (path) => path.reduce((product, to, layer) => product * at({ layer, from: layer ? path[layer - 1] : 0, to }), 1);
  const counts = Array.from({ length: layers }, (_, i) => flow(edges, layers, () => 1)[i + 1].reduce((a, b) => a + b));
  const total = counts.at(-1);
  const after = (layer) => (layer ? `after layer ${layer}` : "of the stem");
  const spell = (path) => path.map((level) => LEVELS[level]).join(" ");
  const oneIn = (p) => (p >= 0.01 ? `${fixed(100 * p, 1)} %` : p ? `1 in ${thousands(Math.round(1 / p))}` : "never");
  const times = (p) => (p * total >= 100 ? thousands(Math.round(p * total)) : p && p * total < 0.01 ? "< 0.01" : fixed(p * total, 2));
  const pathOf = (i) => (i === MOST ? likeliest(edges, layers, at) : i === OWN ? own : state.paths[i - 1].levels);

  function go(i) {
    moment = i;
    when.set(i);
    update();
  }

  function run() {
    if (moment === steps.length - 1) go(0);
    play.textContent = "Pause";
    timer = setInterval(() => (go(moment + 1), moment === steps.length - 1 && halt()), Math.min(600, Math.max(100, 8000 / steps.length)));
  }

  function halt() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  /** Leads the own path to a level after so many layers, or says why not. `from` is where the step has to start, if that is given. */
  function lead(layer, to, from) {
    const before = layer > 1 ? own[layer - 2] : 0;
    refused = layer === 0 ? (to ? `Refused: every path starts at the stem, ${stride(0)}.` : "")
      : layer > layers ? `Your path is complete: ${layers} layers.`
      : layer > own.length + 1 ? `Refused: your path has ${own.length} ${own.length === 1 ? "layer" : "layers"}, so layer ${own.length + 1} is next.`
      : from !== undefined && from !== before ? `Refused: this step starts at ${stride(from)}, and your path is at ${stride(before)} ${after(layer - 1)}.`
      : Math.abs(to - before) > 1 ? `Refused: from ${stride(before)} to ${stride(to)} is more than one level. A step halves the resolution, keeps it or doubles it.` : "";
    shown = OWN;
    if (!refused) {
      own = layer ? [...own.slice(0, layer - 1), to] : [];
      if (layer) edge = edges.find((one) => one.layer === layer - 1 && one.from === before && one.to === to);
    }
    update();
    return true;
  }

  function update() {
    const path = pathOf(shown);
    which.pick(shown);
    const done = path.length === layers;
    const about = shown === MOST ? state.most : shown !== OWN ? state.paths[shown - 1].note
      : done ? "Your path." : `Your path has ${path.length} of ${layers} layers: press on a node of layer ${path.length + 1}, or 1 to 4 in the picture.`;
    note.textContent = `${about} ${path.length ? `Strides: ${spell(path)}. ${done ? "Its probability" : "Its probability so far"}: ${oneIn(number(path))}.` : ""}`;
    refusal.textContent = refused;
    refusal.hidden = !refused;
    view.caption.textContent = steps.length > 1 ? `Layers from left to right, at step ${thousands(steps[moment])}` : "Layers from left to right, strides downwards";
    view.canvas.setAttribute("aria-label", `Trellis of ${layers} layers and strides 4 to 32, path ${names[shown]}`);
    const head = ["path", "probability", "times the mean"].map((text) => h("th", { scope: "col" }, text));
    const rows = names.map((name, i) => {
      const levels = pathOf(i);
      const whole = levels.length === layers;
      const cells = whole ? [oneIn(number(levels)), times(number(levels))] : ["not complete", "–"];
      return h("tr", { "aria-current": i === shown ? "true" : null }, h("th", { scope: "row" }, name), ...cells.map((text) => h("td", {}, text)));
    });
    table.replaceChildren(h("caption", {}, `Probability of each path; the mean of all ${thousands(total)} is 1 in ${thousands(total)}`), h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...rows));
    lengths.textContent = `Paths by number of layers, 1 to ${layers}: ${counts.map(thousands).join("; ")}.`;
    announce(`${refused || note.textContent} ${look()}`);
  }

  /** Draws it and says what the chosen step is. */
  function look() {
    const { canvas, context } = view;
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const line = (colour, width, points, dash = []) => {
      Object.assign(context, { strokeStyle: colour, lineWidth: width, lineJoin: "round", lineCap: dash.length ? "butt" : "round" });
      context.setLineDash(dash);
      context.beginPath();
      points.forEach(([layer, level]) => context.lineTo(x(layer), y(level)));
      context.stroke();
      context.setLineDash([]);
    };
    const ends = ({ layer, from, to }) => [[layer, from], [layer + 1, to]];
    const walk = (path) => [[0, 0], ...path.map((level, i) => [i + 1, level])];
    for (const one of edges) line(`rgb(0 114 178 / ${0.12 + 0.88 * at(one)})`, 1.5 + 22 * at(one), ends(one));
    const path = pathOf(shown);
    line("rgb(213 94 0)", 9, walk(path));
    if (shown !== MOST) line("#000", 3.5, walk(pathOf(MOST)), [12, 12]);
    for (const [colour, width] of [["#000", 15], ["#fff", 9], ["#000", 4]]) line(colour, width, ends(edge));
    const onPath = (layer, level) => (layer ? path[layer - 1] === level : level === 0);
    const radius = Math.min(17, 0.3 * dx);
    for (let layer = 0; layer <= layers; layer++)
      for (let level = 0; level <= Math.min(layer, LEVELS.length - 1); level++) {
        context.beginPath();
        context.arc(x(layer), y(level), radius, 0, 7);
        context.fillStyle = onPath(layer, level) ? "rgb(213 94 0)" : "#fff";
        context.fill();
        Object.assign(context, { strokeStyle: "#000", lineWidth: 3 });
        context.stroke();
      }
    Object.assign(context, { fillStyle: "#000", font: "36px system-ui, sans-serif", textBaseline: "middle", textAlign: "right" });
    LEVELS.forEach((text, level) => context.fillText(text, left - 60, y(level)));
    context.textAlign = "center";
    for (let layer = 0; layer <= layers; layer++) context.fillText(layer || "stem", x(layer), y(LEVELS.length - 1) + 70);

    const { layer, from, to } = edge;
    const [arrived, passed, ways] = [flow(edges, layers, () => 1), flow(edges, layers, at), waysOn()];
    const siblings = edges.filter((one) => one.layer === layer && one.from === from);
    const through = arrived[layer][from] * ways[layer + 1][to];
    const chance = passed[layer][from] * at(edge);
    where.textContent = `From ${stride(from)} ${after(layer)} to ${stride(to)} ${after(layer + 1)}: beta ${fixed(at(edge))}. All steps from there: ` +
      `${siblings.map((one) => `to ${LEVELS[one.to]}: ${fixed(at(one))}`).join(", ")}. ${thousands(through)} of ${thousands(total)} paths take this step, and ${fixed(100 * chance, 1)} % of those drawn by beta.`;
    const best = pathOf(MOST);
    tell({
      layers, moment, step: steps[moment], shown: names[shown], levels: [...path], probability: number(path), viterbi: best, most: number(best), edge: [layer, from, to], beta: at(edge),
      through, chance, counts, edges: edges.length, own: [...own], refused, playing: timer !== null,
      probabilities: Object.fromEntries(names.map((name, i) => [name, pathOf(i).length === layers ? number(pathOf(i)) : null])),
    });
    return where.textContent;
  }

  /** How many ways lead on from every node to the end. */
  function waysOn() {
    const ways = Array.from({ length: layers + 1 }, () => new Array(LEVELS.length).fill(0));
    ways[layers].fill(1);
    for (const one of [...edges].reverse()) ways[one.layer][one.from] += ways[one.layer + 1][one.to];
    return ways;
  }

  /** Place on the canvas, in layers and levels. */
  function place(event) {
    const box = view.canvas.getBoundingClientRect();
    const [px, py] = [((event.clientX - box.left) / box.width) * view.canvas.width, ((event.clientY - box.top) / box.height) * view.canvas.height];
    return [(px - left) / dx, (py - top) / dy];
  }

  /** The edge nearest to a place, of those that cross its column. */
  function nearest([layer, level]) {
    const column = clamp(Math.floor(layer), layers);
    const off = ({ from, to }) => Math.abs(level - from - (to - from) * Math.min(1, Math.max(0, layer - column)));
    return edges.filter((one) => one.layer === column).reduce((best, one) => (off(one) < off(best) ? one : best));
  }

  view.canvas.addEventListener("pointermove", (event) => ((edge = nearest(place(event))), look()));
  view.canvas.addEventListener("pointerdown", (event) => {
    const [layer, level] = place(event);
    const node = [Math.round(layer), Math.round(level)];
    edge = nearest([layer, level]);
    if (Math.hypot((layer - node[0]) * dx, (level - node[1]) * dy) < 0.45 * dx && node[0] >= 0 && node[0] <= layers && LEVELS[node[1]]) lead(...node);
    else look();
  });
  const cursor = { row: 0, col: 0 };
  const column = (layer) => edges.filter((one) => one.layer === layer);
  view.canvas.addEventListener("keydown", () => { // before `steer`: its rows are the steps of this layer
    view.rows = column(edge.layer).length;
    Object.assign(cursor, { col: edge.layer, row: column(edge.layer).indexOf(edge) });
  });
  steer(view, cursor, {
    moved: () => {
      const same = ({ from, to }) => from === edge.from && to === edge.to;
      const there = column(cursor.col);
      edge = cursor.col === edge.layer ? there[cursor.row] : there.find(same) ?? there.at(-1);
      announce(look());
    },
    act: () => lead(edge.layer + 1, edge.to, edge.from),
    typed: (key) => (LEVELS["1234".indexOf(key)] ? lead(own.length + 1, +key - 1) : key === "Backspace" && own.length ? lead(own.length - 1, own.at(-2) ?? 0) : false),
  });
  update();
  return element;
}

// ---- the element and the widget -------------------------------------------------------------------------------------

const FIGURES = { "metric-lab": metricLab, "skip-mixer": skipMixer, "upsampling-lab": upsamplingLab, "layer-scrubber": layerScrubber, "field-lab": fieldLab, "crf-playground": crfPlayground, "aspp-lab": asppLab, "pyramid-lab": pyramidLab, trellis };

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
