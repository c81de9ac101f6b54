// The page's data: what is read at once, and blocks that are read when they are looked at.

const facts = JSON.parse(document.getElementById('facts').textContent);
const grid = facts.grid;
const PER_HEAD = grid.m * grid.n;
const PRE_PER_HEAD = grid.m + grid.n;

const parsed = new Promise((resolve) => {
  if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', resolve);
  else resolve();
});

// Where data come from, and where labels go to. All else asks this object alone, so that a page
// with a server behind it needs only another one. Here the data are elements of the page.
const source = {
  // The bytes of a block, unpacked.
  async block(name) {
    const there = () => document.getElementById(name)?.nextSibling; // else still being parsed
    if (!there()) await parsed;
    return unzip(bytesOf(document.getElementById(name).textContent));
  },
  // Keep texts of labels, given by latent; null: the page cannot, and offers the file.
  saveLabels: null,
};

// With a server behind the page: what it answers, or an Error with what it says.
async function ask(name, request) {
  const response = await fetch(name, request && {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(request),
  }).catch(() => {
    throw new Error('The server does not answer: is `kronsae explore --serve` still running?');
  });
  const answer = await response.json().catch(() => ({ error: `status ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

if (facts.served) source.saveLabels = (labels) => ask('labels', { labels });

function bytesOf(text) {
  return Uint8Array.fromBase64?.(text) // ten times as fast
    ?? Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

async function unzip(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

const ARRAYS = {
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array,
  int32: Int32Array, float32: Float32Array,
};

// A block's arrays by name, each with its shape; blocks.py writes them.
async function readBlock(name) {
  const raw = await source.block(name);
  const length = new DataView(raw).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(raw, 4, length)));
  const arrays = {};
  for (const [key, dtype, shape, offset] of header) {
    const count = shape.reduce((product, size) => product * size, 1);
    arrays[key] = { data: new ARRAYS[dtype](raw, 4 + length + offset, count), shape };
  }
  return arrays;
}

const readJSON = async (name) => JSON.parse(new TextDecoder().decode(await source.block(name)));

let index; // figures of all latents
let vocabulary; // texts of tokens
let lists; // tokens of all latents
const blocks = new Map(); // the details read last, by block

async function readIndex() {
  index = await readBlock('index');
}

// What all views but the first one's figures need.
let listsRead;
function readLists() {
  listsRead ??= Promise.all([readBlock('lists'), readJSON('vocabulary'), facts.served ? ask('labels') : readJSON('labels')])
    .then(([arrays, texts, labels]) => {
      [lists, vocabulary] = [arrays, texts];
      startLabels(labels);
    });
  return listsRead;
}

const KEPT_BLOCKS = 64;

async function details(head) {
  const number = Math.floor(head / facts.perBlock);
  if (!blocks.has(number)) {
    blocks.set(number, readBlock(`details-${number}`));
    if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
  }
  return blocks.get(number);
}

let textRead;
let text; // in which examples lie: tokens by place, and bytes that are hidden unless it fires there
function readText() {
  textRead ??= readBlock('text').then(({ tokens, hiddenAt, hidden }) => {
    const bytes = new Map([...hiddenAt.data].map((place, at) => [place, hidden.data[at]]));
    text = { tokens: tokens.data, bytes };
  });
  return textRead;
}

// The text of the token at a place; undefined where there is none.
function textAt(place, fires) {
  return textOfToken((fires ? text.bytes.get(place) : undefined) ?? text.tokens[place]);
}

// Row `row` of an array.
function rowOf({ data, shape }, row) {
  const width = shape.slice(1).reduce((product, size) => product * size, 1);
  return data.subarray(row * width, (row + 1) * width);
}

const textOfToken = (number) => vocabulary[number]; // undefined: no token is there

// A latent, base or extension: {kind, number, head, i, j, row}; row is that in the index.
function latentAt(number) {
  const head = Math.floor(number / PER_HEAD);
  const inHead = number - head * PER_HEAD;
  return {
    kind: 'latent', group: 'post', number, row: number, head,
    i: Math.floor(inHead / grid.n), j: inHead % grid.n,
  };
}

const baseAt = (head, i) => (
  { kind: 'base', group: 'pre', number: i, head, i, row: head * PRE_PER_HEAD + i });
const extensionAt = (head, j) => (
  { kind: 'extension', group: 'pre', number: j, head, j, row: head * PRE_PER_HEAD + grid.m + j });

function unitAtRow(group, row) {
  if (group === 'post') return latentAt(row);
  const head = Math.floor(row / PRE_PER_HEAD);
  const inHead = row - head * PRE_PER_HEAD;
  return inHead < grid.m ? baseAt(head, inHead) : extensionAt(head, inHead - grid.m);
}

const valueOf = (unit, name) => index[`${unit.group}.${name}`].data[unit.row];

// Texts of the tokens that most of its activation lies on.
function tokensOf(unit, count = 4) {
  return [...rowOf(lists[`${unit.group}.tokens`], unit.row)]
    .slice(0, count).map(textOfToken).filter((text) => text !== undefined);
}

const addressOf = (unit) => (unit.kind === 'latent' ? `#/latent/${unit.number}`
  : `#/head/${unit.head}/${unit.kind}/${unit.number}`);

const nameOf = (unit) => `${unit.kind} ${unit.number}`;

const groupName = grid.kron ? 'head' : 'group';
