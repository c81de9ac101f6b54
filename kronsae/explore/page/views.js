// What is shown for each address.

const GROUPS = [
  ['latent', 'post', () => true],
  ['base', 'pre', (row) => row % PRE_PER_HEAD < grid.m],
  ['extension', 'pre', (row) => row % PRE_PER_HEAD >= grid.m],
];

function valuesOf(group, name, belongs) {
  const { data } = index[`${group}.${name}`];
  return group === 'post' ? data : data.filter((_, row) => belongs(row));
}

function introduction() {
  const { summary } = facts;
  const kron = grid.kron ? ` in ${grouped(grid.heads)} heads of ${grid.m} base × `
    + `${grid.n} extension` : '';
  const of = facts.target ? `predicting ${facts.target} from ${facts.hookpoint}` : facts.hookpoint;
  const fires = summary.groups.latent.fire;
  return make('div', { class: 'intro' },
    make('h1', null, facts.kind, make('small', null, facts.run)),
    make('p', null, make('strong', null, `${grouped(facts.latents)} latents`), kron,
      `, ${facts.active}: ${of} of `
      + `${facts.model}, trained on ${grouped(facts.trained)} tokens. Everything here `
      + `was seen on ${grouped(facts.tokens)} tokens of ${facts.dataset}, on which `
      + `${grouped(fires)} latents fire.`));
}

function figures() {
  return make('dl', { class: 'stats' }, facts.figures.map((figure) => stat(...figure)));
}

function trainingPlot() {
  const { train, heldout } = facts.curves;
  if (train.length + heldout.length < 2) return null;
  const last = Math.max(...[...train, ...heldout].map(([tokens]) => tokens));
  const text = (value) => (value >= 1e9 ? `${value / 1e9} B` : value >= 1e6 ? `${value / 1e6} M`
    : value >= 1e3 ? `${Math.round(value / 1e3)} k` : String(value));
  return plot({
    label: 'Explained variance by tokens of training',
    series: [
      { name: 'training batches', points: train, style: 'latent' },
      { name: 'held-out text', points: heldout, style: 'extension' },
    ],
    x: { from: 0, to: last, ticks: [0, last / 2, last], text },
    y: { from: 0, to: 1, ticks: [0, 0.25, 0.5, 0.75, 1], text: (v) => v.toFixed(2) },
  });
}

function distributions() {
  const groups = grid.kron ? GROUPS : GROUPS.slice(0, 1);
  const of = (name) => groups.map(([style, group, belongs]) => ({
    name: `${style}s`, style, values: valuesOf(group, name, belongs),
  }));
  const powers = (from, count, ticks) => ({
    from, to: 0, count, ticks, text: (power) => (power ? `1e${power}` : '1'), map: Math.log10,
  });
  return [
    distribution('Frequency (share of tokens, logarithmic)', of('frequency'),
      powers(-6, 36, [-6, -4, -2, 0])),
    distribution('Token entropy (nats)', of('entropy'), {
      from: 0, to: 8, count: 32, ticks: [0, 2, 4, 6, 8], text: String,
    }),
    distribution('Multitoken ratio (logarithmic)', of('multitoken'),
      powers(-4, 32, [-4, -3, -2, -1, 0])),
  ];
}

function table(caption, head, rows) {
  return make('div', { class: 'scroll' }, make('table', null, make('caption', null, caption),
    make('thead', null, make('tr', null, head.map((text) => make('th', { scope: 'col' }, text)))),
    make('tbody', null, rows.map(([name, ...cells]) => make('tr', null,
      make('th', { scope: 'row' }, name), cells.map((cell) => make('td', null, cell)))))));
}

