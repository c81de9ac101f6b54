// With the language model behind the page: the features of a text that is typed, and what the
// model writes when some of them are changed.

const KINDS = { steer: ['add'], clamp: ['set to'], ablate: ['set to 0'] };
const SHOWN_FEATURES = 12;

// What was asked last, which stays while other views are looked at.
const asked = { text: '', answer: null, token: -1, latent: -1, edits: [], made: null, cut: null };

const usualOf = (latent) => Number((valueOf(latentAt(latent), 'max') || 1).toPrecision(3));

function addEdit(latent) {
  if (asked.edits.some((edit) => edit.latent === latent)) return;
  asked.edits.push({ latent, kind: 'steer', value: usualOf(latent) });
}

// A form whose answer is shown in `place`; meanwhile its button is off, and a word says so.
function asking(form, place, work) {
  const button = form.querySelector('button:not([type="button"])');
  const status = make('p', { class: 'status', role: 'status' });
  form.append(status);
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    button.disabled = true;
    status.textContent = 'The model computes…';
    try {
      await work();
      place.replaceChildren(...show(place.dataset.shows));
      status.textContent = '';
    } catch (error) {
      place.replaceChildren();
      status.textContent = error.message;
    }
    button.disabled = false;
  });
  form.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) form.requestSubmit(button);
  });
  return form;
}

const show = (what) => ({
  features: featuresFound, edits: editRows, made: generations, cut: ablations,
}[what]().filter(Boolean));

const placeFor = (what) => make('div', { 'data-shows': what }, show(what));

function again(what) {
  main.querySelector(`[data-shows="${what}"]`)?.replaceChildren(...show(what));
}

// Features of the chosen token, or of the whole text, strongest first: [latent, value, tokens].
function strongestFeatures() {
  const found = new Map();
  asked.answer.features.forEach((features, at) => {
    if (asked.token >= 0 && at !== asked.token) return;
    for (const [latent, value] of features) {
      const [most, tokens] = found.get(latent) ?? [0, 0];
      found.set(latent, [Math.max(most, value), tokens + 1]);
    }
  });
  return [...found].map(([latent, [value, tokens]]) => [latent, value, tokens])
    .sort((one, other) => other[1] - one[1]);
}

function valuesOf(latent) {
  return asked.answer.features.map((features) => (
    features.find(([number]) => number === latent)?.[1] ?? 0));
}

function featuresFound() {
  if (!asked.answer) return [];
  const { tokens, kept } = asked.answer;
  const values = asked.latent >= 0 ? valuesOf(asked.latent)
    : asked.answer.features.map((features) => features[0]?.[1] ?? 0);
  const most = Math.max(...values, 1e-9);
  const shaded = asked.latent >= 0 ? `latent ${asked.latent}` : 'the strongest feature of each token';
  const text = make('ol', { class: 'asked', 'aria-label': 'Tokens of the text' }, tokens.map((token, at) => (
    make('li', null, make('button', {
      type: 'button', 'aria-pressed': String(at === asked.token), vars: { '--a': values[at] / most },
      title: kept[at] ? `${short(values[at])}` : 'The SAE was not trained on this token',
      'aria-label': `token ${at}: ${token.trim() || 'blank'}${values[at] ? `, ${short(values[at])}` : ''}`,
      onclick: () => {
        asked.token = at === asked.token ? -1 : at;
        again('features');
        main.querySelectorAll('.asked button')[at].focus();
      },
    }, token.replace(/^ /, '\u00a0'))))));
  const features = strongestFeatures();
  const where = asked.token >= 0 ? `on “${tokens[asked.token].trim()}”` : 'in the text';
  const rows = features.slice(0, SHOWN_FEATURES).map(([latent, value, count]) => [
    make('span', { class: 'tools' }, make('button', {
      type: 'button', 'aria-pressed': String(latent === asked.latent),
      'aria-label': `Shade by latent ${latent}`,
      onclick: () => {
        asked.latent = latent === asked.latent ? -1 : latent;
        again('features');
        again('cut');
      },
    }, 'Shade'),
    make('button', {
      type: 'button',
      'aria-label': `Change latent ${latent}`,
      onclick: () => {
        addEdit(latent);
        again('edits');
      },
    }, 'Change')),
    make('a', { href: addressOf(latentAt(latent)) }, nameOf(latentAt(latent))),
    labelText(latent) ?? make('span', { class: 'chips' }, tokensOf(latentAt(latent), 3).map((t) => chip(t))),
    short(value), grouped(count),
  ]);
  return [text,
    make('p', { class: 'note' }, `Shaded by ${shaded}. Choose a token to see its features.`),
    features.length ? askTable(`The strongest of ${grouped(features.length)} features ${where}`,
      ['', 'feature', 'label or top tokens', 'activation', 'tokens'], rows)
      : make('p', null, 'No feature is active here: the SAE was not trained on this token.')];
}

function askTable(caption, head, rows) {
  return make('div', { class: 'scroll' }, make('table', { class: 'answers' }, make('caption', null, caption),
    make('thead', null, make('tr', null, head.map((text) => make('th', { scope: 'col' }, text)))),
    make('tbody', null, rows.map((cells) => make('tr', null, cells.map((cell) => make('td', null, cell)))))));
}

