'use strict';
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const {rows, walks} = JSON.parse($('#data').textContent);
const bar = $('#bar'), panel = $('#panel'), tip = $('#tip'), drawer = $('#drawer'), help = $('#help');
const filter = $('#filter'), kind = $('#kind');
const pairs = $$('#pairs section.pair');
let visible = pairs;

// ---- scrolling: a place is shown below the bar, and above the walk's panel when that is open

function jump(y) {
  const far = Math.abs(y - scrollY) > 2 * innerHeight || matchMedia('(prefers-reduced-motion: reduce)').matches;
  scrollTo({top: Math.max(0, y), behavior: far ? 'instant' : 'smooth'});
}

function show(element, ours, theirs) {
  const top = bar.offsetHeight, bottom = innerHeight - (panel.hidden ? 0 : panel.offsetHeight), room = bottom - top - 30;
  const lines = [ours, theirs].filter(Boolean);
  const span = () => {
    const at = lines.map(it => it.getBoundingClientRect());
    return [Math.min(...at.map(r => r.top)), Math.max(...at.map(r => r.bottom))];
  };
  if (lines.length === 2 && span()[1] - span()[0] > room) {
    // Too far apart to be seen together: the higher side comes down until the two stand beside each other.
    const [a, b] = lines.map(it => it.getBoundingClientRect());
    if (Math.abs(ours.closest('.side').offsetLeft - theirs.closest('.side').offsetLeft) > 50)
      (a.top < b.top ? ours : theirs).closest('.side').style.marginTop = Math.abs(a.top - b.top) + 'px';
    else lines.pop();
  }
  const head = element.getBoundingClientRect().top;
  let y = head - top - 10;
  if (lines.length) {
    const [first, last] = span();
    if (last - head > room) y = (first + last) / 2 - (top + bottom) / 2;
  }
  jump(scrollY + y);
}

function unfold(element) {
  const fold = element.closest('.fold');
  if (fold) fold.classList.add('open');
}

addEventListener('click', event => {
  if (event.target.matches('.more')) unfold(event.target);
});

// ---- where we are

function current() {
  const edge = bar.offsetHeight + 40;
  let low = 0, high = visible.length - 1, found = -1;
  while (low <= high) {
    const middle = (low + high) >> 1;
    if (visible[middle].getBoundingClientRect().top <= edge) { found = middle; low = middle + 1; } else high = middle - 1;
  }
  return found;
}

let waiting = false;
function locate() {
  waiting = false;
  const at = current(), now = $('#now');
  now.textContent = at < 0 ? '' : visible[at].dataset.t;
  now.href = at < 0 ? '#top' : '#' + visible[at].id;
}
addEventListener('scroll', () => {
  if (!waiting) { waiting = true; requestAnimationFrame(locate); }
}, {passive: true});

function mark(element) {
  $$('.pair.here').forEach(it => it.classList.remove('here'));
  if (element) element.classList.add('here');
}

let stepped = null;   // where j and k have brought us; scrolling may still be under way
function step(by, list = visible) {
  if (!list.length) return;
  const at = stepped && document.body.contains(stepped.to) && performance.now() - stepped.when < 900 ? visible.indexOf(stepped.to) : current();
  const from = pairs.indexOf(visible[at]);
  const next = by > 0 ? list.find(it => pairs.indexOf(it) > from) : list.filter(it => pairs.indexOf(it) < from).pop();
  if (!next) return;
  stepped = {to: next, when: performance.now()};
  mark(next);
  show(next);
  history.replaceState(null, '', '#' + next.id);
}

// ---- the filter

