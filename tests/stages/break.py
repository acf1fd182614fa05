#!/usr/bin/env python3
"""Proves the table "Break something" of tests/READING.md: each row's change is made in a copy, and the row's test fails
with the row's words, while the tests of the other rows pass, but for those that the row names.

Usage: python3 tests/stages/break.py [--objects FILE...] [ROW...]

Without --objects it takes the objects that `make smtpd tests/core` leaves, and has them made. A change is found by its
function and its old text, however the text is broken into lines. When the sources have moved on, it is said which rows
have lost their place: those are to be written anew.
CXX and LDFLAGS are respected; BUILD is the folder to work in.
"""
import os
import pathlib
import re
import shlex
import subprocess
import sys

top = pathlib.Path(__file__).resolve().parent.parent.parent
work = pathlib.Path(os.environ.get('BUILD') or top / 'tests/bin/break')
LIMIT = 60   # seconds for what takes less than one
SOURCES = ('asyncore', 'smtpd', 'main')


class Row:
    def __init__(self, cells):
        code = [[part.replace('\\|', '|') for part in re.findall(r'`([^`]+)`', cell)] for cell in cells]
        self.number = int(cells[0])
        self.file, self.function = code[1]
        self.old, self.new = code[2] if len(code[2]) == 2 else (code[2][0], '')
        self.test, self.says = code[3]
        self.why = cells[4]
        also = re.search(r'The tests? of rows? ([\d, and]+) fails? too', self.why)
        self.also = [int(n) for n in re.findall(r'\d+', also.group(1))] if also else []
        self.spoils_all = 'Any other test may fail' in self.why

    def changed(self):
        """The text of the file with the change, or what is wrong with the row."""
        text = (top / self.file).read_text()
        pattern = r'\s*'.join(re.escape(token) for token in re.findall(r'\w+|[^\w\s]', self.old))
        found = [m for m in re.finditer(r'(?<!\w)' * self.old[0].isalnum() + pattern, text)]
        if len(found) != 1:
            return None, '%s has the old text %d times' % (self.file, len(found))
        before = text[:found[0].start()]
        name = self.function.split('::')[-1]
        begins = [m.start() for m in re.finditer(r'^[^\n/]*\b%s\b ?(?:\(|\{|:)' % re.escape(name), before, re.M)]
        if not begins or re.search(r'^\}', before[begins[-1]:], re.M):
            return None, 'the old text is not in %s' % self.function
        return text[:found[0].start()] + self.new + text[found[0].end():], ''


def table():
    rows = []
    section = re.search(r'^## Break something\n(.*?)^## ', (top / 'tests/READING.md').read_text(), re.S | re.M).group(1)
    for line in section.splitlines():
        if re.match(r'\| \d+ \|', line):
            rows.append(Row([cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]))
    return rows


def objects(given):
    if not given:
        subprocess.run(['make', '-s', 'smtpd', 'tests/core'] + ([] if (top / 'tests/core').exists() else ['CXXFLAGS=-O0']),
                       cwd=top, check=True)
        given = [top / ('%s.o' % name) for name in SOURCES]
        # Those of the Makefile's list: other objects may lie there.
        given += [top / name for name in re.findall(r'tests/\w+\.o', re.search(r'^TESTS = (.*?[^\\])$',
                  (top / 'Makefile').read_text(), re.S | re.M).group(1))]
    return {pathlib.Path(name).name.split('.')[0]: str(name) for name in given}


def build(parts):
    """Links the tests and the program into the folder."""
    link = shlex.split(os.environ.get('CXX', 'c++')) + shlex.split(os.environ.get('LDFLAGS', ''))
    library = [parts['asyncore'], parts['smtpd']]
    tests = [path for name, path in parts.items() if name not in SOURCES]
    subprocess.run(link + ['-o', work / 'core'] + tests + library + ['-lpthread'], check=True)
    subprocess.run(link + ['-o', work / 'smtpd', parts['main']] + library, check=True)


def run(tests, without=()):
    """Whether these tests pass, and what was said."""
    command = [work / 'core'] + list(tests) + ['-' + name for name in without]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT, cwd=top,
                              env=dict(os.environ, SMTPD_PROGRAM=str(work / 'smtpd')))
    except subprocess.TimeoutExpired as over:
        return False, 'no end after %d seconds\n%s' % (LIMIT, (over.stdout or b'').decode(errors='replace'))
    text = done.stdout.decode(errors='replace')[:3000]
    if done.returncode < 0:
        text += 'ended by signal %d' % -done.returncode
    return done.returncode == 0, text


def prove(row, rows, parts):
    """What is wrong with the row; '' when nothing is."""
    text, wrong = row.changed()
    if wrong:
        return 'no longer matches: ' + wrong
    stem = row.file.split('.')[0]
    copy = work / row.file
    copy.write_text(text)
    compiled = subprocess.run(shlex.split(os.environ.get('CXX', 'c++')) + ['-std=c++17', '-O0', '-w', '-I', top, '-c', copy,
                              '-o', work / (stem + '.o')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if compiled.returncode:
        return 'does not compile:\n' + compiled.stdout.decode(errors='replace')
    build({**parts, stem: str(work / (stem + '.o'))})
    passed, said = run([row.test])
    if passed:
        return '%s passes all the same' % row.test
    if row.says not in said:
        return '%s fails for another reason than `%s`:\n%s' % (row.test, row.says, said)
    if row.spoils_all:
        return ''
    for other in rows:
        if other.number in row.also and run([other.test])[0]:
            return 'row %d\'s test is said to fail as well, and passes' % other.number
    expected = {row.test} | {other.test for other in rows if other.number in row.also}
    others = sorted({other.test for other in rows} - expected)
    for _ in range(3):   # some of them look at the clock, and a busy machine may be too slow
        passed, said = run(others, expected)
        if passed:
            return ''
    return 'the tests of other rows fail as well:\n' + said


def main():
    arguments = sys.argv[1:]
    chosen = []
    while arguments and arguments[-1].isdigit():
        chosen.append(int(arguments.pop()))
    parts = objects(arguments[1:] if arguments[:1] == ['--objects'] else [])
    rows = table()
    work.mkdir(parents=True, exist_ok=True)
    faults = 0
    if [row.number for row in rows] != list(range(1, len(rows) + 1)) or len(rows) < 20:
        print('FAILED: the rows are not 1 to 20: %s' % [row.number for row in rows])
        faults += 1
    build(parts)
    passed, said = run(sorted({row.test for row in rows}))
    if not passed:
        print('FAILED: without a change, too:\n' + said)
        return 1
    done = 0
    for row in rows:
        if chosen and row.number not in chosen:
            continue
        done += 1
        wrong = prove(row, rows, parts)
        print('%s: row %d, %s: %s' % ('FAILED' if wrong else 'ok', row.number, row.function, wrong or row.test), flush=True)
        faults += bool(wrong)
    print('%d rows proved, %d faults' % (done, faults))
    return 1 if faults or not done else 0


if __name__ == '__main__':
    sys.exit(main())
