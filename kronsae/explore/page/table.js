// A table of all latents, sorted and filtered as its address says: #/latents?sort=-density&…
// Only the rows that are seen exist, so that it is as fast with 2^17 latents as with a hundred.

const firstToken = (name) => (f) => rowOf(lists[name], f)[0];
const ofIndex = (name) => (f) => index[`post.${name}`].data[f];

// Columns: title, the value that sorts it, what a cell shows; ranks: of texts, sorted by their order.
const COLUMNS = {
  latent: {
    title: 'Latent', value: (f) => f,
    cell: (f) => make('a', { href: `#/latent/${f}`, tabindex: -1 }, String(f)),
  },
  head: {
    title: capitalised(groupName), value: (f) => Math.floor(f / PER_HEAD),
    cell: (f) => String(Math.floor(f / PER_HEAD)),
  },
  label: { title: 'Label', value: (f) => labelOf(f)?.text, cell: (f) => labelText(f) },
  token: {
    title: 'Top tokens', value: firstToken('post.tokens'), tokens: true,
    cell: (f) => chips(tokensOf(latentAt(f), 3)),
  },
  density: {
    title: 'Density', value: (f) => ofIndex('frequency')(f) || 0,
    cell: (f) => percent(ofIndex('frequency')(f) || 0), note: 'share of tokens on which it fires',
  },
  max: { title: 'Max act.', value: ofIndex('max'), cell: (f) => short(ofIndex('max')(f)) },
  mean: {
    title: 'Mean act.', value: ofIndex('mean'), cell: (f) => short(ofIndex('mean')(f)),
    note: 'mean activation where it fires',
  },
  entropy: {
    title: 'Entropy', value: ofIndex('entropy'), cell: (f) => short(ofIndex('entropy')(f)),
    note: 'token entropy, in nats',
  },
  ...(facts.logits ? {
    promotes: {
      title: 'Positive logits', value: firstToken('raised'), tokens: true,
      cell: (f) => chips([...rowOf(lists.raised, f)].slice(0, 2).map(textOfToken)),
    },
    logit: {
      title: 'Logit', value: (f) => rowOf(lists.raisedBy, f)[0],
      cell: (f) => short(rowOf(lists.raisedBy, f)[0]), note: 'the largest positive logit',
    },
    suppresses: {
      title: 'Negative logits', value: firstToken('lowered'), tokens: true,
      cell: (f) => chips([...rowOf(lists.lowered, f)].slice(0, 2).map(textOfToken)),
    },
  } : {}),
};

const DENSE = 0.1; // a latent with a larger density is dense

const SHOWN = {
  all: ['all', () => true],
  alive: ['that fire', (f) => ofIndex('frequency')(f) > 0],
  dead: ['dead', (f) => !(ofIndex('frequency')(f) > 0)],
  dense: ['dense (over 10 %)', (f) => ofIndex('frequency')(f) > DENSE],
  labelled: ['labelled', (f) => labels.has(f)],
};

const chips = (texts) => make('span', { class: 'chips' },
  texts.filter((text) => text !== undefined).map((text) => chip(text, text)));

const plainText = (text) => text.trim().toLowerCase();

// Places of all tokens in alphabetical order; at the end what has no letter or digit.
let ranksOfTokens;
function tokenRanks() {
  if (!ranksOfTokens) {
    const keys = vocabulary.map((text) => (/[\p{L}\p{N}]/u.test(text) ? '' : '\uffff') + plainText(text));
    const order = [...keys.keys()].sort((a, b) => (keys[a] < keys[b] ? -1 : Number(keys[a] > keys[b])));
    ranksOfTokens = new Float64Array(keys.length);
    order.forEach((token, rank) => { ranksOfTokens[token] = rank; });
  }
  return ranksOfTokens;
}

