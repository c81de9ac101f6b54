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
  const map = name === 'entropy' ? (value) => value : (value) => Math.log(Math.max(value, 1e-12));
  const known = index[`${group}.${name}`].data.filter((value) => !Number.isNaN(value)).sort();
  const [low, high] = [0.02, 0.98].map((share) => map(known[Math.floor(share * known.length)] ?? 1));
  return (value) => Math.min(1, Math.max(0, (map(value) - low) / (high - low || 1)));
}

const signed = (value) => (value > 0 ? '+' : '−') + short(Math.abs(value));

// A list of tokens and a bar for the value of each; null without tokens.
function tokenBars(label, style, numbers, values) {
  const pairs = [...numbers].map((number, at) => [textOfToken(number), values[at]])
    .filter(([text]) => text !== undefined);
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-9);
  return pairs.length ? make('div', { class: 'bars' },
    make('h4', null, label),
    make('ol', null, pairs.map(([text, value]) => make('li', null,
      chip(text, text),
      make('i', { class: style, vars: { '--w': `${100 * Math.abs(value) / most}%` } }),
      make('b', null, style === 'share' ? percent(value) : signed(value)))))) : null;
}

const MIDDLE = Math.floor(facts.window / 2);

// Examples of a row of a block: tokens and shades of each, and the activation of the darkest.
function examplesOf(block, group, kind, row) {
  const [tokens, shades, peaks] = ['tokens', 'values', 'peaks'].map(
    (name) => rowOf(block[`${group}.${kind}.${name}`], row));
  return [...peaks].map((peak, number) => {
    const window = [number * facts.window, (number + 1) * facts.window];
    return { tokens: [...tokens.subarray(...window)], shades: shades.subarray(...window), peak };
  }).filter((example) => textOfToken(example.tokens[MIDDLE]) !== undefined);
}

// One example as a line: the shade of each token its activation, the middle one framed.
function exampleLine({ tokens, shades, peak }, strongest) {
  const line = make('code', null);
  const fires = tokens.map((_, position) => shades[position] > 0 || position === MIDDLE);
  tokens.map(textOfToken).forEach((text, position) => {
    if (text === undefined) return;
    if (!fires[position]) {
      line.append(text);
      return;
    }
    const value = peak * shades[position] / 255;
    const blank = text.match(/^ *(?=[^ ])/)?.[0] ?? ''; // else a line may break in the frame
    line.append(blank, make(position === MIDDLE ? 'mark' : 'span', {
      title: short(value), vars: { '--a': strongest ? Math.min(1, value / strongest) : 0 },
    }, text.slice(blank.length)));
  });
  return make('li', null, make('b', null, short(peak * shades[MIDDLE] / 255)), line);
}

function exampleList(block, group, kind, row, strongest, count = Infinity) {
  const examples = examplesOf(block, group, kind, row).slice(0, count);
  return examples.length
    ? make('ol', { class: 'examples' }, examples.map((each) => exampleLine(each, strongest)))
    : make('p', { class: 'faint' }, 'It never fires in this text.');
}

function stat(label, value, note) {
  return make('div', { title: note }, make('dt', null, label), make('dd', null, value));
}

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
  for (const [name, label, note] of [
    ['headCorrelation', 'with its head', 'mean correlation with the others of its head'],
    ['otherCorrelation', 'with all others', 'mean correlation with all other latents'],
  ]) {
    const value = valueOf(unit, name);
    if (value !== undefined) rows.push(stat(label, short(value), note));
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
  const parts = [['both', 'both fire'], ['base', 'base blocks'], ['extension', 'extension blocks']]
    .map(([style, label]) => [style, `${label}: ${percent(shares[style])}`]);
  const selected = valueOf(unit, 'selected');
  return section('Gate',
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
  const items = [...rowOf(block.nearest, row)].map((number, rank) => {
    const other = latentAt(number);
    const note = relation(unit, other);
    return make('li', null,
      make('b', null, cosines[rank].toFixed(2)),
      make('a', { href: addressOf(other) }, nameOf(other)),
      note ? make('em', null, note) : null,
      make('span', { class: 'chips' }, tokensOf(other, 3).map((text) => chip(text))));
  });
  return section('Nearest decoder rows (cosine)', make('ol', { class: 'near' }, items));
}

function titleOf(unit) {
  const title = make('h3', null, capitalised(nameOf(unit)));
  const parents = [];
  if (unit.kind === 'latent' && grid.kron) {
    parents.push(
      make('a', { href: addressOf(baseAt(unit.head, unit.i)), class: 'base' }, `base ${unit.i}`),
      ' × ',
      make('a', { href: addressOf(extensionAt(unit.head, unit.j)), class: 'extension' },
        `extension ${unit.j}`));
  } else if (grid.kron) parents.push(`pre-latent of head ${unit.head}`);
  return make('div', { class: 'title' }, title, make('p', null, parents));
}

// What the base and the extension of a latent fire on by themselves.
async function parentsOf(unit) {
  const block = await details(unit.head);
  const parents = [baseAt(unit.head, unit.i), extensionAt(unit.head, unit.j)];
  return make('div', { class: 'parents' }, parents.map((parent) => section(
    [make('a', { href: addressOf(parent), class: parent.kind }, nameOf(parent)), ' by itself'],
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
  const bars = (label, style, tokens, values) => tokenBars(
    label, style, rowOf(block[tokens], row), rowOf(block[values], row));
  const lists = [bars('Fires on', 'share', `${unit.group}.tokens`, `${unit.group}.shares`)];
  const post = unit.kind === 'latent';
  if (post && block.raised) {
    lists.push(bars('Makes likelier', 'raised', 'raised', 'raisedBy'),
      bars('Makes less likely', 'lowered', 'lowered', 'loweredBy'));
  }
  const note = post && block.raised
    ? make('p', { class: 'note' }, 'Next tokens: the direct effect of its decoder row on the '
      + `logits, ${facts.logits.norm ? `through the weight of ${facts.logits.norm}` : 'with no norm'}`
      + ' (its scale left out, so the unit is open), around their mean. Later blocks are not seen.')
    : null;
  return make('article', { class: `unit ${unit.kind}` },
    titleOf(unit),
    statsOf(unit),
    section('Strongest examples', exampleList(block, unit.group, 'top', row, strongest)),
    make('section', { class: 'lists' }, lists), note,
    top ? section('Activations (heights by the root of counts)',
      histogram(counts, 'Histogram of activations', (share) => short(top * share))) : null,
    post && grid.kron ? gateOf(unit) : null,
    facts.examples[1] ? make('details', null,
      make('summary', null, 'A random sample of where it fires'),
      exampleList(block, unit.group, 'sample', row, strongest)) : null,
    post && block.nearest ? nearestOf(unit, block, row) : null);
}
