"""aiosmtpd, as the bench runs it: it takes each message and drops it.

    python3 aiosmtpd_server.py port
"""
import asyncio
import sys

from aiosmtpd.smtp import SMTP

SIZE_LIMIT = 64 << 20


class Handler:
    async def handle_DATA(self, server, session, envelope):
        return '250 OK'


async def main():
    handler = Handler()
    server = await asyncio.get_running_loop().create_server(
        lambda: SMTP(handler, data_size_limit=SIZE_LIMIT, hostname='localhost'),
        '127.0.0.1', int(sys.argv[1]), backlog=4096)
    print('port', server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
