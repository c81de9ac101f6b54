// Labels of latents: those that came with the page, and those that were edited in it.

let labels = new Map(); // {text, by, detection} by latent
let edited = new Map(); // texts by latent, not saved yet; '': taken away

const labelOf = (number) => labels.get(number);
const editsKey = `kronsae labels ${facts.sae}`;

function startLabels(plain) {
  labels = new Map(Object.entries(plain).map(([number, label]) => [Number(number), label]));
  let kept = [];
  try {
    kept = JSON.parse(localStorage.getItem(editsKey) ?? '[]');
  } catch { /* no storage for this page */ }
  const news = kept.filter(([number, text]) => (labelOf(number)?.text ?? '') !== text);
  edited = new Map(news);
  for (const [number, text] of news) putLabel(number, text);
  showEdits();
}

function putLabel(number, text) {
  if (text) labels.set(number, { text });
  else labels.delete(number);
}

function plainLabels() {
  const numbers = [...labels.keys()].sort((a, b) => a - b);
  return {
    format: 'kronsae-labels', format_version: 1, sae_sha256: facts.sae,
    labels: Object.fromEntries(numbers.map((number) => [number, labelOf(number)])),
  };
}

async function editLabel(number, text) {
  if (text === (labelOf(number)?.text ?? '')) return;
  putLabel(number, text);
  edited.set(number, text);
  if (source.saveLabels) {
    await source.saveLabels({ [number]: text }).then(() => edited.clear(), () => {}); // else a file
  }
  try {
    localStorage.setItem(editsKey, JSON.stringify([...edited]));
  } catch { /* they last as long as the page */ }
  showEdits();
}

// In the bar: how many labels were edited, and a file of all to put beside the run.
function showEdits() {
  const place = document.getElementById('edits');
  place.replaceChildren(...(edited.size ? [make('button', {
    type: 'button',
    title: `${edited.size} edited: save labels.json into the run's folder, or give it to `
      + 'kronsae explore --labels; then the page made next has them',
    onclick: downloadLabels,
  }, `${source.saveLabels ? 'Not saved: ' : ''}Download labels.json`)] : []));
}

function downloadLabels() {
  const file = new Blob([`${JSON.stringify(plainLabels(), null, 2)}\n`], { type: 'application/json' });
  const href = URL.createObjectURL(file);
  make('a', { href, download: 'labels.json' }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

const labelText = (number) => (labelOf(number)
  ? make('span', { class: 'label', title: labelOf(number).text }, labelOf(number).text) : null);

// A latent's label, with who wrote it, and a button to edit it.
function labelLine(number) {
  const line = make('div', { class: 'labelline' });
  function show(focus) {
    const label = labelOf(number);
    const score = typeof label?.detection === 'number' ? `, detection ${short(label.detection)}` : '';
    const button = make('button', { type: 'button', onclick: edit },
      label ? 'Edit label' : 'Add a label');
    line.replaceChildren(...[labelText(number),
      label?.by ? make('small', { class: 'faint' }, `by ${label.by}${score}`) : null, button]
      .filter(Boolean));
    if (focus) button.focus();
  }
  function edit() {
    const field = make('input', { 'aria-label': `Label of latent ${number}`, value: labelOf(number)?.text });
    const form = make('form', {
      onsubmit: (event) => {
        event.preventDefault();
        editLabel(number, field.value.trim());
        show(true);
      },
      onkeydown: (event) => {
        if (event.key === 'Escape') show(true);
      },
    }, field, make('button', null, 'Save'),
    make('button', { type: 'button', onclick: () => show(true) }, 'Cancel'));
    line.replaceChildren(form);
    field.focus();
    field.select();
  }
  show();
  return line;
}
