#!/usr/bin/env python3
"""Writes dist/study.html: CPython's functions on the left, ours on the right, the note between.

    study.py [--check] [--python PYTHON] [-o FILE]

    --check     write nothing; say what does not match, a line each, and exit with 1 if anything does not
    --python    whose asyncore, asynchat and smtpd to show: a Python 3.11 or older. Without it: the Python that
                runs this script, when it has them, or the newest of python3.11, python3.10 ... that has.

The page is made from the sources' own text. Python's side is read on this machine and is never in this tree.
What belongs together is found by name: dispatcher.recv is asyncore::dispatcher::recv; where the names differ, an
anchor above the declaration says so (`// asyncore.py: _DISCONNECTED`). Comments above a definition, and above its
declaration, are the note. The rest comes from three places:

    the tables 'Deviations' and 'Not ported', in tests/DEVIATIONS.md
    deviations.txt      which function a deviation is in, and which of its lines
    walks.txt           the steps of the walks

Exit status: 0; 1 when something does not match; 77 when there is no Python that has the three modules.
"""

import argparse
import ast
import bisect
import collections
import html
import io
import json
import keyword
import os
import pathlib
import re
import subprocess
import sys
import tokenize
import warnings

HERE = pathlib.Path(__file__).resolve().parent
TOP = HERE.parent.parent
MODULES = ('asyncore', 'asynchat', 'smtpd')
SOURCES = ('asyncore.hpp', 'asyncore.cpp', 'smtpd.hpp', 'smtpd.cpp', 'main.cpp')
NAMESPACE_OF = {'asyncore.hpp': 'asyncore', 'asyncore.cpp': 'asyncore', 'smtpd.hpp': 'smtpd', 'smtpd.cpp': 'smtpd'}
RENAMED = {'_DISCONNECTED': 'DISCONNECTED', '__repr__': 'repr', '__version__': 'version'}
PROGRAM = '__main__'   # our name for what Python runs below `if __name__ == '__main__'`; main.cpp's main()
ANCHOR = re.compile(r'\b(asyncore|asynchat|smtpd|smtplib)\.py: (\w+(?:\.\w+)?(?:, \w+(?:\.\w+)?)*)')
WIDEST = 24   # lines of a block that is not a function; what is longer is folded
NO_PYTHON = 77


# ----------------------------------------------------------------------------------------------------------
# Python's side
# ----------------------------------------------------------------------------------------------------------

PROBE = ("import sys, json, warnings, importlib.util as u; warnings.simplefilter('ignore'); "
         "f = lambda m: getattr(u.find_spec(m), 'origin', None); "
         "print(json.dumps([sys.version.split()[0]] + [f(m) for m in %r]))" % (MODULES + ('smtplib',),))


