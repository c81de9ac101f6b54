// Addresses: #/ · #/head/H · #/head/H/base/I · #/head/H/extension/J · #/latent/F · #/find/TEXT

const main = document.getElementById('main');
const query = document.getElementById('query');

function wrong(text) {
  return [make('h1', null, 'Nothing there'), make('p', null, text, ' ',
    make('a', { href: '#/' }, 'All heads'))];
}

async function viewOf(address) {
  const [kind, first, second, third] = address.replace(/^#?\/?|\/$/g, '').split('/');
  const number = Number(first);
  const whole = (value, end) => Number.isInteger(value) && value >= 0 && value < end;
  if (!kind) return overview();
  if (kind === 'find') return findView(decodeURIComponent(first || ''));
  if (kind === 'latent') {
    if (!first || !whole(number, facts.latents)) {
      return wrong(`There are latents 0 to ${facts.latents - 1}.`);
    }
    const unit = latentAt(number);
    return headView(unit.head, unit);
  }
  if (kind === 'head' && first && whole(number, grid.heads)) {
    const place = Number(third);
    if (second === undefined) return headView(number);
    if (grid.kron && third && second === 'base' && whole(place, grid.m)) {
      return headView(number, baseAt(number, place));
    }
    if (grid.kron && third && second === 'extension' && whole(place, grid.n)) {
      return headView(number, extensionAt(number, place));
    }
  }
  return wrong(`No such page; there are ${groupName}s 0 to ${grid.heads - 1}.`);
}

let turn = 0;
let shownHead = null;

async function route() {
  const address = location.hash;
  turn += 1;
  const own = turn;
  let view;
  watched = null;
  try {
    view = await viewOf(address);
  } catch (error) {
    if (!(error instanceof URIError)) throw error;
    view = wrong('The address is not readable.');
  }
  if (own !== turn) return; // another address was asked for meanwhile
  const held = document.activeElement?.closest?.('.grid') && shownHead !== null;
  const scroll = window.scrollY;
  main.replaceChildren(...view.filter(Boolean));
  const head = main.querySelector('.grid') ? headOf(address) : null;
  if (head !== null && head === shownHead) {
    window.scrollTo(0, scroll); // another cell of the same grid
    if (held) main.querySelector('.grid [aria-current]')?.focus({ preventScroll: true });
  } else window.scrollTo(0, 0);
  // The link that was followed is gone: reading goes on at the top of what it led to.
  if (turn > 1 && document.activeElement === document.body) main.focus({ preventScroll: true });
  shownHead = head;
  document.title = titleText(address);
  main.dataset.address = address;
}

function headOf(address) {
  const [, kind, first] = address.split('/');
  return kind === 'latent' ? latentAt(Number(first)).head : Number(first);
}

function titleText(address) {
  const words = decodeURIComponentSafely(address).replace(/^#?\/?/, '').split('/').join(' ');
  return words ? `${words} · ${facts.run}` : `${facts.run}: explorer`;
}

function decodeURIComponentSafely(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
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
