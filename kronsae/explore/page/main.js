// Addresses: #/ · #/head/H · #/head/H/base/I · #/head/H/extension/J · #/latent/F · #/find/TEXT · #/latents?… · #/ask · #/ask/F

const main = document.getElementById('main');
const query = document.getElementById('query');

// What an address names: {unit}, {query}, {table}, or {} for all heads; null if there is no such thing.
function placeOf(address) {
  const table = address.match(/^#\/latents\/?(?:\?(.*))?$/);
  if (table) return { table: table[1] ?? '' };
  const asked = facts.served && address.match(/^#\/ask(?:\/(\d+))?$/);
  if (asked) return asked[1] >= facts.latents ? null : { ask: asked[1] ? Number(asked[1]) : -1 };
  const found = address.match(
    /^(?:#\/?)?(?:latent\/(\d+)|head\/(\d+)(?:\/(base|extension)\/(\d+))?|find\/(.+))?\/?$/);
  if (!found) return null;
  const [, latent, head, kind, number, text] = found;
  if (text) {
    try {
      return { query: decodeURIComponent(text) };
    } catch {
      return null;
    }
  }
  if (latent) return latent < facts.latents ? { unit: latentAt(Number(latent)) } : null;
  if (!head) return {};
  if (head >= grid.heads) return null;
  if (!kind) return { unit: strongestIn(Number(head)) };
  if (!grid.kron || number >= (kind === 'base' ? grid.m : grid.n)) return null;
  return { unit: (kind === 'base' ? baseAt : extensionAt)(Number(head), Number(number)) };
}

async function viewOf(place) {
  if (place && Object.keys(place).length) await readLists();
  if (place?.table !== undefined) return tableView(place.table);
  if (place?.ask !== undefined) return askView(place.ask);
  if (place?.unit) return headView(place.unit);
  if (place?.query) return findView(place.query);
  if (place) return overview();
  return [make('h1', null, 'Nothing there'), make('p', null, whatThereIs(), ' ',
    make('a', { href: '#/' }, `All ${groupName}s`))];
}

let turn = 0;
let shownHead;

async function route() {
  const address = location.hash;
  const place = placeOf(address);
  turn += 1;
  const own = turn;
  const view = await viewOf(place);
  if (own !== turn) return; // another address was asked for meanwhile
  const scroll = window.scrollY;
  main.replaceChildren(...view.filter(Boolean));
  const head = place?.unit?.head;
  if (head !== undefined && head === shownHead) {
    window.scrollTo(0, scroll); // another cell of the same grid
    main.querySelector('.grid [aria-current]').focus({ preventScroll: true });
  } else window.scrollTo(0, 0);
  // The link that was followed is gone: reading goes on at the top of what it led to.
  if (turn > 1 && document.activeElement === document.body) main.focus({ preventScroll: true });
  shownHead = head;
  if (document.activeElement !== query) query.value = place?.query ?? '';
  const title = place?.query ?? address.replace(/^#?\/?/, '').replaceAll('/', ' ');
  document.title = title ? `${title} · ${facts.run}` : `${facts.run}: explorer`;
  main.dataset.address = address;
}

let waiting;

document.getElementById('search').addEventListener('submit', (event) => {
  event.preventDefault();
  clearTimeout(waiting);
  const [numberedPlace] = numbered(query.value);
  if (query.value) location.hash = numberedPlace ?? `#/find/${encodeURIComponent(query.value)}`;
});

// Results appear as one types; only the first letter makes an entry in the history.
query.addEventListener('input', () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    const isEmpty = !query.value.trim();
    const address = isEmpty ? '#/' : `#/find/${encodeURIComponent(query.value)}`;
    if (location.hash.startsWith('#/find/')) {
      history.replaceState(null, '', address);
      route();
    } else if (!isEmpty) location.hash = address;
  }, 120);
});

document.addEventListener('keydown', (event) => {
  if (event.key !== '/' || /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
  event.preventDefault();
  query.focus();
  query.select();
});

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', route);
window.addEventListener('hashchange', route);
document.getElementById('home').textContent = facts.run;
document.getElementById('to-ask').hidden = !facts.served;
readIndex().then(route).then(() => {
  document.body.dataset.ready = '';
  performance.mark('first-view');
  readLists();
});
