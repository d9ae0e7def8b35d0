"use strict";
// Draws the plots of the page from its own data; nothing is fetched.
(() => {
  const root = document.documentElement;
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdashdot", "longdash"];
  const STROKES = ["", "6 4", "2 3", "6 3 2 3", "10 3 2 3", "10 4"];
  const MARKERS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star"];
  const SHAPES = [
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-5l5 5l-5 5l-5-5z",
    "M0-4.5l4.5 8h-9z",
    "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-4-2.5l1.5-1.5l2.5 2.5l2.5-2.5l1.5 1.5l-2.5 2.5l2.5 2.5l-1.5 1.5l-2.5-2.5l-2.5 2.5l-1.5-1.5l2.5-2.5z",
    "M0-5l1.4 3.2l3.4 .4l-2.5 2.3l.7 3.4l-3-1.7l-3 1.7l.7-3.4l-2.5-2.3l3.4-.4z",
  ];
  const COLORS = 7;
  const plots = [];

  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const escapeText = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const color = (style) => variable(style.color < 0 ? "--ink" : `--c${style.color % COLORS}`);
  const symbol = (style) => MARKERS[style.marker % MARKERS.length] + (style.hollow ? "-open" : "");
  const faded = (hex, share) => {
    const part = (at) => parseInt(hex.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${share})`;
  };

  function make(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  async function inflate(id) {
    const packed = atob(document.getElementById(id).textContent.trim());
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  // ---- values as text

  function shown(value, axis) {
    if (typeof value !== "number") return String(value);
    if (axis.percent) return `${(100 * value).toFixed(1)} %`;
    return String(Number(value.toPrecision(4)));
  }

  function withInterval(trace, side, axis, i) {
    const low = trace[`${side}_low`], high = trace[`${side}_high`];
    const text = shown(trace[side][i], axis);
    if (!low || !high || low[i] == null || high[i] == null) return text;
    return `${text} [${shown(low[i], axis)}, ${shown(high[i], axis)}]`;
  }

  function hover(figure, trace, i) {
    const titleOf = (axis, other) => axis.title || other;
    const lines = [`<b>${escapeText(trace.series)}</b>`];
    if (figure.kind === "heat") {
      lines[0] = `<b>${escapeText(`${trace.y[i]} and ${trace.x[i]}`)}</b>`;
      lines.push(`${trace.z[i]} bits`);
    } else if (figure.kind === "steps") {
      lines.push(`${shown(trace.x[i], figure.x)} to ${shown(trace.x_high[i], figure.x)}: ${shown(trace.y[i], figure.y)}`);
    } else if (figure.kind === "lines") {
      const x = figure.xTitles[trace.choice[0]] || titleOf(figure.x, "x");
      lines.push(escapeText(`${x.split(",")[0]}: ${withInterval(trace, "x", figure.x, i)}`));
      lines.push(escapeText(`${titleOf(figure.y, trace.panel)}: ${withInterval(trace, "y", figure.y, i)}`));
    } else {
      lines.push(escapeText(`${trace.y[i]}: ${withInterval(trace, "x", figure.x, i)}`));
    }
    if (trace.label && trace.label[i] != null) lines.push(escapeText(trace.label[i]));
    return lines.join("<br>");
  }

  // ---- traces for Plotly

  function reach(trace, side) {
    const low = trace[`${side}_low`], high = trace[`${side}_high`];
    if (!low || !high) return null;
    const values = trace[side];
    return {
      array: values.map((value, i) => (high[i] == null ? 0 : high[i] - value)),
      arrayminus: values.map((value, i) => (low[i] == null ? 0 : value - low[i])),
    };
  }

  function base(figure, trace, axes) {
    const style = figure.series[trace.series].style;
    const tone = color(style);
    return {
      name: escapeText(trace.series),
      xaxis: axes.x,
      yaxis: axes.y,
      showlegend: false,
      hoverinfo: "text",
      hovertext: trace.x.map((_, i) => hover(figure, trace, i)),
      line: { color: tone, width: style.width, dash: DASHES[style.dash % DASHES.length] },
      marker: {
        color: tone,
        size: 8,
        symbol: trace.marker ? trace.marker.map((number) => symbol({ ...style, marker: number })) : symbol(style),
        line: { color: tone, width: style.hollow ? 2 : 0 },
      },
      mode: style.mode,
    };
  }

  function lines(figure, trace, axes) {
    const style = figure.series[trace.series].style;
    const main = { ...base(figure, trace, axes), type: "scatter", x: trace.x, y: trace.y };
    const tone = color(style);
    if (style.band && trace.y_low && trace.y_low.every((value) => value != null)) {
      const band = {
        type: "scatter", xaxis: axes.x, yaxis: axes.y, mode: "lines", hoverinfo: "skip", showlegend: false,
        x: [...trace.x, ...[...trace.x].reverse()], y: [...trace.y_low, ...[...trace.y_high].reverse()],
        fill: "toself", fillcolor: faded(tone, 0.14), line: { width: 0, color: tone },
      };
      return [band, main];
    }
    if (style.mode === "lines") return [main];
    for (const side of ["x", "y"]) {
      const error = reach(trace, side);
      if (error) main[`error_${side}`] = { type: "data", symmetric: false, ...error, color: faded(tone, 0.4), thickness: 1, width: 0 };
    }
    return [main];
  }

  function steps(figure, trace, axes) {
    const tone = color(figure.series[trace.series].style);
    const last = trace.x.length - 1;
    return [{
      ...base(figure, trace, axes), type: "scatter", mode: "lines",
      x: [...trace.x, trace.x_high[last]], y: [...trace.y, trace.y[last]],
      line: { color: tone, width: 2, shape: "hv", dash: DASHES[figure.series[trace.series].style.dash % DASHES.length] },
      fill: "tozeroy", fillcolor: faded(tone, 0.16),
    }];
  }

  function dots(figure, trace, axes, place) {
    const offset = 0.62 * ((place.names.indexOf(trace.series) + 0.5) / place.names.length - 0.5);
    const y = trace.y.map((name) => place.categories.indexOf(name) + offset);
    const tone = color(figure.series[trace.series].style);
    const error = reach(trace, "x");
    const bars = error && { error_x: { type: "data", symmetric: false, ...error, color: tone, thickness: 1.4, width: 3 } };
    return [{ ...base(figure, trace, axes), ...bars, type: "scatter", x: trace.x, y }];
  }

  function bars(figure, trace, axes, place) {
    const { hovertext, name } = base(figure, trace, axes);
    return [{
      type: "bar", orientation: "h", name, hovertext, hoverinfo: "text", showlegend: false, textposition: "none",
      xaxis: axes.x, yaxis: axes.y, offsetgroup: trace.series,
      x: trace.x, y: trace.y.map((name) => place.categories.indexOf(name)),
      marker: {
        color: color(figure.series[trace.series].style), line: { width: 0 },
        pattern: { shape: ["", "/", ".", "x", "-"][figure.keys.findIndex((key) => key.name === trace.series) % 5], bgcolor: color(figure.series[trace.series].style), fgcolor: variable("--surface"), size: 6, solidity: 0.2 },
      },
    }];
  }

  function heat(figure, trace, axes) {
    const across = [...new Set(trace.x)], down = [...new Set(trace.y)];
    const empty = () => down.map(() => across.map(() => null));
    const z = empty(), text = empty(), hovers = empty();
    trace.z.forEach((value, i) => {
      const [row, column] = [down.indexOf(trace.y[i]), across.indexOf(trace.x[i])];
      z[row][column] = value;
      text[row][column] = value == null ? "" : value.toFixed(2);
      hovers[row][column] = hover(figure, trace, i);
    });
    return [{
      type: "heatmap", xaxis: axes.x, yaxis: axes.y, x: across.map((_, i) => i), y: down.map((_, i) => i), z, text,
      hovertext: hovers, hoverinfo: "text", texttemplate: "%{text}", xgap: 2, ygap: 2, showscale: false,
      colorscale: "Cividis", zmin: figure.scale[0], zmax: figure.scale[1], across, down,
    }];
  }

  const DRAW = { lines, steps, dots, bars, heat };

  // ---- layout

  const clipped = (text, most) => {
    const letters = [...String(text)];
    return letters.length <= most ? String(text) : `${letters.slice(0, most / 2 - 1).join("")}…${letters.slice(-most / 2).join("")}`;
  };

  function axisLayout(axis, extra) {
    return {
      gridcolor: variable("--line"), zeroline: false, linecolor: variable("--muted"), ticks: "outside", ticklen: 4,
      tickcolor: variable("--muted"), automargin: true, tickformat: axis.percent ? ".0%" : "", hoverformat: "",
      ...(axis.low != null && axis.high != null ? { range: [axis.low, axis.high] } : axis.low === 0 ? { rangemode: "tozero" } : {}),
      ...extra,
    };
  }

  function arrange(plot, place) {
    const { figure } = plot;
    const width = plot.canvas.clientWidth, count = place.panels.length;
    const listed = figure.kind === "dots" || figure.kind === "bars";
    const least = listed ? 210 : figure.kind === "heat" ? 220 : 235;
    const most = Math.max(1, Math.min(4, count, Math.floor(width / least)));
    const down = Math.ceil(count / most);
    const across = Math.ceil(count / down);
    const gapX = across > 1 ? (listed ? 18 : figure.kind === "heat" ? 74 : 52) / width : 0;
    const each = (1 - gapX * (across - 1)) / across;
    const categories = Math.max(1, place.categories.length);
    const tall = {
      lines: count > 1 ? 190 : Math.max(300, Math.min(500, 0.48 * width)), steps: count > 1 ? 190 : 320,
      dots: Math.max(120, categories * Math.max(30, 15 * place.names.length)),
      bars: Math.max(120, categories * Math.max(18, 9 * place.names.length + 6)),
      heat: Math.max(120, Math.min(230, 0.72 * each * width)),
    }[figure.kind];
    const gapY = listed ? 54 : 62;
    const height = down * tall + (down - 1) * gapY;
    const cell = (number) => {
      const [column, row] = [number % across, Math.floor(number / across)];
      const bottom = 1 - (row * (tall + gapY) + tall) / height;
      return { column, x: [column * (each + gapX), column * (each + gapX) + each], y: [Math.max(0, bottom), bottom + tall / height] };
    };
    return { width, height, across, cell, each };
  }

  function layoutOf(plot, place) {
    const { figure } = plot;
    const arranged = arrange(plot, place);
    const listed = figure.kind === "dots" || figure.kind === "bars";
    const margin = { l: 56, r: 12, t: place.panels[0] ? 26 : 10, b: figure.kind === "heat" ? 30 : 46 };
    const layout = {
      width: arranged.width, height: arranged.height + margin.t + margin.b, margin, showlegend: false, hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", barmode: "group", bargap: 0.2,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", annotations: [],
      font: { family: variable("--font") || "system-ui, sans-serif", size: 12, color: variable("--ink") },
      hoverlabel: { bgcolor: variable("--surface"), bordercolor: variable("--muted"), font: { color: variable("--ink"), size: 12 }, align: "left" },
    };
    const title = figure.xTitles[plot.chosen[0]] || figure.x.title;
    place.panels.forEach((panel, number) => {
      const cell = arranged.cell(number), end = number === 0 ? "" : number + 1;
      const lowest = number + arranged.across >= place.panels.length;
      const text = figure.kind === "heat" || !lowest ? "" : escapeText(clipped(title, Math.max(16, Math.floor(arranged.each * arranged.width / 6.5))));
      const x = axisLayout(figure.x, { domain: cell.x, anchor: `y${end}`, title: { text, standoff: 8 } });
      const y = axisLayout(figure.y, { domain: cell.y, anchor: `x${end}`, title: { text: cell.column ? "" : escapeText(figure.y.title), standoff: 8 } });
      if (listed) {
        const narrow = arranged.width < 500;
        Object.assign(y, {
          tickvals: place.categories.map((_, i) => i), range: [place.categories.length - 0.5, -0.5], ticks: "", showgrid: false,
          ticktext: place.categories.map((name) => escapeText(clipped(name, narrow ? 18 : 34))), showticklabels: cell.column === 0,
        });
      }
      if (figure.kind === "heat") {
        const { across = [], down = [] } = place.data.find((trace) => trace.xaxis === `x${end}`) || {};
        const list = (names) => ({ tickvals: names.map((_, i) => i), ticktext: names.map((name) => escapeText(clipped(name, 12))), ticks: "", showgrid: false });
        Object.assign(x, list(across), { tickangle: 0 });
        Object.assign(y, list(down), { range: [down.length - 0.5, -0.5] });
      }
      if (figure.kind === "dots" && figure.x.title === "AUROC") {
        layout.shapes = [...(layout.shapes || []), {
          type: "line", xref: `x${end}`, yref: `y${end} domain`, x0: 0.5, x1: 0.5, y0: 0, y1: 1, line: { color: variable("--muted"), dash: "dash", width: 1 },
        }];
      }
      layout[`xaxis${end}`] = x;
      layout[`yaxis${end}`] = y;
      if (panel) {
        layout.annotations.push({
          text: `<b>${escapeText(clipped(panel, 40))}</b>`, xref: "paper", yref: "paper", x: cell.x[0], y: cell.y[1],
          xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 12 },
        });
      }
    });
    if (!place.data.length) {
      layout.annotations.push({ text: "nothing is stored for this choice", xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false });
    }
    return layout;
  }

  // ---- one plot

  const fits = (plot, trace) => trace.choice.every((value, i) => value == null || value === plot.chosen[i] || plot.chosen[i] === (plot.figure.selectors[i].every || null));
  const visible = (plot, trace) => !plot.figure.series[trace.series].keys.some((key) => plot.hidden.has(key));

  function compose(plot) {
    const { figure } = plot;
    const fitting = figure.traces.filter((trace) => fits(plot, trace));
    const traces = fitting.filter((trace) => visible(plot, trace));
    const common = traces.filter((trace) => trace.panel === "" || trace.panel == null);
    const filled = new Set(fitting.filter((trace) => !figure.selectors.length || trace.choice.some((value) => value != null)).map((trace) => trace.panel));
    const panels = figure.panels.filter((panel) => filled.has(panel));
    const place = { panels: panels.length ? panels : [figure.panels[0]], data: [] };
    const listed = figure.kind === "dots" || figure.kind === "bars";
    place.names = [...new Set(fitting.map((trace) => trace.series))];
    place.categories = listed ? [...new Set(fitting.flatMap((trace) => trace.y))] : [];
    place.panels.forEach((panel, number) => {
      const axes = { x: `x${number === 0 ? "" : number + 1}`, y: `y${number === 0 ? "" : number + 1}` };
      const here = traces.filter((trace) => trace.panel === panel || (panel !== "" && common.includes(trace)));
      for (const trace of here) place.data.push(...DRAW[figure.kind](figure, trace, axes, place));
    });
    return { data: place.data, layout: layoutOf(plot, place), place };
  }

  function draw(plot) {
    if (!window.Plotly || !plot.canvas.clientWidth) return;
    const { data, layout } = compose(plot);
    plot.width = plot.canvas.clientWidth;
    if (!plot.drawn) plot.canvas.replaceChildren();
    window.Plotly.react(plot.canvas, data, layout, { displayModeBar: false, responsive: false, doubleClick: "reset" });
    plot.canvas.style.minHeight = `${layout.height}px`;
    plot.drawn = true;
    plot.node.dataset.drawn = "true";
    legend(plot);
  }

  function swatch(style, kind, number) {
    const space = "http://www.w3.org/2000/svg";
    const tone = color(style);
    const svg = document.createElementNS(space, "svg");
    const add = (name, attributes) => {
      const node = document.createElementNS(space, name);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      svg.append(node);
    };
    if (kind === "bars") {
      svg.setAttribute("viewBox", "0 0 20 14");
      add("path", { d: "M0 1h20v12h-20z", fill: tone });
      const over = ["", "M1 13l8-12M7 13l8-12M13 13l6-9", "M4 4h2M9 4h2M14 4h2M4 9h2M9 9h2M14 9h2", "M2 13l10-12M10 13l10-12M2 1l10 12M10 1l10 12", "M0 5h20M0 9h20"];
      add("path", { d: over[number % over.length], stroke: variable("--surface"), "stroke-width": 1.6, fill: "none" });
      return svg;
    }
    const narrow = style.mode === "markers";
    svg.setAttribute("viewBox", narrow ? "-7 -7 14 14" : "-16 -7 32 14");
    svg.setAttribute("class", narrow ? "narrow" : "wide");
    svg.setAttribute("aria-hidden", "true");
    if (style.mode !== "markers") {
      add("path", { d: "M-16 0H16", stroke: tone, "stroke-width": Math.min(3, style.width), "stroke-dasharray": STROKES[style.dash % STROKES.length], fill: "none" });
    }
    if (style.mode !== "lines") {
      add("path", { d: SHAPES[style.marker % SHAPES.length], fill: style.hollow ? "none" : tone, stroke: tone, "stroke-width": style.hollow ? 1.6 : 0 });
    }
    return svg;
  }

  function legend(plot) {
    const { figure } = plot;
    const used = new Set(figure.traces.filter((trace) => fits(plot, trace)).flatMap((trace) => figure.series[trace.series].keys));
    const box = plot.node.querySelector(".legend");
    const focused = document.activeElement && box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    box.replaceChildren();
    let group = null, list = null;
    for (const key of figure.keys.filter((entry) => used.has(entry.name))) {
      if (key.group !== group || !list) {
        group = key.group;
        list = make("div", { class: "keys", role: "group", "aria-label": group || "legend" });
        if (group) list.append(make("span", { class: "group" }, group));
        box.append(list);
      }
      const on = !plot.hidden.has(key.name);
      const button = make("button", { type: "button", "aria-pressed": String(on), title: "show or hide" }, swatch(key.style, figure.kind, figure.keys.indexOf(key)), key.name);
      button.dataset.key = key.name;
      button.addEventListener("click", () => {
        if (!plot.hidden.delete(key.name)) plot.hidden.add(key.name);
        draw(plot);
      });
      list.append(button);
      if (focused === key.name) button.focus();
    }
  }

  // ---- what the reader can take away

  function save(name, address) {
    make("a", { download: name, href: address }).click();
  }

  async function picture(plot, format) {
    const { data, layout } = compose(plot);
    const used = new Set(plot.figure.traces.filter((trace) => fits(plot, trace) && visible(plot, trace)).flatMap((trace) => plot.figure.series[trace.series].keys));
    const keys = plot.figure.keys.filter((key) => used.has(key.name)).map((key) => ({
      type: "scatter", x: [null], y: [null], name: escapeText(key.name), showlegend: true, mode: key.style.mode,
      line: { color: color(key.style), width: key.style.width, dash: DASHES[key.style.dash % DASHES.length] },
      marker: { color: color(key.style), size: 8, symbol: symbol(key.style) },
    }));
    const title = [plot.figure.title, ...plot.chosen].join("; ");
    const whole = {
      ...layout, height: layout.height + 90, margin: { ...layout.margin, t: layout.margin.t + 40 }, showlegend: true,
      legend: { orientation: "h", y: -0.2 }, title: { text: escapeText(title), font: { size: 13 } }, paper_bgcolor: variable("--surface"),
    };
    const address = await window.Plotly.toImage({ data: [...data, ...keys], layout: whole }, { format, width: whole.width, height: whole.height, scale: 2 });
    save(`${plot.figure.name}.${format}`, address);
  }

  function sheet(plot) {
    const { figure } = plot;
    const columns = ["x", "x_low", "x_high", "y", "y_low", "y_high", "z", "label"].filter((name) => figure.traces.some((trace) => trace[name]));
    const quote = (value) => (value == null ? "" : /[",\n]/.test(String(value)) ? `"${String(value).replace(/"/g, '""')}"` : String(value));
    const rows = [[...figure.selectors.map((selector) => selector.column), "panel", "series", ...columns]];
    for (const trace of figure.traces) {
      trace.x.forEach((_, i) => rows.push([...trace.choice, trace.panel, trace.series, ...columns.map((name) => trace[name] && trace[name][i])]));
    }
    const text = rows.map((row) => row.map(quote).join(",")).join("\n") + "\n";
    const address = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    save(`${figure.name}.csv`, address);
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  function controls(plot) {
    const box = plot.node.querySelector(".controls");
    plot.figure.selectors.forEach((selector, number) => {
      const select = make("select", { "aria-label": `${selector.title}: ${plot.figure.title}` });
      for (const name of selector.options) select.append(make("option", { value: name }, name));
      select.value = plot.chosen[number];
      select.addEventListener("change", () => {
        plot.chosen[number] = select.value;
        draw(plot);
      });
      if (selector.options.length > 1) box.append(make("label", {}, selector.title, select));
    });
    const files = plot.node.querySelector(".files");
    for (const [name, act] of [["SVG", () => picture(plot, "svg")], ["PNG", () => picture(plot, "png")], ["CSV", () => sheet(plot)]]) {
      const button = make("button", { type: "button", "aria-label": `save ${plot.figure.title} as ${name}` }, name);
      button.addEventListener("click", act);
      files.append(button);
    }
  }

  // ---- the page

  const redraw = () => plots.filter((plot) => plot.drawn).forEach(draw);

  function themes() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const button = document.getElementById("theme");
    const now = () => root.dataset.theme || (dark.matches ? "dark" : "light");
    const name = () => {
      button.textContent = now() === "dark" ? "Light theme" : "Dark theme";
    };
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = now() === "dark" ? "light" : "dark";
      name();
      redraw();
    });
    dark.addEventListener("change", () => {
      name();
      redraw();
    });
    name();
    let before = null;
    addEventListener("beforeprint", () => {
      before = root.dataset.theme || "";
      root.dataset.theme = "light";
      plots.forEach(draw);
    });
    addEventListener("afterprint", () => {
      root.dataset.theme = before;
      if (!before) delete root.dataset.theme;
      redraw();
    });
  }

  function filter() {
    const select = document.getElementById("filter");
    if (!select) return;
    select.closest("label").hidden = false;
    select.addEventListener("change", () => {
      for (const block of document.querySelectorAll(".run")) block.hidden = select.value !== "" && block.dataset.run !== select.value;
    });
  }

  function follow() {
    const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
    const seen = new Set();
    const watch = new IntersectionObserver((entries) => {
      for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target.id);
      const first = [...links.keys()].find((id) => seen.has(id));
      for (const [id, link] of links) id === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    }, { rootMargin: "-15% 0px -70% 0px" });
    document.querySelectorAll("main > section").forEach((section) => watch.observe(section));
  }

  async function start() {
    themes();
    filter();
    follow();
    try {
      const [figures, library] = await Promise.all([inflate("figures"), inflate("plotly")]);
      const script = document.createElement("script");
      script.textContent = library;
      document.head.append(script);
      if (!window.Plotly) throw new Error("the plotting library did not start");
      const data = JSON.parse(figures);
      document.querySelectorAll("figure.plot").forEach((node) => {
        const figure = data[Number(node.dataset.figure)];
        const plot = { node, figure, canvas: node.querySelector(".canvas"), drawn: false };
        plot.chosen = [...figure.chosen];
        plot.hidden = new Set(figure.keys.filter((key) => key.hidden).map((key) => key.name));
        plots.push(plot);
        controls(plot);
      });
    } catch (error) {
      root.dataset.plots = "failed";
      for (const node of document.querySelectorAll(".fallback")) node.textContent += ` It failed here: ${error.message}.`;
      return;
    }
    const near = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const plot = plots.find((candidate) => candidate.canvas === entry.target);
        if (entry.isIntersecting && !plot.drawn) draw(plot);
      }
    }, { rootMargin: "500px" });
    const sized = new ResizeObserver((entries) => {
      for (const entry of entries) {
        const plot = plots.find((candidate) => candidate.canvas === entry.target);
        if (plot.drawn && Math.abs(plot.canvas.clientWidth - plot.width) > 4) draw(plot);
      }
    });
    for (const plot of plots) {
      near.observe(plot.canvas);
      sized.observe(plot.canvas);
    }
    requestAnimationFrame(() => setTimeout(() => {
      root.dataset.plots = "ready";
      root.dataset.opened = String(Math.round(performance.now()));
    }));
  }

  start();
})();