def probe(python):
    """The version of a Python and the files of its modules; None when it lacks one."""
    try:
        run = subprocess.run([python, '-c', PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
        version, *files = json.loads(run.stdout.decode()) if run.returncode == 0 else [None, None]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return (version, dict(zip(MODULES + ('smtplib',), files))) if all(files) else None


def find_python(wanted):
    names = [wanted] if wanted else [sys.executable] + ['python3.%d' % n for n in range(11, 5, -1)] + [
        'python3', '/usr/bin/python3']
    for name in names:
        found = probe(name) if name else None
        if found:
            return found
    return None


class PyItem:
    """A piece of a Python module: a function, the head of a class, or what stands between them."""

    def __init__(self, module, name, kind, first, last):
        self.module, self.name, self.kind, self.first, self.last = module, name, kind, first, last
        self.assigned = []   # of a piece that is no function: the names that it sets
        self.missing = False   # this Python has it no more

    @property
    def cls(self):
        return self.name.rpartition('.')[0]

    @property
    def last_name(self):
        return self.name.rpartition('.')[2]

    @property
    def id(self):
        return '%s.%s' % (self.module, re.sub(r'[^\w.]+', '-', self.name))


class PyModule:
    def __init__(self, name, path):
        self.name = name
        self.text = pathlib.Path(path).read_text(encoding='utf-8')
        self.lines = self.text.split('\n')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            self.tree = ast.parse(self.text)
        self.items, self.known, self.attributes, self.bases = [], set(), set(), {}
        self.done = 0   # lines that are in an item
        self.loose = None
        self.walk(self.tree.body, '')
        self.add_loose(len(self.lines))
        self.marks = highlight_python(self.text, self.lines)

    def walk(self, body, prefix):
        for node in body:
            first = min([node.lineno] + [d.lineno for d in getattr(node, 'decorator_list', [])])
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.add_loose(self.above(first) - 1)
                self.add(PyItem(self.name, prefix + node.name, 'function', self.done + 1, node.end_lineno))
                self.known.add(prefix + node.name)
                if prefix:
                    self.attributes.update(prefix + n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
                                           and isinstance(n.ctx, ast.Store) and getattr(n.value, 'id', '') == 'self')
            elif isinstance(node, ast.ClassDef):
                self.add_loose(self.above(first) - 1)
                self.known.add(node.name)
                self.bases[node.name] = [b.attr if isinstance(b, ast.Attribute) else getattr(b, 'id', '')
                                         for b in node.bases]
                inner = next((self.above(min([n.lineno] + [d.lineno for d in n.decorator_list])) - 1
                              for n in node.body if isinstance(n, ast.FunctionDef)), node.end_lineno)
                item = PyItem(self.name, node.name, 'class', self.done + 1, inner)
                self.add(item)
                self.walk([n for n in node.body], node.name + '.')
                self.loose = None
                self.done = max(self.done, node.end_lineno)
            elif isinstance(node, ast.If) and is_main(node):
                self.add_loose(self.above(first) - 1)
                self.add(PyItem(self.name, PROGRAM, 'program', self.done + 1, node.end_lineno))
            elif isinstance(node, ast.If):
                self.note_loose(node.lineno)
                self.walk(node.body + node.orelse, prefix)
            elif isinstance(node, ast.Try):
                self.end_introduction(node, ['?'])
                self.note_loose(node.lineno)
                self.walk(node.body + [n for h in node.handlers for n in h.body], prefix)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                names = [n.id for t in getattr(node, 'targets', None) or [node.target] for n in ast.walk(t)
                         if isinstance(n, ast.Name)]
                self.known.update(prefix + n for n in names)
                if not prefix:
                    self.end_introduction(node, names)
                    self.note_loose(node.lineno).extend(names)
            elif not prefix:
                self.note_loose(node.lineno)

    def above(self, line):
        """The first line of the comment that stands directly above a line."""
        while line > self.done + 1 and self.lines[line - 2].lstrip().startswith('#'):
            line -= 1
        return line

    def end_introduction(self, node, names):
        """The docstring and the imports are one thing, the names that are set below them another."""
        if not self.items and self.loose is not None and names != ['__all__']:
            self.add_loose(self.above(node.lineno) - 1)

    def note_loose(self, line):
        if self.loose is None:
            self.loose = []
        return self.loose

    def add_loose(self, last):
        if self.loose is not None:
            names = [n for n in self.loose if n != '__all__']
            # What follows the imports, and the names that are set there, are two things.
            item = PyItem(self.name, 'introduction' if not self.items else 'between', 'between', self.done + 1, last)
            item.assigned = names
            self.add(item)
            if len([i for i in self.items if i.kind == 'between']) > 1:
                shown = [n for n in names if not n.startswith('_') or twin_name(n) != n] or names[:1]
                item.name = ', '.join(shown) or 'lines %d to %d' % (item.first, item.last)
        self.loose = None

    def add(self, item):
        while item.first < item.last and not self.lines[item.first - 1].strip():
            item.first += 1
        while item.last > item.first and not self.lines[item.last - 1].strip():
            item.last -= 1
        self.done = max(self.done, item.last)
        if any(self.lines[i - 1].strip() for i in range(item.first, item.last + 1)):
            self.items.append(item)


def is_main(node):
    return any(isinstance(n, ast.Name) and n.id == '__name__' for n in ast.walk(node.test))


BUILTINS = set(dir(__import__('builtins'))) | {'self', 'cls'}


def highlight_python(text, lines):
    """What is coloured, line by line: (from, to, class)."""
    marks = [[] for _ in lines]
    before = ''
    starts = {tokenize.NUMBER: 'n', tokenize.STRING: 's', tokenize.COMMENT: 'c'}
    for name in ('FSTRING_START', 'FSTRING_MIDDLE', 'FSTRING_END'):
        if hasattr(tokenize, name):
            starts[getattr(tokenize, name)] = 's'
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = starts.get(token.type)
        if token.type == tokenize.NAME:
            if before in ('def', 'class'):
                kind = 'd'
            elif keyword.iskeyword(token.string):
                kind = 'k'
            elif token.string in BUILTINS and before != '.':
                kind = 'b'
        if kind:
            for row in range(token.start[0], token.end[0] + 1):
                if row <= len(lines):
                    begin = token.start[1] if row == token.start[0] else 0
                    end = token.end[1] if row == token.end[0] else len(lines[row - 1])
                    marks[row - 1].append((begin, end, kind))
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = token.string
    return marks


def paint(line, marks):
    """A line as HTML: `marks` are (from, to, class or link)."""
    out, at = [], 0
    for begin, end, kind in sorted(marks):
        if begin < at:
            continue
        text = html.escape(line[begin:end], quote=False)
        out.append(html.escape(line[at:begin], quote=False))
        out.append('<a href="%s">%s</a>' % (kind, text) if kind[0] == '#' else '<i class="%s">%s</i>' % (kind, text))
        at = end
    return ''.join(out) + html.escape(line[at:], quote=False)


# ----------------------------------------------------------------------------------------------------------
# Our side: as much of C++ as it takes to find what is declared where
# ----------------------------------------------------------------------------------------------------------

CPP = re.compile(r'''
    (?P<comment> //[^\n]* | /\*.*?\*/ )
  | (?P<raw> R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)" )
  | (?P<string> (?:u8|[uUL])?"(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+' )
  | (?P<directive> (?<![^\n]) [ \t]* \# (?:\\\n|[^\n])* )
  | (?P<number> \.?\d (?:'?[\w.])* )
  | (?P<word> [A-Za-z_]\w* )
  | (?P<op> :: | -> | && | \|\| | [^\s\w] )
''', re.X | re.S)
KEYWORDS = set('''alignas auto bool break case catch char class const constexpr continue decltype default delete do
double else enum explicit extern false final float for friend if inline int long mutable namespace new noexcept
noreturn nullptr operator override private protected public reinterpret_cast return short signed sizeof static
static_cast struct switch template this throw true try typedef typename union unsigned using virtual void while
'''.split())


class Token:
    __slots__ = ('kind', 'text', 'begin', 'end', 'line')

    def __init__(self, match, line):
        self.kind, self.text, self.line = match.lastgroup if match['raw'] is None else 'string', match[0], line
        self.begin, self.end = match.span()


class Entity:
    """A declaration or a definition."""

    def __init__(self, kind, scope, name, source, first, last, body):
        self.kind, self.scope, self.name = kind, scope, name   # scope: namespaces and classes, joined by ::
        self.source, self.first, self.last, self.body = source, first, last, body
        self.bases, self.comment, self.anchors, self.named_line, self.private = [], '', [], first, False

    @property
    def key(self):
        return (self.scope + '::' if self.scope else '') + self.name


class Source:
    """One of our files: its tokens, and what it declares."""

    def __init__(self, path):
        self.path, self.name = path, path.name
        self.text = path.read_text(encoding='utf-8')
        self.lines = self.text.split('\n')
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line) + 1)
        self.starts = starts
        self.all = [Token(m, bisect.bisect_right(starts, m.start())) for m in CPP.finditer(self.text)]
        self.tokens = [t for t in self.all if t.kind not in ('comment', 'directive')]
        self.comments = {t.line: t for t in self.all if t.kind == 'comment'}
        self.entities = []
        self.scan()
        self.attach_comments()

    # -- declarations --------------------------------------------------------------------------------------

    def skip(self, i, open_, close):
        """The index behind the bracket that closes the one at i."""
        depth = 0
        while i < len(self.tokens):
            text = self.tokens[i].text if self.tokens[i].kind == 'op' else ''
            depth += (text == open_) - (text == close)
            i += 1
            if depth == 0:
                break
        return i

    def skip_angles(self, i):
        depth = 0
        while i < len(self.tokens):
            text = self.tokens[i].text
            if text == '(':
                i = self.skip(i, '(', ')')
                continue
            depth += (text == '<') - (text == '>')
            i += 1
            if depth == 0:
                break
        return i

    def scan(self):
        scopes = []   # ('namespace' or 'class', name)
        i, tokens = 0, self.tokens
        while i < len(tokens):
            if tokens[i].text == '}':
                if scopes:
                    kind, entity = scopes.pop()
                    if kind == 'class':
                        entity.last = tokens[i].line
                        i = self.to_semicolon(i + 1)
                        entity.last = max(entity.last, tokens[i - 1].line)
                        continue
                i += 1
            elif tokens[i].text == ';':
                i += 1
            elif tokens[i].text in ('public', 'private', 'protected') and tokens[i + 1].text == ':':
                if scopes and isinstance(scopes[-1][1], Entity):
                    scopes[-1][1].section = tokens[i].text
                i += 2
            else:
                i = self.declaration(i, scopes)

    def to_semicolon(self, i):
        while i < len(self.tokens) and self.tokens[i].text != ';':
            i += 1
        return i + 1

    def scope_name(self, scopes):
        return '::'.join(e.name if isinstance(e, Entity) else e for _, e in scopes if e)

    def declaration(self, i, scopes):
        tokens, begin = self.tokens, i
        head, paren, equals, colon = [], None, False, False   # tokens outside of brackets
        while i < len(tokens):
            t = tokens[i]
            if t.text == 'template' and not head:
                i = self.skip_angles(i + 1)
            elif t.text == '[':
                i = self.skip(i, '[', ']')
            elif t.text == '<' and not equals and head and head[-1].kind == 'word' and head[-1].text != 'operator':
                i = self.skip_angles(i)
            elif t.text == '(' and head and head[-1].text == 'operator':
                head.append(t)
                i += 2
            elif t.text == '(':
                if paren is None and not equals:
                    paren = len(head)
                i = self.skip(i, '(', ')')
                head.append(tokens[i - 1])
            elif t.text == '=' and not (head and head[-1].text == 'operator'):
                equals = True
                head.append(t)
                i += 1
            elif t.text == ':' and paren is not None:
                colon = True
                head.append(t)
                i += 1
            elif t.text == ';':
                self.record(head, paren, begin, i, False, scopes)
                return i + 1
            elif t.text == '{':
                words = [h.text for h in head]
                if 'namespace' in words[:2]:
                    # One that is inline is part of no name.
                    names = [] if words[0] == 'inline' else words[words.index('namespace') + 1:]
                    scopes.append(('namespace', ''.join(names)))
                    return i + 1
                if words[:1] == ['extern'] and paren is None:
                    scopes.append(('namespace', ''))
                    return i + 1
                if paren is None and not equals and words[:1] and words[0] in ('class', 'struct', 'union'):
                    scopes.append(('class', self.record_class(head, begin, i, scopes)))
                    return i + 1
                if paren is not None and not equals and not (colon and head[-1].kind == 'word'):
                    end = self.skip(i, '{', '}')
                    if i + 1 < len(tokens) and tokens[end - 1].text == '}':
                        while end < len(tokens) and tokens[end].text == 'catch':   # a function's try block
                            end = self.skip(self.skip(end + 1, '(', ')'), '{', '}')
                    self.record(head, paren, begin, end - 1, True, scopes)
                    return end
                if words[:1] == ['enum']:
                    self.record_enum(head, begin, i, scopes)
                i = self.skip(i, '{', '}')
                if not equals:
                    equals = True
                    head.append(Braces)
            elif t.text == '}':
                return i
            else:
                head.append(t)
                i += 1
        return i

    def record_class(self, head, begin, i, scopes):
        words = [h.text for h in head]
        colon = words.index(':') if ':' in words else len(words)
        name = ''.join(w for w in words[1:colon] if w != 'final')
        first, last = self.tokens[begin].line, self.tokens[i].line
        entity = Entity('class', self.scope_name(scopes), name, self, first, last, True)
        entity.section = 'private' if words[0] == 'class' else 'public'
        base = ''
        for word in words[colon + 1:] + [',']:
            if word == ',':
                entity.bases.append(base)
                base = ''
            elif word not in ('public', 'private', 'protected', 'virtual'):
                base += word
        entity.bases = [b for b in entity.bases if b]
        entity.named_line = head[1].line if len(head) > 1 else entity.first
        self.entities.append(entity)
        return entity

    def record_enum(self, head, begin, i, scopes):
        end = self.skip(i, '{', '}')
        names = [t.text for t, before in zip(self.tokens[i + 1:end], self.tokens[i:end])
                 if t.kind == 'word' and before.text in '{,']
        names += [h.text for h in head[1:] if h.kind == 'word' and h.text not in ('class', 'struct')]
        for name in names:
            self.entities.append(Entity('variable', self.scope_name(scopes), name, self, self.tokens[begin].line,
                                        self.tokens[end - 1].line, True))

    def record(self, head, paren, begin, end, body, scopes):
        words = [h.text for h in head]
        if not words or words[0] in ('friend', 'static_assert') or head[0] is Braces:
            return
        first, last = self.tokens[begin].line, self.tokens[end].line
        scope = self.scope_name(scopes)

        def add(kind, name, line, path=''):
            where = '::'.join(p for p in (scope, path) if p)
            entity = Entity(kind, where, name, self, first, last, body)
            entity.named_line = line
            if scopes and isinstance(scopes[-1][1], Entity):
                entity.private = scopes[-1][1].section == 'private'
            self.entities.append(entity)

        if words[0] == 'using':
            if '=' in words:
                add('type', words[1], head[1].line)
            elif 'namespace' not in words and len(words) > 2:
                add('using', words[-1], head[-1].line)
            return
        if words[0] in ('class', 'struct', 'enum') and len(words) == 2:
            return   # announced, no more
        if paren is not None:
            k = paren - 1
            if 'operator' in words[:paren + 1]:
                at = words.index('operator')
                name, k = ''.join(words[at:paren]), at
            elif k < 0 or head[k].kind != 'word':
                return
            else:
                name = words[k]
                if k and words[k - 1] == '~':
                    name, k = '~' + name, k - 1
            path = []
            while k >= 2 and words[k - 1] == '::' and head[k - 2].kind == 'word':
                path.insert(0, words[k - 2])
                k -= 2
            add('function', name, head[paren - 1].line, '::'.join(path))
            return
        for i, word in enumerate(words + [';']):
            if word in (';', ',', '=', '{}') and i and head[i - 1].kind == 'word':
                if '=' not in words[:i] or word == '=':
                    path = [words[i - 3]] if i >= 3 and words[i - 2] == '::' else []
                    add('variable', words[i - 1], head[i - 1].line, '::'.join(path))
                if word in ('=', '{}'):
                    if ',' not in words[i:]:
                        break

    # -- comments ------------------------------------------------------------------------------------------

    def is_comment(self, line):
        return 1 <= line <= len(self.lines) and self.lines[line - 1].lstrip().startswith('//')

    def is_banner(self, line):
        return re.match(r'\s*// ?-{20,}$', self.lines[line - 1]) is not None

    def block_above(self, line):
        """The lines of the comment that ends directly above a line."""
        first = line
        while self.is_comment(first - 1) and not self.is_banner(first - 1):
            first -= 1
        if first > 1 and self.is_comment(first - 1) and self.is_banner(first - 1):
            return []   # a heading
        return list(range(first, line))

    def attach_comments(self):
        self.entities.sort(key=lambda e: (e.first, -e.last))
        blocks = {}
        for entity in self.entities:
            block = self.block_above(entity.first)
            entity.comment = prose(self.lines[n - 1] for n in block)
            behind = self.comments.get(entity.last)
            if not entity.body and behind and not self.is_comment(entity.last):
                entity.comment = (entity.comment + '\n\n' + prose([behind.text])).strip()
            elif entity.kind == 'variable' and behind and not self.is_comment(entity.last):
                entity.comment = (entity.comment + '\n\n' + prose([behind.text])).strip()
            if block:
                blocks.setdefault(block[-1], block)
        self.anchors = []   # (line, module, name, entity or None)
        for number, token in sorted(self.comments.items()):
            if not ANCHOR.search(token.text):
                continue
            for found in ANCHOR.finditer(token.text):
                names = found[2].split(', ')
                if self.is_comment(number):
                    below = number + 1
                    while self.is_comment(below):
                        below += 1
                    limit = below
                    while limit <= len(self.lines) and self.lines[limit - 1].strip() and not (
                            limit > below and self.is_comment(limit)):
                        limit += 1
                    near = [e for e in self.entities if below <= e.first < limit]
                else:
                    near = [e for e in self.entities if e.first <= number <= e.last and e.kind != 'class']
                for name in names:
                    same = [e for e in near if e.name == twin_name(name)]
                    pick = same[0] if same else near[0] if near and len(names) == 1 else None
                    self.anchors.append((number, found[1], name, pick))
                    if pick:
                        pick.anchors.append((found[1], name))

    # -- text ----------------------------------------------------------------------------------------------

    def highlight(self):
        marks = [[] for _ in self.lines]
        names = {(e.named_line, e.name.lstrip('~')) for e in self.entities
                 if e.kind in ('function', 'class') and e.body}
        for token in self.all:
            kind = {'comment': 'c', 'string': 's', 'raw': 's', 'directive': 'p', 'number': 'n'}.get(token.kind)
            if token.kind == 'word':
                if token.text in KEYWORDS:
                    kind = 'k'
                elif (token.line, token.text) in names:
                    kind = 'd'
            if kind:
                at = token.begin
                for offset, part in enumerate(token.text.split('\n')):
                    line = token.line + offset
                    begin = at - self.starts[line - 1]
                    marks[line - 1].append((begin, begin + len(part), kind))
                    at += len(part) + 1
        return marks


