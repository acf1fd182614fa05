#!/usr/bin/env python3
"""Checks README.md against the tree: each block of C++ stands, as it is, in one of the tested examples; each row of
Deviations has a test that names its number; links lead somewhere; it is shorter than 400 lines. And no test repeats
the version of smtpd.hpp: a release changes one line. The links of the other pages lead somewhere as well; tests/README.md
names each file and folder of tests/, each suite in the row of its file, and no suite that there is not.
"""
import pathlib
import re
import sys

top = pathlib.Path(__file__).resolve().parent.parent
readme = (top / 'README.md').read_text()
faults = []

examples = {path.name: path.read_text() for path in sorted((top / 'tests/examples').glob('*.cpp'))}
blocks = re.findall(r'^```cpp\n(.*?)^```', readme, re.S | re.M)
for block in blocks:
    if not any(block in text for text in examples.values()):
        faults.append('no example in tests/examples has this block:\n' + block)
if not blocks:
    faults.append('README.md shows no C++')

section = re.search(r'^## Deviations\n(.*?)^## ', readme, re.S | re.M).group(1)
rows = [int(n) for n in re.findall(r'^\| (\d+) \|', section, re.M)]
if rows != list(range(1, len(rows) + 1)):
    faults.append('the rows of Deviations are not numbered one by one: %s' % rows)
named = set()
for path in sorted((top / 'tests').rglob('*')):
    if path.suffix in ('.cpp', '.py', '.sh') and path.is_file():
        for numbers in re.findall(r'(?://|#) Deviations? ((?:\d+(?:, | and )?)+)', path.read_text(errors='replace')):
            named.update(int(n) for n in re.findall(r'\d+', numbers))
for row in rows:
    if row not in named:
        faults.append('row %d of Deviations has no test: none says "Deviation %d"' % (row, row))

for link in re.findall(r'\[[^]]*\]\(([^)#: ]+)\)', re.sub(r'^```.*?^```', '', readme, flags=re.S | re.M)):
    if not (top / link).exists():
        faults.append('a link leads nowhere: ' + link)

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

version = re.search(r' version = ".* version ([0-9.]+)"', (top / 'smtpd.hpp').read_text()).group(1)
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
if lines >= 400:
    faults.append('README.md has %d lines' % lines)

for fault in faults:
    print(fault if re.match(r'[\w./]+: |tests/', fault) else 'README.md: ' + fault)
print('README.md: %d blocks of C++, %d deviations, %d lines; %d faults' % (len(blocks), len(rows), lines, len(faults)))
sys.exit(1 if faults else 0)