// Numbers of latents in the order of a column, those without a value last.
function sorted(numbers, key, descending) {
  const { value, tokens } = COLUMNS[key];
  const ranks = tokens && tokenRanks();
  const sign = descending ? -1 : 1;
  const values = new Map();
  const known = []; const unknown = [];
  for (const f of numbers) {
    const found = ranks ? ranks[value(f)] : value(f);
    if (found === undefined || Number.isNaN(found)) unknown.push(f);
    else {
      values.set(f, typeof found === 'string' ? found.toLowerCase() : found);
      known.push(f);
    }
  }
  known.sort((a, b) => {
    const [one, other] = [values.get(a), values.get(b)];
    return one === other ? a - b : sign * (one < other ? -1 : 1);
  });
  return known.concat(unknown);
}

// Whether a latent's label or one of its tokens holds a text, as a function of the latent.
function holding(text) {
  const wanted = plainText(text);
  if (!wanted) return () => true;
  const hits = vocabulary.map((each) => plainText(each).includes(wanted));
  const arrays = [lists['post.tokens'], lists.raised].filter(Boolean);
  return (f) => labelOf(f)?.text.toLowerCase().includes(wanted)
    || arrays.some((array) => rowOf(array, f).subarray(0, 4).some((token) => hits[token]));
}

// Numbers of the latents that the fields of an address leave.
function filtered(fields) {
  const number = (name, otherwise) => (fields.get(name) && Number.isFinite(Number(fields.get(name)))
    ? Number(fields.get(name)) : otherwise);
  const head = number('head', null);
  const from = Math.max(number('from', 0), head === null ? 0 : head * PER_HEAD);
  const to = Math.min(number('to', Infinity), facts.latents - 1,
    head === null ? Infinity : (head + 1) * PER_HEAD - 1);
  const [least, most] = [number('least', 0) / 100, number('most', 100) / 100];
  const [, isShown] = SHOWN[fields.get('show')] ?? SHOWN.all;
  const holds = holding(fields.get('text') ?? '');
  const density = COLUMNS.density.value;
  const out = [];
  for (let f = Math.ceil(from); f <= to; f += 1) {
    if (isShown(f) && density(f) >= least && density(f) <= most && holds(f)) out.push(f);
  }
  return out;
}

const ROW = 32; // px
const HIGHEST = 8e6; // px that a browser can surely scroll

