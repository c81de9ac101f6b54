// Search: a number, a label, what fires on the text that is typed, what promotes it.

const FOUND = 50; // latents that each list shows at most
const UNIT_GROUPS = grid.kron ? ['post', 'pre'] : ['post'];

function unitLine(unit, ...rest) {
  return make('li', null, make('a', { href: addressOf(unit), class: unit.kind }, unit.kind
    === 'latent' ? nameOf(unit) : `head ${unit.head}, ${nameOf(unit)}`),
  unit.kind === 'latent' ? labelText(unit.number) : null, ...rest);
}

let numbersByText;
// Numbers of the tokens with a text, without regard to case and to blanks around it.
function tokensSpelled(text) {
  if (!numbersByText) {
    numbersByText = new Map();
    vocabulary.forEach((each, number) => {
      const key = plainText(each) || each;
      numbersByText.set(key, [...(numbersByText.get(key) ?? []), number]);
    });
  }
  return numbersByText.get(text) ?? [];
}

// A text cut into the fewest tokens that spell it, of those the longest; null if none do.
function cut(text) {
  const best = [{ cost: 0, pieces: [] }];
  for (let end = 1; end <= text.length; end += 1) {
    for (let start = Math.max(0, end - 40); start < end; start += 1) {
      const piece = text.slice(start, end).trim() || text.slice(start, end);
      if (best[start] && tokensSpelled(piece).length) {
        const cost = best[start].cost + 1 - (end - start) ** 2 * 1e-6;
        if (!best[end] || cost < best[end].cost) {
          best[end] = { cost, pieces: [...best[start].pieces, piece] };
        }
      }
    }
  }
  return best[text.length]?.pieces ?? null;
}

const OTHER_CASE = 0.7; // how well "Return" stands for "return"
const A_PART = 0.6; // and a longer token, times the share of it that was typed

// What a text is made of: for each piece how well each token stands for it (1: it is the same), and
// how much the piece counts, which is more the rarer it is.
function piecesOf(query) {
  const wanted = query.toLowerCase().trim() || query;
  const pieces = cut(wanted) ?? wanted.split(/\s+/);
  return pieces.map((piece, at) => {
    const ranks = new Map(tokensSpelled(piece).map((number) => [
      number, query.includes(vocabulary[number].trim()) ? 1 : OTHER_CASE]));
    const atStart = at === 0; const atEnd = at === pieces.length - 1;
    if (piece.trim() && (atStart || atEnd)) { // it may be a part of a token there
      vocabulary.forEach((text, number) => {
        const plain = plainText(text);
        const part = atStart && atEnd ? plain.includes(piece)
          : atStart ? plain.endsWith(piece) : plain.startsWith(piece);
        if (part && !ranks.has(number)) ranks.set(number, A_PART * piece.length / plain.length);
      });
    }
    const count = [...ranks].reduce((sum, [number, rank]) => (
      sum + (rank >= OTHER_CASE ? lists.counts?.data[number] ?? 0 : 0)), 1);
    return { piece, ranks, weight: Math.log(1 + facts.tokens / count) };
  });
}

// How strongly latents fire on what was typed, strongest first. The strength on a token is the mean
// activation there, minus the mean on all tokens; on a text, the mean over its pieces by their weights.
function byToken(query, group) {
  const pieces = piecesOf(query);
  const total = pieces.reduce((sum, { weight }) => sum + weight, 0);
  const { data: tokens, shape: [rows, width] } = lists[`${group}.tokens`];
  const shares = lists[`${group}.shares`].data;
  const [density, mean, max] = ['frequency', 'mean', 'max'].map((name) => index[`${group}.${name}`].data);
  const found = [];
  const isPart = new Uint8Array(vocabulary.length);
  for (const { ranks } of pieces) for (const number of ranks.keys()) isPart[number] = 1;
  for (let row = 0; row < rows; row += 1) {
    let hit = null;
    for (let at = row * width; at < (row + 1) * width; at += 1) {
      if (!shares[at] || !isPart[tokens[at]]) continue;
      hit ??= { row, score: 0, share: 0, strongest: 0, on: undefined, best: new Map() };
      const share = shares[at] / 65535;
      const everywhere = mean[row] * density[row];
      const count = lists.counts?.data[tokens[at]];
      const activation = count ? Math.min(max[row], share * everywhere * facts.tokens / count)
        : share * max[row];
      hit.share += share;
      if (activation > hit.strongest) [hit.strongest, hit.on] = [activation, tokens[at]];
      pieces.forEach(({ ranks }, piece) => {
        const rank = ranks.get(tokens[at]);
        if (rank) {
          const strength = rank * Math.max(0, activation - everywhere);
          hit.best.set(piece, Math.max(strength, hit.best.get(piece) ?? 0));
        }
      });
    }
    if (!hit) continue;
    for (const [piece, strength] of hit.best) hit.score += strength * pieces[piece].weight / total;
    if (hit.score) found.push(hit);
  }
  return found.sort((a, b) => b.score - a.score);
}

