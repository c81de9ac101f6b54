// How a latent, base or extension is shown.

const MEASURES = {
  frequency: ['density', percent],
  mean: ['mean activation', short],
  max: ['max activation', short],
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
const MORE = 100; // tokens on each side that more context shows
const NOWHERE = 2 ** 32 - 1;

// Examples of a row of a block: where in the text, shades of a window, the activation of the darkest.
function examplesOf(block, group, kind, row) {
  const arrays = ['places', 'values', 'peaks'].map((name) => block[`${group}.${kind}.${name}`]);
  if (!arrays[0]) return [];
  const [places, shades, peaks] = arrays.map((array) => rowOf(array, row));
  return [...places].map((place, number) => ({
    place, peak: peaks[number],
    shades: shades.subarray(number * facts.window, (number + 1) * facts.window),
  }));
}

const isThere = ({ place }) => place !== NOWHERE;

// The first place of the context of a place, and the place after its last.
function contextOf(place) {
  const start = place - place % facts.contextTokens;
  return [start, start + facts.contextTokens];
}

// The latent on the token at a place.
function activationAt({ place, shades, peak }, at) {
  const shade = shades[at - place + MIDDLE];
  return shade ? peak * shade / 255 : 0;
}

// One example as a line: the shade of each token its activation, the strongest one framed.
function exampleLine(example, strongest) {
  const { place } = example;
  const [start, end] = contextOf(place);
  const line = make('code', null);
  const more = make('button', {
    type: 'button', class: 'more', 'aria-expanded': 'false', 'aria-label': 'More context',
    title: `More context; activations are known of ${facts.window} tokens`,
    onclick: () => {
      const wide = more.getAttribute('aria-expanded') === 'false';
      more.setAttribute('aria-expanded', String(wide));
      draw(wide ? MORE : MIDDLE);
    },
  }, '⋯');

  function draw(around) {
    line.replaceChildren();
    for (let at = Math.max(start, place - around); at <= Math.min(end - 1, place + around); at += 1) {
      const value = activationAt(example, at);
      const shown = textAt(at, value > 0);
      if (shown === undefined) continue;
      if (!value && at !== place) {
        line.append(shown);
        continue;
      }
      const blank = shown.match(/^ *(?=[^ ])/)?.[0] ?? ''; // else a line may break in the frame
      line.append(blank, make(at === place ? 'mark' : 'span', {
        title: short(value), vars: { '--a': strongest ? Math.min(1, value / strongest) : 0 },
      }, shown.slice(blank.length)));
    }
  }

  draw(MIDDLE);
  return make('li', null, make('b', null, short(activationAt(example, place))), line,
    facts.wholeText ? more : null);
}

function exampleItems(examples, strongest) {
  return make('ol', { class: 'examples' },
    examples.filter(isThere).map((each) => exampleLine(each, strongest)));
}

function exampleList(block, group, kind, row, strongest, count = Infinity) {
  const examples = examplesOf(block, group, kind, row).filter(isThere).slice(0, count);
  return examples.length ? exampleItems(examples, strongest)
    : make('p', { class: 'faint' }, 'It never fires in this text.');
}

// Examples of each interval of its activations, the highest first.
function intervalsOf(block, group, row, strongest) {
  const examples = examplesOf(block, group, 'intervals', row);
  if (!examples.some(isThere)) return null;
  const each = examples.length / facts.intervals;
  const counts = rowOf(block[`${group}.histogram`], row);
  const bins = counts.length / facts.intervals;
  const all = counts.reduce((sum, count) => sum + count, 0);
  const top = block[`${group}.histogramTop`].data[row];
  const parts = [];
  for (let interval = facts.intervals - 1; interval >= 0; interval -= 1) {
    const some = examples.slice(interval * each, (interval + 1) * each);
    const inside = counts.subarray(interval * bins, (interval + 1) * bins);
    const share = inside.reduce((sum, count) => sum + count, 0) / all;
    const [low, high] = [interval, interval + 1].map((edge) => short(top * edge / facts.intervals));
    if (some.some(isThere)) {
      parts.push(make('h5', null, `${low} to ${high}`,
        make('small', null, ` ${percent(share)} of the tokens where it fires`)),
      exampleItems(some, strongest));
    }
  }
  return make('section', { class: 'intervals' },
    make('h4', null, 'Samples by activation interval'), parts);
}

function stat(label, value, note) {
  return make('div', { title: note }, make('dt', null, label), make('dd', null, value));
}

function statsOf(unit, block, row) {
  const entropy = valueOf(unit, 'entropy');
  const exact = facts.exactEntropy[unit.group];
  const rows = [
    stat('density', percent(valueOf(unit, 'frequency') || 0), 'share of tokens on which it fires'),
    stat('mean activation', short(valueOf(unit, 'mean')), 'where it fires'),
    stat('max activation', short(valueOf(unit, 'max')), 'on this text'),
    stat('token entropy', (exact ? '' : '≈ ') + short(entropy),
      `in nats; its activation is spread over about ${short(Math.exp(entropy))} tokens, in effect`),
    stat('multitoken', percent(valueOf(unit, 'multitoken')),
      'share of a context on which it fires, mean over contexts where it does'),
  ];
  for (const [name, label, note] of [
    ['headCorrelation', 'correlation with its head', 'mean over the other latents of its head'],
    ['otherCorrelation', 'with all others', 'mean correlation with all other latents'],
  ]) {
    const value = unit.kind === 'latent' ? block[name]?.data[row] : undefined;
    if (value !== undefined) rows.push(stat(label, short(value), note));
  }
  return make('dl', { class: 'stats' }, rows);
}

// How often base and extension fire together, and which of them is missing if not.
function gateOf(block, row) {
  const shares = {
    both: block.both.data[row],
    base: block.base_blocks.data[row],
    extension: block.extension_blocks.data[row],
  };
  const gate = shares.base > shares.extension ? 'base' : 'extension';
  const parts = [['both', 'both fire'], ['base', 'base blocks'], ['extension', 'extension blocks']]
    .map(([style, label]) => [style, `${label}: ${percent(shares[style])}`]);
  const selected = block.selected.data[row];
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
  const [block] = await Promise.all([details(unit.head), readText()]);
  const row = rowIn(unit);
  const top = block[`${unit.group}.histogramTop`].data[row];
  const counts = rowOf(block[`${unit.group}.histogram`], row);
  const strongest = valueOf(unit, 'max');
  const bars = (label, style, tokens, values) => tokenBars(
    label, style, rowOf(block[tokens], row), rowOf(block[values], row));
  const shares = [...rowOf(lists[`${unit.group}.shares`], unit.row)].map((share) => share / 65535);
  const estimated = facts.exactEntropy[unit.group] ? '' : ' (estimates)';
  const columns = [tokenBars(`Top tokens, by share of its activation${estimated}`, 'share',
    rowOf(lists[`${unit.group}.tokens`], unit.row), shares)];
  const post = unit.kind === 'latent';
  if (post && block.raised) {
    columns.push(bars('Positive logits', 'raised', 'raised', 'raisedBy'),
      bars('Negative logits', 'lowered', 'lowered', 'loweredBy'));
  }
  const note = post && block.raised
    ? make('p', { class: 'note' }, 'Logits of next tokens: the direct effect of its decoder row on the '
      + `logits, ${facts.logits.norm ? `through the weight of ${facts.logits.norm}` : 'with no norm'}`
      + ' (its scale left out, so the unit is open), around their mean. Later blocks are not seen.')
    : null;
  return make('article', { class: `unit ${unit.kind}` },
    titleOf(unit),
    post ? labelLine(unit.number) : null,
    post && facts.served ? make('p', null, make('a', { href: `#/ask/${unit.number}` },
      'Steer or ablate it in the running model')) : null,
    statsOf(unit, block, row),
    section('Top activations', exampleList(block, unit.group, 'top', row, strongest)),
    make('section', { class: 'lists' }, columns), note,
    top ? section('Activations (heights by the root of counts)',
      histogram(counts, 'Histogram of activations', (share) => short(top * share))) : null,
    post && grid.kron ? gateOf(block, row) : null,
    post ? intervalsOf(block, unit.group, row, strongest) : null,
    facts.examples.sample ? make('details', null,
      make('summary', null, 'A random sample of where it fires'),
      exampleList(block, unit.group, 'sample', row, strongest)) : null,
    post && block.nearest ? nearestOf(unit, block, row) : null);
}