class Braces:
    """Stands for a brace-enclosed initializer among the tokens of a declaration."""
    text, kind, line = '{}', 'op', 0


def prose(lines):
    """The text of a comment without slashes and anchors; an empty comment line ends a paragraph."""
    text = '\n'.join(re.sub(r'^\s*//[/!]? ?', '', line) for line in lines)
    text = ANCHOR.sub('', text)
    text = re.sub(r'[ \t]+$', '', text, flags=re.M)
    text = re.sub(r'\n{3,}', '\n\n', text).strip()
    return text


def twin_name(name):
    """The C++ identifier of a Python name."""
    owner, _, last = name.rpartition('.')
    if last in ('__init__', '__del__'):
        return ('' if last == '__init__' else '~') + owner
    return RENAMED.get(last, last)


class Group:
    """All that declares and defines one C++ name: overloads are one group."""

    def __init__(self, key):
        self.key, self.entities = key, []
        self.twins = []   # ids of Python's items

    @property
    def name(self):
        return self.key.rpartition('::')[2]

    @property
    def scope(self):
        return self.key.rpartition('::')[0]

    @property
    def kind(self):
        kinds = {e.kind for e in self.entities}
        return next(k for k in ('class', 'function', 'variable', 'type', 'using') if k in kinds)

    def shown(self):
        """What to show: definitions; a declaration only where there is nothing else."""
        bodies = [e for e in self.entities if e.body and e.kind != 'using']
        return bodies or [e for e in self.entities]

    def comment(self):
        said = []
        for entity in sorted(self.entities, key=lambda e: not e.source.name.endswith('.hpp')):
            for part in entity.comment.split('\n\n'):
                if part and part not in said:
                    said.append(part)
        return said


class Cpp:
    """All of our files."""

    def __init__(self, top):
        self.sources = [Source(top / name) for name in SOURCES if (top / name).exists()]
        self.groups = {}
        for source in self.sources:
            for entity in source.entities:
                self.groups.setdefault(entity.key, Group(entity.key)).entities.append(entity)
        self.anchored = collections.defaultdict(list)
        for group in self.groups.values():
            for entity in group.entities:
                for anchor in entity.anchors:
                    if group not in self.anchored[anchor]:
                        self.anchored[anchor].append(group)

    def source(self, name):
        return next((s for s in self.sources if s.name == name), None)

    def bases(self, key):
        """The groups of a class's bases, those that are ours."""
        group = self.groups.get(key)
        for entity in group.entities if group else ():
            for base in entity.bases:
                found = self.find_class(base, entity.scope)
                if found:
                    yield found

    def find_class(self, name, scope):
        parts = scope.split('::') if scope else []
        for n in range(len(parts), -1, -1):
            group = self.groups.get('::'.join(parts[:n] + [name]))
            if group and group.kind == 'class':
                return group
        return None

    def member(self, key, name, seen=()):
        """(group, inherited) of a member of a class; it may stand in a base."""
        if key + '::' + name in self.groups and self.groups[key + '::' + name].kind != 'using':
            return self.groups[key + '::' + name], False
        for base in self.bases(key):
            own = base.name if name == key.rpartition('::')[2] else '~' + base.name if name[:1] == '~' else name
            found = self.member(base.key, own) if base.key not in seen else None
            if found:
                return found[0], True
        return None

    def twin(self, module, name):
        """([groups], inherited) for a Python name; None when there is none."""
        if self.anchored.get((module, name)):
            groups = self.anchored[(module, name)]
            owner, _, _ = name.rpartition('.')
            own = not owner or any(g.scope.rpartition('::')[2] == owner or g.name == owner for g in groups)
            return groups, not own
        if name == PROGRAM:
            found = [self.groups[n] for n in ('run', 'main') if n in self.groups]
            return (found, False) if 'main' in self.groups else None
        owner, _, _ = name.rpartition('.')
        for scope in (module, ''):
            if owner:
                cls = (scope + '::' if scope else '') + owner
                found = self.member(cls, twin_name(name)) if cls in self.groups else None
                if found:
                    return [found[0]], found[1]
            else:
                group = self.groups.get((scope + '::' if scope else '') + twin_name(name))
                if group and group.kind != 'using':
                    return [group], False
        return None

    def by_suffix(self, name):
        """The groups that a short name, as deviations.txt and walks.txt have it, may mean."""
        exact = self.groups.get(name)
        if exact:
            return [exact]
        return [g for k, g in self.groups.items() if k.endswith('::' + name) and g.kind != 'using']


