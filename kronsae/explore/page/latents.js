// How a latent, base or extension is shown.

const MEASURES = {
  frequency: ['how often it fires', percent],
  mean: ['mean activation', short],
  max: ['largest activation', short],
  entropy: ['token entropy', short],
  multitoken: ['multitoken ratio', percent],
};

// Where values lie between pale and strong, from 0 to 1; between the 2nd and 98th percentile.
function scaleOf(group, name) {
  const { data } = index[`${group}.${name}`];
  const logarithmic = name !== 'entropy';
  const map = (value) => (logarithmic ? Math.log(Math.max(value, 1e-12)) : value);
  const step = Math.max(1, Math.floor(data.length / 20000));
  const sample = [];
  for (let place = 0; place < data.length; place += step) {
    if (!Number.isNaN(data[place])) sample.push(map(data[place]));
  }
  sample.sort((a, b) => a - b);
  const low = sample[Math.floor(0.02 * sample.length)] ?? 0;
  const high = sample[Math.floor(0.98 * sample.length)] ?? 1;
  return (value) => Math.min(1, Math.max(0, (map(value) - low) / (high - low || 1)));
}

function tokenBars(tokens, shares, label, style) {
  const most = Math.max(...shares.map(Math.abs), 1e-9);
  return make('div', { class: 'bars' },
    make('h4', null, label),
    make('ol', null, tokens.map((text, place) => make('li', null,
      chip(text, text),
      make('i', { class: style, vars: { '--w': `${100 * Math.abs(shares[place]) / most}%` } }),
      make('b', null, style === 'share' ? percent(shares[place]) : signed(shares[place]))))));
}

const signed = (value) => (value > 0 ? '+' : '−') + short(Math.abs(value));

function pairsOf(numbers, values) {
  const kept = [...numbers].map((n, place) => [tokenText(n), values[place]])
    .filter(([text]) => text !== undefined);
  return [kept.map(([text]) => text), kept.map(([, value]) => value)];
}

// One example: its tokens, the shade of each its activation, the middle one framed.
function example(tokens, shades, peak, strongest) {
  const middle = Math.floor(facts.window / 2);
  const line = make('code', null);
  const fires = (place) => shades[place] > 0 || place === middle;
  textsOf(tokens, tokens.map((_, place) => fires(place))).forEach((text, place) => {
    if (text === undefined) return;
    if (!fires(place)) {
      line.append(text);
      return;
    }
    const value = peak * shades[place] / 255;
    const blank = text.match(/^ *(?=[^ ])/)?.[0] ?? ''; // else a line may break in the frame
    line.append(blank, make(place === middle ? 'mark' : 'span', {
      title: short(value), vars: { '--a': strongest ? Math.min(1, value / strongest) : 0 },
    }, text.slice(blank.length)));
  });
  const shown = peak * shades[middle] / 255;
  return make('li', null, make('b', null, short(shown)), line);
}

function exampleList(block, group, kind, row, strongest, count = Infinity) {
  const tokens = rowOf(block[`${group}.${kind}.tokens`], row);
  const shades = rowOf(block[`${group}.${kind}.values`], row);
  const peaks = rowOf(block[`${group}.${kind}.peaks`], row);
  const items = [];
  peaks.slice(0, count).forEach((peak, place) => {
    const span = [place * facts.window, (place + 1) * facts.window];
    const own = tokens.subarray(...span);
    if (tokenText(own[Math.floor(facts.window / 2)]) === undefined) return;
    items.push(example([...own], shades.subarray(...span), peak, strongest));
  });
  return items.length ? make('ol', { class: 'examples' }, items)
    : make('p', { class: 'faint' }, 'It never fires in this text.');
}

function stat(label, value, note) {
  return make('div', { title: note }, make('dt', null, label), make('dd', null, value));
}

const thousandths = (value) => (
  Number.isNaN(value) ? '–' : value.toFixed(3).replace('-', '−'));

function statsOf(unit) {
  const entropy = valueOf(unit, 'entropy');
  const exact = facts.exactEntropy[unit.group];
  const rows = [
    stat('fires on', percent(valueOf(unit, 'frequency') || 0), 'share of tokens'),
    stat('mean', short(valueOf(unit, 'mean')), 'mean activation where it fires'),
    stat('largest', short(valueOf(unit, 'max')), 'largest activation'),
    stat('token entropy', (exact ? '' : '≈ ') + short(entropy),
      `in nats; its activation is spread over about ${short(Math.exp(entropy))} tokens, in effect`),
    stat('multitoken', percent(valueOf(unit, 'multitoken')),
      'share of a context on which it fires, mean over contexts where it does'),
  ];
  const own = valueOf(unit, 'headCorrelation');
  const others = valueOf(unit, 'otherCorrelation');
  if (own !== undefined) {
    rows.push(stat('with its head', thousandths(own),
      'mean correlation with the others of its head'));
  }
  if (others !== undefined) {
    rows.push(stat('with all others', thousandths(others),
      'mean correlation with all other latents'));
  }
  return make('dl', { class: 'stats' }, rows);
}

