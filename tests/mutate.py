#!/usr/bin/env python3
"""Do the core tests notice when the library is wrong? Mutants of smtpd.cpp and asyncore.cpp, chosen at random: each
has one small mistake, and some test should fail. It is not part of the gate: a mutant takes as long as the tests.

    tests/mutate.py [N]         N mutants, 20 by default
    --seed S                    which ones (1): the same seed, the same mutants, as long as the sources are the same
    --jobs J                    so many at once (1)
    --file NAME                 of that file only; --lines A-B: of these lines only
    --only KIND                 one kind of mistake: see KINDS
    --list-survivors            prints only those that no test noticed
    --build DIR                 where the objects of the tests are kept from one run to the next

Each mutant is one line: `killed`, by which test; `killed (time)`, when the tests took much longer than usual; `survived`;
or `not compiled`. Then the place and the change. Survivors are either equivalent, such as a bound that is never
reached, or a hole in the tests. CXX is respected. The exit status is 0 whatever survives.
"""
import argparse
import concurrent.futures
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TOP = pathlib.Path(__file__).resolve().parent.parent
CXX = os.environ.get('CXX', 'c++')
SOURCES = ['asyncore.cpp', 'smtpd.cpp']

# A kind of mistake: what is looked for, and what may stand in its place. clang-format puts blanks around operators,
# but none around the brackets of templates.
KINDS = {
    'comparison': [(r'(?<= )(?:==|!=|<=|>=|<|>)(?= )', {
        '==': ['!='], '!=': ['=='], '<': ['<=', '>='], '<=': ['<', '>'], '>': ['>=', '<='], '>=': ['>', '<']})],
    'boundary': [(r'(?<= )(?:\+|-)(?= )', {'+': ['-'], '-': ['+']}),
                 (r'\+\+|--', {'++': ['--'], '--': ['++']})],
    'logic': [(r'&&|\|\|', {'&&': ['||'], '||': ['&&']})],
    'constant': [(r'(?<![\w.])\d+(?![\w.])', lambda n: [str(int(n, 8 if n[0] == '0' else 10) + 1)] +
                  ([str(int(n, 8 if n[0] == '0' else 10) - 1)] if int(n, 8 if n[0] == '0' else 10) else [])),
                 (r'\b(?:true|false)\b', {'true': ['false'], 'false': ['true']})],
    'condition': [],    # if (x) or while (x): the other way round
    'statement': [],    # one that is left out
}
STATEMENT = re.compile(r'^( *)((?!using |struct |class |namespace |enum |static |const |constexpr |else\b|case |default:|public:|'
                       r'private:|protected:|throw |typedef |friend |virtual |template |return [^;])[^#/ }{][^{}]*;)$')


