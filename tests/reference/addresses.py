#!/usr/bin/env python3
"""Check, or write again, what addresses.txt says about each argument of MAIL, RCPT and VRFY.

    addresses.py [--check]    fail when CPython's parser, or the rules below, say something else
    addresses.py --update     write both answers again; a new argument is a line of its own

Each line holds an argument, what CPython 3.11's SMTPChannel._getaddr makes of it, and, where a
deviation changes that, the deviation's name and what the port makes of it.  README.md has the details.
"""

import collections
import email._header_value_parser as parser
import re
import sys

import record
import smtpd

FILE = record.HERE / 'addresses.txt'
REFUSED = '501'
# local-part "@" domain-literal, with any of <>[]\ between the literal's brackets
LITERAL_WITH_SPECIALS = re.compile(r'("(\\.|[^"\\])*"|[^"@]*)@\[.*[][<>\\].*\]', re.S)


def python_answer(arg):
    """(address, rest), or the exception's name."""
    try:
        return smtpd.SMTPChannel._getaddr(None, arg)
    except Exception as error:
        return type(error).__name__


def without_encoded_words(arg):
    """What CPython would say if it knew no encoded words."""
    def refuse(value):
        raise parser.errors.HeaderParseError('not an encoded word')
    original, parser.get_encoded_word = parser.get_encoded_word, refuse
    try:
        return python_answer(arg)
    finally:
        parser.get_encoded_word = original


def our_answer(arg, python):
    """The deviation that decides, and the port's answer; no deviation where CPython's holds."""
    plain = without_encoded_words(arg)
    failed = isinstance(plain, str)
    if re.search('[\x00-\x08\x0a-\x1f\x7f]', arg) or (not failed and '\t' in plain[0]):
        return 'control-characters', REFUSED
    if not failed and LITERAL_WITH_SPECIALS.fullmatch(plain[0]):
        return 'domain-literals', REFUSED
    if plain != python:
        return 'encoded-words', REFUSED if failed else plain
    return ('malformed-address', REFUSED) if failed else ('', plain)


def fields(answer):
    """An answer as it is written: one field for a refusal, else the address and the rest."""
    if isinstance(answer, str):
        return ['!' + answer]
    return [mark + record.escape(encoded(text), compact=False)
            for mark, text in zip('+|', answer)]


def encoded(text):
    try:
        return text.encode('utf-8', 'surrogateescape')
    except UnicodeEncodeError:
        return text.encode('utf-8', 'surrogatepass')


def line_for(escaped):
    arg = record.unescape(escaped).decode()
    python = python_answer(arg)
    deviation, ours = our_answer(arg, python)
    columns = [escaped] + fields(python) + ([deviation] + fields(ours) if deviation else [])
    return '\t'.join(columns), deviation


def main():
    update = '--update' in sys.argv[1:]
    old = FILE.read_text(encoding='utf-8').rstrip('\n').split('\n')
    new, count, failed, seen = [], collections.Counter(), 0, set()
    for number, line in enumerate(old, 1):
        if line.startswith('#') or not line:
            new.append(line)
            continue
        escaped = line.split('\t')[0]
        if escaped in seen:
            sys.exit('%s:%d: twice: %s' % (FILE.name, number, escaped))
        seen.add(escaped)
        expected, deviation = line_for(escaped)
        if expected != line and not update:
            failed += 1
            print('%s:%d:\n  on file %s\n  now     %s' % (FILE.name, number, line, expected))
        count[deviation or 'as CPython'] += 1
        new.append(expected)
    if update:
        FILE.write_text('\n'.join(new) + '\n', encoding='utf-8')
    print('%d arguments: %s; failed: %d' % (
        sum(count.values()), ', '.join('%s %d' % item for item in count.most_common()), failed))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
