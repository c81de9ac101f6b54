// Addresses: #/ · #/head/H · #/head/H/base/I · #/head/H/extension/J · #/latent/F · #/find/TEXT

const main = document.getElementById('main');
const query = document.getElementById('query');

function wrong(text) {
  return [make('h1', null, 'Nothing there'), make('p', null, text, ' ',
    make('a', { href: '#/' }, 'All heads'))];
}

// The parts of an address; null if it is not readable.
function partsOf(address) {
  try {
    return address.replace(/^#?\/?/, '').split('/').map((part) => decodeURIComponent(part));
  } catch {
    return null;
  }
}

async function viewOf(parts) {
  if (parts === null) return wrong('The address is not readable.');
  const [kind, first, second, third] = parts;
  const number = Number(first);
  const whole = (text, end) => Boolean(text) && Number.isInteger(Number(text))
    && Number(text) >= 0 && Number(text) < end;
  if (!kind) return overview();
  if (kind === 'find') return findView(first || '');
  if (kind === 'latent') {
    if (!whole(first, facts.latents)) {
      return wrong(`There are latents 0 to ${facts.latents - 1}.`);
    }
    const unit = latentAt(number);
    return headView(unit.head, unit);
  }
  if (kind === 'head' && whole(first, grid.heads)) {
    if (!second) return headView(number);
    if (grid.kron && second === 'base' && whole(third, grid.m)) {
      return headView(number, baseAt(number, Number(third)));
    }
    if (grid.kron && second === 'extension' && whole(third, grid.n)) {
      return headView(number, extensionAt(number, Number(third)));
    }
  }
  return wrong(`No such page; there are ${groupName}s 0 to ${grid.heads - 1}.`);
}

let turn = 0;
let shownHead = null;

async function route() {
  const address = location.hash;
  const parts = partsOf(address);
  turn += 1;
  const own = turn;
  watched = null;
  const view = await viewOf(parts);
  if (own !== turn) return; // another address was asked for meanwhile
  const held = document.activeElement?.closest?.('.grid') && shownHead !== null;
  const scroll = window.scrollY;
  main.replaceChildren(...view.filter(Boolean));
  const head = main.querySelector('.grid') ? headOf(parts) : null;
  if (head !== null && head === shownHead) {
    window.scrollTo(0, scroll); // another cell of the same grid
    if (held) main.querySelector('.grid [aria-current]')?.focus({ preventScroll: true });
  } else window.scrollTo(0, 0);
  // The link that was followed is gone: reading goes on at the top of what it led to.
  if (turn > 1 && document.activeElement === document.body) main.focus({ preventScroll: true });
  shownHead = head;
  const title = (parts ?? []).filter(Boolean).join(' ');
  document.title = title ? `${title} · ${facts.run}` : `${facts.run}: explorer`;
  main.dataset.address = address;
}

function headOf([kind, first]) {
  return kind === 'latent' ? latentAt(Number(first)).head : Number(first);
}

document.getElementById('search').addEventListener('submit', (event) => {
  event.preventDefault();
  if (query.value) location.hash = `#/find/${encodeURIComponent(query.value)}`;
});

document.getElementById('skip').addEventListener('click', (event) => {
  event.preventDefault();
  main.focus();
});

document.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Escape' && document.activeElement === query) query.blur();
  if (/^(input|select|textarea)$/i.test(event.target.tagName ?? '')) return;
  if (event.key === '/') {
    event.preventDefault();
    query.focus();
    query.select();
  } else if (event.key === 'n' || event.key === 'p') {
    const label = event.key === 'n' ? `next ${groupName}` : `previous ${groupName}`;
    main.querySelector(`.turn[aria-label="${label}"][href]`)?.click();
  } else if (event.key === 'h') location.hash = '#/';
});

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => watched?.());
window.addEventListener('hashchange', route);
document.getElementById('home').textContent = facts.run;
readIndex().then(route).then(() => {
  document.body.dataset.ready = '';
  performance.mark('first-view');
});
