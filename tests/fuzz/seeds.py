#!/usr/bin/env python3
"""Writes inputs to start from, made of tests/reference. Usage: seeds.py FOLDER: they go to FOLDER/TARGET/."""
import pathlib
import re
import sys

REFERENCE = pathlib.Path(__file__).resolve().parent.parent / 'reference'
ESCAPES = {'r': b'\r', 'n': b'\n', 't': b'\t', '\\': b'\\', '{': b'{', '}': b'}'}
LONGEST = 4000


def unescape(text):
    """The bytes that a text on file stands for; see tests/reference/README.md."""
    def one(match):
        token = match.group()
        if token.startswith('\\x'):
            return bytes([int(token[2:], 16)])
        if token.startswith('\\'):
            return ESCAPES[token[1]]
        if token.startswith('{'):
            what, star, times = token[1:-1].rpartition('*')
            return unescape(what) * int(times) if star else b'mx.test'
        return token.encode()
    return b''.join(map(one, re.finditer(r'\\x..|\\.|\{(?:\\.|[^}])*\}|.', text, re.S)))


def scenarios():
    """The options of each conversation, and what the client says in it."""
    for file in sorted(REFERENCE.glob('conversations/*.txt')):
        for scenario in re.split(r'^== ', file.read_text(), flags=re.M)[1:]:
            said = [line[3:] for line in scenario.splitlines() if re.match(r'C[:+] (?!\{[a-z_]+[ }])', line)]
            yield scenario, b''.join(map(unescape, said))


def repeated(text):
    """With runs of a byte as fuzz::expanded() reads them."""
    return re.sub(rb'(.)\1{47,4079}', lambda m: m.group(1) * (len(m.group()) % 16 + 1) + b'\xfe' +
                  bytes([(len(m.group()) - 1) // 16]), text, flags=re.S)


def channel():
    for number, (options, said) in enumerate(scenarios()):
        flags = ('decode_data' in options) | ('enable_SMTPUTF8' in options) << 1 | (number % 4) << 2
        size = 1 if '=None' in options else 3 if 'data_size_limit=' in options else 0
        for pieces in b'\0\0', b'\7\0', b'\1\2':
            yield bytes([flags, size, number % 16, pieces[0] * 9]) + pieces + bytes([number % 256, 0x21]) + repeated(said)


def address():
    for number, line in enumerate((REFERENCE / 'addresses.txt').read_text().splitlines()):
        if line and not line.startswith('#') and number % 5 == 0:
            yield b'\0' + unescape(line.split('\t')[0])
    for words in b'SIZE=1 BODY=8BITMIME SIZE=2', b'A=B=C A SMTPUTF8', b'SIZE=', b'=', b'X-Y=1', b'A=\xc3\xa9':
        yield b'\3' + words


GREETINGS = [b'220 mx.test\r\n', b'220-a\r\n220 b\r\n', b'554 no\r\n']
HELLOS = [b'250-mx.test\r\n250-SIZE 1000\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n', b'250 mx\r\n', b'502 no\r\n\x01250 mx\r\n']
ANSWERS = [[b'250 OK\r\n'] * 4 + [b'354 go\r\n', b'250 taken\r\n', b'221 Bye\r\n'],
           [b'250 OK\r\n', b'550 no such user\r\n', b'251 fwd\r\n', b'250 OK\r\n', b'354\r\n', b'250-a\r\n250 b\r\n250 c\r\n452 full\r\n'],
           [b'250 OK\r\n', b'250 OK\r\n', b'354 go\r\n', b'552-too\r\n552 much\r\n'],
           [b'421 gone\r\n'], [b'250 OK\r\n', b'\x02'], [b'250 OK\r\n', b'x' * 90 + b'\xfe\xff'],
           [b'250 OK\r\n', b'25', b'0 OK\n', b'35', b'4 go\r\n250 soon\r\n'], [b'250 OK\r\n250 OK\r\n354 go\r\n250 OK\r\n']]


def reply():
    for number, answers in enumerate(ANSWERS):
        for greeting in GREETINGS:
            for hello in HELLOS:
                yield bytes([number * 21 % 64, number, number % 3 * 20]) + b'\x01'.join([greeting, hello, *answers])
    for flags in range(64):
        recipients, lmtp = flags >> 3 & 3, flags & 1
        for last in b'250 taken\r\n', b'250-a\r\n250 b\r\n', b'452 full\r\n':
            said = [GREETINGS[0], HELLOS[0], *[b'250 OK\r\n'] * (1 + recipients), b'354 go\r\n']
            end = [b'250 OK\r\n'] * (recipients - 1 if lmtp else 0)
            yield bytes([flags, flags % 7, flags % 3 * 9]) + b'\x01'.join([*said, *end, last, b'221 Bye\r\n'])


def proxy():
    mail = b'EHLO a\r\n', b'MAIL FROM:<a@b> BODY=8BITMIME\r\n', b'RCPT TO:<c@d>\r\n', b'RCPT TO:<e@f>\r\n', b'DATA\r\n'
    bodies = b'Subject: x\r\n\r\nhi\r\n..\r\n.\r\n', b'.\r\n', b'a\rb\nc\r\n.\r\nRSET\r\nQUIT\r\n'
    number = 0
    for greeting in GREETINGS:
        for hello in HELLOS:
            for answers in ANSWERS:
                number += 1
                body = bodies[number % 3]
                said = [greeting, hello, *answers]
                turns = zip([mail[0] + mail[1], *[b''] * hello.count(b'\x01'), b'', *mail[2:], body, *[b''] * 9], said)
                yield bytes([number % 16, 0]) + b''.join(b'\x01' + ours + b'\x02' + theirs for ours, theirs in turns)
                yield bytes([number % 16, 9]) + b'\x01' + b''.join(mail) + body + b''.join(b'\x02' + it for it in said)


def grammar():
    for seed in range(300):
        value = seed + 1
        yield bytes((value := value * 1103515245 + 12345 & 0x7fffffff) >> 16 & 0xff for _ in range(40 + seed))


def main():
    for make in channel, address, reply, proxy, grammar:
        folder = pathlib.Path(sys.argv[1], 'fuzz_' + make.__name__)
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(make()):
            if len(data) <= LONGEST:
                (folder / f'seed-{number}').write_bytes(data)


main()
