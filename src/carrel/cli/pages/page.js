// Draws the charts of this page from the JSON in it. Needs uPlot, and nothing from anywhere else.
(() => {
  "use strict";
  const charts = JSON.parse(document.getElementById("data").textContent);
  const host = document.getElementById("charts");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const HEIGHT = 220, COLOURS = 8, CEILING_SHOWN = 0.4;
  const BYTES = Array.from({ length: 60 }, (_, n) => 2 ** n);
  const sync = uPlot.sync("job");
  let drawn = [];

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function size(bytes) {
    const units = ["B", "K", "M", "G", "T", "P"];
    let at = 0;
    for (; bytes >= 1024 && at < units.length - 1; at++) bytes /= 1024;
    return (bytes >= 100 ? bytes.toFixed(0) : String(Number(bytes.toFixed(1)))) + units[at];
  }

  function shown(value, unit) {
    if (value == null) return "–";
    if (unit === "B") return size(value);
    if (unit === "B/s") return size(value) + "/s";
    const text = Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
    return unit === "%" || unit === "/s" ? text + unit : unit ? text + " " + unit : text;
  }

  function moment(seconds, step) {
    const at = new Date(seconds * 1000), two = (n) => String(n).padStart(2, "0");
    const day = at.getFullYear() + "-" + two(at.getMonth() + 1) + "-" + two(at.getDate());
    if (step >= 86400) return day;
    return two(at.getHours()) + ":" + two(at.getMinutes()) + (step < 60 ? ":" + two(at.getSeconds()) : "");
  }

  // The axis says the day once, below its first moment.
  function moments(ticks, step) {
    return ticks.map((tick, at) => moment(tick, step) + (at || step >= 86400 ? "" : "\n" + moment(tick, 86400)));
  }

  // Nodes have moments of their own; null is a break, what is merely absent is not. All charts span the whole job.
  function table(chart) {
    const span = [[chart.from_s, chart.to_s], [undefined, undefined]];
    const joined = uPlot.join([span].concat(chart.curves.map((curve) => [curve.times_s, curve.values])),
      [[1, 0]].concat(chart.curves.map(() => [1, 2])));
    joined.splice(1, 1);
    return joined;
  }

  function peak(chart) {
    return chart.curves.reduce((most, curve) => curve.values.reduce((m, v) => (v > m ? v : m), most), 0);
  }

  function options(chart, width) {
    const ink = css("--ink"), grid = css("--grid");
    const top = peak(chart);
    const ceiling = chart.ceiling && top >= CEILING_SHOWN * chart.ceiling ? chart.ceiling : null;
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
    return {
      width,
      height: HEIGHT,
      cursor: { sync: { key: sync.key }, drag: { x: true, y: false } },
      scales: { x: { time: true }, y: { range: (_, low, high) => [Math.min(0, low || 0), Math.max(high || 0, ceiling || 0) * 1.05 || 1] } },
      axes: [Object.assign({ values: (_, ticks, __, ___, step) => moments(ticks, step) }, axis), Object.assign({
        size: 64,
        values: (_, ticks) => ticks.map((tick) => shown(tick, ["B", "B/s", "%"].includes(chart.unit) ? chart.unit : "")),
      }, chart.unit.startsWith("B") ? { incrs: BYTES } : {}, axis)],
      series: [{ label: "time", value: (_, at) => (at == null ? "–" : moment(at, 86400) + " " + moment(at, 1)) }].concat(chart.curves.map((curve, at) => ({
        label: curve.label,
        stroke: css("--c" + (at % COLOURS)),
        dash: at < COLOURS ? undefined : [6, 3],
        width: 1.5,
        spanGaps: false,
        points: { show: chart.curves[at].values.length < 3 },
        value: (_, value) => shown(value, chart.unit),
      }))),
      hooks: { draw: ceiling ? [(plot) => line(plot, ceiling, ink)] : [] },
    };
  }

  function line(plot, value, colour) {
    const y = Math.round(plot.valToPos(value, "y", true)), box = plot.bbox;
    plot.ctx.save();
    plot.ctx.strokeStyle = colour;
    plot.ctx.setLineDash([4, 4]);
    plot.ctx.beginPath();
    plot.ctx.moveTo(box.left, y);
    plot.ctx.lineTo(box.left + box.width, y);
    plot.ctx.stroke();
    plot.ctx.restore();
  }

  function title(chart) {
    const head = document.createElement("h2");
    head.textContent = chart.title + " ";
    const more = document.createElement("small");
    const of = chart.ceiling ? "of " + shown(chart.ceiling, chart.unit) + ", " : "";
    more.textContent = of + "at most " + shown(peak(chart), chart.unit);
    head.append(more);
    return head;
  }

  function draw() {
    drawn.forEach(({ plot }) => plot.destroy());
    host.replaceChildren();
    drawn = charts.map((chart) => {
      const section = document.createElement("section");
      section.append(title(chart));
      host.append(section);
      const width = section.clientWidth - 26;
      const plot = new uPlot(options(chart, width), table(chart), section);
      plot.root.querySelector("canvas").setAttribute("aria-label", section.firstChild.textContent);
      plot.root.querySelector("canvas").setAttribute("role", "img");
      return { section, plot };
    });
    if (!charts.length) host.append(Object.assign(document.createElement("p"), { textContent: "Nothing to draw yet." }));
  }

  function resize() {
    drawn.forEach(({ section, plot }) => plot.setSize({ width: section.clientWidth - 26, height: HEIGHT }));
  }

  draw();
  dark.addEventListener("change", draw);
  window.addEventListener("resize", resize);
})();
