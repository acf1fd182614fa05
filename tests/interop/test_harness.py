#!/usr/bin/env python3
"""Shows that the clients and servers of this folder do what the tests rely on.

    test_harness.py [--no-skip]

Nothing of this library takes part.  When test_clients.py or test_proxy.py
fails and this passes, the fault is not in the harness.  What is shown of
Mailman's LMTP service is also what MailmanProxy has to live with.
"""

import argparse
import os
import smtplib
import sys

sys.dont_write_bytecode = True

from clients import CLIENTS, MESSAGES                   # noqa: E402
from results import Results, Skip, same, terminate_on_signal  # noqa: E402
from upstreams import (                                 # noqa: E402
    HOST, Exim, Mailman, MissingTool, Postfix, RecordingSink, SmtpSink,
    greeting)


def send(client, port, kind):
    try:
        sent = client.send(HOST, port, MESSAGES[kind])
    except MissingTool as e:
        raise Skip(e)
    assert sent.accepted, sent.output
    return sent


def into_maildir(server, client, kind):
    server.clear()
    sent = send(client, server.port, kind)
    server.wait_for(len(sent.rcpttos))
    got = server.wait_idle()
    assert sorted(m.recipient for m in got) == sorted(sent.rcpttos), got
    for message in got:
        assert message.sender == sent.mailfrom, message.sender
        assert message.queue_id, message.raw[:500]
        same(message.content, sent.data + b'\n')


def into_sink(sink, client, kind):
    before = len(sink.messages())
    sent = send(client, sink.port, kind)
    message = sink.wait_for(before + 1)[-1]
    assert message.mail_args.startswith('<%s>' % sent.mailfrom), \
        message.mail_args
    assert message.rcpt_args == ['<%s>' % r for r in sent.rcpttos], \
        message.rcpt_args
    same(message.content, sent.data + b'\n')


def crash(postfix):
    """What Postfix accepted before it was killed, it delivers afterwards."""
    postfix.clear()
    smtplib_client = [c for c in CLIENTS if c.name == 'smtplib'][0]
    for _ in range(5):
        send(smtplib_client, postfix.port, 'dots')
    postfix.kill()
    assert greeting(postfix.port) == b'', 'still there'
    postfix.start()
    got = postfix.wait_idle()
    assert len({m.queue_id for m in got}) == 5, got


def clients_and_servers(results):
    with Postfix() as postfix:
        for client in CLIENTS:
            for kind in MESSAGES:
                results.run('%s into Postfix: %s' % (client.name, kind),
                            into_maildir, postfix, client, kind)
        results.run('Postfix killed and started', crash, postfix)
    with SmtpSink() as sink:
        for client in CLIENTS:
            for kind in ('plain', 'dots', '8bit'):
                results.run('%s into smtp-sink: %s' % (client.name, kind),
                            into_sink, sink, client, kind)


def exim(results):
    with Exim() as server:
        for client in CLIENTS:
            for kind in MESSAGES:
                results.run('%s into Exim: %s' % (client.name, kind),
                            into_maildir, server, client, kind)


# ---------------------------------------------------------------------------
# Mailman's LMTP service.

class Lmtp(smtplib.LMTP):
    """One session; `transact` reads no more replies than there are."""

    def __init__(self, mailman):
        super().__init__(mailman.host, mailman.port, timeout=20)
        self.ehlo('client.example.test')

    def rcpts(self, mailfrom, rcpttos):
        self.rset()
        assert self.mail(mailfrom)[0] == 250
        return [self.rcpt(r)[0] for r in rcpttos]

    def data_replies(self, content, n):
        """The codes after the data, of n replies and one for a NOOP."""
        self.putcmd('data')
        assert self.getreply()[0] == 354
        self.send(content.replace(b'\n', b'\r\n') + b'.\r\nNOOP\r\n')
        return [self.getreply()[0] for _ in range(n)] \
            + [self.getreply()[1][:2]]


def post(mailman, out, address, key, body=b'help\n', head=b'',
         mailfrom='first@subscriber.example.test', subject='a post'):
    rcpttos = ['%s@%s' % (a, mailman.DOMAIN) for a in address.split()]
    out.clear()
    with Lmtp(mailman) as lmtp:
        codes = lmtp.rcpts(mailfrom, rcpttos)
        assert codes == [250] * len(rcpttos), codes
        content = ('From: <%s>\nTo: <%s>\nSubject: %s\n'
                   'Message-ID: <%s@example.test>\n'
                   % (mailfrom, rcpttos[0], subject, key)).encode()
        content += head + b'\n' + body
        return lmtp.data_replies(content, len(rcpttos))


