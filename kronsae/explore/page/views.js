// What is shown for each address.

function introduction() {
  const kron = grid.kron ? ` in ${grouped(grid.heads)} heads of ${grid.m} base × `
    + `${grid.n} extension` : '';
  const of = facts.target ? `predicting ${facts.target} from ${facts.hookpoint}` : facts.hookpoint;
  const trained = facts.trained === null ? '' : `, trained on ${grouped(facts.trained)} tokens`;
  const massive = facts.massive ? ` (and not on ${grouped(facts.massive)} massive ones)` : '';
  return make('div', null,
    make('h1', null, facts.kind, make('small', null, facts.run)),
    make('p', null, make('strong', null, `${grouped(facts.latents)} latents`), kron,
      `, ${facts.active}: ${of} of ${facts.model}${trained}. `
      + `Everything here was seen on ${grouped(facts.tokens)} tokens of ${facts.dataset}${massive}, `
      + `on which ${grouped(facts.summary.groups.latent.fire)} latents fire.`));
}

// How the values of a property are distributed, a histogram for latents, bases and extensions.
function distribution(label, name, { from, to, map = (v) => v, text = short }) {
  const groups = { latent: index[`post.${name}`].data };
  if (grid.kron) {
    const pre = index[`pre.${name}`].data;
    groups.base = pre.filter((_, row) => row % PRE_PER_HEAD < grid.m);
    groups.extension = pre.filter((_, row) => row % PRE_PER_HEAD >= grid.m);
  }
  return make('figure', null, make('figcaption', null, label),
    Object.entries(groups).map(([kind, values]) => {
      const counts = new Array(36).fill(0);
      for (const value of values) {
        const bin = Math.floor(counts.length * (map(value) - from) / (to - from));
        if (!Number.isNaN(bin)) counts[Math.min(counts.length - 1, Math.max(0, bin))] += 1;
      }
      return make('div', { class: kind }, make('small', null, `${kind}s`),
        histogram(counts, `${label}, ${kind}s`, (share) => text(from + (to - from) * share)));
    }));
}

function distributions() {
  const powers = { map: Math.log10, text: (power) => percent(10 ** power) };
  return [
    distribution('Density (share of tokens, logarithmic)', 'frequency',
      { from: -6, to: 0, ...powers }),
    distribution('Token entropy (nats)', 'entropy', { from: 0, to: 8 }),
    distribution('Multitoken ratio (logarithmic)', 'multitoken', { from: -4, to: 0, ...powers }),
  ];
}

function table(caption, head, rows) {
  return make('div', { class: 'scroll' }, make('table', null, make('caption', null, caption),
    make('thead', null, make('tr', null, head.map((text) => make('th', { scope: 'col' }, text)))),
    make('tbody', null, rows.map(([name, ...cells]) => make('tr', null,
      make('th', { scope: 'row' }, name), cells.map((cell) => make('td', null, cell)))))));
}

function relations() {
  const { groups, correlation, gate, cosines, nearest } = facts.summary;
  const middle = (group, name, text) => (group[name].length ? text(group[name][1]) : '–');
  const out = [table('Medians over those that fire',
    ['', 'fire', 'of', 'density', 'mean activation', 'token entropy', 'multitoken'],
    Object.entries(groups).map(([name, group]) => [`${name}s`,
      grouped(group.fire), grouped(group.count),
      middle(group, 'frequency', percent), middle(group, 'mean', short),
      middle(group, 'entropy', short), middle(group, 'multitoken', percent)]))];
  if (!grid.kron) return out;
  const kin = nearest || {};
  out.push(table('What two latents share', ['', 'mean cosine', 'nearest row shares it'], [
    ['base', short(cosines.same_base), percent(kin.same_base)],
    ['extension', short(cosines.same_extension), percent(kin.same_extension)],
    ['head alone', short(cosines.same_head),
      percent(kin.same_head - kin.same_base - kin.same_extension)],
    ['nothing', short(cosines.other_head), percent(1 - kin.same_head)]]));
  out.push(table('A latent in its head', ['', ''], [
    ['base decides (share of latents)', percent(gate.base_decides)],
    ['active where both fire (median)', percent(gate.selected)],
    ['correlation with own head', short(correlation.head)],
    ['correlation with all others', short(correlation.others)]]));
  return out;
}

let measure = 'frequency'; // of the colours

const colourMenu = (draw) => choice('Colour', MEASURES, measure, (key) => {
  measure = key;
  draw();
});

let chosenHead = 0;

