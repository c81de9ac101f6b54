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

// Bars of counts in equal bins, as high as their roots; `text` names a place from 0 to 1.
function histogram(counts, label, text) {
  const highest = Math.max(1, ...counts);
  const width = 320; const height = 84; const base = 66;
  const bars = [...counts].map((count, bin) => {
    const tall = count ? Math.max(1, base * Math.sqrt(count / highest)) : 0;
    const range = `${text(bin / counts.length)} to ${text((bin + 1) / counts.length)}`;
    return svg('rect', {
      x: (bin * width / counts.length + 0.5).toFixed(1), y: (base - tall).toFixed(1),
      width: (width / counts.length - 1).toFixed(1), height: tall.toFixed(1),
    }, svg('title', null, `${range}: ${grouped(count)}`));
  });
  const ticks = ['start', 'middle', 'end'].map((anchor, i) => svg('text', {
    x: i * width / 2, y: height - 3, 'text-anchor': anchor,
  }, text(i / 2)));
  return svg('svg', {
    class: 'histogram', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label,
  }, bars, svg('path', { class: 'rule', d: `M0 ${base}h${width}` }), ticks);
}
