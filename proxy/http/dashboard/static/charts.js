"use strict";
/* The charts, around uPlot: their colours, axes, legends and keys; and a PNG of one. */

const Charts = (() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const charts = new Set();

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  function axis(more) {
    return {
      stroke: () => color("muted"),
      font: "12px system-ui, sans-serif",
      grid: { stroke: () => color("line"), width: 1 },
      ticks: { show: false },
      border: { show: false },
      ...more,
    };
  }

  const bars = uPlot.paths.bars({ size: [0.72, 34], radius: 0.18 });
  const steps = uPlot.paths.stepped({ align: 1 });

  /* A time on the axis, in UTC; `step` is the seconds between two of them. */
  function moment(seconds, step) {
    const at = new Date(seconds * 1000);
    const words = (options) => at.toLocaleDateString("en-GB", { timeZone: "UTC", ...options });
    if (step >= 28 * 86400) return words(at.getUTCMonth() ? { month: "short" } : { month: "short", year: "numeric" });
    if (step >= 86400 || seconds % 86400 === 0) return words({ day: "numeric", month: "short" });
    return at.toISOString().slice(11, 16);
  }

  const powers = (_, all) => all.map((value) => (Number.isInteger(Math.round(Math.log10(value) * 1e9) / 1e9) ? value : null));

  /* A chart in `host`. `series` have a label, a color's name, a format, and what to draw;
     `readout` gets the place under the cursor, or null. */
  function make(host, { series, y, range, x, readout, describe }) {
    const options = {
      width: host.clientWidth || 300,
      height: host.clientHeight || 180,
      padding: [8, 4, 0, 0],
      legend: { show: false },
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
      scales: { x: { time: true, range: x }, y: { range, ...(y.scale || {}) } },
      axes: [
        axis({ grid: { show: false }, space: 64, size: 26, values: (_, all, __, ___, step) => all.map((at) => moment(at, step)) }),
        axis({
          size: y.size,
          space: 34,
          gap: 6,
          values: (_, all) => all.map((value) => (value === null ? "" : y.format(value))),
          grid: { stroke: () => color("line"), width: 1, ...(y.scale ? { filter: powers } : {}) },
        }),
      ],
      series: [
        {},
        ...series.map((one) => ({
          label: one.label,
          stroke: () => color(one.color),
          fill: one.isFilled ? () => color(one.color) : undefined,
          width: one.isFilled ? 0 : 2,
          dash: one.dash,
          paths: one.isBar ? (u, ...place) => (u.data[0].length > 120 ? steps : bars)(u, ...place) : uPlot.paths.linear(),
          points: { show: (u) => !one.isBar && u.data[0].length < 3, size: 5, width: 0, fill: () => color(one.color) },
          spanGaps: true,
        })),
      ],
      hooks: { setCursor: [(u) => readout(u.cursor.idx ?? null)] },
    };
    const plot = new uPlot(options, [[], ...series.map(() => [])], host);
    const chart = {
      plot,
      set(data) {
        plot.setData(data);
        readout(plot.cursor.left >= 0 ? plot.cursor.idx ?? null : null);
        host.setAttribute("aria-label", describe());
      },
    };
    charts.add(chart);
    plot.hooks.destroy = [() => charts.delete(chart)];
    new ResizeObserver(() => {
      const { clientWidth: width, clientHeight: height } = host;
      if (width && (width !== plot.width || height !== plot.height)) plot.setSize({ width, height });
    }).observe(host);
    host.addEventListener("keydown", (event) => {
      const last = plot.data[0].length - 1;
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (by === undefined || last < 0) return;
      event.preventDefault();
      const at = plot.cursor.left >= 0 ? plot.cursor.idx ?? last : last + (by < 0 ? 1 : -1 - last);
      const place = Math.min(last, Math.max(0, at + by));
      plot.setCursor({ left: plot.valToPos(plot.data[0][place], "x") , top: 0 });
    });
    host.addEventListener("blur", () => plot.setCursor({ left: -10, top: -10 }));
    return chart;
  }

  dark.addEventListener("change", () => charts.forEach(({ plot }) => plot.setData(plot.data)));

  /* Save a chart with a title, a line below it and a legend, as a picture of 1,200 pixels. */
  function savePNG(chart, { title, subtitle, legend, name }) {
    const source = chart.plot.ctx.canvas;
    const [width, margin, top] = [1200, 48, 150];
    const scale = (width - 2 * margin) / source.width;
    const height = Math.round(top + source.height * scale + margin);
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const pen = canvas.getContext("2d");
    const family = "system-ui, sans-serif";
    pen.fillStyle = color("card");
    pen.fillRect(0, 0, width, height);
    pen.fillStyle = color("text");
    pen.font = `600 40px ${family}`;
    pen.fillText(title, margin, 72);
    pen.fillStyle = color("muted");
    pen.font = `400 20px ${family}`;
    pen.fillText(subtitle, margin, 106);
    let left = margin;
    for (const { label, color: tint } of legend) {
      pen.fillStyle = color(tint);
      pen.fillRect(left, 122, 14, 14);
      pen.fillStyle = color("muted");
      pen.fillText(label, left + 22, 135);
      left += 58 + pen.measureText(label).width;
    }
    pen.drawImage(source, margin, top, source.width * scale, source.height * scale);
    return new Promise((resolve) => {
      canvas.toBlob((blob) => {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(blob);
        link.download = name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);
        resolve(blob);
      }, "image/png");
    });
  }

  return { make, savePNG };
})();
