"""CPython's own smtpd, as the bench runs it: it takes each message and drops it.

    python3 -W ignore cpython.py [--poll] [--backlog N] [--proxy host:port] port

The backlog is 5 in the module itself; --backlog changes it at run time, the module's file is left alone.
"""
import argparse
import asyncore
import smtpd

SIZE_LIMIT = 64 << 20

parser = argparse.ArgumentParser()
parser.add_argument('--poll', action='store_true')
parser.add_argument('--backlog', type=int, default=5)
parser.add_argument('--proxy')
parser.add_argument('port', type=int)
args = parser.parse_args()


class Backlog:
    def listen(self, num):
        super().listen(args.backlog)


class Server(Backlog, smtpd.SMTPServer):
    def process_message(self, peer, mailfrom, rcpttos, data, **kwargs):
        return None


class Proxy(Backlog, smtpd.PureProxy):
    pass


if args.proxy:
    host, port = args.proxy.rsplit(':', 1)
    server = Proxy(('127.0.0.1', args.port), (host, int(port)), data_size_limit=SIZE_LIMIT, decode_data=True)
else:
    server = Server(('127.0.0.1', args.port), None, data_size_limit=SIZE_LIMIT)
print('port', server.socket.getsockname()[1], flush=True)
asyncore.loop(use_poll=args.poll)