// Latents that promote ("raised") or suppress ("lowered") a token, strongest first.
function byLogit(query, name) {
  if (!lists[name]) return [];
  const [{ ranks }, ...others] = piecesOf(query);
  if (others.length) return [];
  const { data, shape: [, width] } = lists[name];
  const best = new Map();
  data.forEach((token, at) => {
    if (!ranks.has(token)) return;
    const row = Math.floor(at / width);
    const by = lists[`${name}By`].data[at];
    const score = ranks.get(token) * Math.abs(by);
    if (score > (best.get(row)?.score ?? 0)) best.set(row, { row, score, by, token });
  });
  return [...best.values()].sort((a, b) => b.score - a.score);
}

const NUMBER = /^(latent|head|group)?\s*(\d+)$/i;
const whatThereIs = () => (
  `There are latents 0 to ${facts.latents - 1} in ${groupName}s 0 to ${grid.heads - 1}.`);

// Addresses of the latent and the head with the number that was typed, of those that there are.
function numbered(query) {
  const [, kind, number] = query.trim().match(NUMBER) ?? [];
  return ['latent', 'head'].filter((each) => !kind || /latent/i.test(kind) === (each === 'latent'))
    .map((each) => `#/${each}/${number}`).filter((href) => number && placeOf(href));
}

function numbersIn(query) {
  const found = numbered(query);
  if (!found.length) return NUMBER.test(query.trim()) ? make('p', null, whatThereIs()) : null;
  return make('ul', { class: 'found' }, found.map((href) => (
    make('li', null, make('a', { href }, href.slice(2).replace('/', ' '))))));
}

function byLabel(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [...labels].filter(([, { text }]) => {
    const plain = text.toLowerCase();
    return words.length && words.every((word) => plain.includes(word));
  });
  return found.sort(([, a], [, b]) => a.text.length - b.text.length).map(([number]) => latentAt(number));
}

// A list of what was found, and its heading; null if that is nothing.
function foundList(title, note, found, line) {
  if (!found.length) return null;
  const first = found.length > FOUND ? ` The first ${FOUND} of ${grouped(found.length)}.` : '';
  return make('section', null, make('h2', null, title),
    make('p', { class: 'faint' }, note + first),
    make('ol', { class: 'found' }, found.slice(0, FOUND).map(line)));
}

function firing(query, group) {
  return foundList(group === 'post' ? 'Latents that fire on it' : 'Bases and extensions that fire on it',
    'Ranked by the mean activation on this token, minus the mean on all tokens. The percentage is the '
      + 'share of all of a latent\'s activation that lies on it.', byToken(query, group), ({ row, strongest, on, share }) => unitLine(
      unitAtRow(group, row), make('b', null, `${short(strongest)} on `, chip(textOfToken(on))),
      make('small', null, percent(share)), chips(tokensOf(unitAtRow(group, row)))));
}

function promoting(query, name, title) {
  return foundList(title, 'By the logit of the next token.', byLogit(query, name),
    ({ row, by, token }) => unitLine(latentAt(row),
      make('b', null, `${signed(by)} `, chip(textOfToken(token))), chips(tokensOf(latentAt(row)))));
}

function findView(query) {
  const progress = make('p', { class: 'faint', 'aria-live': 'polite' });
  const texts = make('ol', { class: 'found texts' });
  searchTexts(query, texts, progress);
  const pieces = piecesOf(query);
  return [make('h1', null, 'Search', make('small', null, query)),
    pieces.length > 1 ? make('p', { class: 'faint' }, 'As tokens: ', chips(pieces.map((each) => each.piece))) : null,
    numbersIn(query),
    foundList('Labels', 'Labels with these words.', byLabel(query), (unit) => unitLine(unit, chips(tokensOf(unit)))),
    firing(query, 'post'),
    make('section', null, make('h2', null, 'Examples that fire on the text'), progress, texts),
    promoting(query, 'raised', 'Positive logits'),
    promoting(query, 'lowered', 'Negative logits'),
    grid.kron ? firing(query, 'pre') : null];
}