function relations() {
  const { groups, correlation, parents, gate, use, cosines, nearest } = facts.summary;
  const middle = (group, name, text) => (group[name].length ? text(group[name][1]) : '–');
  const out = [table('Medians over those that fire',
    ['', 'fire', 'of', 'frequency', 'mean', 'token entropy', 'multitoken'],
    Object.entries(groups).map(([name, group]) => [`${name}s`,
      grouped(group.fire), grouped(group.count),
      middle(group, 'frequency', percent), middle(group, 'mean', short),
      middle(group, 'entropy', short), middle(group, 'multitoken', percent)]))];
  if (!grid.kron) return out;
  out.push(table('A latent and its parents (rank correlation over latents)',
    ['', 'base', 'extension'],
    Object.entries(parents).map(([name, each]) => [name, short(each.base),
      short(each.extension)])));
  const kin = nearest || {};
  out.push(table('What two latents share', ['', 'mean cosine', 'nearest row is such'], [
    ['base', short(cosines.same_base), percent(kin.same_base)],
    ['extension', short(cosines.same_extension), percent(kin.same_extension)],
    ['head alone', short(cosines.same_head),
      percent(kin.same_head - kin.same_base - kin.same_extension)],
    ['nothing', short(cosines.other_head), percent(1 - kin.same_head)]]));
  out.push(table('Heads in use', ['', ''], [
    ['heads, in effect', `${short(use.heads)} of ${grid.heads}`],
    ['bases of a head', `${short(use.bases)} of ${grid.m}`],
    ['extensions of a head', `${short(use.extensions)} of ${grid.n}`],
    ['latents of a head', `${short(use.latents)} of ${PER_HEAD}`],
    ['base decides (share of latents)', percent(gate.base_decides)],
    ['active where both fire (median)', percent(gate.selected)],
    ['correlation with own head', short(correlation.head)],
    ['correlation with all others', short(correlation.others)]]));
  return out;
}

// All heads as small grids on one canvas; the arrow keys move, Enter opens.
const wallState = { measure: 'frequency', order: 'number', chosen: 0 };

function wall() {
  const canvas = make('canvas', {
    tabindex: 0, role: 'application',
    'aria-label': `All ${grid.heads} ${groupName}s. Arrow keys move, Enter opens.`,
  });
  const status = make('p', { class: 'status', 'aria-live': 'polite' });
  const menu = (label, name, options) => choice(label, options, wallState[name], (key) => {
    wallState[name] = key;
    sort();
    draw();
  });
  const measure = menu('Colour', 'measure', MEASURES);
  const order = menu('Order', 'order', {
    number: ['by number'], use: ['by activity'], entropy: ['by token entropy'],
  });
  const frame = make('div', { class: 'wall' }, canvas);
  let heads = []; let columns = 1; let tile = [1, 1]; let cell = 1;

  function sort() {
    heads = Array.from({ length: grid.heads }, (_, head) => head);
    if (wallState.order === 'number') return;
    const name = wallState.order === 'use' ? 'frequency' : 'entropy';
    const { data } = index[`post.${name}`];
    const score = heads.map((head) => {
      let sum = 0; let count = 0;
      for (let f = head * PER_HEAD; f < Math.min(data.length, (head + 1) * PER_HEAD); f += 1) {
        if (!Number.isNaN(data[f])) { sum += data[f]; count += 1; }
      }
      if (!count) return name === 'frequency' ? 0 : Infinity;
      return name === 'frequency' ? sum : sum / count;
    });
    const sign = name === 'frequency' ? -1 : 1;
    heads.sort((a, b) => sign * (score[a] - score[b]) || a - b);
  }

  const cornerOf = (order) => [
    (order % columns) * tile[0], Math.floor(order / columns) * tile[1]];

  function draw() {
    const width = frame.clientWidth;
    if (!width) return;
    cell = facts.latents <= 6000 ? 8 : facts.latents <= 50000 ? 5 : 3;
    const gap = Math.max(2, Math.round(cell * 0.75));
    tile = [grid.n * cell + gap, grid.m * cell + gap];
    columns = Math.max(1, Math.floor((width + gap) / tile[0]));
    const rows = Math.ceil(heads.length / columns);
    const size = [columns * tile[0] - gap, rows * tile[1]];
    const dense = Math.min(2, window.devicePixelRatio || 1);
    const ratio = size[0] * size[1] * dense * dense > 2e7 ? 1 : dense;
    canvas.width = size[0] * ratio;
    canvas.height = size[1] * ratio;
    canvas.style.width = `${size[0]}px`;
    canvas.style.height = `${size[1]}px`;
    const style = getComputedStyle(document.documentElement);
    const ramp = ['--pale', '--strong'].map((name) => rgbOf(style.getPropertyValue(name)));
    const silent = style.getPropertyValue('--silent');
    const colors = Array.from({ length: 33 }, (_, step) => mix(ramp, step / 32));
    const scale = scaleOf('post', wallState.measure);
    const { data } = index[`post.${wallState.measure}`];
    const pen = canvas.getContext('2d');
    pen.scale(ratio, ratio);
    const inset = cell >= 5 ? 1 : 0.5;
    heads.forEach((head, order) => {
      const [left, top] = cornerOf(order);
      for (let at = 0; at < PER_HEAD; at += 1) {
        const value = data[head * PER_HEAD + at];
        if (value === undefined) break;
        pen.fillStyle = Number.isNaN(value) ? silent : colors[Math.round(32 * scale(value))];
        pen.fillRect(left + (at % grid.n) * cell, top + Math.floor(at / grid.n) * cell,
          cell - inset, cell - inset);
      }
    });
    mark();
  }

  // Only a frame around the chosen head, which lies above the canvas.
  const cursor = make('div', { class: 'cursor', 'aria-hidden': true });
  frame.append(cursor);

  function mark() {
    const order = heads.indexOf(wallState.chosen);
    if (order < 0) return;
    const [left, top] = cornerOf(order);
    Object.assign(cursor.style, {
      left: `${left - 2}px`, top: `${top - 2}px`,
      width: `${grid.n * cell + 3}px`, height: `${grid.m * cell + 3}px`,
    });
  }

  function choose(head) {
    if (head === undefined || head < 0) return;
    wallState.chosen = head;
    mark();
    const best = Array.from({ length: PER_HEAD }, (_, at) => head * PER_HEAD + at)
      .filter((number) => number < facts.latents && !Number.isNaN(index['post.max'].data[number]))
      .sort((a, b) => index['post.frequency'].data[b] - index['post.frequency'].data[a])
      .slice(0, 6);
    status.replaceChildren(
      make('a', { href: `#/head/${head}` }, `${capitalised(groupName)} ${head}`), ' ',
      ...(best.length ? best.map((number) => chip(tokensOf(latentAt(number), 1)[0] ?? '∅'))
        : [' never fires here']));
  }

  function headAt(event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / tile[0]);
    const row = Math.floor((event.clientY - box.top) / tile[1]);
    return column < columns ? heads[row * columns + column] : undefined;
  }

  canvas.addEventListener('pointermove', (event) => choose(headAt(event)));
  canvas.addEventListener('click', (event) => {
    const head = headAt(event);
    if (head !== undefined) location.hash = `#/head/${head}`;
  });
  canvas.addEventListener('keydown', (event) => {
    const step = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
    }[event.key];
    if (event.key === 'Enter') location.hash = `#/head/${wallState.chosen}`;
    if (step === undefined) return;
    event.preventDefault();
    choose(heads[heads.indexOf(wallState.chosen) + step]);
    cursor.scrollIntoView({ block: 'nearest' });
  });
  sort();
  choose(wallState.chosen);
  watchWidth(frame, draw);
  return make('section', { class: 'heads' },
    make('div', { class: 'tools' },
      make('h2', null, grid.kron ? 'Heads' : 'Latents'), measure, order),
    make('p', { class: 'faint' }, grid.kron
      ? `Each square is a head: a row for each of its ${grid.m} bases, a column for each of its `
        + `${grid.n} extensions, and in each cell the latent that the two compose.`
      : `Each square holds ${PER_HEAD} latents, by number.`),
    frame, status);
}

