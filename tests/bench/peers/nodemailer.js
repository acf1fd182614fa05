// nodemailer's smtp-server, as the bench runs it: it takes each message and drops it.
//
//   NODE_PATH=where/npm/installed/node_modules node nodemailer.js port

'use strict';
const { SMTPServer } = require('smtp-server');

const server = new SMTPServer({
    name: 'localhost',
    size: 64 << 20,
    disabledCommands: ['AUTH', 'STARTTLS'],
    disableReverseLookup: true,
    logger: false,
    onData(stream, session, callback) {
        stream.on('end', () => callback());
        stream.resume();
    }
});
server.on('error', () => {});   // a client that closes with a reset is not worth an end
server.listen({ port: Number(process.argv[2]), host: '127.0.0.1', backlog: 4096 }, () => {
    console.log('port ' + server.server.address().port);
});
