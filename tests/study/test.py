#!/usr/bin/env python3
"""The page to study, in headless Chromium; and what the check says when the sources no longer match.

Exit status: 0, 1 when something is wrong, 77 (skip) without chromedriver or without a Python that has smtpd.
With NO_SKIP=1 in the environment that fails instead.
"""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import warnings

HERE = pathlib.Path(__file__).resolve().parent
TOP = HERE.parent.parent
sys.path.insert(0, str(HERE))
import browser
import study

failures = []


def check(true, what):
    if not true:
        failures.append(what)
        print('FAILED: ' + what)
    return true


def run(*args, root=TOP):
    return subprocess.run([sys.executable, str(root / 'tests/study/study.py'), *args], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)


# ---- the check

def scratch(folder):
    """As much of the tree as the page is made of."""
    root = pathlib.Path(tempfile.mkdtemp(dir=folder))
    for name in study.SOURCES + ('tests/DEVIATIONS.md', 'tests/reference/mailmanproxy-3.10.txt'):
        if (TOP / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TOP / name, root / name)
    shutil.copytree(HERE, root / 'tests/study', ignore=shutil.ignore_patterns('__pycache__'))
    return root


def change(root, pattern, replacement, *names):
    count = 0
    for name in names:
        if (root / name).exists():
            text, n = re.subn(pattern, replacement, (root / name).read_text(encoding='utf-8'), flags=re.M)
            (root / name).write_text(text, encoding='utf-8')
            count += n
    return count


