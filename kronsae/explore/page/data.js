// The page's data: what is read at once, and blocks that are read when they are looked at.

const facts = JSON.parse(document.getElementById('facts').textContent);
const grid = facts.grid;
const PER_HEAD = grid.m * grid.n;
const PRE_PER_HEAD = grid.m + grid.n;

const ARRAYS = {
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array,
  int32: Int32Array, float32: Float32Array,
};

function bytesOf(text) {
  return Uint8Array.fromBase64?.(text) // ten times as fast
    ?? Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

async function unzip(text) {
  const packed = bytesOf(text);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

// A block's arrays by name, each with its shape; blocks.py writes them.
async function readBlock(text) {
  const raw = await unzip(text);
  const length = new DataView(raw).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(raw, 4, length)));
  const arrays = {};
  for (const [name, dtype, shape, offset] of header) {
    const count = shape.reduce((product, size) => product * size, 1);
    arrays[name] = { data: new ARRAYS[dtype](raw, 4 + length + offset, count), shape };
  }
  return arrays;
}

function textOf(id) {
  const element = document.getElementById(id);
  return element && element.nextSibling ? element.textContent : null; // else still being parsed
}

const parsed = new Promise((resolve) => {
  if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', resolve);
  else resolve();
});

let index; // arrays of all latents
let vocabulary; // texts of tokens
const blocks = new Map(); // the details read last, by block

async function readIndex() {
  [index, vocabulary] = await Promise.all([
    readBlock(textOf('index')),
    unzip(textOf('vocabulary')).then((raw) => JSON.parse(new TextDecoder().decode(raw))),
  ]);
}

const KEPT_BLOCKS = 64;

async function details(head) {
  const number = Math.floor(head / facts.perBlock);
  if (!blocks.has(number)) {
    const id = `details-${number}`;
    if (textOf(id) === null) await parsed;
    blocks.set(number, readBlock(document.getElementById(id).textContent));
    if (blocks.size > KEPT_BLOCKS) blocks.delete(blocks.keys().next().value);
  }
  return blocks.get(number);
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

const valueOf = (unit, name) => {
  const array = index[`${unit.group}.${name}`];
  return array ? array.data[unit.row] : undefined;
};

// Texts of the tokens that most of its activation lies on.
function tokensOf(unit, count = 4) {
  return [...rowOf(index[`${unit.group}.tokens`], unit.row)]
    .slice(0, count).map(textOfToken).filter((text) => text !== undefined);
}

const addressOf = (unit) => (unit.kind === 'latent' ? `#/latent/${unit.number}`
  : `#/head/${unit.head}/${unit.kind}/${unit.number}`);

const nameOf = (unit) => `${unit.kind} ${unit.number}`;

const groupName = grid.kron ? 'head' : 'group';