def mailman_post(mailman, out, name):
    replies = post(mailman, out, name, 'post-' + name)
    assert replies == [250, b'OK'], replies
    for subscriber in mailman.LISTS[name]:
        out.wait_for(lambda messages: any(
            subscriber in m.rcpttos and b'post-' in m.content
            for m in messages))


def mailman_command(mailman, out, address, subject, text):
    someone = 'someone@subscriber.example.test'
    replies = post(mailman, out, address, 'command', mailfrom=someone,
                   subject=subject)
    assert replies == [250, b'OK'], replies
    out.wait_for(lambda messages: any(
        someone in m.rcpttos and text in m.content for m in messages))


def mailman_owner(mailman, out, address):
    post(mailman, out, address, 'owner', body=b'for the owner\n')
    out.wait_for(lambda messages: any(
        mailman.OWNER in m.rcpttos and b'for the owner' in m.content
        for m in messages))


def mailman_addresses(mailman):
    """Which recipients Mailman's LMTP service knows."""
    known = ('', '-bounces', '-confirm', '-join', '-leave', '-owner',
             '-request', '-subscribe', '-unsubscribe', '+detail',
             '-confirm+token', '-bounces+author=example.test')
    unknown = ('-admin', '-nosuch', '-', '-request-request')
    with Lmtp(mailman) as lmtp:
        for name in mailman.LISTS:
            for suffixes, code in ((known, 250), (unknown, 550)):
                for suffix in suffixes:
                    local = name + suffix
                    for address in (local + '@' + mailman.DOMAIN,
                                    (local + '@' + mailman.DOMAIN).upper()):
                        got = lmtp.rcpts('author@example.test', [address])
                        assert got == [code], '%s: %s' % (address, got)
        got = lmtp.rcpts('author@example.test',
                         ['dev@example.test', 'nosuch@' + mailman.DOMAIN])
        assert got == [550, 550], got
    return 'known: list, list' + ', list'.join(known[1:])


def mailman_one_reply(mailman, out, head, body):
    """A message that Mailman refuses whole gets one reply, not one each."""
    name = 'dev my-list'
    rcpttos = ['%s@%s' % (a, mailman.DOMAIN) for a in name.split()]
    with Lmtp(mailman) as lmtp:
        assert lmtp.rcpts('author@example.test', rcpttos) == [250, 250]
        replies = lmtp.data_replies(
            b'Message-ID: <refused@example.test>\n' + head + b'\n' + body, 1)
        assert 500 <= replies[0] <= 599 and replies[1] == b'OK', replies
        return str(replies[0])


def mailman_folders(mailman):
    """There is a folder for each list, which goes when the list goes."""
    folders = {name + '.' + mailman.DOMAIN for name in mailman.LISTS}
    assert set(os.listdir(mailman.lists_dir)) == folders
    mailman.rest('lists', {'fqdn_listname': 'more@' + mailman.DOMAIN})
    more = 'more.' + mailman.DOMAIN
    assert set(os.listdir(mailman.lists_dir)) == folders | {more}
    mailman.rest('lists/' + more, method='DELETE')
    assert set(os.listdir(mailman.lists_dir)) == folders


def mailman(results):
    with RecordingSink() as out, Mailman((out.host, out.port)) as server:
        for name in server.LISTS:
            results.run('Mailman: a post to ' + name, mailman_post,
                        server, out, name)
        results.run('Mailman: -request', mailman_command, server, out,
                    'dev-request', 'help', b'email command')
        results.run('Mailman: -join', mailman_command, server, out,
                    'my-list-join', '', b'confirm')
        for address in ('dev-owner', 'dev-bounces'):
            results.run('Mailman: to the owner through ' + address,
                        mailman_owner, server, out, address)
        results.run('Mailman: addresses', mailman_addresses, server)
        results.run('Mailman: one reply for defective MIME',
                    mailman_one_reply, server, out,
                    b'Content-Type: multipart/mixed; boundary=none\n',
                    b'no parts\n')
        results.run('Mailman: one reply for a line too long',
                    mailman_one_reply, server, out, b'', b'x' * 2000 + b'\n')
        results.run('Mailman: folders of lists', mailman_folders, server)


def main():
    parser = argparse.ArgumentParser(description='The harness itself.')
    parser.add_argument('--no-skip', action='store_true',
                        default=bool(os.environ.get('NO_SKIP')))
    args = parser.parse_args()
    terminate_on_signal()
    results = Results(args.no_skip)
    for part in (clients_and_servers, exim, mailman):
        try:
            part(results)
        except MissingTool as e:
            results.skip(part.__name__.replace('_', ' '), e)
    return results.close()


if __name__ == '__main__':
    sys.exit(main())