function rgbOf(color) {
  const pen = document.createElement('canvas').getContext('2d');
  pen.fillStyle = color.trim();
  return [1, 3, 5].map((at) => parseInt(pen.fillStyle.slice(at, at + 2), 16));
}

function mix([from, to], share) {
  return `rgb(${from.map((each, at) => Math.round(each + (to[at] - each) * share)).join(' ')})`;
}

let watched = null; // the one thing on the page that is drawn for its width

function watchWidth(element, draw) {
  watched = draw;
  new ResizeObserver(() => { if (watched === draw) draw(); }).observe(element);
}

function overview() {
  return [introduction(), wall(),
    make('section', null, make('h2', null, 'On held-out text'), figures()),
    make('section', null, make('h2', null, 'Properties'),
      make('div', { class: 'plots' }, trainingPlot(), distributions()),
      make('div', { class: 'tables' }, relations()))];
}

// A head: a table of the latents that its bases and extensions compose, and one of them in full.
let headMeasure = 'frequency';

function headGrid(head, chosen) {
  const scale = scaleOf('post', headMeasure);
  const preScale = grid.kron && scaleOf('pre', headMeasure);
  const [, text] = MEASURES[headMeasure];

  function cell(unit, scaled) {
    const value = valueOf(unit, headMeasure);
    const silent = Number.isNaN(value);
    const tokens = tokensOf(unit, 2);
    const current = addressOf(unit) === addressOf(chosen);
    return make('a', {
      href: addressOf(unit), class: `cell ${unit.kind}${silent ? ' silent' : ''}`,
      'aria-current': current ? 'true' : undefined,
      'aria-label': `${nameOf(unit)}: ${tokens.join(', ') || 'never fires'}, ${text(value)}`,
      vars: { '--t': silent ? 0 : scaled(value).toFixed(2) },
    }, make('span', { class: 'chips' }, tokens.map((each) => chip(each))),
    make('small', null, silent ? 'silent' : text(value)));
  }

  const first = head * PER_HEAD;
  const rows = [];
  for (let i = 0; i < grid.m; i += 1) {
    const cells = [];
    for (let j = 0; j < grid.n; j += 1) {
      const number = first + i * grid.n + j;
      cells.push(make('td', null,
        number < facts.latents ? cell(latentAt(number), scale) : null));
    }
    rows.push(make('tr', null, grid.kron
      ? make('th', { scope: 'row' }, cell(baseAt(head, i), preScale)) : null, cells));
  }
  const columns = grid.kron && make('thead', null, make('tr', null,
    make('td', { class: 'corner' }, make('span', null, 'base ↓'), make('span', null, 'ext. →')),
    Array.from({ length: grid.n }, (_, j) => make('th', { scope: 'col' },
      cell(extensionAt(head, j), preScale)))));
  const caption = make('caption', { class: 'hidden' }, grid.kron
    ? `Head ${head}: a row for each base, a column for each extension`
    : `Latents ${first} to ${first + PER_HEAD - 1}`);
  return make('div', { class: 'scroll' }, make('table', { class: 'grid', onkeydown: moveInGrid },
    caption, columns || null, make('tbody', null, rows)));
}

