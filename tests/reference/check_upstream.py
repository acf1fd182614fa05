#!/usr/bin/env python3
"""Every test function of CPython's three suites has a C++ test of its name.

Usage: check_upstream.py [path of tests/core]

Reads upstream-cases.txt beside this file. Where Python still has its own suites, the list is compared with
them first, so that it can't have been shortened.
"""

import ast
import collections
import importlib.util
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
MODULES = 'test_smtpd', 'test_asyncore', 'test_asynchat'
CASES = 134


def read_list(path):
    """The cases, the classes that each class runs as, and the reasons of those that are missing."""
    cases, runs_as, reasons = [], collections.defaultdict(list), {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.partition('#')[0].strip()
        if line.startswith('not here:'):
            name, dash, reason = line.removeprefix('not here:').partition(' - ')
            if not dash or not reason.strip():
                sys.exit(f'{path.name}:{number}: no reason')
            reasons[name.strip()] = reason.strip()
        elif ':' in line:
            name, _, classes = line.partition(':')
            runs_as[name] += classes.split()
        elif line:
            cases.append(line)
    return cases, runs_as, reasons


def cases_of_python():
    """The names in Python's own files; None when this Python has not got them."""
    cases = []
    for module in MODULES:
        try:
            spec = importlib.util.find_spec('test.' + module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.origin:
            return None
        for node in ast.parse(pathlib.Path(spec.origin).read_text(encoding='utf-8')).body:
            if isinstance(node, ast.ClassDef):
                cases += [f'{node.name}.{it.name}' for it in node.body
                          if isinstance(it, ast.FunctionDef) and it.name.startswith('test')]
    return cases


def main():
    core = sys.argv[1] if len(sys.argv) > 1 else str(HERE.parent / 'core')
    cases, runs_as, reasons = read_list(HERE / 'upstream-cases.txt')
    wrong = []
    if len(cases) != CASES or len(set(cases)) != CASES:
        wrong.append(f'the list has {len(set(cases))} names, not {CASES}')
    python = cases_of_python()
    if python is not None:
        wrong += [f'not in the list: {name}' for name in python if name not in cases]
        wrong += [f'not in CPython: {name}' for name in cases if name not in python]
    here = set(subprocess.run([core, '-l'], stdout=subprocess.PIPE, text=True, check=True).stdout.split())
    found, used = 0, set()
    for case in cases:
        cls, _, test = case.partition('.')
        for name in (f'{it}.{test}' for it in runs_as.get(cls, [cls])):
            reason = reasons.get(case) or reasons.get(name)
            used |= {case, name}
            if name in here:
                found += 1
                if reason:
                    wrong.append(f'is there after all: {name}')
            elif not reason:
                wrong.append(f'missing: {name}')
    wrong += [f'unknown: {name}' for name in reasons if name not in used]
    for it in wrong:
        print(it)
    if python is None:
        print('note: this Python has no test suites of its own; the list was taken as it is')
    print(f'{len(cases)} upstream cases: {found} tests, {len(reasons)} not here, {len(wrong)} wrong')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