function tableView(address) {
  const fields = new URLSearchParams(address);
  let order = [];
  let first = 0; // row at the top
  let active = 0;

  const said = make('p', { class: 'faint', role: 'status' });
  const body = make('tbody', null);
  const head = make('tr', null);
  const table = make('table', { class: 'latents' },
    make('caption', { class: 'hidden' }, 'All latents. Arrow keys move, Enter opens.'),
    make('thead', null, head), body);
  const tall = make('div', { class: 'tall' }, table);
  const scroller = make('div', {
    class: 'scroller', tabindex: 0, role: 'group', 'aria-label': 'Table of latents', onscroll: scrolled,
    onkeydown: pressed,
  }, tall);

  const rowsSeen = () => Math.max(1, Math.floor((scroller.clientHeight - ROW) / ROW));
  const beyond = () => Math.max(0, order.length - rowsSeen());

  function scrolled() {
    const room = scroller.scrollHeight - scroller.clientHeight;
    const row = room > 0 ? Math.round(beyond() * scroller.scrollTop / room) : 0;
    if (row !== first) {
      first = row;
      draw();
    }
  }

  function draw(focus) {
    const rows = [];
    for (let row = first; row < Math.min(order.length, first + rowsSeen() + 1); row += 1) {
      const f = order[row];
      rows.push(make('tr', {
        'aria-rowindex': row + 2, class: row === active ? 'active' : undefined,
        onclick: () => { location.hash = `#/latent/${f}`; },
      }, Object.entries(COLUMNS).map(([key, column]) => make(key === 'latent' ? 'th' : 'td', {
        class: `of-${key}`, scope: key === 'latent' ? 'row' : undefined,
      }, column.cell(f)))));
    }
    const held = focus || body.contains(document.activeElement);
    body.replaceChildren(...rows);
    const link = rows[active - first]?.querySelector('a');
    link?.setAttribute('tabindex', 0);
    if (held) (link ?? scroller).focus({ preventScroll: true });
  }

  function pressed(event) {
    const page = rowsSeen() - 1;
    const step = {
      ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity,
    }[event.key];
    if (event.key === 'Enter' && event.target === scroller && order.length) {
      location.hash = `#/latent/${order[active]}`;
    }
    if (step === undefined || event.target.closest('thead') || !order.length) return;
    event.preventDefault();
    const inside = event.target !== scroller;
    active = Math.min(order.length - 1, Math.max(0, inside ? active + step : first + (step > 1 ? step : 0)));
    if (active < first || active >= first + rowsSeen()) {
      first = Math.min(beyond(), Math.max(0, active < first ? active : active - rowsSeen() + 1));
      const room = scroller.scrollHeight - scroller.clientHeight;
      scroller.scrollTop = beyond() ? room * first / beyond() : 0;
    }
    draw(true);
  }

  function sortBy(key) {
    const now = fields.get('sort') ?? 'latent';
    fields.set('sort', now === key ? `-${key}` : key);
    if (now === `-${key}`) fields.set('sort', key);
    renew(key);
  }

  // Filter and sort anew, and say so in the address, without a new entry in the history.
  function renew(focus) {
    for (const [name, value] of [...fields]) if (!value) fields.delete(name);
    if (focus !== null) {
      const asked = fields.toString();
      history.replaceState(null, '', asked ? `#/latents?${asked}` : '#/latents');
      main.dataset.address = location.hash;
    }
    const sort = fields.get('sort') ?? 'latent';
    const descending = sort.startsWith('-');
    const key = Object.hasOwn(COLUMNS, sort.replace('-', '')) ? sort.replace('-', '') : 'latent';
    order = sorted(filtered(fields), key, descending);
    [first, active] = [0, 0];
    scroller.scrollTop = 0;
    head.replaceChildren(...Object.entries(COLUMNS).map(([each, { title, note }]) => make('th', {
      scope: 'col', class: `of-${each}`, title: note,
      'aria-sort': each !== key ? undefined : descending ? 'descending' : 'ascending',
    }, make('button', { type: 'button', onclick: () => sortBy(each) }, title))));
    if (focus) head.querySelector(`.of-${focus} button`).focus();
    table.setAttribute('aria-rowcount', order.length + 1);
    table.classList.toggle('labelled', labels.size > 0);
    tall.style.setProperty('--tall', `${Math.min(HIGHEST, (order.length + 1.5) * ROW)}px`);
    said.textContent = `${grouped(order.length)} of ${grouped(facts.latents)} latents`;
    draw();
  }

  const field = (name, label, attributes) => make('label', null, label, ' ', make('input', {
    name, value: fields.get(name) ?? undefined, autocomplete: 'off', ...attributes,
    oninput: (event) => {
      fields.set(name, event.target.value);
      renew();
    },
  }));
  const number = (name, label, most, whole) => field(name, label, {
    type: 'number', min: 0, max: most, step: 'any', 'aria-label': whole,
  });
  const shown = choice('Latents', SHOWN, fields.get('show') ?? 'all', (key) => {
    fields.set('show', key === 'all' ? '' : key);
    renew();
  });
  renew(null);
  new ResizeObserver(() => draw()).observe(scroller);
  return [make('h1', null, 'Latents'),
    make('form', { class: 'filters', role: 'search', 'aria-label': 'Filter', onsubmit: (event) => event.preventDefault() },
      field('text', 'Token, logit or label', { type: 'search' }), shown,
      make('span', { class: 'pair' }, number('least', 'Density, % from', 100), number('most', 'to', 100, 'Density, % to')),
      make('span', { class: 'pair' }, number('from', 'Numbers from', facts.latents - 1), number('to', 'to', facts.latents - 1, 'Numbers to')),
      number('head', capitalised(groupName), grid.heads - 1)),
    said, scroller];
}