function moveInGrid(event) {
  const step = {
    ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
  }[event.key];
  const cell = event.target.closest('td, th');
  if (!step || !cell) return;
  event.preventDefault();
  const row = [...event.currentTarget.rows][cell.parentElement.rowIndex + step[0]];
  row?.cells[cell.cellIndex + step[1]]?.querySelector('a')?.focus();
}

async function headView(head, chosen) {
  const previous = head > 0 ? `#/head/${head - 1}` : undefined;
  const next = head < grid.heads - 1 ? `#/head/${head + 1}` : undefined;
  const turn = (href, text, label) => make('a', {
    href, class: 'turn', 'aria-label': label, 'aria-disabled': href ? undefined : 'true',
  }, text);
  const unit = chosen ?? strongestOf(head);
  const measure = choice('Colour', MEASURES, headMeasure, (key) => {
    headMeasure = key;
    route();
  });
  const view = await unitView(unit);
  return [make('div', { class: 'headpage' },
    make('section', { class: 'left' },
      make('div', { class: 'tools' },
        make('h2', null, `${capitalised(groupName)} ${head}`,
          make('small', null, ` of ${grouped(grid.heads)}`)),
        turn(previous, '←', `previous ${groupName}`), turn(next, '→', `next ${groupName}`),
        measure),
      headGrid(head, unit)),
    view,
    grid.kron && unit.kind === 'latent' ? await parentsOf(unit) : null)];
}

function strongestOf(head) {
  const { data } = index['post.max'];
  let best = head * PER_HEAD;
  for (let f = best; f < Math.min(facts.latents, (head + 1) * PER_HEAD); f += 1) {
    if (data[f] > (data[best] || 0)) best = f;
  }
  return latentAt(best);
}

// Search: a number, tokens, and text in the examples.

const FOUND = 40;
const UNIT_GROUPS = grid.kron ? ['post', 'pre'] : ['post'];

function unitLine(unit, rest) {
  return make('li', null, make('a', { href: addressOf(unit), class: unit.kind }, unit.kind
    === 'latent' ? nameOf(unit) : `head ${unit.head}, ${nameOf(unit)}`), rest);
}

function unitAtRow(group, row) {
  if (group === 'post') return latentAt(row);
  const head = Math.floor(row / PRE_PER_HEAD);
  const inHead = row - head * PRE_PER_HEAD;
  return inHead < grid.m ? baseAt(head, inHead) : extensionAt(head, inHead - grid.m);
}