function apply() {
  const words = filter.value.toLowerCase().replace(/::/g, '.').split(/\s+/).filter(Boolean), what = kind.value;
  const narrow = words.length > 0 || what !== '';
  const fits = it => (!what || it.classList.contains(what)) && words.every(word => {
    const names = it.dataset.k.replace(/::/g, '.');
    return word[0] === '#' ? names.split(' ').includes(word) : names.includes(word);
  });
  visible = [];
  for (const it of pairs) {
    const fit = fits(it);
    it.hidden = !fit;
    if (fit) visible.push(it);
  }
  const kept = new Set(visible.map(it => it.id));
  for (const index of [$('#index'), $('.inner', drawer)]) {
    for (const link of $$('.cls a', index)) {
      const fit = kept.has(link.getAttribute('href').slice(1));
      link.hidden = !fit;
    }
    for (const group of $$('.cls', index)) group.hidden = !$('a:not([hidden])', group);
    for (const group of $$('.mod', index)) group.hidden = !$('.cls:not([hidden])', group);
  }
  for (const chapter of $('#pairs').children) {   // headings with nothing below them go
    chapter.hidden = !$('section:not([hidden])', chapter);
    let heading = null;
    for (const it of chapter.children) {
      if (it.matches('.class')) { heading = it; heading.hidden = true; } else if (heading && !it.hidden && it.matches('section')) heading.hidden = false;
    }
  }
  $('#nothing').hidden = visible.length > 0;
  document.body.classList.toggle('filtered', narrow);
  $('#count').textContent = narrow ? visible.length + ' of ' + pairs.length : '';
  locate();
}
filter.addEventListener('input', () => {
  apply();
  scrollTo({top: 0, behavior: 'instant'});   // the contents have become the list of what was found
});
kind.addEventListener('change', () => {
  apply();
  scrollTo({top: 0, behavior: 'instant'});
});
filter.addEventListener('keydown', event => {
  if (event.key === 'Enter' && visible.length) {
    filter.blur();
    mark(visible[0]);
    show(visible[0]);
  }
});
function clear() {
  if (!filter.value && !kind.value) return false;
  filter.value = kind.value = '';
  apply();
  return true;
}

// ---- walks

let walk = null, at = 0;

function start(number, from = 0) {
  if (!walks[number]) return;
  clear();
  close_drawer();
  walk = walks[number];
  panel.hidden = false;
  document.body.classList.add('walking');
  $('.title', panel).textContent = walk.title;
  const ticks = $('.ticks', panel);
  ticks.replaceChildren(...walk.steps.map((it, i) => {
    const tick = document.createElement('button');
    tick.title = (i + 1) + '. ' + it.name;
    tick.setAttribute('aria-label', 'Step ' + tick.title);
    tick.addEventListener('click', () => go(i));
    return tick;
  }));
  go(from);
}

function light(selector, name, numbers) {
  const found = [];
  for (const pre of $$(selector + ' pre[data-f="' + name + '"]', $('#' + CSS.escape(walk.steps[at].to))))
    for (const line of $$('.l', pre))
      if (numbers.includes(+line.dataset.n)) found.push(line);
  return found;
}

function dim() {
  $$('.l.now').forEach(line => line.classList.remove('now'));
  $$('.pair.here .side').forEach(side => { side.style.marginTop = ''; });
}

function go(to) {
  if (!walk || to < 0 || to >= walk.steps.length) return;
  at = to;
  const it = walk.steps[at], pair = $('#' + CSS.escape(it.to));
  dim();
  mark(pair);
  const ours = it.ours.flatMap(([file, number]) => light('.right', file, [number]));
  const theirs = $('.left pre', pair) ? light('.left', $('.left pre', pair).dataset.f, it.theirs) : [];
  for (const line of [...ours, ...theirs]) { line.classList.add('now'); unfold(line); }
  $('.title', panel).textContent = walk.title + ' \u00b7 ' + (at + 1) + ' of ' + walk.steps.length;
  $('.name', panel).textContent = it.name;
  $('.name', panel).href = '#' + it.to;
  $('p', panel).innerHTML = it.text;
  $('.previous', panel).disabled = at === 0;
  $('.next', panel).disabled = at === walk.steps.length - 1;
  $$('.ticks button', panel).forEach((tick, i) => tick.classList.toggle('done', i <= at));
  show(pair, ours[0], theirs[0]);
  history.replaceState(null, '', '#walk-' + walk.id + '-' + (at + 1));
}

function leave() {
  if (!walk) return false;
  history.replaceState(null, '', '#' + walk.steps[at].to);
  walk = null;
  panel.hidden = true;
  document.body.classList.remove('walking');
  dim();
  return true;
}