# ----------------------------------------------------------------------------------------------------------
# The papers: deviations, what is not ported, the walks
# ----------------------------------------------------------------------------------------------------------

class Row:
    def __init__(self, number, where, python, here):
        self.number, self.where, self.python, self.here = number, where, python, here
        self.tests, self.places = [], []


def cells(line):
    return [c.strip().replace('\\|', '|') for c in re.split(r'(?<!\\)\|', line.strip())[1:-1]]


class Papers:
    def __init__(self, top, faults):
        self.rows, self.not_ported, self.private = {}, {}, ''
        path = top / 'tests/DEVIATIONS.md'
        text = path.read_text(encoding='utf-8') if path.exists() else ''
        for line in re.findall(r'^\| *\d+ *\|.*$', self.section(text, 'Deviations'), re.M):
            row = cells(line)
            if len(row) == 4:
                before = self.rows.get(int(row[0]) - 1)
                if before and row[2] == 'the same':   # as in the row above it
                    row[2] = before.python
                self.rows[int(row[0])] = Row(int(row[0]), *row[1:])
        for line in re.findall(r'^\|.*$', self.section(text, 'Not ported'), re.M):
            row = cells(line)
            if len(row) < 2 or row[0] == 'Python' or not row[0].strip('- :'):
                continue
            for name in re.findall(r'`([A-Za-z_][\w.]*)`', row[0]):
                self.not_ported[name] = row[1]
            if re.search(r'(?<!\w)__[a-z]\w*?(?<!__)\b', row[0]):
                self.private = row[1]
        if not self.rows:
            faults.append('no table of deviations in tests/DEVIATIONS.md')
        for path in sorted((top / 'tests').glob('*.cpp')):
            text = path.read_text(encoding='utf-8', errors='replace')
            for found in re.finditer(r'// Deviations? ((?:\d+(?:, | and )?)+)[^\n]*\n(?:\s*//[^\n]*\n)*\s*'
                                     r'(?:template[^\n]*\n)?\w*TEST\w*\(\s*(\w+)\s*,\s*(\w+)', text):
                for number in re.findall(r'\d+', found[1]):
                    if int(number) in self.rows:
                        self.rows[int(number)].tests.append('%s.%s' % (found[2], found[3]))

    @staticmethod
    def section(text, title):
        """What stands below a heading, or the whole text when the title is the document's own."""
        found = re.search(r'^(#+) +%s\s*$' % title, text, re.M)
        if not found:
            return ''
        level = len(found[1])
        end = re.compile(r'^#{2,%d} ' % max(level, 2), re.M).search(text, found.end())
        return text[found.end():end.start() if end else len(text)]

    def why_not(self, module, name):
        """Why a Python name is not ported; empty when it is."""
        parts = name.split('.')
        for n in range(len(parts), 0, -1):
            short = '.'.join(parts[:n])
            for token in (module + '.' + short, short):
                if token in self.not_ported:
                    return self.not_ported[token]
        last = parts[-1]
        return self.private if last.startswith('__') and not last.endswith('__') else ''


class Step:
    def __init__(self, name, number):
        self.name, self.number, self.ours, self.theirs, self.text = name, number, [], [], ''
        self.entry, self.lines, self.python_lines = None, [], []


def read_walks(path):
    """[(id, title, introduction, [Step])]"""
    walks, step = [], None
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
        if line.startswith('#') or (not line.strip()):
            continue
        head = re.match(r'== (\w+): (.*)', line)
        if head:
            walks.append([head[1], head[2], '', []])
            step = None
        elif line.startswith('-- '):
            step = Step(line[3:].strip(), number)
            walks[-1][3].append(step)
        elif step and line.startswith('c++: '):
            step.ours.append(line[5:].strip())
        elif step and line.startswith('py: '):
            step.theirs.append(line[4:].strip())
        elif step:
            step.text = (step.text + ' ' + line.strip()).strip()
        else:
            walks[-1][2] = (walks[-1][2] + ' ' + line.strip()).strip()
    return walks


# ----------------------------------------------------------------------------------------------------------
# What belongs together
# ----------------------------------------------------------------------------------------------------------

class Entry:
    """One row of the page: a Python item, ours, or both."""

    def __init__(self, id_, title, module, cls, items, groups, kind):
        self.id, self.title, self.module, self.cls = id_, title, module, cls
        self.items, self.groups, self.kind = items, groups, kind   # kind: pair, not-ported, only, python, introduction
        self.reason, self.where, self.rows, self.marks, self.callers, self.calls = '', '', [], {}, [], []
        self.spans = []   # (source, first, last) of ours

    def set_spans(self):
        spans = []
        for group in self.groups:
            for entity in group.shown():
                spans.append((entity.source, entity.first, entity.last))
        self.spans = sorted(set(spans), key=lambda s: (s[0].name.endswith('.hpp') and len(spans) > 1, s[0].name, s[1]))
        kept = []
        for span in self.spans:   # what stands inside of another span is shown there
            if not any(o is not span and o[0] is span[0] and o[1] <= span[1] and span[2] <= o[2] for o in self.spans):
                kept.append(span)
        self.spans = kept


Chapter = collections.namedtuple('Chapter', 'id title entries')


def cpp_id(key):
    return 'ours.' + re.sub(r'[^\w.]+', '-', key.replace('::', '.').replace('~', 'end-of-'))


