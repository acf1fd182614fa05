#!/usr/bin/env python3
"""Checks README.md and tests/DEVIATIONS.md against the tree.

Each block of C++ stands, as it is, in one of the tested examples. Each row of the Deviations has a test that names its
number. The rows that README shows are the table's own, and its figures of speed are those of the bench. The limits and
their defaults are those of smtpd.hpp. The walks of tests/READING.md name functions that exist. Links lead somewhere.
README has at most 240 lines. And no test repeats the version of smtpd.hpp: a release changes one line.
tests/README.md names each file and folder of tests/, each suite in the row of its file, and no suite that there is not.
"""
import pathlib
import re
import sys

top = pathlib.Path(__file__).resolve().parent.parent
readme = (top / 'README.md').read_text()
deviations = (top / 'tests/DEVIATIONS.md').read_text()
header = (top / 'smtpd.hpp').read_text()
MOST_LINES = 240
faults = []

examples = {path.name: path.read_text() for path in sorted((top / 'tests/examples').glob('*.cpp'))}
blocks = re.findall(r'^```cpp\n(.*?)^```', readme, re.S | re.M)
for block in blocks:
    if not any(block in text for text in examples.values()):
        faults.append('no example in tests/examples has this block:\n' + block)
if not blocks:
    faults.append('README.md shows no C++')

section = re.search(r'^# Deviations\n(.*?)^## ', deviations, re.S | re.M).group(1)
rows = [int(n) for n in re.findall(r'^\| (\d+) \|', section, re.M)]
if rows != list(range(1, len(rows) + 1)) or not rows:
    faults.append('tests/DEVIATIONS.md: the rows are not numbered one by one: %s' % rows)
named = set()
for path in sorted((top / 'tests').rglob('*')):
    if path.suffix in ('.cpp', '.py', '.sh') and path.is_file():
        for numbers in re.findall(r'(?://|#) Deviations? ((?:\d+(?:, | and )?)+)', path.read_text(errors='replace')):
            named.update(int(n) for n in re.findall(r'\d+', numbers))
for row in rows:
    if row not in named:
        faults.append('row %d of the Deviations has no test: none says "Deviation %d"' % (row, row))

# What README quotes from the table of deviations and from the bench.
quoted = re.findall(r'^\| \d+ \|.*$', readme, re.M)
if not quoted:
    faults.append('README.md shows no deviation')
faults += ['README.md: this row is not in tests/DEVIATIONS.md: ' + row for row in quoted if row not in section.splitlines()]
said = re.search(r'There are (\d+)', re.search(r'^## Deviations\n(.*?)^## ', readme, re.S | re.M).group(1))
if not said or int(said.group(1)) != len(rows):
    faults.append('README.md does not say that there are %d deviations' % len(rows))
results = (top / 'tests/bench/results/results.md').read_text().splitlines()
figures = re.findall(r'^\| (?:throughput|\d+:).*$', readme, re.M)
if len(figures) < 2:
    faults.append('README.md has no figures of speed')
faults += ['README.md: the bench does not say so: ' + row for row in figures if row not in results]

# The limits: `field` | default | ...
options = re.search(r'^struct options \{\n(.*?)^\};', header, re.S | re.M).group(1)
sizes = {name: int(value) for name, value in re.findall(r'size_t (\w+) = (\d+);', header)}
limits = re.findall(r'^\| `(\w+)` \| (none|\d+)( s)?(?: bytes)? \|', readme, re.M)
if len(limits) != 6:
    faults.append('README.md has %d limits, not 6' % len(limits))
for name, value, seconds in limits:
    found = re.search(r'\b%s(?: = |\{)([^;}]*)\}?;' % name, options)
    default = eval(found.group(1), {'__builtins__': {}}, sizes) if found else None   # such as 1 << 20
    if default != (0 if value == 'none' else int(value)) * (1000 if seconds else 1):
        faults.append('README.md: %s is %s%s, in smtpd.hpp %s' % (name, value, seconds, default))

