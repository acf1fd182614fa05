#!/usr/bin/env python3
"""Every public Python name has its twin in the C++ sources, or a reason; and the twins stand in Python's order.

    names.py [ROOT]        ROOT: the directory of asyncore.hpp and the others

Python's asyncore, asynchat and smtpd are read with `ast`, never imported.  A comment such as
    // asyncore.py: dispatcher
above a class in a header is its anchor: the members that Python's class has are then looked for in that class, and
functions of a module in its namespace, under their own names.  A name that differs has an anchor of its own,
    // asyncore.py: dispatcher.__repr__
above the declaration of its twin.  One comment may name several (`// asyncore.py: poll2, poll3`): their twins are then
in the lines below it, up to an empty line.
A name that is not ported is named, in backticks, in the first column of the table 'Not ported' of tests/DEVIATIONS.md.
An anchor or a row that names something unknown to Python fails as well.  So does a definition in asyncore.cpp,
smtpd.cpp or main.cpp that stands before another one which Python has before it.
"""

import ast
import importlib.util
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
MODULES = ('asyncore', 'asynchat', 'smtpd')
SOURCES = ('asyncore.hpp', 'asyncore.cpp', 'smtpd.hpp', 'smtpd.cpp', 'main.cpp')
ANCHOR = re.compile(r'\b(asyncore|asynchat|smtpd|smtplib)\.py: (\w+(?:\.\w+)?(?:, \w+(?:\.\w+)?)*)')
RENAMED = {'_DISCONNECTED': 'DISCONNECTED', '__repr__': 'repr', '__version__': 'version'}


def python_names(module):
    """All names of a module (functions, classes, constants, members), private ones included."""
    path = pathlib.Path(importlib.util.find_spec(module).origin)
    names = set()
    collect(ast.parse(path.read_text(encoding='utf-8')).body, '', names)
    return names


def collect(body, prefix, names):
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            collect(node.body, node.name + '.', names)
        elif isinstance(node, ast.FunctionDef) and prefix:
            names.update(prefix + name for name in attributes(node))
        elif isinstance(node, ast.If) and not is_main(node):
            collect(node.body + node.orelse, prefix, names)
        elif isinstance(node, ast.Try):
            collect(node.body + [n for h in node.handlers for n in h.body], prefix, names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, 'targets', None) or [node.target]:
                names.update(prefix + n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def is_main(node):
    return any(isinstance(n, ast.Name) and n.id == '__name__' for n in ast.walk(node.test))


def attributes(function):
    """x of each `self.x = ...`, marked: they may be anchored, but need not be."""
    for node in ast.walk(function):
        if (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name) and node.value.id == 'self'):
            yield '=' + node.attr


def public(name):
    return not any(part.startswith(('_', '=')) for part in name.split('.'))


def twin(name):
    """The C++ identifier of a Python name."""
    owner, _, last = name.rpartition('.')
    if last in ('__init__', '__del__'):
        return ('' if last == '__init__' else '~') + owner
    return RENAMED.get(last, last)


def anchors(path):
    """(line number, module, name, what is wrong, whether it stands above) of each anchor."""
    lines = path.read_text(encoding='utf-8').split('\n')
    for i, line in enumerate(lines):
        before, slashes, comment = line.partition('//')
        found = ANCHOR.search(comment)
        if not found:
            continue
        names = found[2].split(', ')
        above = not before.strip()
        code = code_below(lines, i + 1, whole_block=len(names) > 1) if above else before
        for name in names:
            here = re.search(r'(?<!\w)%s(?!\w)' % re.escape(twin(name)), code)
            yield i + 1, found[1], name, '' if here else twin(name) + ' is not declared there', above


def code_below(lines, i, whole_block):
    """The first declaration below a comment; for a list of names the lines up to an empty one."""
    while i < len(lines) and lines[i].lstrip().startswith('//'):
        i += 1
    code = ''
    while i < len(lines) and lines[i].strip():
        text = lines[i].split('//')[0]
        code += text + '\n'
        if not whole_block and re.search(r'[;{}]', text):
            break
        i += 1
    return code


def code_only(text):
    return re.sub(r'//[^\n]*', '', text)


def class_bodies(path):
    """(module, class, text of the body) of each class that an anchor stands above."""
    text = path.read_text(encoding='utf-8')
    for found in re.finditer(r'//[^\n]*\b(asyncore|asynchat|smtpd)\.py: (\w+)\n(?://[^\n]*\n)*(?:class|struct) \w+[^;{]*{', text):
        depth, end = 1, found.end()
        while depth and end < len(text):
            depth += {'{': 1, '}': -1}.get(text[end], 0)
            end += 1
        yield found[1], found[2], code_only(text[found.end():end])