class Study:
    def __init__(self, python, top=TOP, here=HERE):
        self.faults = []   # what does not match, a line each
        self.version, files = python
        self.python = {name: PyModule(name, path) for name, path in files.items()}
        self.cpp = Cpp(top)
        self.papers = Papers(top, self.faults)
        self.walks = read_walks(here / 'walks.txt')
        self.top, self.here = top, here
        self.chapters = []
        self.entry_of = {}   # group -> entry
        self.check_anchors()
        for module in MODULES:
            self.add_module(module)
        self.add_smtplib()
        self.add_only_ours()
        for entry in self.entries():
            told = self.entry_of.get(entry.groups[0]) if entry.where else None
            if not entry.spans and not (told and told.kind == 'pair'):
                entry.set_spans()
        self.place_deviations()
        self.place_walks()
        self.cross_reference()

    def entries(self):
        return [e for chapter in self.chapters for e in chapter.entries]

    def old_names(self):
        """The names that smtpd had up to 3.10, when this Python has them no more."""
        path = self.top / 'tests/reference/mailmanproxy-3.10.txt'
        lines = path.read_text(encoding='utf-8').split('\n') if path.exists() else []
        return [n for n in lines if n and not n.startswith('#') and n not in self.python['smtpd'].known]

    def check_anchors(self):
        for source in self.cpp.sources:
            for line, module, name, entity in source.anchors:
                known = self.python[module].known | self.python[module].attributes
                if name not in known and not (module == 'smtpd' and name in self.old_names()):
                    self.faults.append('%s:%d: %s.py has no %s' % (source.name, line, module, name))
                elif entity is None and name not in self.python[module].attributes:
                    self.faults.append('%s:%d: %s.py: %s: nothing of that name is declared there'
                                       % (source.name, line, module, name))

    def pair(self, module, item):
        """The entry of a Python item."""
        groups, inherited, names = [], False, [item.name] if item.kind != 'between' else item.assigned
        if item.kind == 'class':
            names = names + [n for n in sorted(self.python[module].known if module in self.python else ())
                             if n.startswith(item.name + '.')
                             and not any(i.name == n for i in self.python[module].items)]
        lacking = []
        for name in names:
            found = self.cpp.twin(module, name)
            if found:
                groups += [g for g in found[0] if g not in groups]
                inherited = inherited or (found[1] and item.kind == 'function')
            elif not self.papers.why_not(module, name):
                lacking.append(name)
        if item.kind == 'class':   # members that stand in the class's own text
            groups = [g for g in groups if g.kind in ('class', 'function')]
        if item.kind == 'between':
            lacking = [n for n in lacking if not n.startswith('_')]
        elif item.kind == 'class':
            lacking = [n for n in lacking if n == item.name]
        reason = self.papers.why_not(module, item.name) if item.name in names else ''
        for name in lacking:
            self.faults.append("%s.py: %s has no twin, and no row in 'Not ported'" % (module, name))
        kind = 'pair' if groups else 'not-ported' if reason else 'python'
        cls = item.name if item.kind == 'class' else item.cls
        entry = Entry(item.id, item.name, module, cls, [item], groups, kind)
        entry.reason = reason
        if inherited and groups:
            entry.where = groups[0].scope.rpartition('::')[2]
        if item.kind == 'between':
            reasons = collections.OrderedDict()
            for name in names:
                reasons.setdefault(self.papers.why_not(module, name), []).append('`%s`' % name)
            entry.reason = ' '.join('%s: %s.' % (', '.join(n), why.rstrip('.')) for why, n in reasons.items() if why)
            if not groups and entry.reason:
                entry.kind = 'not-ported'
        if item.name == 'introduction':
            entry.kind = 'introduction'
        return entry

    def take(self, entry, entries):
        for group in entry.groups:
            if not entry.where:
                self.entry_of.setdefault(group, entry)
        entries.append(entry)

    def add_module(self, module):
        py, entries = self.python[module], []
        items = list(py.items)
        old = self.old_names() if module == 'smtpd' else []
        if old:
            at = max([i for i, it in enumerate(items) if it.name.startswith('PureProxy')] + [-1]) + 1
            items[at:at] = [self.missing(module, name) for name in old]
        for item in items:
            entry = self.pair(module, item)
            last = entries[-1] if entries else None
            if (entry.kind == 'not-ported' and last and last.kind == 'not-ported' and last.reason == entry.reason
                    and last.cls == entry.cls and item.name.split('.')[-1].startswith('__')):
                last.items.append(item)
                if item.name not in last.title.split(', '):
                    last.title += ', ' + item.name
                continue
            if item.name == 'introduction':
                self.introduce(entry, module)
            self.take(entry, entries)
        self.chapters.append(Chapter(module, module + '.py', entries))

    def missing(self, module, name):
        item = PyItem(module, name, 'function' if '.' in name else 'class', 0, 0)
        item.missing = True
        return item

    def introduce(self, entry, module):
        source = self.cpp.source('smtpd.hpp' if module == 'smtpd' else 'asyncore.hpp')
        if source and module != 'asynchat':
            last = 1
            while last < len(source.lines) and source.lines[last].startswith('//'):
                last += 1
            entry.spans = [(source, 1, last)]

    def add_smtplib(self):
        """The client's side: what is ours of smtplib, in our order."""
        py, entries = self.python['smtplib'], []
        items = {i.name: i for i in py.items}
        classes = [(n, g) for (m, n), gs in self.cpp.anchored.items() if m == 'smtplib' and '.' not in n for g in gs]
        for name, group in sorted(classes, key=lambda c: (c[1].entities[0].source.name, c[1].entities[0].first)):
            if name in items:
                entry = Entry('smtplib.' + name, name, 'smtplib', name, [items[name]], [group], 'pair')
                self.take(entry, entries)
            for member in self.members(group):
                twins = [n for m, n in (a for e in member.entities for a in e.anchors) if m == 'smtplib'] or [
                    name + '.' + ('__init__' if member.name == group.name else member.name)]
                item = items.get(twins[0])
                public = member.kind == 'function' and not any(e.private for e in member.entities)
                own = any(e.body and not self.inside(e, group) for e in member.entities)
                if item and public and own and member not in self.entry_of:
                    entry = Entry('smtplib.' + twins[0], twins[0], 'smtplib', name, [item], [member], 'pair')
                    self.take(entry, entries)
        if entries:
            self.chapters.append(Chapter('smtplib', 'smtplib.py, as far as the proxies need it', entries))

    def members(self, group):
        found = [g for k, g in self.cpp.groups.items() if g.scope == group.key and g.kind in ('function', 'class')]
        return sorted(found, key=lambda g: (g.shown()[0].source.name, g.shown()[0].first))

    @staticmethod
    def inside(entity, group):
        return any(e.source is entity.source and e.first <= entity.first and entity.last <= e.last
                   for e in group.entities if e.kind == 'class')

    def add_only_ours(self):
        """What has no twin: members of a class that has one at that class's end, the rest at the chapter's."""
        wanted = []
        for group in self.cpp.groups.values():
            if group in self.entry_of or group.kind not in ('function', 'class'):
                continue
            owner = self.cpp.groups.get(group.scope)
            bodies = [e for e in group.entities if e.body]
            if not bodies or (owner and owner.kind == 'class' and all(self.inside(e, owner) for e in bodies)):
                continue
            wanted.append(group)
        wanted.sort(key=lambda g: min((SOURCES.index(e.source.name) if e.source.name.endswith('.cpp') else 9, e.first)
                                      for e in g.shown()))
        rest = collections.defaultdict(list)
        for group in wanted:
            home = self.home(group)
            entry = Entry(cpp_id(group.key), self.short(group.key), '', '', [], [group], 'only')
            self.entry_of[group] = entry
            if home:
                chapter, cls = home
                entry.module, entry.cls = chapter.id, cls
                at = max(i for i, e in enumerate(chapter.entries) if e.cls == cls) + 1
                chapter.entries.insert(at, entry)
            else:
                rest[self.part(group)].append(entry)
        for part in ('asyncore', 'asynchat', 'smtpd', 'main.cpp'):
            if rest[part]:
                for entry in rest[part]:
                    entry.module, entry.cls = 'ours-' + part, self.class_of(entry.groups[0])
                self.chapters.append(Chapter('ours-' + part.replace('.', '-'), 'Only ours: ' + part,
                                             self.by_class(rest[part])))

    @staticmethod
    def by_class(entries):
        """In our order, but what belongs to one class in one piece."""
        order = []
        for entry in entries:
            if entry.cls not in order:
                order.append(entry.cls)
        ordered = [e for e in entries if not e.cls]
        for cls in filter(None, order):   # the class itself first
            ordered += sorted((e for e in entries if e.cls == cls),
                              key=lambda e: e.groups[0].name != cls or e.groups[0].kind != 'class')
        return ordered

    def class_of(self, group):
        parts = group.key.split('::')
        for n in range(1, len(parts) + 1):
            found = self.cpp.groups.get('::'.join(parts[:n]))
            if found and found.kind == 'class':
                return found.name
        return ''

    def short(self, key):
        parts = key.split('::')
        return '::'.join(parts[1:] if len(parts) > 1 and parts[0] in MODULES else parts)

    def part(self, group):
        if all(e.source.name == 'main.cpp' for e in group.entities):
            return 'main.cpp'
        return group.key.split('::')[0]

    def home(self, group):
        """(chapter, class) of the Python class that a member of ours stands in."""
        parts = group.key.split('::')
        for n in range(len(parts) - 1, 0, -1):
            owner = self.cpp.groups.get('::'.join(parts[:n]))
            entry = self.entry_of.get(owner)
            if entry and owner.kind == 'class' and entry.kind == 'pair':
                chapter = next(c for c in self.chapters if entry in c.entries)
                return chapter, entry.cls
        return None

    # -- marks ---------------------------------------------------------------------------------------------

    def find_place(self, name, quotes, where):
        """(entry, source, [lines]) of a function of ours and what is quoted of it."""
        groups = self.cpp.by_suffix(name)
        groups = [g for g in groups if g.kind in ('function', 'class', 'variable')]
        if len(groups) > 1:
            groups = [g for g in groups if g in self.entry_of] or groups
        if not groups:
            self.faults.append('%s: there is no %s' % (where, name))
            return None
        if len(groups) > 1:
            self.faults.append('%s: %s may be %s' % (where, name, ' or '.join(g.key for g in groups)))
            return None
        group, lines, source = groups[0], [], None
        spans = self.entry_of[group].spans if group in self.entry_of and self.entry_of[group].spans else [
            (e.source, e.first, e.last) for e in group.shown()]
        if group not in self.entry_of:
            spans = [(e.source, e.first, e.last) for e in group.shown()]
        for quote in quotes or ['']:
            found = next(((s, n) for s, first, last in spans for n in range(first, last + 1)
                          if quote in s.lines[n - 1]
                          and (quote or n >= first + self.offset(group, s, first))), None)
            if not found:
                self.faults.append('%s: %s has no line with %s' % (where, name, quote))
                return None
            source = found[0]
            lines.append(found[1])
        entry = self.entry_of.get(group) or self.showing(source, lines[0])
        if not entry:
            self.faults.append('%s: %s is not on the page' % (where, name))
            return None
        return entry, source, lines

    def showing(self, source, line):
        """The entry that a line of ours is shown in."""
        return next((e for e in self.entries() for s, first, last in e.spans
                     if s is source and first <= line <= last), None)

    @staticmethod
    def offset(group, source, first):
        return max([e.named_line - e.first for e in group.entities if e.source is source and e.first == first] + [0])

    def place_deviations(self):
        path = self.here / 'deviations.txt'
        if not self.papers.rows:
            return   # that has been said
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            if not line.strip() or line.startswith('#'):
                continue
            where = 'deviations.txt:%d' % number
            row, name, quote = (line.split(None, 2) + [''])[:3]
            if not row.isdigit() or int(row) not in self.papers.rows:
                self.faults.append('%s: there is no deviation %s' % (where, row))
                continue
            if name == '-':   # a matter of all of it: told in the list at the end alone
                self.papers.rows[int(row)].places.append(None)
                continue
            place = self.find_place(name, [quote.strip()] if quote.strip() else [], where)
            if place:
                self.mark(self.papers.rows[int(row)], *place)
        for source in self.cpp.sources:   # and what the sources say themselves
            for token in source.comments.values():
                for found in re.finditer(r'\b[Dd]eviations? (\d+)', token.text):
                    row = self.papers.rows.get(int(found[1]))
                    entry = self.showing(source, token.line)
                    if not row:
                        self.faults.append('%s:%d: there is no deviation %s' % (source.name, token.line, found[1]))
                    elif entry and row.number not in entry.rows:
                        self.mark(row, entry, source, [token.line])
        for row in self.papers.rows.values():
            if not row.places:
                self.faults.append('deviation %d has no place in deviations.txt' % row.number)
            row.places = [e for e in row.places if e]

    def mark(self, row, entry, source, lines):
        if row.number not in entry.rows:
            entry.rows.append(row.number)
            entry.rows.sort()
        for line in lines:
            marks = entry.marks.setdefault((source.name, line), [])
            if row.number not in marks:
                marks.append(row.number)
        if entry not in row.places:
            row.places.append(entry)

    def place_walks(self):
        for _, title, _, steps in self.walks:
            if not steps:
                self.faults.append('walks.txt: %s has no step' % title)
            for step in steps:
                where = 'walks.txt:%d' % step.number
                place = self.find_place(step.name, step.ours, where)
                if not step.text:
                    self.faults.append('%s: the step at %s says nothing' % (where, step.name))
                if not place:
                    continue
                step.entry, source, lines = place
                step.lines = [(source.name, n) for n in lines]
                items = [i for i in step.entry.items if not i.missing]
                for quote in step.theirs:
                    found = next((n for i in items for n in range(i.first, i.last + 1)
                                  if quote in self.python[i.module].lines[n - 1]), None)
                    if found:
                        step.python_lines.append(found)
                    elif not any(i.missing for i in step.entry.items):
                        self.faults.append("%s: Python's %s has no line with %s" % (where, step.entry.title, quote))

    # -- who calls whom ------------------------------------------------------------------------------------

    COMMON = set('''append assign at back begin c_str capacity clear code compare copy count data emplace
    emplace_back empty end erase extract find find_first_not_of find_first_of find_last_of front get has_value
    insert length lock mapped name pop_back pop_front push_back reserve reset resize rdbuf rfind second size splice
    str substr swap value value_or what join split strip startswith endswith update encode decode items keys
    upper lower message remove write flush read'''.split())

    def cross_reference(self):
        """Links from each call to what is called, and back."""
        self.links = {}   # (source name, line) -> [(from, to, id)]
        for source in self.cpp.sources:
            tokens = source.tokens
            for i, token in enumerate(tokens[:-1]):
                if token.kind != 'word' or tokens[i + 1].text not in '(<' or token.text in KEYWORDS:
                    continue
                if tokens[i + 1].text == '<' and not (i and tokens[i - 1].text == '&'):
                    continue
                entity = next((e for e in reversed(source.entities) if e.kind in ('function', 'class')
                               and e.first <= token.line <= e.last and e.body), None)
                if not entity or (token.line == entity.named_line and token.text == entity.name.lstrip('~')):
                    continue
                group = self.called(tokens, i, entity)
                target = self.entry_of.get(group)
                caller = self.cpp.groups[entity.key]
                while caller not in self.entry_of and '::' in caller.key and caller.scope in self.cpp.groups:
                    caller = self.cpp.groups[caller.scope]
                here = self.entry_of.get(caller)
                if target and target is not here:
                    column = token.begin - source.starts[token.line - 1]
                    self.links.setdefault((source.name, token.line), []).append(
                        (column, column + len(token.text), target.id))
                    if entity.kind == 'class':
                        continue   # declared, not called
                    if here and here not in target.callers:
                        target.callers.append(here)
                    if here and target.kind == 'only' and target not in here.calls:
                        here.calls.append(target)
        for module in self.python.values():
            if module.name in MODULES:
                self.link_python(module)

    def called(self, tokens, i, entity):
        name, before = tokens[i].text, tokens[i - 1].text if i else ''
        groups = self.cpp.groups
        if before == '::':
            if tokens[i - 2].kind != 'word' or tokens[i - 2].end != tokens[i - 1].begin:
                return None   # the system's
            owner = tokens[i - 2].text
            found = [g for k, g in groups.items() if k.endswith(owner + '::' + name) and g.kind == 'function']
            return found[0] if found else None
        if before in ('.', '->') and tokens[i - 2].text != 'this':
            if name in self.COMMON:
                return None
            found = [g for g in groups.values() if g.name == name and g.kind == 'function' and g in self.entry_of]
            if len(found) > 1:
                found = [g for g in found if self.entry_of[g].kind == 'pair']
            return found[0] if len(found) == 1 else None
        scope = entity.scope if entity.kind != 'class' else entity.key
        while scope:
            if scope in groups and groups[scope].kind == 'class':
                found = self.cpp.member(scope, name)
                if found and found[0].kind == 'function':
                    return found[0]
            elif scope + '::' + name in groups and groups[scope + '::' + name].kind == 'function':
                return groups[scope + '::' + name]
            scope = scope.rpartition('::')[0]
        found = groups.get(name)
        return found if found and found.kind == 'function' else None

    def link_python(self, module):
        entries = {}
        for entry in self.entries():
            for item in entry.items:
                entries[(item.module, item.name)] = entry
        owner = {}
        for item in module.items:
            for line in range(item.first, item.last + 1):
                owner[line] = item
        for number, line in enumerate(module.lines, 1):
            item = owner.get(number)
            if not item or line.lstrip().startswith(('#', 'def ', 'class ')):
                continue
            for found in re.finditer(r'(?<![\w.])(?:(self|asyncore|asynchat|smtpd)\.)?(?:(\w+)\.)?(\w+)(?=\()', line):
                prefix, cls, name = found.groups()
                target = None
                if prefix == 'self' and not cls:
                    target = self.python_member(module.name, item.cls or item.name, name, entries)
                elif prefix in MODULES:
                    target = entries.get((prefix, cls + '.' + name if cls else name))
                elif not prefix and not cls:
                    target = entries.get((module.name, name))
                elif not prefix and cls:
                    target = entries.get((module.name, cls + '.' + name))
                if target and target is not entries.get((item.module, item.name)):
                    self.links.setdefault((module.name + '.py', number), []).append(
                        (found.start(3), found.end(3), target.id))

    def python_member(self, module, cls, name, entries):
        """A method of a class or of its bases, across the three modules."""
        if (module, cls + '.' + name) in entries:
            return entries[(module, cls + '.' + name)]
        for base in self.python[module].bases.get(cls, ()):
            home = next((m for m in (module,) + MODULES if base in self.python[m].bases), None)
            found = self.python_member(home, base, name, entries) if home else None
            if found:
                return found
        return None