// All heads as small grids on one canvas; the arrow keys move, Enter opens.
function wall() {
  const canvas = make('canvas', {
    tabindex: 0, role: 'application',
    'aria-label': `All ${grid.heads} ${groupName}s. Arrow keys move, Enter opens.`,
  });
  const cursor = make('div', { class: 'cursor', 'aria-hidden': true });
  const frame = make('div', { class: 'wall' }, canvas, cursor);
  const status = make('p', { class: 'status', 'aria-live': 'polite' });
  const cell = facts.latents <= 6000 ? 8 : facts.latents <= 50000 ? 5 : 3;
  const gap = Math.round(cell * 0.75);
  const tile = [grid.n * cell + gap, grid.m * cell + gap];
  let columns = 1;
  const cornerOf = (head) => [(head % columns) * tile[0], Math.floor(head / columns) * tile[1]];

  function draw() {
    if (!frame.clientWidth) return;
    columns = Math.max(1, Math.floor((frame.clientWidth + gap) / tile[0]));
    canvas.width = columns * tile[0] - gap;
    canvas.height = Math.ceil(grid.heads / columns) * tile[1];
    const style = getComputedStyle(document.documentElement);
    const [pale, strong, silent] = ['--pale', '--strong', '--silent'].map(
      (name) => style.getPropertyValue(name));
    const colors = Array.from({ length: 33 }, (_, step) => (
      `color-mix(in srgb, ${strong} ${100 * step / 32}%, ${pale})`));
    const scale = scaleOf('post', measure);
    const pen = canvas.getContext('2d');
    index[`post.${measure}`].data.forEach((value, number) => {
      const { head, i, j } = latentAt(number);
      const [left, top] = cornerOf(head);
      pen.fillStyle = Number.isNaN(value) ? silent : colors[Math.round(32 * scale(value))];
      pen.fillRect(left + j * cell, top + i * cell, cell - 1, cell - 1);
    });
    mark();
  }

  function mark() {
    const [left, top] = cornerOf(chosenHead);
    Object.assign(cursor.style, {
      left: `${left - 2}px`, top: `${top - 2}px`,
      width: `${grid.n * cell + 3}px`, height: `${grid.m * cell + 3}px`,
    });
  }

  function choose(head) {
    if (head === undefined || head < 0 || head >= grid.heads) return;
    chosenHead = head;
    mark();
    const best = Array.from({ length: PER_HEAD }, (_, at) => head * PER_HEAD + at)
      .filter((number) => number < facts.latents && !Number.isNaN(index['post.max'].data[number]))
      .sort((a, b) => index['post.frequency'].data[b] - index['post.frequency'].data[a])
      .slice(0, 6);
    const link = make('a', { href: `#/head/${head}` }, `${capitalised(groupName)} ${head}`);
    status.replaceChildren(link, best.length ? '' : ' never fires here');
    readLists().then(() => {
      if (status.firstChild !== link) return; // another head was chosen meanwhile
      status.append(' ', ...best.map((number) => chip(tokensOf(latentAt(number), 1)[0] ?? '∅')));
    });
  }

  function headAt(event) {
    const box = canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / tile[0]);
    const row = Math.floor((event.clientY - box.top) / tile[1]);
    return column < columns ? row * columns + column : undefined;
  }

  canvas.addEventListener('pointermove', (event) => choose(headAt(event)));
  canvas.addEventListener('click', (event) => {
    choose(headAt(event));
    location.hash = `#/head/${chosenHead}`;
  });
  canvas.addEventListener('keydown', (event) => {
    const step = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
    }[event.key];
    if (event.key === 'Enter') location.hash = `#/head/${chosenHead}`;
    if (step === undefined) return;
    event.preventDefault();
    choose(chosenHead + step);
    cursor.scrollIntoView({ block: 'nearest' });
  });
  choose(chosenHead);
  new ResizeObserver(draw).observe(frame);
  return make('section', { class: 'heads' },
    make('div', { class: 'tools' },
      make('h2', null, grid.kron ? 'Heads' : 'Latents'), colourMenu(draw)),
    make('p', { class: 'faint' }, grid.kron
      ? `Each square is a head: a row for each of its ${grid.m} bases, a column for each of its `
        + `${grid.n} extensions, and in each cell the latent that the two compose.`
      : `Each square holds ${PER_HEAD} latents, by number.`),
    frame, status);
}

function overview() {
  return [introduction(),
    make('p', null, make('a', { href: '#/latents' }, 'A table of all latents'), ', to sort and filter.'),
    wall(),
    make('section', null, make('h2', null, 'On held-out text'),
      facts.warning && make('p', null, make('strong', null, 'Warning: '), `${facts.warning}.`),
      make('dl', { class: 'stats' }, facts.figures.map((figure) => stat(...figure)))),
    make('section', null, make('h2', null, 'Properties'),
      make('div', { class: 'plots' }, distributions()),
      make('div', { class: 'tables' }, relations()))];
}

// A head: a table of the latents that its bases and extensions compose, and one of them in full.
function headGrid(head, chosen) {
  const scale = scaleOf('post', measure);
  const preScale = grid.kron && scaleOf('pre', measure);
  const [, text] = MEASURES[measure];

  function cell(unit, scaled) {
    const value = valueOf(unit, measure);
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
  return make('div', { class: 'scroll' }, make('table', { class: 'grid' }, caption,
    columns || null, make('tbody', null, rows)));
}

async function headView(unit) {
  const { head } = unit;
  const previous = head > 0 ? `#/head/${head - 1}` : undefined;
  const next = head < grid.heads - 1 ? `#/head/${head + 1}` : undefined;
  const turn = (href, text, label) => make('a', {
    href, class: 'turn', 'aria-label': label, 'aria-disabled': href ? undefined : 'true',
  }, text);
  return [make('div', { class: 'headpage' },
    make('section', { class: 'left' },
      make('div', { class: 'tools' },
        make('h2', null, `${capitalised(groupName)} ${head}`,
          make('small', null, ` of ${grouped(grid.heads)}`)),
        turn(previous, '←', `previous ${groupName}`), turn(next, '→', `next ${groupName}`),
        colourMenu(route)),
      headGrid(head, unit)),
    await unitView(unit),
    grid.kron && unit.kind === 'latent' ? await parentsOf(unit) : null)];
}

function strongestIn(head) {
  const { data } = index['post.max'];
  let best = head * PER_HEAD;
  for (let f = best; f < Math.min(facts.latents, (head + 1) * PER_HEAD); f += 1) {
    if (data[f] > (data[best] || 0)) best = f;
  }
  return latentAt(best);
}