$('.next', panel).addEventListener('click', () => go(at + 1));
$('.previous', panel).addEventListener('click', () => go(at - 1));
$('.close', panel).addEventListener('click', leave);
$$('.walk').forEach(it => it.addEventListener('click', () => start(+it.dataset.walk)));
function next_walk() {
  start(walk ? (walks.indexOf(walk) + 1) % walks.length : 0);
}
$('#open-walk').addEventListener('click', next_walk);

// ---- deviations, told where one points

let pinned = false;
function tell(badge) {
  const row = rows[badge.dataset.row];
  if (!row) return;
  tip.innerHTML = '<p class="where">' + row[0] + '</p><p><b>CPython</b> ' + row[1] + '</p><p><b>Here</b> ' + row[2] +
    '</p><p><a href="#deviation-' + badge.dataset.row + '">Deviation ' + badge.dataset.row + '</a></p>';
  tip.hidden = false;
  const at = badge.getBoundingClientRect();
  const left = Math.min(Math.max(12, at.left - 40), document.documentElement.clientWidth - tip.offsetWidth - 12);
  const below = at.bottom + 8 + tip.offsetHeight < innerHeight || at.top < tip.offsetHeight + 60;
  tip.style.left = left + 'px';
  tip.style.top = scrollY + (below ? at.bottom + 8 : at.top - tip.offsetHeight - 8) + 'px';
}
let hiding = 0;
function hush() {
  const open = !tip.hidden;
  tip.hidden = true;
  pinned = false;
  return open;
}
addEventListener('mouseover', event => {
  const badge = event.target.closest('.badge');
  if (badge || event.target.closest('#tip')) clearTimeout(hiding);
  if (badge && !pinned) tell(badge);
});
addEventListener('mouseout', event => {
  if (!pinned && event.target.closest('.badge, #tip')) { clearTimeout(hiding); hiding = setTimeout(hush, 250); }
});
addEventListener('focusin', event => {
  if (event.target.matches('.badge') && event.target.matches(':focus-visible')) tell(event.target);
});
addEventListener('click', event => {
  const badge = event.target.closest('.badge');
  if (badge) { tell(badge); pinned = true; } else if (!event.target.closest('#tip') || event.target.closest('#tip a')) hush();
});

// ---- contents, theme, help

$('.inner', drawer).append(...$$('#index > *').map(it => it.cloneNode(true)));
function close_drawer() {
  const open = !drawer.hidden;
  drawer.hidden = true;
  return open;
}
$('#open-contents').addEventListener('click', event => { event.stopPropagation(); drawer.hidden = !drawer.hidden; });
addEventListener('click', event => {
  if (event.target.closest('#drawer a') || !event.target.closest('#drawer, #bar')) close_drawer();
});

function turn() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = dark ? 'light' : 'dark';
  try { localStorage.setItem('theme', root.dataset.theme); } catch (error) { /* it is forgotten, then */ }
}
$('#theme').addEventListener('click', turn);
$('#open-help').addEventListener('click', () => help.showModal());

// ---- keys

addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Escape') {
    if (help.open) return;
    filter.blur();
    if (!hush() && !close_drawer() && !clear()) leave();
    return;
  }
  if (event.target.matches('input, select, textarea') || help.open) return;
  const differing = () => visible.filter(it => it.classList.contains('differs'));
  const keys = {
    j: () => walk ? go(at + 1) : step(1), k: () => walk ? go(at - 1) : step(-1),
    d: () => step(1, differing()), D: () => step(-1, differing()),
    '/': () => { filter.focus(); filter.select(); }, '?': () => help.showModal(),
    w: next_walk, c: () => { drawer.hidden = !drawer.hidden; }, t: turn,
  };
  keys.ArrowRight = keys.n = keys.j;
  keys.ArrowLeft = keys.p = keys.k;
  if (!keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});

// ---- links: what they lead to may be filtered away

function arrive(id = decodeURIComponent(location.hash.slice(1))) {
  const step_of = id.match(/^walk-(\w+)-(\d+)$/);
  if (step_of) return start(walks.findIndex(it => it.id === step_of[1]), step_of[2] - 1);
  const target = id && document.getElementById(id);
  if (!target) return;
  if (target.hidden || (target.closest('#pairs') && !target.offsetParent)) clear();
  if (target.matches('.pair')) mark(target);
  stepped = null;
  show(target);
}
addEventListener('hashchange', () => arrive());
apply();
arrive();