# ----------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------

def esc(text):
    return html.escape(text, quote=True)


def inline(text, link=None):
    """Text with `code`, **bold** and [links](...) as HTML; `link` finds what a name() leads to."""
    out = []
    for i, part in enumerate(re.split(r'`([^`]*)`', text)):
        if i % 2:
            out.append(named(part, link))
            continue
        part = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', part)
        at = 0
        for found in re.finditer(r'~?[A-Za-z_][\w:]*\(\)', part) if link else ():
            out.append(bold(part[at:found.start()]) + named(found[0], link))
            at = found.end()
        out.append(bold(part[at:]))
    return ''.join(out)


def bold(text):
    text = re.sub(r"(?<=\w)'(?=\w)", '\u2019', text).replace(' -> ', ' \u2192 ')
    return re.sub(r'\*\*(.+?)\*\*', r'<b>\1</b>', html.escape(text, quote=False))


def named(text, link):
    target = link(text) if link else None
    code = '<code>%s</code>' % html.escape(text, quote=False)
    return '<a href="#%s">%s</a>' % (target, code) if target else code


class Page:
    def __init__(self, study):
        self.study = study
        self.painted = {}
        self.lines = {}
        for source in study.cpp.sources:
            self.prepare(source.name, source.lines, source.highlight())
        for module in study.python.values():
            self.prepare(module.name + '.py', module.lines, module.marks)

    def prepare(self, name, lines, marks):
        for number, line in enumerate(lines, 1):
            links = [(b, e, '#' + to) for b, e, to in self.study.links.get((name, number), ())]
            plain = [m for m in marks[number - 1] if not any(b < m[1] and m[0] < e for b, e, _ in links)]
            self.painted[(name, number)] = plain + links
        self.lines[name] = lines

    # -- code ----------------------------------------------------------------------------------------------

    def code(self, name, first, last, marks=None, differs=()):
        lines = self.lines[name][first - 1:last]
        indents = [len(l) - len(l.lstrip()) for l in lines if l.strip()]
        cut = min(indents or [0])
        out = []
        for number in range(first, last + 1):
            line = self.lines[name][number - 1].rstrip()
            marks_here, gap = self.painted[(name, number)], re.search(r'(?<=\S) {3,}(?=// )', line)
            if gap and name.endswith('pp'):   # comments in columns need the width that they were written for
                less = len(gap[0]) - 2
                marks_here = [(b - less, e - less, k) if b >= gap.end() else (b, e, k) for b, e, k in marks_here]
                line = line[:gap.start()] + '  ' + line[gap.end():]
            start = len(line) - len(line.lstrip()) if line.strip() else 0
            found = [(max(b - start, 0), max(e - start, 0), k) for b, e, k in marks_here if e > start]
            indent = max(start - cut, 0)
            text = ('<span class="w">%s</span>' % (' ' * indent) if indent else '') + paint(line[start:], found)
            badges = ''.join(self.badge(n) for n in (marks or {}).get((name, number), ()))
            classes = 'l' + (' m' if badges else '') + (' d' if number in differs else '')
            out.append('<span class="%s" data-n="%d"%s>%s%s\n</span>' % (
                classes, number, ' style="--i:%d"' % indent if indent else '', text, badges))
        return '<pre data-f="%s" tabindex="-1">%s</pre>' % (name, ''.join(out))

    def badge(self, number):
        return ' <button class="badge" data-row="%d" aria-label="Deviation %d">%d</button>' % (number, number, number)

    def says_python(self, source, first, last):
        """The lines of a piece whose comments tell what Python does there: 'Python: ...; here ...'."""
        return {n for n in range(first, last + 1) if n in source.comments
                and re.search(r'\bPython\b', source.comments[n].text) and not ANCHOR.search(source.comments[n].text)}

    def foldable(self, pieces, count, entry):
        if entry.kind in ('introduction', 'not-ported') or any(g.kind == 'class' for g in entry.groups) or (
                entry.items and entry.items[0].kind in ('between', 'class')):
            if count > WIDEST + 6:
                return '<div class="fold">%s<button class="more">all %d lines</button></div>' % (pieces, count)
        return pieces

    def left(self, entry):
        if not entry.items:
            return '<div class="none">Python has none.</div>'
        if all(i.missing for i in entry.items):
            if '.' in entry.title:
                return '<div class="none">Not in Python %s.</div>' % esc(self.study.version)
            return ('<div class="none told">Python %s has no %s: it was taken out in Python 3.11. To see it here, make '
                    'this page with an older one: <code>make study PYTHON=python3.10</code></div>'
                    % (esc(self.study.version), esc(entry.title)))
        pieces, count = [], 0
        for item in entry.items:
            name = item.module + '.py'
            pieces.append(self.code(name, item.first, item.last))
            count += item.last - item.first + 1
        first, last = entry.items[0].first, entry.items[-1].last
        return file_name(entry.items[0].module + '.py', first, last) + self.foldable(''.join(pieces), count, entry)

    def right(self, entry):
        if not entry.spans:
            if entry.kind == 'not-ported':
                return '<div class="none">Not ported.</div>'
            if entry.where and entry.groups:
                target = self.study.entry_of[entry.groups[0]]
                return '<div class="none">Inherited: it stands in <a href="#%s">%s</a>.</div>' % (
                    target.id, esc(self.study.short(entry.groups[0].key)))
            return '<div class="none">Nothing here.</div>'
        count, last_name, pieces = 0, '', []
        for source, first, last in entry.spans:
            if source.name != last_name:
                pieces.append(file_name(source.name, first, last))
                last_name = source.name
            whole = entry.kind == 'introduction' or any(g.kind == 'class' for g in entry.groups)
            pieces.append(self.code(source.name, first, last, entry.marks,
                                    () if whole else self.says_python(source, first, last)))
            count += last - first + 1
        return self.foldable(''.join(pieces), count, entry)

    # -- notes ---------------------------------------------------------------------------------------------

    def linker(self, entry):
        """Finds the entry that a name() in a text means: first in the entry's own class."""
        groups = self.study.cpp.groups

        def link(text):
            name = text[:-2] if text.endswith('()') else text
            if not re.fullmatch(r'~?[A-Za-z_][\w:.]*', name):
                return None
            name = name.replace('.', '::')
            for group in entry.groups:
                scope = group.key if group.kind == 'class' else group.scope
                while scope:
                    found = self.study.cpp.member(scope, name) if scope in groups else (
                        (groups[scope + '::' + name], False) if scope + '::' + name in groups else None)
                    if found and found[0] in self.study.entry_of:
                        target = self.study.entry_of[found[0]]
                        return target.id if target is not entry else None
                    scope = scope.rpartition('::')[0]
            if not text.endswith('()') and '::' not in name:
                return None
            found = [g for g in self.study.cpp.by_suffix(name) if g in self.study.entry_of]
            target = self.study.entry_of[found[0]] if len(found) == 1 else None
            return target.id if target and target is not entry else None
        return link

    def note(self, entry):
        link, out = self.linker(entry), []
        if entry.kind == 'not-ported':
            out.append('<p><span class="tag">Not ported</span> %s</p>' % self.sentence(entry.reason, link))
        elif entry.kind == 'only':
            out.append('<p><span class="tag">Only ours</span></p>')
        elif entry.kind == 'python' and entry.items and not entry.items[0].missing:
            out.append('<p class="dim">Python alone has this.</p>')
        said = []
        if entry.kind != 'introduction':
            several = entry.items and entry.items[0].kind == 'between' and len(entry.groups) > 1
            for group in entry.groups:
                said += ['`%s`: %s' % (group.name, p) if several else p for p in group.comment() if p not in said]
        for part in said:
            out.append(self.paragraph(part, link))
        if entry.where and entry.spans:
            out.append('<p class="dim">Inherited: it stands in <code>%s</code>.</p>' % esc(entry.where))
        if entry.reason and entry.kind != 'not-ported':
            out.append('<p class="dim">Not ported: %s</p>' % inline(entry.reason, link))
        for number in entry.rows:
            row = self.study.papers.rows[number]
            out.append('<div class="dev">%s<p class="where">%s</p><p><b>CPython</b> %s</p><p><b>Here</b> %s</p></div>'
                       % (self.badge(number), inline(row.where), inline(row.python), inline(row.here, link)))
        if entry.kind == 'only' and entry.callers:
            out.append('<p class="refs"><b>Used by</b> %s</p>' % self.refs(entry.callers))
        if entry.kind == 'pair' and entry.calls:
            out.append('<p class="refs"><b>Leads to</b>, ours alone: %s</p>' % self.refs(entry.calls))
        return ''.join(out)

    def refs(self, entries, most=7):
        links = ['<a href="#%s"><code>%s</code></a>' % (e.id, esc(self.label(e))) for e in entries[:most]]
        return ', '.join(links) + (' and %d more' % (len(entries) - most) if len(entries) > most else '')

    def label(self, entry):
        return self.study.short(entry.groups[0].key) if entry.groups else entry.title

    def sentence(self, text, link):
        text = text.strip()
        if not text:
            return ''
        return inline(text[0].upper() + text[1:] if not text.startswith('`') else text, link) + (
            '' if text.endswith('.') else '.')

    def paragraph(self, text, link):
        lines = text.split('\n')
        if all(l.startswith(('    ', '|')) for l in lines):
            sketch = '\n'.join(l[4:] if l[:4] == '    ' else l for l in lines)
            return '<pre class="sketch">%s</pre>' % html.escape(sketch, quote=False)
        text = ' '.join(l.strip() for l in lines)
        word = re.match(r'\w*', text)[0]
        if text[:1].islower() and word not in KEYWORDS and word != 'nullptr' and '_' not in word and (
                text[len(word):len(word) + 1] not in ('(', ':')):
            text = text[0].upper() + text[1:]
        if text[-1:].isalnum() or text[-1:] in ')`"':
            text += '.'
        return '<p>%s</p>' % inline(text, link)

    # -- the whole -----------------------------------------------------------------------------------------

    def entry(self, entry):
        ours = ', '.join(dict.fromkeys(self.study.short(g.key) for g in entry.groups))
        theirs = entry.title if entry.items else ''
        if entry.kind == 'introduction':
            theirs, ours = entry.module + '.py', entry.spans[0][0].name if entry.spans else ''
        names = ' '.join([entry.id, theirs, ours] + ['#%d' % n for n in entry.rows]).lower()
        if len(ours) > 90:
            ours = ours[:ours.rfind(',', 0, 90)] + ' ...'
        if len(theirs) > 90:
            theirs = theirs[:theirs.rfind(',', 0, 90)] + ' ...'
        heading = '<h4>%s%s</h4>' % tuple(
            '<a class="%s" href="#%s">%s</a>' % (kind, entry.id, esc(text)) if text else ''
            for kind, text in (('py', theirs), ('cpp', ours)))
        return ('<section class="pair %s" id="%s" data-k="%s" data-t="%s"><div class="head">%s</div>'
                '<div class="side left">%s</div><div class="note"><div class="stay">%s</div></div>'
                '<div class="side right">%s</div></section>\n' % (
                    entry.kind + (' differs' if entry.rows else ''), entry.id, esc(names), esc(theirs or ours), heading,
                    self.left(entry), self.note(entry), self.right(entry)))

    def contents(self):
        out = []
        for id_, title, entries in self.study.chapters:
            classes = collections.OrderedDict()
            for entry in entries:
                classes.setdefault(entry.cls, []).append(entry)
            if '' in classes:
                classes.move_to_end('', last=False)
            groups = []
            for cls, members in classes.items():
                links = []
                for entry in members:
                    text = entry.title if entry.kind != 'introduction' else 'the introduction'
                    if cls and text.startswith(cls) and text[len(cls):]:
                        text = re.sub(r'^[.:]+', '', text[len(cls):])
                        text = text.replace(', %s.' % cls, ', ')
                    short = text if len(text) < 60 else text[:text.find(',', 30)] + ', ...'
                    count = '<sup>%s</sup>' % ','.join(str(n) for n in entry.rows) if entry.rows else ''
                    links.append('<a class="is-%s" href="#%s">%s%s</a>' % (entry.kind, entry.id, esc(short), count))
                groups.append('<div class="cls">%s%s</div>' % (
                    '<b>%s</b> ' % esc(cls) if cls and members[0].title != cls else '',
                    ' '.join(links)))
            out.append('<div class="mod"><h3><a href="#%s">%s</a></h3>%s</div>' % (
                'chapter-' + id_, esc(title), ''.join(groups)))
        return ''.join(out)

    def deviations(self):
        rows = []
        for row in sorted(self.study.papers.rows.values(), key=lambda r: r.number):
            places = ', '.join('<a href="#%s"><code>%s</code></a>' % (e.id, esc(self.label(e))) for e in row.places)
            tests = ', '.join('<code>%s</code>' % esc(t) for t in dict.fromkeys(row.tests)) or '-'
            rows.append('<tr id="deviation-%d"><td class="n">%d</td><td>%s<div class="at">%s</div></td><td>%s</td>'
                        '<td>%s<div class="at">Tests: %s</div></td></tr>' % (
                            row.number, row.number, inline(row.where), places or 'everywhere', inline(row.python),
                            inline(row.here), tests))
        return ('<table><thead><tr><th>#</th><th>where</th><th>CPython 3.11</th><th>here, and why</th></tr></thead>'
                '<tbody>%s</tbody></table>' % ''.join(rows))

    def data(self):
        rows = {r.number: [inline(r.where), inline(r.python), inline(r.here)] for r in self.study.papers.rows.values()}
        walks = [{'id': id_, 'title': title, 'about': about, 'steps': [
            {'to': s.entry.id, 'name': s.name, 'ours': s.lines,
             'theirs': s.python_lines, 'text': inline(s.text)} for s in steps if s.entry]}
            for id_, title, about, steps in self.study.walks]
        return json.dumps({'rows': rows, 'walks': walks}).replace('</', '<\\/')

    def render(self):
        study, parts = self.study, []
        for id_, title, entries in study.chapters:
            alone = id_.startswith('ours-')
            parts.append('<div class="alone">\n' if alone else '<div>\n')
            parts.append('<h2 class="chapter" id="chapter-%s">%s</h2>\n' % (id_, esc(title)))
            cls = None
            for entry in entries:
                if entry.cls != cls and entry.cls:
                    parts.append('<h3 class="class"><span>%s</span></h3>\n' % esc(entry.cls))
                cls = entry.cls
                parts.append(self.entry(entry))
            parts.append('</div>\n')
        entries = study.entries()
        walks = ''.join('<button class="walk" data-walk="%d"><b>%s</b><span>%s</span><em>%d steps</em></button>' % (
            i, esc(title), inline(about), len(steps)) for i, (_, title, about, steps) in enumerate(study.walks))
        counts = collections.Counter(e.kind for e in entries)
        page = (self.study.here / 'study.html').read_text(encoding='utf-8')
        values = {
            'style': (study.here / 'study.css').read_text(encoding='utf-8'),
            'script': (study.here / 'study.js').read_text(encoding='utf-8'),
            'data': self.data(), 'version': esc(study.version), 'walks': walks, 'contents': self.contents(),
            'body': ''.join(parts), 'deviations': self.deviations(), 'rows': str(len(study.papers.rows)),
            'pairs': str(counts['pair']), 'only': str(counts['only']),
            'not_ported': ''.join('<li><code>%s</code>: %s</li>' % (esc(n), inline(why))
                                  for n, why in study.papers.not_ported.items()) +
            ('<li>the private names such as <code>__server</code>: %s</li>' % inline(study.papers.private)
             if study.papers.private else ''),
        }
        return re.sub(r'@(\w+)@', lambda m: values.get(m[1], m[0]), page)