function byToken(query) {
  const wanted = query.trim().toLowerCase();
  const exact = new Set(); const partial = new Set();
  vocabulary.forEach((text, number) => {
    const plain = text.trim().toLowerCase();
    if (plain === wanted || text === query) exact.add(number);
    else if (wanted && plain.includes(wanted)) partial.add(number);
  });
  const found = [];
  for (const group of UNIT_GROUPS) {
    const { data, shape } = index[`${group}.tokens`];
    const shares = index[`${group}.shares`].data;
    const best = new Map();
    for (let at = 0; at < data.length; at += 1) {
      const hit = exact.has(data[at]) ? 2 : partial.has(data[at]) ? 1 : 0;
      if (!hit || !shares[at]) continue;
      const row = Math.floor(at / shape[1]);
      const score = shares[at] / 255 + (hit - 1);
      if (score > (best.get(row)?.score ?? 0)) best.set(row, { score, share: shares[at] / 255 });
    }
    for (const [row, each] of best) found.push({ ...each, unit: unitAtRow(group, row) });
  }
  return found.sort((a, b) => b.score - a.score);
}

function numbersIn(query) {
  const match = query.trim().match(/^(latent|head|group)?\s*(\d+)$/i);
  if (!match) return [];
  const [kind, number] = [match[1]?.toLowerCase(), Number(match[2])];
  const out = [];
  if ((!kind || kind === 'latent') && number < facts.latents) {
    out.push(make('li', null, make('a', { href: `#/latent/${number}` }, `latent ${number}`)));
  }
  if ((!kind || kind !== 'latent') && number < grid.heads) {
    out.push(make('li', null,
      make('a', { href: `#/head/${number}` }, `${groupName} ${number}`)));
  }
  return out;
}

function findView(query) {
  const numbers = numbersIn(query);
  const tokens = byToken(query);
  const list = make('ol', { class: 'found' });
  const more = make('button', { type: 'button', onclick: () => show() });
  let shown = 0;
  function show() {
    tokens.slice(shown, shown + FOUND).forEach(({ unit, share }) => list.append(unitLine(unit, [
      make('b', null, percent(share)),
      make('span', { class: 'chips' }, tokensOf(unit).map((text) => chip(text)))])));
    shown = Math.min(tokens.length, shown + FOUND);
    more.textContent = `${grouped(tokens.length - shown)} more`;
    more.hidden = shown === tokens.length;
  }
  show();
  const progress = make('p', { class: 'faint', 'aria-live': 'polite' });
  const texts = make('ol', { class: 'found texts' });
  searchTexts(query, texts, progress);
  return [make('h1', null, 'Search', make('small', null, query)),
    numbers.length ? make('ul', { class: 'found' }, numbers) : null,
    make('section', null,
      make('h2', null, `Fires on such tokens: ${grouped(tokens.length)}`),
      make('p', { class: 'faint' }, 'Latents, bases and extensions with the token among the '
        + 'four that most of their activation lies on, and its share.'), list, more),
    make('section', null, make('h2', null, 'In the strongest examples'), progress, texts)];
}

async function searchTexts(query, list, progress) {
  const wanted = query.toLowerCase();
  if (wanted.trim().length < 2) {
    progress.textContent = 'Type two letters or more to search the examples.';
    return;
  }
  let found = 0;
  const address = location.hash;
  for (let head = 0; head < grid.heads && found < 100; head += facts.perBlock) {
    const block = await details(head);
    if (location.hash !== address) return;
    for (const group of UNIT_GROUPS) {
      const width = group === 'post' ? PER_HEAD : PRE_PER_HEAD;
      const count = block[`${group}.top.peaks`].shape[0];
      for (let row = 0; row < count && found < 100; row += 1) {
        const hit = hitIn(block, group, row, wanted);
        if (hit) {
          found += 1;
          list.append(unitLine(unitAtRow(group, head * width + row),
            make('ol', { class: 'examples' }, hit)));
        }
      }
    }
    const share = Math.min(1, (head + facts.perBlock) / grid.heads);
    progress.textContent = `${found} found, ${Math.round(100 * share)} % searched`;
  }
  progress.textContent = found >= 100 ? 'The first 100 found.' : `${found} found.`;
}

// The first of its strongest examples that holds the text near its middle.
function hitIn(block, group, row, wanted) {
  const hit = examplesOf(block, group, 'top', row).find(
    ({ tokens }) => textsOf(tokens).join('').toLowerCase().includes(wanted));
  return hit && exampleLine(hit, hit.peak);
}