for name, text, folder in ('README.md', readme, top), ('tests/DEVIATIONS.md', deviations, top / 'tests'):
    text = re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)
    heads = {re.sub(r'[^a-z0-9 -]', '', h.lower()).replace(' ', '-') for h in re.findall(r'^#+ (.*)', text, re.M)}
    for link, anchor in re.findall(r'\[[^]]*\]\(([^)#: ]*)(?:#([^) ]*))?\)', text):
        if not (folder / link).exists() or (anchor and not link and anchor not in heads):
            faults.append('%s: a link leads nowhere: %s' % (name, link or '#' + anchor))

# The walks of READING.md, and the lines that no test runs, name functions of ours.
sys.path.insert(0, str(top / 'tests/study'))
import study
sources = study.Cpp(top)
reading = (top / 'tests/READING.md').read_text()
walks = re.search(r'^## The real one beside Python\n(.*?)^## ', reading, re.S | re.M)
cells = [('READING.md', cell) for cell in re.findall(r'^\|[^|]*\|([^|]*)\|', walks.group(1) if walks else '', re.M)]
if len([cell for _, cell in cells if '`' in cell]) < 20:
    faults.append('tests/READING.md has no walks')
cells += [('coverage.md', cell) for cell in re.findall(r'^\| (`[^`|]*`)', (top / 'tests/coverage.md').read_text(), re.M)]
for paper, cell in cells:
    for name in re.findall(r'`((?:\w+::)*~?\w+)`', cell):
        if not sources.by_suffix(name):
            faults.append('tests/%s: there is no %s' % (paper, name))

version = re.search(r' version = ".* version ([0-9.]+)"', header).group(1)

pages = [str(path.relative_to(top)) for part in ('tests', '.github') for path in sorted((top / part).rglob('*.md'))]
for page in pages:
    text = re.sub(r'^```.*?^```', '', (top / page).read_text(), flags=re.S | re.M)
    for link in re.findall(r'\[[^]]*\]\(([^)#: ]+)\)', text):
        if not (top / page).parent.joinpath(link).exists():
            faults.append('%s: a link leads nowhere: %s' % (page, link))

guide = (top / 'tests/README.md').read_text()
for path in sorted((top / 'tests').iterdir()):
    if path.name not in ('README.md', 'core', 'bin', '__pycache__') and path.suffix != '.o' and '](%s' % path.name not in guide:
        faults.append('tests/README.md does not name ' + path.name)
for row in re.findall(r'^\| (\[test_.*)$', guide, re.M):
    files, suites = row.split(' | ')[:2]
    text = ''.join((top / 'tests' / name).read_text() for name in re.findall(r'\]\((test_\w+\.cpp)\)', files))
    there = set(re.findall(r'^TEST\((\w+),', text, re.M))
    named = set(re.findall(r'`(\w+)`', suites))
    if 'CPython' not in suites and there != named:
        faults.append('tests/README.md: the suites of %s are %s' % (files, ', '.join(sorted(there))))

for path in sorted((top / 'tests').rglob('*')):
    if path.suffix in ('.cpp', '.hpp', '.py', '.sh') and 'version ' + version in path.read_text(errors='replace'):
        faults.append('%s repeats the version %s' % (path.relative_to(top), version))

# What .editorconfig asks for.
for path in sorted(top.rglob('*')):
    if path.suffix in ('.cpp', '.hpp', '.py', '.sh', '.md') and path.is_file() and not str(path.relative_to(top)).startswith(('dist/', 'build')):
        text = path.read_bytes()
        if b'\r' in text or b'\t' in text or re.search(rb'[ \t]\n', text) or not text.endswith(b'\n'):
            faults.append('%s: a tab, a CR, a blank before a line end, or no line end at the end' % path.relative_to(top))

lines = readme.count('\n')
if lines > MOST_LINES:
    faults.append('README.md has %d lines, not %d at most' % (lines, MOST_LINES))

for fault in faults:
    print(fault)
print('README.md: %d blocks of C++, %d deviations, %d lines; %d faults' % (len(blocks), len(rows), lines, len(faults)))
sys.exit(1 if faults else 0)
