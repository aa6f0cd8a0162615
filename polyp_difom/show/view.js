// Pictures, plots and scatters of a notebook. The kernel sends data; all drawing happens here.
const MISSED = [230, 159, 0], INVENTED = [0, 114, 178], COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"];
const SVG = "http://www.w3.org/2000/svg";

const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name in node && name !== "role" ? (node[name] = value) : node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const draw = (tag, attributes = {}, text = "") => {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
};
const sheet = (width, height) => make("canvas", { width, height });
const pixels = canvas => canvas.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, canvas.width, canvas.height);

// ---------------------------------------------------------------- pictures
async function decode(bytes) {
  const bitmap = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = sheet(bitmap.width, bitmap.height);
  canvas.getContext("2d", { willReadFrequently: true }).drawImage(bitmap, 0, 0);
  return canvas;
}

function scaled(canvas, width, height) {
  if (canvas.width === width && canvas.height === height) return canvas;
  const other = sheet(width, height);
  other.getContext("2d").drawImage(canvas, 0, 0, width, height);
  return other;
}

// A picture: {image[, outlines: [{image, colour}]][, error: {truth, prediction}]}, as a canvas of the image's size.
function compose(part, decoded, threshold) {
  const source = decoded[part.image];
  if (!source) return sheet(1, 1);
  const canvas = sheet(source.width, source.height), context = canvas.getContext("2d");
  context.drawImage(source, 0, 0);
  const levels = name => decoded[name] ? pixels(scaled(decoded[name], canvas.width, canvas.height)).data : null;
  if (part.error) paintError(canvas, context, levels(part.error.truth), levels(part.error.prediction), threshold);
  for (const line of part.outlines ?? []) paintOutline(canvas, context, levels(line.image), line.mask ? 0.5 : threshold, line.colour);
  return canvas;
}

function paintError(canvas, context, truth, prediction, threshold) {
  if (!truth || !prediction) return;
  const picture = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < truth.length; i += 4) {
    const real = truth[i] > 127, found = prediction[i] >= 255*threshold;
    if (real !== found) for (let c = 0; c < 3; c++) picture.data[i + c] = 0.25*picture.data[i + c] + 0.75*(real ? MISSED : INVENTED)[c];
  }
  context.putImageData(picture, 0, 0);
}

function paintOutline(canvas, context, levels, threshold, colour) {
  if (!levels) return;
  const { width, height } = canvas, inside = (x, y) => levels[4*(y*width + x)] >= 255*threshold && x >= 0 && x < width, thick = Math.max(1, Math.round(width/200));
  context.fillStyle = colour;
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++)
    if (inside(x, y) && !(inside(x - 1, y) && inside(x + 1, y) && y && inside(x, y - 1) && y < height - 1 && inside(x, y + 1))) context.fillRect(x, y, thick, thick);
}

// Dice of a prediction at the threshold, in the pixels that were sent; null where both are empty.
function dice(part, decoded, threshold) {
  const of = part.error ?? part;
  if (!decoded[of.truth] || !decoded[of.prediction]) return null;
  const truth = pixels(decoded[of.truth]), prediction = pixels(scaled(decoded[of.prediction], truth.width, truth.height)).data;
  let both = 0, sum = 0;
  for (let i = 0; i < truth.data.length; i += 4) {
    const real = truth.data[i] > 127, found = prediction[i] >= 255*threshold;
    both += real && found; sum += real + found;
  }
  return sum ? 2*both/sum : null;
}