function editRows() {
  if (!asked.edits.length) return [make('p', { class: 'note' }, 'No latent is changed yet.')];
  return asked.edits.map((edit) => make('div', { class: 'edit' },
    make('a', { href: addressOf(latentAt(edit.latent)) }, nameOf(latentAt(edit.latent))),
    labelText(edit.latent),
    choice('', KINDS, edit.kind, (kind) => {
      edit.kind = kind;
      again('edits');
    }),
    edit.kind === 'ablate' ? null : make('input', {
      type: 'number', step: 'any', value: String(edit.value), required: true,
      'aria-label': `Value for latent ${edit.latent}`,
      oninput: (event) => { edit.value = event.target.valueAsNumber; },
    }),
    make('small', { class: 'faint' }, `its maximum is ${short(valueOf(latentAt(edit.latent), 'max'))}`),
    make('button', {
      type: 'button', 'aria-label': `Leave latent ${edit.latent} as it is`,
      onclick: () => {
        asked.edits = asked.edits.filter((other) => other !== edit);
        again('edits');
      },
    }, 'Remove')));
}

const nextTokens = (next) => make('ol', { class: 'next' }, next.map(([token, share]) => (
  make('li', null, chip(token), ' ', percent(share)))));

function generations() {
  if (!asked.made) return [];
  const column = (title, { text, next }) => make('section', null, make('h3', null, title),
    make('pre', null, make('span', { class: 'faint' }, asked.made.prompt), text),
    make('h4', null, 'Next token after the prompt'), nextTokens(next));
  return [make('div', { class: 'beside' }, column('Unchanged', asked.made.plain),
    column(asked.made.changes || 'Nothing is changed', asked.made.edited))];
}

const FACTORS = {
  nothing: 'nothing', base: 'its base', extension: 'its extension', composition: 'the latent alone',
};

function ablations() {
  if (!asked.cut) return [];
  const fires = asked.cut.fires.filter((value) => value > 0).length;
  return [make('p', null, fires ? `Latent ${asked.cut.latent} fires on ${fires} of the text's tokens.`
    : `Latent ${asked.cut.latent} does not fire on this text: to ablate it alone changes nothing.`),
  askTable('The next token after the text', ['ablated', 'likeliest, with probabilities'],
    Object.entries(asked.cut.next).map(([what, next]) => [FACTORS[what], nextTokens(next)]))];
}

function changesInWords(edits) {
  return edits.map(({ latent, kind, value }) => (kind === 'ablate' ? `${nameOf(latentAt(latent))} set to 0`
    : kind === 'clamp' ? `${nameOf(latentAt(latent))} set to ${short(value)}`
      : `${nameOf(latentAt(latent))} ${value < 0 ? '−' : '+'} ${short(Math.abs(value))}`)).join(', ');
}

function askView(latent) {
  if (latent >= 0) {
    asked.latent = latent;
    addEdit(latent);
  }
  const text = make('textarea', {
    rows: 4, spellcheck: 'false', required: true, 'aria-label': 'Text', maxlength: 20000,
    oninput: (event) => { asked.text = event.target.value; },
  });
  text.value = asked.text;
  const count = make('input', {
    type: 'number', min: 1, max: facts.mostTokens, value: '40', required: true,
  });
  const chosen = make('input', {
    type: 'number', min: 0, max: facts.latents - 1, required: true,
    value: String(asked.latent >= 0 ? asked.latent : 0),
  });
  const longest = make('p', { class: 'note' }, `At most ${grouped(facts.longestText)} tokens.`);
  const [features, made, cut] = ['features', 'made', 'cut'].map(placeFor);
  const read = asking(make('form', { class: 'ask' }, text, longest,
    make('button', null, 'Show its features')),
    features, async () => {
      asked.answer = await ask('ask', { text: text.value });
      asked.token = -1;
    });
  const write = asking(make('form', { class: 'ask' },
    placeFor('edits'),
    make('div', { class: 'tools' }, make('label', null, 'New tokens ', count),
      make('button', null, 'Generate both'))), made, async () => {
    const edits = asked.edits.map((edit) => ({ ...edit, value: edit.kind === 'ablate' ? 0 : edit.value }));
    const request = { prompt: text.value, edits, new_tokens: count.valueAsNumber };
    const answer = await ask('generate', request);
    asked.made = { ...answer, prompt: text.value, changes: changesInWords(edits) };
  });
  const parts = [make('h1', null, 'Ask the model', make('small', null, facts.model)), read, features,
    make('h2', null, 'Change features, and generate'),
    make('p', null, 'The text above goes on, without the changes and with them, by the likeliest token '
      + 'each time. What the SAE does not reconstruct stays.'), write, made];
  if (grid.kron) {
    parts.push(make('h2', null, 'Ablate a latent, its base, or its extension'),
      make('p', null, 'To ablate a base or an extension silences all latents that it composes; others '
        + 'are selected in their place.'),
      asking(make('form', { class: 'ask' }, make('div', { class: 'tools' },
        make('label', null, 'Latent ', chosen), make('button', null, 'Ablate each'))), cut, async () => {
        const request = { text: text.value, latent: chosen.valueAsNumber };
        asked.cut = { ...await ask('ablate', request), latent: chosen.valueAsNumber };
      }), cut);
  }
  return parts;
}
