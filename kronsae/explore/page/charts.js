// Elements and small charts. Text becomes textContent, never markup.

function make(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'vars') {
      for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    } else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function section(title, ...children) {
  return make('section', null, make('h4', null, title), children);
}

const grouped = (count) => count.toLocaleString('en'); // 12,345

const capitalised = (text) => text[0].toUpperCase() + text.slice(1);

// A menu of options {key: [text, ...]}.
function choice(label, options, chosen, onchoice) {
  return make('label', null, label, ' ', make('select', {
    onchange: (event) => onchoice(event.target.value),
  }, Object.entries(options).map(([key, [text]]) => make('option', {
    value: key, selected: key === chosen,
  }, text))));
}

// Three digits: 0.0123, 1.20, 45.6, 789, 12,345.
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  const size = Math.abs(value);
  if (size >= 1000) return grouped(Math.round(value)).replace('-', '−');
  return String(Number(value.toPrecision(size < 0.001 ? 2 : 3))).replace('-', '−');
}

function percent(share) {
  if (share === null || share === undefined || Number.isNaN(share)) return '–';
  const value = 100 * share;
  return `${value >= 1 ? value.toFixed(1) : Number(value.toPrecision(2))} %`;
}

// A token by itself: its spaces shown, its text cut by the style.
function chip(text, note) {
  const shown = text.replace(/^ +| +$/g, (blanks) => '·'.repeat(blanks.length));
  return make('span', { class: 'chip', title: note }, shown === '' ? '∅' : shown);
}

const PLOT = { width: 340, height: 150, left: 46, right: 20, top: 8, bottom: 26 };

// series: [{name, points: [[x, y]], style}]; a step chart draws each point as a bar's top.
function plot({ label, series, x, y, steps = false }) {
  const inner = PLOT.width - PLOT.left - PLOT.right;
  const tall = PLOT.height - PLOT.top - PLOT.bottom;
  const across = (value) => PLOT.left + inner * (value - x.from) / (x.to - x.from || 1);
  const up = (value) => PLOT.top + tall * (1 - (value - y.from) / (y.to - y.from || 1));
  const at = (value) => value.toFixed(1);
  const parts = y.ticks.map((tick) => [
    svg('path', { class: 'rule', d: `M${PLOT.left} ${at(up(tick))}h${inner}` }),
    svg('text', { x: PLOT.left - 5, y: up(tick) + 4, 'text-anchor': 'end' }, y.text(tick)),
  ]);
  parts.push(x.ticks.map((tick) => svg('text', {
    x: across(tick), y: PLOT.height - 8, 'text-anchor': 'middle',
  }, x.text(tick))));
  for (const { points, style } of series) {
    if (!points.length) continue;
    const path = points.map(([a, b], number) => {
      const here = `${at(across(a))} ${at(up(Math.min(y.to, Math.max(y.from, b))))}`;
      if (!number) return `M${here}`;
      return steps ? `V${here.split(' ')[1]}H${here.split(' ')[0]}` : `L${here}`;
    }).join('');
    parts.push(svg('path', { class: `line ${style}`, d: path }));
  }
  const legend = series.length > 1 && make('p', { class: 'legend' }, series.map(
    ({ name, style }) => make('span', { class: style }, name)));
  return make('figure', { class: 'plot' },
    make('figcaption', null, label),
    svg('svg', {
      viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, role: 'img', 'aria-label': label,
    }, parts.flat()),
    legend || null);
}

// How values of groups are distributed: shares of each group in `count` bins from `from` to `to`.
function distribution(label, groups, { from, to, count, ticks, text, map = (v) => v }) {
  const series = groups.map(({ name, style, values }) => {
    const bins = new Array(count).fill(0);
    let total = 0;
    for (const value of values) {
      const bin = Math.floor(count * (map(value) - from) / (to - from));
      if (Number.isNaN(bin)) continue;
      bins[Math.min(count - 1, Math.max(0, bin))] += 1;
      total += 1;
    }
    const edge = (bin) => from + (to - from) * bin / count;
    const points = [[from, 0]];
    bins.forEach((size, bin) => points.push([edge(bin), size / (total || 1)],
      [edge(bin + 1), size / (total || 1)]));
    points.push([to, 0]);
    return { name, style, points };
  });
  const highest = Math.max(0.01, ...series.flatMap(({ points }) => points.map((p) => p[1])));
  return plot({
    label, series, x: { from, to, ticks, text },
    y: { from: 0, to: highest, ticks: [0, highest / 2, highest], text: percent },
    steps: true,
  });
}

// Bars of equal bins over [0, top).
function histogram(counts, top, label) {
  const used = counts.length;
  const highest = Math.max(1, ...counts);
  const width = 320; const height = 84; const base = 66;
  const bars = [...counts].map((count, bin) => {
    const tall = count ? Math.max(1, base * Math.sqrt(count / highest)) : 0;
    const range = `${short(top * bin / used)} to ${short(top * (bin + 1) / used)}`;
    return svg('rect', {
      x: (bin * width / used + 0.5).toFixed(1), y: (base - tall).toFixed(1),
      width: (width / used - 1).toFixed(1), height: tall.toFixed(1),
    }, svg('title', null, `${range}: ${grouped(count)}`));
  });
  const ticks = [0, top / 2, top].map((value, i) => svg('text', {
    x: i * width / 2, y: height - 3, 'text-anchor': ['start', 'middle', 'end'][i],
  }, short(value)));
  return svg('svg', {
    class: 'histogram', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label,
  }, bars, svg('path', { class: 'rule', d: `M0 ${base}h${width}` }), ticks);
}