// ---------------------------------------------------------------- controls that are reached by mouse and by keyboard
function slider(node, { label, low, high, step, get, set }) {
  node.tabIndex = 0;
  node.setAttribute("role", "slider");
  node.setAttribute("aria-label", label);
  node.setAttribute("aria-valuemin", low);
  node.setAttribute("aria-valuemax", high);
  const to = value => set(Math.min(high, Math.max(low, value)));
  node.addEventListener("keydown", event => {
    const move = { ArrowLeft: -step, ArrowDown: -step, ArrowRight: step, ArrowUp: step, PageDown: -10*step, PageUp: 10*step }[event.key];
    const edge = { Home: low, End: high }[event.key];
    if (move === undefined && edge === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    to(edge ?? get() + move);
  });
  return { to, show: () => node.setAttribute("aria-valuenow", get().toFixed(3)) };
}

function dragged(node, at) {
  node.addEventListener("pointerdown", event => { node.setPointerCapture(event.pointerId); at(event); });
  node.addEventListener("pointermove", event => { if (event.buttons) at(event); });
}

// ---------------------------------------------------------------- panels
function picturePanel(panel, view) {
  const canvas = make("canvas", { role: "img" }), note = make("div", { className: "note", role: "status" });
  const node = make("figure", {}, make("figcaption", { textContent: panel.title ?? "" }), canvas, note);
  canvas.setAttribute("aria-label", panel.alt ?? panel.title ?? "picture");
  canvas.classList.toggle("cells", Boolean(panel.cells));
  const paint = () => {
    const made = compose(panel, view.decoded, view.get("threshold"));
    canvas.width = made.width; canvas.height = made.height;
    canvas.style.width = `${view.get("width")}px`;
    canvas.getContext("2d").drawImage(made, 0, 0);
    const score = dice(panel, view.decoded, view.get("threshold"));
    note.textContent = score === null ? view.get("notes")[panel.image] ?? "" : `Dice ${score.toFixed(3)} at threshold ${view.get("threshold").toFixed(2)}`;
  };
  if (panel.error) node.append(legend([["missed", MISSED], ["invented", INVENTED]].map(([name, colour]) => [name, `rgb(${colour})`])));
  if (panel.outlines) node.append(legend(panel.outlines.map(line => [line.name, line.colour])));
  return { node, paint };
}

function legend(entries, width = 340) {
  const node = make("div", { className: "legend" }, ...entries.map(([name, colour, dash]) => {
    const patch = make("span", { className: "patch" });
    patch.style.background = dash ? `repeating-linear-gradient(90deg, ${colour} 0 3px, white 3px 5px)` : colour;
    return make("span", {}, patch, ` ${name}`);
  }));
  node.style.maxWidth = `${width}px`;
  return node;
}

function curtainPanel(panel, view) {
  const canvas = make("canvas"), sides = make("div", { className: "sides" });
  const node = make("figure", {}, make("figcaption", { textContent: panel.title ?? "" }), canvas, sides);
  const control = slider(canvas, { label: panel.alt ?? "curtain", low: 0, high: 1, step: 0.02, get: () => view.get("curtain"), set: value => view.set("curtain", value) });
  dragged(canvas, event => { const box = canvas.getBoundingClientRect(); control.to((event.clientX - box.left)/box.width); });
  sides.append(make("span", { textContent: `◀ ${panel.left.title}` }), make("span", { textContent: `${panel.right.title} ▶` }));
  const paint = () => {
    const [left, right] = [panel.left, panel.right].map(part => compose(part, view.decoded, view.get("threshold")));
    const width = Math.max(left.width, right.width), height = Math.max(left.height, right.height), at = Math.round(view.get("curtain")*width);
    canvas.width = width; canvas.height = height;
    canvas.style.width = `${view.get("width")}px`;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(right, 0, 0, width, height);
    if (at > 0) context.drawImage(left, 0, 0, left.width*at/width, left.height, 0, 0, at, height);
    context.fillStyle = "white"; context.fillRect(at - 1, 0, 2, height);
    control.show();
  };
  return { node, paint };
}

const finite = values => values.filter(value => value !== null && Number.isFinite(value));
const short = value => Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(0) : String(+value.toPrecision(3));

// An axis: numbers to places, and ticks.
function scale(values, from, to, logarithmic, range) {
  const turn = logarithmic ? value => Math.log10(value) : value => value, kept = finite(values).filter(value => !logarithmic || value > 0).map(turn);
  let [low, high] = range ? range.map(turn) : kept.length ? [Math.min(...kept), Math.max(...kept)] : [0, 1];
  const margin = Math.max(0.5, 1e-6*Math.abs(high));
  if (high - low <= 1e-12*Math.abs(high)) [low, high] = [low - margin, high + margin]; // one number, or as good as one
  const at = value => from + (turn(value) - low)/(high - low)*(to - from);
  const back = place => low + (place - from)/(to - from)*(high - low);
  const nice = span => [1, 2, 5, 10].map(n => n*10**Math.floor(Math.log10(span))).find(n => n >= span);
  const decades = logarithmic && high - low >= 1, bottom = logarithmic && !decades ? 10**low : low, top = logarithmic && !decades ? 10**high : high;
  const step = decades ? Math.max(1, Math.ceil((high - low)/4)) : nice((top - bottom)/4), ticks = [];
  const first = Math.ceil(bottom/step - 1e-9), count = Math.min(20, Math.floor(top/step + 1e-9) - first + 1);
  for (let k = 0; k < count; k++) ticks.push(decades ? 10**((first + k)*step) : (first + k)*step);
  return { at, back, ticks, has: value => value !== null && Number.isFinite(value) && (!logarithmic || value > 0) };
}

const FRAME = { left: 52, right: 12, top: 24, bottom: 40 };

function axes(panel, width, height, xs, ys) {
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": panel.alt ?? panel.title ?? "plot" });
  const x = scale(xs, FRAME.left, width - FRAME.right, false, panel.xrange), y = scale(ys, height - FRAME.bottom, FRAME.top, panel.log, panel.yrange);
  for (const band of panel.bands ?? []) {
    const [from, to] = [x.at(band.from), x.at(band.to)];
    picture.append(draw("rect", { x: from, y: FRAME.top, width: Math.max(0, to - from), height: height - FRAME.top - FRAME.bottom, fill: band.colour, opacity: 0.12 }));
    picture.append(draw("text", { x: (from + to)/2, y: FRAME.top - 4, "text-anchor": "middle" }, band.label));
  }
  for (const tick of x.ticks) picture.append(draw("text", { x: x.at(tick), y: height - FRAME.bottom + 14, "text-anchor": "middle" }, short(tick)));
  for (const tick of y.ticks) picture.append(draw("text", { x: FRAME.left - 5, y: y.at(tick) + 3, "text-anchor": "end" }, short(tick)),
                                             draw("line", { x1: FRAME.left, x2: width - FRAME.right, y1: y.at(tick), y2: y.at(tick), stroke: "#ddd" }));
  picture.append(draw("text", { x: (FRAME.left + width - FRAME.right)/2, y: height - 8, "text-anchor": "middle" }, panel.xlabel ?? ""));
  picture.append(draw("text", { x: 12, y: (FRAME.top + height - FRAME.bottom)/2, "text-anchor": "middle", transform: `rotate(-90 12 ${(FRAME.top + height - FRAME.bottom)/2})` }, panel.ylabel ?? ""));
  return { picture, x, y };
}

function plotPanel(panel, view) {
  const width = panel.width ?? 340, height = panel.height ?? 230, lines = panel.lines ?? [];
  const node = make("figure", {}, make("figcaption", { textContent: panel.title ?? "" }));
  const { picture, x, y } = axes(panel, width, height, lines.flatMap(line => line.x), lines.flatMap(line => line.y));
  lines.forEach((line, i) => {
    const colour = line.colour ?? COLOURS[i % COLOURS.length], stretches = [[]]; // a number that is missing breaks a line
    line.x.forEach((value, k) => y.has(line.y[k]) ? stretches.at(-1).push(`${x.at(value).toFixed(1)},${y.at(line.y[k]).toFixed(1)}`) : stretches.push([]));
    for (const places of stretches) {
      if (places.length > 1) picture.append(draw("polyline", { points: places.join(" "), fill: "none", stroke: colour, "stroke-width": 1.6, "stroke-dasharray": line.dash ? "5 4" : "none" }));
      if (places.length === 1) picture.append(draw("circle", { cx: places[0].split(",")[0], cy: places[0].split(",")[1], r: 2.5, fill: colour }));
    }
  });
  node.append(picture, legend(lines.map((line, i) => [line.name, line.colour ?? COLOURS[i % COLOURS.length], line.dash]), width));
  if (!panel.marker) return { node, paint: () => {} };
  const bar = draw("line", { y1: FRAME.top, y2: height - FRAME.bottom, stroke: "#D55E00", "stroke-width": 3 }), value = draw("text", { y: FRAME.top - 4, "text-anchor": "middle", fill: "#B34700" });
  picture.append(bar, value);
  picture.classList.add("marked");
  const [low, high] = panel.marker.range;
  const control = slider(picture, { label: panel.marker.label, low, high, step: panel.marker.step, get: () => view.get("marker"), set: v => view.set("marker", v) });
  dragged(picture, event => { const box = picture.getBoundingClientRect(); control.to(x.back((event.clientX - box.left)*width/box.width)); });
  const paint = () => {
    const place = x.at(view.get("marker"));
    bar.setAttribute("x1", place); bar.setAttribute("x2", place);
    value.setAttribute("x", place); value.textContent = view.get("marker").toFixed(2);
    control.show();
  };
  return { node, paint };
}

function scatterPanel(panel, view) {
  const width = panel.width ?? 300, height = panel.height ?? 300, node = make("figure", {}, make("figcaption", { textContent: panel.title ?? "" }));
  const { picture, x, y } = axes({ xrange: [0, 1], yrange: [0, 1], ...panel }, width, height, panel.x, panel.y);
  picture.append(draw("line", { x1: x.at(0), y1: y.at(0), x2: x.at(1), y2: y.at(1), stroke: "gray" }));
  const dots = panel.x.map((value, i) => {
    const dot = draw("circle", { cx: x.at(value), cy: y.at(panel.y[i]), r: 4, opacity: 0.65, tabindex: -1 });
    dot.append(draw("title", {}, `${panel.names[i]}: ${value.toFixed(2)}, ${panel.y[i].toFixed(2)}`));
    dot.addEventListener("click", () => view.set("chosen", i));
    return dot;
  });
  const control = slider(picture, { label: panel.alt ?? "image", low: 0, high: dots.length - 1, step: 1, get: () => view.get("chosen"), set: v => view.set("chosen", Math.round(v)) });
  picture.append(...dots);
  node.append(picture);
  const paint = () => {
    dots.forEach((dot, i) => { dot.setAttribute("fill", i === view.get("chosen") ? "#D55E00" : "#0072B2"); dot.setAttribute("r", i === view.get("chosen") ? 7 : 4); });
    control.show();
    const i = view.get("chosen");
    if (panel.names[i] !== undefined) picture.setAttribute("aria-valuetext", `${panel.names[i]}: ${panel.x[i].toFixed(2)}, ${panel.y[i].toFixed(2)}`);
  };
  return { node, paint };
}

const KINDS = { picture: picturePanel, curtain: curtainPanel, plot: plotPanel, scatter: scatterPanel };

// ---------------------------------------------------------------- the view
function render({ model, el }) {
  el.classList.add("polyp-difom");
  const view = { decoded: {}, get: name => model.get(name), set: (name, value) => { model.set(name, value); model.save_changes(); } };
  let panels = [], latest = 0;
  const known = new Map();
  const paint = () => panels.forEach(panel => panel.paint());
  const build = () => {
    const focused = [...el.querySelectorAll("[tabindex='0']")].indexOf(document.activeElement);
    panels = model.get("panels").map(panel => KINDS[panel.kind](panel, view));
    el.replaceChildren(...panels.map(panel => panel.node));
    paint();
    if (focused >= 0) el.querySelectorAll("[tabindex='0']")[focused]?.focus();
  };
  const load = async () => { // pictures that did not change are not decoded again
    const turn = ++latest, images = model.get("images"), number = model.get("chosen"), decoded = {};
    for (const [name, bytes] of Object.entries(images)) {
      const before = known.get(name);
      decoded[name] = before && before.bytes === bytes ? before.canvas : await decode(bytes);
      known.set(name, { bytes, canvas: decoded[name] });
    }
    if (turn !== latest) return;
    [view.decoded, view.number] = [decoded, number];
    panels.length ? paint() : build();
    el.dataset.drawn = String(Number(el.dataset.drawn ?? 0) + 1);
  };
  el.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own keys, which would change the notebook
  if (model.get("letters").length) {
    el.tabIndex = 0;
    el.setAttribute("role", "group");
    el.setAttribute("aria-label", `keys: ${model.get("letters").join(", ")}`);
    model.on("change:chosen", load); // the number of a picture that equals the one before
    el.addEventListener("keydown", event => {
      if (!event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey && model.get("letters").includes(event.key)) { event.preventDefault(); event.stopPropagation(); view.set("pressed", `${event.key} ${view.number} ${Date.now()}`); }
    });
  }
  model.on("change:images", load);
  model.on("change:panels", build);
  for (const name of ["threshold", "curtain", "marker", "chosen", "width", "notes"]) model.on(`change:${name}`, paint);
  load();
}

export default { render };
