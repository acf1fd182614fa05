#!/usr/bin/env python3
"""Checks README.md against the tree: each block of C++ stands, as it is, in one of the tested examples; each row of
Deviations has a test that names its number; links lead somewhere; it is shorter than 400 lines. And no test repeats
the version of smtpd.hpp: a release changes one line.
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

version = re.search(r' version = ".* version ([0-9.]+)"', (top / 'smtpd.hpp').read_text()).group(1)
for path in sorted((top / 'tests').rglob('*')):
    if path.suffix in ('.cpp', '.hpp', '.py', '.sh') and 'version ' + version in path.read_text(errors='replace'):
        faults.append('%s repeats the version %s' % (path.relative_to(top), version))

lines = readme.count('\n')
if lines >= 400:
    faults.append('README.md has %d lines' % lines)

for fault in faults:
    print('README.md: ' + fault)
print('README.md: %d blocks of C++, %d deviations, %d lines; %d faults' % (len(blocks), len(rows), lines, len(faults)))
sys.exit(1 if faults else 0)