let joined; // the text in small letters, and where each token begins in it
function joinedText() {
  if (!joined) {
    const starts = new Uint32Array(text.tokens.length + 1);
    const small = vocabulary.map((each) => each.toLowerCase());
    const parts = new Array(text.tokens.length);
    text.tokens.forEach((token, place) => {
      parts[place] = small[token] ?? '';
      starts[place + 1] = starts[place] + parts[place].length;
    });
    joined = { whole: parts.join(''), starts };
  }
  return joined;
}

// 1 for each token of the text that lies in a place where `wanted` stands.
function marksOf(wanted) {
  const { whole, starts } = joinedText();
  const marks = new Uint8Array(text.tokens.length);
  let count = 0;
  let place = 0;
  for (let at = whole.indexOf(wanted); at >= 0; at = whole.indexOf(wanted, at + 1)) {
    while (starts[place + 1] <= at) place += 1;
    for (let inside = place; starts[inside] < at + wanted.length; inside += 1) marks[inside] = 1;
    count += 1;
  }
  return { marks, count };
}

// The first head of each block: first of those whose latents fire most on a text.
function blocksFor(query) {
  const firstOf = (head) => head - head % facts.perBlock;
  const best = byToken(query, 'post').slice(0, FOUND).map(({ row }) => firstOf(latentAt(row).head));
  const all = Array.from({ length: Math.ceil(grid.heads / facts.perBlock) }, (_, at) => at * facts.perBlock);
  return new Set([...best, ...all]);
}

// Examples in which latents fire on the typed text, a latent's strongest, all of them by strength.
async function searchTexts(query, list, progress) {
  const wanted = query.toLowerCase().trim();
  if (wanted.length < 2) {
    progress.textContent = 'Type two letters or more to search the examples.';
    return;
  }
  const address = location.hash;
  await readText();
  const { marks, count } = marksOf(wanted);
  const times = `${grouped(count)} times in the text`;
  if (!count) {
    progress.textContent = facts.wholeText ? 'The text that was read does not contain it.' : 'No example contains it.';
    return;
  }
  let found = [];
  let shown = 0;
  const show = () => {
    shown = performance.now();
    list.replaceChildren(...found.map(({ unit, example, strength, peak }) => unitLine(unit,
      make('b', null, `${short(strength)} on it`), exampleItems([example], peak))));
  };
  let searched = 0;
  for (const head of blocksFor(query)) {
    const block = await details(head);
    if (location.hash !== address) return;
    found.push(...hitsIn(block, head, marks));
    if (found.length > 2 * FOUND) found = strongestOf(found);
    searched += facts.perBlock;
    const share = Math.min(1, searched / grid.heads);
    progress.textContent = `${times}; ${Math.round(100 * share)} % searched`;
    if (performance.now() - shown > 500) {
      found = strongestOf(found);
      show();
    }
  }
  found = strongestOf(found);
  show();
  progress.textContent = `${times}. ${found.length ? `The ${found.length} latents whose examples fire `
    + 'most on it.' : 'No example fires on it.'}`;
}

const strongestOf = (found) => found.sort((a, b) => b.strength - a.strength).slice(0, FOUND);

// For each latent of a block that fires on a marked token in an example, the strongest such one.
function hitsIn(block, head, marks) {
  const hits = [];
  const rows = block['post.top.peaks'].shape[0];
  for (let row = 0; row < rows; row += 1) {
    let best = null;
    for (const kind of ['top', 'intervals']) {
      for (const example of examplesOf(block, 'post', kind, row)) {
        if (!isThere(example)) continue;
        const [start, end] = contextOf(example.place);
        const stop = Math.min(end, example.place + MIDDLE + 1);
        for (let at = Math.max(start, example.place - MIDDLE); at < stop; at += 1) {
          const strength = marks[at] ? activationAt(example, at) : 0;
          if (strength > (best?.strength ?? 0)) best = { strength, example };
        }
      }
    }
    if (best) {
      const unit = latentAt(head * PER_HEAD + row);
      hits.push({ ...best, unit, peak: valueOf(unit, 'max') });
    }
  }
  return hits;
}