def file_name(name, first, last):
    lines = str(first) if first == last else '%d&ndash;%d' % (first, last)
    return '<div class="file"><span>%s</span> <span>%s</span></div>' % (name, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--python', default='')
    parser.add_argument('-o', default=str(TOP / 'dist/study.html'), metavar='FILE')
    args = parser.parse_args()
    if sys.version_info < (3, 8):
        sys.exit('study.py: it takes Python 3.8 or newer to run this (the Python that it shows may be older: PYTHON=)')
    python = find_python(args.python)
    if not python:
        print('study.py: no Python here has asyncore, asynchat and smtpd: that takes 3.11 or older, PYTHON=/path/of/it',
              file=sys.stderr)
        return NO_PYTHON
    study = Study(python)
    for fault in study.faults:
        print(fault)
    entries = study.entries()
    told = 'Python %s: %d pairs, %d only ours, %d deviations, %d walks; %d faults' % (
        study.version, sum(e.kind == 'pair' for e in entries), sum(e.kind == 'only' for e in entries),
        len(study.papers.rows), len(study.walks), len(study.faults))
    if not args.check and not study.faults:
        target = pathlib.Path(args.o)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Page(study).render(), encoding='utf-8')
        told = '%s: %s' % (os.path.relpath(args.o), told)
    print(told)
    return 1 if study.faults else 0


if __name__ == '__main__':
    sys.exit(main())