def masked(text):
    """The same text, with blanks in place of comments, strings and preprocessor lines."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^#[^\n]*', re.S | re.M)
    return pattern.sub(lambda match: re.sub(r'[^\n]', ' ', match.group()), text)


def closing(text, opening):
    depth = 0
    for at in range(opening, len(text)):
        depth += {'(': 1, ')': -1}.get(text[at], 0)
        if depth == 0:
            return at
    return None


class Mutant:
    def __init__(self, name, text, start, end, new, kind):
        self.name, self.kind = name, kind
        self.line = text.count('\n', 0, start) + 1
        self.text = text[:start] + new + text[end:]
        self.change = '%s -> %s' % (' '.join(text[start:end].split()), new or '(nothing)')
        line = text[text.rfind('\n', 0, start) + 1:text.find('\n', start)].strip()
        if line != text[start:end]:
            self.change += '   in: ' + line


def mutants(name, kinds):
    """All that there are of a file."""
    text = (TOP / name).read_text()
    code = masked(text)
    for kind in kinds:
        for pattern, change in KINDS[kind]:
            for match in re.finditer(pattern, code):
                for new in change(match.group()) if callable(change) else change[match.group()]:
                    yield Mutant(name, text, match.start(), match.end(), new, kind)
        if kind == 'condition':
            for match in re.finditer(r'\b(?:if|while) \(', code):
                start, end = match.end(), closing(code, match.end() - 1)
                if end and ';' not in code[start:end]:
                    yield Mutant(name, text, start, end, '!(' + text[start:end] + ')', kind)
        if kind == 'statement':
            at, before = 0, ';'
            for line in code.split('\n'):
                match = STATEMENT.match(line.rstrip())
                if match and before[-1] in ';{}:)' and line.count('(') == line.count(')'):
                    end = at + len(line.rstrip())
                    # After `if (x)` an empty statement stays.
                    yield Mutant(name, text, at + match.end(1), end, ';' if before[-1] == ')' else '', kind)
                before = line.rstrip() or before
                at += len(line) + 1


class Bench:
    """The tests' objects, and what it takes to run them on another library."""

    def __init__(self, build):
        self.build = build
        for path in [*TOP.glob('*.?pp'), *TOP.glob('tests/*.?pp'), TOP / 'Makefile']:
            copy = build / path.relative_to(TOP)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists() or copy.read_bytes() != path.read_bytes():
                shutil.copyfile(path, copy)
        for name in ('fuzz', 'reference'):
            shutil.copytree(TOP / 'tests' / name, build / 'tests' / name, dirs_exist_ok=True)
        subprocess.run(['make', '-s', 'CXX=' + CXX, 'CXXFLAGS=-O0', 'smtpd', 'tests/core'], cwd=build, check=True)
        start = time.monotonic()
        outcome = self.run(build / 'tests/core', build / 'smtpd', 3600)
        if outcome != 'survived':
            sys.exit('the core tests fail without a mistake: ' + outcome)
        self.limit = 30 + 4 * (time.monotonic() - start)

    def run(self, core, program, limit):
        def child():
            resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))   # some mutants never have enough
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        with tempfile.TemporaryFile('w+', errors='replace') as out:
            process = subprocess.Popen([core, '-x'], cwd=self.build, env={**os.environ, 'SMTPD_PROGRAM': str(program)},
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                       start_new_session=True, preexec_fn=child)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                return 'killed (time)'
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)   # the programs that it has started, too
                except ProcessLookupError:
                    pass
                process.wait()
            out.seek(0)
            told = re.findall(r'^(?:FAILED|CRASHED) (\S+)', out.read(), re.M)
        if process.returncode == 0:
            return 'survived'
        return 'killed by ' + (told[0] if told else 'status %d' % process.returncode)

    def judge(self, mutant):
        with tempfile.TemporaryDirectory(prefix='mutant-') as folder:
            os.chmod(folder, 0o755)   # the program runs as another user, too
            work = pathlib.Path(folder)
            (work / mutant.name).write_text(mutant.text)
            new = str(work / mutant.name.replace('.cpp', '.o'))
            others = [str(self.build / name.replace('.cpp', '.o')) for name in SOURCES if name != mutant.name]
            tests = sorted(map(str, self.build.glob('tests/*.o')))
            for command in ([CXX, '-std=c++17', '-O0', '-w', '-I', str(self.build), '-c', '-o', new, str(work / mutant.name)],
                            [CXX, '-o', str(work / 'core'), *tests, new, *others, '-lpthread'],
                            [CXX, '-o', str(work / 'smtpd'), str(self.build / 'main.o'), new, *others]):
                if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
                    return 'not compiled'
            return self.run(work / 'core', work / 'smtpd', self.limit)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('count', nargs='?', type=int, default=20)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--file', choices=SOURCES)
    parser.add_argument('--lines', default='1-999999')
    parser.add_argument('--only', choices=list(KINDS))
    parser.add_argument('--list-survivors', action='store_true')
    parser.add_argument('--build', type=pathlib.Path)
    args = parser.parse_args()
    first, last = map(int, args.lines.split('-'))
    kinds = [args.only] if args.only else list(KINDS)
    every = [it for name in ([args.file] if args.file else SOURCES) for it in mutants(name, kinds)
             if first <= it.line <= last]
    chosen = random.Random(args.seed).sample(every, min(args.count, len(every)))
    counts = {}
    with tempfile.TemporaryDirectory(prefix='mutate-') as folder:
        os.chmod(folder, 0o755)
        bench = Bench((args.build or pathlib.Path(folder)).resolve())
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for mutant, outcome in zip(chosen, pool.map(bench.judge, chosen)):
                kind = ' '.join(outcome.split()[:2]) if outcome.startswith('not') else outcome.split()[0]
                counts[kind] = counts.get(kind, 0) + 1
                if not args.list_survivors or outcome == 'survived':
                    print('%s  %s:%d  %s' % (outcome, mutant.name, mutant.line, mutant.change), flush=True)
    print('%d of %d mutants; %s' % (len(chosen), len(every), ', '.join('%d %s' % (n, kind) for kind, n in sorted(counts.items()))))


if __name__ == '__main__':
    main()