def test_check():
    it = run('--check')
    check(it.returncode == 0, 'what is in the tree matches: %s%s' % (it.stdout, it.stderr))
    papers = ('tests/DEVIATIONS.md',)
    first = next(l for l in (HERE / 'walks.txt').read_text(encoding='utf-8').splitlines() if l.startswith('-- '))[3:]
    changes = [   # (what is done, pattern, replacement, files, what has to be said)
        ('a method is gone', r'\bsmtp_NOOP\b', 'smtp_NOPE', study.SOURCES, r'smtpd\.py: SMTPChannel\.smtp_NOOP has no twin'),
        ('a function is gone', r'\bfind_prefix_at_end\b', 'prefix_at_end', study.SOURCES,
         r'asynchat\.py: find_prefix_at_end has no twin'),
        ('a row of Not ported is gone', r'^\|[^|\n]*compact_traceback.*\n', '', papers,
         r'asyncore\.py: compact_traceback has no twin'),
        ('an anchor names nothing of Python', r'\Z', '\n// asyncore.py: dispatcher.never\nvoid never();\n',
         ('asyncore.cpp',), r'asyncore\.cpp:\d+: asyncore\.py has no dispatcher\.never'),
        ('a deviation has no place', r'^6 .*\n', '', ('tests/study/deviations.txt',), r'deviation 6 has no place'),
        ('a place of a deviation is gone', r'^(6 +\S+).*', r'\1 no such text', ('tests/study/deviations.txt',),
         r'has no line with no such text'),
        ('a deviation that there is not', r'\Z', '999 dispatcher::send\n', ('tests/study/deviations.txt',),
         r'there is no deviation 999'),
        ("a step's function is gone", r'^-- %s$' % re.escape(first), '-- ' + first + 'Gone', ('tests/study/walks.txt',),
         r'walks\.txt:\d+: there is no ' + re.escape(first) + 'Gone'),
        ("a step's line is gone", r'^c\+\+: .*', 'c++: no such text', ('tests/study/walks.txt',),
         r'walks\.txt:\d+: \S+ has no line with no such text'),
        ("a step's line is gone in Python", r'^py: .*', 'py: no such text', ('tests/study/walks.txt',),
         r"walks\.txt:\d+: Python's \S+ has no line with no such text"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for what, pattern, replacement, names, said in changes:
            root = scratch(folder)
            check(change(root, pattern, replacement, *names) > 0, what + ': the change can be made')
            it = run('--check', root=root)
            check(it.returncode == 1 and re.search(said, it.stdout), '%s: it is said: %s' % (what, it.stdout + it.stderr))
            it = run('-o', str(root / 'page.html'), root=root)
            check(it.returncode == 1 and not (root / 'page.html').exists(), what + ': no page is written')
    it = run('--check', '--python', '/no/such/python')
    check(it.returncode == 77 and it.stderr.count('\n') == 1 and '3.11' in it.stderr and not it.stdout,
          'without a Python that will do, it says so in a line: ' + it.stderr)


# ---- what is on the page

def test_content(page, python):
    ids = page.run("return [...document.querySelectorAll('[id]')].map(it => it.id)")
    check(len(ids) == len(set(ids)), 'no name is given twice: %s' % sorted(i for i in set(ids) if ids.count(i) > 1)[:5])
    links = page.run("return [...document.querySelectorAll('a')].map(it => it.getAttribute('href'))")
    lost = sorted({l for l in links if not (l and l[0] == '#' and l[1:] in ids)})
    check(len(links) > 1000 and not lost, 'every link leads somewhere: %s of %d' % (lost[:5], len(links)))
    outside = page.run("return [...document.querySelectorAll('[src], link')].map(it => it.src || it.href)"
                       ".filter(it => !it.startsWith('data:'))")
    check(not outside, 'nothing is fetched: %s' % outside)

    # Each function of the three modules is there, whole, and in Python's order.
    shown = page.run("return [...document.querySelectorAll('.left pre')].map(pre => [pre.dataset.f,"
                     " +pre.firstChild.dataset.n, +pre.lastChild.dataset.n])")
    for module in study.MODULES:
        text = pathlib.Path(python[1][module]).read_text(encoding='utf-8')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
        pieces = [(first, last) for file, first, last in shown if file == module + '.py']
        check(pieces == sorted(pieces), module + ' is in its own order')
        missing = [f.name for f in functions if not any(a <= f.lineno and f.end_lineno <= b for a, b in pieces)]
        check(functions and not missing, '%s: these are not shown: %s' % (module, missing))
        covered = {n for a, b in pieces for n in range(a, b + 1)}
        left_out = [n for n, line in enumerate(text.split('\n'), 1) if line.strip() and n not in covered]
        check(not left_out, '%s: lines that are not shown: %s' % (module, left_out[:9]))

    # Each line is what stands in its file, under its number.
    lines = page.run("return [...document.querySelectorAll('.side .l')].map(it => [it.parentNode.dataset.f, +it.dataset.n,"
                     " [...it.childNodes].filter(n => n.nodeName !== 'BUTTON').map(n => n.textContent).join('')])")
    files = {name: (TOP / name).read_text(encoding='utf-8').split('\n') for name in study.SOURCES}
    files.update({m + '.py': pathlib.Path(f).read_text(encoding='utf-8').split('\n') for m, f in python[1].items()})
    wrong = [(f, n) for f, n, text in lines if text.split() != files[f][n - 1].split()]
    check(len(lines) > 5000 and not wrong, 'lines are as they are in their files: %s of %d' % (wrong[:5], len(lines)))
    code = {(f, n) for f, n, _ in lines}
    for name in ('asyncore.cpp', 'smtpd.cpp', 'main.cpp'):
        source = study.Source(TOP / name)
        bodies = [e for e in source.entities if e.kind == 'function' and e.body]
        lost = [e.key for e in bodies if not all((name, n) in code for n in range(e.first, e.last + 1))]
        check(bodies and not lost, '%s: these are not shown: %s' % (name, lost[:5]))
    colours = page.run("return ['k', 's', 'c', 'n', 'd'].map(k => ['.left', '.right'].map(side =>"
                       " document.querySelectorAll(side + ' .l i.' + k).length))")
    check(all(a > 50 and b > 50 for a, b in colours), 'both sides are coloured: %s' % colours)

    # Deviations are marked, each of them, and told with their reason.
    rows = page.run("return JSON.parse(document.querySelector('#data').textContent).rows")
    marks = page.run("return [...document.querySelectorAll('.l .badge')].map(it => it.dataset.row)")
    notes = page.run("return [...document.querySelectorAll('.note .dev')].map(it =>"
                     " [it.querySelector('.badge').dataset.row, it.textContent])")
    for row in rows:
        check(row in marks and any(r == row and len(text) > 30 for r, text in notes), 'deviation %s is marked, and told' % row)
    check(page.run("return document.querySelectorAll('.pair.only').length") > 50 and
          page.run("return document.querySelectorAll('.pair.not-ported').length") > 3, 'what has no twin is told as such')
    old = page.run("const it = document.getElementById('smtpd.MailmanProxy'); return it && it.querySelector('.left').textContent")
    check(old and ('taken out in Python 3.11' in old) == (not re.search(r'^class MailmanProxy', '\n'.join(files['smtpd.py']), re.M)),
          'MailmanProxy is shown, or said to be missing')


# ---- what one does with it

SEEN = """
const it = arguments[0] === null ? null : document.getElementById(arguments[0]);
const bar = document.querySelector('#bar').offsetHeight, panel = document.querySelector('#panel');
const bottom = innerHeight - (panel.hidden ? 0 : panel.offsetHeight);
return [...(it ? [it] : [...document.querySelectorAll('.right .l.now'), ...document.querySelectorAll('.left .l.now')])].map(e => {
  const r = e.getBoundingClientRect();
  return r.height > 0 && r.bottom > bar && r.top < bottom;
});
"""
VISIBLE = "return [...document.querySelectorAll('#pairs section.pair')].filter(it => it.offsetParent).map(it => it.id)"


def test_links(page):
    ids = page.run("return [...new Set([...document.querySelectorAll('#index a')].map(it => it.hash.slice(1)))]")
    hidden = page.run("""
        const lost = [];
        for (const id of arguments[0]) {
          arrive(id);
          const r = document.getElementById(id).getBoundingClientRect();
          if (!(r.height > 0 && r.top >= 0 && r.top < innerHeight)) lost.push(id);
        }
        return lost;""", ids)
    check(len(ids) > 300 and not hidden, 'the contents lead to every function: %s' % hidden[:5])
    page.run("scrollTo(0, 0)")
    page.click('#index .mod:nth-child(3) .cls a:nth-child(4)')
    target = page.run("return decodeURIComponent(location.hash.slice(1))")
    check(page.run(SEEN, target) == [True], 'a click in the contents shows ' + target)
    page.run("document.querySelector('.right .l a').click()")
    target = page.run("return decodeURIComponent(location.hash.slice(1))")
    check(page.run(SEEN, target) == [True], 'a click on a name in the code shows ' + target)


def test_filter(page):
    everything = page.run(VISIBLE)
    page.keys('/')
    page.keys('SMTP_mail')
    found = page.run(VISIBLE)
    check('smtpd.SMTPChannel.smtp_MAIL' in found and len(found) < 5, 'the filter finds smtp_MAIL: %s' % found)
    check(page.run("return document.querySelector('#count').textContent") == '%d of %d' % (len(found), len(everything)),
          'it says how many')
    shown = page.run("return [...document.querySelectorAll('#index a')].filter(it => it.offsetParent && it.closest('.cls'))"
                     ".map(it => it.hash.slice(1))")
    check(shown == found, 'the contents are filtered too: %s' % shown)
    headings = page.run("return [...document.querySelectorAll('#pairs h2, #pairs h3')].filter(it => it.offsetParent)"
                        ".map(it => it.textContent.trim())")
    check(headings == ['smtpd.py', 'SMTPChannel'], 'headings with nothing below them are gone: %s' % headings)
    page.keys('Enter')
    check(page.run(SEEN, 'smtpd.SMTPChannel.smtp_MAIL') == [True], 'Enter goes there')
    page.keys('Escape')
    check(page.run(VISIBLE) == everything, 'Escape shows everything again')
    for text, fits in (('async_chat::push', lambda i: 'async_chat' in i), ('#6', lambda i: True)):
        page.keys('/')
        page.keys(text)
        found = page.run(VISIBLE)
        check(found and len(found) < 9 and all(fits(i) for i in found), '%s finds %s' % (text, found))
        page.keys('Escape')
    page.keys('/')
    page.keys('nothing has this name')
    check(page.run(VISIBLE) == [] and page.run("return !document.querySelector('#nothing').hidden"), 'nothing found is said')
    page.keys('Escape')
    for kind in ('pair', 'differs', 'only', 'not-ported'):
        page.run("const k = document.querySelector('#kind'); k.value = arguments[0]; k.dispatchEvent(new Event('change'))", kind)
        wrong = page.run("return [...document.querySelectorAll('#pairs section.pair')].filter(it =>"
                         " !!it.offsetParent !== it.classList.contains(arguments[0])).length", kind)
        check(wrong == 0 and page.run(VISIBLE), 'what to show: ' + kind)
    page.run("location.hash = '#smtpd.SMTPChannel.smtp_MAIL'")
    page.run("return 0")
    check(page.run(SEEN, 'smtpd.SMTPChannel.smtp_MAIL') == [True], 'a link to what is filtered away shows it')
    check(page.run(VISIBLE) == everything, 'and forgets the filter')


STEP = """return [document.querySelector('#panel .title').textContent, document.querySelector('#panel p').textContent,
    document.querySelector('#panel .next').disabled, document.querySelectorAll('.pair.here').length, location.hash]"""


def test_walks(page):
    walks = page.run("return JSON.parse(document.querySelector('#data').textContent).walks")
    check([w['id'] for w in walks] == ['connect', 'proxy'], 'there are two walks')
    for number, walk in enumerate(walks):
        page.run("scrollTo(0, 0)")
        page.click('.walk[data-walk="%d"]' % number)
        texts = []
        for step in range(len(walk['steps'])):
            title, text, last, here, url = page.run(STEP)
            where = '%s, step %d' % (walk['id'], step + 1)
            check(title.endswith('%d of %d' % (step + 1, len(walk['steps']))) and len(text) > 30 and here == 1, where)
            check(url == '#walk-%s-%d' % (walk['id'], step + 1), where + ' has a link')
            seen = page.run(SEEN, None)
            ours, theirs = len(walk['steps'][step]['ours']), len(walk['steps'][step]['theirs'])
            check(seen and seen[0] and (not theirs or seen[-theirs]), where + ': its lines are in sight: %s' % seen)
            check(len(seen) == ours + theirs, where + ': each of its lines is lit: %d' % len(seen))
            check(last == (step + 1 == len(walk['steps'])), where + ': there is a next step, but at the end')
            texts.append(text)
            if not last:
                page.click('#panel .next')
        check(len(set(texts)) == len(texts) > 15, walk['id'] + ': each step says something of its own')
        page.click('#panel .previous')
        check(page.run(STEP)[1] == texts[-2], walk['id'] + ': back')
        page.keys('Escape')
        check(page.run("return document.querySelector('#panel').hidden") and page.run(SEEN, None) == [],
              walk['id'] + ': Escape leaves the walk')


def test_keys(page, url):
    page.open(url + '#asyncore.dispatcher.send')
    order = page.run(VISIBLE)
    at = order.index('asyncore.dispatcher.send')
    for key, by in (('j', 1), ('j', 2), ('k', 1), ('Right', 2), ('Left', 1), ('k', 0)):
        page.keys(key)
        here = page.run("return decodeURIComponent(location.hash.slice(1))")
        check(here == order[at + by], '%s steps to %s, not %s' % (key, order[at + by], here))
        check(page.run(SEEN, here) == [True], 'and it is in sight')
    page.keys('d')
    check(page.run("return document.querySelector('.pair.here').classList.contains('differs')"), 'd finds a deviation')
    page.keys('?')
    check(page.run("return document.querySelector('#help').open"), '? shows the keys')
    page.keys('j')
    page.keys('Escape')
    check(not page.run("return document.querySelector('#help').open"), 'Escape closes them')
    page.keys('c')
    check(page.run("return document.querySelectorAll('#drawer a').length > 300 && !document.querySelector('#drawer').hidden"),
          'c shows the contents')
    page.keys('Escape')
    check(page.run("return document.querySelector('#drawer').hidden"), 'Escape closes them')
    page.keys('w')
    page.keys('j')
    page.keys('Right')
    check(page.run("return location.hash") == '#walk-connect-3', 'w begins a walk, j and the arrow step on')
    page.keys('k')
    check(page.run("return location.hash") == '#walk-connect-2', 'k steps back')
    page.keys('Escape')
    page.keys('/')
    page.keys('j')
    check(page.run("return document.querySelector('#filter').value") == 'j', 'in the filter a j is a j')
    page.keys('Escape')


def brightness(page):
    rgb = re.findall(r'\d+', page.run("return getComputedStyle(document.body).backgroundColor"))
    return sum(int(n) for n in rgb[:3]) / 3


def test_looks(page, url):
    page.open(url + '#smtpd.SMTPServer.__init__')
    sides = """const p = document.getElementById('smtpd.SMTPServer.__init__');
        return ['.left', '.note', '.right'].map(s => { const r = p.querySelector(s).getBoundingClientRect();
        return [r.left, r.top, r.width, r.height]; })"""
    left, note, right = page.run(sides)
    check(left[0] + left[2] <= note[0] and note[0] + note[2] <= right[0] and abs(left[1] - right[1]) < 3, 'wide: three columns')
    page.hover('#smtpd\\.SMTPServer\\.__init__ .right .badge')
    row = page.run("return document.querySelector('#smtpd\\\\.SMTPServer\\\\.__init__ .right .badge').dataset.row")
    told = page.run("const t = document.querySelector('#tip'); return t.hidden ? '' : t.textContent")
    check('Deviation ' + row in told and 'CPython' in told, 'a number tells its deviation: ' + told)
    page.run("document.querySelector('.fold .more').click()")
    check(page.run("const f = document.querySelector('.fold'); return f.scrollHeight === f.clientHeight"), 'what is folded unfolds')
    check(brightness(page) > 200, 'light')
    page.keys('t')
    check(brightness(page) < 60, 't: dark')
    page.keys('t')
    check(brightness(page) > 200, 't again: light')
    page.run("localStorage.clear(); delete document.documentElement.dataset.theme")
    page.cdp('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': 'dark'}]})
    check(brightness(page) < 60, 'dark where the system is')
    ink = page.run("return getComputedStyle(document.querySelector('.right .l')).color")
    check(sum(int(n) for n in re.findall(r'\d+', ink)[:3]) > 450, 'and its text is light: ' + ink)
    page.keys('t')
    check(brightness(page) > 200, 't: light where the system is dark')
    page.run("localStorage.clear(); delete document.documentElement.dataset.theme")
    page.cdp('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-reduced-motion', 'value': 'reduce'}]})
    page.size(420, 900)
    left, note, right = page.run(sides)
    check(left[1] + left[3] <= note[1] and note[1] + note[3] <= right[1] and abs(left[0] - right[0]) < 2,
          'narrow: one under the other')
    wide = page.run("return [document.documentElement.scrollWidth, [...document.querySelectorAll('#pairs *, #bar *')]"
                    ".filter(it => it.offsetParent && it.getBoundingClientRect().right > 421 && !it.closest('pre.sketch'))"
                    ".slice(0, 3).map(it => it.className + ': ' + it.textContent.slice(0, 40))]")
    check(wide[0] <= 420 and not wide[1], 'narrow: nothing sticks out: %s' % wide)
    page.keys('w')
    for _ in range(3):
        page.click('#panel .next')
        check(all(page.run(SEEN, None)[:1]), 'narrow: a walk shows its line')
    page.keys('Escape')
    page.size(1600, 1000)


def main():
    lacking = [] if browser.available() else ['chromium and chromedriver']
    python = study.find_python('')
    if not python:
        lacking.append('a Python that has smtpd')
    if lacking:
        print('skipped: there is no ' + ', nor '.join(lacking))
        return 1 if os.environ.get('NO_SKIP') == '1' else 77
    test_check()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / 'study.html'
        it = run('-o', str(path))
        if check(it.returncode == 0 and path.exists(), 'the page is made: ' + it.stdout + it.stderr):
            url = path.as_uri()
            with browser.Browser() as page:
                page.cdp('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-reduced-motion', 'value': 'reduce'}]})
                page.open(url)
                test_content(page, python)
                test_links(page)
                test_filter(page)
                test_walks(page)
                test_keys(page, url)
                test_looks(page, url)
                console = page.console()
                check(not console, 'the console is silent: %s' % console[:3])
    print('the page to study, Python %s: %d failures' % (python[0], len(failures)))
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