def declared(name, code):
    return re.search(r'(?<![\w.>])%s(?!\w)' % re.escape(twin(name)), code) is not None


def definitions(path):
    """The qualified names of what a source defines, as Python would write them, in their order."""
    renamed = {ours: theirs for theirs, ours in RENAMED.items()}
    pattern = r'^(?!//|#|    |using |return )(?:[\w:<>,&*\[\] ]+[ &*])?(?:(\w+)::)?(~?\w+)\([^;]*?\{'
    for found in re.finditer(pattern, code_only(path.read_text(encoding='utf-8')), re.M):
        owner, name = found[1], renamed.get(found[2], found[2])
        yield owner + '.' + ('__init__' if name == owner else name) if owner else name


def out_of_order(root, order):
    """What stands before another one that Python has before it."""
    for name in ('asyncore.cpp', 'smtpd.cpp', 'main.cpp'):
        if not (root / name).exists():
            continue
        last, place = '', -1
        for defined in dict.fromkeys(definitions(root / name)):
            if defined not in order:
                continue
            if order[defined] < place:
                yield '%s: %s stands behind %s, in Python before it' % (name, defined, last)
            last, place = defined, max(order[defined], place)


def functions(module):
    """The functions of a module and of its classes, in their order."""
    tree = ast.parse(pathlib.Path(importlib.util.find_spec(module).origin).read_text(encoding='utf-8'))

    def walk(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name
            elif isinstance(node, ast.ClassDef):
                yield from walk(node.body, node.name + '.')
            elif isinstance(node, ast.If) and not is_main(node):
                yield from walk(node.body, prefix)
    return list(dict.fromkeys(walk(tree.body, '')))


def not_ported(paper):
    """The names in backticks in the first column of the table 'Not ported'."""
    text = paper.read_text(encoding="utf-8") if paper.exists() else ''
    section = re.search(r'^#+ +Not ported\s*$(.*?)(?=^#|\Z)', text, re.M | re.S)
    for row in re.findall(r'^\|([^|\n]*)\|', section[1] if section else '', re.M):
        yield from re.findall(r'`([A-Za-z_][\w.]*)`', row)


def same(token, module, name):
    """Whether a README token means the name: with or without the module."""
    return token in (module + '.' + name, name)


def main():
    if sys.version_info[:2] != (3, 11):
        sys.exit('names.py needs Python 3.11: later versions have none of the three modules')
    root = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent.parent
    known = {module: python_names(module) for module in MODULES + ('smtplib',)}
    old = (HERE / 'mailmanproxy-3.10.txt').read_text(encoding='utf-8').split('\n')
    known['smtpd'].update(line for line in old if line and not line.startswith('#'))

    faults, ported = [], set()
    for path in (root / name for name in SOURCES):
        for line, module, name, fault, above in anchors(path) if path.exists() else ():
            if name not in known[module] and name.replace('.', '.=') not in known[module]:
                fault = 'Python has no such name'
            if fault:
                faults.append('%s:%d: %s.py: %s: %s' % (path.name, line, module, name, fault))
            elif above:
                ported.add((module, name))

    order, number = {}, 0
    for module in MODULES:
        for name in functions(module):
            order.setdefault(name, number)
            number += 1
    faults += out_of_order(root, order)

    for path in (root / name for name in SOURCES):
        if not path.exists():
            continue
        for module, owner, body in class_bodies(path):
            ported.update((module, n) for n in known[module]
                          if n.startswith(owner + '.') and declared(n.replace('.=', '.'), body))
        namespaces = re.findall(r'^namespace (\w+) {(.*?)^}   // namespace \1', path.read_text(encoding='utf-8'), re.M | re.S)
        for module, text in namespaces:
            ported.update((module, n) for n in known.get(module, ()) if '.' not in n and declared(n, code_only(text)))

    wanted = [(m, n) for m in MODULES for n in sorted(known[m]) if public(n)]
    papers = root / 'tests/DEVIATIONS.md'
    rows = list(not_ported(papers))
    for token in rows:
        means = [(m, n) for m in MODULES for n in known[m] if same(token, m, n.replace('.=', '.'))]
        if not means:
            faults.append("'Not ported': Python has no %s" % token)
        faults += ["'Not ported': %s is anchored" % token for m in means if m in ported]
    missing = [(m, n) for m, n in wanted
               if (m, n) not in ported and not any(same(t, m, n) for t in rows)]
    faults += ["%s.%s: no twin and no row in 'Not ported'" % name for name in missing]
    for fault in faults:
        print(fault)
    print('%d public names: %d ported, %d not ported, %d missing; %d faults'
          % (len(wanted), len(ported.intersection(wanted)),
             len(wanted) - len(ported.intersection(wanted)) - len(missing), len(missing), len(faults)))
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main())