// How often base and extension fire together, and which of them is missing if not.
function gateOf(unit) {
  const shares = {
    both: valueOf(unit, 'both'),
    base: valueOf(unit, 'base_blocks'),
    extension: valueOf(unit, 'extension_blocks'),
  };
  const gate = shares.base > shares.extension ? 'base' : 'extension';
  const parts = [
    ['both', `both fire: ${percent(shares.both)}`],
    ['base', `base blocks: ${percent(shares.base)}`],
    ['extension', `extension blocks: ${percent(shares.extension)}`],
  ];
  const selected = valueOf(unit, 'selected');
  return make('section', { class: 'gate' },
    make('h4', null, 'Gate'),
    make('p', null, `The ${gate} decides more often: it alone is 0 on `,
      make('strong', null, percent(shares[gate])), ' of tokens. Both fire on ',
      make('strong', null, percent(shares.both)), ', and the latent is among the active ones on ',
      make('strong', null, percent(selected)), ' of those.'),
    make('div', { class: 'stack', role: 'img', 'aria-label': parts.map((p) => p[1]).join(', ') },
      parts.map(([style, text]) => make('i', {
        class: style, title: text, vars: { '--w': `${100 * shares[style]}%` },
      }))),
    make('p', { class: 'legend' }, parts.map(
      ([style, text]) => make('span', { class: style }, text))));
}

function relation(one, other) {
  if (!grid.kron || one.head !== other.head) return '';
  if (one.i === other.i) return 'same base';
  return one.j === other.j ? 'same extension' : 'same head';
}

function nearestOf(unit, block, row) {
  const cosines = rowOf(block.cosines, row);
  const items = [...rowOf(block.nearest, row)].map((number, place) => {
    const other = latentAt(number);
    const note = relation(unit, other);
    return make('li', null,
      make('b', null, cosines[place].toFixed(2)),
      make('a', { href: addressOf(other) }, nameOf(other)),
      note ? make('em', null, note) : null,
      make('span', { class: 'chips' }, tokensOf(other, 3).map((text) => chip(text))));
  });
  return make('section', null, make('h4', null, 'Nearest decoder rows (cosine)'),
    make('ol', { class: 'near' }, items));
}

function titleOf(unit) {
  const title = make('h3', { tabindex: -1, id: 'unit' },
    nameOf(unit).replace(/^./, (letter) => letter.toUpperCase()));
  const place = [];
  if (unit.kind === 'latent' && grid.kron) {
    place.push(
      make('a', { href: addressOf(baseAt(unit.head, unit.i)), class: 'base' }, `base ${unit.i}`),
      ' × ',
      make('a', { href: addressOf(extensionAt(unit.head, unit.j)), class: 'extension' },
        `extension ${unit.j}`));
  } else if (grid.kron) place.push(`pre-latent of head ${unit.head}`);
  return make('div', { class: 'title' }, title, make('p', null, place));
}

// What the base and the extension of a latent fire on by themselves.
async function parentsOf(unit) {
  const block = await details(unit.head);
  const parents = [baseAt(unit.head, unit.i), extensionAt(unit.head, unit.j)];
  return make('div', { class: 'parents' }, parents.map((parent) => make('section', null,
    make('h4', null, make('a', { href: addressOf(parent), class: parent.kind },
      nameOf(parent)), ' by itself'),
    exampleList(block, 'pre', 'top', rowIn(parent), valueOf(parent, 'max'), 4))));
}

// Its row in the arrays of its block.
function rowIn(unit) {
  const width = unit.group === 'post' ? PER_HEAD : PRE_PER_HEAD;
  return unit.row - Math.floor(unit.head / facts.perBlock) * facts.perBlock * width;
}

// Everything about one latent, base or extension.
async function unitView(unit) {
  const block = await details(unit.head);
  const row = rowIn(unit);
  const top = block[`${unit.group}.histogramTop`].data[row];
  const counts = rowOf(block[`${unit.group}.histogram`], row);
  const strongest = valueOf(unit, 'max');
  const [tokens, shares] = pairsOf(
    rowOf(block[`${unit.group}.tokens`], row), rowOf(block[`${unit.group}.shares`], row));
  const lists = [tokens.length
    ? tokenBars(tokens, shares, 'Fires on', 'share') : null];
  const post = unit.kind === 'latent';
  if (post && block.raised) {
    lists.push(
      tokenBars(...pairsOf(rowOf(block.raised, row), rowOf(block.raisedBy, row)),
        'Makes likelier', 'raised'),
      tokenBars(...pairsOf(rowOf(block.lowered, row), rowOf(block.loweredBy, row)),
        'Makes less likely', 'lowered'));
  }
  const note = post && block.raised
    ? make('p', { class: 'note' }, 'Next tokens: the direct effect of its decoder row on the '
      + `logits, ${facts.logits.norm ? `through the weight of ${facts.logits.norm}` : 'with no norm'}`
      + ' (its scale left out, so the unit is open), around their mean. Later blocks are not seen.')
    : null;
  return make('article', { class: `unit ${unit.kind}` },
    titleOf(unit),
    statsOf(unit),
    make('section', null, make('h4', null, 'Strongest examples'),
      exampleList(block, unit.group, 'top', row, strongest)),
    make('section', { class: 'lists' }, lists), note,
    top ? make('section', null, make('h4', null, 'Activations (heights by the root of counts)'),
      histogram(counts, top, `Histogram of activations from 0 to ${short(top)}`)) : null,
    post && grid.kron ? gateOf(unit) : null,
    facts.examples[1] ? make('details', null,
      make('summary', null, 'A random sample of where it fires'),
      exampleList(block, unit.group, 'sample', row, strongest)) : null,
    post && block.nearest ? nearestOf(unit, block, row) : null);
}
